"""An exhaustive model checker of the protocol tables.

All interleavings of the ranks' acts are explored, depth first. Weak memory is not simulated but decided: vector clocks
carry the happens-before order that releases and acquires make, and an access that this order does not separate from a
conflicting one is a race, on whatever machine it may show. What a rank reads must moreover be of the epoch it wants.

Layouts move from epoch to epoch, so a put may land on any row of the receiver's buffer: it conflicts with the reading
of every row of the epoch before, whoever sent it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from nmoe.rdep.protocol import Channel, Protocol


class Violation(Exception):
    """The protocol allows what it must not; the words say what."""


class Act(NamedTuple):
    kind: str  # put, raise, wait, read, decide
    channel: str
    flag: str
    peer: int  # -1: all of them
    epoch: int
    ordered: bool


class State(NamedTuple):
    place: tuple[int, ...]  # next act of each rank
    clocks: tuple[tuple[int, ...], ...]  # of each rank: the acts of every rank that happened before
    flags: frozenset  # ((channel, flag, at, by), (epoch, clock released with it))


def program(
    protocol: Protocol, sequence: tuple[Channel, ...], rank: int, ranks: int, overflow: int = 0
) -> list[Act]:
    """The acts of a rank. `overflow`: the counts of this epoch exceed the capacity, and the rank stops there."""
    peers = [(rank + i) % ranks for i in range(1, ranks)]
    acts: list[Act] = []
    epochs: Counter[str] = Counter()
    for channel in sequence:
        epochs[channel] += 1
        for action in protocol[channel]:
            epoch = epochs[channel] - action.lag
            to = peers if action.kind in ("raise", "wait") else [-1]
            acts += [Act(action.kind, channel, action.flag, peer, epoch, action.ordered) for peer in to]
        if channel == "counts" and epochs[channel] == overflow:
            return acts
    return acts


class Checker:
    """Explores `programs`; `dead` maps a rank to the number of acts after which it stops for good."""

    def __init__(self, programs: list[list[Act]], dead: dict[int, int] | None = None) -> None:
        self.ranks, self.dead = len(programs), dead or {}
        self.programs = [p[: self.dead.get(rank, len(p))] for rank, p in enumerate(programs)]
        self.at = [{(a.kind, a.channel, a.epoch): i + 1 for i, a in enumerate(p)} for p in self.programs]
        self.states = 0

    def peers(self, channel: str, rank: int) -> list[int]:
        """The ranks that a rank exchanges a channel with."""
        return [peer for peer in range(self.ranks) if peer != rank]

    def run(self) -> int:
        """The number of states; raises Violation."""
        zero = (0,) * self.ranks
        todo = [State(zero, (zero,) * self.ranks, frozenset())]
        seen = set(todo)
        while todo:
            state = todo.pop()
            after = [new for rank in range(self.ranks) if (new := self._step(state, rank)) is not None]
            if not after:
                self._end(state)
            for new in after:
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        self.states = len(seen)
        return self.states

    def _step(self, state: State, rank: int) -> State | None:
        place = state.place[rank]
        if place == len(self.programs[rank]):
            return None
        act, clock, flags = self.programs[rank][place], list(state.clocks[rank]), state.flags
        if act.kind == "wait" and act.epoch > 0:
            epoch, released = dict(flags).get((act.channel, act.flag, rank, act.peer), (0, None))
            if epoch < act.epoch:
                return None
            if act.ordered and released:
                clock = [max(pair) for pair in zip(clock, released, strict=True)]
        clock[rank] = place + 1
        if act.kind == "raise":
            key = (act.channel, act.flag, act.peer, rank)
            flags = frozenset([*((k, v) for k, v in flags if k != key),
                               (key, (act.epoch, tuple(clock) if act.ordered else None))])  # fmt: skip
        elif act.kind == "put":
            self._put(act, rank, clock)
        elif act.kind == "read":
            self._read(state, act, rank, clock)
        places, clocks = list(state.place), list(state.clocks)
        places[rank], clocks[rank] = place + 1, tuple(clock)
        return State(tuple(places), tuple(clocks), flags)

    def _put(self, act: Act, rank: int, clock: list[int]) -> None:
        """The receivers must have read all rows of the epoch before, and the writer must know."""
        if act.epoch == 1:
            return
        for peer in self.peers(act.channel, rank):
            read = self.at[peer].get(("read", act.channel, act.epoch - 1))
            if read is None or clock[peer] < read:
                raise Violation(
                    f"rank {rank} puts {act.channel} {act.epoch} over rows that rank {peer} still reads"
                )

    def _read(self, state: State, act: Act, rank: int, clock: list[int]) -> None:
        """The rows of every source must have arrived, and no later ones."""
        for peer in self.peers(act.channel, rank):
            put = self.at[peer].get(("put", act.channel, act.epoch))
            if put is None or clock[peer] < put:
                raise Violation(
                    f"rank {rank} reads {act.channel} {act.epoch} of rank {peer} before it has arrived"
                )
            later = self.at[peer].get(("put", act.channel, act.epoch + 1))
            if later is not None and state.place[peer] >= later:
                raise Violation(f"rank {rank} reads {act.channel} {act.epoch} after rank {peer} overwrote it")

    def _end(self, state: State) -> None:
        """Nobody can go on: all have finished, or each that has not waits, in the end, for a rank that died."""
        waits = {
            r: p[n].peer
            for r, (p, n) in enumerate(zip(self.programs, state.place, strict=True))
            if n < len(p)
        }
        for rank, peer in waits.items():
            passed = {rank}
            while peer in waits and peer not in passed:
                passed.add(peer)
                peer = waits[peer]
            if peer not in self.dead:
                raise Violation(f"rank {rank} waits for ever, in the end for rank {peer}, which is not dead")


def check(
    protocol: Protocol,
    sequence: tuple[Channel, ...],
    ranks: int,
    *,
    overflow: int = 0,
    dead: dict[int, int] | None = None,
) -> int:
    """The number of states explored; raises Violation."""
    programs = [program(protocol, sequence, rank, ranks, overflow) for rank in range(ranks)]
    return Checker(programs, dead).run()


def mutants(protocol: Protocol) -> dict[str, Protocol]:
    """Every protocol with one act less, one order less, or a flag raised one act too early, by what was done."""
    made: dict[str, Protocol] = {}
    for channel, actions in protocol.items():
        for i, action in enumerate(actions):
            if action.kind not in ("raise", "wait"):
                continue
            name = f"{action.kind} {action.flag} of {channel}"
            rest = (actions[:i], actions[i + 1 :])
            made[f"no {name}"] = {**protocol, channel: rest[0] + rest[1]}
            made[f"unordered {name}"] = {
                **protocol,
                channel: (*rest[0], action._replace(ordered=False), *rest[1]),
            }
            if action.kind == "raise":
                early = (*actions[: i - 1], action, actions[i - 1], *actions[i + 1 :])
                made[f"early {name}"] = {**protocol, channel: early}
    return made
