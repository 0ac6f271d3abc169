"""Quantized copies of a tile of BF16 results, bit for bit as nmoe.formats rounds.

A block's largest magnitude is found on pairs of BF16 without their signs: NaN comes through. Along a row it is that of
the columns of neighbouring lanes, down the rows that of a thread's rows and the lanes below it. Scale factors are
gathered in shared memory and written by all threads, in the layout that the consumer reads: rows, or 128 × 4 atoms
(formats.to_blocked).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import cutlass
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint8, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.rows import Copy
from nmoe.codegen.templates import nvfp4, quantize
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.rows_body import line
from nmoe.storage import ATOM_ROWS, ATOM_SCALES

PAIRS = VECTOR // 2
UNSIGNED = 0x7FFF_7FFF  # a pair of BF16 without signs


def copies(tile, smem: SmemAllocator):  # type: ignore[no-untyped-def]
    """What writes a tile's copies, which are of one format."""
    if not tile.problem.two_passes:
        return [Mxfp8(tile, smem)] if tile.problem.copies else []
    kinds = {0: ColumnNvfp4, 1: RowNvfp4}
    return [kinds[copy.axis](tile, copy, smem) for copy in tile.problem.copies]


def largest(a: Int32, b: Int32) -> Int32:
    """Of pairs of BF16, each; NaN if either is."""
    return cute.arch.inline_ptx(
        "max.NaN.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b]
    )


def low(pair: Int32) -> Int32:
    """The bits in FP32 of a pair's first BF16."""
    return pair << 16


def high(pair: Int32) -> Int32:
    return pair & -0x1_0000


