"""The protocol across hosts, in the order of the launches of rdep.device.Exchange: every interleaving of four ranks on
two hosts. Counts go to all, rows and returns to the ranks of a host, and rails carry both to the one of the same index
on the other host."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
from checker import Act, Checker, Violation

from nmoe.rdep.protocol import BACKWARD, FORWARD, RECOMPUTE

RANKS, GPUS = 4, 2


class Step(NamedTuple):
    channel: str
    kind: Literal["put", "raise", "wait", "read"]
    flag: Literal["", "full", "free"] = ""
    lag: int = 0
    ordered: bool = True


def relayed(channel: str) -> tuple[Step, ...]:
    """What a rank sends along its rail and, meanwhile, to its host; then what has landed, to its host."""
    return (Step("rails", "wait", "free", lag=1), Step("rails", "put"), Step("rails", "raise", "full"),
            *((Step(channel, "wait", "free", lag=1),) if channel == "rows" else ()),
            Step(channel, "put"), Step("rails", "wait", "full"), Step("rails", "read"), Step(channel, "put"),
            Step(channel, "raise", "full"), Step("rails", "raise", "free"),
            Step(channel, "wait", "full"), Step(channel, "read"))  # fmt: skip


TRANSFERS: dict[str, tuple[Step, ...]] = {
    "counts": (Step("counts", "put"), Step("counts", "raise", "full"), Step("counts", "wait", "full"),
               Step("counts", "read")),
    "rows": (Step("rows", "raise", "free", lag=1), *relayed("rows")),
    "returns": relayed("returns"),
}  # fmt: skip
LAYER = tuple(dict.fromkeys(FORWARD))  # on GPUs the origins come with the rows
RECOMPUTED = (*LAYER, *RECOMPUTE, *BACKWARD)


def mutants() -> dict[str, dict[str, tuple[Step, ...]]]:
    """Every one with one act less, one order less, or a flag raised before what it announces, by what was done."""
    made = {}
    for transfer, steps in TRANSFERS.items():
        for i, step in enumerate(steps):
            if step.kind not in ("raise", "wait"):
                continue
            name = f"{step.kind} {step.flag} of {step.channel} in {transfer}"
            made[f"no {name}"] = (transfer, (*steps[:i], *steps[i + 1 :]))
            made[f"unordered {name}"] = (
                transfer,
                (*steps[:i], step._replace(ordered=False), *steps[i + 1 :]),
            )
            before = [
                j for j in range(i) if steps[j].channel == step.channel and steps[j].kind in ("put", "read")
            ]
            if step.kind == "raise" and before:
                j = before[-1]
                made[f"early {name}"] = (transfer, (*steps[:j], step, *steps[j:i], *steps[i + 1 :]))
    return {name: TRANSFERS | {transfer: steps} for name, (transfer, steps) in made.items()}


def members(channel: str, rank: int) -> list[int]:
    """The ranks that a rank exchanges a channel with."""
    near = range(rank // GPUS * GPUS, (rank // GPUS + 1) * GPUS)
    if channel == "counts":
        near = range(RANKS)
    elif channel == "rails":
        near = range(rank % GPUS, RANKS, GPUS)
    return [peer for peer in near if peer != rank]


def programs(transfers: dict[str, tuple[Step, ...]], sequence: tuple[str, ...]) -> list[list[Act]]:
    found = []
    for rank in range(RANKS):
        acts, epochs = [], dict.fromkeys(("counts", "rails", "rows", "returns"), 0)
        for transfer in sequence:
            for channel in {step.channel for step in transfers[transfer]}:
                epochs[channel] += 1
            for step in transfers[transfer]:
                to = members(step.channel, rank) if step.kind in ("raise", "wait") else [-1]
                epoch = epochs[step.channel] - step.lag
                acts += [Act(step.kind, step.channel, step.flag, peer, epoch, step.ordered) for peer in to]
        found.append(acts)
    return found


class Hosts(Checker):
    def peers(self, channel: str, rank: int) -> list[int]:
        return members(channel, rank)


def check(transfers: dict[str, tuple[Step, ...]], sequence: tuple[str, ...]) -> int:
    return Hosts(programs(transfers, sequence)).run()


@pytest.mark.parametrize("sequence", [RECOMPUTED, LAYER * 2], ids=["recomputed", "layers"])
def test_safe(sequence: tuple[str, ...]) -> None:
    assert check(TRANSFERS, sequence) > 100


@pytest.mark.parametrize("mutant", mutants().values(), ids=mutants().keys())
def test_nothing_can_be_left_out(mutant: dict[str, tuple[Step, ...]]) -> None:
    with pytest.raises(Violation):
        check(mutant, RECOMPUTED)


@pytest.mark.parametrize("acts", range(0, 30, 3))
def test_who_waits_waits_in_the_end_for_the_rank_that_died(acts: int) -> None:
    Hosts(programs(TRANSFERS, LAYER), dead={0: acts}).run()
