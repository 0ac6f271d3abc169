"""Which output tile a cluster works on next, read from the experts' offsets on the device.

Every warp of a cluster walks the same sequence by itself: tile numbers `cluster, cluster + clusters, …`. Nothing is
exchanged between clusters, so the order of the work, and with it every sum, is the same in every run.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute

from nmoe.codegen.templates.fixed import Fixed

NEVER = 1 << 30  # no tile has this number


class RaggedRows(Fixed):
    """Tiles of an [R, n] result whose rows belong to experts, each segment padded to `tile_m` rows.

    An expert's tiles are numbered in bands of `band` row blocks (a block is the `cluster` row tiles of one cluster):
    down a band first, then along n, so that the clusters that run together share a band's rows of A and a few
    column tiles of B in L2.
    """

    def __init__(self, experts: int, tile_m: int, columns: int, cluster: int, band: int) -> None:
        self.experts, self.tile_m, self.columns = experts, tile_m, columns
        self.cluster, self.band = cluster, band

    @cute.jit
    def _tiles(self, offsets: cute.Tensor, expert: Int32) -> Int32:
        """How many tiles an expert has; past the last one, more than any tile number."""
        count = Int32(NEVER)
        if expert < self.experts:
            rows = offsets[expert + 1] - offsets[expert]
            count = cute.ceil_div(rows, self.tile_m * self.cluster) * self.columns
        return count

    @cute.jit
    def seek(self, offsets: cute.Tensor, tile: Int32, expert: Int32, first: Int32):  # type: ignore[no-untyped-def]
        """(expert of a tile, the number of that expert's first tile), from those of an earlier tile.

        The expert is `experts` when there is no such tile.
        """
        count = self._tiles(offsets, expert)
        while tile >= first + count:
            first += count
            expert += 1
            count = self._tiles(offsets, expert)
        return expert, first

    @cute.jit
    def place(self, offsets: cute.Tensor, local: Int32, expert: Int32, rank: Int32):  # type: ignore[no-untyped-def]
        """(row tile, column tile, is there such a row tile) of CTA `rank` for an expert's tile `local`.

        The last block of a segment may have row tiles too few; the CTA without one repeats its neighbour's loads,
        because the cluster shares B, and stores nothing.
        """
        rows = offsets[expert + 1] - offsets[expert]
        row_tiles = cute.ceil_div(rows, self.tile_m)
        blocks = cute.ceil_div(row_tiles, self.cluster)
        start = local // (self.band * self.columns) * self.band
        within = local % (self.band * self.columns)
        height = cutlass.min(blocks - start, self.band)
        row = (start + within % height) * self.cluster + rank
        exists = row < row_tiles
        row = row if exists else row - rank
        return offsets[expert] // self.tile_m + row, within // height, exists


class RaggedDepth(Fixed):
    """Tiles of an [E, m, n] result that contracts each expert's rows: a fixed number an expert, of varying depth."""

    def __init__(self, experts: int, rows: int, columns: int, cluster: int) -> None:
        self.experts, self.rows, self.columns, self.cluster = experts, rows, columns, cluster
        self.blocks = -(-rows // cluster)
        self.each = self.blocks * columns
        self.total = experts * self.each

    @cute.jit
    def place(self, tile: Int32, rank: Int32):  # type: ignore[no-untyped-def]
        """(row tile, column tile, expert) of CTA `rank`; a row tile past the last is clipped by the stores."""
        local = tile % self.each
        return local % self.blocks * self.cluster + rank, local // self.blocks, tile // self.each
