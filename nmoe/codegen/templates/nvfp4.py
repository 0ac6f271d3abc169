"""NVFP4 on registers, bit for bit as nmoe.formats rounds: FP32 in, E2M1 elements and UE4M3 scales out.

Every operation is FP32 and rounded once, in TransformerEngine's order (docs/numerics.md).
"""

from __future__ import annotations

import cutlass
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint32, cute

from nmoe.codegen.templates.quantize import as_bits, as_float, magnitude
from nmoe.storage import FLT_MAX, HADAMARD_SIZE, SIGNS

NVFP4_BLOCK = 16
SCALES = 4  # that are converted together
SCALE_MAX = 448.0 * 6.0  # what a tensor's amax becomes: both types' largest
INVERSE_SIX = 1.0 / 6.0
SIX = 0x40C0_0000
LINES = ((2.0, 0.0), (1.0, 2.0), (0.5, 4.0))  # codes of magnitudes up to 2, 4 and 6: slope, start
SHIFTED = 0x4B00_0000  # the bits of 2^23
PHILOX = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))  # multipliers, key increments


@cute.jit
def encode_scale(amax: Float32) -> Float32:
    """S, the reciprocal of the tensor's factor: min(2688 / amax, FLT_MAX); 1 for an infinite amax, NaN for NaN."""
    scale = SCALE_MAX / amax
    scale = Float32(FLT_MAX) if scale > FLT_MAX else scale
    return Float32(1.0) if scale == 0.0 else scale


@cute.jit
def block_scales(peaks: cute.Tensor, scale: Float32):  # type: ignore[no-untyped-def]
    """UE4M3 codes, as bytes, of up to SCALES blocks with these peaks, and what their elements are multiplied by."""
    four = cute.make_rmem_tensor(SCALES, Float32)
    four.fill(0.0)
    for i in cutlass.range_constexpr(cute.size(peaks)):
        four[i] = peaks[i]
    codes = cute.make_rmem_tensor(SCALES, Float8E4M3FN)
    codes.store((four.load() * (scale * INVERSE_SIX)).to(Float8E4M3FN))
    factors = cute.make_rmem_tensor(SCALES, Float32)
    factors.store(codes.load().to(Float32) * (1.0 / scale))
    for i in cutlass.range_constexpr(cute.size(peaks)):
        inverse = 1.0 / factors[i]
        factors[i] = Float32(FLT_MAX) if inverse > FLT_MAX else inverse
    return cute.recast_tensor(codes, Uint8), factors


@cute.jit
def square_scales(peak: Float32, scale: Float32):  # type: ignore[no-untyped-def]
    """`block_scales` of SCALES blocks with the same largest magnitude. It is converted once, because of what
    `compiler.check_ptx` refuses."""
    peaks = cute.make_rmem_tensor(1, Float32)
    peaks[0] = peak
    code, factor = block_scales(peaks, scale)
    codes, factors = cute.make_rmem_tensor(SCALES, Uint8), cute.make_rmem_tensor(SCALES, Float32)
    codes.fill(code[0])
    factors.fill(factor[0])
    return codes, factors


@cute.jit
def element(x: Float32) -> Int32:
    """E2M1 code of |x|, to nearest, ties to even, saturating, plus SHIFTED.

    The code is a concave function of the value: the least of the lines through its three binades. Each line plus 2^23
    has a last place of one code, and their offsets are even, so that the sums round as E2M1 does.
    """
    size = cute.arch.fmin(as_float(magnitude(x)), 6.0)
    first, second, third = (as_bits(size * slope + (2.0**23 + start)) for slope, start in LINES)
    return cutlass.min(cutlass.min(first, second), third)


@cute.jit
def converted(values: cute.Tensor, start: cutlass.Constexpr) -> Int32:
    """`elements` by instructions of sm_100a (cvt.rn.satfinite.e2m1x2). A NaN becomes 6, there with its sign."""
    eight, codes = cute.make_rmem_tensor(8, Float32), cute.make_rmem_tensor(8, Float4E2M1FN)
    for i in cutlass.range_constexpr(8):
        eight[i] = values[start + i]
    codes.store(eight.load().to(Float4E2M1FN))
    return cute.recast_tensor(codes, Int32)[0]


@cute.jit
def elements(values: cute.Tensor, start: cutlass.Constexpr) -> Int32:
    """Codes of eight FP32 registers from `start` on in a word, the first lowest."""
    total = Int32(-SHIFTED * 0x1111_1111 % 2**32)  # what eight of them add up to, taken away
    signs = Int32(0)
    for i in cutlass.range_constexpr(8):
        total += element(values[start + i]) << 4 * i
        signs |= as_bits(values[start + i]) >> 28 - 4 * i & (8 << 4 * i if i < 7 else -(2**31))
    return total | signs


@cute.jit
def stochastic_element(x: Float32, byte: Int32) -> Int32:
    """E2M1 code: ⌊|x| / step + byte / 256⌋ steps, saturating."""
    bits = as_bits(x)
    size = cutlass.min(bits & 0x7FFF_FFFF, SIX)
    binade = cutlass.max(size & 0x7F80_0000, 0x3F80_0000)
    steps = (as_float(size) * as_float((127 + 9 << 23) - (binade - 0x3F80_0000))).to(Int32) + byte >> 8
    return steps + (binade >> 22) - 2 * 127 | bits >> 28 & 8


@cute.jit
def hadamard(x: cute.Tensor) -> None:
    """16 values times diag(SIGNS) · H / 4, in place."""
    for i in cutlass.range_constexpr(HADAMARD_SIZE):
        if cutlass.const_expr(SIGNS[i] < 0):
            x[i] = -x[i]
    for stage in (1, 2, 4, 8):
        for i in cutlass.range_constexpr(HADAMARD_SIZE):
            if cutlass.const_expr(i & stage == 0):
                x[i], x[i + stage] = x[i] + x[i + stage], x[i] - x[i + stage]
    x.store(x.load() * 0.25)


@cute.jit
def random_words(seed: Int64, block: Int32, line: Int32, entry: Int32):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of a block of 16 elements: byte i of word w is of element 4w + i."""
    c = [Uint32(block), Uint32(line), Uint32(entry), Uint32(0)]
    keys = [seed.to(Uint32), (seed >> 32).to(Uint32)]
    (m0, m1), weyl = PHILOX
    for _ in cutlass.range_constexpr(10):
        c = [
            cute.arch.mul_hi(c[2], Uint32(m1)) ^ c[1] ^ keys[0], c[2] * Uint32(m1),
            cute.arch.mul_hi(c[0], Uint32(m0)) ^ c[3] ^ keys[1], c[0] * Uint32(m0),
        ]  # fmt: skip
        keys = [keys[0] + Uint32(weyl[0]), keys[1] + Uint32(weyl[1])]
    return [Int32(word) for word in c]
