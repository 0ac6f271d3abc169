"""Sums, splits and concatenations of activations."""

from __future__ import annotations

from typing import Any, ClassVar

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register


@register
class Add(OpDef):
    """y = a + b. Takes a's buffer when nothing else needs it."""

    kind = "add"
    outputs = ("y",)
    inplace: ClassVar = {"y": 0}

    def infer(self, attrs: Attrs, a: Spec, b: Spec) -> dict[str, Spec]:
        if a != b:
            raise ValueError(f"add needs two operands of one shape and format, found {a} and {b}")
        return {"y": a}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        return (douts[0], douts[0])

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(float(numel(ins[0].shape)), memory_bytes(*ins, *outs))

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        torch.add(ins[0], ins[1], out=outs[0])


@register
class Split(OpDef):
    """x[T, n + m] → the first n columns and the rest."""

    kind = "split"
    outputs = ("a", "b")
    cheap = True

    def infer(self, attrs: Attrs, x: Spec) -> dict[str, Spec]:
        rows, columns = x.shape
        at = attrs["at"]
        return {"a": Spec((rows, at), x.format), "b": Spec((rows, columns - at), x.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        return g.emit("concat", f"{op.name}.bwd", douts)

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        at = attrs["at"]
        outs[0].copy_(ins[0][:, :at])
        outs[1].copy_(ins[0][:, at:])


@register
class Concat(OpDef):
    """a[T, n], b[T, m] → [a | b]."""

    kind = "concat"
    outputs = ("y",)
    cheap = True

    def infer(self, attrs: Attrs, a: Spec, b: Spec) -> dict[str, Spec]:
        return {"y": Spec((a.shape[0], a.shape[1] + b.shape[1]), a.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        at = g.shape(op.inputs[0])[1]
        return g.emit("split", f"{op.name}.bwd", douts, {"at": at})

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        at = ins[0].shape[1]
        outs[0][:, :at].copy_(ins[0])
        outs[0][:, at:].copy_(ins[1])
