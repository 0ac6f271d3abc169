"""The protocol across hosts, as docs/rdep.md draws it: every interleaving of four ranks on two hosts. A channel runs
among all ranks, those of a host, or those of a rail (one of each host). No layer runs it yet."""

from __future__ import annotations

import pytest
from checker import Act, Checker, Violation, mutants

from nmoe.rdep.protocol import PROTOCOL, Action

RANKS, GPUS = 4, 2
# Rows go along the rail, what landed goes on inside the host; returns take the same way back.
LAYER = ("counts", "rail rows", "rows", "returns", "rail returns")
BACKWARD = LAYER[1:]
RECOMPUTED = LAYER + LAYER[1:3] + BACKWARD
TABLES: dict[str, tuple[Action, ...]] = {
    "counts": PROTOCOL["counts"],
    "rail rows": PROTOCOL["rows"],
    "rows": PROTOCOL["rows"],
    "returns": PROTOCOL["returns"],
    "rail returns": PROTOCOL["returns"],
}


def members(channel: str, rank: int) -> list[int]:
    """The ranks that a rank exchanges a channel with."""
    if channel == "counts":
        near = range(RANKS)
    elif channel.startswith("rail"):
        near = range(rank % GPUS, RANKS, GPUS)
    else:
        near = range(rank // GPUS * GPUS, (rank // GPUS + 1) * GPUS)
    return [peer for peer in near if peer != rank]


def programs(tables: dict[str, tuple[Action, ...]], sequence: tuple[str, ...]) -> list[list[Act]]:
    found = []
    for rank in range(RANKS):
        acts, epochs = [], dict.fromkeys(tables, 0)
        for channel in sequence:
            epochs[channel] += 1
            for action in tables[channel]:
                to = members(channel, rank) if action.kind in ("raise", "wait") else [-1]
                epoch = epochs[channel] - action.lag
                acts += [Act(action.kind, channel, action.flag, peer, epoch, action.ordered) for peer in to]
        found.append(acts)
    return found


class Hosts(Checker):
    def peers(self, channel: str, rank: int) -> list[int]:
        return members(channel, rank)


def check(tables: dict[str, tuple[Action, ...]], sequence: tuple[str, ...]) -> int:
    return Hosts(programs(tables, sequence)).run()


@pytest.mark.parametrize("sequence", [RECOMPUTED, LAYER * 2], ids=["recomputed", "layers"])
def test_safe(sequence: tuple[str, ...]) -> None:
    assert check(TABLES, sequence) > 100


@pytest.mark.parametrize("mutant", mutants(TABLES).values(), ids=mutants(TABLES).keys())
def test_nothing_can_be_left_out(mutant: dict[str, tuple[Action, ...]]) -> None:
    with pytest.raises(Violation):
        check(mutant, RECOMPUTED)


@pytest.mark.parametrize("acts", range(0, 24, 3))
def test_who_waits_waits_in_the_end_for_the_rank_that_died(acts: int) -> None:
    Hosts(programs(TABLES, LAYER), dead={0: acts}).run()
