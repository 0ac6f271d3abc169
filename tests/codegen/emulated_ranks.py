"""Several ranks of RDEP's kernels on one emulated GPU: their heaps lie in one memory, and each step runs on every rank
in turn, all that send before any that waits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from nmoe.codegen import compiler
from nmoe.codegen.emulator import Device, Options, bind
from nmoe.codegen.emulator.device import DeviceTensor
from nmoe.codegen.rdep import COLUMNS, REPORT, STATE, MoveProblem, RdepConfig, RdepProblem
from nmoe.rdep.device import Exchange, Group, Routing


def config(problem: RdepProblem) -> RdepConfig:
    """Few warps with short rings, so that small problems go around them."""
    if not isinstance(problem, MoveProblem):
        return problem.configs("sm_90a")[0] if problem.kernel != "combine" else RdepConfig(blocks=3)
    return RdepConfig(blocks=2, warps=2, stages=3, rows=1 if problem.channel == "rows" else 4, behind=1)


@cache
def function(problem: RdepProblem, target: str) -> Any:
    return bind(compiler.trace(problem, config(problem), target, "--generate-line-info"))


class Rank:
    """One rank: its heap, its tables and its exchange."""

    def __init__(self, device: Device, group: Group, target: str, rank: int) -> None:
        self.device, self.group, self.target, self.rank = device, group, target, rank
        self.heap: dict[str, DeviceTensor] = {}
        for name, buffer in (group.mailboxes() | group.slots()).items():
            shape = buffer.shape if buffer.bytes else (16,)
            self.heap[name] = device.empty(shape, buffer.dtype)
        self.heap["flags"].torch.zero_()
        self.heap["flags"].written[:] = 1
        self.report = device.tensor(torch.zeros(group.ranks, len(REPORT), dtype=torch.int64))
        state = torch.zeros(len(STATE), dtype=torch.int64)
        state[STATE.index("timeout")] = 1000
        state[STATE.index("report")] = self.report.pointer
        self.state = device.tensor(state)

    def connect(self, ranks: list[Rank]) -> None:
        table = torch.tensor([[peer.heap[name].pointer for name in COLUMNS] for peer in ranks])
        self.exchange = Exchange(self.group, self.rank, self.device.tensor(table), self.state, self.launch)

    def launch(self, problem: RdepProblem, *arguments: Any) -> None:
        found = config(problem)
        function(problem, self.target)(self.device, *arguments, found.blocks, 0)

    def column(self, name: str) -> DeviceTensor:
        """A buffer of the heap as one column."""
        held = self.heap[name]
        return DeviceTensor(held.torch.view(-1, 1), held.written, held.memory)

    def routing(self, tokens: int) -> Routing:
        return Routing(
            **{n: self.device.empty(b.shape, b.dtype) for n, b in self.group.routing(tokens).items()}
        )


def group_of(group: Group, target: str, seed: int) -> list[Rank]:
    device = Device(Options(seed=seed, races=True, limit=1 << 24))
    ranks = [Rank(device, group, target, rank) for rank in range(group.ranks)]
    for rank in ranks:
        rank.connect(ranks)
    return ranks
