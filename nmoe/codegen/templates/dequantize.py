"""Quantized operands to BF16, for tensor cores that do not take block scales (Hopper): a kernel for each operand,
before the product. Exact for every E2M1 · E4M3, and for E4M3 with scales of 2^-124 to 2^119. NVFP4's global scales stay
with the epilogue.

A thread decodes 16 elements that lie side by side. Their scales lie in rows as storage.storage has them: along the same
direction, one for all 16; or, of MXFP8's column copies, across it, 16 of them.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, cute

from nmoe.codegen.gemm import GemmProblem
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.quantize import as_float
from nmoe.codegen.templates.quantize import scale as ue8m0
from nmoe.storage import BLOCK

THREADS = 256
CHUNK = 16


def launch(problem: GemmProblem, named, stream) -> None:  # type: ignore[no-untyped-def]
    """Fills a_wide and b_wide from a and b."""
    for name in ("a", "b"):
        across = problem.precision == "mxfp8" and (problem.role, name) not in (
            ("fprop", "a"), ("fprop", "b"), ("dgrad", "a")
        )  # fmt: skip
        Dequantize(problem.precision, across).launch(
            named[name], named[f"{name}_scale"], named[f"{name}_wide"], stream
        )


class Dequantize(Fixed):
    """data uint8 [..., lines, length] ([..., length / 2] of nibbles), scale uint8, wide bfloat16 [..., lines, length].
    `across`: blocks run down the lines, and scale is [..., length, lines / 32]."""

    def __init__(self, precision: str, across: bool) -> None:
        self.precision, self.across = precision, across

    @cute.jit
    def launch(self, data: cute.Tensor, scale: cute.Tensor, wide: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
        *batch, lines, length = wide.shape
        matrices = batch[0] if cutlass.const_expr(len(batch) == 1) else 1
        chunks = length // CHUNK
        blocks = cute.ceil_div(chunks * lines, THREADS)
        self.decode(data.iterator, scale.iterator, wide.iterator, lines, length).launch(
            grid=[blocks, matrices, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def decode(
        self, data: cute.Pointer, scale: cute.Pointer, wide: cute.Pointer, lines: Int32, length: Int32
    ):
        block, matrix, _ = cute.arch.block_idx()
        chunks = length // CHUNK
        index = block * THREADS + cute.arch.thread_idx()[0]
        line, column = index // chunks, index % chunks * CHUNK
        size = BLOCK[self.precision]
        if line < lines:
            first = (Int64(matrix) * lines + line) * length + column
            codes = 8 if cutlass.const_expr(self.precision == "nvfp4") else CHUNK
            held = cute.make_rmem_tensor(codes, data.dtype)
            source = data + first * codes // CHUNK
            cute.autovec_copy(cute.make_tensor(source.align(8), cute.make_layout(codes)), held)
            values = cute.make_rmem_tensor(CHUNK, Float32)
            if cutlass.const_expr(self.precision == "mxfp8"):
                values.store(cute.recast_tensor(held, Float8E4M3FN).load().to(Float32))
            else:
                for i in cutlass.range_constexpr(CHUNK):
                    values[i] = _e2m1(Int32(held[i // 2]) >> i % 2 * 4)
            if cutlass.const_expr(self.across):
                down = (Int64(matrix) * length + column) * (lines // size) + line // size
                for i in cutlass.range_constexpr(CHUNK):
                    values[i] = values[i] * ue8m0(Int32((scale + (down + i * (lines // size))).load()))
            else:
                code = (scale + first // size).load()
                factor = ue8m0(Int32(code)) if cutlass.const_expr(self.precision == "mxfp8") else _e4m3(code)
                values.store(values.load() * factor)
            rounded = cute.make_rmem_tensor(CHUNK, BFloat16)
            rounded.store(values.load().to(BFloat16))
            cute.autovec_copy(rounded, cute.make_tensor((wide + first).align(16), cute.make_layout(CHUNK)))


def _e4m3(code) -> Float32:  # type: ignore[no-untyped-def]
    held = cute.make_rmem_tensor(4, code.dtype)
    held.fill(code)
    return cute.recast_tensor(held, Float8E4M3FN).load().to(Float32)[0]


def _e2m1(code: Int32) -> Float32:
    """The low 4 bits. Exponent and fraction in FP32's places, where the subnormal rule is the same; rebiased."""
    sign = (code & 8) << 28
    return as_float(sign | (code & 7) << 22) * Float32(2.0**126)
