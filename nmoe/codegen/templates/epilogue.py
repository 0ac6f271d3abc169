"""From accumulators to memory, whatever holds them: pieces of 128 bytes' width through swizzled buffers and TMA.

A unit (a warpgroup's 64 rows on Hopper, a warp's 32 on Blackwell) works by itself. What differs between them is its
Fragment: where a thread's values lie in a piece, and how the unit's threads wait for each other.

    piece p:  registers ─▶ the next buffer ─▶ TMA store, or reduce-add into FP32 gradients
    reads:    what is read for a piece (gate and up of h for dSwiGLU, addends) ─▶ a slot of buffers, p % 2 ─▶ registers
              ─▶ results, same buffers ─▶ TMA store; the first two pieces arrive during the main loop, the others while
              the previous piece is computed
    copies:   a piece of act or dh rounded to BF16 ─▶ MXFP8 along the rows and along the columns, 32 × 64 bytes each, in
              the two halves of a buffer ─▶ TMA store; the scales go from registers to their atoms

A unit of 32 rows holds whole blocks of both copies: a thread scales two blocks of a row, then two columns.

`prefetch`, `run` and all that they alone call are Blackwell's, whose accumulators are outside the registers: a tile at
a time. Hopper has one slot for what it reads, and an order of its own (deferred.py).
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint8, Uint16, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.templates import activation, quantize
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import PIECE_BYTES
from nmoe.codegen.templates.layouts import copies as copy_layout
from nmoe.codegen.templates.quantize import MXFP8_BLOCK as BLOCK

INVERSE_MAX = 1.0 / 2688.0  # of NVFP4's largest, 448 · 6: an amax's global scale


class Fragment(Fixed):
    """What a unit's threads hold of a piece [rows, 128 bytes].

    `rows`: of the unit; `mine`: the rows of this thread; `lanes`: threads that share a row, neighbours in the warp;
    `leads`: does this thread's warp issue the unit's copies. `parts`: into how many a piece is cut, numbered at run
    time, so that dSwiGLU, which holds three values of every element, is a loop and not one long sequence that the
    compiler spreads over more registers than there are.
    """

    rows: int
    lanes: int
    parts = 1
    mine: tuple[Int32, ...]
    leads: cutlass.Boolean

    def stored(self, buffer: cute.Tensor) -> cute.Tensor:
        """This thread's elements of a buffer."""
        raise NotImplementedError

    def piece(self, acc: cute.Tensor, index: int | Int32, parts: int = 1) -> cute.Tensor:
        """FP32 registers with this thread's values of piece `index`, in the order of `stored`; or of a part, numbered
        through all pieces."""
        raise NotImplementedError

    def row(self, value: int) -> int:
        """Which of `mine` value number `value` of a piece belongs to."""
        raise NotImplementedError

    def sync(self) -> None:
        raise NotImplementedError

    def release(self, free) -> None:  # type: ignore[no-untyped-def]
        """Lets the barrier `free` know that the pieces read so far may be overwritten."""
        raise NotImplementedError


