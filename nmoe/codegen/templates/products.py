"""C[m, n] = Σ_k A[m, k] · B[n, k] by tensor cores, of BF16 or FP32 operands in any layout, as accurate as in FP32: the
router's products.

    an FP32 value is the sum of BF16 parts, each the rest rounded: 8 of its 24 bits

    thread block: a tile of 128 × 64 or 64 × 128, 8 warps with 32 × 32 each (mma.sync m16n8k16)

    slice s + 1:  global ─▶ registers ─────────────────────────────▶ BF16 parts in stage (s + 1) % 2
    slice s:      stage s % 2 ─▶ ldmatrix ─▶ products of parts ─▶ + sums  │
    ────────────────────────────────────────────────────────────────── barrier ──▶ next slice
    end:          sums ─▶ shared memory ─▶ whole rows of the tile, + addends ─▶ C

Tensor cores truncate where FP32 rounds: with three parts their chain of additions is a slice long, and slices are added
in FP32.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import warp
from cutlass.memory import SmemAllocator

from nmoe.codegen.routing import PRODUCT_DEPTH as DEPTH
from nmoe.codegen.routing import PRODUCT_SHARED
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.fixed import Fixed

WARPS = 8
THREADS = 32 * WARPS
STEP = 16  # depth of a product
PIECE = 4  # results that a thread stores at once


class Operand(Fixed):
    """`source` [extent, k], of which either is contiguous and then a multiple of a piece, and its slices in shared
    memory: `stages` [size, DEPTH, parts of either stage]."""

    def __init__(self, source: cute.Tensor, stages: cute.Tensor, tile: Int32, across: bool) -> None:
        self.source, self.stages, self.across = source, stages, across
        self.size, self.parts = cute.size(stages, mode=[0]), cute.size(stages, mode=[2]) // 2
        self.width = 128 // source.element_type.width
        self.first = tile * self.size
        self.count = self.size * DEPTH // self.width // THREADS
        self.next = cute.make_rmem_tensor((self.width, self.count), source.element_type)

    def _place(self, i: int) -> tuple[Int32, Int32]:
        """Row and depth, within the tile and slice, of this thread's piece i; neighbours' are contiguous in memory."""
        piece = cute.arch.thread_idx()[0] + i * THREADS
        per = (self.size if self.across else DEPTH) // self.width
        along, other = piece % per * self.width, piece // per
        return (along, other) if self.across else (other, along)

    @cute.jit
    def load(self, k: Int32, end: Int32) -> None:
        """The slice at depth k, of a depth that ends at `end`, into registers; zeros outside."""
        for i in cutlass.range_constexpr(self.count):
            row, depth = self._place(i)
            row += self.first
            depth += k
            piece = self.next[None, i]
            piece.fill(0.0)
            if row < self.source.shape[0] and depth < end:
                if cutlass.const_expr(self.across):
                    line = cute.zipped_divide(self.source[None, depth], (self.width,))
                    cute.autovec_copy(line[None, row // self.width], piece)
                else:
                    line = cute.zipped_divide(self.source[row, None], (self.width,))
                    cute.autovec_copy(line[None, depth // self.width], piece)

    @cute.jit
    def store(self, stage: Int32) -> None:
        for i in cutlass.range_constexpr(self.count):
            row, depth = self._place(i)
            rest = self.next[None, i]
            for part in cutlass.range_constexpr(self.parts):
                piece = cute.make_rmem_tensor((self.width,), BFloat16)
                piece.store(rest.load().to(BFloat16))
                if cutlass.const_expr(part + 1 < self.parts):
                    rest.store(rest.load() - piece.load().to(Float32))
                tile = (self.width, 1) if cutlass.const_expr(self.across) else (1, self.width)
                slice_ = self.stages[None, None, stage * self.parts + part]
                target = cute.local_tile(slice_, tile, (row // tile[0], depth // tile[1]))
                cute.autovec_copy(piece, cute.make_tensor(target.iterator, cute.make_layout((self.width,))))


class Fragments(Fixed):
    """A warp's part of an operand's slices, a step in registers at a time."""

    def __init__(self, operand: Operand, copy, shape) -> None:  # type: ignore[no-untyped-def]
        self.copy, self.parts = copy, operand.parts
        self.source = copy.get_slice(cute.arch.thread_idx()[0]).partition_S(operand.stages)
        self.held = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(operand.parts)]

    @cute.jit
    def load(self, step: Int32, stage: Int32) -> None:
        for part in cutlass.range_constexpr(self.parts):
            source = self.source[None, None, step, stage * self.parts + part]
            cute.copy(self.copy, source, self.copy.retile(self.held[part])[None, None, 0])


class Products(Fixed):
    """`a_across`, `b_across`: is m, n contiguous in memory, not k; n is in C. Each FP32 operand has `parts`;
    products of parts are left out where they are below what the next part would add. `splits` parts of the depth
    give C a third mode, one result each."""

    def __init__(
        self, tile: tuple[int, int], a_across: bool, b_across: bool, parts: int, splits: int = 1
    ) -> None:
        self.rows, self.columns = tile
        self.a_across, self.b_across, self.parts, self.splits = a_across, b_across, parts, splits
        self.pieces = self.rows * self.columns // PIECE // THREADS

    @cute.jit
    def launch(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream, addends=()) -> None:  # type: ignore[no-untyped-def]
        """`addends` [m, n], in BF16 like C, are added to it one by one."""
        grid = [cute.ceil_div(c.shape[1], self.columns), cute.ceil_div(c.shape[0], self.rows), self.splits]
        self.multiply(a, b, c, addends).launch(
            grid=grid, block=[THREADS, 1, 1], min_blocks_per_mp=2,
            preferred_smem_carveout=100, stream=stream,
        )  # fmt: skip

    @cute.kernel
    def multiply(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, addends):  # type: ignore[no-untyped-def]
        tile_n, tile_m, split = cute.arch.block_idx()
        memory = SmemAllocator().allocate(PRODUCT_SHARED, 1024)
        stages_a = self._stages(memory, a, self.rows, self.a_across)
        start_b = memory + cute.size(stages_a) * BFloat16.width // 8
        stages_b = self._stages(start_b, b, self.columns, self.b_across)
        load_a = Operand(a, stages_a, tile_m, self.a_across)
        load_b = Operand(b, stages_b, tile_n, self.b_across)

        warps = (self.rows // 32, self.columns // 32, 1)
        product = warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, STEP))
        mma = cute.make_tiled_mma(product, warps, permutation_mnk=(16 * warps[0], 16 * warps[1], STEP))
        shape = mma.partition_shape_C((self.rows, self.columns))
        sums = cute.make_rmem_tensor(shape, Float32)
        sums.fill(0.0)
        ldmatrix = [
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(across, 4), BFloat16)
            for across in (self.a_across, self.b_across)
        ]
        mine_a = Fragments(
            load_a,
            cute.make_tiled_copy_A(ldmatrix[0], mma),
            mma.partition_shape_A((self.rows, STEP)),
        )
        mine_b = Fragments(
            load_b,
            cute.make_tiled_copy_B(ldmatrix[1], mma),
            mma.partition_shape_B((self.columns, STEP)),
        )
        depth = a.shape[1]
        share = cute.ceil_div(depth, DEPTH * self.splits) * DEPTH
        begin = split * share
        end = cutlass.min(begin + share, depth)
        load_a.load(begin, end)
        load_b.load(begin, end)
        load_a.store(Int32(0))
        load_b.store(Int32(0))
        cute.arch.sync_threads()
        stage = Int32(0)
        for k in cutlass.range(begin, end, DEPTH, unroll=1):
            load_a.load(k + DEPTH, end)
            load_b.load(k + DEPTH, end)
            self._add(mma, sums, mine_a, mine_b, stage)
            stage ^= 1
            load_a.store(stage)
            load_b.store(stage)
            cute.arch.sync_threads()

        layout = cute.make_layout((self.rows, self.columns), stride=(self.columns + 8, 1))
        tile = cute.make_tensor(cute.recast_ptr(memory, dtype=Float32), layout)
        cute.autovec_copy(sums, mma.get_slice(cute.arch.thread_idx()[0]).partition_C(tile))
        added = []  # all of them under way at once, when the sums have left their registers
        for addend in addends:
            held = cute.make_rmem_tensor((PIECE, self.pieces), BFloat16)
            for i in cutlass.range_constexpr(self.pieces):
                m, n = self._place(i)
                m += tile_m * self.rows
                n += tile_n * self.columns
                if m < c.shape[0] and n < c.shape[1]:
                    line = cute.zipped_divide(addend[m, None], (PIECE,))
                    cute.autovec_copy(line[None, n // PIECE], held[None, i])
            added.append(held)
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(self.pieces):
            row, column = self._place(i)
            m, n = tile_m * self.rows + row, tile_n * self.columns + column
            found = cute.make_rmem_tensor((PIECE,), Float32)
            cute.autovec_copy(cute.zipped_divide(tile[row, None], (PIECE,))[None, column // PIECE], found)
            piece = cute.make_rmem_tensor((PIECE,), c.element_type)
            piece.store(found.load().to(c.element_type))
            for held in added:
                piece.store((piece.load().to(Float32) + held[None, i].load().to(Float32)).to(c.element_type))
            if m < c.shape[0] and n < c.shape[1]:
                line = cute.zipped_divide(c[m, None, split], (PIECE,))
                cute.autovec_copy(piece, line[None, n // PIECE])

    def _stages(self, start, source: cute.Tensor, size: int, across: bool) -> cute.Tensor:  # type: ignore[no-untyped-def]
        parts = 1 if source.element_type is BFloat16 else self.parts
        layout = layouts.operand(BFloat16, across, size, DEPTH, 2 * parts)
        return cute.make_tensor(cute.recast_ptr(start, layout.inner, BFloat16), layout.outer)

    def _place(self, i: int) -> tuple[Int32, Int32]:
        """Row and column, within the tile, of the results that this thread stores in round i."""
        piece = cute.arch.thread_idx()[0] + i * THREADS
        per = self.columns // PIECE
        return piece // per, piece % per * PIECE

    @cute.jit
    def _add(self, mma, sums, a, b, stage) -> None:  # type: ignore[no-untyped-def]
        """A slice's products, the smallest parts' first. Two parts are not worth registers for a sum by itself."""
        found = sums
        if cutlass.const_expr(self.parts > 2):
            found = cute.make_rmem_tensor_like(sums)
            found.fill(0.0)
        for step in cutlass.range(DEPTH // STEP, unroll=1):
            a.load(step, stage)
            b.load(step, stage)
            for order in cutlass.range_constexpr(self.parts - 1, -1, -1):
                for i in cutlass.range_constexpr(a.parts):
                    j = order - i
                    if cutlass.const_expr(0 <= j < b.parts):
                        cute.gemm(mma, found, a.held[i][None, None, 0], b.held[j][None, None, 0], found)
        if cutlass.const_expr(self.parts > 2):
            sums.store(sums.load() + found.load())
