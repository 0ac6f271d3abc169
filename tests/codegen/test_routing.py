"""Router, plan, dispatch and combine as generated kernels: which specs they build, and that they are right on the
emulator, under several warp schedules."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nmoe.binding import lowered
from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen import families, routing, verify
from nmoe.codegen.problem import IllegalConfig
from nmoe.codegen.routing import (
    CombineProblem,
    DispatchProblem,
    PlanProblem,
    RouterBwdProblem,
    RouterProblem,
    RoutingConfig,
    RoutingProblem,
)
from nmoe.codegen.spec import KernelSpec, specs
from nmoe.codegen.verify import routing as oracle
from nmoe.config import Target, load

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = ("router", "router_bwd", "moe_plan", "dispatch", "combine")

SIGMOID = {"score": "sigmoid", "normalize": True, "balance": True, "z": False}
SOFTMAX = {"score": "softmax", "normalize": False, "balance": False, "z": True}
ROUTER = RouterProblem(40, 6, 72, **SIGMOID, groups=1, topk_groups=1, biased=True)
PROBLEMS = [
    PlanProblem(40, 6, 128),
    DispatchProblem(5, 3, 536, True),
    DispatchProblem(300, 8, 256, False),
    CombineProblem(5, 3, 536, True),
    CombineProblem(300, 8, 256, False, addends=2),
    ROUTER,
    RouterProblem(64, 4, 136, **SIGMOID, groups=8, topk_groups=3, biased=True),
    RouterProblem(36, 5, 72, **SOFTMAX, groups=4, topk_groups=2, biased=False),
    RouterProblem(32, 2, 3136, **SIGMOID, groups=1, topk_groups=1, biased=False),
    RouterBwdProblem(40, 6, 72, **SIGMOID),
    RouterBwdProblem(68, 5, 136, **{**SOFTMAX, "balance": True}, addends=2),
    DispatchProblem(5, 3, 0, True),
]
CASES = [(1, 150, 0.0), (2, 1, 0.0), (3, 39, 5.0)]  # schedule, tokens, skew: all tokens on the first experts


def routing_specs(name: str, precision: str, target: str) -> list[KernelSpec]:
    config = load(CONFIGS / f"{name}.toml")
    config = replace(config, target=Target(target), schedule=replace(config.schedule, precision=precision))
    return [spec for spec in specs(lowered(config)) if spec.anchor.kind in KINDS]


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_moonlets_routing_has_templates(target: str) -> None:
    scored: dict[str, Any] = {**SIGMOID, "balance": True}
    hopper = {DispatchProblem(64, 6, 2048, True), DispatchProblem(64, 6, 2048, False)}
    blackwell = {DispatchProblem(64, 6, 0, True)}  # GEMMs gather the rows
    assert {families.match(spec) for spec in routing_specs("moonlet", "bf16", target)} == {
        *(hopper if target == "sm_90a" else blackwell),
        RouterProblem(64, 6, 2048, **scored, groups=1, topk_groups=1, biased=True),
        RouterBwdProblem(64, 6, 2048, **scored, addends=2),
        PlanProblem(64, 6, 128),
        CombineProblem(64, 6, 2048, True),
        CombineProblem(64, 6, 2048, False),
    }


@pytest.mark.parametrize("name", ["moonlight", "dsv2", "dsv3"])
def test_the_routing_of_other_configs_has_templates(name: str) -> None:
    for spec in routing_specs(name, "bf16", "sm_100a"):
        problem = families.match(spec)
        if isinstance(problem, str) and problem.endswith(" ranks is made by RDEP"):
            continue
        assert isinstance(problem, RoutingProblem), f"{spec.name}: {problem}"
        for config in problem.configs("sm_100a"):
            assert problem.violations(config, "sm_100a") == []


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(ROUTER, experts=516), "6 of 516 experts: at most 32 of 512"),
        (replace(ROUTER, experts=42), "42 experts: logits are stored in whole 16 bytes"),
        (replace(ROUTER, groups=3), "3 groups of 40 experts: at most 32 equal ones"),
        (replace(ROUTER, groups=10, topk_groups=1), "1 groups hold fewer than 6 experts"),
        (DispatchProblem(5, 6, 64, True), "6 of 5 experts: at most 32 of 512"),
        (CombineProblem(5, 3, 60, True), "hidden 60: rows are read in whole 16 bytes"),
    ],
)
def test_what_no_template_builds_is_said(problem: RoutingProblem, reason: str) -> None:
    assert problem.refusal() == reason


def test_illegal_configs_name_the_limit() -> None:
    with pytest.raises(
        IllegalConfig, match="40 warps: a thread block has 1 to 32; 8 blocks, 100 parts: at least 1"
    ):
        ROUTER.require_legal(RoutingConfig(40, 8, 100), "sm_90a")
    with pytest.raises(
        IllegalConfig, match="280004 bytes of shared memory: H100 SXM gives a thread block 232448"
    ):
        PlanProblem(2000, 8, 128).require_legal(RoutingConfig(warps=32), "sm_90a")


@cache
def traced(problem: RoutingProblem, target: str) -> Any:
    return kernel_compiler.trace(problem, problem.configs(target)[0], target)


def run(
    problem: RoutingProblem, before: dict[str, Any], target: str = "sm_90a", seed: int = 1
) -> dict[str, Any]:
    """The operands after an emulated launch."""
    from nmoe.codegen.emulator import Device, Options, bind

    device = Device(Options(seed=seed, races=True))
    held = {n: device.tensor(t.clone()) if isinstance(t, torch.Tensor) else t for n, t in before.items()}
    bind(traced(problem, target))(device, *held.values(), seed, 0)
    return {n: t.torch if isinstance(before[n], torch.Tensor) else t for n, t in held.items()}


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("target", "problem"), [
    (("sm_90a", "sm_100a")[i % 2], problem) for i, problem in enumerate(PROBLEMS)
], ids=lambda p: getattr(p, "family", p))  # fmt: skip
def test_kernels_are_right_under_every_schedule(problem: RoutingProblem, target: str) -> None:
    config = problem.configs(target)[0]
    for seed, tokens, skew in CASES:
        before = oracle.case(problem, config, seed, tokens, skew)
        worst = verify.run(traced(problem, target), problem, config, before, seed)
        assert worst <= 1
        after = run(problem, before, target, seed)
        again = run(problem, before, target, seed + 3)  # another schedule and number of blocks: the same bits
        for operand in problem.operands(config):
            if operand.shape and operand.name not in oracle.WORKSPACE:
                a, b = (x[operand.name].contiguous().view(torch.uint8) for x in (after, again))
                assert torch.equal(a, b), operand.name


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("shared", "resident"), [(232_448, 2), (0, 0)], ids=["in shared memory", "loaded again"]
)
def test_a_thread_block_goes_down_the_row_tiles_of_dx(
    shared: int, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where there are more tiles than a device runs at once."""
    monkeypatch.setattr(routing, "PRODUCT_WAVE", 4)
    monkeypatch.setattr(routing, "PRODUCT_SHARED", shared)
    problem = RouterBwdProblem(36, 5, 136, **SIGMOID, addends=1)
    config = problem.configs("sm_90a")[0]
    assert (problem.dgrad.resident, problem.groups) == (resident, 2)
    function = kernel_compiler.trace(problem, config, "sm_90a")
    for seed, tokens in ((1, 300), (2, 64)):
        before = oracle.case(problem, config, seed, tokens)
        assert verify.run(function, problem, config, before, seed) <= 1


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("problem", PROBLEMS[5:8], ids=["one group", "eight groups", "softmax"])
def test_equal_scores_go_to_the_lower_expert(problem: RouterProblem) -> None:
    before = oracle.case(problem, RoutingConfig(), 1, 9)
    before["w"][1::2] = before["w"][::2]
    before["w"][8:] = before["w"][:8].repeat(problem.experts, 1)[: problem.experts - 8]
    if problem.biased:
        before["bias"].fill_(0.25)
    after = run(problem, before)
    oracle.check(problem, before, after)
    logits, indices = after["logits"], after["indices"].long()
    equal = logits.gather(1, indices).diff(dim=1) == 0
    assert equal.sum() > 9 and (indices.diff(dim=1)[equal] > 0).all()


