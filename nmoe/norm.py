"""The norm of a gradient whose parts lie on several ranks: the same bits whoever holds which.

Squares are summed in FP32 within blocks of consecutive elements, which no share cuts (nmoe/shards.py). The sums of
blocks are added exactly: each is an integer of 24 bits times a power of two, integers of one power add up without
rounding in any order, and Python's have no largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nmoe.shards import ALIGNMENT as BLOCK

_LEAST = -148  # torch.frexp's exponent of the smallest FP32 number above zero; 128 is that of the largest
BINS = 288  # one a power of two, and up to whole rows of rdep/sums.py
_CHUNK = 1 << 20  # blocks at a time


@torch.no_grad()
def squares(parts: Iterable[Tensor]) -> Tensor:
    """float64[BINS]: the squares of all elements of FP32 `parts`, each of whole blocks, by power of two. At most 2^29
    blocks to a power are counted exactly. NaN and infinities stay what they are."""
    bins = torch.zeros(BINS, dtype=torch.float64)
    for part in parts:
        for rows in part.view(-1, BLOCK).split(_CHUNK):
            sums = torch.linalg.vector_norm(rows, dim=1).square_().float()
            mantissas, exponents = torch.frexp(sums)
            index = exponents.clamp_(_LEAST, 128).sub_(_LEAST)
            bins += torch.bincount(index, mantissas.double().mul_(1 << 24), minlength=BINS).cpu()
    return bins


def norm(bins: Tensor) -> float:
    """The root of what `squares` found on each rank, float64[ranks, BINS], rounded once; NaN if one was."""
    if not bool(bins.isfinite().all()):
        return math.nan
    total = sum(count << power for power, count in enumerate(bins.long().sum(0).tolist()))
    return math.sqrt(total / (1 << (24 - _LEAST)))
