"""The mixture-of-experts layer around its GEMMs: router, slot plan, dispatch and combine.

An expert row is one (token, k) choice. Rows are ordered by (expert, token, k) and each expert's segment is padded
to `align` rows, so that a GEMM tile never straddles experts and scale-factor blocks never mix them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nmoe.graph import Graph, Name, Op, Spec
from nmoe.ops.base import Attrs, Cost, OpDef, Specs, memory_bytes, numel, register, wide
from nmoe.rdep.sizes import CapacityError, worst_case

if TYPE_CHECKING:
    import torch

EPSILON = 1e-20  # keeps the normalisation of all-zero scores finite (as DeepSeek-V3)


def _scores(attrs: Attrs, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    import torch

    if attrs["score"] == "sigmoid":
        return torch.sigmoid(logits, out=out)
    return torch.softmax(logits, dim=-1, out=out)


@register
class Router(OpDef):
    """Token-choice routing in FP32 (arXiv 2412.19437 §2.1.2; softmax scoring: arXiv 2405.04434 §2.2).

    x[T, d], w[E, d], bias[E]? → indices int32[T, k] by falling score, ties to the lower expert; weights FP32[T, k];
    logits FP32[T, E]. The bias chooses experts and does not weigh them. With `groups` > 1 a token's experts come
    from its best `topk_groups` groups, a group's score being the sum of its two best experts (sigmoid) or its best
    (softmax). Accumulates the mean balance loss (eq. 17–20, per sequence) and z-loss (arXiv 2202.08906 eq. 5).
    """

    kind = "router"
    outputs = ("indices", "weights", "logits", "balance", "z")
    accumulates = ("balance", "z")

    def infer(self, attrs: Attrs, x: Spec, w: Spec, bias: Spec | None = None) -> dict[str, Spec]:
        rows, fmt = x.shape[0], wide(x.format)
        specs = {"indices": Spec((rows, attrs["topk"]), "i32"), "weights": Spec((rows, attrs["topk"]), fmt),
                 "logits": Spec((rows, w.shape[0]), fmt)}  # fmt: skip
        return specs | {label: Spec((1,), fmt) for label in ("balance", "z") if attrs[label]}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        x, w, _ = op.inputs
        inputs = [douts[1], x, w, op.outputs[0], op.outputs[2]]
        dx, _ = g.emit("router_bwd", f"{op.name}.bwd", inputs, op.attrs, into={"dw": g.grad(w)})
        return (dx, None, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(2.0 * numel(ins[0].shape) * ins[1].shape[0], memory_bytes(*ins, *outs[:3]))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, experts), fmt = outs[2].shape, outs[2].format
        groups, seq = attrs["groups"], attrs["seq_len"]
        full = Spec((rows, experts), fmt)
        need = [Spec(ins[0].shape, fmt), full, full, full, Spec((rows, experts), "i64"), Spec((rows, 1), fmt)]
        need.append(Spec((1,), fmt))
        if groups > 1:
            per = Spec((rows, groups, experts // groups), fmt)
            need += [per, Spec(per.shape, "i64"), Spec((rows, groups), fmt), Spec((rows, groups), fmt),
                     Spec((rows, groups), "i64"), Spec((rows, groups), "bool")]  # fmt: skip
        if attrs["balance"]:
            sums = Spec((rows // seq, experts), fmt)
            need += [sums, sums, Spec((rows // seq, seq * attrs["topk"]), "i64")]
            need += [Spec((rows // seq, seq * attrs["topk"]), fmt)]
        return need

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (x, w, bias), (indices, weights, logits, balance, z) = ins, outs
        x32, scores, choice, ranked, order, column, total = scratch[:7]
        rest = list(scratch[7:])
        topk = attrs["topk"]
        torch.mm(x32.copy_(x), w.t(), out=logits)
        _scores(attrs, logits, scores)
        torch.add(scores, bias, out=choice) if bias is not None else choice.copy_(scores)
        if attrs["groups"] > 1:
            self._limit_groups(attrs, choice, rest)
            rest = rest[6:]
        torch.sort(choice, dim=-1, descending=True, stable=True, out=(ranked, order))
        chosen = order[:, :topk]
        indices.copy_(chosen)
        weights.copy_(torch.gather(scores, 1, chosen, out=ranked[:, :topk]))
        if attrs["normalize"]:
            torch.sum(weights, dim=-1, keepdim=True, out=column)
            weights.div_(column.add_(EPSILON))
        weights.mul_(attrs["route_scale"])
        if balance is not None:
            share = _normalised(attrs, scores, choice, column)
            frequency, mean = _frequency(attrs, indices, rest), rest[1]
            torch.sum(share.view(-1, attrs["seq_len"], share.shape[1]), dim=1, out=mean)
            scale = attrs["balance"] * attrs["inverse_sequences"] / attrs["seq_len"]
            torch.sum(frequency.mul_(mean).view(-1), 0, keepdim=True, out=total)
            balance.add_(total, alpha=scale)
        if z is not None:
            torch.logsumexp(logits, dim=-1, keepdim=True, out=column)
            torch.sum(column.square_().view(-1), 0, keepdim=True, out=total)
            z.add_(total, alpha=attrs["z"] * attrs["inverse_sequences"] / attrs["seq_len"])

    def _limit_groups(self, attrs: Attrs, choice: torch.Tensor, scratch: list[torch.Tensor]) -> None:
        """Sets the scores outside each token's best groups to −∞."""
        import torch

        per, order, group, ranked, group_order, closed = scratch[:6]
        members = choice.view_as(per)
        torch.sort(members, dim=-1, descending=True, stable=True, out=(per, order))
        best = 2 if attrs["score"] == "sigmoid" else 1
        torch.sum(per[..., :best], dim=-1, out=group)
        torch.sort(group, dim=-1, descending=True, stable=True, out=(ranked, group_order))
        closed.fill_(True).scatter_(1, group_order[:, : attrs["topk_groups"]], False)
        members.masked_fill_(closed.unsqueeze(-1), -math.inf)


