"""The producer: walks the tiles and fills the ring's stages by TMA."""

from __future__ import annotations

import cutlass
from cutlass import Int16, Int32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.gemm import ROW_TILE
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.ring import Ring
from nmoe.codegen.templates.tiles import Segments


class Loader(Fixed):
    """Loads A[128, slice] and B[tile_n, slice] of each slice, with their scale factors where there are any.

    B comes in two boxes of tile_n / 2 rows: the left and right columns of a tile, or its gate and up columns. Alone, a
    thread block loads both. In a cluster of two each loads one of them: `shared` B is multicast to both (Hopper), but
    in tiles where they are apart each loads a B of its own; otherwise B stays split between the pair, whose MMA reads
    both parts (Blackwell), and the bytes of both thread blocks are counted by the first one's barrier. A gathered
    operand is loaded by `gather`: each of its warps comes here, and the first loads the rest.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self, gemm, ring: Ring, a, b, a_stages, b_stages, shared: bool, scales=None, gather=None
    ) -> None:
        self.gemm, self.ring, self.shared, self.scales, self.gather = gemm, ring, shared, scales, gather
        self.gathered = gemm.problem.gathered
        self.a_atom, a_tensor = a
        self.b_atom, b_tensor = b
        half, depth = gemm.config.tile_n // 2, gemm.problem.slice
        one = cute.make_layout(1)
        if cutlass.const_expr(self.gathered != "a"):
            ga = cute.local_tile(a_tensor, (ROW_TILE, depth), (None, None))
            self.sa, self.ga = cpasync.tma_partition(
                self.a_atom, 0, one, cute.group_modes(a_stages, 0, 2), cute.group_modes(ga, 0, 2)
            )
        if cutlass.const_expr(self.gathered != "b"):
            gb = cute.local_tile(b_tensor, (half, depth), (None, None, None, None))
            halves = cute.flat_divide(b_stages, (half, depth))[None, None, None, 0, None]
            self.sb, self.gb = cpasync.tma_partition(
                self.b_atom, 0, one, cute.group_modes(halves, 0, 2), cute.group_modes(gb, 0, 2)
            )
        per_block = gemm.problem.stage_bytes(gemm.config, cute.size(b_stages, mode=[0]))
        self.stage_bytes = per_block if shared or gemm.cluster == 1 else 2 * per_block

    @cute.jit
    def run(self, segments: Segments, cluster: Int32, clusters: Int32, rank: Int32) -> None:
        tiles = self.gemm.tiles
        stage, phase = Int32(0), Int32(1)
        tile, expert, first = tiles.begin(segments, cluster)
        while tiles.live(tile, expert):
            place = tiles.place(segments, tile, expert, first, rank)
            if cutlass.const_expr(self.gather is not None):
                if place.slices > 0:
                    self.gather.begin(place)
            for k in cutlass.range(place.begin, place.begin + place.slices, unroll=1):
                self._fill(place, k, rank, stage, phase)
                stage, phase = self.ring.after(stage, phase)
            tile, expert, first = tiles.seek(segments, tile + clusters, expert, first)

    @cute.jit
    def _fill(self, place, k: Int32, rank: Int32, stage: Int32, phase: Int32) -> None:  # type: ignore[no-untyped-def]
        if cutlass.const_expr(self.gather is not None):
            self.gather.turn(place, k)
        cute.arch.mbarrier_wait(self.ring.empty + stage, phase)
        if cutlass.const_expr(self.gather is not None):
            if self.gather.warp == 0:
                self._boxes(place, k, rank, stage)
            block = place.row if self.gathered == "a" else self.gemm.cluster * place.column + rank
            self.gather.load(k, block, stage, self.ring.full + stage)
        else:
            self._boxes(place, k, rank, stage)

    @cute.jit
    def _boxes(self, place, k: Int32, rank: Int32, stage: Int32) -> None:  # type: ignore[no-untyped-def]
        """Announces the stage's bytes to its barrier and loads what lies in boxes."""
        full = self.ring.full + stage
        if cutlass.const_expr(self.shared or self.gemm.cluster == 1):
            self._announce(full)
        elif rank == 0:
            self._announce(full)
        if cutlass.const_expr(self.gathered != "a"):
            cute.copy(self.a_atom, self.ga[None, place.row, k], self.sa[None, stage], tma_bar_ptr=full)
        if cutlass.const_expr(self.scales is not None):
            self.scales.load(place, k, stage, full)
        if cutlass.const_expr(self.gathered != "b"):
            self._halves(place, k, rank, stage)

    @cute.jit
    def _announce(self, full) -> None:  # type: ignore[no-untyped-def]
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.stage_bytes)

    @cute.jit
    def _halves(self, place, k: Int32, rank: Int32, stage: Int32) -> None:  # type: ignore[no-untyped-def]
        """This thread block's boxes of B."""
        if cutlass.const_expr(self.gemm.cluster == 1):
            for half in cutlass.range_constexpr(2):
                self._half(place, k, half, half, stage)
        elif cutlass.const_expr(self.shared):
            if place.apart:
                for half in cutlass.range_constexpr(2):
                    self._half(place, k, half, half, stage, Int16(1) << Int16(rank))
            else:
                self._half(place, k, rank, rank, stage, Int16(3))
        else:
            self._half(place, k, rank, 0, stage)

    @cute.jit
    def _half(self, place, k: Int32, half, slot, stage: Int32, mask=None) -> None:  # type: ignore[no-untyped-def]
        """Box `half` of B into part `slot` of the stage, of the thread blocks in `mask` if it is multicast."""
        batch = 0 if cutlass.const_expr(self.gemm.problem.ragged == "depth") else place.expert
        if cutlass.const_expr(self.gemm.paired):
            box = self.gb[None, place.column, k, half, batch]
        else:
            box = self.gb[None, 2 * place.column + half, k, 0, batch]
        cute.copy(
            self.b_atom, box, self.sb[None, slot, stage], tma_bar_ptr=self.ring.full + stage, mcast_mask=mask
        )
