"""The language-model head and cross-entropy.

The CPU computes both together in chunks of tokens, so that all logits never exist at once, in FP32. A GPU has GEMMs
and a kernel between them, on logits in BF16 whose gradient takes their place (passes.split_loss).
"""

from __future__ import annotations

from typing import Any, ClassVar

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide

CHUNK_ELEMENTS = 4 << 20  # logits that exist at a time


def chunk_rows(rows: int, vocab: int) -> int:
    return max(1, min(rows, CHUNK_ELEMENTS // vocab))


class _LinearCrossEntropy(OpDef):
    """Shared by the loss alone, its gradient alone and both at once.

    h[T, d], w[V, d], targets int32[T] (negative: ignored), scale[1] → loss[1] += scale·Σ −log softmax(h wᵀ)[target];
    dh[T, d] and dw[V, d] of `weight`·loss. Logits, softmax and sums are FP32.
    """

    with_loss = False
    with_grad = False
    accumulates = ("loss", "dw")
    outputs = ("loss", "dh", "dw")

    def infer(self, attrs: Attrs, h: Spec, w: Spec, targets: Spec, scale: Spec) -> dict[str, Spec]:
        specs = {"loss": Spec((1,), wide(h.format))} if self.with_loss else {}
        return specs | ({"dh": h, "dw": Spec(w.shape, wide(w.format))} if self.with_grad else {})

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        products = 1 + 2 * self.with_grad
        return Cost(2.0 * products * numel(ins[0].shape) * ins[1].shape[0], memory_bytes(*ins, *outs[1:]))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, dim), vocab, fmt = ins[0].shape, ins[1].shape[0], wide(ins[0].format)
        chunk = chunk_rows(rows, vocab)
        column = Spec((chunk, 1), fmt)
        need = [
            Spec((chunk, vocab), fmt),
            column,
            column,
            column,
            column,
            Spec((chunk, 1), "i64"),
            Spec((1,), fmt),
        ]
        if ins[0].format != fmt:
            need += [Spec((chunk, dim), fmt), Spec(ins[1].shape, fmt)]
        return need

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (h, w, targets, scale), (loss, dh, dw) = ins, outs
        logits_, top_, total_, picked_, seen_, target_, partial = scratch[:7]
        narrow = len(scratch) > 7
        w32 = scratch[8].copy_(w) if narrow else w
        for start in range(0, h.shape[0], logits_.shape[0]):
            rows = slice(start, min(start + logits_.shape[0], h.shape[0]))
            n = rows.stop - rows.start
            logits, top, total, picked, seen, target = (
                t[:n] for t in (logits_, top_, total_, picked_, seen_, target_)
            )
            h32 = scratch[7][:n].copy_(h[rows]) if narrow else h[rows]
            target.copy_(targets[rows].unsqueeze(-1))
            seen.copy_(target).clamp_(-1, 0).add_(1)  # 1 where the target counts, else 0
            target.clamp_(min=0)
            torch.mm(h32, w32.t(), out=logits)
            torch.amax(logits, dim=-1, keepdim=True, out=top)
            logits.sub_(top)
            if loss is not None:
                torch.gather(logits, 1, target, out=picked)
            torch.sum(logits.exp_(), dim=-1, keepdim=True, out=total)
            if loss is not None:
                torch.log(total, out=top).sub_(picked).mul_(seen)
                torch.sum(top.view(-1), 0, keepdim=True, out=partial)
                loss.add_(partial.mul_(scale))
            if dh is not None:
                seen.mul_(scale).mul_(attrs["weight"])
                logits.mul_(torch.div(seen, total, out=total))
                logits.scatter_add_(1, target, seen.neg_())
                dw.addmm_(logits.t(), h32)
                if narrow:
                    dh[rows].copy_(torch.mm(logits, w32, out=h32))
                else:
                    torch.mm(logits, w32, out=dh[rows])


@register
class LinearCrossEntropy(_LinearCrossEntropy):
    kind = "linear_cross_entropy"
    with_loss = True

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        w = op.inputs[1]
        into = {"dw": g.grad(w)}
        _, dh, _ = g.emit("linear_cross_entropy_bwd", f"{op.name}.bwd", op.inputs, op.attrs, into=into)
        return (dh, None, None, None)


@register
class LinearCrossEntropyBwd(_LinearCrossEntropy):
    kind = "linear_cross_entropy_bwd"
    with_grad = True


@register
class LinearCrossEntropyFwdBwd(_LinearCrossEntropy):
    """What the schedule makes of the two above when both are there: the logits are computed once."""

    kind = "linear_cross_entropy_fwd_bwd"
    with_loss = True
    with_grad = True


@register
class CrossEntropy(OpDef):
    """logits[T, V], targets int32[T] (negative: ignored), scale[1] → loss[1] += scale·Σ −log softmax(logits)[target];
    dlogits[T, V] of `weight`·loss. Softmax and sums are FP32."""

    kind = "cross_entropy"
    outputs = ("loss", "dlogits")
    accumulates = ("loss",)
    inplace: ClassVar = {"dlogits": 0}

    def infer(self, attrs: Attrs, logits: Spec, targets: Spec, scale: Spec) -> dict[str, Spec]:
        return {"loss": Spec((1,), wide(logits.format)), "dlogits": logits}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(4.0 * numel(ins[0].shape), memory_bytes(*ins, outs[1]))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, vocab), fmt = ins[0].shape, outs[0].format
        chunk = chunk_rows(rows, vocab)
        return [
            Spec((chunk, vocab), fmt),
            *[Spec((chunk, 1), fmt)] * 3,
            Spec((chunk, 1), "i64"),
            Spec((1,), fmt),
        ]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (logits, targets, scale), (loss, dlogits) = ins, outs
        *held, partial = scratch
        for start in range(0, len(logits), len(held[0])):
            rows = slice(start, min(start + len(held[0]), len(logits)))
            x, total, picked, seen, target = (t[: rows.stop - rows.start] for t in held)
            x.copy_(logits[rows])
            target.copy_(targets[rows].unsqueeze(-1))
            seen.copy_(target).clamp_(-1, 0).add_(1)
            target.clamp_(min=0)
            torch.gather(x, 1, target, out=picked)
            torch.logsumexp(x, -1, keepdim=True, out=total)
            x.sub_(total).exp_()
            torch.sum(total.sub_(picked).mul_(seen).view(-1), 0, keepdim=True, out=partial)
            loss.add_(partial.mul_(scale))
            seen.mul_(scale).mul_(attrs["weight"])
            x.mul_(seen).scatter_add_(1, target, seen.neg_())
            dlogits[rows].copy_(x)
