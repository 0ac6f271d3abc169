"""C[m, n] = Σ_k A[m, k] · B[n, k] in FP32 multiply-adds, of BF16 or FP32 operands in any layout: the router's products,
whose accuracy no tensor core format has.

    thread block: a tile of 128 × 64, 128 threads with 8 × 8 results each

    slice s + 1:  global ─▶ registers ─────────────────────▶ FP32 in stage (s + 1) % 2
    slice s:      stage s % 2 ─▶ registers ─▶ multiply-adds      │
    ─────────────────────────────────────────────────────── barrier ──▶ next slice

A stage holds a slice with m (or n) contiguous, so that a thread reads its 8 values of a column in two 16-byte pieces,
64 (32) apart: neighbours read neighbouring pieces.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import PRODUCT_COLUMNS as COLUMNS
from nmoe.codegen.routing import PRODUCT_DEPTH as DEPTH
from nmoe.codegen.routing import PRODUCT_ROWS as ROWS
from nmoe.codegen.templates.fixed import Fixed

THREADS = 128
EACH = 8  # results of a thread along either side


class Loader(Fixed):
    """One operand's slices: `source` [extent, k], of which either is contiguous and then a multiple of a piece."""

    def __init__(self, source: cute.Tensor, stages: cute.Tensor, tile: Int32, across: bool) -> None:
        self.source, self.stages, self.across = source, stages, across
        self.size = cute.size(stages, mode=[0])
        self.width = 128 // source.element_type.width
        self.first = tile * self.size
        self.count = self.size * DEPTH // self.width // THREADS

    def _place(self, i: int) -> tuple[Int32, Int32]:
        """Row and depth, within the tile and slice, of this thread's piece i. Neighbours have neighbouring rows, for
        the sake of shared memory."""
        piece = cute.arch.thread_idx()[0] + i * THREADS
        if self.across:
            per = self.size // self.width
            return piece % per * self.width, piece // per
        return piece % self.size, piece // self.size * self.width

    @cute.jit
    def load(self, values: cute.Tensor, k: Int32, end: Int32) -> None:
        """The slice at depth k, of a depth that ends at `end`, into registers [width, count]; zeros outside."""
        for i in cutlass.range_constexpr(self.count):
            row, depth = self._place(i)
            row += self.first
            depth += k
            piece = values[None, i]
            piece.fill(0.0)
            if row < self.source.shape[0] and depth < end:
                if cutlass.const_expr(self.across):
                    line = cute.zipped_divide(self.source[None, depth], (self.width,))
                    cute.autovec_copy(line[None, row // self.width], piece)
                else:
                    line = cute.zipped_divide(self.source[row, None], (self.width,))
                    cute.autovec_copy(line[None, depth // self.width], piece)

    @cute.jit
    def store(self, values: cute.Tensor, stage: Int32) -> None:
        for i in cutlass.range_constexpr(self.count):
            row, depth = self._place(i)
            wide = cute.make_rmem_tensor((self.width,), Float32)
            wide.store(values[None, i].load().to(Float32))
            if cutlass.const_expr(self.across):
                line = cute.zipped_divide(self.stages[None, depth, stage], (self.width,))
                cute.autovec_copy(wide, line[None, row // self.width])
            else:
                for j in cutlass.range_constexpr(self.width):
                    self.stages[row, depth + j, stage] = wide[j]


class Products(Fixed):
    """`a_across`, `b_across`: is m, n contiguous in memory, not k; `c_across`: is m contiguous in C, not n. `splits`
    parts of the depth give C a third mode, one result each."""

    def __init__(self, a_across: bool, b_across: bool, c_across: bool, splits: int = 1) -> None:
        self.a_across, self.b_across, self.c_across, self.splits = a_across, b_across, c_across, splits

    @cute.jit
    def launch(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
        grid = [cute.ceil_div(c.shape[0], ROWS), cute.ceil_div(c.shape[1], COLUMNS), self.splits]
        self.multiply(a, b, c).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def multiply(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):  # type: ignore[no-untyped-def]
        thread, (tile_m, tile_n, split) = cute.arch.thread_idx()[0], cute.arch.block_idx()
        smem = SmemAllocator()
        stages_a = smem.allocate_tensor(Float32, cute.make_layout((ROWS, DEPTH, 2)), 16)
        stages_b = smem.allocate_tensor(Float32, cute.make_layout((COLUMNS, DEPTH, 2)), 16)
        load_a = Loader(a, stages_a, tile_m, self.a_across)
        load_b = Loader(b, stages_b, tile_n, self.b_across)
        next_a = cute.make_rmem_tensor((load_a.width, load_a.count), a.element_type)
        next_b = cute.make_rmem_tensor((load_b.width, load_b.count), b.element_type)
        depth = a.shape[1]
        share = cute.ceil_div(depth, DEPTH * self.splits) * DEPTH
        begin = split * share
        end = cutlass.min(begin + share, depth)

        sums = cute.make_rmem_tensor((EACH, EACH), Float32)
        sums.fill(0.0)
        load_a.load(next_a, begin, end)
        load_b.load(next_b, begin, end)
        load_a.store(next_a, Int32(0))
        load_b.store(next_b, Int32(0))
        cute.arch.sync_threads()
        stage = Int32(0)
        for k in cutlass.range(begin, end, DEPTH, unroll=1):
            load_a.load(next_a, k + DEPTH, end)
            load_b.load(next_b, k + DEPTH, end)
            self._add(sums, stages_a, stages_b, stage, thread)
            stage ^= 1
            load_a.store(next_a, stage)
            load_b.store(next_b, stage)
            cute.arch.sync_threads()
        self._store(sums, c, tile_m, tile_n, split, thread)

    @cute.jit
    def _add(self, sums, stages_a, stages_b, stage, thread) -> None:  # type: ignore[no-untyped-def]
        mine_a, mine_b = cute.make_rmem_tensor((4, 2), Float32), cute.make_rmem_tensor((4, 2), Float32)
        # All at once would take more registers than 4 blocks an SM have.
        for k in cutlass.range(DEPTH, unroll=DEPTH // 2):
            column_a = cute.zipped_divide(stages_a[None, k, stage], (4,))
            column_b = cute.zipped_divide(stages_b[None, k, stage], (4,))
            for half in cutlass.range_constexpr(2):
                cute.autovec_copy(column_a[None, thread // 8 + half * ROWS // 8], mine_a[None, half])
                cute.autovec_copy(column_b[None, thread % 8 + half * COLUMNS // 8], mine_b[None, half])
            for i in cutlass.range_constexpr(EACH):
                for j in cutlass.range_constexpr(EACH):
                    sums[i, j] = cute.math.fma(mine_a[i], mine_b[j], sums[i, j])

    @cute.jit
    def _store(self, sums, c, tile_m, tile_n, split, thread) -> None:  # type: ignore[no-untyped-def]
        """16 pieces of 4, along whichever side is contiguous; extents along it are multiples of 4."""
        for i in cutlass.range_constexpr(2 if self.c_across else EACH):
            for j in cutlass.range_constexpr(EACH if self.c_across else 2):
                step_m, step_n = (4 * i, j) if cutlass.const_expr(self.c_across) else (i, 4 * j)
                m = tile_m * ROWS + thread // 8 * 4 + step_m % 4 + step_m // 4 * (ROWS // 2)
                n = tile_n * COLUMNS + thread % 8 * 4 + step_n % 4 + step_n // 4 * (COLUMNS // 2)
                piece = cute.make_rmem_tensor((4,), c.element_type)
                for e in cutlass.range_constexpr(4):
                    at = (step_m + e, step_n) if cutlass.const_expr(self.c_across) else (step_m, step_n + e)
                    piece[e] = sums[at].to(c.element_type)
                if m < c.shape[0] and n < c.shape[1]:
                    if cutlass.const_expr(self.c_across):
                        line = cute.zipped_divide(c[None, n, split], (4,))
                        cute.autovec_copy(piece, line[None, m // 4])
                    else:
                        line = cute.zipped_divide(c[m, None, split], (4,))
                        cute.autovec_copy(piece, line[None, n // 4])
