"""Cross-entropy's kernel on the emulator: rows that fit shared memory and rows that do not, in place and not."""

from __future__ import annotations

import pytest

from nmoe.codegen import compiler, verify
from nmoe.codegen.loss import CrossEntropyProblem, LossConfig
from nmoe.codegen.verify import loss as oracle

CASES = [
    (4096, None),  # the quickstart's
    (1000, None),  # no multiple of a portion, and shorter
    (2056, LossConfig(32, 1)),  # two portions held of none, one or more
    (2056, LossConfig(32, 2)),
    (2056, LossConfig(64, 1)),
]


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("vocabulary", "config"), CASES)
def test_against_float64(vocabulary: int, config: LossConfig | None) -> None:
    problem = CrossEntropyProblem(vocabulary)
    outcome = verify.verify_family(problem, config or problem.configs("sm_90a")[0], "sm_90a")
    assert outcome.startswith("ok: ")


@pytest.mark.usefixtures("emulator")
def test_the_gradient_takes_the_logits_place() -> None:
    problem = CrossEntropyProblem(2056)
    config = LossConfig(32, 1)
    function = compiler.trace(problem, config, "sm_100a")
    case = oracle.case(problem, config, 3)
    apart = verify.launch(function, problem, config, case, 1)
    shared = {**case, "dlogits": None}
    from nmoe.codegen.emulator import Device, Options, bind

    device = Device(Options(seed=1, races=True))
    held = {n: device.tensor(t.clone()) if hasattr(t, "clone") else t for n, t in shared.items()}
    held["dlogits"] = held["logits"]
    bind(function)(device, *(held[o.name] for o in problem.operands(config)), 1, 0)
    assert held["logits"].torch.equal(apart["dlogits"]) and held["loss"].torch.equal(apart["loss"])


def test_configs_hold_as_much_of_a_row_as_there_is_room_for() -> None:
    for vocabulary, threads, held in (
        (8, 128, 1),
        (4096, 128, 1),
        (32768, 1024, 1),
        (129280, 1024, 3),
        (201088, 1024, 3),
    ):
        (config,) = CrossEntropyProblem(vocabulary).configs("sm_90a")
        assert (config.threads, config.held) == (threads, held)
        assert not CrossEntropyProblem(vocabulary).violations(config, "sm_90a")
    assert CrossEntropyProblem(8).violations(LossConfig(100, 0), "sm_90a")
