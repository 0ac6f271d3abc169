"""Cross-entropy: a thread block reads a row of logits once, and writes their gradient in their place.

    pass 1   global ─▶ registers ─▶ running maximum and Σ exp(x − maximum), of each thread
                          └─▶ shared memory: as many portions of the row as there is room for
    threads ─▶ lanes ─▶ warps      in a fixed order: log Σ exp
    pass 2   shared memory; what had no room from global memory, which is an L2 hit since one row a multiprocessor is in
             work ─▶ scale · weight · (softmax − onehot) ─▶ global

A thread's part of the row is its own in both passes, so that between them only the sum is exchanged, and the target's
logit is read before any thread has passed that barrier. A second kernel adds the rows' losses: one block, one order.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.loss import IN_FLIGHT, CrossEntropyProblem, LossConfig
from nmoe.codegen.problem import VECTOR
from nmoe.codegen.templates.activation import LOG2_E
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.scores import LN_2, warp_sum

LOWEST = -1e30  # a running maximum's start: not −∞, whose difference from itself is NaN
SUMMING = 1024  # threads that add the rows' losses


@cute.jit
def joined(top: Float32, total: Float32, other_top: Float32, other_total: Float32):  # type: ignore[no-untyped-def]
    """Maximum and Σ exp(x − maximum) of two sets; the same bits in either order."""
    higher = cute.arch.fmax(top, other_top)
    a = total * cute.math.exp2((top - higher) * LOG2_E, fastmath=True)
    b = other_total * cute.math.exp2((other_top - higher) * LOG2_E, fastmath=True)
    return higher, a + b


@cute.jit
def over_lanes(top: Float32, total: Float32, lanes: cutlass.Constexpr):  # type: ignore[no-untyped-def]
    distance = lanes // 2
    while cutlass.const_expr(distance > 0):
        other = cute.arch.shuffle_sync_bfly(top, distance), cute.arch.shuffle_sync_bfly(total, distance)
        top, total = joined(top, total, *other)
        distance //= 2
    return top, total


class CrossEntropy(Fixed):
    def __init__(self, problem: CrossEntropyProblem, config: LossConfig) -> None:
        self.problem, self.config = problem, config
        self.portions = -(-problem.vocabulary // config.columns)
        self.warps = config.threads // 32

    @cute.jit
    def __call__(self, logits, targets, scale, loss, dlogits, row_loss, weight, clusters, stream):  # type: ignore[no-untyped-def]
        rows = cute.size(targets)
        self.rows(logits, targets, scale, dlogits, row_loss, weight).launch(
            grid=[rows, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )
        self.add(row_loss, scale, loss).launch(grid=[1, 1, 1], block=[SUMMING, 1, 1], stream=stream)

    @cute.kernel
    def rows(self, logits, targets, scale, dlogits, row_loss, weight):  # type: ignore[no-untyped-def]
        row = cute.arch.block_idx()[0]
        smem = SmemAllocator()
        layout = cute.make_layout((VECTOR, self.config.threads, self.config.held * IN_FLIGHT))
        held = smem.allocate_tensor(BFloat16, layout, 16)
        partial = smem.allocate_tensor(Float32, cute.make_layout((2, self.warps)), 16)
        source = cute.zipped_divide(logits[Int64(row), None], (VECTOR,))
        sink = cute.zipped_divide(dlogits[Int64(row), None], (VECTOR,))
        target = targets[row]
        chosen = logits[Int64(row), cutlass.max(target, 0)].to(Float32)
        top, total = Float32(LOWEST), Float32(0.0)
        for portion in cutlass.range(self.config.held, unroll=1):
            pieces = self.load(source, portion)
            self.keep(held, portion, pieces)
            top, total = self.account(pieces, top, total)
        for portion in cutlass.range(self.config.held, self.portions, unroll=1):
            top, total = self.account(self.load(source, portion), top, total)
        log_sum = self.log_sum(top, total, partial)
        factor = scale[0] * weight
        if target < 0:
            factor = Float32(0.0)
        if cute.arch.thread_idx()[0] == 0:
            row_loss[row] = log_sum * LN_2 - chosen if target >= 0 else Float32(0.0)
        for portion in cutlass.range(self.config.held, unroll=1):
            self.finish(self.kept(held, portion), portion, sink, log_sum, factor, target)
        for portion in cutlass.range(self.config.held, self.portions, unroll=1):
            self.finish(self.load(source, portion), portion, sink, log_sum, factor, target)

    def vector(self, portion: Int32, i: int) -> Int32:
        """The number in its row of this thread's i-th vector of a portion."""
        return (portion * IN_FLIGHT + i) * self.config.threads + cute.arch.thread_idx()[0]

    @cute.jit
    def load(self, source: cute.Tensor, portion: Int32) -> list[cute.Tensor]:
        """This thread's vectors of a portion, −∞ past the row's end."""
        found = []
        for i in cutlass.range_constexpr(IN_FLIGHT):
            piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
            at = self.vector(portion, i)
            if at < cute.size(source, mode=[1]):
                cute.autovec_copy(source[None, at], piece)
            else:
                piece.fill(-float("inf"))
            found.append(piece)
        return found

    @cute.jit
    def keep(self, held: cute.Tensor, portion: Int32, pieces: list[cute.Tensor]) -> None:
        for i in cutlass.range_constexpr(IN_FLIGHT):
            cute.autovec_copy(pieces[i], held[None, cute.arch.thread_idx()[0], portion * IN_FLIGHT + i])

    @cute.jit
    def kept(self, held: cute.Tensor, portion: Int32) -> list[cute.Tensor]:
        found = []
        for i in cutlass.range_constexpr(IN_FLIGHT):
            piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
            cute.autovec_copy(held[None, cute.arch.thread_idx()[0], portion * IN_FLIGHT + i], piece)
            found.append(piece)
        return found

    @cute.jit
    def account(self, pieces: list[cute.Tensor], top: Float32, total: Float32):  # type: ignore[no-untyped-def]
        """The thread's maximum and sum with the pieces of a portion."""
        higher = top
        for i in cutlass.range_constexpr(IN_FLIGHT):
            x = pieces[i].load().to(Float32)
            for j in cutlass.range_constexpr(VECTOR):
                higher = cute.arch.fmax(higher, x[j])
        total *= cute.math.exp2((top - higher) * LOG2_E, fastmath=True)
        for i in cutlass.range_constexpr(IN_FLIGHT):
            x = pieces[i].load().to(Float32)
            for j in cutlass.range_constexpr(VECTOR):
                total += cute.math.exp2((x[j] - higher) * LOG2_E, fastmath=True)
        return higher, total

    @cute.jit
    def log_sum(self, top: Float32, total: Float32, partial: cute.Tensor) -> Float32:
        """log2 Σ exp(x) over the row, in every thread."""
        top, total = over_lanes(top, total, 32)
        warp, lane = cute.arch.thread_idx()[0] // 32, cute.arch.lane_idx()
        if lane == 0:
            partial[0, warp] = top
            partial[1, warp] = total
        cute.arch.sync_threads()
        top, total = partial[0, lane % self.warps], partial[1, lane % self.warps]
        top, total = over_lanes(top, total, self.warps)
        return top * LOG2_E + cute.math.log2(total, fastmath=True)

    @cute.jit
    def finish(self, pieces, portion: Int32, sink, log_sum: Float32, factor: Float32, target: Int32) -> None:  # type: ignore[no-untyped-def]
        """Stores the gradient of a portion."""
        for i in cutlass.range_constexpr(IN_FLIGHT):
            at = self.vector(portion, i)
            x = pieces[i].load().to(Float32)
            gradient = cute.make_rmem_tensor((VECTOR,), Float32)
            for j in cutlass.range_constexpr(VECTOR):
                p = cute.math.exp2(x[j] * LOG2_E - log_sum, fastmath=True)
                gradient[j] = factor * (p - 1.0 if at * VECTOR + j == target else p)
            result = cute.make_rmem_tensor((VECTOR,), BFloat16)
            result.store(gradient.load().to(BFloat16))
            if at < cute.size(sink, mode=[1]):
                cute.autovec_copy(result, sink[None, at])

    @cute.kernel
    def add(self, row_loss, scale, loss):  # type: ignore[no-untyped-def]
        """loss += scale · Σ row_loss: each thread its rows in their order, then lanes, then warps."""
        thread = cute.arch.thread_idx()[0]
        total = Float32(0.0)
        for row in cutlass.range(thread, cute.size(row_loss), SUMMING, unroll=1):
            total += row_loss[row]
        total = warp_sum(total)
        partial = SmemAllocator().allocate_tensor(Float32, cute.make_layout(SUMMING // 32), 16)
        if cute.arch.lane_idx() == 0:
            partial[thread // 32] = total
        cute.arch.sync_threads()
        total = warp_sum(partial[cute.arch.lane_idx()])
        if thread == 0:
            loss[0] += total * scale[0]
