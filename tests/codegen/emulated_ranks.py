"""Several ranks of RDEP's kernels on one emulated GPU: their heaps lie in one memory, and each step runs on every rank
in turn, all that send before any that waits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from nmoe.codegen import compiler
from nmoe.codegen.emulator import Device, Options, bind
from nmoe.codegen.emulator.device import DeviceTensor
from nmoe.codegen.rails import linked
from nmoe.codegen.rdep import COLUMNS, REPORT, STATE, MoveProblem, RdepConfig, RdepProblem
from nmoe.rdep.device import Exchange, Group, Routing, offsets
from nmoe.rdep.transport import Buffer

# Of several hosts, where the first one's heap begins and the bytes of each: constants of what is traced next.
ARENA = {"base": 0, "size": 0}


def config(problem: RdepProblem) -> RdepConfig:
    """Few warps with short rings, so that small problems go around them."""
    if not isinstance(problem, MoveProblem):
        return problem.configs("sm_90a")[0] if problem.kernel != "combine" else RdepConfig(blocks=3)
    return RdepConfig(blocks=2, warps=2, stages=3, rows=1 if problem.channel == "rows" else 4, behind=1)


@cache
def function(problem: RdepProblem, target: str, arena: tuple[int, ...] = ()) -> Any:
    """`arena`: what the code of a kernel between hosts holds of it."""
    return bind(compiler.trace(problem, config(problem), target, "--generate-line-info"))


class Turns:
    """Threads that run one at a time, and meet before each launch of RDEP: all have sent before any waits."""

    def __init__(self, ranks: int) -> None:
        self.lock, self.barrier = threading.Lock(), threading.Barrier(ranks, timeout=120)

    def take(self, launch: Callable[[], None]) -> None:
        self.barrier.wait()
        with self.lock:
            launch()


class Rank:
    """One rank: its heap, its tables and its exchange. Between hosts its launches take `turns`."""

    def __init__(
        self,
        device: Device,
        group: Group,
        target: str,
        rank: int,
        heap: dict[str, DeviceTensor],
        turns: Turns,
    ) -> None:
        self.device, self.group, self.target, self.rank = device, group, target, rank
        self.heap, self._turns = heap, turns
        self.heap["flags"].torch.zero_()
        self.heap["flags"].written[:] = 1
        for name, held in heap.items():
            if " landed rows" in name:  # a unit is read whole, and sent where its places say
                held.written[:] = 1
        self.report = device.tensor(torch.zeros(group.ranks, len(REPORT), dtype=torch.int64))
        state = torch.zeros(len(STATE), dtype=torch.int64)
        state[STATE.index("timeout")] = 1000
        state[STATE.index("report")] = self.report.pointer
        self.state = device.tensor(state)

    def connect(self, ranks: list[Rank]) -> None:
        table = torch.tensor([[peer.heap[name].pointer for name in COLUMNS] for peer in ranks])
        self.addresses = self.device.tensor(table)
        self.exchange = Exchange(self.group, self.rank, self.addresses, self.state, self.heap, self.launch)

    def launch(self, problem: RdepProblem, *arguments: Any) -> None:
        if self.group.gpus < self.group.ranks:
            self._turns.take(lambda: self.run(problem, *arguments))
        else:
            self.run(problem, *arguments)

    def run(self, problem: RdepProblem, *arguments: Any) -> None:
        """A launch, at once."""
        arena = tuple(ARENA.values()) if linked(problem) else ()
        function(problem, self.target, arena)(self.device, *arguments, config(problem).blocks, 0)

    def column(self, name: str) -> DeviceTensor:
        """A buffer of the heap as one column."""
        held = self.heap[name]
        return DeviceTensor(held.torch.view(-1, 1), held.written, held.memory)

    def routing(self, tokens: int) -> Routing:
        return Routing(
            **{n: self.device.empty(b.shape, b.dtype) for n, b in self.group.routing(tokens).items()}
        )


def group_of(group: Group, target: str, seed: int) -> list[Rank]:
    """Of several hosts the heaps lie in one arena, for the stand-in for NVSHMEM (emulated_nvshmem.py)."""
    device, turns = Device(Options(seed=seed, races=True, limit=1 << 24)), Turns(group.ranks)
    buffers = {
        n: b if b.bytes else b._replace(shape=(16,)) for n, b in (group.mailboxes() | group.slots()).items()
    }
    if group.gpus == group.ranks:
        heaps = [{n: device.empty(b.shape, b.dtype) for n, b in buffers.items()} for _ in range(group.ranks)]
    else:
        at, size = offsets(buffers)
        arena = device.empty((group.ranks * size,), torch.uint8)
        ARENA |= {"base": arena.pointer, "size": size}
        heaps = [
            {n: _part(arena, rank * size + at[n], b) for n, b in buffers.items()}
            for rank in range(group.ranks)
        ]
    ranks = [Rank(device, group, target, rank, heap, turns) for rank, heap in enumerate(heaps)]
    for rank in ranks:
        rank.connect(ranks)
    return ranks


def _part(arena: DeviceTensor, at: int, buffer: Buffer) -> DeviceTensor:
    part = slice(at, at + buffer.bytes)
    view = arena.torch[part].view(buffer.dtype).view(buffer.shape)
    return DeviceTensor(view, arena.written[part], arena.memory[part])


def each(ranks: list[Rank], step: Callable[[Rank], None], seed: int) -> None:
    """A step on every rank, in any order; between hosts, where a step may wait for others' launches, at once."""
    if ranks[0].group.gpus == ranks[0].group.ranks:
        for rank in random.Random(seed).sample(ranks, len(ranks)):
            step(rank)
    else:
        with ThreadPoolExecutor(len(ranks)) as pool:
            list(pool.map(step, ranks))
