"""The random bits of stochastic rounding: a function of seed and position, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFF_FFFF


def philox(counter: tuple[Tensor | int, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, in int64, from four counters and a key.

    The key is (low word, high word) of `seed`. Counters broadcast against each other.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = seed & _MASK32, seed >> 32 & _MASK32
    for _ in range(10):
        # The int64 product wraps, which keeps all 64 bits of the unsigned product.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            (p0 >> 32 & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = k0 + _PHILOX_WEYL[0] & _MASK32, k1 + _PHILOX_WEYL[1] & _MASK32
    return c0, c1, c2, c3


def random_bits(
    seed: int,
    blocks: tuple[int, ...],
    start: tuple[int, int, int] = (0, 0, 0),
    device: torch.device | str = "cpu",
) -> Tensor:
    """uint8 [E, L, N, 16]: a random byte for each element of NVFP4 blocks [E, L, N] that begin at `start`.

    Block n of line l of batch entry e gets philox(counter=(n, l, e, 0), seed); word w, byte i (the least
    significant first) belongs to element 4w + i. A thread that owns a block makes one call.
    """
    entry, line, block = (
        torch.arange(first, first + size, device=device) for first, size in zip(start, blocks, strict=True)
    )
    words = philox((block, line[:, None], entry[:, None, None], 0), seed)
    return torch.stack(torch.broadcast_tensors(*words), -1).int().view(torch.uint8)
