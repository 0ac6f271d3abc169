"""Token embedding."""

from __future__ import annotations

from typing import Any

from nmoe.graph import ELEMENT_BYTES, Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide


@register
class Embedding(OpDef):
    """tokens int32[T], w[V, d] → x[T, d]. Negative tokens (padding past a document) read row 0."""

    kind = "embedding"
    outputs = ("x",)

    def infer(self, attrs: Attrs, tokens: Spec, w: Spec) -> dict[str, Spec]:
        return {"x": Spec((*tokens.shape, w.shape[1]), w.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        tokens, w = op.inputs
        g.emit("embedding_bwd", f"{op.name}.wgrad", [douts[0], tokens, w], into={"dw": g.grad(w)})
        return (None, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(0.0, 2 * memory_bytes(outs[0]) + memory_bytes(ins[0]))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        return [ins[0]]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        index = torch.clamp(ins[0], min=0, out=scratch[0])
        torch.index_select(ins[1], 0, index, out=outs[0])


@register
class EmbeddingBwd(OpDef):
    """dx[T, d], tokens[T] → dw[V, d] accumulated in token order."""

    kind = "embedding_bwd"
    outputs = ("dw",)
    accumulates = ("dw",)

    def infer(self, attrs: Attrs, dx: Spec, tokens: Spec, w: Spec) -> dict[str, Spec]:
        return {"dw": Spec(w.shape, wide(w.format))}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        rows = numel(ins[0].shape)
        return Cost(float(rows), memory_bytes(ins[0], ins[1]) + 2.0 * rows * ELEMENT_BYTES[outs[0].format])

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        return [ins[1], Spec(ins[0].shape, outs[0].format)]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        index = torch.clamp(ins[1], min=0, out=scratch[0])
        rows = scratch[1].copy_(ins[0])
        if rows.is_cuda:  # there index_add_ adds in any order, this one sorts
            outs[0].index_put_((index.long(),), rows, accumulate=True)
        else:
            outs[0].index_add_(0, index, rows)