class Epilogue(Fixed):
    """`unit`: this unit's number in the tile; `buffers`: its own, [rows, width, count]."""

    def __init__(self, gemm, fragment: Fragment, buffers, stores, reads, arrived, unit: Int32) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.fragment, self.arrived, self.unit = gemm, fragment, arrived, unit
        self.problem = gemm.problem
        self.width = PIECE_BYTES * 8 // gemm.out_type.width
        self.buffers = gemm.config.buffers
        self.pieces = gemm.config.tile_n // self.width
        self.steps = self.pieces // 2 if gemm.paired else self.pieces
        self.units = 128 // fragment.rows
        self.tile = buffers
        layout = copy_layout(fragment.rows, 2 * gemm.config.buffers)
        start = cute.recast_ptr(buffers.iterator, layout.inner, Float8E4M3FN)
        self.halves = cute.make_tensor(start, layout.outer)

        def partition(copy, held):  # type: ignore[no-untyped-def]
            tile = (cute.size(held, mode=[0]), cute.size(held, mode=[1]))
            tiled = cute.local_tile(copy.tensor, tile, (None,) * cute.rank(copy.tensor))
            return (copy.atom, *cpasync.tma_partition(
                copy.atom, 0, cute.make_layout(1), cute.group_modes(held, 0, 2), cute.group_modes(tiled, 0, 2)
            ))  # fmt: skip

        self.stores = {
            name: partition(copy, self.halves if name in self.problem.copies else buffers)
            for name, copy in zip(self.problem.stored, stores, strict=True)
        }
        self.reads = [partition(copy, buffers) for copy in reads]

    @cute.jit
    def prefetch(self, place, flip=0) -> None:  # type: ignore[no-untyped-def]
        """Starts reading for the tile's first two pieces, once the last tile's stores have left the buffers."""
        if cutlass.const_expr(len(self.reads) > 0):
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                for p in cutlass.range_constexpr(2):
                    self.fetch(p, self.row(place), place.column * self.pieces + (p ^ flip))

    @cute.jit
    def run(self, acc, place, plain, turn: Int32, flip=0, free=None):  # type: ignore[no-untyped-def]
        """Finishes a tile in `steps` steps, number p of them on piece p ^ flip (swiglu: of gate and of up); returns the
        phase of the read barriers for the next tile. The barrier `free` hears when the first step's have been read."""
        factor = self.factor(place, plain)
        if cutlass.const_expr(self.problem.epilogue == "swiglu"):
            self._swiglu(acc, place, plain, factor, flip, free)
        elif cutlass.const_expr(len(self.reads) > 0):
            turn = self._reading(acc, place, plain, factor, turn, flip, free)
        else:
            batch = place.expert if cutlass.const_expr(self.problem.epilogue == "accumulate") else 0
            for p in cutlass.range_constexpr(self.pieces):
                at = (self.row(place), place.column * self.pieces + (p ^ flip), batch)
                values = self._piece(acc, p ^ flip, factor)
                self._release(free, p)
                self.put(values, p % self.buffers, self.problem.stored[0], at)
        return turn

    @cute.jit
    def _release(self, free, p) -> None:  # type: ignore[no-untyped-def]
        """After the first step's pieces have been read."""
        if cutlass.const_expr(free is not None):
            if p == 0:
                self.fragment.release(free)

    @cute.jit
    def finish(self) -> None:
        """Before the thread block ends: its buffers must outlive the copies."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    def _spot(self, buffer) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """This thread's elements of a buffer."""
        return self.fragment.stored(self.tile[None, None, buffer])

    def row(self, place) -> Int32:  # type: ignore[no-untyped-def]
        return place.row * self.units + self.unit

    def factor(self, place, plain) -> Float32 | None:  # type: ignore[no-untyped-def]
        """The product of the operands' global scales (NVFP4)."""
        if plain.a_amax is None:
            return None
        return plain.a_amax[place.expert] * INVERSE_MAX * (plain.b_amax[place.expert] * INVERSE_MAX)

    def _piece(self, acc, index, factor: Float32 | None, parts: int = 1) -> cute.Tensor:  # type: ignore[no-untyped-def]
        piece = self.fragment.piece(acc, index, parts)
        if factor is not None:
            piece.store(piece.load() * factor)
        return piece

    @cute.jit
    def put(self, values, buffer, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores one piece from registers through the next buffer."""
        self._write(values, buffer)
        self.send(((result, buffer, at),))

    @cute.jit
    def _write(self, values, buffer) -> None:  # type: ignore[no-untyped-def]
        """Writes one piece into the next buffer."""
        self.reserve()
        rounded = cute.make_rmem_tensor(values.shape, self.gemm.out_type)
        rounded.store(values.load().to(self.gemm.out_type))
        cute.autovec_copy(rounded, self._spot(buffer))

    @cute.jit
    def reserve(self) -> None:
        """Waits until the next buffer's last store has left it. The other buffers' may still be reading them."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(self.buffers - 1, read=True)
        self.fragment.sync()

    @cute.jit
    def send(self, sources) -> None:  # type: ignore[no-untyped-def]
        """Stores results from shared memory: (result, place among its buffers, where to) each."""
        cute.arch.fence_proxy("async.shared", space="cta")
        self.fragment.sync()
        if self.fragment.leads:
            for result, index, at in sources:
                atom, source, target = self.stores[result]
                cute.copy(atom, source[None, index], target[(None, *at)])
            cute.arch.cp_async_bulk_commit_group()

    def weights(self, weight, place) -> list[Float32]:  # type: ignore[no-untyped-def]
        """The router weights of this thread's rows; one in a dense layer."""
        if weight is None:
            return [Float32(1.0) for _ in self.fragment.mine]
        first = self.row(place) * self.fragment.rows
        return [weight[first + row] for row in self.fragment.mine]

    @cute.jit
    def _swiglu(self, acc, place, plain, factor, flip, free) -> None:  # type: ignore[no-untyped-def]
        """h = [gate | up] and act = weight · silu(gate) · up, of h as it is stored, so that recomputing act from h
        gives the same bits."""
        weights = self.weights(plain.weight, place)
        for p in cutlass.range(self.steps, unroll=1):
            self._swiglu_step(acc, place, plain, factor, weights, p, flip, free)

    @cute.jit
    def _swiglu_step(self, acc, place, plain, factor, weights, p, flip, free) -> None:  # type: ignore[no-untyped-def]
        row, at = self.row(place), place.column * self.steps + (p ^ flip)
        gate, up = self._piece(acc, p ^ flip, factor), self._piece(acc, self.steps + (p ^ flip), factor)
        self._release(free, p)
        gate.store(gate.load().to(BFloat16).to(Float32))
        up.store(up.load().to(BFloat16).to(Float32))
        buffer = p  # the number of the piece that is stored next
        if cutlass.const_expr(self.problem.keeps_h):
            buffer = 3 * p + 2
            self.put(gate, 3 * p % self.buffers, "h", (row, at, 0))
            self.put(up, (3 * p + 1) % self.buffers, "h", (row, at, 1))
        for i in cutlass.range_constexpr(cute.size(gate)):
            gate[i] = activation.swiglu(gate[i], up[i], weights[self.fragment.row(i)])
        if cutlass.const_expr(len(self.problem.copies) > 0):
            self._write(gate, buffer % self.buffers)
            if (
                at < self.problem.columns
            ):  # always; a branch of its own keeps its registers apart from the rest's
                self._quantize(buffer % self.buffers, (row, at, 0), place, plain)
            self._send_copies(buffer % self.buffers, (row, at, 0))
        else:
            self.put(gate, buffer % self.buffers, "act", (row, at, 0))

    @cute.jit
    def _quantize(self, buffer, at, place, plain) -> None:  # type: ignore[no-untyped-def]
        """The MXFP8 copies of a piece of act or dh that lies, rounded to BF16, in a buffer, in its place; and their
        scales."""
        columns = self.problem.columns
        first = at[2] * columns + at[1] * self.width  # of the result's columns
        copies, lane = self.problem.copies, cute.arch.lane_idx()
        self.fragment.sync()
        blocks = [_blocks(copy, self.tile[None, None, buffer], lane, BFloat16) for copy in copies]
        for source, held in blocks:
            cute.autovec_copy(source, held)
        self.fragment.sync()  # every thread has read what the copies now replace
        for index, copy in enumerate(copies):
            target, rounded = _blocks(copy, self.halves[None, None, 2 * buffer + index], lane, Float8E4M3FN)
            values = cute.make_rmem_tensor(rounded.layout, Float32)
            values.store(blocks[index][1].load().to(Float32))
            codes = [quantize.block(values[None, side]) for side in range(2)]
            rounded.store(values.load().to(Float8E4M3FN))
            cute.autovec_copy(rounded, target)
            if at[1] * self.width < columns:
                if cutlass.const_expr(copy == "row"):
                    words, column = cute.recast_tensor(plain.row_scale, Uint16), first // BLOCK
                    word = lane * 8 + self.unit * 2 + column % 4 // 2
                    words[place.row, column // 4, word] = Uint16(codes[0] | codes[1] << 8)
                else:
                    for side in cutlass.range_constexpr(2):
                        line = first + 2 * lane + side
                        byte = line % 32 * 16 + line % 128 // 32 * 4 + self.unit
                        plain.col_scale[line // 128, place.row, byte] = Uint8(codes[side])

    @cute.jit
    def _send_copies(self, buffer, at) -> None:  # type: ignore[no-untyped-def]
        self.send(tuple((copy, 2 * buffer + i, at) for i, copy in enumerate(self.problem.copies)))

    @cute.jit
    def fetch(self, slot: cutlass.Constexpr, row: Int32, at: Int32) -> None:
        """What is read for a piece into a slot's buffers; of h, gate and up."""
        count = len(self.reads)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                self.arrived + slot, count * self.fragment.rows * PIECE_BYTES
            )
        for i in cutlass.range_constexpr(count):
            atom, landing, origin = self.reads[i]
            half = i if cutlass.const_expr(self.problem.epilogue == "dswiglu") else 0
            cute.copy(atom, origin[None, row, at, half], landing[None, count * slot + i],
                      tma_bar_ptr=self.arrived + slot)  # fmt: skip

    @cute.jit
    def _reading(self, acc, place, plain, factor, turn: Int32, flip, free):  # type: ignore[no-untyped-def]
        """Results in place of what was read in the buffers, and for dSwiGLU this tile's part of d weight."""
        weights = self.weights(plain.weight, place)
        sums = [Float32(0.0) for _ in self.fragment.mine]
        for pair in cutlass.range(self.pieces // 2, unroll=1):
            for slot in cutlass.range_constexpr(2):
                sums = self._read_piece(
                    acc, place, plain, factor, weights, sums, 2 * pair + slot, slot, turn, flip
                )
                if cutlass.const_expr(slot == 0):
                    self._release(free, pair)
            turn ^= 1
        if cutlass.const_expr(plain.partial is not None):
            self.partial(sums, place, plain.partial)
        return turn

    @cute.jit
    def _read_piece(  # type: ignore[no-untyped-def]
        self, acc, place, plain, factor, weights, sums, p, slot: cutlass.Constexpr, turn: Int32, flip
    ):
        piece = p ^ flip
        row, at = self.row(place), place.column * self.pieces + piece
        cute.arch.mbarrier_wait(self.arrived + slot, turn)
        if cutlass.const_expr(self.problem.epilogue == "dswiglu"):
            for part in cutlass.range(self.fragment.parts, unroll=1):
                sums = self._dswiglu(acc, piece, factor, weights, sums, slot, part)
            self._store_dh((row, at), place, plain, slot)
        else:
            self._add(self._piece(acc, piece, factor), (row, at, 0), slot)
        if p + 2 < self.pieces:
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                self.fetch(slot, row, place.column * self.pieces + (p + 2 ^ flip))
        return sums

    @cute.jit
    def _add(self, values, at, slot: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """y, its sum with the first addend, that with the second: each rounded, as ops of their own would."""
        count = len(self.reads)
        total = cute.make_rmem_tensor(values.shape, BFloat16)
        total.store(values.load().to(BFloat16))
        addend = cute.make_rmem_tensor(values.shape, BFloat16)
        for i in cutlass.range_constexpr(count):
            cute.autovec_copy(self._spot(count * slot + i), addend)
            total.store((total.load().to(Float32) + addend.load().to(Float32)).to(BFloat16))
        cute.autovec_copy(total, self._spot(count * slot))
        self.send((("y", count * slot, at),))

    @cute.jit
    def _dswiglu(self, acc, p, factor, weights, sums, slot: cutlass.Constexpr, part):  # type: ignore[no-untyped-def]
        """d gate and d up in place of gate and up: of a part of a piece."""
        parts = self.fragment.parts
        spots = [
            cute.flat_divide(self._spot(2 * slot + half), (self.width // parts,))[None, part]
            for half in range(2)
        ]
        grad = self._piece(acc, parts * p + part, factor, parts)
        gate, up = (cute.make_rmem_tensor(grad.shape, BFloat16) for _ in range(2))
        cute.autovec_copy(spots[0], gate)
        cute.autovec_copy(spots[1], up)
        for i in cutlass.range_constexpr(cute.size(grad)):
            mine = self.fragment.row(i)
            dg, du, dw = activation.swiglu_backward(
                grad[i], gate[i].to(Float32), up[i].to(Float32), weights[mine]
            )
            gate[i], up[i] = dg.to(BFloat16), du.to(BFloat16)
            sums[mine] += dw
        cute.autovec_copy(gate, spots[0])
        cute.autovec_copy(up, spots[1])
        return sums

    @cute.jit
    def _store_dh(self, at, place, plain, slot: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """Stores d gate and d up from a slot's buffers, or their copies."""
        if cutlass.const_expr(len(self.problem.copies) > 0):
            for half in cutlass.range(2, unroll=1):
                self._quantize(2 * slot + half, (*at, half), place, plain)
                self._send_copies(2 * slot + half, (*at, half))
        else:
            self.send(tuple(("dh", 2 * slot + half, (*at, half)) for half in range(2)))

    @cute.jit
    def partial(self, sums, place, partial) -> None:  # type: ignore[no-untyped-def]
        """Sums over the threads that share a row, in a fixed order, into partial[column tile, row]."""
        first = self.row(place) * self.fragment.rows
        for i in cutlass.range_constexpr(len(sums)):
            total = sums[i]
            distance = 1
            while cutlass.const_expr(distance < self.fragment.lanes):
                total += cute.arch.shuffle_sync_bfly(total, distance)
                distance *= 2
            if cute.arch.lane_idx() % self.fragment.lanes == 0:
                partial[place.column, first + self.fragment.mine[i]] = total


def _blocks(copy: str, tile: cute.Tensor, lane: Int32, element) -> tuple[cute.Tensor, cute.Tensor]:  # type: ignore[no-untyped-def]
    """The two blocks of 32 in a tile [32, 64] that a thread scales, and registers for them, [32, 2] both: the halves of
    row `lane`, or columns 2·lane and 2·lane + 1."""
    shape = (BLOCK, 2)
    if copy == "row":
        return cute.flat_divide(tile[lane, None], (BLOCK,)), cute.make_rmem_tensor(shape, element)
    view = cute.flat_divide(tile, shape)[None, None, 0, lane]
    return view, cute.make_rmem_tensor(cute.make_layout(shape, stride=(2, 1)), element)


class PartialSum(Fixed):
    """The kernel that follows dSwiGLU: ds[r] = Σ over column tiles, in their order, of partial[tile, r]."""

    THREADS = 256

    def __init__(self, experts: int, columns: int) -> None:
        self.experts, self.columns = experts, columns

    @cute.jit
    def launch(self, partial: cute.Tensor, offsets: cute.Tensor, ds: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
        blocks = cute.ceil_div(cute.size(ds), self.THREADS)
        self.sum_partials(partial, offsets, ds).launch(
            grid=[blocks, 1, 1], block=[self.THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def sum_partials(self, partial: cute.Tensor, offsets: cute.Tensor, ds: cute.Tensor):  # type: ignore[no-untyped-def]
        row = cute.arch.block_idx()[0] * self.THREADS + cute.arch.thread_idx()[0]
        if row < offsets[self.experts]:
            total = Float32(0.0)
            for column in cutlass.range_constexpr(self.columns):
                total += partial[column, row]
            ds[row] = total
