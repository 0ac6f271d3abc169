"""Shared-memory layouts and tensor views that TMA, the tensor cores and the epilogues agree on."""

from __future__ import annotations

from cutlass import BFloat16, cute

from nmoe.codegen.gemm import ROWS, SLICE, Modes

PIECE_BYTES = 128  # width of an epilogue piece, and of the swizzle


def major(mn_major: bool) -> cute.nvgpu.OperandMajorMode:
    """What the MMA is told of an operand whose rows (not its depth) are contiguous."""
    return cute.nvgpu.OperandMajorMode.MN if mn_major else cute.nvgpu.OperandMajorMode.K


def operand(mn_major: bool, rows: int, stages: int) -> cute.ComposedLayout:
    """BF16 stages [rows, 64, stages]; each half of the rows is contiguous, so that it can be one box of TMA."""
    kind = cute.nvgpu.warpgroup.SmemLayoutAtomKind
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(kind.MN_SW128 if mn_major else kind.K_SW128, BFloat16)
    return cute.tile_to_shape(atom, (rows, SLICE, stages), order=(1, 0, 2) if mn_major else (0, 1, 2))


def buffers(element, rows: int, count: int) -> cute.ComposedLayout:  # type: ignore[no-untyped-def]
    """Epilogue buffers [rows, 128 bytes, count]."""
    kind = cute.nvgpu.warpgroup.SmemLayoutAtomKind.K_SW128
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(kind, element)
    return cute.tile_to_shape(atom, (rows, PIECE_BYTES * 8 // element.width, count), order=(0, 1, 2))


def view(tensor: cute.Tensor, modes: Modes) -> cute.Tensor:
    """The tensor with other modes, each (extent, stride) in elements; ROWS stands for its dynamic first extent."""
    shape = tuple(tensor.shape[0] if extent == ROWS else extent for extent, _ in modes)
    return cute.make_tensor(tensor.iterator, cute.make_layout(shape, stride=tuple(s for _, s in modes)))


def widened(coordinates: cute.Tensor) -> cute.Tensor:
    """A TMA's coordinates for at least two of the largest tiles each way. CuTe gives a mode of one tile the stride 0,
    so that tiles past the end of a small tensor would be its first again; wider, TMA sees and clips them."""
    rows, columns, *rest = coordinates.shape
    wide = (_at_least(rows), _at_least(columns), *rest)
    return cute.make_tensor(coordinates.iterator, cute.make_layout(wide, stride=coordinates.stride))


def _at_least(extent):  # type: ignore[no-untyped-def]
    return max(extent, 512) if isinstance(extent, int) else extent
