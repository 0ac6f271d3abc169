"""C[m, n] = Σ_k A[m, k] · B[n, k] by tensor cores, as accurate as in FP32: the router's products.

    an FP32 operand comes as the sum of its BF16 parts (`write_parts`), each the rest rounded: 8 of its 24 bits

    thread block: tiles of 128 × 64 or 64 × 128, warps with 32 × 32 to 64 × 32 each (mma.sync m16n8k16)

    slices s + 1 ‥ s + STAGES − 1:  global ── cp.async ──▶ their stages
    slice s:      stage s % STAGES ─▶ ldmatrix ─▶ products of parts ─▶ + sums
    ─────────────────────────────────────────────────── wait for the next group, barrier ──▶ next slice
    a tile's end: sums ─▶ C; or, where C is BF16, ─▶ shared memory ─▶ whole rows of the tile, + addends ─▶ C

Tensor cores truncate where FP32 rounds: with three parts their chain of additions is a slice long, and slices are added
in FP32. Where B fits, it stays in shared memory, and a thread block goes down the row tiles of its columns: slices of
the next are under way, and its addends in registers, before a tile ends.
"""

from __future__ import annotations

import math

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.memory import SmemAllocator

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.routing import PRODUCT_DEPTH as DEPTH
from nmoe.codegen.routing import PRODUCT_STAGES as STAGES
from nmoe.codegen.routing import Product
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.fixed import Fixed

STEP = 16  # depth of a product
PART_THREADS = 256  # threads


@cute.jit
def parts_of(values: cute.Tensor, count: cutlass.Constexpr) -> list[cute.Tensor]:
    """FP32 registers as so many parts in BF16."""
    rest, found = cute.make_rmem_tensor_like(values), []
    rest.store(values.load())
    for _ in cutlass.range_constexpr(count):
        part = cute.make_rmem_tensor(values.shape, BFloat16)
        part.store(rest.load().to(BFloat16))
        rest.store(rest.load() - part.load().to(Float32))
        found.append(part)
    return found


