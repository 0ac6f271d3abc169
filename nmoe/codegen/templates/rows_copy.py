"""Quantized copies of a tile of BF16 results, bit for bit as nmoe.formats rounds.

A block's largest magnitude is found on pairs of BF16 without their signs: NaN comes through. Along a row it is that of the
columns of neighbouring lanes, down the rows that of a thread's rows and the lanes below it. Scale factors are gathered in shared memory
and written by all threads, in the layout that the consumer reads: rows, or 128 × 4 atoms (formats.to_blocked).
"""

from __future__ import annotations

import cutlass
from cutlass import Float8E4M3FN, Float32, Int32, Uint8, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.rows import ATOM_ROWS, ATOM_SCALES, VECTOR, Copy
from nmoe.codegen.templates import quantize
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.rows_body import vector

PAIRS = VECTOR // 2
UNSIGNED = 0x7FFF_7FFF  # a pair of BF16 without signs


def copies(tile, smem: SmemAllocator):  # type: ignore[no-untyped-def]
    return [{0: ColumnMxfp8, 1: RowMxfp8}[copy.axis](tile, copy, smem) for copy in tile.problem.copies]


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
        """Writes the tile's scales, of which (line, block) is the first. Those past the end of the tensor fill its atoms."""
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
                self._byte(line + item // self.blocks, block + item % self.blocks, self.held[item // self.blocks, item % self.blocks])
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
                self.target[atom, column, line % 32 * 16 + line % ATOM_ROWS // 32 * 4 + block % ATOM_SCALES] = code
        elif (line < self.target.shape[0]) & (block < self.target.shape[1]):
            self.target[line, block] = code


class Mxfp8(Fixed):
    def __init__(self, tile, copy: Copy, smem: SmemAllocator) -> None:  # type: ignore[no-untyped-def]
        self.tile, self.config, self.data = tile, tile.config, tile.named[copy.name]
        size = (self.config.rows, self.config.columns)
        lines, length = size if copy.axis else size[::-1]
        self.scales = Scales(tile, copy, smem, lines, length // quantize.MXFP8_BLOCK)

    @cute.jit
    def row(self, values, spot, i: cutlass.Constexpr, factor) -> None:  # type: ignore[no-untyped-def]
        """Stores a row's eight elements, times `factor`."""
        codes = cute.make_rmem_tensor(VECTOR, Float8E4M3FN)
        codes.store((values[None, i].load().to(Float32) * factor).to(Float8E4M3FN))
        if spot.exists[i]:
            cute.autovec_copy(cute.recast_tensor(codes, Uint8), vector(self.data, spot.row + i, spot.column))


class RowMxfp8(Mxfp8):
    @cute.jit
    def write(self, values, spot, first: Int32, chunk: Int32) -> None:  # type: ignore[no-untyped-def]
        tile, config = self.tile, self.config
        words = cute.recast_tensor(values, Int32)
        for i in cutlass.range_constexpr(config.vectors):
            pair = words[0, i] & UNSIGNED
            for j in cutlass.range_constexpr(1, PAIRS):
                pair = largest(pair, words[j, i] & UNSIGNED)
            pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, 1))
            pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, 2))
            code = quantize.ue8m0(cutlass.max(low(pair), pair & 0x7FFF_0000))
            self.row(values, spot, i, quantize.inverse(code))
            if tile.lane % 4 == 0:
                self.scales[tile.row + i, tile.column // quantize.MXFP8_BLOCK] = code
        self.scales.store(first, chunk * (config.columns // quantize.MXFP8_BLOCK))


class ColumnMxfp8(Mxfp8):
    @cute.jit
    def write(self, values, spot, first: Int32, chunk: Int32) -> None:  # type: ignore[no-untyped-def]
        tile, config = self.tile, self.config
        words = cute.recast_tensor(values, Int32)
        factors = cute.make_rmem_tensor(VECTOR, Float32)
        for j in cutlass.range_constexpr(PAIRS):
            pair = words[j, 0] & UNSIGNED
            for i in cutlass.range_constexpr(1, config.vectors):
                pair = largest(pair, words[j, i] & UNSIGNED)
            distance = config.lanes
            while cutlass.const_expr(distance < 32):
                pair = largest(pair, cute.arch.shuffle_sync_bfly(pair, distance))
                distance *= 2
            codes = quantize.ue8m0(low(pair)), quantize.ue8m0(high(pair))
            for half in cutlass.range_constexpr(2):
                factors[2 * j + half] = quantize.inverse(codes[half])
                if tile.lane < config.lanes:
                    self.scales[tile.column + 2 * j + half, tile.row // quantize.MXFP8_BLOCK] = codes[half]
        factor = factors.load()
        for i in cutlass.range_constexpr(config.vectors):
            self.row(values, spot, i, factor)
        self.scales.store(chunk * config.columns, first // quantize.MXFP8_BLOCK)
