"""`nmoe compile --verify`: kernels of the config's families on the PTX emulator, against an oracle.

A family is a kernel's code path: its problem but for the sizes, and its config. Sizes are compiled in, so a small
member of it is compiled and run, under warp schedules with race detection. Of a kernel in Triton its interpreter runs
the source, in FP32. An oracle is a module of this package with

    case(problem, config, seed)      operands by name, results poisoned
    check(problem, before, after)    the largest error of each result as a share of its bound; raises Mismatch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nmoe import autotune
from nmoe.codegen import compiler, families, triton
from nmoe.codegen.problem import Config, Problem
from nmoe.codegen.spec import KernelSpec
from nmoe.codegen.verify import attention, gemm, loss, optimizer, routing, rows
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.errors import UserError

ORACLES: dict[str, ModuleType] = {  # by Problem.family
    "gemm": gemm, "moe_plan": routing, "dispatch": routing, "combine": routing, "router": routing,
    "router_bwd": routing, "rows": rows, "attention": attention,
    "cross_entropy": loss, "adamw": optimizer,
}  # fmt: skip
SCHEDULES = (1, 2)


def launch(function: Any, problem: Problem, config: Config, tensors: Tensors, seed: int) -> Tensors:
    """The operands after one emulated launch of a traced function. Raises EmulationError and PtxError. `seed` names the
    warp schedule; as many clusters are launched, so that tiles share them unevenly."""
    from nmoe.codegen.emulator import Device, Options, bind

    device = Device(Options(seed=seed, races=True))
    held = {n: device.tensor(t.clone()) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    bind(function)(device, *(held[operand.name] for operand in problem.operands(config)), seed, 0)
    return {n: t.torch if isinstance(tensors[n], torch.Tensor) else t for n, t in held.items()}


def interpret(problem: Problem, config: Config, target: str, tensors: Tensors) -> Tensors:
    """The operands after a Triton kernel's launches in its interpreter."""
    after = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    triton.interpret(problem, config, target, after)
    return after


def run(function: Any, problem: Problem, config: Config, tensors: Tensors, seed: int) -> float:
    """The largest share of a bound after `launch`. Raises Mismatch, too."""
    after = launch(function, problem, config, tensors, seed)
    return max(ORACLES[problem.family].check(problem, tensors, after).values())


def verify_family(problem: Problem, config: Config, target: str, schedules: Sequence[int] = SCHEDULES) -> str:
    """What became of a problem under every schedule: `ok: …`, `differs: …`, `emulator error: …` or, for what nobody
    foresaw, the exception."""
    worst = 0.0
    try:
        function = None
        if problem.language == "cutedsl":
            function = compiler.trace(problem, config, target, "--generate-line-info")
        for seed in schedules:
            oracle = ORACLES[problem.family]
            case = oracle.case(problem, config, seed)
            if function is None:
                shares = oracle.check(problem, case, interpret(problem, config, target, case))
                worst = max(worst, *shares.values())
            else:
                worst = max(worst, run(function, problem, config, case, seed))
    except Mismatch as error:
        return f"differs: {error} (schedule {seed})"
    except UserError as error:
        return f"emulator error: {error} (schedule {seed})"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    how = "in Triton's interpreter" if function is None else f"{len(schedules)} schedules"
    return f"ok: {worst:.3g} of the bound, {how}"


def verify(specs: Sequence[KernelSpec], report: Callable[[str], None], root: Path | None = None) -> int:
    """Tells `report` a line for each spec that has a template; returns how many are not ok. Specs of one family and
    config share a run. `root`: the cache whose tuning chooses the configs."""
    compiler.check_toolchain()
    outcomes: dict[tuple[Problem, Config, str], str] = {}
    failures = 0
    for spec in specs:
        problem = families.match(spec)
        if isinstance(problem, str):
            continue
        config, _ = autotune.choose(problem, spec.target, root)
        family = (problem.small(), config, spec.target)
        if family not in outcomes:
            outcomes[family] = verify_family(*family)
        failures += not outcomes[family].startswith("ok")
        report(f"{spec.key}  {' + '.join(map(str, spec.parts))}: {outcomes[family]}")
    return failures
