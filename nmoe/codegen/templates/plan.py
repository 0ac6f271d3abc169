"""Which row each choice gets: a stable counting sort of T · topk choices by expert, without atomics.

    count   part p of the choices ─▶ how many of each expert ─▶ counts[e, p]
    place   counts ─▶ rows before part p of each expert; segments' starts ─▶ choices of part p take the next rows

A thread block has a part, a warp a contiguous share of it, in which it walks 32 choices at a time: lanes with the same
expert find each other by match.any, take the rows in lane order, and the first moves the warp's own counter of that
expert on. Every block of `place` sums up all counts by itself, which costs less than another launch.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import PlanProblem, RoutingConfig
from nmoe.codegen.templates.fixed import Fixed


class Plan(Fixed):
    def __init__(self, problem: PlanProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.experts, self.threads = problem.experts, 32 * config.warps

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of PlanProblem.operands, the number of clusters (unused: there are
        `config.parts` thread blocks), the stream."""
        indices, slots, row_source, offsets, load, counts, _, stream = args
        launch = {"grid": [self.config.parts, 1, 1], "block": [self.threads, 1, 1], "stream": stream}
        choices = cute.make_layout(cute.size(indices))
        indices, slots = (cute.make_tensor(t.iterator, choices) for t in (indices, slots))
        self.count(indices, counts).launch(**launch)
        self.place(indices, slots, row_source, offsets, load, counts).launch(**launch)

    @cute.kernel
    def count(self, indices, counts):  # type: ignore[no-untyped-def]
        smem = SmemAllocator()
        held = smem.allocate_tensor(Int32, cute.make_layout((self.config.warps, self.experts)))
        self._walk(indices, held, Int32(0), None, None)
        cute.arch.sync_threads()
        for expert in cutlass.range(cute.arch.thread_idx()[0], self.experts, self.threads, unroll=1):
            total = Int32(0)
            for warp in cutlass.range_constexpr(self.config.warps):
                total += held[warp, expert]
            counts[expert, cute.arch.block_idx()[0]] = total

    @cute.kernel
    def place(self, indices, slots, row_source, offsets, load, counts):  # type: ignore[no-untyped-def]
        smem = SmemAllocator()
        held = smem.allocate_tensor(Int32, cute.make_layout((self.config.warps, self.experts)))
        before = smem.allocate_tensor(Int32, cute.make_layout(self.experts))
        total = smem.allocate_tensor(Int32, cute.make_layout(self.experts))
        start = smem.allocate_tensor(Int32, cute.make_layout(self.experts + 1))
        self._walk(indices, held, Int32(0), None, None)
        self._sum(counts, before, total)
        cute.arch.sync_threads()
        self._starts(total, start)
        cute.arch.sync_threads()
        limit = row_source.shape[0] // self.problem.align * self.problem.align
        self._fill(row_source, offsets, load, total, start, limit)
        for expert in cutlass.range(cute.arch.thread_idx()[0], self.experts, self.threads, unroll=1):
            row = start[expert] + before[expert]
            for warp in cutlass.range_constexpr(self.config.warps):
                mine = held[warp, expert]
                held[warp, expert] = row
                row += mine
        cute.arch.sync_threads()
        self._walk(indices, held, limit, slots, row_source)

    @cute.jit
    def _walk(self, indices, held, limit, slots, row_source) -> None:  # type: ignore[no-untyped-def]
        """Moves held[warp, expert] on by the choices of this warp: from 0 to count them, or, with `slots`, from the
        expert's next row to give them rows."""
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        count = cute.size(indices)
        share = cute.ceil_div(count, 32 * self.config.warps * self.config.parts) * 32
        begin = (cute.arch.block_idx()[0] * self.config.warps + warp) * share
        if cutlass.const_expr(slots is None):
            for expert in cutlass.range(lane, self.experts, 32, unroll=1):
                held[warp, expert] = 0
            cute.arch.sync_warp()
        for at in cutlass.range(begin + lane, cutlass.min(begin + share, count) + lane, 32, unroll=1):
            live = at < count
            expert = Int32(self.experts)
            if live:
                expert = indices[at]
            same = cute.arch.match_sync(0xFFFF_FFFF, expert)
            rank = Int32(cute.arch.popc(same & cute.arch.lanemask_lt()))
            row = rank
            if live:
                row += held[warp, expert]
            cute.arch.sync_warp()
            if live and rank == 0:
                held[warp, expert] = row + Int32(cute.arch.popc(same))
            cute.arch.sync_warp()
            if cutlass.const_expr(slots is not None):
                if live:
                    fits = row < limit
                    slots[at] = row if fits else Int32(-1)
                    if fits:
                        row_source[row] = at

    @cute.jit
    def _sum(self, counts, before, total) -> None:  # type: ignore[no-untyped-def]
        """Of each expert's choices, those in earlier parts and all; a warp an expert."""
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        for expert in cutlass.range(warp, self.experts, self.config.warps, unroll=1):
            every, earlier = Int32(0), Int32(0)
            for first in cutlass.range_constexpr(0, self.config.parts, 32):
                found = counts[expert, first + lane]
                every += found
                if first + lane < cute.arch.block_idx()[0]:
                    earlier += found
            every = cute.arch.warp_redux_sync(every, "add")
            earlier = cute.arch.warp_redux_sync(earlier, "add")
            if lane == 0:
                before[expert], total[expert] = earlier, every

    @cute.jit
    def _starts(self, total, start) -> None:  # type: ignore[no-untyped-def]
        """The first row of each expert, and of none: sums of padded counts, by the first warp."""
        lane, align = cute.arch.lane_idx(), self.problem.align
        if cute.arch.warp_idx() == 0:
            past = Int32(0)
            for first in cutlass.range_constexpr(0, self.experts, 32):
                padded = Int32(0)
                if first + lane < self.experts:
                    padded = cute.ceil_div(total[first + lane], align) * align
                end = padded
                for step in cutlass.range_constexpr(5):
                    other = cute.arch.shuffle_sync_up(end, 1 << step, mask_and_clamp=0)
                    if lane >= 1 << step:
                        end += other
                if first + lane < self.experts:
                    start[first + lane] = past + end - padded
                past += cute.arch.shuffle_sync(end, 31)
            if lane == 0:
                start[self.experts] = past

    @cute.jit
    def _fill(self, row_source, offsets, load, total, start, limit) -> None:  # type: ignore[no-untyped-def]
        """Padding rows and those past the last expert, in shares; the offsets and loads, by the first block."""
        thread, block = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        overflow = start[self.experts] > limit
        for expert in cutlass.range(block, self.experts, self.config.parts, unroll=1):
            end = cutlass.min(start[expert + 1], limit)
            for row in cutlass.range(start[expert] + total[expert] + thread, end, self.threads, unroll=1):
                row_source[row] = -1
        past = cutlass.min(start[self.experts], limit) + block * self.threads + thread
        for row in cutlass.range(past, row_source.shape[0], self.threads * self.config.parts, unroll=1):
            row_source[row] = -1
        if block == 0:
            for expert in cutlass.range(thread, self.experts + 1, self.threads, unroll=1):
                offsets[expert] = cutlass.min(start[expert], limit)
            for expert in cutlass.range(thread, self.experts, self.threads, unroll=1):
                more = Float32(float("nan")) if overflow else Float32(total[expert])
                load[expert] += more