@cute.jit
def write_parts(source: cute.Tensor, target: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
    """source FP32 [rows, columns] → target BF16 [parts, rows, columns]; columns are a multiple of 8."""
    count = target.shape[0]
    parts = cute.make_tensor(target.iterator, cute.make_layout((cute.size(source), count)))
    blocks = cute.ceil_div(cute.size(source), VECTOR * PART_THREADS)
    parts_kernel(layouts.flat(source), parts).launch(
        grid=[blocks, 1, 1], block=[PART_THREADS, 1, 1], stream=stream
    )


@cute.kernel
def parts_kernel(source: cute.Tensor, target: cute.Tensor):  # type: ignore[no-untyped-def]
    piece = cute.arch.block_idx()[0] * PART_THREADS + cute.arch.thread_idx()[0]
    if piece < cute.size(source) // VECTOR:
        values = cute.make_rmem_tensor((VECTOR,), Float32)
        cute.autovec_copy(cute.zipped_divide(source, (VECTOR,))[None, piece], values)
        for index, part in enumerate(parts_of(values, target.shape[1])):
            cute.autovec_copy(part, cute.zipped_divide(target[None, index], (VECTOR,))[None, piece])


class Operand(Fixed):
    """`source` [parts, extent, k], of which either of the last two is contiguous and then in whole pieces of 8;
    `slots` [size, DEPTH, slots] in shared memory, one for each part of a slice."""

    def __init__(self, source: cute.Tensor, slots: cute.Tensor, across: bool, threads: int) -> None:
        self.threads = threads
        self.source, self.slots, self.across = source, slots, across
        self.parts, self.size = source.shape[0], cute.size(slots, mode=[0])
        self.atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=16 * VECTOR
        )

    @cute.jit
    def fetch(self, tile: Int32, k: Int32, end: Int32, slice_: Int32) -> None:
        """Begins to copy a tile's slice at depth k, of a depth that ends at `end`; zeros outside."""
        per = (self.size if self.across else DEPTH) // VECTOR
        for i in cutlass.range_constexpr(self.size * DEPTH // VECTOR // self.threads):
            piece = cute.arch.thread_idx()[0] + i * self.threads
            along, other = piece % per * VECTOR, piece // per
            row, depth = (along, other) if self.across else (other, along)
            m, d = tile * self.size + row, k + depth
            alive = m < self.source.shape[1] and d < end and d < self.source.shape[2]
            for part in cutlass.range_constexpr(self.parts):
                shape = (VECTOR, 1) if cutlass.const_expr(self.across) else (1, VECTOR)
                slot = self.slots[None, None, slice_ * self.parts + part]
                place = cute.local_tile(slot, shape, (row // shape[0], depth // shape[1]))
                target = cute.make_tensor(place.iterator, cute.make_layout((VECTOR,)))
                if alive:
                    cute.copy(self.atom, self._line(part, m, d), target)
                else:
                    target.fill(0.0)

    def _line(self, part: int, m: Int32, d: Int32) -> cute.Tensor:
        """8 neighbours in memory."""
        line = self.source[part, None, d] if self.across else self.source[part, m, None]
        return cute.zipped_divide(line, (VECTOR,))[None, (m if self.across else d) // VECTOR]


class Fragments(Fixed):
    """A warp's part of an operand's slices, a step in registers at a time."""

    def __init__(self, operand: Operand, copy, shape) -> None:  # type: ignore[no-untyped-def]
        self.copy, self.parts = copy, operand.parts
        self.source = copy.get_slice(cute.arch.thread_idx()[0]).partition_S(operand.slots)
        self.held = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(operand.parts)]

    @cute.jit
    def load(self, step: Int32, slice_: Int32) -> None:
        for part in cutlass.range_constexpr(self.parts):
            source = self.source[None, None, step, slice_ * self.parts + part]
            cute.copy(self.copy, source, self.copy.retile(self.held[part])[None, None, 0])


class Walk(Fixed):
    """A thread block's slices: of every `step`th row tile, the depth from `begin` to `end`."""

    def __init__(self, tiles: Int32, step: Int32, begin: Int32, end: Int32) -> None:
        self.tiles, self.step, self.begin, self.end = tiles, step, begin, end

    @cute.jit
    def after(self, tile: Int32, k: Int32):  # type: ignore[no-untyped-def]
        """The next slice's tile and depth."""
        k += DEPTH
        if k >= self.end:
            k = self.begin
            tile += self.step
        return tile, k


class Products(Fixed):
    """`a_across`, `b_across`: is m, n contiguous in memory, not k; n is in C. Products of parts are left out where they
    are below what the next part would add. `splits` parts of the depth give C a third mode, one result each; `groups`
    of row tiles go to a thread block each, else every tile."""

    def __init__(
        self, product: Product, a_across: bool, b_across: bool, splits: int = 1, groups: int = 0
    ) -> None:
        self.product, self.a_across, self.b_across = product, a_across, b_across
        self.rows, self.columns = product.tile
        self.splits, self.groups = splits, groups
        self.order, self.threads = max(product.parts), 32 * math.prod(product.warps)

    @cute.jit
    def launch(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream, addends=()) -> None:  # type: ignore[no-untyped-def]
        """`addends` [m, n], in BF16 like C, are added to it one by one."""
        tiles = cute.ceil_div(c.shape[0], self.rows)
        down = cutlass.min(tiles, self.groups) if cutlass.const_expr(self.groups > 0) else tiles
        self.multiply(a, b, c, addends).launch(
            grid=[cute.ceil_div(c.shape[1], self.columns), down, self.splits], block=[self.threads, 1, 1],
            min_blocks_per_mp=2, preferred_smem_carveout=100, stream=stream,
        )  # fmt: skip

    @cute.kernel
    def multiply(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, addends):  # type: ignore[no-untyped-def]
        column, row, part = cute.arch.block_idx()
        smem = SmemAllocator()
        keeps_b = self.product.resident > 0
        of_a = Operand(a, self._slots(smem, a, self.rows, self.a_across, STAGES), self.a_across, self.threads)
        slices_b = self.product.resident or STAGES
        of_b = Operand(
            b, self._slots(smem, b, self.columns, self.b_across, slices_b), self.b_across, self.threads
        )

        warps = (*self.product.warps, 1)
        op = warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, STEP))
        mma = cute.make_tiled_mma(op, warps, permutation_mnk=(16 * warps[0], 16 * warps[1], STEP))
        sums = cute.make_rmem_tensor(mma.partition_shape_C((self.rows, self.columns)), Float32)
        sums.fill(0.0)
        ldmatrix = [
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(across, 4), BFloat16)
            for across in (self.a_across, self.b_across)
        ]
        shape_a = mma.partition_shape_A((self.rows, STEP))
        shape_b = mma.partition_shape_B((self.columns, STEP))
        mine_a = Fragments(of_a, cute.make_tiled_copy_A(ldmatrix[0], mma), shape_a)
        mine_b = Fragments(of_b, cute.make_tiled_copy_B(ldmatrix[1], mma), shape_b)
        result = Result(self, smem, mma, c, addends, column, part)

        share = cute.ceil_div(a.shape[2], DEPTH * self.splits) * DEPTH
        begin = part * share
        end = cutlass.min(begin + share, a.shape[2])
        tiles, step = cute.ceil_div(c.shape[0], self.rows), cute.arch.grid_dim()[1]
        walk = Walk(tiles, step, begin, end)
        if cutlass.const_expr(keeps_b):
            for i in cutlass.range_constexpr(self.product.resident):
                of_b.fetch(column, begin + i * DEPTH, end, Int32(i))
        next_tile, next_k = row, begin  # what is fetched next
        for i in cutlass.range_constexpr(STAGES - 1):
            next_tile, next_k = self._fetch(of_a, of_b, column, walk, next_tile, next_k, Int32(i))
        stage = Int32(0)
        for tile in cutlass.range(row, tiles, step, unroll=1):
            result.load(tile)
            for k in cutlass.range(begin, end, DEPTH, unroll=1):
                cute.arch.cp_async_wait_group(STAGES - 2)
                cute.arch.sync_threads()
                free = (stage + STAGES - 1) % STAGES
                next_tile, next_k = self._fetch(of_a, of_b, column, walk, next_tile, next_k, free)
                self._add(mma, sums, mine_a, mine_b, stage, (k - begin) // DEPTH if keeps_b else stage)
                stage = (stage + 1) % STAGES
            result.store(tile, sums)
            sums.fill(0.0)

    @cute.jit
    def _fetch(self, of_a, of_b, column, walk, tile, k, stage):  # type: ignore[no-untyped-def]
        """Begins to copy one slice, if there is another, as a group; returns the place of the one after it."""
        if tile < walk.tiles and k < walk.end:
            of_a.fetch(tile, k, walk.end, stage)
            if cutlass.const_expr(self.product.resident == 0):
                of_b.fetch(column, k, walk.end, stage)
        cute.arch.cp_async_commit_group()
        return walk.after(tile, k)

    def _slots(
        self, smem: SmemAllocator, source: cute.Tensor, size: int, across: bool, slices: int
    ) -> cute.Tensor:
        layout = layouts.operand(BFloat16, across, size, DEPTH, slices * source.shape[0])
        return smem.allocate_tensor(BFloat16, layout.outer, 1024, swizzle=layout.inner)

    @cute.jit
    def _add(self, mma, sums, a, b, slice_a, slice_b) -> None:  # type: ignore[no-untyped-def]
        """A slice's products, the smallest parts' first. Two parts are not worth registers for a sum by itself."""
        found = sums
        if cutlass.const_expr(self.order > 2):
            found = cute.make_rmem_tensor_like(sums)
            found.fill(0.0)
        for step in cutlass.range_constexpr(DEPTH // STEP):
            a.load(step, slice_a)
            b.load(step, slice_b)
            for order in cutlass.range_constexpr(self.order - 1, -1, -1):
                for i in cutlass.range_constexpr(a.parts):
                    j = order - i
                    if cutlass.const_expr(0 <= j < b.parts):
                        cute.gemm(mma, found, a.held[i][None, None, 0], b.held[j][None, None, 0], found)
        if cutlass.const_expr(self.order > 2):
            sums.store(sums.load() + found.load())


class Result(Fixed):
    """From a tile's sums to C[m, n, part of the depth]."""

    def __init__(
        self, products: Products, smem: SmemAllocator, mma, c, addends, column: Int32, part: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        self.c, self.addends, self.column, self.part = c, addends, column, part
        self.rows, self.columns, self.threads = products.rows, products.columns, products.threads
        self.slice = mma.get_slice(cute.arch.thread_idx()[0])
        self.rounds = c.element_type is BFloat16
        if self.rounds:
            layout = cute.make_layout((self.rows, self.columns), stride=(self.columns + VECTOR, 1))
            self.tile = smem.allocate_tensor(BFloat16, layout, 16)
            self.pieces = self.rows * self.columns // VECTOR // self.threads
            self.held = [cute.make_rmem_tensor((VECTOR, self.pieces), BFloat16) for _ in addends]

    def _place(self, tile: Int32, i: int):  # type: ignore[no-untyped-def]
        """Row and column, within the tile and of C, of the piece that this thread stores in round i."""
        piece = cute.arch.thread_idx()[0] + i * self.threads
        per = self.columns // VECTOR
        row, column = piece // per, piece % per * VECTOR
        return row, column, tile * self.rows + row, self.column * self.columns + column

    @cute.jit
    def load(self, tile: Int32) -> None:
        """The addends of a tile, long before they are added."""
        for index in cutlass.range_constexpr(len(self.addends)):
            for i in cutlass.range_constexpr(self.pieces):
                _, _, m, n = self._place(tile, i)
                if m < self.c.shape[0] and n < self.c.shape[1]:
                    line = cute.zipped_divide(self.addends[index][m, None], (VECTOR,))
                    cute.autovec_copy(line[None, n // VECTOR], self.held[index][None, i])

    @cute.jit
    def store(self, tile: Int32, sums: cute.Tensor) -> None:
        if cutlass.const_expr(self.rounds):
            rounded = cute.make_rmem_tensor(sums.shape, BFloat16)
            rounded.store(sums.load().to(BFloat16))
            cute.autovec_copy(rounded, self.slice.partition_C(self.tile))
            cute.arch.sync_threads()
            for i in cutlass.range_constexpr(self.pieces):
                self._piece(tile, i)
        else:
            shape = (self.rows, self.columns)
            target = self.slice.partition_C(
                cute.local_tile(self.c[None, None, self.part], shape, (tile, self.column))
            )
            places = self.slice.partition_C(cute.make_identity_tensor(shape))
            for i in cutlass.range_constexpr(cute.size(sums) // 2):
                row, column = places[2 * i]
                if (
                    tile * self.rows + row < self.c.shape[0]
                    and self.column * self.columns + column < self.c.shape[1]
                ):
                    for j in cutlass.range_constexpr(2):
                        target[2 * i + j] = sums[2 * i + j]

    @cute.jit
    def _piece(self, tile: Int32, i: cutlass.Constexpr) -> None:
        """8 results, and 8 of each addend, whose sums are rounded one by one."""
        row, column, m, n = self._place(tile, i)
        piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
        cute.autovec_copy(cute.zipped_divide(self.tile[row, None], (VECTOR,))[None, column // VECTOR], piece)
        for held in self.held:
            piece.store((piece.load().to(Float32) + held[None, i].load().to(Float32)).to(BFloat16))
        if m < self.c.shape[0] and n < self.c.shape[1]:
            line = cute.zipped_divide(self.c[m, None, self.part], (VECTOR,))
            cute.autovec_copy(piece, line[None, n // VECTOR])
