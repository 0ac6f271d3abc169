"""Both architectures' GEMMs on the emulator: within derived bounds, race-free, under several schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen import verify
from nmoe.codegen.gemm import GemmProblem
from nmoe.codegen.verify import gemm as oracle


def scaled(role: str, experts: int, epilogue: str, precision: str, **rest: Any) -> GemmProblem:
    """Sizes that fill neither tiles nor, where they need not, slices."""
    n, k = {"fprop": (768 if epilogue == "swiglu" else 400, 192), "dgrad": (192, 320), "wgrad": (192, 336)}[
        role
    ]
    return GemmProblem(role, experts, n, k, epilogue, precision, "blocked", **rest)  # type: ignore[arg-type]


PROBLEMS = [
    GemmProblem("fprop", 3, 256, 136, "store"),
    GemmProblem("fprop", 4, 400, 192, "swiglu"),
    GemmProblem("dgrad", 3, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 3, 192, 328, "accumulate"),
    # An odd number of row tiles, and of column tiles: clusters whose thread blocks part, one of them without a tile.
    GemmProblem("dgrad", 3, 200, 520, "dswiglu"),
    GemmProblem("wgrad", 3, 328, 520, "accumulate"),
    GemmProblem("dgrad", 0, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 0, 192, 328, "accumulate"),
    GemmProblem("fprop", 0, 400, 192, "store", addends=2),
]
GATHERED = [
    GemmProblem("fprop", 4, 400, 136, "swiglu", gathered="a", topk=6),
    GemmProblem("dgrad", 3, 200, 264, "dswiglu", gathered="a", topk=1),
    GemmProblem("wgrad", 3, 200, 328, "accumulate", gathered="a", topk=3),
    GemmProblem("wgrad", 3, 192, 328, "accumulate", gathered="b", topk=8),
]
BLOCK_SCALED = [
    scaled("fprop", 4, "store", "mxfp8"),
    scaled("fprop", 0, "store", "mxfp8", addends=1),
    scaled("fprop", 3, "swiglu", "mxfp8", copies=("row",)),
    scaled("fprop", 0, "swiglu", "mxfp8", copies=("row", "col"), keeps_h=False),
    scaled("dgrad", 3, "dswiglu", "mxfp8", copies=("col", "row")),
    scaled("wgrad", 3, "accumulate", "mxfp8"),
    scaled("fprop", 3, "swiglu", "nvfp4"),
    scaled("dgrad", 0, "store", "nvfp4", addends=2),
    scaled("dgrad", 3, "dswiglu", "nvfp4"),
    scaled("wgrad", 4, "accumulate", "nvfp4"),
]
COUNTS = [[130, 0, 1, 300], [1, 513, 0, 0], [257, 0, 0, 0]]  # rows of each expert
SCHEDULES = [1, 2, 3]


def run(problem: GemmProblem, target: str, cluster: int, spare: int = 64, turned: bool = False) -> None:
    config = next(c for c in problem.configs(target) if c.cluster == cluster)
    if turned:
        config = replace(config, transposed=not config.transposed)
    function = kernel_compiler.trace(problem, config, target)
    for counts, schedule in zip(COUNTS, SCHEDULES, strict=True):
        tensors = oracle.case(problem, config, schedule, counts[: problem.groups], spare)
        assert verify.run(function, problem, config, tensors, schedule) <= 1


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("problem", "target"),
    [
        (GemmProblem("wgrad", 3, 192, 328, "accumulate"), "sm_90a"),
        (GemmProblem("wgrad", 3, 192, 336, "accumulate", "mxfp8", "rows"), "sm_90a"),
        (GemmProblem("wgrad", 3, 192, 320, "accumulate", "nvfp4", "rows"), "sm_90a"),
        *((problem, "sm_100a") for problem in GATHERED if problem.role == "wgrad"),
        *((problem, "sm_100a") for problem in BLOCK_SCALED if problem.role == "wgrad"),
    ],
    ids=str,
)
def test_a_wgrad_is_right_the_way_of_more_tiles_too(problem: GemmProblem, target: str, cluster: int) -> None:
    run(problem, target, cluster, turned=True)


def name(problem: GemmProblem) -> str:
    gathered = (problem.gathered,) if problem.gathered else ()
    return "-".join(
        (problem.role, problem.epilogue, problem.precision, *problem.copies, str(problem.experts), *gathered)
    )


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=name)
def test_grouped_gemms_are_right_under_every_schedule(problem: GemmProblem, target: str) -> None:
    run(problem, target, 1 if problem.epilogue == "store" else 2)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_two_workers_give_the_bits_of_one(target: str) -> None:
    from nmoe.codegen.emulator import Device, Options, bind

    problem = GemmProblem("fprop", 3, 400, 136, "swiglu")
    config = next(c for c in problem.configs(target) if c.cluster == 2)
    function = bind(kernel_compiler.trace(problem, config, target))
    tensors = oracle.case(problem, config, 1, COUNTS[0][:3], 64)
    found = []
    for threads in (1, 2):
        device = Device(Options(threads=threads))
        held = [device.tensor(tensors[o.name].clone()) for o in problem.operands(config)]
        function(device, *held, 5, 0)
        found.append([t.torch.view(torch.uint8) for t in held])
        assert device.reports[-1].counters["mma_ops"] > 0
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("problem", GATHERED, ids=name)
def test_gathered_gemms_are_right_under_every_schedule(problem: GemmProblem, cluster: int) -> None:
    """With no row past the last expert's, so that a source read too far is out of bounds."""
    run(problem, "sm_100a", cluster, spare=0)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("problem", BLOCK_SCALED, ids=name)
def test_block_scaled_gemms_are_right_under_every_schedule(problem: GemmProblem) -> None:
    run(problem, "sm_100a", 1 if problem.dense else 2)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("role", "epilogue"), [("fprop", "store"), ("dgrad", "store"), ("wgrad", "accumulate")]
)
@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_hopper_multiplies_what_it_has_dequantized(role: str, epilogue: str, precision: str) -> None:
    run(replace(scaled(role, 3, epilogue, precision), scales="rows"), "sm_90a", 2)
