"""Matrix products: `gemm` for dense layers, `grouped_gemm` for experts.

One kind covers the three passes of a linear layer y = x Wᵀ, W[N, K], by its attribute `role`:

    fprop   y[T, N]  = x[T, K] · Wᵀ         contracts K
    dgrad   dx[T, K] = dy[T, N] · W         contracts N
    wgrad   dW[N, K] += dyᵀ · x             contracts the tokens

Operands may be quantized along the contracted dimension. Accumulation is FP32 and wgrad adds to FP32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nmoe.graph import QUANTIZED, Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide
from nmoe.rdep.sizes import depth

if TYPE_CHECKING:
    import torch

# Which axis of each operand, in its own layout, a role contracts: 1 is the last one.
CONTRACTED = {"fprop": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}


def _compute_format(role: str, a: Spec, b: Spec, out: Spec) -> str:
    """MXFP8 dequantizes exactly to BF16; NVFP4 carries an FP32 factor; wgrad must not round before it adds."""
    if role == "wgrad":
        return wide(out.format)
    if "nvfp4" in (a.format, b.format):
        return "f32"
    if "mxfp8" in (a.format, b.format):
        return "bf16"
    return a.format


def _load(operand: Any, scratch: list[torch.Tensor]) -> torch.Tensor:
    """The operand in the compute format: itself, or a copy in the next piece of scratch."""
    from nmoe import formats

    if isinstance(operand, formats.Quantized):
        return formats.dequantize(operand, out=scratch.pop(0))
    if scratch and scratch[0].shape == operand.shape and scratch[0].dtype != operand.dtype:
        return scratch.pop(0).copy_(operand)
    return operand


class _Product(OpDef):
    outputs = ("y", "dw")
    accumulates = ("dw",)
    grouped = False

    def infer(self, attrs: Attrs, a: Spec, b: Spec, offsets: Spec | None = None) -> dict[str, Spec]:
        role = attrs["role"]
        for spec, axis in zip((a, b), CONTRACTED[role], strict=True):
            if spec.axis not in (None, axis):
                raise ValueError(
                    f"{role} contracts axis {axis}, but an operand is quantized along axis {spec.axis}"
                )
        if role == "fprop":
            return {"y": Spec((a.shape[0], b.shape[-2]), attrs["format"])}
        if role == "dgrad":
            return {"y": Spec((a.shape[0], b.shape[-1]), attrs["format"])}
        lead = (attrs["experts"],) if self.grouped else ()
        return {"dw": Spec((*lead, a.shape[-1], b.shape[-1]), wide(attrs["format"]))}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        x, w, *rest = op.inputs
        dy = douts[0]
        attrs = {**op.attrs, "role": "wgrad"}
        if self.grouped:
            attrs["experts"] = g.shape(w)[0]
        g.emit(self.kind, f"{op.name}.wgrad", [dy, x, *rest], attrs, into={"dw": g.grad(w)})
        dx, _ = g.emit(self.kind, f"{op.name}.dgrad", [dy, w, *rest], {**op.attrs, "role": "dgrad"})
        return (dx, None, *[None for _ in rest])

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        a, b = ins[0], ins[1]
        if attrs["role"] == "wgrad":
            flops = 2.0 * numel(a.shape) * b.shape[-1]
            return Cost(flops, memory_bytes(a, b) + 2 * memory_bytes(outs[1]))  # read, add, write
        return Cost(2.0 * numel(a.shape) * (b.shape[-2] if attrs["role"] == "fprop" else b.shape[-1]),
                    memory_bytes(a, b, outs[0]))  # fmt: skip

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        role, (a, b) = attrs["role"], ins[:2]
        out = outs[1] if role == "wgrad" else outs[0]
        compute = _compute_format(role, a, b, out)
        need = [Spec(s.shape, compute) for s in (a, b) if s.format in QUANTIZED or s.format != compute]
        if role != "wgrad" and out.format != compute:
            need.append(Spec(out.shape, compute))
        return need

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        scratch = list(scratch)
        a, b = _load(ins[0], scratch), _load(ins[1], scratch)
        if attrs["role"] == "wgrad":
            self.accumulate(a, b, outs[1], ins, scratch)
            return
        y = outs[0]
        target = y if y.dtype == a.dtype else scratch.pop(0)
        self.multiply(a, b.mT if attrs["role"] == "fprop" else b, target, ins)
        if target is not y:
            y.copy_(target)

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, ins: list[Any]) -> None:
        import torch

        torch.mm(a, b, out=out)

    def accumulate(
        self, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, ins: list[Any], partial: list[torch.Tensor]
    ) -> None:
        dw.addmm_(dy.t(), x)


@register
class Gemm(_Product):
    """(x[T, K] or dy[T, N], w[N, K] or x[T, K]) → y, or dw accumulated."""

    kind = "gemm"


@register
class GroupedGemm(_Product):
    """The same for every expert e on rows offsets[e]:offsets[e+1]; w[E, N, K], offsets int32[E+1].

    Rows from offsets[E] on are neither read nor written. With E·s+1 offsets each expert has s runs of rows, the rows
    of s ranks, which `reference` multiplies one by one and sums in the order of rdep/sums.py: as so many ranks with a
    whole set of experts would.
    """

    kind = "grouped_gemm"
    grouped = True
    waits = True

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return super().cost(attrs, ins[:2], outs)

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        need = super().scratch(attrs, ins, outs)
        if attrs["role"] == "wgrad" and (runs := (ins[2].shape[0] - 1) // attrs["experts"]) > 1:
            need += [Spec(outs[1].shape[1:], outs[1].format)] * depth(runs)
        return need

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, ins: list[Any]) -> None:
        import torch

        ends = ins[2].tolist()
        runs = (len(ends) - 1) // len(b)
        for i, (start, end) in enumerate(pairwise(ends)):
            if end > start:
                torch.mm(a[start:end], b[i // runs], out=out[start:end])

    def accumulate(
        self, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, ins: list[Any], partial: list[torch.Tensor]
    ) -> None:

        segments = list(pairwise(ins[2].tolist()))
        runs = len(segments) // len(dw)

        def add(segment: tuple[int, int], to: torch.Tensor) -> None:
            start, end = segment
            if end > start:
                to.addmm_(dy[start:end].t(), x[start:end])

        def total(segments: list[tuple[int, int]], partial: list[torch.Tensor]) -> torch.Tensor:
            if len(segments) == 1:
                add(segments[0], partial[0].zero_())
            else:
                half = 1 << (len(segments) - 1).bit_length() - 1
                total(segments[:half], partial).add_(total(segments[half:], partial[1:]))
            return partial[0]

        for e, weight in enumerate(dw):
            if runs == 1:
                add(segments[e], weight)
            else:
                weight.add_(total(segments[e * runs : (e + 1) * runs], partial))
