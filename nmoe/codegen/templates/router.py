"""The router: logits, each token's best experts and their weights, and the auxiliary losses.

    split      w in three BF16 parts
    multiply   products[split] = x · wᵀ over a part of the depth    products.py
    select     warp ─▶ token: logits = Σ over the splits, in order ─▶ scores ─▶ best groups ─▶ topk rounds of the warp's
               maximum ─▶ indices, weights
    tally      part of the tokens ─▶ how often it chose each expert     if there is a balance loss
    losses     part of the tokens ─▶ Σ of both losses' terms ─▶ partial[loss, part]          if there are losses
    finish     Σ over the parts, in order, times the losses' factors ─▶ added to the losses

Scores are compared as integers that order as the floats do, so that a NaN, as in torch, is above all, and every choice
is an expert that was not chosen before.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass._mlir.dialects import arith
from cutlass.cutlass_dsl import T
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import LOGITS, RouterProblem, RoutingConfig
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.products import Products, write_parts
from nmoe.codegen.templates.scores import EPSILON, LN_2, Scores, warp_sum

TAKEN = -(1 << 31)  # below every float
CLOSED = -0x7F80_0000 - 1  # −∞


def ordered(x: Float32) -> Int32:
    """An integer that orders as floats do."""
    bits = Int32(arith.bitcast(T.i32(), x.ir_value()))
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


class Router(Fixed):
    def __init__(self, problem: RouterProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.scored = Scores(problem, config)
        self.names = [name for name in ("balance", "z") if getattr(problem, name)]

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of RouterProblem.operands, the number of thread blocks of `select`, the
        stream."""
        *given, blocks, stream = args
        named = {o.name: t for o, t in zip(self.problem.operands(self.config), given, strict=True)}
        block = [32 * self.config.warps, 1, 1]
        logits, indices = named["logits"], named["indices"]
        products = cute.make_tensor(
            named["products"].iterator, cute.select(named["products"].layout, [1, 2, 0])
        )  # [tokens, experts, splits]
        write_parts(named["w"], named["w_parts"], stream)
        x = named["x"]
        x = cute.make_tensor(x.iterator, cute.prepend(x.layout, cute.make_layout(1)))
        Products(LOGITS, False, False, self.problem.splits).launch(x, named["w_parts"], products, stream)
        self.select(
            products, logits, named.get("bias"), indices, named["weights"], named["route_scale"]
        ).launch(grid=[blocks, 1, 1], block=block, stream=stream)  # fmt: skip
        if cutlass.const_expr(self.names):
            factors = [
                named[name] * named["inverse_sequences"] / Float32(named["seq_len"]) for name in self.names
            ]
            if cutlass.const_expr(self.problem.balance):
                choices = Float32(self.problem.topk * named["seq_len"])
                factors[0] = factors[0] * Float32(self.problem.experts) / choices
                self.scored.launch_tally(indices, named["tallies"], stream)
            self.losses(logits, indices, named.get("tallies"), named["partial"], named["seq_len"]).launch(
                grid=[self.config.parts, 1, 1], block=block, min_blocks_per_mp=1, stream=stream
            )
            self.finish(named["partial"], [named[f"{name}_loss"] for name in self.names], factors).launch(
                grid=[1, 1, 1], block=[32, 1, 1], stream=stream
            )

    @cute.kernel
    def select(self, products, logits, bias, indices, weights, route_scale):  # type: ignore[no-untyped-def]
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        shared = smem.allocate_tensor(Float32, cute.make_layout((self.problem.experts, self.config.warps)))
        mine = shared[None, warp]
        if cutlass.const_expr(bias is not None):
            biases = self.scored.load(bias)
        first = cute.arch.block_idx()[0] * self.config.warps + warp
        for token in cutlass.range(
            first, logits.shape[0], cute.arch.grid_dim()[0] * self.config.warps, unroll=1
        ):
            scores = self.scored.scores(self._logits(products[token, None, None], logits[token, None]))
            choices = cute.make_rmem_tensor((self.scored.held,), Float32)
            choices.store(scores.load())
            if cutlass.const_expr(bias is not None):
                choices.store(scores.load() + biases.load())
            keys = self._keys(choices, mine)
            expert = self._best(keys)
            self._share(scores, mine)
            weight = Float32(0.0)
            if lane < self.problem.topk:
                weight = mine[expert]
            if cutlass.const_expr(self.problem.normalize):
                weight = weight / (warp_sum(weight) + EPSILON)
            if lane < self.problem.topk:
                indices[token, lane], weights[token, lane] = expert, weight * route_scale

    @cute.jit
    def _logits(self, products, logits) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """A token's logits, stored as well: the sum of its `products` [experts, splits]."""
        found = self.scored.load(products[None, 0])
        for split in cutlass.range_constexpr(1, self.problem.splits):
            found.store(found.load() + self.scored.load(products[None, split]).load())
        for i in cutlass.range_constexpr(self.scored.held):
            expert = 32 * i + cute.arch.lane_idx()
            if expert < self.problem.experts:
                logits[expert] = found[i]
        return found

    @cute.jit
    def _share(self, values, mine) -> None:  # type: ignore[no-untyped-def]
        """A token's values by expert, in shared memory, for the whole warp."""
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(self.scored.held):
            expert = 32 * i + cute.arch.lane_idx()
            if expert < self.problem.experts:
                mine[expert] = values[i]
        cute.arch.sync_warp()

    @cute.jit
    def _keys(self, choices, mine) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """What experts are chosen by, those outside the best groups below all others."""
        keys = cute.make_rmem_tensor((self.scored.held,), Int32)
        experts, groups = self.problem.experts, self.problem.groups
        size = experts // groups
        opened = Int32(-1)
        if cutlass.const_expr(groups > 1):
            self._share(choices, mine)
            opened = self._open(mine, size)
        for i in cutlass.range_constexpr(self.scored.held):
            expert = 32 * i + cute.arch.lane_idx()
            keys[i] = Int32(TAKEN)
            if expert < experts:
                keys[i] = ordered(choices[i])
                if cutlass.const_expr(groups > 1):
                    if (opened >> (expert // size)) & 1 == 0:
                        keys[i] = Int32(CLOSED)
        return keys

    @cute.jit
    def _open(self, mine, size: cutlass.Constexpr) -> Int32:  # type: ignore[no-untyped-def]
        """The best groups, a bit each: of sigmoid scores by the sum of the two best experts, of softmax by the best."""
        lane, groups = cute.arch.lane_idx(), self.problem.groups
        best, second = Float32(-float("inf")), Float32(-float("inf"))
        if lane < groups:
            for i in cutlass.range(size, unroll=4):
                value = mine[lane * size + i]
                second = cute.arch.fmax(second, cute.arch.fmin(best, value))
                best = cute.arch.fmax(best, value)
        if cutlass.const_expr(self.problem.score == "sigmoid" and size > 1):
            best += second
        key, rank = ordered(best), Int32(0)
        for other in cutlass.range_constexpr(groups):
            found = cute.arch.shuffle_sync(key, other)
            if found > key or (found == key and other < lane):
                rank += 1
        return cute.arch.vote_ballot_sync(lane < groups and rank < self.problem.topk_groups)

    @cute.jit
    def _best(self, keys) -> Int32:  # type: ignore[no-untyped-def]
        """Lane j's is the j-th best expert, of equals the lower first."""
        lane, chosen = cute.arch.lane_idx(), Int32(0)
        for j in cutlass.range_constexpr(self.problem.topk):
            best, expert = keys[0], lane
            for i in cutlass.range_constexpr(1, self.scored.held):
                if keys[i] > best:
                    best, expert = keys[i], 32 * i + lane
            top = cute.arch.warp_redux_sync(best, "max")
            winner = cute.arch.warp_redux_sync(expert if best == top else Int32(1 << 30), "min")
            for i in cutlass.range_constexpr(self.scored.held):
                if winner == 32 * i + lane:
                    keys[i] = Int32(TAKEN)
            if lane == j:
                chosen = winner
        return chosen

    @cute.kernel
    def losses(self, logits, indices, tallies, partial, seq_len):  # type: ignore[no-untyped-def]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        often = smem.allocate_tensor(Int32, cute.make_layout(self.problem.experts))
        sums = smem.allocate_tensor(Float32, cute.make_layout((2, self.config.warps)))
        balance, z = Float32(0.0), Float32(0.0)
        token, end = self.scored.part(logits.shape[0])
        while token < end:
            stop = self.scored.stop(token, end, seq_len)
            frequency = None
            if cutlass.const_expr(self.problem.balance):
                frequency = self.scored.frequency(indices, tallies, token, seq_len, often)
            for t in cutlass.range(token + warp, stop, self.config.warps, unroll=1):
                more_balance, more_z = self._terms(logits[t, None], frequency)
                balance += more_balance
                z += more_z
            token = stop
        if cute.arch.lane_idx() == 0:
            sums[0, warp], sums[1, warp] = balance, z
        cute.arch.sync_threads()
        loss = cute.arch.thread_idx()[0]
        if loss < 2:
            total = Float32(0.0)
            for i in cutlass.range_constexpr(self.config.warps):
                total += sums[loss, i]
            partial[loss, cute.arch.block_idx()[0]] = total

    @cute.jit
    def _terms(self, line, frequency):  # type: ignore[no-untyped-def]
        """A token's Σ_e frequency · share, and the square of log Σ_e exp(logit)."""
        balance, z = Float32(0.0), Float32(0.0)
        logits = self.scored.load(line)
        if cutlass.const_expr(self.problem.balance):
            scores = self.scored.scores(logits)
            total = self.scored.sum(scores)
            scores.store(scores.load() * frequency.load())
            balance = self.scored.sum(scores) / total
        if cutlass.const_expr(self.problem.z):
            _, top, total = self.scored.exponentials(logits)
            z = top + cute.math.log2(total, fastmath=True) * LN_2
            z = z * z
        return balance, z

    @cute.kernel
    def finish(self, partial, losses, factors):  # type: ignore[no-untyped-def]
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(len(self.names)):
            row = 0 if cutlass.const_expr(self.names[i] == "balance") else 1
            total = Float32(0.0)
            for first in cutlass.range_constexpr(0, self.config.parts, 32):
                total += partial[row, first + lane]
            total = warp_sum(total)
            if lane == 0:
                losses[i][0] += factors[i] * total
