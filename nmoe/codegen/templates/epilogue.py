"""From accumulators to memory, whatever holds them: pieces of 128 bytes' width through swizzled buffers and TMA.

A unit (a warpgroup's 64 rows on Hopper, a warp's 32 on Blackwell) works by itself. What differs between them is its
Fragment: where a thread's values lie in a piece, and how the unit's threads wait for each other.

    piece p:  registers ─▶ the next buffer ─▶ TMA store, or reduce-add into FP32 gradients
    dSwiGLU:  gate and up of h ─▶ buffers 2·(p % 2), +1 ─▶ registers ─▶ d gate and d up, same buffers ─▶ TMA store;
              the first two pieces of h arrive during the main loop, the others while the previous piece is computed
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.templates import activation
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import PIECE_BYTES


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

    def __init__(self, gemm, fragment: Fragment, buffers, stores, read, arrived, unit: Int32) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.fragment, self.arrived, self.unit = gemm, fragment, arrived, unit
        self.width = PIECE_BYTES * 8 // gemm.out_type.width
        self.buffers = gemm.config.buffers
        self.pieces = gemm.config.tile_n // self.width
        self.units = 128 // fragment.rows
        self.spots = [fragment.stored(buffers[None, None, i]) for i in range(gemm.config.buffers)]
        one, flat = cute.make_layout(1), cute.group_modes(buffers, 0, 2)

        def partition(copy):  # type: ignore[no-untyped-def]
            atom, tensor = copy
            tiled = cute.local_tile(tensor, (fragment.rows, self.width), (None,) * cute.rank(tensor))
            return (atom, *cpasync.tma_partition(atom, 0, one, flat, cute.group_modes(tiled, 0, 2)))

        self.stores = [partition(copy) for copy in stores]
        if gemm.reads:
            self.read = partition(read)

    @cute.jit
    def prefetch(self, place) -> None:  # type: ignore[no-untyped-def]
        """Starts reading h for the tile's first two pieces, once the last tile's stores have left the buffers."""
        if cutlass.const_expr(self.gemm.reads):
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                for p in cutlass.range_constexpr(2):
                    self._fetch(p, self._row(place), place.column * self.pieces + p)

    @cute.jit
    def run(self, acc, place, weight, partial, turn: Int32):  # type: ignore[no-untyped-def]
        """Finishes a tile; returns the phase of the read barriers for the next one."""
        kind = self.gemm.problem.epilogue
        if cutlass.const_expr(kind == "swiglu"):
            self._swiglu(acc, place, weight)
        elif cutlass.const_expr(kind == "dswiglu"):
            turn = self._dswiglu(acc, place, weight, partial, turn)
        else:
            for p in cutlass.range_constexpr(self.pieces):
                batch = (place.expert,) if cutlass.const_expr(kind == "accumulate") else ()
                at = (self._row(place), place.column * self.pieces + p, *batch)
                self._put(self.fragment.piece(acc, p), p % self.buffers, 0, at)
        return turn

    @cute.jit
    def finish(self) -> None:
        """Before the thread block ends: its buffers must outlive the copies."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    def _row(self, place) -> Int32:  # type: ignore[no-untyped-def]
        return place.row * self.units + self.unit

    @cute.jit
    def _put(self, values, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores one piece from registers. The other buffers' stores may still be reading them."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(self.buffers - 1, read=True)
        self.fragment.sync()
        rounded = cute.make_rmem_tensor(values.shape, self.gemm.out_type)
        rounded.store(values.load().to(self.gemm.out_type))
        cute.autovec_copy(rounded, self.spots[buffer])
        self._send(buffer, result, at)

    @cute.jit
    def _send(self, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        atom, source, target = self.stores[result]
        cute.arch.fence_proxy("async.shared", space="cta")
        self.fragment.sync()
        if self.fragment.leads:
            cute.copy(atom, source[None, buffer], target[(None, *at)])
            cute.arch.cp_async_bulk_commit_group()

    def _weights(self, weight, place) -> list[Float32]:  # type: ignore[no-untyped-def]
        """The router weights of this thread's rows; one in a dense layer."""
        if weight is None:
            return [Float32(1.0) for _ in self.fragment.mine]
        first = self._row(place) * self.fragment.rows
        return [weight[first + row] for row in self.fragment.mine]

    @cute.jit
    def _swiglu(self, acc, place, weight) -> None:  # type: ignore[no-untyped-def]
        """h = [gate | up] and act = weight · silu(gate) · up, of h as it is stored, so that recomputing act from h
        gives the same bits."""
        half = self.pieces // 2
        weights = self._weights(weight, place)
        row = self._row(place)
        for p in cutlass.range_constexpr(half):
            at = place.column * half + p
            gate, up = self.fragment.piece(acc, p), self.fragment.piece(acc, half + p)
            gate.store(gate.load().to(BFloat16).to(Float32))
            up.store(up.load().to(BFloat16).to(Float32))
            self._put(gate, 3 * p % self.buffers, 0, (row, at, 0))
            self._put(up, (3 * p + 1) % self.buffers, 0, (row, at, 1))
            for i in cutlass.range_constexpr(cute.size(gate)):
                gate[i] = activation.swiglu(gate[i], up[i], weights[self.fragment.row(i)])
            self._put(gate, (3 * p + 2) % self.buffers, 1, (row, at))

    @cute.jit
    def _fetch(self, slot: cutlass.Constexpr, row: Int32, at: Int32) -> None:
        """Gate and up of a piece of h into buffers 2·slot and 2·slot + 1."""
        atom, landing, origin = self.read
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.arrived + slot, 2 * self.fragment.rows * PIECE_BYTES)
        for half in cutlass.range_constexpr(2):
            cute.copy(atom, origin[None, row, at, half], landing[None, 2 * slot + half],
                      tma_bar_ptr=self.arrived + slot)  # fmt: skip

    @cute.jit
    def _dswiglu(self, acc, place, weight, partial, turn: Int32):  # type: ignore[no-untyped-def]
        """dh = [d gate | d up] in place of h in the buffers, and this tile's part of d weight."""
        weights = self._weights(weight, place)
        sums = [Float32(0.0) for _ in self.fragment.mine]
        if cutlass.const_expr(self.fragment.indexed):
            for pair in cutlass.range(self.pieces // 2, unroll=1):
                for slot in cutlass.range_constexpr(2):
                    sums = self._dswiglu_piece(acc, place, weights, sums, 2 * pair + slot, slot, turn)
                turn ^= 1
        else:
            for p in cutlass.range_constexpr(self.pieces):
                sums = self._dswiglu_piece(acc, place, weights, sums, p, p % 2, turn)
                if cutlass.const_expr(p % 2 == 1):
                    turn ^= 1
        if cutlass.const_expr(partial is not None):
            self._partial(sums, place, partial)
        return turn

    @cute.jit
    def _dswiglu_piece(self, acc, place, weights, sums, p, slot: cutlass.Constexpr, turn: Int32):  # type: ignore[no-untyped-def]
        row, at = self._row(place), place.column * self.pieces + p
        cute.arch.mbarrier_wait(self.arrived + slot, turn)
        grad = self.fragment.piece(acc, p)
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
        cute.autovec_copy(gate, self.spots[2 * slot])
        cute.autovec_copy(up, self.spots[2 * slot + 1])
        self._send(2 * slot, 0, (row, at, 0))
        self._send(2 * slot + 1, 0, (row, at, 1))
        if p + 2 < self.pieces:
            if self.fragment.leads:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                self._fetch(slot, row, at + 2)
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
