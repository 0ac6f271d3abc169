"""Conversion to a block-scaled format. The schedule inserts it in front of the GEMMs that their recipe quantizes."""

from __future__ import annotations

from typing import Any

from nmoe.graph import Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register


@register
class Quantize(OpDef):
    """x[..., M, K], offsets int32[E+1]?, counter int64[1]? → q in attrs["format"], blocked along attrs["axis"].

    x may be rows in MXFP8, as they travel between ranks: what is quantized are the numbers that they stand for, so that
    a copy along the same axis stands for the same numbers. `offsets` makes row segments that have their own NVFP4
    global scale and stay apart; `counter`, which a step increments, seeds stochastic rounding together with
    attrs["seed"]. attrs["atoms"] has kernels lay the scale factors out as block-scaled MMA reads them; the reference
    makes rows.
    """

    kind = "quantize"
    outputs = ("q",)
    waits = True

    def infer(
        self, attrs: Attrs, x: Spec, offsets: Spec | None = None, counter: Spec | None = None
    ) -> dict[str, Spec]:
        segments = 0 if offsets is None else int(offsets.shape[0]) - 1
        return {"q": Spec(x.shape, attrs["format"], attrs["axis"], segments, attrs.get("atoms", False))}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        reads = 2 if attrs["format"] == "nvfp4" else 1  # the global amax is a pass of its own
        return Cost(4.0 * numel(ins[0].shape), reads * memory_bytes(ins[0]) + memory_bytes(outs[0]))

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        from nmoe import formats

        x, offsets, counter = ins
        if isinstance(x, formats.Quantized):
            x = formats.dequantize(x, torch.bfloat16)
        formats.quantize(
            x,
            attrs["format"],
            attrs["axis"],
            rounding=attrs["rounding"],
            seed=None if counter is None else attrs["seed"] + int(counter),
            hadamard=attrs["hadamard"],
            square=attrs["square"],
            segments=offsets,
            out=outs[0],
        )
