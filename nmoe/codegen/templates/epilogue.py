"""From accumulators to memory, whatever holds them: pieces of 128 bytes' width through swizzled buffers and TMA.

A unit (a warpgroup's 64 rows on Hopper, a warp's 32 on Blackwell) works by itself. What differs between them is its
Fragment: where a thread's values lie in a piece, and how the unit's threads wait for each other.

    piece p:  registers ─▶ the next buffer ─▶ TMA store, or reduce-add into FP32 gradients
    reads:    what is read for a piece (gate and up of h for dSwiGLU, addends) ─▶ a slot of buffers, p % 2 ─▶ registers
              ─▶ results, same buffers ─▶ TMA store; the first two pieces arrive during the main loop, the others while
              the previous piece is computed
    copies:   a piece of act or dh rounded to BF16 ─▶ MXFP8 along the rows and along the columns, 32 × 64 bytes each, in
              the two halves of a buffer ─▶ TMA store; the scales go from registers to their atoms

A unit of 32 rows holds whole blocks of both copies: a thread those of its row, the warp those of a column.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint8, Uint16, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.templates import activation, quantize
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import PIECE_BYTES
from nmoe.codegen.templates.layouts import copies as copy_layout

INVERSE_MAX = 1.0 / 2688.0  # of NVFP4's largest, 448 · 6: an amax's global scale


class Fragment(Fixed):
    """What a unit's threads hold of a piece [rows, 128 bytes].

    `rows`: of the unit; `mine`: the rows of this thread; `lanes`: threads that share a row, neighbours in the warp;
    `leads`: does this thread's warp issue the unit's copies. `indexed`: may pieces be numbered at run time
    (accumulators outside the registers), so that dSwiGLU, which holds three values of every element, is a loop and
    not one long sequence that the compiler spreads over more registers than there are.
    """

    rows: int
    lanes: int
    indexed = False
    mine: tuple[Int32, ...]
    leads: cutlass.Boolean

    def stored(self, buffer: cute.Tensor) -> cute.Tensor:
        """This thread's elements of a buffer."""
        raise NotImplementedError

    def piece(self, acc: cute.Tensor, index: int | Int32) -> cute.Tensor:
        """FP32 registers with this thread's values of piece `index`, in the order of `stored`."""
        raise NotImplementedError

    def row(self, value: int) -> int:
        """Which of `mine` value number `value` of a piece belongs to."""
        raise NotImplementedError

    def sync(self) -> None:
        raise NotImplementedError


