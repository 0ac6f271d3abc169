"""Which output tile a cluster works on next, read from the experts' offsets on the device.

Every role of a cluster walks the same sequence by itself: tile numbers `cluster, cluster + clusters, …`. Nothing is
exchanged between clusters, so the order of the work, and with it every sum, is the same in every run.

    tile, expert, first = tiles.begin(segments, cluster)
    while tiles.live(tile, expert):
        place = tiles.place(segments, tile, expert, first, rank)
        …
        tile, expert, first = tiles.seek(segments, tile + clusters, expert, first)
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, cute

from nmoe.codegen.gemm import ROW_TILE, Blocks
from nmoe.codegen.templates.fixed import Fixed

NEVER = 1 << 30  # no tile has this number


class Place(NamedTuple):
    """A thread block's part of a tile: its row tile, column tile and expert, the slices of the contracted dimension
    [begin, begin + slices), whether there is anything to store, and whether the cluster's thread blocks are in
    neighbouring column tiles of one row tile instead of neighbouring row tiles of one column tile."""

    row: Int32
    column: Int32
    expert: Int32
    begin: Int32
    slices: Int32
    exists: Boolean
    apart: Boolean


class Segments(Fixed):
    """Where each expert's rows begin and end: read from `offsets`, or, without, one segment of all `rows`."""

    def __init__(self, offsets: cute.Tensor | None, rows: Int32) -> None:
        self.offsets, self.rows = offsets, rows

    def begin(self, expert: Int32) -> Int32:
        return Int32(0) if self.offsets is None else self.offsets[expert]

    def end(self, expert: Int32) -> Int32:
        return self.rows if self.offsets is None else self.offsets[expert + 1]


class Ragged(Fixed):
    """The tiles of all experts, each expert's dealt out in `blocks`."""

    blocks: Blocks

    @cute.jit
    def spot(self, local: Int32, row_tiles, block: Int32, column: Int32, rank: Int32):  # type: ignore[no-untyped-def]
        """(row tile of the expert, column tile, whether it exists, apart) of the thread block `rank` in tile number
        `local` of the expert, which is block `block` of column tile `column` unless it is beyond all blocks.

        Without a tile of its own a thread block takes part in the cluster's loads and stores nothing.
        """
        row, apart = block * self.blocks.cluster + rank, Boolean(False)
        exists = row < row_tiles
        row = row if exists else row - rank
        if cutlass.const_expr(self.blocks.parts):
            beyond = local - self.blocks.whole(row_tiles) * self.blocks.columns
            apart = beyond >= 0
            row = Int32(row_tiles) - 1 if apart else row
            column = beyond * self.blocks.cluster + rank if apart else column
            exists = column < self.blocks.columns
        return row, column, exists, apart


class RaggedRows(Ragged):
    """Tiles of an [R, n] result whose rows belong to experts, each segment padded to whole row tiles.

    An expert's tiles are numbered in bands of `band` row blocks: down a band first, then along n, so that the clusters
    that run together share a band's rows of A and a few column tiles of B in L2; its last row tile's, apart, come last.
    """

    def __init__(self, experts: int, slices: int, blocks: Blocks, band: int) -> None:
        self.experts, self.slices, self.blocks, self.band = experts, slices, blocks, band

    @cute.jit
    def begin(self, segments: Segments, cluster: Int32):  # type: ignore[no-untyped-def]
        return self.seek(segments, cluster, Int32(0), Int32(0))

    def live(self, tile: Int32, expert: Int32) -> Boolean:
        return expert < self.experts

    @cute.jit
    def _tiles(self, segments: Segments, expert: Int32) -> Int32:
        """How many tiles an expert has; past the last one, more than any tile number."""
        count = Int32(NEVER)
        if expert < self.experts:
            rows = segments.end(expert) - segments.begin(expert)
            count = self.blocks.count(cute.ceil_div(rows, ROW_TILE))
        return count

    @cute.jit
    def seek(self, segments: Segments, tile: Int32, expert: Int32, first: Int32):  # type: ignore[no-untyped-def]
        """(tile, its expert, the number of that expert's first tile), from those of an earlier tile.

        The expert is `experts` when there is no such tile.
        """
        count = self._tiles(segments, expert)
        while tile >= first + count:
            first += count
            expert += 1
            count = self._tiles(segments, expert)
        return tile, expert, first

    @cute.jit
    def place(self, segments: Segments, tile: Int32, expert: Int32, first: Int32, rank: Int32) -> Place:
        row_tiles = cute.ceil_div(segments.end(expert) - segments.begin(expert), ROW_TILE)
        local = tile - first
        start = local // (self.band * self.blocks.columns) * self.band
        within = local % (self.band * self.blocks.columns)
        height = cutlass.max(cutlass.min(self.blocks.whole(row_tiles) - start, self.band), 1)
        row, column, exists, apart = self.spot(
            local, row_tiles, start + within % height, within // height, rank
        )
        row += segments.begin(expert) // ROW_TILE
        return Place(row, column, expert, Int32(0), Int32(self.slices), exists, apart)


class RaggedDepth(Ragged):
    """Tiles of an [E, n, k] result that contracts each expert's rows, `depth` of them a slice: a fixed number an
    expert, of varying depth."""

    def __init__(self, experts: int, rows: int, depth: int, blocks: Blocks) -> None:
        self.depth, self.blocks = depth, blocks
        self.row_tiles = -(-rows // ROW_TILE)
        self.each = blocks.count(self.row_tiles)
        self.total = experts * self.each

    @cute.jit
    def begin(self, segments: Segments, cluster: Int32):  # type: ignore[no-untyped-def]
        return cluster, Int32(0), Int32(0)

    def live(self, tile: Int32, expert: Int32) -> Boolean:
        return tile < self.total

    @cute.jit
    def seek(self, segments: Segments, tile: Int32, expert: Int32, first: Int32):  # type: ignore[no-untyped-def]
        return tile, expert, first

    @cute.jit
    def place(self, segments: Segments, tile: Int32, expert: Int32, first: Int32, rank: Int32) -> Place:
        """Nothing is done for an expert without rows."""
        expert = tile // self.each
        local = tile % self.each
        begin, end = segments.begin(expert) // self.depth, cute.ceil_div(segments.end(expert), self.depth)
        whole = max(self.blocks.whole(self.row_tiles), 1)
        row, column, exists, apart = self.spot(local, self.row_tiles, local % whole, local // whole, rank)
        exists = exists and end > begin
        return Place(row, column, expert, begin, end - begin, exists, apart)
