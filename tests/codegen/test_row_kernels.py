"""Row kernels: which specs they build; on the emulator they are right, bit for bit where nothing approximates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmoe import config as config_module
from nmoe import formats
from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen import families, verify
from nmoe.codegen.problem import ROWS, TOKENS, Problem
from nmoe.codegen.rows import BODIES, Copy, RowConfig, RowProblem
from nmoe.codegen.spec import KernelSpec, specs
from nmoe.codegen.verify import rows as oracle
from nmoe.codegen.verify.base import Mismatch
from nmoe.schedule import lower

CONFIGS = Path(__file__).parents[2] / "configs"


def copies(scales: str, *kinds: str) -> tuple[Copy, ...]:
    """Of "8" (MXFP8) or "4" (NVFP4), "r"ow or "c"olumn; "s"tochastic, "h"adamard or s"q"uare."""
    found = []
    for k in kinds:
        rounding = "stochastic" if "s" in k else "nearest"
        format = "mxfp8" if "8" in k else "nvfp4"
        found.append(Copy(format, int("r" in k), scales, rounding, "h" in k, "q" in k))  # type: ignore[arg-type]
    return tuple(found)


def kernel_specs(name: str, precision: str, device: str) -> list[KernelSpec]:
    env = {"NMOE_SCHEDULE__PRECISION": precision, "NMOE_TARGET__DEVICE": device}
    return list(specs(lower(config_module.load(CONFIGS / f"{name}.toml", env))))


@pytest.mark.parametrize("precision", ["bf16", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("device", ["sm_90a", "sm_100a"])
def test_every_row_op_of_a_config_has_a_template_with_the_specs_operands(precision: str, device: str) -> None:
    found = 0
    for spec in kernel_specs("moonlet", precision, device):
        if spec.anchor.kind not in BODIES or spec.name == "dispatch":  # alone, it is none of the row kernels
            continue
        problem = families.match(spec)
        assert isinstance(problem, RowProblem), f"{spec.name}: {problem}"
        for candidate in problem.configs(device):
            assert problem.violations(candidate, device) == []
            assert problem.small().violations(candidate, device) == []
            assert problem.small().operands(candidate) and problem.small() == problem.small().small()
        stored = [v for v in (*spec.inputs, *spec.outputs) if v.format in ("bf16", "f32")]
        plain = [o for o in problem._inputs() + problem._outputs() if o.format in ("bf16", "f32")]
        shapes = [tuple({"R": ROWS, "T": TOKENS, "S": -3}.get(n, n) for n in v.shape) for v in stored]
        assert [o.shape for o in plain if not o.name.endswith("_amax")] == shapes
        found += 1
    assert found > 10


def test_what_a_row_kernel_does_not_do_is_named() -> None:
    spec = next(
        s for s in kernel_specs("moonlet", "mxfp8", "sm_100a") if s.name == "rms_norm" and len(s.parts) > 1
    )
    quantize = spec.parts[1]
    twice = replace(spec, parts=(*spec.parts, quantize))
    assert "two copies" in str(families.match(twice))
    x = next(i for i in spec.parts[0].inputs if i is not None)
    earlier = replace(spec, parts=(spec.parts[0], replace(quantize, inputs=(x, *quantize.inputs[1:]))))
    assert "something else than its last value" in str(families.match(earlier))
    narrow = tuple(
        replace(v, shape=(*v.shape[:-1], 36)) if v.shape[-1:] == (2048,) else v for v in spec.values
    )
    assert "16 bytes" in str(families.match(replace(spec, values=narrow)))


def test_an_illegal_config_names_the_limit() -> None:
    problem = RowProblem("rms_norm", TOKENS, 2048, copies=copies("rows", "8c"))
    for config, text in (
        (RowConfig(8, 8, 2, 4, 1), "sums over rows are of one"),
        (RowConfig(8, 4, 1, 8, 1), "a block of MXFP8 is 32"),
        (RowConfig(8, 8, 1, 1, 1), "whole atoms"),
        (RowConfig(8, 8, 1, 64, 1), "at most 1024"),
        (RowConfig(8, 8, 1, 8, 9), "a multiprocessor has 2048"),
        (RowConfig(2, 8, 1, 8, 1), "lanes along a row"),
        (RowConfig(8, 8, 1, 2, 1), "a cluster has 8"),
    ):
        assert any(text in found for found in problem.violations(config, "sm_90a")), (config, text)


CASES = [  # (problem, config or None for the chosen one)
    (RowProblem("load", 160, 416, 2, keeps_body=False, copies=copies("", "8r", "8c")), None),
    (RowProblem("load", ROWS, 288, keeps_body=False, copies=copies("", "4cs", "4rs"), segments=3), None),
    (RowProblem("load", 160, 416, 2, keeps_body=False, copies=copies("", "4rq", "4cq")), None),
    (RowProblem("load", TOKENS, 104, addends=2, keeps_body=False, keeps_sum=True), None),
    (RowProblem("rms_norm", TOKENS, 1032), None),
    (RowProblem("rms_norm", TOKENS, 2080), None),
    (RowProblem("rms_norm", TOKENS, 1056, copies=copies("", "8r")), None),
    (RowProblem("rms_norm", TOKENS, 1056, keeps_body=False, copies=copies("", "8c")), None),
    (RowProblem("rms_norm", TOKENS, 288, keeps_body=False, copies=copies("", "4r", "4ch")), None),
    (RowProblem("load", TOKENS, 416, keeps_body=False, copies=copies("", "4r")), RowConfig(32, 2, 1, 7, 4)),
    (RowProblem("rms_norm_bwd", TOKENS, 1056, 0, 1, False, True, copies=copies("", "8c", "8r")), None),
    (RowProblem("rms_norm_bwd", TOKENS, 520), RowConfig(32, 2, 1, 8, 4)),
    (RowProblem("swiglu", ROWS, 416, keeps_body=False, weighted=True, segments=3, copies=copies("", "8c")), None),
    (RowProblem("swiglu", TOKENS, 264), None),
    (RowProblem("rope", TOKENS, 576, heads=3, rotary=64, inverse=True, copies=copies("", "8c", "8r")), None),
    (RowProblem("concat", TOKENS, 160, keeps_body=False, at=96, copies=copies("", "8c", "8r")), None),
    (RowProblem("split", TOKENS, 576, keeps_body=False, at=512), None),
    (RowProblem("embedding", TOKENS, 2056, vocabulary=50), None),
    (RowProblem("dispatch", ROWS, 416, 0, 0, False, False, copies("", "8r", "8c"), 3, True, topk=3), None),
    (RowProblem("dispatch", ROWS, 288, 0, 0, True, False, copies("", "4r", "4ch"), 3, topk=2), None),
    (RowProblem("load", ROWS, 416, 0, 0, False, False, copies("", "8c"), 3, source="mxfp8"), None),
    (RowProblem("load", ROWS, 416, 0, 0, False, False, copies("", "8r", "8c"), 3, source="mxfp8"), None),
    (RowProblem("dispatch", ROWS, 416, 0, 0, True, False, copies("", "8c"), 3, True, "mxfp8", topk=3), None),
    (RowProblem("dispatch", ROWS, 416, 0, 0, False, False, copies("", "8r", "8c"), 3, source="mxfp8", topk=3), None),
    (RowProblem("dispatch", ROWS, 416, segments=3, source="mxfp8", topk=2), None),
]  # fmt: skip


def for_target(problem: RowProblem, target: str) -> RowProblem:
    """With the scale factors where the target's kernels read them."""
    scales = {"sm_90a": "rows", "sm_100a": "blocked"}[target]
    return replace(problem, copies=tuple(replace(copy, scales=scales) for copy in problem.copies))