def _normalised(attrs: Attrs, scores: torch.Tensor, out: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Scores that sum to one over the experts."""
    import torch

    torch.sum(scores, dim=-1, keepdim=True, out=column)
    return torch.div(scores, column, out=out)


def _frequency(attrs: Attrs, indices: torch.Tensor, scratch: list[torch.Tensor]) -> torch.Tensor:
    """f[b, e] = E / (k·S) · (choices of expert e in sequence b)."""
    frequency, _, chosen, ones = scratch[:4]
    frequency.zero_().scatter_add_(1, chosen.copy_(indices.view_as(chosen)), ones.fill_(1.0))
    return frequency.mul_(frequency.shape[1] / chosen.shape[1])


@register
class RouterBwd(OpDef):
    """(dweights[T, k], x, w, indices, logits) → dx, dw accumulated; the auxiliary losses' gradients included."""

    kind = "router_bwd"
    outputs = ("dx", "dw")
    accumulates = ("dw",)

    def infer(
        self, attrs: Attrs, dweights: Spec, x: Spec, w: Spec, indices: Spec, logits: Spec
    ) -> dict[str, Spec]:
        return {"dx": x, "dw": w}

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(4.0 * numel(ins[1].shape) * ins[2].shape[0], memory_bytes(*ins, *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        (rows, experts), fmt = ins[4].shape, ins[4].format
        full, column = Spec((rows, experts), fmt), Spec((rows, 1), fmt)
        chosen = Spec((rows, attrs["topk"]), fmt)
        need = [
            Spec(ins[1].shape, fmt),
            full,
            full,
            Spec(chosen.shape, "i64"),
            chosen,
            chosen,
            column,
            column,
        ]
        if attrs["balance"]:
            seq = attrs["seq_len"]
            sums = Spec((rows // seq, experts), fmt)
            need += [full, sums, sums, Spec((rows // seq, seq * attrs["topk"]), "i64")]
            need += [Spec((rows // seq, seq * attrs["topk"]), fmt)]
        if attrs["z"] or attrs["score"] == "softmax":
            need.append(full)
        return need

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (dweights, x, w, indices, logits), (dx, dw) = ins, outs
        x32, scores, d, index, selected, t, column, dot = scratch[:8]
        rest = list(scratch[8:])
        _scores(attrs, logits, scores)
        index.copy_(indices)
        torch.gather(scores, 1, index, out=selected)
        if attrs["normalize"]:
            torch.sum(selected, dim=-1, keepdim=True, out=column)
            column.add_(EPSILON)
            torch.mul(dweights, selected, out=t)
            torch.sum(t, dim=-1, keepdim=True, out=dot)
            torch.sub(dweights, dot.div_(column), out=t).div_(column)
        else:
            t.copy_(dweights)
        d.zero_().scatter_(1, index, t.mul_(attrs["route_scale"]))
        if attrs["balance"]:
            self._balance(attrs, indices, scores, d, column, dot, rest)
            rest = rest[5:]
        if attrs["score"] == "sigmoid":
            d.mul_(scores).addcmul_(d, scores, value=-1)
        else:
            torch.mul(d, scores, out=rest[0])
            torch.sum(rest[0], dim=-1, keepdim=True, out=dot)
            d.sub_(dot).mul_(scores)
        if attrs["z"]:
            torch.logsumexp(logits, dim=-1, keepdim=True, out=dot)
            torch.softmax(logits, dim=-1, out=rest[0])
            scale = 2 * attrs["z"] * attrs["inverse_sequences"] / attrs["seq_len"]
            d.addcmul_(rest[0], dot, value=scale)
        dw.addmm_(d.t(), x32.copy_(x))
        dx.copy_(torch.mm(d, w, out=x32))

    def _balance(
        self,
        attrs: Attrs,
        indices: torch.Tensor,
        scores: torch.Tensor,
        d: torch.Tensor,
        column: torch.Tensor,
        dot: torch.Tensor,
        rest: list[torch.Tensor],
    ) -> None:
        """Adds dL/ds of L = α/B Σ_b Σ_e f_e·mean_t s'_te with s' = s / Σ_e s."""
        import torch

        share = _normalised(attrs, scores, rest[0], column)
        frequency = _frequency(attrs, indices, rest[1:])
        frequency.mul_(attrs["balance"] * attrs["inverse_sequences"] / attrs["seq_len"])
        per_token = share.view(-1, attrs["seq_len"], share.shape[1])
        torch.sum(
            per_token.mul_(frequency.unsqueeze(1)),
            dim=-1,
            keepdim=True,
            out=dot.view(*per_token.shape[:2], 1),
        )
        # (f_e − Σ_j f_j s'_j) / Σ s
        torch.sub(frequency.unsqueeze(1), dot.view(*per_token.shape[:2], 1), out=per_token)
        d.add_(share.div_(column))


@register
class MoePlan(OpDef):
    """indices int32[T, k] → slots int32[T, k] (the row of each choice), row_source int32[R] (t·k + j, −1 on padding),
    offsets int32[L+1] (first row of each of the rank's L experts; the last is the total). `load`[E] accumulates tokens
    per expert. With attrs["runs"], runs int32[L·ranks+1]: the first row of each expert from each rank.

    Raises CapacityError when the rows do not fit R. `reference` is the plan of one rank; nmoe/rdep holds that of
    several, and their dispatch and combine.
    """

    kind = "moe_plan"
    outputs = ("slots", "row_source", "offsets", "load", "runs")
    accumulates = ("load",)

    def infer(self, attrs: Attrs, indices: Spec) -> dict[str, Spec]:
        experts, ranks = attrs["experts"], attrs["ranks"]
        specs = {"slots": indices, "row_source": Spec(("R",), "i32"), "offsets": Spec((experts // ranks + 1,), "i32"),
                 "load": Spec((experts,), attrs["format"])}  # fmt: skip
        return specs | ({"runs": Spec((experts + 1,), "i32")} if attrs.get("runs") else {})

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        if attrs["ranks"] > 1:
            return []
        choices, experts = numel(ins[0].shape), attrs["experts"]
        flat, per = Spec((choices,), "i64"), Spec((experts,), "i64")
        return [
            flat,
            flat,
            flat,
            flat,
            per,
            per,
            per,
            per,
            Spec((experts,), outs[3].format),
            Spec((choices,), "i32"),
        ]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (slots, row_source, offsets, load), align = outs[:4], attrs["align"]
        expert, ranked, order, position, counts, padded, first, shift, counts_wide, small = scratch
        expert.copy_(ins[0].view(-1))
        torch.sort(expert, stable=True, out=(ranked, order))
        counts.zero_().scatter_add_(0, expert, position.fill_(1))
        torch.add(counts, align - 1, out=padded)
        padded.floor_divide_(align).mul_(align)
        torch.cumsum(padded, 0, out=shift)
        offsets[:1].zero_()
        offsets[1:].copy_(shift)
        # Looks at the total, for which a GPU has to be waited for, only if there may be too many.
        most = worst_case(1, slots.shape[0], slots.shape[1], offsets.shape[0] - 1, align)
        if most > row_source.shape[0] and (total := int(shift[-1])) > row_source.shape[0]:
            raise CapacityError(
                f"{total} expert rows arrived, the capacity is {row_source.shape[0]}: raise [rdep] capacity to at "
                f"least {total}, or set it to 0 for the worst case"
            )
        torch.cumsum(counts, 0, out=first)
        shift.sub_(padded).sub_(first.sub_(counts))  # padded start − unpadded start
        torch.index_select(shift, 0, ranked, out=position)
        torch.arange(position.shape[0], out=ranked)
        position.add_(ranked)
        small.copy_(position)
        slots.view(-1).index_copy_(0, order, small)
        row_source.fill_(-1).index_copy_(0, position, small.copy_(order))
        load.add_(counts_wide.copy_(counts))


@register
class Dispatch(OpDef):
    """Puts each token's row, and its router weight, into the slots of its experts.

    x[T, d]?, weights[T, k]?, slots, row_source, offsets → rows[R, d], row_weight[R]; x may be quantized along its rows,
    with one scale for all, as MXFP8 is. Padding rows are zero; rows from offsets[E] on are left as they are.
    attrs["ranks"], absent on one, share the experts.
    """

    kind = "dispatch"
    outputs = ("rows", "row_weight")

    def infer(self, attrs: Attrs, x: Spec | None, weights: Spec | None, *plan: Spec) -> dict[str, Spec]:
        rows = {} if x is None else {"rows": Spec(("R", x.shape[1]), x.format, x.axis)}
        return rows if weights is None else rows | {"row_weight": Spec(("R",), weights.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        dx, dweights = g.emit("combine", f"{op.name}.bwd", [douts[0], douts[1], *op.inputs[2:]], op.attrs)
        return (dx, dweights, None, None, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(0.0, memory_bytes(ins[0], *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        rows = ins[3].shape
        return [] if "ranks" in attrs else [Spec(rows, "i32"), Spec(rows, "i32"), Spec(rows, "bool")]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        from nmoe.formats import buffers

        x, weights, slots, row_source, offsets = ins
        # A GPU is not waited for: it copies to all rows, those past the last expert's as padding.
        n, topk = len(row_source) if slots.is_cuda else int(offsets[-1]), slots.shape[1]
        source, token, padding = (t[:n] for t in scratch)
        torch.clamp(row_source[:n], min=0, out=source)
        torch.floor_divide(source, topk, out=token)
        torch.lt(row_source[:n], 0, out=padding)
        for of_tokens, of_rows in zip(buffers(x), buffers(outs[0]), strict=True):
            rows = of_rows[:n]
            torch.index_select(of_tokens, 0, token, out=rows)
            if n > slots.numel():  # there is padding
                rows.masked_fill_(padding.unsqueeze(-1), 0)
        if weights is not None:
            torch.index_select(weights.view(-1), 0, source, out=outs[1][:n])
            outs[1][:n].masked_fill_(padding, 0)


@register
class Combine(OpDef):
    """Brings expert rows back to their tokens and sums the k rows of each in FP32, in the order of the choices.

    rows[R, d], row_values[R]?, slots, row_source, offsets → y[T, d], values[T, k]. attrs as those of dispatch.
    """

    kind = "combine"
    outputs = ("y", "values")

    def infer(
        self, attrs: Attrs, rows: Spec, row_values: Spec | None, slots: Spec, *plan: Spec
    ) -> dict[str, Spec]:
        y = {"y": Spec((slots.shape[0], rows.shape[1]), rows.format)}
        return y if row_values is None else y | {"values": Spec(slots.shape, row_values.format)}

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        drows, _ = g.emit("dispatch", f"{op.name}.bwd", [douts[0], None, *op.inputs[2:]], op.attrs)
        return (drows, None, None, None, None)

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(float(numel(ins[0].shape)), memory_bytes(ins[0], *outs))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        y, fmt = outs[0], wide(outs[0].format)
        if "ranks" in attrs:
            return []
        return [Spec(y.shape, y.format), Spec(y.shape, fmt), Spec(y.shape[:1], "i32")]

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        import torch

        (rows, row_values, slots, *_), (gathered, total, slot) = ins, scratch
        total.zero_()
        for k in range(slots.shape[1]):
            torch.index_select(rows, 0, slot.copy_(slots[:, k]), out=gathered)
            total.add_(gathered)
        outs[0].copy_(total)
        if row_values is not None:
            torch.index_select(row_values, 0, slots.view(-1), out=outs[1].view(-1))
