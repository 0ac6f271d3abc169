"""Quantize and dequantize whole tensors.

A tensor [..., M, K] is quantized along one axis: blocks of consecutive elements of that axis share a scale.
Axis 1 (along K) serves a GEMM that contracts over K; axis 0 (along rows or tokens, M) one that contracts over
M. The two copies hold different numbers, so a `Quantized` carries its axis and `check_operand` refuses the
wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from nmoe.storage import (
    BLOCK,
    FLT_MAX,
    HADAMARD_SIZE,
    SIGNS,
    Axis,
    Format,
    Rounding,
    check_divides,
    storage,
)


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

    data, scale = _flat(out.data), _flat(out.scale)
    rows = x.shape[-2] if segments is None else int(segments[-1])
    tail = (slice(None), slice(rows, x.shape[-2]))
    _part(data, tail, 1 if format == "mxfp8" else axis, 2).zero_()
    _part(scale, tail, axis, BLOCK[format]).zero_()
    live = x.detach().reshape(data.shape[0], *x.shape[-2:])[:, :rows]
    if out.amax is not None:
        out.amax.zero_()
    if live.numel() and format == "mxfp8":
        _encode_mxfp8(live, axis, data, scale)
    elif live.numel():
        assert out.amax is not None
        _encode_nvfp4(live, axis, data, scale, out.amax.view(-1), seed, hadamard, square, segments)
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
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.data.device)
    elif out.shape != q.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(q.shape)}")
    if out.numel() and q.format == "mxfp8":
        _decode_mxfp8(q, _flat(out))
    elif out.numel():
        _decode_nvfp4(q, _flat(out), without_global)
    return out


def check_operand(q: Quantized, axis: Axis) -> None:
    """Raises ValueError unless q was quantized along `axis`, the one that the GEMM contracts over."""
    if q.axis != axis:
        raise ValueError(
            f"{q.format} operand of shape {q.shape} is quantized along axis {q.axis}, but this operand "
            f"contracts along axis {axis}: quantize the high-precision tensor along axis {axis}"
        )


# Buffers

DTYPES = {"u8": torch.uint8, "f32": torch.float32}


def buffers(value: Tensor | Quantized | None) -> list[Tensor]:
    """What a value lies in, in the order of `storage`: itself, or a Quantized's data, scales and, as a vector, amaxes;
    of None nothing."""
    if value is None:
        return []
    if not isinstance(value, Quantized):
        return [value]
    amax = [] if value.amax is None else [value.amax.view(-1)]  # of a tensor without segments: one number
    return [value.data, value.scale, *amax]


def from_buffers(
    format: Format,
    shape: tuple[int, ...],
    axis: Axis,
    buffers: dict[str, Tensor],
    *,
    segments: Tensor | None = None,
    hadamard: bool = False,
    atoms: bool = False,
) -> Quantized:
    """A Quantized over buffers of the shapes that `storage` names; with `atoms` for kernels alone."""
    data, scale, amax = buffers["data"], buffers["scale"], buffers.get("amax")
    q = Quantized(format, axis, tuple(shape), data, scale, amax, segments, hadamard)
    _check_buffers(q, format, q.shape, axis, None if segments is None else len(segments) - 1, atoms)
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
        name: torch.empty(size, dtype=DTYPES[element], device=device)
        for name, (size, element) in storage(format, shape, axis, segments).items()
    }
    return Quantized(format, axis, tuple(shape), buffers["data"], buffers["scale"], buffers.get("amax"))


# Pieces of a tensor [E, M, K]

# Elements of a piece. Temporaries of this size stay in the cache and in the allocator's heap; the pages of
# those of a whole tensor are mapped anew by every operation, which takes ten times as long as the arithmetic.
_PIECE = 1 << 18

Piece = tuple[slice, slice]  # entries of E, rows of M


def _flat(t: Tensor) -> Tensor:
    """[..., a, b] → [E, a, b], sharing the memory."""
    return t.view(t.shape[:-2].numel(), *t.shape[-2:])


def _pieces(shape: torch.Size, step: int) -> Iterator[Piece]:
    """Cuts [E, M, K] into pieces of several entries, or of a multiple of `step` rows of one."""
    entries, rows, columns = shape
    height = max(step, _PIECE // columns // step * step)
    width = max(1, _PIECE // (rows * columns))
    for entry in range(0, entries, width):
        for row in range(0, rows, height):
            yield slice(entry, min(entry + width, entries)), slice(row, min(row + height, rows))


def _part(t: Tensor, piece: Piece, axis: Axis, elements: int) -> Tensor:
    """The piece's part of t, [E, M, K / elements] for axis 1 or [E, K, M / elements] for axis 0."""
    entries, rows = piece
    if axis == 1:
        return t[entries, rows]
    return t[entries, :, rows.start // elements : rows.stop // elements]


# MXFP8


def _encode_mxfp8(x: Tensor, axis: Axis, data: Tensor, scale: Tensor) -> None:
    """x [E, M, K] → E4M3 codes [E, M, K], UE8M0 codes [E, M, K/32] or [E, K, M/32]."""
    block = BLOCK["mxfp8"]
    dim = -1 if axis == 1 else -2
    for piece in _pieces(x.shape, block if axis == 0 else 1):
        blocks = x[piece].float().unflatten(dim, (-1, block))
        codes = encode_e8m0(blocks.abs().amax(dim) * (1.0 / E4M3_MAX))
        # 2^(127 - code), built from its bits: code 254 gives the subnormal 2^-127, 255 gives NaN.
        bits = (254 - codes.int()) << 23
        bits.masked_fill_(codes == 254, 0x0040_0000).masked_fill_(codes == 255, 0x7FC0_0000)
        values = blocks * bits.view(torch.float32).unsqueeze(dim)
        data[piece] = encode_e4m3(values.flatten(dim - 1, dim))
        _part(scale, piece, axis, block).copy_(codes if axis == 1 else codes.mT)


def _decode_mxfp8(q: Quantized, out: Tensor) -> None:
    block = BLOCK["mxfp8"]
    dim = -1 if q.axis == 1 else -2
    data, scale = _flat(q.data), _flat(q.scale)
    for piece in _pieces(out.shape, block if q.axis == 0 else 1):
        factor = decode_e8m0(_part(scale, piece, q.axis, block))
        values = decode_e4m3(data[piece]).unflatten(dim, (-1, block))
        values.mul_((factor if q.axis == 1 else factor.mT).unsqueeze(dim))
        out[piece] = values.flatten(dim - 1, dim)


# NVFP4


def global_scale(amax: Tensor) -> Tensor:
    """The FP32 factor of an NVFP4 tensor: it maps the largest magnitude to 448 · 6, both types' maximum."""
    return amax / (E4M3_MAX * E2M1_MAX)


def _encode_nvfp4(
    x: Tensor,
    axis: Axis,
    data: Tensor,
    scale: Tensor,
    amax: Tensor,
    seed: int | None,
    hadamard: bool,
    square: bool,
    segments: Tensor | None,
) -> None:
    """x [E, M, K] → E2M1 pairs [E, L, C/2], UE4M3 codes [E, L, C/16], amax [E] or [G], which holds zeros.

    A line, one of L, is a row for axis 1 and a column for axis 0; blocks run along its C elements.
    """
    block = BLOCK["nvfp4"]
    dim: Literal[-2, -1] = -1 if axis == 1 else -2
    step = block if axis == 0 else 1
    everything = (slice(0, x.shape[0]), slice(0, x.shape[1]))

    def load(piece: Piece) -> Tensor:
        part = x[piece].float()
        return (hadamard_transform(part, axis) if hadamard else part).unflatten(dim, (-1, block))

    scale = _part(scale, everything, axis, block)
    peak = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    for piece in _pieces(x.shape, step):
        largest = load(piece).abs().amax(dim)
        _part(peak, piece, axis, block).copy_(largest if axis == 1 else largest.mT)
    if square:
        tiles = peak.unflatten(-2, (-1, block))
        peak = tiles.amax(-2, keepdim=True).expand_as(tiles).flatten(-3, -2)
    if segments is None:
        amax.copy_(peak.amax((-1, -2)))
        encode = _global_encode(amax)[:, None, None]
    else:
        index = _segment_index(segments, peak.shape, axis)
        amax.scatter_reduce_(0, index.flatten(), peak[0].amax(-1 if axis == 1 else -2), "amax")
        encode = _global_encode(amax)[index]
    codes = encode_e4m3(peak * (encode * (1.0 / E2M1_MAX)))
    scale.copy_(codes)
    inverse = (decode_e4m3(codes) * encode.reciprocal()).reciprocal_().clamp_(max=FLT_MAX)
    for piece in _pieces(x.shape, step):
        factor = _part(inverse, piece, axis, block)
        values = load(piece) * (factor if axis == 1 else factor.mT.contiguous()).unsqueeze(dim)
        noise = None
        if seed is not None:
            entry, row = piece[0].start, piece[1].start
            start = (entry, row, 0) if axis == 1 else (entry, 0, row // block)
            noise = random_bits(seed, factor.shape, start, x.device).flatten(-2)
            noise = (noise if axis == 1 else noise.mT.contiguous()).view(values.shape)
        pairs = pack_e2m1(encode_e2m1(values, noise), dim).flatten(dim - 1, dim)
        _part(data, piece, axis, 2).copy_(pairs if axis == 1 else pairs.mT)


def _global_encode(amax: Tensor) -> Tensor:
    """The reciprocal of `global_scale`, at most FLT_MAX; 1 for a tensor that holds an infinity."""
    # One rounding: torch evaluates `number / tensor` as a reciprocal and a product.
    encode = torch.full_like(amax, E4M3_MAX * E2M1_MAX).div_(amax).clamp_(max=FLT_MAX)
    return encode.masked_fill_(encode == 0, 1.0)


def _decode_nvfp4(q: Quantized, out: Tensor, without_global: bool) -> None:
    assert q.amax is not None
    block = BLOCK["nvfp4"]
    data, scale = _flat(q.data), _flat(q.scale)
    factor = global_scale(q.amax)
    if q.segments is None:
        factor = factor.view(-1, 1, 1)
    else:
        factor = torch.cat([factor, factor.new_zeros(1)])[_segment_index(q.segments, scale.shape, q.axis)]
    factor = factor.expand(scale.shape)
    for piece in _pieces(out.shape, block if q.axis == 0 else 1):
        values = unpack_e2m1(_part(data, piece, q.axis, 2)).unflatten(-1, (-1, block))
        values.mul_(decode_e4m3(_part(scale, piece, q.axis, block)).unsqueeze(-1))
        if not without_global:
            values.mul_(_part(factor, piece, q.axis, block).unsqueeze(-1))
        lines = values.flatten(-2)
        out[piece] = lines if q.axis == 1 else lines.mT


def _segment_index(segments: Tensor, blocks: torch.Size, axis: Axis) -> Tensor:
    """The segment of each line [1, L, 1] (axis 1) or block [1, 1, C/16] (axis 0) of scales [1, L, C/16].

    It is G, one past the last segment, in the tail.
    """
    ends = segments[1:] if axis == 1 else segments[1:] // BLOCK["nvfp4"]
    positions = torch.arange(blocks[-2 if axis == 1 else -1], dtype=ends.dtype, device=ends.device)
    return torch.bucketize(positions, ends, right=True).view((1, -1, 1) if axis == 1 else (1, 1, -1))


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
    z = torch.empty_like(y)
    for stage in (1, 2, 4, 8):
        low, high = y.unflatten(dim, (-1, 2, stage)).unbind(dim - 1)
        total, difference = z.unflatten(dim, (-1, 2, stage)).unbind(dim - 1)
        torch.add(low, high, out=total)
        torch.sub(low, high, out=difference)
        y, z = z, y
    return y.mul_(0.25).flatten(dim - 1, dim)


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
    check_divides(format, x.shape, axis)
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
        check_divides(format, x.shape, 1 - axis)


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
    q: Quantized, format: str, shape: tuple[int, ...], axis: int, segments: int | None, atoms: bool = False
) -> None:
    if (q.format, q.axis, tuple(q.shape)) != (format, axis, tuple(shape)):
        raise ValueError(
            f"buffers are for {q.format}, axis {q.axis}, {tuple(q.shape)}; "
            f"expected {format}, axis {axis}, {tuple(shape)}"
        )
    wanted = {
        name: (size, DTYPES[element])
        for name, (size, element) in storage(q.format, q.shape, q.axis, segments, atoms).items()
    }
    for name in ("data", "scale", "amax"):
        buffer = getattr(q, name)
        found = None if buffer is None else (tuple(buffer.shape), buffer.dtype)
        if found != wanted.get(name):
            raise ValueError(f"buffer {name} is {found}, expected {wanted.get(name)}")
