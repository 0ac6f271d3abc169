"""The scale-factor layout of block-scaled MMA: 128×4 tiles as atoms of 512 bytes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def to_blocked(scale: Tensor, segments: Tensor | None = None, dim: Literal[-2, -1] = -2) -> Tensor:
    """Scales uint8 [..., R, C] → atoms [..., ceil(R/128), ceil(C/4), 32, 4, 4], padded with 0.

    Scale (r, c) lies in atom (r // 128, c // 4) at [r % 32, r % 128 // 32, c % 4], which is the order that
    tcgen05.cp's 32x128b.warpx4 reads (CUTLASS sm100_blockscaled_layout.hpp; cuBLAS's 128×4 tile). R is the
    index that the GEMM does not contract, for row and column copies alike. 0 is a finite scale in both
    types, so that padding adds nothing.

    With `segments` (offsets [G+1] in units of `dim`) each segment starts a new atom: along rows (dim -2)
    for fprop and dgrad, along scale columns (dim -1) for wgrad. Scales past the last segment are left out.
    Where the segments are multiples of the atom, the result is that without segments.
    """
    parts = (scale,) if segments is None else _split(scale, segments.tolist(), dim)
    scale = torch.cat([_pad(part) for part in parts], dim)
    *batch, rows, columns = scale.shape
    tiles = scale.view(*batch, rows // 128, 4, 32, columns // 4, 4)
    return tiles.movedim(-2, -4).transpose(-2, -3).contiguous()


def from_blocked(
    blocked: Tensor, rows: int, columns: int, segments: Tensor | None = None, dim: Literal[-2, -1] = -2
) -> Tensor:
    """The inverse of `to_blocked`: uint8 [..., rows, columns]; scales past the last segment are 0."""
    *batch, row_atoms, column_atoms, _, _, _ = blocked.shape
    tiles = blocked.transpose(-2, -3).movedim(-4, -2)
    padded = tiles.reshape(*batch, row_atoms * 128, column_atoms * 4)
    scale = blocked.new_zeros(*batch, rows, columns)
    start = 0
    for part in (scale,) if segments is None else _split(scale, segments.tolist(), dim):
        source = padded.narrow(dim, start, _ceil(part.shape[dim], dim))
        part.copy_(source[..., : part.shape[-2], : part.shape[-1]])
        start += source.shape[dim]
    return scale


def _split(scale: Tensor, offsets: list[int], dim: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(scale, offsets[1:], dim)[:-1]


def _ceil(size: int, dim: int) -> int:
    """`size` rounded up to whole atoms along `dim`."""
    atom = 128 if dim == -2 else 4
    return -(-size // atom) * atom


def _pad(scale: Tensor) -> Tensor:
    rows, columns = scale.shape[-2:]
    return torch.nn.functional.pad(scale, (0, _ceil(columns, -1) - columns, 0, _ceil(rows, -2) - rows))
