"""Binds a schedule to buffers and implementations, and runs it.

On the CPU target an op's implementation is its reference math. All memory is taken when the executor is made; a step
allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from nmoe import formats
from nmoe.errors import UserError
from nmoe.graph import QUANTIZED, Kind, Phase, Spec
from nmoe.ops import OPS
from nmoe.ops.base import buffers
from nmoe.schedule import Schedule

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64,
          "i32": torch.int32, "bool": torch.bool, "u8": torch.uint8}  # fmt: skip

TARGETS = ("cpu",)  # what this build can execute; the others it can only plan

Bound = Callable[[], None]
Observe = Callable[[str], AbstractContextManager]


class Executor:
    """`tensors` holds everything that outlives a step, by name: parameters in their working format, gradients,
    state and inputs. `allocate` makes those that the caller does not bring. `implementations` replace the references of
    op kinds, with their signature. `observe`, when set, is called with the name of each op that runs and returns what
    surrounds it."""

    def __init__(
        self,
        schedule: Schedule,
        tensors: Mapping[str, torch.Tensor],
        arena: torch.Tensor | None = None,
        implementations: Mapping[str, Callable[..., None]] | None = None,
    ) -> None:
        if schedule.target not in TARGETS:
            raise UserError(
                f'[target] device = "{schedule.target}" cannot run here: this build executes schedules on '
                'device = "cpu" only; set [target] device = "cpu" in the config'
            )
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
                self.tensors[tensor.name] = empty(schedule.spec(tensor.name))
        kinds = {kind: definition.reference for kind, definition in OPS.items()} | dict(implementations or {})
        self._views: dict[str, Any] = {}
        self._quantizers = {op.outputs[0]: op for op in schedule.graph.ops if op.kind == "quantize"}
        self._phases: dict[str, list[tuple[str, Bound]]] = {"init": [], "step": [], "micro": []}
        for call in schedule.calls:
            for op in call.ops:
                ins = [self.operand(name) for name in op.inputs]
                outs = [self.operand(name) for name in op.outputs]
                specs = schedule.scratch_specs(op)
                names = schedule.scratch_names[op.name]
                scratch = [self._view(schedule.offsets[n], s) for n, s in zip(names, specs, strict=True)]
                run = partial(kinds[op.kind], op.attrs, ins, outs, scratch)
                self._phases[op.phase].append((op.name, run))
        self.run("init")

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
        parts = {}
        for label, (shape, dtype) in buffers(spec).items():
            parts[label] = self._plain(offset, shape, dtype)
            offset += parts[label].nbytes
        maker = self._quantizers[name]
        segments, hadamard = self.operand(maker.inputs[1]), maker.attrs["hadamard"]
        return formats.from_buffers(
            maker.attrs["format"],
            spec.shape,
            maker.attrs["axis"],
            parts,
            segments=segments,
            hadamard=hadamard,
        )

    def _plain(self, offset: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
        return self.arena[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    @torch.no_grad()
    def run(self, phase: Phase) -> None:
        """Runs every call of a phase in order: "init" once, "step" after the parameters changed, "micro" for each
        micro-batch."""
        unobserved = nullcontext()
        for name, call in self._phases[phase]:
            try:
                with self.observe(name) if self.observe else unobserved:
                    call()
            except UserError as error:
                raise type(error)(f"{name}: {error}") from None


def empty(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.format])


def allocate(schedule: Schedule, *kinds: Kind) -> dict[str, torch.Tensor]:
    """Zeroed tensors for what outlives a step, of the given kinds; of all kinds when none is given."""
    wanted = kinds or ("param", "grad", "state", "input")
    return {t.name: empty(schedule.spec(t.name)).zero_() for t in schedule.graph.of_kind(*wanted)}


def executor_bytes(executor: Executor) -> int:
    """Bytes that the executor and its persistent tensors really hold; equals the plan's peak."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in executor.tensors.values()
    }
    return executor.arena.numel() + sum(storages.values())
