"""Quantize and dequantize whole tensors.

A tensor [..., M, K] is quantized along one axis: blocks of consecutive elements of that axis share a scale.
Axis 1 (along K) serves a GEMM that contracts over K; axis 0 (along rows or tokens, M) one that contracts over
M. The two copies hold different numbers, so a `Quantized` carries its axis and `check_operand` refuses the
wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from nmoe.formats.elements import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    pack_e2m1,
    unpack_e2m1,
)
from nmoe.formats.philox import random_bits

Format = Literal["mxfp8", "nvfp4"]
Axis = Literal[0, 1]
Rounding = Literal["nearest", "stochastic"]

BLOCK: dict[str, int] = {"mxfp8": 32, "nvfp4": 16}
HADAMARD_SIZE = 16

FLT_MAX = torch.finfo(torch.float32).max

# The diagonal of the random Hadamard transform. It is fixed, not drawn: TransformerEngine ships this vector,
# and both operands of wgrad must use the same one.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Quantized:
    """A tensor of logical shape [..., M, K] in a block-scaled format. B is BLOCK[format].

    data    uint8. mxfp8: E4M3 codes [..., M, K] for either axis. nvfp4: two E2M1 codes a byte, the even
            element in the low nibble; axis 1 [..., M, K/2], axis 0 transposed to [..., K, M/2].
    scale   uint8, UE8M0 (mxfp8) or UE4M3 (nvfp4) codes; axis 1 [..., M, K/B], axis 0 [..., K, M/B].
    amax    float32, nvfp4 only: the largest magnitude that was quantized, of shape [...] (one per leading
            batch entry) or [G] (one per row segment). The tensor's factor is `global_scale(amax)`.
    segments  int row offsets [G+1], or None. Rows from segments[-1] on hold zeros.
    hadamard  the data are those of `hadamard_transform(x, axis)`, not of x.
    """

    format: Format
    axis: Axis
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor
    amax: Tensor | None = None
    segments: Tensor | None = None
    hadamard: bool = False


def quantize(
    x: Tensor,
    format: Format,
    axis: Axis,
    *,
    rounding: Rounding = "nearest",
    seed: int | None = None,
    hadamard: bool = False,
    square: bool = False,
    segments: Tensor | None = None,
    out: Quantized | None = None,
) -> Quantized:
    """Quantizes x [..., M, K] (float32, bfloat16 or float64) along `axis`.

    rounding, seed  "stochastic" (nvfp4) rounds with the random bits of `random_bits`, a function of the
                    64-bit seed and the element's position alone.
    hadamard        (nvfp4) transforms x by `hadamard_transform` first; `dequantize` does not undo it.
    square          (nvfp4) one scale per 16×16 tile, so that both axes hold the same numbers.
    segments        int row offsets [G+1] of a two-dimensional x, from 0, ascending, multiples of BLOCK: nvfp4
                    takes one amax per segment. Rows from segments[-1] on are not read; their codes are 0.
    out             buffers to write, every byte of them; the result shares them.

    Raises ValueError for a shape, option or buffer that does not fit.
    """
    _check_request(x, format, axis, rounding, seed, hadamard, square)
    groups = None
    if segments is not None:
        groups = len(segments) - 1
        _check_segments(segments, x.shape, BLOCK[format])
    if out is None:
        out = empty(format, x.shape, axis, groups, device=x.device)
    else:
        _check_buffers(out, format, x.shape, axis, groups)

    rows = x.shape[-2] if segments is None else int(segments[-1])
    live = x.detach()[..., :rows, :].float()
    if live.numel() == 0:
        for buffer in (out.data, out.scale, out.amax):
            if buffer is not None:
                buffer.zero_()
    elif format == "mxfp8":
        data, scale = _encode_mxfp8(live, axis)
        _write(out.data, data, dim=-2)
        _write(out.scale, scale, dim=-2 if axis == 1 else -1)
    else:
        assert out.amax is not None
        live = hadamard_transform(live, axis) if hadamard else live
        lines = live if axis == 1 else live.transpose(-1, -2)
        data, scale, amax = _encode_nvfp4(lines.contiguous(), axis, square, seed, segments)
        _write(out.data, data, dim=-2 if axis == 1 else -1)
        _write(out.scale, scale, dim=-2 if axis == 1 else -1)
        out.amax.copy_(amax)
    return Quantized(format, axis, tuple(x.shape), out.data, out.scale, out.amax, segments, hadamard)


def dequantize(
    q: Quantized,
    dtype: torch.dtype = torch.float32,
    *,
    without_global: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The numbers that q stands for, in the original orientation [..., M, K], computed in float32.

    mxfp8 is element · scale: exact in float32, and in bfloat16 for scales in [2^-124, 2^119].
    nvfp4 is (element · scale) · global_scale(amax): the first product is exact even in bfloat16, the second
    rounds. `without_global` leaves the second out; kernels apply it in the GEMM's epilogue.
    A Hadamard transform is not undone: both operands of wgrad share it, and there it cancels.
    The result is written to `out`, in its dtype, if given.
    """
    if q.format == "mxfp8":
        values = _decode_mxfp8(q)
    else:
        values = _decode_nvfp4(q, without_global)
        if q.axis == 0:
            values = values.transpose(-1, -2)
    if out is None:
        return values.to(dtype).contiguous()
    if out.shape != q.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(q.shape)}")
    return out.copy_(values)


