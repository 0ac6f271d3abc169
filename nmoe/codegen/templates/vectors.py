"""Rows in 16-byte pieces, spread over a warp: lane l holds pieces l, l + 32, …"""

from __future__ import annotations

import cutlass
from cutlass import Int64, cute

from nmoe.codegen.problem import VECTOR

IN_FLIGHT = 8  # pieces that a lane loads before it uses the first


def pieces(row: cute.Tensor) -> cute.Tensor:
    """A row of BF16 as (8, pieces)."""
    return cute.zipped_divide(row, (VECTOR,))


def row_of(matrix: cute.Tensor, row) -> cute.Tensor:  # type: ignore[no-untyped-def]
    """One row; in 64 bits, since a matrix may have more than 2^31 elements."""
    return matrix[Int64(row), None]


def spans(count: int) -> list[range]:
    """Numbers of a lane's pieces, in the portions that are in flight together, of a row of `count` pieces."""
    lanes = -(-count // 32)
    return [range(first, min(first + IN_FLIGHT, lanes)) for first in range(0, lanes, IN_FLIGHT)]


@cute.jit
def load(row: cute.Tensor, span: cutlass.Constexpr, lane) -> list[cute.Tensor]:  # type: ignore[no-untyped-def]
    """This lane's pieces of a span, in registers; what lies past the row's end is undefined."""
    source, found = pieces(row), []
    for i in cutlass.range_constexpr(len(span)):
        piece = cute.make_rmem_tensor((VECTOR,), row.element_type)
        at = span[i] * 32 + lane
        if cutlass.const_expr((span[i] + 1) * 32 <= cute.size(source, mode=[1])):
            cute.autovec_copy(source[None, at], piece)
        else:
            if at < cute.size(source, mode=[1]):
                cute.autovec_copy(source[None, at], piece)
        found.append(piece)
    return found


@cute.jit
def store(values: list[cute.Tensor], row: cute.Tensor, span: cutlass.Constexpr, lane) -> None:  # type: ignore[no-untyped-def]
    target = pieces(row)
    for i in cutlass.range_constexpr(len(span)):
        at = span[i] * 32 + lane
        if cutlass.const_expr((span[i] + 1) * 32 <= cute.size(target, mode=[1])):
            cute.autovec_copy(values[i], target[None, at])
        else:
            if at < cute.size(target, mode=[1]):
                cute.autovec_copy(values[i], target[None, at])
