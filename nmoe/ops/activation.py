"""SwiGLU (arXiv 2002.05202), with the router weight of an expert row multiplied in.

Folding the weight into the activation makes the combine an unweighted sum and lets backward find the weight's
gradient without the expert's output: <dy, W₂a> = <W₂ᵀdy, a>.
"""

from __future__ import annotations

from typing import Any

import torch

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide


def _sigmoid_split(h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, sigmoid: torch.Tensor) -> None:
    width = gate.shape[-1]
    gate.copy_(h[:, :width])
    up.copy_(h[:, width:])
    torch.sigmoid(gate, out=sigmoid)


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
        return [Spec(outs[0].shape, wide(ins[0].format))] * 3

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        (h, weight), (gate, up, sigmoid) = ins, scratch
        _sigmoid_split(h, gate, up, sigmoid)
        gate.mul_(sigmoid).mul_(up)
        if weight is not None:
            gate.mul_(weight.unsqueeze(-1))
        outs[0].copy_(gate)


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
        return [Spec(ins[0].shape, wide(ins[1].format))] * 5

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        (da, h, weight), (dh, ds), (gate, up, sigmoid, grad, silu) = ins, outs, scratch
        width = gate.shape[-1]
        _sigmoid_split(h, gate, up, sigmoid)
        grad.copy_(da)
        torch.mul(gate, sigmoid, out=silu)
        # d silu = σ + silu·(1 − σ), built in `gate`, which is not needed again
        torch.mul(silu, sigmoid, out=gate).neg_().add_(silu).add_(sigmoid)
        if weight is not None:
            torch.mul(silu, up, out=sigmoid).mul_(grad)
            torch.sum(sigmoid, dim=-1, out=ds)
            grad.mul_(weight.unsqueeze(-1))
        dh[:, width:].copy_(silu.mul_(grad))
        dh[:, :width].copy_(gate.mul_(up).mul_(grad))
