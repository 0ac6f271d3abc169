"""Shared-memory layouts and tensor views that TMA, the tensor cores and the epilogues agree on."""

from __future__ import annotations

from cutlass import Float8E4M3FN, Int32, cute

from nmoe.codegen.gemm import ROWS, Modes

PIECE_BYTES = 128  # width of an epilogue piece, and of the swizzle


def major(mn_major: bool) -> cute.nvgpu.OperandMajorMode:
    """What the MMA is told of an operand whose rows (not its depth) are contiguous."""
    return cute.nvgpu.OperandMajorMode.MN if mn_major else cute.nvgpu.OperandMajorMode.K


def operand(element, mn_major: bool, rows: int, depth: int, stages: int) -> cute.ComposedLayout:  # type: ignore[no-untyped-def]
    """Stages [rows, depth, stages], 128 or, along the depth, 64 bytes wide; each half of the rows is contiguous, so
    that it can be one box of TMA."""
    kind = cute.nvgpu.warpgroup.SmemLayoutAtomKind
    narrow = not mn_major and depth * element.width == 64 * 8
    swizzle = kind.MN_SW128 if mn_major else kind.K_SW64 if narrow else kind.K_SW128
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(swizzle, element)
    return cute.tile_to_shape(atom, (rows, depth, stages), order=(1, 0, 2) if mn_major else (0, 1, 2))


def buffers(element, rows: int, count: int, transposed: bool) -> cute.ComposedLayout:  # type: ignore[no-untyped-def]
    """Epilogue buffers [rows, 128 bytes, count], of which a column's rows are contiguous if transposed."""
    kind = cute.nvgpu.warpgroup.SmemLayoutAtomKind
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(kind.MN_SW128 if transposed else kind.K_SW128, element)
    shape = (rows, PIECE_BYTES * 8 // element.width, count)
    return cute.tile_to_shape(atom, shape, order=(1, 0, 2) if transposed else (0, 1, 2))


def piece(element, rows: int) -> cute.ComposedLayout:  # type: ignore[no-untyped-def]
    """128 bytes of each of so many rows, at most the 8 of a swizzle atom."""
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(
        cute.nvgpu.warpgroup.SmemLayoutAtomKind.K_SW128, element
    )
    width = PIECE_BYTES * 8 // element.width
    return cute.make_composed_layout(atom.inner, 0, cute.make_layout((rows, width), stride=(width, 1)))


def copies(rows: int, count: int) -> cute.ComposedLayout:
    """E4M3 copies [rows, 64, count]: two, of one piece of BF16, take the space of that piece."""
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(
        cute.nvgpu.warpgroup.SmemLayoutAtomKind.K_SW64, Float8E4M3FN
    )
    return cute.tile_to_shape(atom, (rows, 64, count), order=(0, 1, 2))


def flat(tensor: cute.Tensor) -> cute.Tensor:
    """Elements that lie one after the other, in one mode."""
    return cute.make_tensor(tensor.iterator, cute.make_layout(cute.size(tensor)))


def view(tensor: cute.Tensor, element, modes: Modes, rows: Int32) -> cute.Tensor:  # type: ignore[no-untyped-def]
    """The tensor as `element`s with other modes, each (extent, stride); ROWS stands for `rows`."""
    shape = tuple(rows if extent == ROWS else extent for extent, _ in modes)
    # As a stride only of operands of 4 bits, whose rows TMA wants in whole 16 bytes.
    strides = tuple(cute.assume(rows, 32) if stride == ROWS else stride for _, stride in modes)
    start = cute.recast_ptr(tensor.iterator, dtype=element)
    return cute.make_tensor(start, cute.make_layout(shape, stride=strides))


def widened(coordinates: cute.Tensor) -> cute.Tensor:
    """A TMA's coordinates for at least two of the largest tiles each way. CuTe gives a mode of one tile the stride 0,
    so that tiles past the end of a small tensor would be its first again; wider, TMA sees and clips them."""
    rows, columns, *rest = coordinates.shape
    wide = (_at_least(rows), _at_least(columns), *rest)
    return cute.make_tensor(coordinates.iterator, cute.make_layout(wide, stride=coordinates.stride))


def _at_least(extent):  # type: ignore[no-untyped-def]
    return max(extent, 512) if isinstance(extent, int) else extent
