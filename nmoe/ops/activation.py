"""SwiGLU (arXiv 2002.05202), with the router weight of an expert row multiplied in.

Folding the weight into the activation makes the combine an unweighted sum and lets backward find the weight's
gradient without the expert's output: <dy, W₂a> = <W₂ᵀdy, a>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 17  # of a piece of rows, all of whose intermediates stay in a core's cache


def _block_rows(rows: int, width: int) -> int:
    return max(1, min(rows, BLOCK_ELEMENTS // width))


def _pieces(block: int, *tensors: torch.Tensor | None) -> Iterator[tuple]:
    """The tensors `block` rows at a time; absent ones stay None."""
    rows = next(x.shape[0] for x in tensors if x is not None)
    for start in range(0, rows, block):
        yield tuple(None if x is None else x[start : start + block] for x in tensors)


def _widened(x: torch.Tensor, scratch: list[torch.Tensor]) -> torch.Tensor:
    """x, or its copy in the next piece of scratch; without scratch x is wide already."""
    return scratch.pop().copy_(x) if scratch else x


@register
class SwiGlu(OpDef):
    """a = s · silu(gate) · up. h[M, 2n] = [gate | up], optional s[M] FP32 → a[M, n]."""

    kind = "swiglu"
    outputs = ("a",)
    cheap = True

    def infer(self, attrs: Attrs, h: Spec, weight: Spec | None = None) -> dict[str, Spec]:
        return {"a": Spec((h.shape[0], h.shape[1] // 2), h.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        h, weight = op.inputs
        return g.emit("swiglu_bwd", f"{op.name}.bwd", [douts[0], h, weight])

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(6.0 * numel(outs[0].shape), memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, width), fmt = outs[0].shape, wide(outs[0].format)
        return [] if outs[0].format == fmt else [Spec((_block_rows(rows, width), width), fmt)] * 3

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        block = _block_rows(*outs[0].shape)
        for h, a, weight in _pieces(block, ins[0], outs[0], ins[1]):
            rest = [x[: len(h)] for x in scratch]
            product = rest.pop() if rest else a
            gate, up = (_widened(half, rest) for half in h.chunk(2, dim=-1))
            torch.sigmoid(gate, out=product).mul_(gate).mul_(up)
            if weight is not None:
                product.mul_(weight.unsqueeze(-1))
            if product is not a:
                a.copy_(product)


@register
class SwiGluBwd(OpDef):
    """(da[M, n], h[M, 2n], s[M]?) → dh[M, 2n], ds[M] = <da, silu(gate)·up>.

    silu'(g) = σ + g·σ·(1 − σ).
    """

    kind = "swiglu_bwd"
    outputs = ("dh", "ds")

    def infer(self, attrs: Attrs, da: Spec, h: Spec, weight: Spec | None = None) -> dict[str, Spec]:
        return {"dh": h} if weight is None else {"dh": h, "ds": weight}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(14.0 * numel(ins[0].shape), memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, width), fmt = ins[0].shape, wide(ins[0].format)
        full = Spec((_block_rows(rows, width), width), fmt)
        return [full] * (2 if ins[0].format == fmt else 7)

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        block = _block_rows(*ins[0].shape)
        for da, h, weight, dh, ds in _pieces(block, *ins, *outs):
            sigmoid, scaled, *rest = (x[: len(h)] for x in scratch)
            dh_gate, dh_up = dh.chunk(2, dim=-1)
            dgate, dup = (rest.pop(), rest.pop()) if rest else (dh_gate, dh_up)
            gate, up, grad = (_widened(x, rest) for x in (*h.chunk(2, dim=-1), da))
            torch.sigmoid(gate, out=sigmoid)
            silu = torch.mul(gate, sigmoid, out=dup)
            slope = torch.addcmul(silu, silu, sigmoid, value=-1, out=dgate).add_(sigmoid)
            if weight is not None:
                torch.sum(torch.mul(silu, up, out=sigmoid).mul_(grad), dim=-1, out=ds)
                grad = torch.mul(grad, weight.unsqueeze(-1), out=scaled)
            slope.mul_(up).mul_(grad)
            silu.mul_(grad)
            if dgate is not dh_gate:
                dh_gate.copy_(dgate)
                dh_up.copy_(dup)
