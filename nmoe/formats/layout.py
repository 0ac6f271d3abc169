"""The scale-factor layout of block-scaled MMA: 128×4 tiles as atoms of 512 bytes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def to_blocked(scale: Tensor, segments: Tensor | None = None, dim: Literal[-2, -1] = -2) -> Tensor:
    """Scales uint8 [..., R, C] → 512-byte atoms [..., ceil(R/128), ceil(C/4), 32, 4, 4], padded with 0.

    Scale (r, c) lies in atom (r // 128, c // 4) at [r % 32, r % 128 // 32, c % 4]: what tcgen05.cp spreads
    over tensor memory and cuBLAS calls the 128×4 tile (CUTLASS sm100_blockscaled_layout.hpp). R is the
    index that the GEMM does not contract. Zero is a finite scale in both types, so that padding contributes nothing.

    With `segments` (offsets [G+1] in units of `dim`) each segment starts a new atom: along rows (dim -2)
    for fprop and dgrad, along scale columns (dim -1) for wgrad. Scales past the last segment are dropped.
    """
    atom = 128 if dim == -2 else 4
    if segments is not None:
        parts = [_pad(part, dim, atom) for part in _split(scale, segments, dim)]
        scale = torch.cat(parts, dim)
    scale = _pad(_pad(scale, -2, 128), -1, 4)
    *batch, rows, columns = scale.shape
    tiles = scale.reshape(*batch, rows // 128, 4, 32, columns // 4, 4)
    return tiles.movedim(-2, -4).transpose(-2, -3).contiguous()


def from_blocked(
    blocked: Tensor, rows: int, columns: int, segments: Tensor | None = None, dim: Literal[-2, -1] = -2
) -> Tensor:
    """The inverse of `to_blocked`: uint8 [..., rows, columns]; scales past the last segment are 0."""
    tiles = blocked.transpose(-2, -3).movedim(-4, -2)
    scale = tiles.reshape(*tiles.shape[:-5], tiles.shape[-5] * 128, tiles.shape[-2] * 4)
    if segments is not None:
        atom = 128 if dim == -2 else 4
        sizes = segments.diff().tolist()
        padded = [-(-size // atom) * atom for size in sizes]
        parts = scale.narrow(dim, 0, sum(padded)).split(padded, dim)
        scale = torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)
        scale = _extend(scale, dim, rows if dim == -2 else columns)
    return scale[..., :rows, :columns].contiguous()


def _split(scale: Tensor, segments: Tensor, dim: int) -> tuple[Tensor, ...]:
    return scale.narrow(dim, 0, int(segments[-1])).split(segments.diff().tolist(), dim)


def _pad(scale: Tensor, dim: int, multiple: int) -> Tensor:
    return _extend(scale, dim, -(-scale.shape[dim] // multiple) * multiple)


def _extend(scale: Tensor, dim: int, size: int) -> Tensor:
    missing = size - scale.shape[dim]
    return torch.nn.functional.pad(scale, (0, missing) if dim == -1 else (0, 0, 0, missing))