@pytest.mark.usefixtures("emulator")
def test_a_token_of_nans_leaves_the_others_alone() -> None:
    before = oracle.case(ROUTER, RoutingConfig(), 1, 9)
    clean = run(ROUTER, before)
    before["x"][4] = float("nan")
    after = run(ROUTER, before)
    chosen = after["indices"][4]
    assert len(set(chosen.tolist())) == ROUTER.topk and chosen.min() >= 0 and chosen.max() < ROUTER.experts
    assert after["weights"][4].isnan().all() and after["balance_loss"].isnan().all()
    others = torch.arange(9) != 4
    for name in ("indices", "weights", "logits"):
        assert torch.equal(after[name][others], clean[name][others])


@pytest.mark.usefixtures("emulator")
def test_rows_that_do_not_fit_are_not_written_and_are_noticed() -> None:
    plan = PROBLEMS[0]
    before = oracle.case(plan, RoutingConfig(16), 1, 150)
    whole = run(plan, before)
    limit = 128 * 11
    assert limit < whole["offsets"][-1]
    after = run(plan, before | {"row_source": before["row_source"][: limit + 100].clone()})
    fits = whole["slots"] < limit
    assert torch.equal(after["slots"], torch.where(fits, whole["slots"], -1))
    assert torch.equal(after["offsets"], whole["offsets"].clamp(max=limit))
    assert torch.equal(after["row_source"][:limit], whole["row_source"][:limit])
    assert (after["row_source"][limit:] == -1).all() and after["load"].isnan().all()

    dispatch, combine = PROBLEMS[1], PROBLEMS[3]
    given = oracle.case(dispatch, RoutingConfig(), 1, 20)
    lost = given["slots"].clone()
    given["slots"][7, 1] = -1
    rows = run(dispatch, given)["rows"]
    assert rows[lost[7, 1].long()].isnan().all(), "nothing was written there"
    oracle.check(dispatch, given | {"slots": lost}, run(dispatch, given | {"slots": lost}))
    given = oracle.case(combine, RoutingConfig(), 1, 20)
    whole = run(combine, given)
    given["slots"][7, 1] = -1
    y = run(combine, given)["y"]
    assert y[7].isnan().all() and torch.equal(y[8:], whole["y"][8:])


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("problem", "result", "message"), [
    (PROBLEMS[0], "slots", "slots: 1 elements differ"), (PROBLEMS[1], "rows", "rows: 1 elements differ"),
    (PROBLEMS[3], "y", "y: .* of the bound"), (ROUTER, "indices", "indices: "), (ROUTER, "weights", "weights: "),
    (ROUTER, "balance_loss", "balance_loss: "), (PROBLEMS[9], "dx", "dx: "), (PROBLEMS[9], "dw", "dw: "),
], ids=lambda p: p if isinstance(p, str) else "")  # fmt: skip
def test_the_oracle_notices_one_wrong_element(problem: RoutingProblem, result: str, message: str) -> None:
    before = oracle.case(problem, problem.configs("sm_90a")[0], 1, 30)
    after = run(problem, before)
    oracle.check(problem, before, after)
    element = after[result].view(-1)[-1:] if result != "rows" else after[result].view(-1)[:1]
    element += 1 if result in ("slots", "indices") else element.abs() * 0.01 + 0.01
    with pytest.raises(verify.Mismatch, match=message):
        oracle.check(problem, before, after)


def test_small_members_hold_as_many_experts_as_a_token_chooses() -> None:
    for problem in (DispatchProblem(64, 6, 2048, True), CombineProblem(64, 6, 2048, True)):
        assert problem.small().refusal() == "" and problem.small().experts >= problem.topk
