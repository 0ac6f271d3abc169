"""AdamW's kernel against float64, and the optimizer bound to it against the one in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import EmulatedLauncher
from tiny import tiny_config

from nmoe import model
from nmoe.codegen import compiler, verify
from nmoe.codegen.cache import Cache
from nmoe.codegen.driver import SCRATCH_ARGUMENTS
from nmoe.codegen.optimizer import AdamWProblem, match, specs
from nmoe.config import Optim
from nmoe.optim import AdamW
from nmoe.parameters import Parameters

pytest.importorskip("triton")
PROBLEMS = [AdamWProblem(narrow, rounded) for narrow in (False, True) for rounded in (False, True)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_float64(problem: AdamWProblem) -> None:
    (config,) = problem.configs("sm_90a")
    assert verify.verify_family(problem, config, "sm_90a").startswith("ok: ")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_a_run_needs_two_and_they_compile(target: str, tmp_path) -> None:
    config = tiny_config(target={"device": target}, schedule={"precision": "bf16"})
    problems = [match(spec) for spec in specs(config)]
    assert problems == [AdamWProblem(False, True), AdamWProblem(False, False)]
    for problem in problems:
        entry = compiler.compile_problem(problem, problem.configs(target)[0], target, Cache(tmp_path))
        assert all(used["stack"] == used["local"] == 0 for used in entry.report["kernels"].values())
        (launch,) = problem.launches(problem.configs(target)[0])
        text = (entry.folder / "update.ptx").read_text()
        assert text.count(".param .") == len(launch.arguments) + SCRATCH_ARGUMENTS  # what driver.py passes


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_bound_optimizer_takes_the_steps_of_an_unbound_one(moments: Any) -> None:
    graph = model.build(tiny_config(schedule={"precision": "bf16"}))
    optim = Optim(lr=1e-2, clip_norm=0.5, state_precision=moments)
    both = []
    for bound in (False, True):
        parameters = Parameters(graph)
        parameters.initialise(0, 0.02)
        optimizer = AdamW(parameters, optim)
        if bound:
            optimizer.bind(EmulatedLauncher(), "sm_90a")
        for step in range(3):
            parameters.grad.normal_(generator=torch.Generator().manual_seed(step))
            optimizer.step(0.7, 1.0)
        both.append(optimizer)
    # A moment that BF16 rounds to the other side moves a step of 0.7 · lr by 2^-8.
    slack = 1e-6 if moments == "fp32" else 3 * 0.7e-2 * 2**-8
    for one, other in zip(both[0].parameters.shards, both[1].parameters.shards, strict=True):
        torch.testing.assert_close(one.master, other.master, rtol=1e-5, atol=slack)
        torch.testing.assert_close(
            one.weights, other.weights, rtol=2**-7 if one.segment.narrow else 1e-5, atol=slack
        )
    torch.testing.assert_close(both[0].v, both[1].v, rtol=1e-5 if moments == "fp32" else 2**-7, atol=1e-9)
