"""The router's gradient: from the weights' and the auxiliary losses' through the scores to x and w.

    tally      part of the tokens ─▶ how often it chose each expert     if there is a balance loss
    dlogits    part of the tokens; warp ─▶ token: dL/dlogits in three BF16 parts ─▶ workspace
    split      w in two BF16 parts
    multiply   dx = dlogits · w, plus the addends                  products.py
    multiply   partial[split] = dlogitsᵀ · x of a part of the tokens
    add        dw += Σ over the splits, in order

Every sum has one order, so that results are repeatable bit for bit.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import ROUTER_WGRAD, RouterBwdProblem, RoutingConfig
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.products import Products, parts_of, write_parts
from nmoe.codegen.templates.scores import EPSILON, LN_2, Scores, warp_sum


class RouterBwd(Fixed):
    def __init__(self, problem: RouterBwdProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.scored = Scores(problem, config)

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of RouterBwdProblem.operands, the number of thread blocks of `add`, the
        stream."""
        *given, blocks, stream = args
        named = {o.name: t for o, t in zip(self.problem.operands(self.config), given, strict=True)}
        problem, block = self.problem, [32 * self.config.warps, 1, 1]
        experts, hidden, splits = problem.experts, problem.hidden, problem.splits
        d, dw, partial = named["dlogits"], named["dw"], named["partial"]
        seq_len: Any = named.get("seq_len")
        each: dict[str, Any] = {}
        for name in ("balance", "z"):
            if cutlass.const_expr(name in named):
                each[name] = named[name] * named["inverse_sequences"] / Float32(seq_len)
        if cutlass.const_expr(problem.balance):
            each["balance"] = each["balance"] * Float32(experts) / Float32(problem.topk * seq_len)
            self.scored.launch_tally(named["indices"], named["tallies"], stream)
        self.dlogits(
            named["dweights"], named["indices"], named["logits"], d, named["route_scale"], seq_len,
            named.get("tallies"), each.get("balance"), each.get("z"),
        ).launch(grid=[self.config.parts, 1, 1], block=block, stream=stream)  # fmt: skip

        parts, tokens, pitch = d.shape
        two = problem.dgrad.parts[0]

        def view(tensor, shape, stride):  # type: ignore[no-untyped-def]
            return cute.make_tensor(tensor.iterator, cute.make_layout(shape, stride=stride))

        write_parts(named["w"], named["w_parts"], stream)
        Products(problem.dgrad, False, True, groups=problem.groups).launch(
            view(d, (two, tokens, pitch), (tokens * pitch, pitch, 1)),
            view(named["w_parts"], (two, hidden, experts), (experts * hidden, 1, hidden)),
            view(named["dx"], (tokens, hidden, 1), (hidden, 1, 0)), stream,
            [named[name] for name in problem.addend_names],
        )  # fmt: skip
        Products(ROUTER_WGRAD, True, True, splits).launch(
            view(d, (parts, pitch, tokens), (tokens * pitch, 1, pitch)),
            view(named["x"], (1, hidden, tokens), (0, 1, hidden)),
            view(partial, (experts, hidden, splits), (hidden, 1, experts * hidden)), stream,
        )  # fmt: skip
        size = experts * hidden
        self.add(view(partial, (size, splits), (1, size)), view(dw, (size,), (1,))).launch(
            grid=[blocks, 1, 1], block=block, stream=stream
        )

    @cute.kernel
    def dlogits(self, dweights, indices, logits, d, route_scale, seq_len, tallies, balance, z):  # type: ignore[no-untyped-def]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        often = smem.allocate_tensor(Int32, cute.make_layout(self.problem.experts))
        token, end = self.scored.part(logits.shape[0])
        while token < end:
            stop = self.scored.stop(token, end, seq_len)
            frequency = None
            if cutlass.const_expr(self.problem.balance):
                frequency = self.scored.frequency(indices, tallies, token, seq_len, often)
                frequency.store(frequency.load() * balance)
            for t in cutlass.range(token + warp, stop, self.config.warps, unroll=1):
                self._token(t, dweights, indices, logits, d, route_scale, frequency, z)
            token = stop

    @cute.jit
    def _token(self, token, dweights, indices, logits, d, route_scale, frequency, z) -> None:  # type: ignore[no-untyped-def]
        found = self.scored.load(logits[token, None])
        scores = self.scored.scores(found)
        grads = self._chosen(scores, dweights[token, None], indices[token, None], route_scale)
        if cutlass.const_expr(frequency is not None):  # dL/ds = (f_e − Σ_j f_j s'_j) / Σ s
            total = self.scored.sum(scores)
            terms = cute.make_rmem_tensor((self.scored.held,), Float32)
            terms.store(frequency.load() * scores.load())
            mean = self.scored.sum(terms) / total
            grads.store(grads.load() + (frequency.load() - mean) / total)
        if cutlass.const_expr(self.problem.score == "sigmoid"):
            grads.store(grads.load() * scores.load() * (1.0 - scores.load()))
        else:
            terms = cute.make_rmem_tensor((self.scored.held,), Float32)
            terms.store(grads.load() * scores.load())
            grads.store((grads.load() - self.scored.sum(terms)) * scores.load())
        if cutlass.const_expr(z is not None):
            exponentials, top, total = self.scored.exponentials(found)
            log = top + cute.math.log2(total, fastmath=True) * LN_2
            grads.store(grads.load() + exponentials.load() * (2.0 * z * log / total))
        parts = parts_of(grads, d.shape[0])
        for i in cutlass.range_constexpr(self.scored.held):
            expert = 32 * i + cute.arch.lane_idx()
            for index, part in enumerate(parts):
                if expert < self.problem.experts:
                    d[index, token, expert] = part[i]
                elif expert < self.problem.pitch:
                    d[index, token, expert] = BFloat16(0.0)

    @cute.jit
    def _chosen(self, scores, dweights, indices, route_scale) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """dL/ds of the weights, at the experts of each lane; lane j first has choice j."""
        lane, topk = cute.arch.lane_idx(), self.problem.topk
        expert, grad = Int32(-1), Float32(0.0)
        if lane < topk:
            expert, grad = indices[lane], dweights[lane]
        if cutlass.const_expr(self.problem.normalize):
            score = self._gather(scores, expert)
            total = warp_sum(score) + EPSILON
            grad = (grad - warp_sum(grad * score) / total) / total
        found = cute.make_rmem_tensor((self.scored.held,), Float32)
        found.fill(0.0)
        for j in cutlass.range_constexpr(topk):
            one, value = cute.arch.shuffle_sync(expert, j), cute.arch.shuffle_sync(grad * route_scale, j)
            for i in cutlass.range_constexpr(self.scored.held):
                if one == 32 * i + lane:
                    found[i] = value
        return found

    @cute.jit
    def _gather(self, scores, expert) -> Float32:  # type: ignore[no-untyped-def]
        """Each lane's `expert` score, 0 for expert −1."""
        found = Float32(0.0)
        for i in cutlass.range_constexpr(self.scored.held):
            value = cute.arch.shuffle_sync(scores[i], expert % 32)
            if expert // 32 == i and expert >= 0:
                found = value
        return found

    @cute.kernel
    def add(self, partial, dw):  # type: ignore[no-untyped-def]
        thread = cute.arch.block_idx()[0] * 32 * self.config.warps + cute.arch.thread_idx()[0]
        for i in cutlass.range(
            thread, cute.size(dw), cute.arch.grid_dim()[0] * 32 * self.config.warps, unroll=1
        ):
            total = Float32(0.0)
            for split in cutlass.range_constexpr(self.problem.splits):
                total += partial[i, split]
            dw[i] += total