def launch(
    problem: RowProblem, target: str, tensors: dict, config: RowConfig | None = None
) -> dict[str, Tensor]:
    """The tensors after an emulated launch."""
    from nmoe.codegen.emulator import Device, Options, bind

    config = config or problem.configs(target)[0]
    device = Device(Options(seed=1))
    held = {n: device.tensor(t.clone()) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    function = kernel_compiler.trace(problem, config, target)
    bind(function)(device, *(held[o.name] for o in problem.operands(config)), 1, 0)
    return {n: held[n].torch if isinstance(t, Tensor) else t for n, t in tensors.items()}


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i][0]).replace(" ", ""))
def test_row_kernels_are_right_under_every_schedule(number: int) -> None:
    target = ("sm_90a", "sm_100a")[number % 2]  # `nmoe compile --verify` runs both
    problem, config = CASES[number]
    problem = for_target(problem, target)
    config = config or problem.configs(target)[0]
    problem.require_legal(config, target)
    function = kernel_compiler.trace(problem, config, target)
    for seed in (1, 2):
        tensors = oracle.case(problem, config, seed)
        assert verify.run(function, problem, config, tensors, seed) <= 1


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("kind", ["8", "4"])
def test_special_values_quantize_as_the_formats_say(kind: str, target: str) -> None:
    problem = RowProblem("load", TOKENS, 128, keeps_body=False, copies=copies("rows", f"{kind}r", f"{kind}c"))
    tensors = oracle.case(problem, problem.configs(target)[0], 0, 96)
    x = tensors["x"]
    x[:32] *= 2.0**-120  # subnormal results and scales
    x[0, :32] = 0.0
    x[1, 0:4] = torch.tensor([2.0**-133, -(2.0**-133), 3.3e38, -3.3e38])
    for value in (0.0, float("inf"), float("nan")):
        x[5, 40] = value
        after = launch(problem, target, tensors)
        lost = kind == "4" and value != value  # no FP4 is NaN: with all scales NaN the data say nothing
        for copy in problem.copies:
            want = formats.quantize(x, copy.format, copy.axis)
            scale = after[f"{copy.name}_scale"]
            if lost:
                assert (scale & 0x7F == 0x7F).all() and (want.scale & 0x7F == 0x7F).all()
                continue
            assert torch.equal(scale, want.scale)
            same = after[copy.name] == want.data
            nan = (after[copy.name] & 0x7F == 0x7F) & (want.data & 0x7F == 0x7F)
            assert (same | nan if kind == "8" else same).all()


