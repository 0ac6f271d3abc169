"""What router and router_bwd share: a token's scores from its logits, held by a warp, and the choices of a sequence.

Lane l holds experts l, l + 32, …; where there is none, the logit is −∞ and the score 0.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import RoutingConfig, ScoredProblem
from nmoe.codegen.templates.activation import LOG2_E, sigmoid
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import flat

LN_2 = 0.6931471805599453
EPSILON = 1e-20  # ops/moe.py's


@cute.jit
def warp_sum(x: Float32) -> Float32:
    """Over the lanes, in a fixed order, in all of them."""
    for step in cutlass.range_constexpr(5):
        x += cute.arch.shuffle_sync_bfly(x, 16 >> step)
    return x


@cute.jit
def warp_max(x: Float32) -> Float32:
    for step in cutlass.range_constexpr(5):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 16 >> step))
    return x


class Scores(Fixed):
    def __init__(self, problem: ScoredProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.experts, self.threads = problem.experts, 32 * config.warps
        self.held = -(-problem.experts // 32)

    @cute.jit
    def load(self, line: cute.Tensor) -> cute.Tensor:
        """This lane's values of a row of `experts`; −∞ past its end."""
        found = cute.make_rmem_tensor((self.held,), Float32)
        for i in cutlass.range_constexpr(self.held):
            expert = 32 * i + cute.arch.lane_idx()
            found[i] = Float32(-float("inf"))
            if expert < self.experts:
                found[i] = line[expert]
        return found

    @cute.jit
    def exponentials(self, logits: cute.Tensor):  # type: ignore[no-untyped-def]
        """(exp(logit − top), the largest logit, the exponentials' sum); softmax is the quotient, and the logarithm of
        Σ exp(logit) is top + log(sum)."""
        top = logits[0]
        for i in cutlass.range_constexpr(1, self.held):
            top = cute.arch.fmax(top, logits[i])
        top = warp_max(top)
        found, total = cute.make_rmem_tensor((self.held,), Float32), Float32(0.0)
        for i in cutlass.range_constexpr(self.held):
            found[i] = cute.math.exp2((logits[i] - top) * LOG2_E, fastmath=True)
            total += found[i]
        return found, top, warp_sum(total)

    @cute.jit
    def scores(self, logits: cute.Tensor) -> cute.Tensor:
        if cutlass.const_expr(self.problem.score == "sigmoid"):
            found = cute.make_rmem_tensor((self.held,), Float32)
            for i in cutlass.range_constexpr(self.held):
                found[i] = sigmoid(logits[i])
        else:
            found, _, total = self.exponentials(logits)
            for i in cutlass.range_constexpr(self.held):
                found[i] = found[i] / total
        return found

    @cute.jit
    def sum(self, values: cute.Tensor) -> Float32:
        """Over a token's experts."""
        total = values[0]
        for i in cutlass.range_constexpr(1, self.held):
            total += values[i]
        return warp_sum(total)

    @cute.jit
    def part(self, tokens: Int32):  # type: ignore[no-untyped-def]
        """The tokens [begin, end) of this thread block, one of `config.parts`."""
        block, parts = cute.arch.block_idx()[0], self.config.parts
        share = cute.ceil_div(tokens, parts)
        begin = cutlass.min(block * share, tokens)
        return begin, cutlass.min(begin + share, tokens)

    @cute.jit
    def stop(self, token: Int32, end: Int32, seq_len: Int32 | None) -> Int32:
        """Where the tokens end that share a sequence with `token`, at most at `end`."""
        if cutlass.const_expr(self.problem.balance):
            end = cutlass.min(end, (token // seq_len + 1) * seq_len)
        return end

    @cute.jit
    def launch_tally(self, indices: cute.Tensor, tallies: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
        self.tally(indices, tallies).launch(
            grid=[self.config.parts, 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def tally(self, indices: cute.Tensor, tallies: cute.Tensor):  # type: ignore[no-untyped-def]
        """How often each part of the tokens chose each expert: [parts, experts]."""
        often = SmemAllocator().allocate_tensor(Int32, cute.make_layout(self.experts))
        self._clear(often)
        begin, end = self.part(indices.shape[0])
        self._count(indices, begin, end, often)
        cute.arch.sync_threads()
        for expert in cutlass.range(cute.arch.thread_idx()[0], self.experts, self.threads, unroll=1):
            tallies[cute.arch.block_idx()[0], expert] = often[expert]

    @cute.jit
    def _clear(self, often: cute.Tensor) -> None:
        cute.arch.sync_threads()
        for expert in cutlass.range(cute.arch.thread_idx()[0], self.experts, self.threads, unroll=1):
            often[expert] = 0
        cute.arch.sync_threads()

    @cute.jit
    def _count(self, indices: cute.Tensor, begin: Int32, end: Int32, often: cute.Tensor) -> None:
        """Adds the choices of tokens [begin, end), by the whole thread block."""
        choices, topk = flat(indices), self.problem.topk
        first = begin * topk + cute.arch.thread_idx()[0]
        for i in cutlass.range(first, end * topk, self.threads, unroll=4):
            cute.arch.atomic_add(often.iterator + choices[i], Int32(1), scope="cta")

    @cute.jit
    def frequency(
        self, indices: cute.Tensor, tallies: cute.Tensor, token: Int32, seq_len: Int32, often: cute.Tensor
    ) -> cute.Tensor:
        """How often the token's sequence chose each expert of this lane: in `often` [experts] of shared memory, from
        the tallies of the parts that are within the sequence and the choices before and after them."""
        self._clear(often)
        share = cute.ceil_div(indices.shape[0], self.config.parts)
        begin = token // seq_len * seq_len
        end = begin + seq_len
        first, last = cute.ceil_div(begin, share), end // share
        if last <= first:  # no whole part
            self._count(indices, begin, end, often)
        else:
            self._count(indices, begin, first * share, often)
            self._count(indices, last * share, end, often)
            counted = flat(tallies)
            for i in cutlass.range(
                first * self.experts + cute.arch.thread_idx()[0], last * self.experts, self.threads, unroll=4
            ):
                cute.arch.atomic_add(often.iterator + i % self.experts, counted[i], scope="cta")
        cute.arch.sync_threads()
        found = cute.make_rmem_tensor((self.held,), Float32)
        for i in cutlass.range_constexpr(self.held):
            expert = 32 * i + cute.arch.lane_idx()
            found[i] = Float32(0.0)
            if expert < self.experts:
                found[i] = Float32(often[expert])
        return found
