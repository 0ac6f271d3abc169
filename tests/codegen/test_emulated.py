"""Both architectures' grouped GEMMs on the emulator: within derived bounds, race-free, under several schedules."""

from __future__ import annotations

from typing import Any

import gemm_oracle
import pytest
import torch

from nmoe import autotune
from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen.gemm import GemmConfig, GemmProblem

PROBLEMS = [
    GemmProblem("fprop", 3, 256, 136, "store"),
    GemmProblem("fprop", 4, 400, 192, "swiglu"),
    GemmProblem("dgrad", 3, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 3, 192, 328, "accumulate"),
    GemmProblem("dgrad", 0, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 0, 192, 328, "accumulate"),
]
COUNTS = [[130, 0, 1, 300], [1, 513, 0, 0], [257, 0, 0, 0]]  # rows of each expert
SCHEDULES = [1, 2, 3]


def run(
    function: Any, problem: GemmProblem, config: GemmConfig, counts: list[int], schedule: int
) -> dict[str, float]:
    """One launch on fresh inputs; the largest error of each result as a share of its bound."""
    from nmoe.codegen.emulator import host
    from nmoe.codegen.emulator.device import Device, Options

    tensors = gemm_oracle.inputs(problem, counts[: problem.groups], schedule, spare=64)
    rows = tensors["a"].shape[0]
    tensors["partial"] = torch.full((-(-problem.k // config.tile_n), rows), float("nan"))
    before = {name: t.clone() for name, t in tensors.items()}
    device = Device(Options(seed=schedule, races=True))
    held = {name: device.tensor(t) for name, t in tensors.items()}
    operands = [held[operand.name] for operand in problem.operands(config.tile_n)]
    host.bind(function)(device, *operands, schedule, 0)  # clusters: 1 to 3, so that tiles share them unevenly
    return gemm_oracle.check(problem, before, {name: t.torch for name, t in held.items()})


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.epilogue}{p.experts}")
def test_grouped_gemms_are_right_under_every_schedule(problem: GemmProblem, target: str) -> None:
    alone = problem.epilogue == "store"  # the others run as clusters of two
    config = next(c for c in autotune.candidates(problem, target) if c.cluster == (1 if alone else 2))
    function = kernel_compiler.trace(problem, config, target, "--keep-ptx")
    for counts, schedule in zip(COUNTS, SCHEDULES, strict=True):
        assert max(run(function, problem, config, counts, schedule).values(), default=0) <= 1
