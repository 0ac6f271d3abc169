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

from nmoe.codegen.gemm import ROW_TILE
from nmoe.codegen.templates.fixed import Fixed

NEVER = 1 << 30  # no tile has this number


class Place(NamedTuple):
    """A thread block's part of a tile: its row tile, column tile and expert, the slices of the contracted dimension
    [begin, begin + slices) and whether there is anything to store."""

    row: Int32
    column: Int32
    expert: Int32
    begin: Int32
    slices: Int32
    exists: Boolean


class Segments(Fixed):
    """Where each expert's rows begin and end: read from `offsets`, or, without, one segment of all `rows`."""

    def __init__(self, offsets: cute.Tensor | None, rows: Int32) -> None:
        self.offsets, self.rows = offsets, rows

    def begin(self, expert: Int32) -> Int32:
        return Int32(0) if self.offsets is None else self.offsets[expert]

    def end(self, expert: Int32) -> Int32:
        return self.rows if self.offsets is None else self.offsets[expert + 1]


class RaggedRows(Fixed):
    """Tiles of an [R, n] result whose rows belong to experts, each segment padded to whole row tiles.

    An expert's tiles are numbered in bands of `band` row blocks (a block is the `cluster` row tiles of one cluster):
    down a band first, then along n, so that the clusters that run together share a band's rows of A and a few
    column tiles of B in L2.
    """

    def __init__(self, experts: int, columns: int, slices: int, cluster: int, band: int) -> None:
        self.experts, self.columns, self.slices = experts, columns, slices
        self.cluster, self.band = cluster, band

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
            count = cute.ceil_div(rows, ROW_TILE * self.cluster) * self.columns
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
        """The last block of a segment may have row tiles too few; the thread block without one repeats its
        neighbour's loads, because the cluster shares B, and stores nothing."""
        row_tiles = cute.ceil_div(segments.end(expert) - segments.begin(expert), ROW_TILE)
        blocks = cute.ceil_div(row_tiles, self.cluster)
        start = (tile - first) // (self.band * self.columns) * self.band
        within = (tile - first) % (self.band * self.columns)
        height = cutlass.min(blocks - start, self.band)
        row = (start + within % height) * self.cluster + rank
        exists = row < row_tiles
        row = row if exists else row - rank
        row += segments.begin(expert) // ROW_TILE
        return Place(row, within // height, expert, Int32(0), Int32(self.slices), exists)


class RaggedDepth(Fixed):
    """Tiles of an [E, n, k] result that contracts each expert's rows, `depth` of them a slice: a fixed number an
    expert, of varying depth."""

    def __init__(self, experts: int, rows: int, columns: int, depth: int, cluster: int) -> None:
        self.depth, self.cluster = depth, cluster
        self.blocks = -(-rows // (ROW_TILE * cluster))
        self.each = self.blocks * columns
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
        """Nothing is done for an expert without rows; a row tile past the last is clipped by the stores."""
        expert = tile // self.each
        local = tile % self.each
        begin, end = segments.begin(expert) // self.depth, cute.ceil_div(segments.end(expert), self.depth)
        row, column = local % self.blocks * self.cluster + rank, local // self.blocks
        return Place(row, column, expert, begin, end - begin, end > begin)