class Scales(Fixed):
    """A tile's scale factors in shared memory, bytes [lines, blocks]; neighbours are lines, which one warp writes."""

    def __init__(self, tile, copy: Copy, smem: SmemAllocator, lines: int, blocks: int) -> None:  # type: ignore[no-untyped-def]
        self.thread, self.threads = tile.thread, tile.config.threads
        self.lines, self.blocks, self.blocked = lines, blocks, copy.scales == "blocked"
        self.held = smem.allocate_tensor(Uint8, cute.make_layout((lines, blocks)), 16)
        self.target = tile.named[f"{copy.name}_scale"]

    def __setitem__(self, at: tuple[Int32, Int32], code: Int32) -> None:
        self.held[at] = code.to(Uint8)

    @cute.jit
    def store(self, line: Int32, block: Int32) -> None:
        """Writes the tile's scales, (line, block) the first of them. Those past the tensor's end fill its atoms."""
        cute.arch.sync_threads()
        whole = self.blocked and self.blocks % ATOM_SCALES == 0
        step = ATOM_SCALES if cutlass.const_expr(whole) else 1
        count = self.lines * self.blocks // step
        for item in cutlass.range(self.thread, count, self.threads, unroll=1):
            if cutlass.const_expr(whole):
                # neighbouring threads write neighbouring words of an atom
                within = item % self.lines
                if cutlass.const_expr(self.lines % ATOM_ROWS == 0):
                    within = within // ATOM_ROWS * ATOM_ROWS + within % 4 * 32 + within % ATOM_ROWS // 4
                self._word(line, block, within, item // self.lines)
            else:
                self._byte(
                    line + item // self.blocks,
                    block + item % self.blocks,
                    self.held[item // self.blocks, item % self.blocks],
                )
        cute.arch.sync_threads()

    @cute.jit
    def _word(self, line: Int32, block: Int32, within: Int32, quad: Int32) -> None:
        atom, column = (line + within) // ATOM_ROWS, block // ATOM_SCALES + quad
        if (atom < self.target.shape[0]) & (column < self.target.shape[1]):
            at = (line + within) % 32 * 16 + (line + within) % ATOM_ROWS // 32 * 4
            codes = cute.make_rmem_tensor(ATOM_SCALES, Uint8)
            for i in cutlass.range_constexpr(ATOM_SCALES):
                codes[i] = self.held[within, ATOM_SCALES * quad + i]
            words = cute.recast_tensor(self.target, Int32)
            words[atom, column, at // 4] = cute.recast_tensor(codes, Int32)[0]

    @cute.jit
    def _byte(self, line: Int32, block: Int32, code: Uint8) -> None:
        if cutlass.const_expr(self.blocked):
            atom, column = line // ATOM_ROWS, block // ATOM_SCALES
            if (atom < self.target.shape[0]) & (column < self.target.shape[1]):
                self.target[
                    atom, column, line % 32 * 16 + line % ATOM_ROWS // 32 * 4 + block % ATOM_SCALES
                ] = code
        elif (line < self.target.shape[0]) & (block < self.target.shape[1]):
            self.target[line, block] = code


class Mxfp8(Fixed):
    """A tile's MXFP8 copies. Two passes over the rows serve both: in the first they see magnitudes, in the second each
    row becomes FP32 once. What several passes need the compiler would keep in registers for all rows."""

    def __init__(self, tile, smem: SmemAllocator) -> None:  # type: ignore[no-untyped-def]
        kinds: dict[int, Any] = {0: ColumnMxfp8, 1: RowMxfp8}
        self.copies: list[RowMxfp8 | ColumnMxfp8] = [
            kinds[c.axis](tile, c, smem) for c in tile.problem.copies
        ]
        self.vectors = tile.config.vectors

    @cute.jit
    def write(
        self, values, spot, first: Int32, turn: Int32, chunk: Int32, group: Int32, entry: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        words = cute.recast_tensor(values, Int32)
        peaks = [copy.peaks() for copy in self.copies]
        for i in cutlass.range_constexpr(self.vectors):
            unsigned = [words[j, i] & UNSIGNED for j in range(PAIRS)]
            for copy, held in zip(self.copies, peaks, strict=True):
                copy.see(held, unsigned, i)
        factors = [copy.factors(held, turn) for copy, held in zip(self.copies, peaks, strict=True)]
        for i in cutlass.range_constexpr(self.vectors):
            row = values[None, i].load().to(Float32)
            for copy, factor in zip(self.copies, factors, strict=True):
                codes = cute.make_rmem_tensor(VECTOR, Float8E4M3FN)
                codes.store((row * copy.factor(factor, i)).to(Float8E4M3FN))
                if spot.exists[i]:
                    cute.autovec_copy(cute.recast_tensor(codes, Uint8), line(copy.data, spot, i))
        for copy in self.copies:
            copy.end(first, turn, chunk)


class CopyMxfp8(Fixed):
    """`see` raises the peaks, pairs of BF16, to a row's magnitudes. `factors` stores scale factors made of them and
    returns what elements are multiplied by, of which `factor` is that of a row's eight."""

    def __init__(self, tile, copy: Copy, smem: SmemAllocator) -> None:  # type: ignore[no-untyped-def]
        self.tile, self.config, self.data = tile, tile.config, tile.named[copy.name]
        size = (self.config.rows * (1 if copy.axis else tile.turns), self.config.columns)
        lines, length = size if copy.axis else size[::-1]
        self.scales = Scales(tile, copy, smem, lines, length // quantize.MXFP8_BLOCK)


class RowMxfp8(CopyMxfp8):
    """Blocks along the rows: one in each of the thread's rows, which four lanes share."""

    def peaks(self) -> cute.Tensor:
        return cute.make_rmem_tensor(self.config.vectors, Int32)

    def see(self, peaks: cute.Tensor, unsigned: list[Int32], i: int) -> None:
        peaks[i] = reduce(largest, unsigned)

    @cute.jit
    def factors(self, peaks: cute.Tensor, turn: Int32) -> cute.Tensor:
        tile, found = self.tile, cute.make_rmem_tensor(self.config.vectors, Float32)
        for i in cutlass.range_constexpr(self.config.vectors):
            pair = peaks[i]
            pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, 1))
            pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, 2))
            code = quantize.ue8m0(cutlass.max(low(pair), pair & 0x7FFF_0000))
            if tile.lane % 4 == 0:
                self.scales[tile.row + i, tile.column // quantize.MXFP8_BLOCK] = code
            found[i] = quantize.inverse(code)
        return found

    def factor(self, factors: cute.Tensor, i: int) -> Float32:
        return factors[i]

    def end(self, first: Int32, turn: Int32, chunk: Int32) -> None:
        self.scales.store(first, chunk * (self.config.columns // quantize.MXFP8_BLOCK))


class ColumnMxfp8(CopyMxfp8):
    """Blocks down the rows: one in each of the thread's columns, a pair of which is a word."""

    def peaks(self) -> cute.Tensor:
        found = cute.make_rmem_tensor(PAIRS, Int32)
        found.fill(0)
        return found

    def see(self, peaks: cute.Tensor, unsigned: list[Int32], i: int) -> None:
        for j in range(PAIRS):
            peaks[j] = largest(peaks[j], unsigned[j])

    @cute.jit
    def factors(self, peaks: cute.Tensor, turn: Int32) -> cute.Tensor:
        tile, config, found = self.tile, self.config, cute.make_rmem_tensor(VECTOR, Float32)
        for j in cutlass.range_constexpr(PAIRS):
            pair = peaks[j]
            distance = config.lanes
            while cutlass.const_expr(distance < 32):
                pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, distance))
                distance *= 2
            codes = quantize.ue8m0(low(pair)), quantize.ue8m0(high(pair))
            for half in cutlass.range_constexpr(2):
                found[2 * j + half] = quantize.inverse(codes[half])
                if tile.lane < config.lanes:
                    block = (tile.row + turn * config.rows) // quantize.MXFP8_BLOCK
                    self.scales[tile.column + 2 * j + half, block] = codes[half]
        return found

    def factor(self, factors: cute.Tensor, i: int):  # type: ignore[no-untyped-def]
        return factors.load()

    @cute.jit
    def end(self, first: Int32, turn: Int32, chunk: Int32) -> None:
        if turn == self.tile.turns - 1:
            self.scales.store(
                chunk * self.config.columns,
                first // quantize.MXFP8_BLOCK - turn * (self.config.rows // quantize.MXFP8_BLOCK),
            )


class Nvfp4(Fixed):
    """Two passes: `measure` finds the largest magnitude of the tensor, or of the segment that the tile lies in, which
    `write` scales by. Down the rows a thread's 16 are one block of each of its 8 columns. It writes a few blocks before
    it looks at the next: peaks of all first, and the compiler keeps 128 FP32 values for the second look."""

    def __init__(self, tile, copy: Copy, smem: SmemAllocator) -> None:  # type: ignore[no-untyped-def]
        self.tile, self.config, self.copy = tile, tile.config, copy
        self.data, self.amax = tile.named[copy.name], tile.named[f"{copy.name}_amax"]
        size = (self.config.rows * (1 if copy.axis else tile.turns), self.config.columns)
        lines, length = size if copy.axis else size[::-1]
        self.scales = Scales(tile, copy, smem, lines, length // nvfp4.NVFP4_BLOCK)
        self.warps = smem.allocate_tensor(Int32, cute.make_layout(self.config.threads // 32), 16)
        self.seed = None
        if copy.rounding == "stochastic":
            self.seed = tile.named[tile.problem.seed(copy)] + tile.named["counter"][0]

    def column(self, values, j: int):  # type: ignore[no-untyped-def]
        """FP32 registers with column j of the thread's 16 rows, transformed if the copy is."""
        held = cute.make_rmem_tensor(nvfp4.NVFP4_BLOCK, Float32)
        held.store(values[j, None].load().to(Float32))
        if self.copy.hadamard:
            nvfp4.hadamard(held)
        return held

    @cute.jit
    def peak(self, values: cute.Tensor) -> Int32:
        """The bits of the largest magnitude of FP32 registers."""
        found = quantize.magnitude(values[0])
        for i in cutlass.range_constexpr(1, cute.size(values)):
            found = cutlass.max(found, quantize.magnitude(values[i]))
        return found

    @cute.jit
    def largest(self, values) -> Int32:  # type: ignore[no-untyped-def]
        """The bits of the largest magnitude that this thread holds of what the copy rounds."""
        found = Int32(0)
        if cutlass.const_expr(self.copy.hadamard):
            for j in cutlass.range_constexpr(VECTOR):
                found = cutlass.max(found, self.peak(self.column(values, j)))
        else:
            words = cute.recast_tensor(values, Int32)
            pair = words[0] & UNSIGNED
            for i in cutlass.range_constexpr(1, cute.size(words)):
                pair = largest(pair, words[i] & UNSIGNED)
            found = cutlass.max(low(pair), pair & 0x7FFF_0000)
        return found

    @cute.jit
    def measure(self, values, group: Int32) -> None:  # type: ignore[no-untyped-def]
        """Raises amax[group] to the tile's largest magnitude."""
        lane = self.tile.lane
        found = cute.arch.warp_redux_sync(self.largest(values), "max")
        cute.arch.sync_threads()
        if lane == 0:
            self.warps[self.tile.thread // 32] = found
        cute.arch.sync_threads()
        if self.tile.thread < 32:
            found = self.warps[lane] if lane < self.config.threads // 32 else Int32(0)
            found = cute.arch.warp_redux_sync(found, "max")
            if lane == 0:
                cute.arch.atomic_max(cute.recast_ptr(self.amax.iterator, dtype=Int32) + group, found)

    @cute.jit
    def square(self, values, scale: Float32):  # type: ignore[no-untyped-def]
        """Codes and factors of the lines of a square block, the 16 × 16 tile that a thread and its neighbour hold."""
        if cutlass.const_expr(not self.copy.square):
            return None, None
        found = self.largest(values)
        peak = quantize.as_float(cutlass.max(found, cute.arch.shuffle_sync_bfly(found, 1)))
        return nvfp4.square_scales(peak, scale)

    @cute.jit
    def pack(self, values, word: Int32, shift: cutlass.Constexpr):  # type: ignore[no-untyped-def]
        """Codes of eight elements in a word, the first lowest. `word`s: random bytes of the first and last four."""
        packed = Int32(0)
        if cutlass.const_expr(self.seed is None and self.tile.converts):
            packed = nvfp4.converted(values, shift)
        elif cutlass.const_expr(self.seed is None):
            packed = nvfp4.elements(values, shift)
        else:
            for i in cutlass.range_constexpr(VECTOR):
                byte = word[i // 4] >> 8 * (i % 4) & 0xFF
                packed |= nvfp4.stochastic_element(values[i + shift], byte) << 4 * i
        return packed


class RowNvfp4(Nvfp4):
    @cute.jit
    def write(
        self, values, spot, first: Int32, turn: Int32, chunk: Int32, group: Int32, entry: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        tile, config = self.tile, self.config
        scale = nvfp4.encode_scale(self.amax[group])
        codes, factors = self.square(values, scale)
        block = tile.column // nvfp4.NVFP4_BLOCK
        first_block = chunk * (config.columns // nvfp4.NVFP4_BLOCK)
        odd = tile.lane % 2 == 1
        for i in cutlass.range_constexpr(config.vectors):
            at = i % nvfp4.SCALES
            if cutlass.const_expr(at == 0 and not self.copy.square):
                codes, factors = nvfp4.block_scales(self.row_peaks(values, i), scale)
            row = cute.make_rmem_tensor(VECTOR, Float32)
            row.store(values[None, i].load().to(Float32) * factors[at])
            words = None
            if cutlass.const_expr(self.seed is not None):
                w = nvfp4.random_words(self.seed, first_block + block, spot.row + i, entry)
                words = [w[2] if odd else w[0], w[3] if odd else w[1]]
            packed = self.pack(row, words, 0)
            if spot.exists[i]:
                place = cute.assume(Int64(spot.row + i) * self.data.shape[1] + spot.column // 2, divby=4)
                cute.recast_tensor(cute.make_tensor(self.data.iterator + place, cute.make_layout(4)), Int32)[
                    0
                ] = packed
            if tile.lane % 2 == 0:
                self.scales.held[tile.row + i, block] = codes[at]
        self.scales.store(first, first_block)

    @cute.jit
    def row_peaks(self, values, first: cutlass.Constexpr) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """Of the blocks of the thread's rows from `first` on, which it shares with its neighbour."""
        peaks = cute.make_rmem_tensor(nvfp4.SCALES, Float32)
        for i in cutlass.range_constexpr(nvfp4.SCALES):
            row = cute.make_rmem_tensor(VECTOR, Float32)
            row.store(values[None, first + i].load().to(Float32))
            found = self.peak(row)
            peaks[i] = quantize.as_float(cutlass.max(found, cute.arch.shuffle_sync_bfly(found, 1)))
        return peaks


class ColumnNvfp4(Nvfp4):
    @cute.jit
    def write(
        self, values, spot, first: Int32, turn: Int32, chunk: Int32, group: Int32, entry: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        tile, config = self.tile, self.config
        scale = nvfp4.encode_scale(self.amax[group])
        codes, factors = self.square(values, scale)
        half = config.rows // nvfp4.NVFP4_BLOCK
        block = spot.row // nvfp4.NVFP4_BLOCK
        stride = self.data.shape[1]
        for j in cutlass.range_constexpr(VECTOR):
            column = self.column(values, j)
            if cutlass.const_expr(not self.copy.square):
                peak = cute.make_rmem_tensor(1, Float32)
                peak[0] = quantize.as_float(self.peak(column))
                codes, factors = nvfp4.block_scales(peak, scale)
            column.store(column.load() * factors[0])
            packed = cute.make_rmem_tensor(2, Int32)
            words = [None] * 4
            if cutlass.const_expr(self.seed is not None):
                words = nvfp4.random_words(self.seed, block, spot.column + j, entry)
            packed[0], packed[1] = self.pack(column, words[:2], 0), self.pack(column, words[2:], VECTOR)
            if spot.exists[0]:
                place = cute.assume(Int64(spot.column + j) * stride + spot.row // 2, divby=8)
                cute.autovec_copy(
                    cute.recast_tensor(packed, Uint8),
                    cute.make_tensor(self.data.iterator + place, cute.make_layout(8)),
                )
            self.scales.held[tile.column + j, tile.row // nvfp4.NVFP4_BLOCK + turn * half] = codes[0]
        if turn == tile.turns - 1:
            self.scales.store(chunk * config.columns, (first // config.rows - turn) * half)