@pytest.mark.usefixtures("emulator")
def test_the_weight_gradient_is_the_same_whatever_the_schedule_and_adds_to_what_is_there() -> None:
    from nmoe.codegen.emulator import Device, Options, bind

    problem = RowProblem("rms_norm_bwd", TOKENS, 264)
    config = problem.configs("sm_90a")[0]
    tensors = oracle.case(problem, config, 3, 40)
    function = kernel_compiler.trace(problem, config, "sm_90a")
    seen = []
    for seed in (0, 1, 2):
        device = Device(Options(seed=seed))
        held = {n: device.tensor(t.clone()) for n, t in tensors.items()}
        for _ in range(2):
            bind(function)(device, *(held[o.name] for o in problem.operands(config)), 1, 0)
        seen.append(held["dw"].torch.clone())
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    once = (tensors["dy"].double() * tensors["x"].double() * tensors["rstd"].double()[:, None]).sum(0)
    torch.testing.assert_close(seen[0].double(), tensors["dw"].double() + 2 * once, rtol=1e-5, atol=1e-3)


def test_the_oracle_notices_a_wrong_byte_an_unwritten_result_and_a_wrong_row() -> None:
    problem = RowProblem(
        "load", TOKENS, 64, addends=1, keeps_body=False, keeps_sum=True, copies=copies("rows", "8r")
    )
    before = oracle.case(problem, problem.configs("sm_90a")[0], 0, 40)
    total = (before["x"].float() + before["addend0"].float()).bfloat16()
    q = formats.quantize(total, "mxfp8", 1)
    right = before | {"sum": total, "row": q.data, "row_scale": q.scale}
    assert oracle.check(problem, before, right) == {"sum": 0.0, "row": 0.0}
    for name in ("sum", "row", "row_scale"):
        wrong = right[name].clone()
        wrong[3, 1] += 1
        with pytest.raises(Mismatch, match=name.removesuffix("_scale")):
            oracle.check(problem, before, right | {name: wrong})
    with pytest.raises(Mismatch, match="not written"):
        oracle.check(problem, before, right | {"sum": before["sum"]})


def test_bytes_count_every_operand_once() -> None:
    problem: Problem = RowProblem("load", TOKENS, 2048, keeps_body=False, copies=copies("rows", "8r", "8c"))
    assert problem.bytes(1024) == 1024 * 2048 * (2 + 2 * (1 + 1 / 32))
