"""Rows by their tokens: an operand's slices by TMA's tile::gather4 (sm_100a), four rows of 128 bytes an instruction.

    row_source[R] ── 16 bytes, the same in every lane ──▶ warp w of WARPS: the tokens of its rows of a slice
                                                               │
    x[T, width] ── gather4 {column, 4 tokens} ─────────────────▼
    stage: 512 bytes, swizzled by their address like a box's

An operand's rows lie across the depth or along it: either way its pieces in shared memory are 128 bytes of four rows.
A padding row's source is −1, of which the quotient by the top k is no token: TMA fills it with zeros and counts its
bytes. Along the depth every slice has other rows, whose sources are fetched while the slice before is issued.

An instruction takes its tokens from uniform registers. Fed straight from a warp's own registers one warp of an H100
issues a TMA every 15 clocks, behind a shuffle and a branch every 133 (bench/tma_rows.cu); hence tokens that all lanes
hold, and two warps that share a slice's rows.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Uint32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.gemm import ROW_TILE
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.grouped import Copy

QUAD = 4  # rows that an instruction gathers
WARPS = 2


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
    """Loads of one operand into `stages` [lines, depth, stages], as the product reads them, by warps 0 .. WARPS − 1 of
    those that load."""

    def __init__(self, gemm, copied: Copy, row_source: cute.Tensor, stages: cute.Tensor, warp: Int32) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.atom, self.warp = gemm, copied.atom, warp
        self.across = gemm.problem.ragged == "rows"
        piece = layouts.piece(stages.element_type, QUAD).shape
        divided = cute.flat_divide(stages, piece if self.across else piece[::-1])
        order = [0, 1, 2, 3, 4] if self.across else [1, 0, 3, 2, 4]
        pieces = cute.make_tensor(divided.iterator, cute.select(divided.layout, order))
        quads, self.boxes = (cute.size(pieces, mode=[i]) for i in (2, 3))
        self.quads = quads // WARPS
        self.sources = cute.zipped_divide(row_source, (QUAD,))
        self.ahead, self.tokens = (cute.make_rmem_tensor((QUAD, self.quads), Int32) for _ in range(2))
        self.rows = cute.make_rmem_tensor((QUAD,), Int32)
        columns = cute.local_tile(copied.tensor, piece, (0, None))
        self.pieces, self.columns, self.chosen = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1),
            cute.group_modes(pieces, 0, 2),
            [cute.group_modes(t, 0, 2) for t in (columns, _chosen(self.rows.iterator, piece))],
        )  # fmt: skip

    @cute.jit
    def begin(self, place) -> None:  # type: ignore[no-untyped-def]
        """A tile of at least one slice."""
        if cutlass.const_expr(self.across):
            self._fetch(place.row * ROW_TILE)
            self._divide()
        else:
            self._fetch(place.begin * self.gemm.problem.slice)

    @cute.jit
    def turn(self, place, k: Int32) -> None:  # type: ignore[no-untyped-def]
        """Makes slice k the one to load, and begins to read the sources of the next."""
        if cutlass.const_expr(not self.across):
            self._divide()
            self._fetch(cutlass.min(k + 1, place.begin + place.slices - 1) * self.gemm.problem.slice)

    @cute.jit
    def _fetch(self, first: Int32) -> None:
        for i in cutlass.range_constexpr(self.quads):
            quad = first // QUAD + self.warp * self.quads + i
            cute.autovec_copy(self.sources[None, quad], self.ahead[None, i])

    def _divide(self) -> None:
        for i in range(QUAD * self.quads):
            self.tokens[i] = Int32(Uint32(self.ahead[i]) // self.gemm.problem.topk)

    @cute.jit
    def load(self, k: Int32, block: Int32, stage: Int32, full) -> None:  # type: ignore[no-untyped-def]
        """Slice k into a stage, whose barrier counts its bytes; along the depth, of the columns `block`, of which each
        has as many as a stage has lines."""
        first = k if cutlass.const_expr(self.across) else block * self.boxes
        for i in cutlass.range_constexpr(self.quads):
            for j in cutlass.range_constexpr(QUAD):
                self.rows[j] = self.tokens[j, i]
            for box in cutlass.range_constexpr(self.boxes):
                cute.copy(
                    self.atom, [self.columns[None, first + box], self.chosen],
                    self.pieces[None, self.warp * self.quads + i, box, stage], tma_bar_ptr=full,
                )  # fmt: skip
