"""The element and scale types, value by value: E4M3 (and UE4M3), E2M1, UE8M0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0


_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
_E8M0_VALUES = torch.tensor(
    [2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float32
)
_E2M1_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32)
_E2M1_VALUES = torch.cat((_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES))
# Both elements of a byte, low nibble first, in one 8-byte entry.
_E2M1_PAIRS = torch.stack((_E2M1_VALUES.repeat(16), _E2M1_VALUES.repeat_interleave(16)), -1)
_E2M1_PAIRS = _E2M1_PAIRS.view(torch.int64).flatten()


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 → E4M3 codes, uint8: to nearest, ties to even, saturating at ±448; NaN stays NaN.

    UE4M3 is the half of E4M3 without the sign, so this serves NVFP4's scales too.
    """
    # The clamp makes the cast saturate on torch 2.11, too.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """E4M3 codes, uint8 → float32, exactly; 0x7F and 0xFF are NaN."""
    return _lookup(_E4M3_VALUES, codes)


def encode_e8m0(x: Tensor) -> Tensor:
    """Non-negative float32 → UE8M0 codes, uint8: the power of two 2^(code - 127) at or above x.

    Zero and anything up to 2^-127 give 0x00; what is above 2^127, infinity too, saturates to 0xFE; NaN gives
    0xFF. This is cvt.rp.satfinite.ue8m0x2.f32.
    """
    bits = x.contiguous().view(torch.int32)
    code = (bits + 0x007F_FFFF >> 23) - ((bits > 0) & (bits <= 0x0040_0000)).int()
    return code.clamp_(max=254).masked_fill_(x.isnan(), 255).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """UE8M0 codes, uint8 → float32, exactly; 0x00 is the subnormal 2^-127 and 0xFF is NaN."""
    return _lookup(_E8M0_VALUES, codes)


def encode_e2m1(x: Tensor, random: Tensor | None = None) -> Tensor:
    """float32 → E2M1 codes 0..15, uint8, saturating at ±6; NaN, which E2M1 lacks, gives ±6.

    To nearest, ties to even; or, with a `random` byte r per element, stochastically: |x| / step + r / 256
    is truncated, step being E2M1's at |x|. That is exact integer arithmetic, and the carry rule of
    cvt.rs.satfinite.e2m1x4.f32.
    """
    bits = x.contiguous().view(torch.int32)
    sign = bits >> 28 & 8
    # Non-negative floats order as their bits do, and NaN's bits are above those of 6.0.
    bits = (bits & 0x7FFF_FFFF).clamp_(max=0x40C0_0000)
    magnitude = bits.view(torch.float32)
    binade = (bits & 0x7F80_0000).view(torch.float32).clamp_(min=1.0)  # 1, 2 or 4: twice the step at |x|
    if random is None:
        # 1.5 · 2^22 · binade has a last place of one step, so that the FP32 sum rounds as E2M1 does. Its
        # bits are (149 + log2 binade) · 2^23 + 2^22 + |x| / step.
        bits = torch.add(magnitude, binade, alpha=1.5 * 2**22).view(torch.int32)
        code = (bits & 7).add_(bits >> 22).sub_(2 * 149 + 1)
    else:
        steps = (magnitude / binade).mul_(2 * 256).int().add_(random) >> 8
        code = steps.add_(binade.view(torch.int32) >> 22).sub_(2 * 127)
    return code.bitwise_or_(sign).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """E2M1 codes 0..15, uint8 → float32, exactly."""
    return _lookup(_E2M1_VALUES, codes)


def pack_e2m1(codes: Tensor, dim: Literal[-2, -1] = -1) -> Tensor:
    """uint8 codes → uint8 pairs, half as many along `dim`, the even element in the low nibble."""
    if dim == -1:
        both = codes.view(torch.int16)  # even + 256 · odd
        return (both | both >> 4).to(torch.uint8)
    even, odd = codes.unflatten(-2, (-1, 2)).unbind(-2)
    return even | odd << 4


def unpack_e2m1(pairs: Tensor) -> Tensor:
    """uint8 pairs [..., n] → float32 values [..., 2n]."""
    return _lookup(_E2M1_PAIRS, pairs).view(torch.float32)


def _lookup(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], several times faster than indexing or casting from float8."""
    flat = codes.int().flatten()
    return table.to(codes.device).index_select(0, flat).view(codes.shape)
