"""MXFP8 and NVFP4: the one place in nmoe that rounds to a block-scaled format.

    mxfp8  E4M3 elements, one UE8M0 scale (a power of two, rounded up) per 32 elements: OCP MX v1.0, with
           the scale rule of arXiv 2506.08027
    nvfp4  E2M1 elements, one UE4M3 scale per 16 elements, one FP32 factor per tensor, expert or row segment:
           arXiv 2509.25149, with TransformerEngine's operation order

docs/numerics.md derives the formulas and lists the special values. Arithmetic is FP32 in a fixed order for
each element, so results are bitwise repeatable on any number of threads.
"""

from nmoe.formats.block_scaled import (
    ErrorBound,
    Quantized,
    buffers,
    check_operand,
    dequantize,
    empty,
    error_bound,
    from_buffers,
    global_scale,
    hadamard_transform,
    quantize,
)
from nmoe.formats.elements import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    pack_e2m1,
    unpack_e2m1,
)
from nmoe.formats.layout import from_blocked, to_blocked
from nmoe.formats.philox import philox, random_bits

__all__ = [
    "ErrorBound",
    "Quantized",
    "buffers",
    "check_operand",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "dequantize",
    "empty",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e8m0",
    "error_bound",
    "from_blocked",
    "from_buffers",
    "global_scale",
    "hadamard_transform",
    "pack_e2m1",
    "philox",
    "quantize",
    "random_bits",
    "to_blocked",
    "unpack_e2m1",
]
