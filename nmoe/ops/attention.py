"""Multi-head latent attention's core (arXiv 2405.04434 §2.1): rotary embedding and causal softmax attention.

Keys are the concatenation of a per-head part and a rotary part shared by all heads; values may be narrower than
keys. A token sees the tokens of its own document, up to `window` back: `positions[t]`, the position within the
document, says both where it starts and which rotation applies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, register, wide

if TYPE_CHECKING:
    import torch

QUERY_BLOCK = 128  # queries that the reference scores at once


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071 eq. 22, as DeepSeek parametrises it)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_frequencies(dim: int, theta: float, yarn: dict[str, float]) -> tuple[torch.Tensor, float]:
    """Angular frequencies float64[dim/2] and the factor on cos and sin, extended by YaRN when factor > 1."""
    import torch

    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies = theta**-exponent
    factor = yarn["factor"]
    if factor <= 1.0:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:
        return dim * math.log(yarn["original_seq_len"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn["beta_fast"])), 0)
    high = min(math.ceil(dimension(yarn["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    mixed = frequencies / factor * ramp + frequencies * (1 - ramp)
    scale = yarn_mscale(factor, yarn["mscale"])
    if yarn["mscale_all_dim"]:
        scale /= yarn_mscale(factor, yarn["mscale_all_dim"])
    return mixed, scale


@register
class RopeTable(OpDef):
    """→ cos, sin [S, dim/2] of the rotation at each position (arXiv 2104.09864)."""

    kind = "rope_table"
    outputs = ("cos", "sin")

    def infer(self, attrs: Attrs) -> dict[str, Spec]:
        spec = Spec((attrs["seq_len"], attrs["dim"] // 2), attrs["format"])
        return {"cos": spec, "sin": spec}

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        frequencies, scale = rope_frequencies(attrs["dim"], attrs["theta"], attrs["yarn"])
        angles = torch.arange(attrs["seq_len"], dtype=torch.float64)[:, None] * frequencies
        outs[0].copy_(angles.cos() * scale)
        outs[1].copy_(angles.sin() * scale)


@register
class Rope(OpDef):
    """Rotates the last `dim` columns of each of `heads` heads, in pairs (2i, 2i + 1), by the token's position.

    x[T, heads·D], positions int32[T], cos, sin [S, dim/2] → y like x. `inverse` rotates back (the gradient).
    """

    kind = "rope"
    outputs = ("y",)
    inplace: ClassVar = {"y": 0}
    cheap = True

    def infer(self, attrs: Attrs, x: Spec, positions: Spec, cos: Spec, sin: Spec) -> dict[str, Spec]:
        return {"y": x}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        attrs = {**op.attrs, "inverse": not op.attrs["inverse"]}
        (dx,) = g.emit("rope", f"{op.name}.bwd", [douts[0], *op.inputs[1:]], attrs)
        return (dx, None, None, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(3.0 * ins[0].shape[0] * attrs["heads"] * attrs["dim"], memory_bytes(ins[0], outs[0]))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        rows, heads, half = ins[0].shape[0], attrs["heads"], attrs["dim"] // 2
        table, pair = Spec((rows, half), ins[2].format), Spec((rows, heads, half), ins[2].format)
        return [table, table, pair, pair, pair]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (x, positions, cos, sin), (c, s, even, odd, t) = ins, scratch
        y = outs[0]
        if y.data_ptr() != x.data_ptr():
            y.copy_(x)
        torch.index_select(cos, 0, positions, out=c)
        torch.index_select(sin, 0, positions, out=s)
        if attrs["inverse"]:
            s.neg_()
        c, s = c.unsqueeze(1), s.unsqueeze(1)
        rotary = y.view(y.shape[0], attrs["heads"], -1)[..., -attrs["dim"] :]
        even.copy_(rotary[..., 0::2])
        odd.copy_(rotary[..., 1::2])
        torch.mul(even, c, out=t)
        rotary[..., 0::2].copy_(t.addcmul_(odd, s, value=-1))
        torch.mul(even, s, out=t)
        rotary[..., 1::2].copy_(t.addcmul_(odd, c))


def _average_keys(attrs: Attrs) -> float:
    """Keys that a token sees on average when documents are at least as long as the sequence."""
    seq, window = attrs["seq_len"], attrs["window"] or attrs["seq_len"]
    window = min(window, seq)
    return (window * (window + 1) / 2 + (seq - window) * window) / seq


class _Heads:
    """The operands of one sequence, per head and in the wide format: q, k [H, S, dq], v [H, S, dv]."""

    def __init__(self, attrs: Attrs, ins: list[Any], scratch: list[Any]) -> None:
        import torch

        self.attrs = attrs
        self.seq, self.heads = attrs["seq_len"], attrs["heads"]
        self.nope, self.rope, self.vdim = attrs["nope"], attrs["rope"], attrs["v"]
        q, kv, k_rope, positions = ins
        widths = ((self.heads, self.nope + self.rope), (self.heads, self.nope + self.vdim), (1, self.rope))
        self.source = [x.view(-1, self.seq, *w) for x, w in zip((q, kv, k_rope), widths, strict=True)]
        self.positions = positions.view(-1, self.seq)
        self.q, self.k, self.v, self.scores, self.index, self.low, self.late, self.bad, self.bias = scratch[
            :9
        ]
        torch.arange(self.seq, out=self.index)

    def load(self, sequence: int) -> None:
        import torch

        q, kv, k_rope = (t[sequence].transpose(0, 1) for t in self.source)
        self.q.copy_(q).mul_(self.attrs["scale"])
        self.k[..., : self.nope].copy_(kv[..., : self.nope])
        self.k[..., self.nope :].copy_(k_rope)
        self.v.copy_(kv[..., self.nope :])
        # low[i]: the first key that query i sees
        back = self.positions[sequence]
        torch.sub(self.index, back, out=self.low)
        if self.attrs["window"]:
            torch.sub(self.index, self.attrs["window"] - 1, out=self.late[: self.seq])
            torch.maximum(self.low, self.late[: self.seq], out=self.low)

    def blocks(self) -> Any:
        """(queries, keys, scores [H, m, n] with −inf where a query does not see a key) of each query block."""
        import torch

        for start in range(0, self.seq, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, self.seq)
            # The documents follow each other, so `low` never falls. A GPU's value is not waited for: the mask hides
            # whatever comes before it.
            first = 0 if self.low.is_cuda else int(self.low[start])
            m, n = end - start, end - first
            scores = self.scores[: self.heads * m * n].view(self.heads, m, n)
            torch.bmm(self.q[:, start:end], self.k[:, first:end].mT, out=scores)
            bad = self.bad[: 2 * m * n].view(2, m, n)
            keys = self.index[first:end]
            torch.lt(keys, self.low[start:end, None], out=bad[0])
            torch.gt(keys, self.index[start:end, None], out=bad[1])
            # Adding −∞ vectorises over the heads; masked_fill_ of all scores does not.
            bias = self.bias[: m * n].view(m, n).zero_().masked_fill_(bad[0].logical_or_(bad[1]), -math.inf)
            yield slice(start, end), slice(first, end), scores.add_(bias)


def _common_scratch(attrs: Attrs, fmt: str) -> list[Spec]:
    seq, heads = attrs["seq_len"], attrs["heads"]
    key = Spec((heads, seq, attrs["nope"] + attrs["rope"]), fmt)
    block = min(QUERY_BLOCK, seq)
    scores, rows = Spec((heads * block * seq,), fmt), Spec((seq,), "i32")
    value, bad, bias = (
        Spec((heads, seq, attrs["v"]), fmt),
        Spec((2 * block * seq,), "bool"),
        Spec((block * seq,), fmt),
    )
    return [key, key, value, scores, rows, rows, rows, bad, bias]


@register
class Attention(OpDef):
    """q[T, H·(nope+rope)], kv[T, H·(nope+v)], k_rope[T, rope], positions int32[T] → o[T, H·v], lse[H, T] FP32.

    softmax(scale · q·k) v with k = [k_nope | k_rope]; lse is the log of the softmax's denominator.
    """

    kind = "attention"
    outputs = ("o", "lse")

    def infer(self, attrs: Attrs, q: Spec, kv: Spec, k_rope: Spec, positions: Spec) -> dict[str, Spec]:
        rows = q.shape[0]
        return {"o": Spec((rows, attrs["heads"] * attrs["v"]), q.format),
                "lse": Spec((attrs["heads"], rows), wide(q.format))}  # fmt: skip

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        o, lse = op.outputs
        dq, dkv, dk_rope = g.emit("attention_bwd", f"{op.name}.bwd", [douts[0], *op.inputs, o, lse], op.attrs)
        return (dq, dkv, dk_rope, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        products = attrs["nope"] + attrs["rope"] + attrs["v"]
        flops = 2.0 * ins[0].shape[0] * attrs["heads"] * products * _average_keys(attrs)
        return Cost(flops, memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        fmt = outs[1].format
        column = Spec((attrs["heads"] * min(QUERY_BLOCK, attrs["seq_len"]),), fmt)
        out = Spec((column.shape[0] * attrs["v"],), fmt)
        return [*_common_scratch(attrs, fmt), column, column, out]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        heads = _Heads(attrs, ins, scratch)
        count, seq = heads.heads, heads.seq
        o = outs[0].view(-1, seq, count, heads.vdim)
        lse = outs[1].view(count, -1, seq)
        for sequence in range(o.shape[0]):
            heads.load(sequence)
            for queries, keys, scores in heads.blocks():
                m = scores.shape[1]
                top, total = (t[: count * m].view(count, m, 1) for t in scratch[9:11])
                block = scratch[11][: count * m * heads.vdim].view(count, m, heads.vdim)
                torch.amax(scores, dim=-1, keepdim=True, out=top)
                scores.sub_(top).exp_()
                torch.sum(scores, dim=-1, keepdim=True, out=total)
                torch.bmm(scores, heads.v[:, keys], out=block)
                o[sequence, queries].copy_(block.div_(total).transpose(0, 1))
                lse[:, sequence, queries].copy_(total.log_().add_(top).squeeze(-1))


@register
class AttentionBwd(OpDef):
    """(do, q, kv, k_rope, positions, o, lse) → dq, dkv, dk_rope.

    With P from lse: dV = Pᵀ dO, dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O)), dQ = scale·dS K, dK = scale·dSᵀ Q.
    """

    kind = "attention_bwd"
    outputs = ("dq", "dkv", "dk_rope")

    def infer(self, attrs: Attrs, *ins: Spec) -> dict[str, Spec]:
        return {"dq": ins[1], "dkv": ins[2], "dk_rope": ins[3]}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        products = 3 * (attrs["nope"] + attrs["rope"]) + 2 * attrs["v"]
        flops = 2.0 * ins[0].shape[0] * attrs["heads"] * products * _average_keys(attrs)
        return Cost(flops, memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        fmt = ins[6].format
        common = _common_scratch(attrs, fmt)
        key, value, scores = common[1], common[2], common[3]
        column = Spec((attrs["heads"], attrs["seq_len"], 1), fmt)
        queries = Spec((attrs["heads"] * min(QUERY_BLOCK, attrs["seq_len"]) * key.shape[2],), fmt)
        shared = Spec((attrs["seq_len"], attrs["rope"]), fmt)
        return [*common, value, key, value, scores, column, column, queries, shared]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        do_, o_, lse_ = ins[0], ins[5], ins[6]
        heads = _Heads(attrs, ins[1:5], scratch)
        count, seq, vdim, nope = heads.heads, heads.seq, heads.vdim, heads.nope
        do, dk, dv, dscores, delta, lse, dq_block, shared = scratch[9:]
        do_, o_ = do_.view(-1, seq, count, vdim), o_.view(-1, seq, count, vdim)
        lse_ = lse_.view(count, -1, seq)
        dq, dkv, dk_rope = (t.view(-1, seq, *s.shape[2:]) for t, s in zip(outs, heads.source, strict=True))
        for sequence in range(dq.shape[0]):
            heads.load(sequence)
            do.copy_(do_[sequence].transpose(0, 1))
            dv.copy_(o_[sequence].transpose(0, 1)).mul_(do)
            torch.sum(dv, dim=-1, keepdim=True, out=delta)
            lse.copy_(lse_[:, sequence].unsqueeze(-1))
            dk.zero_()
            dv.zero_()
            for queries, keys, scores in heads.blocks():
                p = scores.sub_(lse[:, queries]).exp_()
                dv[:, keys].baddbmm_(p.mT, do[:, queries])
                dp = dscores[: p.numel()].view_as(p)
                torch.bmm(do[:, queries], heads.v[:, keys].mT, out=dp)
                ds = dp.sub_(delta[:, queries]).mul_(p)
                dk[:, keys].baddbmm_(ds.mT, heads.q[:, queries])  # q carries the scale
                block = dq_block[: count * p.shape[1] * dk.shape[2]].view(count, p.shape[1], dk.shape[2])
                torch.bmm(ds, heads.k[:, keys], out=block)
                dq[sequence, queries].copy_(block.mul_(attrs["scale"]).transpose(0, 1))
            dkv[sequence, ..., :nope].copy_(dk[..., :nope].transpose(0, 1))
            dkv[sequence, ..., nope:].copy_(dv.transpose(0, 1))
            torch.sum(dk[..., nope:], dim=0, out=shared)
            dk_rope[sequence].copy_(shared.unsqueeze(1))