class Epilogue(Fixed):
    """`unit`: this unit's number in the tile; `buffers`: its own, [rows, width, count]."""

    def __init__(self, gemm, fragment: Fragment, buffers, stores, reads, arrived, unit: Int32) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.fragment, self.arrived, self.unit = gemm, fragment, arrived, unit
        self.problem = gemm.problem
        self.width = PIECE_BYTES * 8 // gemm.out_type.width
        self.buffers = gemm.config.buffers
        self.pieces = gemm.config.tile_n // self.width
        self.units = 128 // fragment.rows
        self.spots = [fragment.stored(buffers[None, None, i]) for i in range(gemm.config.buffers)]
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
    def prefetch(self, place) -> None:  # type: ignore[no-untyped-def]
        """Starts reading for the tile's first two pieces, once the last tile's stores have left the buffers."""
        if cutlass.const_expr(len(self.reads) > 0):
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                for p in cutlass.range_constexpr(2):
                    self._fetch(p, self._row(place), place.column * self.pieces + p)

    @cute.jit
    def run(self, acc, place, plain, turn: Int32):  # type: ignore[no-untyped-def]
        """Finishes a tile; returns the phase of the read barriers for the next one."""
        factor = self._factor(place, plain)
        if cutlass.const_expr(self.problem.epilogue == "swiglu"):
            self._swiglu(acc, place, plain, factor)
        elif cutlass.const_expr(len(self.reads) > 0):
            turn = self._reading(acc, place, plain, factor, turn)
        else:
            batch = place.expert if cutlass.const_expr(self.problem.epilogue == "accumulate") else 0
            for p in cutlass.range_constexpr(self.pieces):
                at = (self._row(place), place.column * self.pieces + p, batch)
                self._put(self._piece(acc, p, factor), p % self.buffers, self.problem.stored[0], at)
        return turn

    @cute.jit
    def finish(self) -> None:
        """Before the thread block ends: its buffers must outlive the copies."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    def _row(self, place) -> Int32:  # type: ignore[no-untyped-def]
        return place.row * self.units + self.unit

    def _factor(self, place, plain) -> Float32 | None:  # type: ignore[no-untyped-def]
        """The product of the operands' global scales (NVFP4)."""
        if plain.a_amax is None:
            return None
        return plain.a_amax[place.expert] * INVERSE_MAX * (plain.b_amax[place.expert] * INVERSE_MAX)

    def _piece(self, acc, index, factor: Float32 | None) -> cute.Tensor:  # type: ignore[no-untyped-def]
        piece = self.fragment.piece(acc, index)
        if factor is not None:
            piece.store(piece.load() * factor)
        return piece

    @cute.jit
    def _vacate(self) -> None:
        """Waits until the next buffer is free: the stores of the others may still be reading them."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(self.buffers - 1, read=True)
        self.fragment.sync()

    @cute.jit
    def _put(self, values, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores one piece from registers through the next buffer."""
        self._vacate()
        rounded = cute.make_rmem_tensor(values.shape, self.gemm.out_type)
        rounded.store(values.load().to(self.gemm.out_type))
        cute.autovec_copy(rounded, self.spots[buffer])
        self._send(buffer, ((result, buffer),), at)

    @cute.jit
    def _send(self, buffer: cutlass.Constexpr, sources: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores results from shared memory: (result, place among its buffers) each."""
        cute.arch.fence_proxy("async.shared", space="cta")
        self.fragment.sync()
        if self.fragment.leads:
            for result, index in sources:
                atom, source, target = self.stores[result]
                cute.copy(atom, source[None, index], target[(None, *at)])
            cute.arch.cp_async_bulk_commit_group()

    def _weights(self, weight, place) -> list[Float32]:  # type: ignore[no-untyped-def]
        """The router weights of this thread's rows; one in a dense layer."""
        if weight is None:
            return [Float32(1.0) for _ in self.fragment.mine]
        first = self._row(place) * self.fragment.rows
        return [weight[first + row] for row in self.fragment.mine]

    @cute.jit
    def _swiglu(self, acc, place, plain, factor) -> None:  # type: ignore[no-untyped-def]
        """h = [gate | up] and act = weight · silu(gate) · up, of h as it is stored, so that recomputing act from h
        gives the same bits."""
        half = self.pieces // 2
        weights = self._weights(plain.weight, place)
        row = self._row(place)
        each = 3 if cutlass.const_expr(self.problem.keeps_h) else 1
        for p in cutlass.range_constexpr(half):
            at = place.column * half + p
            gate, up = self._piece(acc, p, factor), self._piece(acc, half + p, factor)
            gate.store(gate.load().to(BFloat16).to(Float32))
            up.store(up.load().to(BFloat16).to(Float32))
            if cutlass.const_expr(self.problem.keeps_h):
                self._put(gate, each * p % self.buffers, "h", (row, at, 0))
                self._put(up, (each * p + 1) % self.buffers, "h", (row, at, 1))
            for i in cutlass.range_constexpr(cute.size(gate)):
                gate[i] = activation.swiglu(gate[i], up[i], weights[self.fragment.row(i)])
            buffer = (each * p + each - 1) % self.buffers
            if cutlass.const_expr(len(self.problem.copies) > 0):
                gate.store(gate.load().to(BFloat16).to(Float32))
                self._vacate()
                self._quantize(gate, buffer, (row, at, 0), place, plain)
            else:
                self._put(gate, buffer, "act", (row, at, 0))

    @cute.jit
    def _quantize(self, values, buffer: cutlass.Constexpr, at, place, plain) -> None:  # type: ignore[no-untyped-def]
        """Stores the MXFP8 copies of a piece of act or dh. One thread holds a row of 64 `values`."""
        columns = self.problem.columns
        first = at[2] * columns + at[1] * self.width  # of the result's columns
        inside = at[1] * self.width < columns
        lane = self.fragment.mine[0]
        sources = ()
        for index, copy in enumerate(self.problem.copies):
            codes = cute.make_rmem_tensor(2, Int32)  # rows: of the row's two blocks; columns: of two columns
            scaled = cute.make_rmem_tensor(self.width, Float32)
            for block in cutlass.range_constexpr(2):
                begin = block * quantize.MXFP8_BLOCK
                if cutlass.const_expr(copy == "row"):
                    largest = Int32(0)
                    for i in cutlass.range_constexpr(begin, begin + quantize.MXFP8_BLOCK):
                        largest = cutlass.max(largest, quantize.magnitude(values[i]))
                    codes[block] = quantize.ue8m0(largest)
                    factor = quantize.inverse(codes[block])
                    for i in cutlass.range_constexpr(begin, begin + quantize.MXFP8_BLOCK):
                        scaled[i] = values[i] * factor
                else:
                    for i in cutlass.range_constexpr(begin, begin + quantize.MXFP8_BLOCK):
                        largest = cute.arch.warp_redux_sync(quantize.magnitude(values[i]), "max")
                        code = quantize.ue8m0(largest)
                        scaled[i] = values[i] * quantize.inverse(code)
                        if lane == i - begin:
                            codes[block] = code
            spot = self.halves[lane, None, 2 * buffer + index]
            rounded = cute.make_rmem_tensor(self.width, Float8E4M3FN)
            rounded.store(scaled.load().to(Float8E4M3FN))
            cute.autovec_copy(rounded, spot)
            sources += ((copy, 2 * buffer + index),)
            if inside:
                if cutlass.const_expr(copy == "row"):
                    block = first // quantize.MXFP8_BLOCK
                    words = cute.recast_tensor(plain.row_scale, Uint16)
                    words[place.row, block // 4, lane * 8 + self.unit * 2 + block % 4 // 2] = Uint16(
                        codes[0] | codes[1] << 8
                    )
                else:
                    for i in cutlass.range_constexpr(2):
                        place_in_atom = lane * 16 + (first % 128 // 32 + i) * 4 + self.unit
                        plain.col_scale[first // 128, place.row, place_in_atom] = Uint8(codes[i])
        self._send(buffer, sources, at)

    @cute.jit
    def _fetch(self, slot: cutlass.Constexpr, row: Int32, at: Int32) -> None:
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
    def _reading(self, acc, place, plain, factor, turn: Int32):  # type: ignore[no-untyped-def]
        """Results in place of what was read in the buffers, and for dSwiGLU this tile's part of d weight."""
        weights = self._weights(plain.weight, place)
        sums = [Float32(0.0) for _ in self.fragment.mine]
        if cutlass.const_expr(self.fragment.indexed):
            for pair in cutlass.range(self.pieces // 2, unroll=1):
                for slot in cutlass.range_constexpr(2):
                    sums = self._read_piece(
                        acc, place, plain, factor, weights, sums, 2 * pair + slot, slot, turn
                    )
                turn ^= 1
        else:
            for p in cutlass.range_constexpr(self.pieces):
                sums = self._read_piece(acc, place, plain, factor, weights, sums, p, p % 2, turn)
                if cutlass.const_expr(p % 2 == 1):
                    turn ^= 1
        if cutlass.const_expr(plain.partial is not None):
            self._partial(sums, place, plain.partial)
        return turn

    @cute.jit
    def _read_piece(self, acc, place, plain, factor, weights, sums, p, slot: cutlass.Constexpr, turn: Int32):  # type: ignore[no-untyped-def]
        row, at = self._row(place), place.column * self.pieces + p
        cute.arch.mbarrier_wait(self.arrived + slot, turn)
        if cutlass.const_expr(self.problem.epilogue == "dswiglu"):
            sums = self._dswiglu(self._piece(acc, p, factor), (row, at), place, plain, weights, sums, slot)
        else:
            self._add(self._piece(acc, p, factor), (row, at, 0), slot)
        if p + 2 < self.pieces:
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                self._fetch(slot, row, at + 2)
        return sums

    @cute.jit
    def _add(self, values, at, slot: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """y, its sum with the first addend, that with the second: each rounded, as ops of their own would."""
        count = len(self.reads)
        total = cute.make_rmem_tensor(values.shape, BFloat16)
        total.store(values.load().to(BFloat16))
        addend = cute.make_rmem_tensor(values.shape, BFloat16)
        for i in cutlass.range_constexpr(count):
            cute.autovec_copy(self.spots[count * slot + i], addend)
            total.store((total.load().to(Float32) + addend.load().to(Float32)).to(BFloat16))
        cute.autovec_copy(total, self.spots[count * slot])
        self._send(count * slot, (("y", count * slot),), at)

    @cute.jit
    def _dswiglu(self, grad, at, place, plain, weights, sums, slot: cutlass.Constexpr):  # type: ignore[no-untyped-def]
        """dh = [d gate | d up], or its copies, in place of h."""
        gate, up = (cute.make_rmem_tensor(grad.shape, BFloat16) for _ in range(2))
        cute.autovec_copy(self.spots[2 * slot], gate)
        cute.autovec_copy(self.spots[2 * slot + 1], up)
        for i in cutlass.range_constexpr(cute.size(grad)):
            mine = self.fragment.row(i)
            dg, du, dw = activation.swiglu_backward(
                grad[i], gate[i].to(Float32), up[i].to(Float32), weights[mine]
            )
            gate[i], up[i] = dg.to(BFloat16), du.to(BFloat16)
            sums[mine] += dw
        for half, result in enumerate((gate, up)):
            buffer = 2 * slot + half
            if cutlass.const_expr(len(self.problem.copies) > 0):
                wide = cute.make_rmem_tensor(grad.shape, Float32)
                wide.store(result.load().to(Float32))
                self._quantize(wide, buffer, (*at, half), place, plain)
            else:
                cute.autovec_copy(result, self.spots[buffer])
                self._send(buffer, (("dh", buffer),), (*at, half))
        return sums

    @cute.jit
    def _partial(self, sums, place, partial) -> None:  # type: ignore[no-untyped-def]
        """Sums over the threads that share a row, in a fixed order, into partial[column tile, row]."""
        first = self._row(place) * self.fragment.rows
        for i in cutlass.range_constexpr(len(sums)):
            total = sums[i]
            distance = 1
            while cutlass.const_expr(distance < self.fragment.lanes):
                total += cute.arch.shuffle_sync_bfly(total, distance)
                distance *= 2
            if cute.arch.lane_idx() % self.fragment.lanes == 0:
                partial[place.column, first + self.fragment.mine[i]] = total


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
