"""Rows by their tokens: an operand's slices by TMA's tile::gather4 (sm_100a), four rows of 128 bytes an instruction.

    row_source[R] ── 16 bytes a lane ──▶ lane q of the load warp: the tokens of rows 4q … 4q + 3 of a slice
                                              │ shuffled to the thread that issues
    x[T, width] ── gather4 {column, 4 tokens} ▼
    stage: 512 bytes, swizzled by their address like a box's

An operand's rows lie across the depth or along it: either way its pieces in shared memory are 128 bytes of four rows.
A padding row's source is −1, which is no token: TMA fills it with zeros and counts its bytes. The sources of the next
slice are fetched while this one is issued.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.gemm import ROW_TILE
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.grouped import Copy

QUAD = 4  # rows that an instruction gathers


def _chosen(pointer: cute.Pointer, shape) -> cute.Tensor:  # type: ignore[no-untyped-def]
    """Indices of rows as CuTe wants them: those of a row's elements are one."""
    return cute.make_tensor(pointer, cute.make_layout(shape, stride=(1, 0)))


def copy(group, tensor: cute.Tensor, row_source: cute.Tensor) -> Copy:  # type: ignore[no-untyped-def]
    """The TMA copy of four rows of [T, width] into a piece of shared memory."""
    piece = layouts.piece(tensor.element_type, QUAD)
    made = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensor2DGather4G2SOp(group), tensor, piece, piece.shape,
        gmem_coord_tensor=_chosen(row_source.iterator, tensor.shape),
    )  # fmt: skip
    return Copy(made.atom, layouts.widened(made.tma_tensor))


class Gather(Fixed):
    """Loads of one operand into `stages` [lines, depth, stages], as the product reads them."""

    def __init__(self, gemm, copied: Copy, row_source: cute.Tensor, stages: cute.Tensor) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.atom = gemm, copied.atom
        self.across = gemm.problem.ragged == "rows"
        piece = layouts.piece(stages.element_type, QUAD).shape
        divided = cute.flat_divide(stages, piece if self.across else piece[::-1])
        order = [0, 1, 2, 3, 4] if self.across else [1, 0, 3, 2, 4]
        pieces = cute.make_tensor(divided.iterator, cute.select(divided.layout, order))
        self.quads, self.boxes = (cute.size(pieces, mode=[i]) for i in (2, 3))
        self.sources = cute.zipped_divide(row_source, (QUAD,))
        self.ahead, self.tokens, self.rows = (cute.make_rmem_tensor((QUAD,), Int32) for _ in range(3))
        columns = cute.local_tile(copied.tensor, piece, (0, None))
        self.pieces, self.columns, self.chosen = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1),
            cute.group_modes(pieces, 0, 2),
            [cute.group_modes(t, 0, 2) for t in (columns, _chosen(self.rows.iterator, piece))],
        )  # fmt: skip

    @cute.jit
    def fetch(self, place, k: Int32) -> None:  # type: ignore[no-untyped-def]
        """Begins to read the sources of the rows of slice k."""
        first = place.row * ROW_TILE if cutlass.const_expr(self.across) else k * self.gemm.problem.slice
        cute.autovec_copy(self.sources[None, first // QUAD + cute.arch.lane_idx() % self.quads], self.ahead)

    @cute.jit
    def turn(self, place, k: Int32) -> None:  # type: ignore[no-untyped-def]
        """Makes slice k, whose sources were fetched, the one to load, and fetches those of the next."""
        for i in cutlass.range_constexpr(QUAD):
            self.tokens[i] = self.ahead[i] // self.gemm.problem.topk
        self.fetch(place, cutlass.min(k + 1, place.begin + place.slices - 1))

    @cute.jit
    def load(self, k: Int32, block: Int32, stage: Int32, full) -> None:  # type: ignore[no-untyped-def]
        """Slice k into a stage, whose barrier counts its bytes; along the depth, of the columns `block`, of which each
        has as many as a stage has lines."""
        first = k if cutlass.const_expr(self.across) else block * self.boxes
        for quad in cutlass.range_constexpr(self.quads):
            for i in cutlass.range_constexpr(QUAD):
                self.rows[i] = cute.arch.shuffle_sync(self.tokens[i], quad)
            for box in cutlass.range_constexpr(self.boxes):
                cute.copy(
                    self.atom, [self.columns[None, first + box], self.chosen],
                    self.pieces[None, quad, box, stage], tma_bar_ptr=full,
                )  # fmt: skip