def check_operand(q: Quantized, axis: Axis) -> None:
    """Raises ValueError unless q was quantized along `axis`, the one that the GEMM contracts over."""
    if q.axis != axis:
        raise ValueError(
            f"{q.format} operand of shape {q.shape} is quantized along axis {q.axis}, but this operand "
            f"contracts along axis {axis}: quantize the high-precision tensor along axis {axis}"
        )


# Storage


def storage(
    format: Format, shape: tuple[int, ...], axis: Axis, segments: int | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → (shape, dtype) of the buffers of a Quantized of logical `shape` with so many `segments`.

    Raises ValueError if the blocks do not divide the axis.
    """
    _check_divides(format, shape, axis)
    *batch, m, k = shape
    lines, length = (m, k) if axis == 1 else (k, m)
    scale = (*batch, lines, length // BLOCK[format])
    if format == "mxfp8":
        return {"data": (tuple(shape), torch.uint8), "scale": (scale, torch.uint8)}
    data = (*batch, lines, length // 2)
    amax = tuple(batch) if segments is None else (segments,)
    return {"data": (data, torch.uint8), "scale": (scale, torch.uint8), "amax": (amax, torch.float32)}


def from_buffers(
    format: Format,
    shape: tuple[int, ...],
    axis: Axis,
    buffers: dict[str, Tensor],
    *,
    segments: Tensor | None = None,
    hadamard: bool = False,
) -> Quantized:
    """A Quantized over buffers of the shapes that `storage` names."""
    data, scale, amax = buffers["data"], buffers["scale"], buffers.get("amax")
    q = Quantized(format, axis, tuple(shape), data, scale, amax, segments, hadamard)
    _check_buffers(q, format, q.shape, axis, None if segments is None else len(segments) - 1)
    return q


def empty(
    format: Format,
    shape: tuple[int, ...],
    axis: Axis,
    segments: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Quantized:
    """Uninitialised buffers, for `quantize(..., out=)`."""
    buffers = {
        name: torch.empty(size, dtype=dtype, device=device)
        for name, (size, dtype) in storage(format, shape, axis, segments).items()
    }
    return Quantized(format, axis, tuple(shape), buffers["data"], buffers["scale"], buffers.get("amax"))


def _write(buffer: Tensor, values: Tensor, dim: int) -> None:
    """Copies values to the start of `dim` and zeroes the rest."""
    used = values.shape[dim]
    buffer.narrow(dim, 0, used).copy_(values)
    buffer.narrow(dim, used, buffer.shape[dim] - used).zero_()


# MXFP8


def _encode_mxfp8(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """float32 [..., M, K] → E4M3 codes [..., M, K] and UE8M0 codes [..., M, K/32] or [..., K, M/32]."""
    dim = -1 if axis == 1 else -2
    blocks = x.unflatten(dim, (-1, BLOCK["mxfp8"]))  # the block is the last or the last but one dimension
    peak = blocks.abs().amax(dim)
    scale = encode_e8m0(peak * (1.0 / E4M3_MAX))
    # 2^(127 - code), built from its bits: code 254 gives the subnormal 2^-127, 255 gives NaN.
    bits = (254 - scale.int()) << 23
    bits.masked_fill_(scale == 254, 0x0040_0000).masked_fill_(scale == 255, 0x7FC0_0000)
    data = encode_e4m3(blocks * bits.view(torch.float32).unsqueeze(dim)).reshape(x.shape)
    return data, scale if axis == 1 else scale.transpose(-1, -2)


def _decode_mxfp8(q: Quantized) -> Tensor:
    dim = -1 if q.axis == 1 else -2
    scale = decode_e8m0(q.scale if q.axis == 1 else q.scale.transpose(-1, -2))
    values = decode_e4m3(q.data)
    values.unflatten(dim, (-1, BLOCK["mxfp8"])).mul_(scale.unsqueeze(dim))
    return values


# NVFP4


def global_scale(amax: Tensor) -> Tensor:
    """The FP32 factor of an NVFP4 tensor: it maps the largest magnitude to 448 · 6, both types' maximum."""
    return amax / (E4M3_MAX * E2M1_MAX)


def _encode_nvfp4(
    x: Tensor, axis: Axis, square: bool, seed: int | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 lines [..., L, C], blocks along C → E2M1 codes [..., L, C/2], UE4M3 codes [..., L, C/16], amax.

    `axis` is that of the tensor: row segments divide its lines (1) or its blocks (0).
    """
    blocks = x.unflatten(-1, (-1, BLOCK["nvfp4"]))
    peak = blocks.abs().amax(-1)
    if square:
        tiles = peak.unflatten(-2, (-1, BLOCK["nvfp4"]))
        peak = tiles.amax(-2, keepdim=True).expand_as(tiles).flatten(-3, -2)
    if segments is not None:
        index = _segment_index(segments, peak.shape, axis)
        amax = peak.new_zeros(len(segments) - 1)
        amax.scatter_reduce_(0, index.flatten(), peak.amax(-1 if axis == 1 else -2), "amax")
        encode = _global_encode(amax)[index]
    else:
        amax = peak.amax((-1, -2))
        encode = _global_encode(amax)[..., None, None]
    scale = encode_e4m3(peak * (encode * (1.0 / E2M1_MAX)))
    inverse = (decode_e4m3(scale) * encode.reciprocal()).reciprocal_().clamp_(max=FLT_MAX)
    noise = None if seed is None else random_bits(seed, peak.shape, x.device).view(x.shape)
    codes = encode_e2m1((blocks * inverse.unsqueeze(-1)).view(x.shape), noise)
    return pack_e2m1(codes), scale, amax


def _global_encode(amax: Tensor) -> Tensor:
    """The reciprocal of `global_scale`; 1 for a tensor of zeros and for one that holds an infinity."""
    # One rounding: torch evaluates `number / tensor` as a reciprocal and a product.
    encode = torch.full_like(amax, E4M3_MAX * E2M1_MAX).div_(amax).clamp_(max=FLT_MAX)
    return encode.masked_fill_((amax == 0) | (encode == 0), 1.0)


def _decode_nvfp4(q: Quantized, without_global: bool) -> Tensor:
    """→ float32 lines [..., L, C]."""
    assert q.amax is not None
    values = unpack_e2m1(q.data)
    blocks = values.unflatten(-1, (-1, BLOCK["nvfp4"]))
    blocks.mul_(decode_e4m3(q.scale).unsqueeze(-1))
    if without_global:
        return values
    factor = global_scale(q.amax)
    if q.segments is None:
        return values.mul_(factor[..., None, None])
    index = _segment_index(q.segments, q.scale.shape, q.axis)
    blocks.mul_(torch.cat([factor, factor.new_zeros(1)])[index].unsqueeze(-1))
    return values


def _segment_index(segments: Tensor, blocks: torch.Size, axis: Axis) -> Tensor:
    """The segment of each line [L, 1] (axis 1) or block [1, C/16] (axis 0) of scales [L, C/16].

    It is G, one past the last segment, in the tail.
    """
    ends = segments[1:] if axis == 1 else segments[1:] // BLOCK["nvfp4"]
    positions = torch.arange(blocks[-2 if axis == 1 else -1], dtype=ends.dtype, device=ends.device)
    return torch.bucketize(positions, ends, right=True).unsqueeze(axis)


# The random Hadamard transform


def hadamard_transform(x: Tensor, axis: Axis) -> Tensor:
    """Each tile of 16 elements of `axis` times diag(SIGNS) · H, H the orthonormal Sylvester-Hadamard matrix.

    x is float32 [..., M, K]; so is the result. The sum is a butterfly of four stages, which fixes its order.
    The matrix R is orthogonal, so that it cancels from the product of two operands: (A R)(B R)ᵀ = A Bᵀ.
    """
    dim = -1 if axis == 1 else -2
    signs = torch.tensor(SIGNS, dtype=x.dtype, device=x.device)
    tiles = x.unflatten(dim, (-1, HADAMARD_SIZE))
    y = tiles * (signs if axis == 1 else signs.unsqueeze(-1))
    for stage in (1, 2, 4, 8):
        pairs = y.unflatten(dim, (-1, 2, stage))
        low, high = pairs.unbind(dim - 1)
        y = torch.stack((low + high, low - high), dim - 1).flatten(dim - 2, dim)
    return (y * 0.25).reshape(x.shape)


# Error bounds


@dataclass(frozen=True)
class ErrorBound:
    """|dequantize(quantize(x)) - x| ≤ max(relative · |x|, block · block's amax) + tensor · tensor's amax."""

    relative: float
    block: float
    tensor: float


def error_bound(format: Format, rounding: Rounding = "nearest") -> ErrorBound:
    """Bounds for finite input, for amaxes within 2^±100; a Hadamard transform's input is its output."""
    if format == "mxfp8":
        # Half a step: 2^-4 of a normal value, 2^-10 of the scale below; the scale is ≤ 2 · amax / 448.
        return ErrorBound(2.0**-4, 2.0**-9 / E4M3_MAX, 0.0)
    # Half a step is 1/4 of a value above 1 and 1/4 of the scale below; the scale is ≤ 17/16 of amax / 6.
    # A scale in E4M3's subnormal range is off by up to 2^-10 of the global factor, for elements up to 6.
    half_steps = 1 if rounding == "nearest" else 2
    return ErrorBound(half_steps / 4, half_steps * 17 / 16 / 24, 2.0**-10 / E4M3_MAX)


# Checks


def _check_request(
    x: Tensor, format: Format, axis: Axis, rounding: str, seed: int | None, hadamard: bool, square: bool
) -> None:
    _check_divides(format, x.shape, axis)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"x is {x.dtype}, expected float32, bfloat16 or float64")
    if format == "mxfp8" and (rounding != "nearest" or hadamard or square):
        raise ValueError("mxfp8 rounds to nearest and has no Hadamard transform or square scaling: use nvfp4")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}, expected 'nearest' or 'stochastic'")
    if (seed is not None) != (rounding == "stochastic"):
        raise ValueError(
            f"rounding is {rounding!r} and seed is {seed}: stochastic rounding, and it alone, takes a seed"
        )
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 ≤ seed < 2^64")
    if square:
        _check_divides(format, x.shape, 1 - axis)


def _check_divides(format: Format, shape: tuple[int, ...], axis: int) -> None:
    if format not in BLOCK:
        raise ValueError(f"unknown format {format!r}, expected one of {', '.join(BLOCK)}")
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis!r}, expected 0 (blocks along rows) or 1 (along the last dimension)")
    if len(shape) < 2:
        raise ValueError(f"shape is {tuple(shape)}, expected [..., M, K]")
    name, size = ("M", shape[-2]) if axis == 0 else ("K", shape[-1])
    if size % BLOCK[format]:
        raise ValueError(
            f"{name} = {size} of shape {tuple(shape)} is not a multiple of {format}'s block of "
            f"{BLOCK[format]}: pad it with zeros"
        )


