"""Inputs and comparisons that the tests of nmoe.formats share."""

import itertools

import torch
from hypothesis import strategies as st

from nmoe.formats import Quantized

FORMATS = ("mxfp8", "nvfp4")
COPIES = tuple(itertools.product(FORMATS, (0, 1)))
SEEDS = st.integers(0, 2**32 - 1)


def positive_bfloat16() -> torch.Tensor:
    """Every positive finite value."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def randn(seed: int, *shape: int, spread: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers whose magnitude varies from row to row by e^(spread · normal)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))).to(dtype)


def buffers(q: Quantized) -> list[torch.Tensor]:
    return [b for b in (q.data, q.scale, q.amax) if b is not None]


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(x, y) for x, y in zip(buffers(a), buffers(b), strict=True))


def nearest_code(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest of ascending non-negative `values`, ties to the even code, sign apart."""
    distance = (x.double().abs().clamp(max=float(values[-1])).unsqueeze(-1) - values.double()).abs()
    odd = torch.arange(len(values)) % 2
    best = distance.amin(-1, keepdim=True)
    return torch.where(distance == best, odd, 2).argmin(-1)
