"""A transport with the weakest memory that releases and acquires allow, and a scheduler that is a function of a seed.

Ranks are threads of which one runs at a time; at each call of the transport the next one is drawn. A put breaks into
fragments that land later, in any order; a release lands those of its own rank for the flag's rank first. What a rank
reads is, row by row, as of its last acquire or as of now; puts overtake a wait that is no acquire. A real machine may
do all of this; x86 shows little of it. (A raise that overtakes an earlier read is not modelled: the checker covers it.)
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nmoe.rdep.transport import Buffer, Missing


class Turns:
    """Lets one of `n` threads run at a time, drawn among those that can."""

    def __init__(self, n: int, chooser: random.Random) -> None:
        self._changed, self._chooser, self._n = threading.Condition(), chooser, n
        self._ready: dict[int, Callable[[], bool]] = {}
        self._current: int | None = None
        self._stuck = False

    def turn(self, rank: int, ready: Callable[[], bool] = lambda: True) -> bool:
        """Waits until the draw falls on `rank`, once `ready`; False when no thread can ever be."""
        with self._changed:
            first = rank not in self._ready
            self._ready[rank] = ready
            if not first or len(self._ready) == self._n:
                self._draw()
            self._changed.wait_for(lambda: self._current == rank or self._stuck)
            return not self._stuck

    def leave(self, rank: int) -> None:
        with self._changed:
            self._ready[rank] = lambda: False
            self._n -= 1
            self._draw()

    def _draw(self) -> None:
        able = [rank for rank, ready in sorted(self._ready.items()) if ready()]
        self._stuck = self._stuck or (not able and self._n > 0)
        self._current = self._chooser.choice(able) if able else None
        self._changed.notify_all()


class Weak:
    """The memory of a group of ranks, and the transports of all of them."""

    def __init__(self, ranks: int, buffers: Mapping[str, Buffer], seed: int) -> None:
        def memory() -> list[dict[str, Tensor]]:
            return [
                {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in buffers.items()}
                for _ in range(ranks)
            ]

        self.chooser = random.Random(seed)
        self.turns = Turns(ranks, self.chooser)
        self.memory, self.cache = memory(), memory()
        self.flags: dict[tuple, int] = defaultdict(int)  # (at, flag, by)
        self.flying: dict[tuple[int, int], list[tuple]] = defaultdict(list)  # (from, to) → fragments
        self.ranks = [WeakRank(self, rank) for rank in range(ranks)]

    def land(self, fragments: list[tuple]) -> None:
        for memory, index, columns, values in fragments:
            memory[index, columns] = values

    def land_some(self) -> None:
        for flow, fragments in self.flying.items():
            self.chooser.shuffle(fragments)
            keep = self.chooser.randrange(len(fragments) + 1)
            self.land(fragments[keep:])
            self.flying[flow] = fragments[:keep]

    def run(self, work: Callable[[WeakRank], Any]) -> list[Any]:
        """What `work` returns, or the exception that it raises, on every rank."""
        results: list[Any] = [None] * len(self.ranks)

        def thread(rank: int) -> None:
            try:
                self.turns.turn(rank)
                results[rank] = work(self.ranks[rank])
            except Exception as error:
                results[rank] = error
            finally:
                self.turns.leave(rank)

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(len(results))]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return results


class WeakRank:
    def __init__(self, group: Weak, rank: int) -> None:
        self.rank, self.ranks = rank, len(group.memory)
        self._group = group
        self._overtaken: list[tuple[int, str, int]] = []  # waits that puts may pass

    def _turn(self, ready: Callable[[], bool] = lambda: True) -> bool:
        able = self._group.turns.turn(self.rank, ready)
        self._group.land_some()
        return able

    def _wait_overtaken(self) -> None:
        while self._overtaken:
            self._wait(*self._overtaken.pop())

    def _wait(self, peer: int, flag: str, epoch: int) -> None:
        if not self._turn(lambda: self._group.flags[self.rank, flag, peer] >= epoch):
            raise Missing(f"rank {self.rank} waits for {flag} {epoch} of rank {peer} for ever")

    def local(self, buffer: str) -> Tensor:
        self._wait_overtaken()
        self._turn()
        now, then = self._group.memory[self.rank][buffer], self._group.cache[self.rank][buffer]
        shape = (len(now),) + (1,) * (now.dim() - 1)
        fresh = torch.tensor([self._group.chooser.random() < 0.5 for _ in range(len(now))]).view(shape)
        return torch.where(fresh, now, then)

    def put(self, peer: int, buffer: str, index: Tensor, values: Tensor) -> None:
        self._turn()
        memory = self._group.memory[peer][buffer]
        if peer == self.rank:
            memory[index] = values
            self._group.cache[peer][buffer][index] = values
            return
        wide = memory.unsqueeze(-1).flatten(1)
        half = slice(0, wide.shape[1] // 2), slice(wide.shape[1] // 2, None)
        rows = zip(index.tolist(), values.unsqueeze(-1).flatten(1).clone(), strict=True)
        self._group.flying[self.rank, peer] += [
            (wide, i, part, row[part]) for i, row in rows for part in half
        ]

    def raise_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        self._wait_overtaken()
        self._turn()
        if ordered:
            self._group.land(self._group.flying.pop((self.rank, peer), []))
        self._group.flags[peer, flag, self.rank] = epoch

    def wait_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        if not ordered:
            self._overtaken.append((peer, flag, epoch))
        else:
            self._wait(peer, flag, epoch)
            for buffer, memory in self._group.memory[self.rank].items():
                self._group.cache[self.rank][buffer].copy_(memory)
