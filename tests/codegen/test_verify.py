"""`nmoe compile --verify` passes what is right and reports a wrong result and a race, each with its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen import verify
from nmoe.codegen.gemm import GemmProblem
from nmoe.codegen.spec import KernelSpec, specs
from nmoe.codegen.verify import gemm as oracle
from nmoe.config import Target, load
from nmoe.schedule import lower

DSV2 = Path(__file__).parents[2] / "configs" / "dsv2.toml"


def wgrads() -> list[KernelSpec]:
    """Two kernels of one family, and one without a template."""
    config = load(DSV2)
    config = replace(config, target=Target("sm_90a"), schedule=replace(config.schedule, precision="bf16"))
    return [s for s in specs(lower(config)) if s.name in ("grouped_gemm.wgrad", "embedding_bwd")]


def verified() -> tuple[int, list[str]]:
    lines: list[str] = []
    return verify.verify(wgrads(), lines.append), lines


@pytest.mark.usefixtures("emulator")
def test_families_pass_and_faults_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[GemmProblem] = []
    trace = kernel_compiler.trace

    def once(problem: GemmProblem, *rest: Any) -> Any:
        traced.append(problem)
        return trace(problem, *rest)

    monkeypatch.setattr(kernel_compiler, "trace", once)
    failures, lines = verified()
    assert failures == 0 and len(lines) == 2 and all(": ok: " in line for line in lines)
    assert traced == [GemmProblem("wgrad", 2, 192, 328, "accumulate")], "one run for a family"

    with monkeypatch.context() as patch:
        products = oracle._products
        patch.setattr(oracle, "_products", lambda p, t: (products(p, t)[0] * 1.01, products(p, t)[1]))
        failures, lines = verified()
        assert failures == 2 and ": differs: dw: " in lines[0] and ", expected " in lines[0]

    def unfenced(*arguments: Any) -> Any:
        function = trace(*arguments)
        text = "\n".join(line for line in function.__ptx__.splitlines() if "fence.proxy.async" not in line)
        return SimpleNamespace(__ptx__=text, export_to_c=function.export_to_c)

    monkeypatch.setattr(kernel_compiler, "trace", unfenced)
    failures, lines = verified()
    assert failures == 2 and ": emulator error: " in lines[0] and "PTX line" in lines[0], lines[0]


def test_rows_past_the_last_expert_and_unwritten_results_are_noticed() -> None:
    problem = GemmProblem("fprop", 1, 8, 8, "store")
    before = oracle.inputs(problem, [1], seed=0, spare=1)
    with pytest.raises(verify.Mismatch, match=r"^y: 1024 elements are NaN or were not written$"):
        oracle.check(problem, before, before)
    zeros = {**before, "a": torch.zeros_like(before["a"])}
    with pytest.raises(verify.Mismatch, match=r"^y: rows past the last expert were written$"):
        oracle.check(problem, zeros, {**zeros, "y": torch.zeros_like(before["y"])})
