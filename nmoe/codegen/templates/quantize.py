"""MXFP8 on registers, bit for bit as nmoe.formats rounds: FP32 in, E4M3 elements and UE8M0 scales out.

Magnitudes are compared as integers: the bits of non-negative floats order as the floats do, and NaN's are above all, so
that a NaN reaches its block's scale.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Uint32, cute
from cutlass._mlir.dialects import arith
from cutlass.cutlass_dsl import T

MXFP8_BLOCK = 32
INVERSE_MAX = 1.0 / 448.0  # of E4M3's largest


def as_bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(T.i32(), x.ir_value()))


def as_float(bits: Int32) -> Float32:
    return Float32(arith.bitcast(T.f32(), bits.ir_value()))


def magnitude(x: Float32) -> Int32:
    """The bits of |x|."""
    return as_bits(x) & 0x7FFF_FFFF


@cute.jit
def ue8m0(largest: Int32) -> Int32:
    """The UE8M0 code of a block whose largest magnitude has the bits `largest`: of the power of two at or above
    largest / 448; 0 to 254, and 255 for NaN."""
    bits = as_bits(as_float(largest) * INVERSE_MAX)
    code = Int32((Uint32(bits) + 0x7F_FFFF) >> 23)
    if bits > 0 and bits <= 0x40_0000:
        code -= 1  # 2^-127 is the smallest, and subnormal in FP32
    code = cutlass.min(code, 254)
    if bits > 0x7F80_0000:
        code = Int32(255)
    return code


@cute.jit
def inverse(code: Int32) -> Float32:
    """1 / scale: 2^(127 − code), exactly; NaN for 255."""
    bits = (254 - code) << 23
    if code >= 254:
        bits = Int32(0x40_0000) if code == 254 else Int32(0x7FC0_0000)
    return as_float(bits)


@cute.jit
def scale(code: Int32) -> Float32:
    """2^(code − 127), exactly; NaN for 255."""
    bits = code << 23
    if code == 0:
        bits = Int32(0x40_0000)
    if code == 255:
        bits = Int32(0x7FC0_0000)
    return as_float(bits)


@cute.jit
def block(values: cute.Tensor) -> Int32:
    """Scales a block of 32 FP32 registers in place, ready to be rounded to E4M3; returns its scale's code."""
    largest = Int32(0)
    for i in cutlass.range_constexpr(MXFP8_BLOCK):
        largest = cutlass.max(largest, magnitude(values[i]))
    code = ue8m0(largest)
    factor = inverse(code)
    for i in cutlass.range_constexpr(MXFP8_BLOCK):
        values[i] = values[i] * factor
    return code
