"""Hopper's epilogue of BF16 results, in the shadow of the next tile's products.

A consumer warpgroup has nothing to do while its wgmma run, and registers to spare: when a tile is done, its
accumulators are rounded to BF16 and held, 64 registers, and the next tile's products start at once. The rest of the
epilogue is cut into tasks, which the main loop runs between issuing a slice and waiting for the one before.

    main loop    tile i:      issue 0 │ task 0 │ wait, issue 1 │ … │ issue s │ task t │ wait, issue s + 1 │ …
    registers    128: accumulators of tile i         64: `held`, tile i − 1

What is stored is rounded so anyway: y, and h, from which act is computed. Only dSwiGLU would use FP32 accumulators; its
gradient of act is rounded as the op's own result would be.

    store        for each piece: held ─▶ buffer ─▶ TMA
    addends      for each piece: fetch │ sums in place of what was fetched ─▶ TMA
    swiglu       for each pair of pieces: gate of h │ up of h │ act
    dswiglu      for each piece: fetch gate and up of h │ d gate, d up in their place ─▶ TMA
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, cute
from cutlass.cute.nvgpu import warp

from nmoe.codegen.templates import activation
from nmoe.codegen.templates.epilogue import Epilogue
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.tiles import Place

MATRICES = 4  # 8 × 8 that ldmatrix and stmatrix move at once: 16 columns of a warp's 16 rows, 4 registers


class Deferred(Fixed):
    """One warpgroup's. `held`: 64 registers."""

    def __init__(self, epilogue: Epilogue, mma, thread: Int32, tile_n: int, plain) -> None:  # type: ignore[no-untyped-def]
        self.epilogue, self.plain = epilogue, plain
        self.held = cute.make_rmem_tensor((MATRICES, 4, tile_n // 64), Int32)
        self.rows = len(epilogue.fragment.mine)
        self.weights = cute.make_rmem_tensor((self.rows,), Float32)
        self.sums = cute.make_rmem_tensor((self.rows,), Float32)
        self.at = cute.make_rmem_tensor((4,), Int32)  # the tile's place
        self.phase = cute.make_rmem_tensor((1,), Int32)  # of the barrier of what is fetched
        self.at.fill(0)
        self.phase.fill(0)

        def moved(op) -> tuple[cute.CopyAtom, cute.Tensor]:  # type: ignore[no-untyped-def]
            """A copy of MATRICES and this thread's view of the buffers, [registers, 4 in a buffer, buffers]."""
            atom = cute.make_copy_atom(op(False, MATRICES), BFloat16)
            part = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
            view = part.partition_S if op is warp.LdMatrix8x8x16bOp else part.partition_D
            return atom, view(epilogue.tile)[None, 0, 0, None]

        self.accumulates = epilogue.problem.epilogue == "accumulate"
        if not self.accumulates:
            self.loads, self.stores = moved(warp.LdMatrix8x8x16bOp), moved(warp.StMatrix8x8x16bOp)

    @cute.jit
    def take(self, acc: cute.Tensor, place: Place) -> None:
        """Rounds a tile's accumulators; its tasks come next."""
        self.at[0], self.at[1], self.at[2] = place.row, place.column, place.expert
        self.at[3] = Int32(place.exists)
        if cutlass.const_expr(self.accumulates):
            half = cute.size(acc) // 2
            whole = cute.recast_tensor(self.held, Float32)
            for i in cutlass.range(half, unroll_full=True):
                whole[i] = acc[half + i]
            if place.exists:
                for p in cutlass.range_constexpr(self.epilogue.pieces // 2):
                    self._add_up(place, acc, p, p)
        else:
            factor = self.epilogue.factor(place, self.plain)
            for i in cutlass.range(cute.size(self.held), unroll_full=True):
                pair = [acc[2 * i], acc[2 * i + 1]]
                if cutlass.const_expr(factor is not None):
                    pair = [value * factor for value in pair]
                self.held[i] = packed(pair)
            if place.exists:
                weights = self.epilogue.weights(self.plain.weight, place)
                for i in cutlass.range_constexpr(self.rows):
                    self.weights[i] = weights[i]
            self.sums.fill(0.0)

    def tasks(self) -> list[Callable[[], None]]:
        """To be run in this order. They do nothing where there is no tile."""
        epilogue, buffers = self.epilogue, self.epilogue.buffers
        if epilogue.problem.epilogue == "swiglu":
            stores = [("h", 0), ("h", 1)] if epilogue.problem.keeps_h else []
            pairs = [(p, *to) for p in range(epilogue.steps) for to in (*stores, ("act", 0))]
            return [partial(self._run, self._swiglu, i % buffers, *pair) for i, pair in enumerate(pairs)]
        pieces = range(epilogue.pieces)
        if self.accumulates:
            half = epilogue.pieces // 2
            held = cute.recast_tensor(self.held, Float32)
            return [partial(self._run, self._add_up, held, i, half + i) for i in range(half)]
        if epilogue.problem.epilogue == "dswiglu":
            return [partial(self._run, *task) for p in pieces for task in ((self._fetch, p), (self._dswiglu, p, 0), (self._dswiglu, p, 1))]
        if epilogue.reads:
            return [partial(self._run, task, p) for p in pieces for task in (self._fetch, self._add)]
        return [partial(self._run, self._store, p % buffers, p) for p in pieces]

    @cute.jit
    def _add_up(self, place, values, index: cutlass.Constexpr, p: cutlass.Constexpr) -> None:
        e = self.epilogue
        e.put(e.fragment.piece(values, index), p % e.buffers, "dw", (e.row(place), place.column * e.steps + p, place.expert))

    @cute.jit
    def _run(self, task: cutlass.Constexpr, *args: cutlass.Constexpr) -> None:
        place = Place(self.at[0], self.at[1], self.at[2], Int32(0), Int32(0), Boolean(self.at[3]))
        if place.exists:
            task(place, *args)

    def _at(self, place, piece: int, half: int = 0):  # type: ignore[no-untyped-def]
        return self.epilogue.row(place), place.column * self.epilogue.steps + piece, half

    @cute.jit
    def _put(self, values, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores a piece [4, 4] of pairs through a buffer, which the last store from it has left."""
        self.epilogue.reserve()
        for i in cutlass.range_constexpr(MATRICES):
            self._write(values[None, i], i, buffer)
        self.epilogue.send(((result, buffer),), at)

    def _write(self, values, i: int, buffer: int) -> None:  # type: ignore[no-untyped-def]
        atom, view = self.stores
        cute.copy(atom, cute.recast_tensor(values, BFloat16), view[(None, i), buffer])

    def _read(self, i: int, buffer: int) -> cute.Tensor:
        atom, view = self.loads
        values = cute.make_rmem_tensor((MATRICES,), Int32)
        cute.copy(atom, view[(None, i), buffer], cute.recast_tensor(values, BFloat16))
        return values

    @cute.jit
    def _store(self, place, buffer: cutlass.Constexpr, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        self._put(self.held[None, None, p], buffer, "y", self._at(place, p))

    @cute.jit
    def _swiglu(self, place, buffer: cutlass.Constexpr, p: cutlass.Constexpr, result: cutlass.Constexpr,
                half: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        gates, ups = (self.held[None, None, i * self.epilogue.steps + p] for i in range(2))
        values = (gates, ups)[half]
        if cutlass.const_expr(result == "act"):
            values = cute.make_rmem_tensor(gates.shape, Int32)
            for i in cutlass.range_constexpr(cute.size(values)):
                weight = self.weights[i % self.rows]
                both = zip(unpacked(gates[i]), unpacked(ups[i]), strict=True)
                values[i] = packed([activation.swiglu(gate, up, weight) for gate, up in both])
        self._put(values, buffer, result, self._at(place, p, half))

    @cute.jit
    def _fetch(self, place, p: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """What is read for a piece, once the last stores have left the buffers."""
        if self.epilogue.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.epilogue.fetch(0, *self._at(place, p)[:2])

    @cute.jit
    def _arrive(self) -> None:
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
                    total[j] = packed([x + y for x, y in both])
            self._write(total, i, 0)
        self.epilogue.send((("y", 0),), self._at(place, p))

    @cute.jit
    def _dswiglu(self, place, p: cutlass.Constexpr, half: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        """d gate and d up in place of gate and up, and the tile's part of d weight."""
        if cutlass.const_expr(half == 0):
            self._arrive()
        for i in cutlass.range_constexpr(2 * half, 2 * half + 2):
            gates, ups = self._read(i, 0), self._read(i, 1)
            for j in cutlass.range_constexpr(MATRICES):
                mine = j % self.rows
                found = [
                    activation.swiglu_backward(grad, gate, up, self.weights[mine])
                    for grad, gate, up in zip(
                        unpacked(self.held[j, i, p]), unpacked(gates[j]), unpacked(ups[j]), strict=True
                    )
                ]
                gates[j], ups[j] = packed([f[0] for f in found]), packed([f[1] for f in found])
                for f in found:
                    self.sums[mine] = self.sums[mine] + f[2]
            self._write(gates, i, 0)
            self._write(ups, i, 1)
        if cutlass.const_expr(half == 1):
            for result in cutlass.range_constexpr(2):
                self.epilogue.send((("dh", result),), self._at(place, p, result))
            if cutlass.const_expr(p == self.epilogue.pieces - 1 and self.plain.partial is not None):
                self.epilogue.partial([self.sums[i] for i in range(self.rows)], place, self.plain.partial)


def packed(pair) -> Int32:  # type: ignore[no-untyped-def]
    """Two FP32 values as BF16, the first in the low half."""
    wide = cute.make_rmem_tensor((2,), Float32)
    wide[0], wide[1] = pair
    narrow = cute.make_rmem_tensor((2,), BFloat16)
    narrow.store(wide.load().to(BFloat16))
    return cute.recast_tensor(narrow, Int32)[0]


def unpacked(pair: Int32) -> tuple[Float32, Float32]:
    return _float(pair << 16), _float(pair & Int32(-65536))


def _float(bits: Int32) -> Float32:
    from cutlass._mlir.dialects import arith
    from cutlass.cutlass_dsl import T
    return Float32(arith.bitcast(T.f32(), bits.ir_value()))
