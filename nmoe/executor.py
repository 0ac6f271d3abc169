"""Binds a schedule to buffers and implementations, and runs it.

A call with a kernel is launched by a `Launcher`; the ops of any other, and all on the CPU target, run their reference
math in torch. All memory is taken when the executor is made; a step allocates nothing of its own.

On a CUDA device the first micro-batch runs call by call, which warms up what torch's libraries set up late, and is
then recorded as a CUDA graph that the later ones replay. Where an op's reference has to wait for the device they all
run call by call: `captured` says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from nmoe import binding, formats
from nmoe.binding import Bound, Launcher
from nmoe.errors import UserError
from nmoe.graph import QUANTIZED, Kind, Op, Phase, Spec
from nmoe.ops import OPS
from nmoe.ops.base import parts
from nmoe.schedule import Call, Schedule
from nmoe.streams import Streams

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64,
          "i32": torch.int32, "bool": torch.bool, "u8": torch.uint8}  # fmt: skip

Observe = Callable[[str], AbstractContextManager]
# Of an op of some kinds and its operands: what runs it in place of its reference. Asked once, when calls are bound.
Implementations = Mapping[str, Callable[[Op, list[Any], list[Any]], Bound]]


class Executor:
    """`tensors` holds everything that outlives a step, by name: parameters in their working format, gradients,
    state and inputs. `allocate` makes those that the caller does not bring. A GPU target needs a `launcher`; the arena,
    whose device is that of the executor, defaults to one on the CPU. `implementations` replace the references of op
    kinds. `observe`, when set, is called with the name of each op or kernel that runs and returns
    what surrounds it."""

    def __init__(
        self,
        schedule: Schedule,
        tensors: Mapping[str, torch.Tensor],
        arena: torch.Tensor | None = None,
        launcher: Launcher | None = None,
        implementations: Implementations | None = None,
    ) -> None:
        self.schedule = schedule
        self.observe: Observe | None = None
        self.tensors = dict(tensors)
        self.arena = arena if arena is not None else torch.empty(schedule.arena_bytes, dtype=torch.uint8)
        if self.arena.numel() < schedule.arena_bytes:
            raise ValueError(
                f"the arena has {self.arena.numel()} bytes, the schedule needs {schedule.arena_bytes}"
            )
        for tensor in schedule.graph.of_kind("param", "grad", "state", "input"):
            wanted, x = schedule.spec(tensor.name), self.tensors.get(tensor.name)
            found = None if x is None else (x.dtype, tuple(x.shape))
            if found != (DTYPES[wanted.format], wanted.shape):
                raise ValueError(
                    f"{tensor.name} is {found}, the schedule needs {wanted.format} {wanted.shape}"
                )
        for tensor in schedule.graph.of_kind("const"):
            if tensor.name not in self.tensors and tensor.format not in QUANTIZED:
                self.tensors[tensor.name] = empty(schedule.spec(tensor.name), self.arena.device)
        self._implementations = implementations or {}
        self._views: dict[str, Any] = {}
        self._quantizers = {op.outputs[0]: op for op in schedule.graph.ops if op.kind == "quantize"}
        self._streams = Streams(schedule.calls, self.arena.device)
        self._phases: dict[str, list[tuple[str, Bound]]] = {"init": [], "step": [], "micro": []}
        for index, call in enumerate(schedule.calls):
            for name, run in self._bind(call, launcher):
                self._phases[call.phase].append((name, self._streams.place(index, run)))
        waiting = any(
            OPS[op.kind].waits and op.kind not in self._implementations
            for call in schedule.calls
            if call.phase == "micro" and call.workspace is None
            for op in call.ops
        )
        self.captured = self.arena.is_cuda and not waiting
        self._graph: torch.cuda.CUDAGraph | None = None
        self.run("init")

    def _bind(self, call: Call, launcher: Launcher | None) -> list[tuple[str, Bound]]:
        """What a call runs: its kernel, or the implementation or reference of each of its ops."""
        schedule = self.schedule
        if call.workspace is not None:
            assert launcher is not None, (
                f"{call.name} is a kernel of {schedule.target} and there is no launcher"
            )
            scratch = self._scratch(call.name, [schedule.bind(spec) for spec in call.workspace])
            return [(call.name, binding.bind(schedule, call, self.operand, scratch, launcher))]
        bound: list[tuple[str, Bound]] = []
        for op in call.ops:
            if any(schedule.graph.tensors[n].spec.atoms for n in (*op.inputs, *op.outputs) if n is not None):
                raise UserError(
                    f"{op.name}: no kernel for these sizes on {schedule.target} (nmoe compile names those that are), "
                    "and torch cannot read scale factors in atoms: change the size, or set [schedule] precision"
                )
            ins, outs = ([self.operand(name) for name in side] for side in (op.inputs, op.outputs))
            if implement := self._implementations.get(op.kind):
                bound.append((op.name, implement(op, ins, outs)))
                continue
            scratch = self._scratch(op.name, schedule.scratch_specs(op))
            bound.append((op.name, partial(OPS[op.kind].reference, op.attrs, ins, outs, scratch)))
        return bound

    def _scratch(self, owner: str, specs: list[Spec]) -> list[torch.Tensor]:
        names = self.schedule.scratch_names[owner]
        return [
            self._view(self.schedule.offsets[name], spec) for name, spec in zip(names, specs, strict=True)
        ]

    def operand(self, name: str | None) -> Any:
        """The tensor (or `formats.Quantized`) of a graph name; activations hold values only while alive."""
        if name is None:
            return None
        if name not in self._views:
            root = self.schedule.aliases.get(name, name)
            if root in self.tensors:
                self._views[name] = self.tensors[root]
            else:
                self._views[name] = self._view(self.schedule.offsets[root], self.schedule.spec(root), name)
        return self._views[name]

    def _view(self, offset: int, spec: Spec, name: str = "") -> Any:
        if spec.format not in QUANTIZED:
            return self._plain(offset, spec.shape, DTYPES[spec.format])
        buffers = {
            label: self._plain(offset + part.offset, part.shape, DTYPES[part.format])
            for label, part in parts(spec).items()
        }
        assert spec.axis is not None
        how: dict[str, Any] = {"atoms": spec.atoms}
        if maker := self._quantizers.get(name):  # not of rows that are dispatched so
            how |= {"segments": self.operand(maker.inputs[1]), "hadamard": maker.attrs["hadamard"]}
        return formats.from_buffers(spec.format, spec.shape, spec.axis, buffers, **how)  # type: ignore[arg-type]

    def _plain(self, offset: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
        return self.arena[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    @torch.no_grad()
    def run(self, phase: Phase) -> None:
        """Runs every call of a phase in order: "init" once, "step" after the parameters changed, "micro" for each
        micro-batch."""
        if phase != "micro" or not self.captured or self.observe:
            self._run(phase)
        elif self._graph is not None:
            self._graph.replay()
        else:
            self._run(phase)
            torch.cuda.synchronize(self.arena.device)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, NCCL's and the checkpoint's, may ask the driver meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._run(phase)

    def _run(self, phase: Phase) -> None:
        unobserved = nullcontext()
        with self._streams.all():
            for name, call in self._phases[phase]:
                try:
                    with self.observe(name) if self.observe else unobserved:
                        call()
                except UserError as error:
                    raise type(error)(f"{name}: {error}") from None


def empty(spec: Spec, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.format], device=device)


def allocate(schedule: Schedule, *kinds: Kind, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Zeroed tensors for what outlives a step, of the given kinds; of all kinds when none is given."""
    wanted = kinds or ("param", "grad", "state", "input")
    return {t.name: empty(schedule.spec(t.name), device).zero_() for t in schedule.graph.of_kind(*wanted)}


def executor_bytes(executor: Executor) -> int:
    """Bytes that the executor and its persistent tensors really hold; equals the plan's peak."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in executor.tensors.values()
    }
    return executor.arena.numel() + sum(storages.values())
