"""Hopper's epilogue, in the shadow of the next tile's products.

A consumer warpgroup has little to do while its wgmma run, and registers to spare. When a tile is done, its accumulators
are rounded to BF16 and held in 64 registers, and the next tile's products start at once. What is left of the epilogue
is cut into tasks, which the main loop runs between its slices.

    main loop    tile i:  slices │ task 0 │ slices │ task 1 │ … │ slices        registers: accumulators of tile i, 128
    tasks        of tile i − 1                                                             held of tile i − 1,      64

    store        for each piece: held ─▶ buffer ─▶ TMA
    addends      for each piece: fetch │ sums in place of what was fetched ─▶ TMA
    swiglu       for each piece: gate of h │ up of h │ act
    dswiglu      for each piece: fetch gate and up of h │ half of d gate and d up in their place │ the rest ─▶ TMA
    accumulate   half of the pieces at once, from the accumulators; the other half is held in FP32 ─▶ TMA reduce-add

Held values are rounded where the results would be: y, and h, from which act is computed. dSwiGLU alone could do
better, with the gradient of act in FP32; it takes it rounded, as the op by itself would store it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, cute
from cutlass.cute.nvgpu import warp

from nmoe.codegen.templates import activation
from nmoe.codegen.templates.epilogue import Epilogue
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.tiles import Place

MATRICES = 4  # of 8 × 8, that a warp's ldmatrix or stmatrix moves: 16 columns of its 16 rows, a register each


class Deferred(Fixed):
    """The epilogue of one warpgroup, whose accumulators are [64, tile_n].

    `held`: [4 matrices, 4 times, pieces] registers of two neighbouring columns in BF16, or, accumulating, as many FP32
    values. Its other state are the place of the tile that they belong to, its router weights, sums for ds, and the
    phase of the barrier of what is fetched.
    """

    def __init__(self, epilogue: Epilogue, mma, thread: Int32, tile_n: int, plain) -> None:  # type: ignore[no-untyped-def]
        """`mma`: one as wide as a piece, for where a thread's values lie in a buffer."""
        self.epilogue, self.plain = epilogue, plain
        self.kind = epilogue.problem.epilogue
        self.held = cute.make_rmem_tensor((MATRICES, 4, tile_n // 64), Int32)
        self.rows = len(epilogue.fragment.mine)
        self.weights = cute.make_rmem_tensor((self.rows,), Float32)
        self.sums = cute.make_rmem_tensor((self.rows,), Float32)
        self.place = cute.make_rmem_tensor((4,), Int32)
        self.phase = cute.make_rmem_tensor((1,), Int32)
        self.place.fill(0)
        self.phase.fill(0)
        if self.kind != "accumulate":
            load = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, MATRICES), BFloat16)
            store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, MATRICES), BFloat16)
            source = cute.make_tiled_copy_C(load, mma).get_slice(thread).partition_S(epilogue.tile)
            target = cute.make_tiled_copy_C(store, mma).get_slice(thread).partition_D(epilogue.tile)
            self.load, self.source = load, source[None, 0, 0, None]
            self.store, self.target = store, target[None, 0, 0, None]

    @cute.jit
    def take(self, acc: cute.Tensor, place: Place) -> None:
        """Takes over a tile's accumulators; its tasks come next. acc is not written: LLVM would copy what was into the
        next wgmma's registers, and behind the fence that must follow such copies."""
        factor = self.epilogue.factor(place, self.plain)
        self.place[0], self.place[1], self.place[2] = place.row, place.column, place.expert
        self.place[3] = Int32(place.exists)
        if cutlass.const_expr(self.kind == "accumulate"):
            held = cute.recast_tensor(self.held, Float32)
            for i in cutlass.range(cute.size(held), unroll_full=True):
                held[i] = scaled(acc[cute.size(held) + i], factor)
            if place.exists:
                for p in cutlass.range_constexpr(self.epilogue.pieces // 2):
                    piece = self.epilogue.fragment.piece(acc, p)
                    values = cute.make_rmem_tensor_like(piece)
                    values.store(scaled(piece.load(), factor))
                    self._reduce(place, values, 0, p)
        else:
            for i in cutlass.range(cute.size(self.held), unroll_full=True):
                self.held[i] = packed((scaled(acc[2 * i], factor), scaled(acc[2 * i + 1], factor)))
            if place.exists:
                weights = self.epilogue.weights(self.plain.weight, place)
                for i in cutlass.range_constexpr(self.rows):
                    self.weights[i] = weights[i]
            self.sums.fill(0.0)

    def tasks(self) -> list[Callable[[], None]]:
        """To be run in this order. They do nothing before the first tile, and for one of which there is nothing to
        store."""
        epilogue = self.epilogue
        pieces, buffers = range(epilogue.steps), epilogue.buffers
        made: list[tuple[Any, ...]]
        if self.kind == "accumulate":
            half, held = epilogue.pieces // 2, cute.recast_tensor(self.held, Float32)
            made = [(self._reduce, held, i, half + i) for i in range(half)]
        elif self.kind == "swiglu":
            results = (*((("h", 0), ("h", 1)) if epilogue.problem.keeps_h else ()), ("act", 0))
            order = [(p, *result) for p in pieces for result in results]
            made = [(self._swiglu, i % buffers, *one) for i, one in enumerate(order)]
        elif self.kind == "dswiglu":
            made = [
                task
                for p in pieces
                for task in ((self._fetch, p), (self._dswiglu, p, 0), (self._dswiglu, p, 1))
            ]
        elif epilogue.reads:
            made = [(task, p) for p in pieces for task in (self._fetch, self._add)]
        else:
            made = [(self._store, p % buffers, p) for p in pieces]
        return [partial(self._run, *task) for task in made]

    @cute.jit
    def _run(self, task: cutlass.Constexpr, *args: cutlass.Constexpr) -> None:
        row, column, expert, exists = (self.place[i] for i in range(4))
        place = Place(row, column, expert, Int32(0), Int32(0), Boolean(exists), Boolean(False))
        if place.exists:
            task(place, *args)

    @cute.jit
    def _reduce(self, place, values, index: cutlass.Constexpr, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """Piece p, which is number `index` of the values."""
        piece = self.epilogue.fragment.piece(values, index)
        self.epilogue.put(piece, p % self.epilogue.buffers, "dw", self._at(place, p, place.expert))

    @cute.jit
    def _store(self, place, buffer: cutlass.Constexpr, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        self._put(self.held[None, None, p], buffer, "y", self._at(place, p))

    @cute.jit
    def _swiglu(  # type: ignore[no-untyped-def]
        self, place, buffer: cutlass.Constexpr, p: cutlass.Constexpr, result: cutlass.Constexpr,
        half: cutlass.Constexpr,
    ) -> None:  # fmt: skip
        """Gate or up of h, or act, of h as it is stored, so that recomputing act from h gives the same bits."""
        gates, ups = (self.held[None, None, i * self.epilogue.steps + p] for i in range(2))
        values = ups if cutlass.const_expr(half == 1) else gates
        if cutlass.const_expr(result == "act"):
            values = cute.make_rmem_tensor(gates.shape, Int32)
            for i in cutlass.range_constexpr(cute.size(values)):
                weight = self.weights[self.epilogue.fragment.row(2 * i)]
                both = zip(unpacked(gates[i]), unpacked(ups[i]), strict=True)
                values[i] = packed(tuple(activation.swiglu(gate, up, weight) for gate, up in both))
        self._put(values, buffer, result, self._at(place, p, half))

    @cute.jit
    def _fetch(self, place, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """What is read for a piece, once the last one's stores have left the buffers."""
        if self.epilogue.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.epilogue.fetch(0, *self._at(place, p)[:2])

    @cute.jit
    def _arrive(self) -> None:
        """Waits for what was fetched."""
        cute.arch.mbarrier_wait(self.epilogue.arrived, self.phase[0])
        self.phase[0] ^= 1

    @cute.jit
    def _add(self, place, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """y, its sum with the first addend, that with the second: each rounded, as ops of their own would."""
        self._arrive()
        for i in cutlass.range_constexpr(MATRICES):
            total = self.held[None, i, p]
            for addend in cutlass.range_constexpr(len(self.epilogue.reads)):
                more = self._read(i, addend)
                for j in cutlass.range_constexpr(MATRICES):
                    both = zip(unpacked(total[j]), unpacked(more[j]), strict=True)
                    total[j] = packed(tuple(x + y for x, y in both))
            self._write(total, i, 0)
        self.epilogue.send((("y", 0, self._at(place, p)),))

    @cute.jit
    def _dswiglu(self, place, p: cutlass.Constexpr, half: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """d gate and d up in place of gate and up, and this thread's part of ds: half of a piece's columns."""
        if cutlass.const_expr(half == 0):
            self._arrive()
        for i in cutlass.range_constexpr(half * MATRICES // 2, (half + 1) * MATRICES // 2):
            gates, ups = self._read(i, 0), self._read(i, 1)
            for j in cutlass.range_constexpr(MATRICES):
                mine = self.epilogue.fragment.row(2 * j)
                values = (unpacked(pair) for pair in (self.held[j, i, p], gates[j], ups[j]))
                found = [
                    activation.swiglu_backward(*one, self.weights[mine]) for one in zip(*values, strict=True)
                ]
                gates[j], ups[j] = packed([dg for dg, _, _ in found]), packed([du for _, du, _ in found])
                for _, _, dw in found:
                    self.sums[mine] += dw
            self._write(gates, i, 0)
            self._write(ups, i, 1)
        if cutlass.const_expr(half == 1):
            self.epilogue.send(tuple(("dh", i, self._at(place, p, i)) for i in range(2)))
            if cutlass.const_expr(p == self.epilogue.pieces - 1 and self.plain.partial is not None):
                self.epilogue.partial([self.sums[i] for i in range(self.rows)], place, self.plain.partial)

    def _at(self, place, p: int, last: int | Int32 = 0):  # type: ignore[no-untyped-def]
        """Where TMA finds a piece; `last`: the half of [gate | up], or the expert."""
        return self.epilogue.row(place), place.column * self.epilogue.steps + p, last

    @cute.jit
    def _put(self, values, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores a piece through the next buffer."""
        self.epilogue.reserve()
        for i in cutlass.range_constexpr(MATRICES):
            self._write(values[None, i], i, buffer)
        self.epilogue.send(((result, buffer, at),))

    def _write(self, values, i: int, buffer: int) -> None:  # type: ignore[no-untyped-def]
        """Number i of the 16 columns of a buffer."""
        cute.copy(self.store, cute.recast_tensor(values, BFloat16), self.target[(None, i), buffer])

    def _read(self, i: int, buffer: int) -> cute.Tensor:
        values = cute.make_rmem_tensor((MATRICES,), Int32)
        cute.copy(self.load, self.source[(None, i), buffer], cute.recast_tensor(values, BFloat16))
        return values


def scaled(values, factor):  # type: ignore[no-untyped-def]
    """Times the global scales, where there are any."""
    return values if factor is None else values * factor


def packed(pair) -> Int32:  # type: ignore[no-untyped-def]
    """Two FP32 values in BF16, the first in the low half. A tensor of BF16 would take a register a value."""
    wide = cute.make_rmem_tensor((2,), Float32)
    wide[0], wide[1] = pair
    narrow = cute.make_rmem_tensor((2,), BFloat16)
    narrow.store(wide.load().to(BFloat16))
    return cute.recast_tensor(narrow, Int32)[0]


def unpacked(pair: Int32) -> tuple[Float32, Float32]:
    bits = cute.make_rmem_tensor((2,), Int32)
    bits[0], bits[1] = pair << 16, pair & Int32(-1 << 16)
    wide = cute.recast_tensor(bits, Float32)
    return wide[0], wide[1]