def _check_segments(segments: Tensor, shape: torch.Size, block: int) -> None:
    offsets = segments.tolist()
    ascending = all(a <= b for a, b in pairwise(offsets))
    if len(shape) != 2 or len(offsets) < 2 or offsets[0] != 0 or not ascending or offsets[-1] > shape[0]:
        raise ValueError(
            f"segments {offsets} do not divide the rows of shape {tuple(shape)}: expected ascending offsets "
            f"from 0 to at most the number of rows of a two-dimensional tensor"
        )
    if any(offset % block for offset in offsets):
        raise ValueError(
            f"segments {offsets} are not multiples of the block {block}: pad every segment with zero rows"
        )


def _check_buffers(
    q: Quantized, format: str, shape: tuple[int, ...], axis: int, segments: int | None
) -> None:
    if (q.format, q.axis, tuple(q.shape)) != (format, axis, tuple(shape)):
        raise ValueError(
            f"buffers are for {q.format}, axis {q.axis}, {tuple(q.shape)}; "
            f"expected {format}, axis {axis}, {tuple(shape)}"
        )
    wanted = storage(q.format, q.shape, q.axis, segments)
    for name in ("data", "scale", "amax"):
        buffer = getattr(q, name)
        found = None if buffer is None else (tuple(buffer.shape), buffer.dtype)
        if found != wanted.get(name):
            raise ValueError(f"buffer {name} is {found}, expected {wanted.get(name)}")
