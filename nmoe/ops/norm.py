"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide


@register
class RmsNorm(OpDef):
    """y = x · rstd · w, rstd = (mean(x²) + eps)^-½ in FP32. x[T, d], w[d] → y[T, d], rstd[T]."""

    kind = "rms_norm"
    outputs = ("y", "rstd")
    cheap = True

    def infer(self, attrs: Attrs, x: Spec, w: Spec) -> dict[str, Spec]:
        return {"y": x, "rstd": Spec(x.shape[:1], wide(x.format))}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        x, w = op.inputs
        into = {"dw": g.grad(w)}
        dx, _ = g.emit("rms_norm_bwd", f"{op.name}.bwd", [douts[0], x, w, op.outputs[1]], into=into)
        return (dx, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(4.0 * numel(ins[0].shape), memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        return [Spec(ins[0].shape, wide(ins[0].format))] * 2

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (x, w), (y, rstd), (x32, square) = ins, outs, scratch
        x32.copy_(x)
        torch.mul(x32, x32, out=square)
        torch.mean(square, dim=-1, out=rstd)
        rstd.add_(attrs["eps"]).rsqrt_()
        y.copy_(x32.mul_(rstd.unsqueeze(-1)).mul_(w))


@register
class RmsNormBwd(OpDef):
    """With x̂ = x·rstd: dx = rstd·(w·dy − x̂·mean(w·dy·x̂)), dw += Σ_T dy·x̂."""

    kind = "rms_norm_bwd"
    outputs = ("dx", "dw")
    accumulates = ("dw",)

    def infer(self, attrs: Attrs, dy: Spec, x: Spec, w: Spec, rstd: Spec) -> dict[str, Spec]:
        return {"dx": x, "dw": w}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(9.0 * numel(ins[1].shape), memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        full, row = Spec(ins[1].shape, wide(ins[1].format)), ins[3]
        return [full, full, full, row, ins[2]]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (dy, x, w, rstd), (dx, dw), (xhat, g, product, mean, column) = ins, outs, scratch
        xhat.copy_(x).mul_(rstd.unsqueeze(-1))
        g.copy_(dy)
        torch.mul(g, xhat, out=product)
        torch.sum(product, dim=0, out=column)
        dw.add_(column)
        g.mul_(w)
        torch.mul(g, xhat, out=product)
        torch.mean(product, dim=-1, out=mean)
        dx.copy_(g.sub_(xhat.mul_(mean.unsqueeze(-1))).mul_(rstd.unsqueeze(-1)))
