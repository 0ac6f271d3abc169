"""The ops of an expert-parallel layer on several GPUs: their launches, prepared once and issued with every micro-batch.

The arena is symmetric memory, in which a schedule places a tensor alike on all ranks. So the peers put a layer's rows
where its GEMMs read them, and the rows stay there for backward: nothing is copied, and no two layers share a buffer.

             rank                                                     its peers
   dispatch  raise free: the schedule needs the place for these rows  wait free of all; put rows; raise full
             wait full of all
   grouped GEMMs and what is between them, from and to the arena
   combine   put rows back; raise full                                wait full of all; sum

A place is free when the dispatch that fills it begins, since the memory plan lets nobody else use it from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nmoe.codegen.rdep import STATE, RdepProblem
from nmoe.formats import buffers
from nmoe.graph import Op
from nmoe.rdep.device import Exchange, Group, Routing
from nmoe.rdep.transport import Buffer

if TYPE_CHECKING:
    from nmoe.binding import Bound, Launcher


class Memory(Protocol):
    """Symmetric memory that holds `Group.mailboxes` and the arena: symmetric.Heap."""

    rank: int
    state: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """This rank's buffer."""

    def table(self, **places: Tensor) -> Tensor:
        """Where kernels find the buffers of all ranks: `addresses` of nmoe.codegen.rdep, with the columns `places` at
        tensors of this rank's arena and their likes on the peers."""

    def empty(self, buffer: Buffer) -> Tensor:
        """Memory of this rank alone."""


class Narrowed:
    """The heap's buffers as a group needs them; they are at least as large, for the widest rows of the run."""

    def __init__(self, memory: Memory, buffers: Mapping[str, Buffer]) -> None:
        self._memory, self._buffers = memory, buffers

    def __getitem__(self, name: str) -> Tensor:
        shape = self._buffers[name].shape
        return self._memory[name].view(-1)[: math.prod(shape)].view(shape)


class DeviceLayer:
    """Binds `moe_plan`, `dispatch` and `combine`, as `layer.Layer` does on the CPU. All ranks bind the same ops in the
    same order. `names` are those of the ops, by the number that a fault's report holds."""

    def __init__(self, group: Group, memory: Memory, launcher: Launcher, target: str) -> None:
        self._group, self._memory, self._launcher, self._target = group, memory, launcher, target
        self._kept: dict[str, Routing] = {}  # by the name of a plan's slots
        self.names: list[str] = []
        memory.state[STATE.index("rows")] = 1  # so that the first rows, too, wait until their place is free
        self.implementations = {
            "moe_plan": self._plan,
            "dispatch": self._dispatch,
            "combine": self._combine,
        }

    def _plan(self, op: Op, ins: list[Any], outs: list[Any]) -> Bound:
        (indices,), (slots, _, offsets, load, _) = ins, outs
        sizes = self._group.routing(len(indices))
        own = {name: self._memory.empty(sizes[name]) for name in ("order", "tiles", "ends", "bases")}
        routing = Routing(slots=slots, offsets=offsets, **own)
        self._kept[str(op.outputs[0])] = routing
        exchange, number, launches = self._prepare(op)
        exchange.send_counts(indices, routing, number)
        exchange.receive_counts(indices, routing, number)
        launches.append(partial(load.add_, self._memory["counts"][self._memory.rank]))
        return partial(_all, launches)

    def _dispatch(self, op: Op, ins: list[Any], outs: list[Any]) -> Bound:
        (x, weights, *plan), (rows, row_weight) = ins, outs
        sent = [part.view(torch.uint8) for part in buffers(x)]
        places = dict(zip(("data", "scale"), buffers(rows), strict=False)) | {"origin": plan[1]}
        if weights is not None:
            places["value"] = row_weight
        exchange, number, launches = self._prepare(op, tuple(part.shape[1] for part in sent), **places)
        exchange.release_rows(number)
        exchange.send_rows(tuple(sent), weights, self._kept[str(op.inputs[2])], number)
        exchange.receive_rows(number)
        return partial(_all, launches)

    def _combine(self, op: Op, ins: list[Any], outs: list[Any]) -> Bound:
        (rows, row_values, *plan), (y, values) = ins, outs
        exchange, number, launches = self._prepare(op)
        given = None if row_values is None else row_values.view(-1, 1)
        origins = plan[1].view(-1, 1)
        exchange.send_returns(rows.view(torch.uint8), given, origins, self._kept[str(op.inputs[2])], number)
        exchange.receive_returns(y, number)
        if values is not None:
            brought = self._memory["returned value"][: values.numel()].view_as(values)
            launches.append(partial(values.copy_, brought))
        return partial(_all, launches)

    def _prepare(
        self, op: Op, parts: tuple[int, ...] = (), **places: Tensor
    ) -> tuple[Exchange, int, list[Callable[[], object]]]:
        """An exchange that appends its launches to the list instead of making them. `parts`: of rows that it sends."""
        launches: list[Callable[[], object]] = []
        self.names.append(op.name)

        def record(problem: RdepProblem, *arguments: Any) -> None:
            config = problem.untuned(self._target)
            launches.append(self._launcher.bind(problem, config, self._target, arguments))

        memory = self._memory
        table = memory.table(**places)
        group = self._group.sending(parts) if parts else self._group
        heap = Narrowed(memory, group.mailboxes())
        exchange = Exchange(group, memory.rank, table, memory.state, heap, record)
        return exchange, len(self.names) - 1, launches


def _all(launches: Sequence[Callable[[], object]]) -> None:
    for launch in launches:
        launch()
