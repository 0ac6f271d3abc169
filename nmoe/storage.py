"""What is fixed of block-scaled values: blocks, scale factors, how they lie in memory. formats/ computes them.

Plain Python, so that graphs and kernels can be described on a machine, or in a process, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Format = Literal["mxfp8", "nvfp4"]
Axis = Literal[0, 1]
Rounding = Literal["nearest", "stochastic"]

BLOCK: dict[str, int] = {"mxfp8": 32, "nvfp4": 16}  # consecutive elements that share a scale factor
# Scale factors in atoms: the lines and blocks that one holds, and its size. docs/numerics.md draws it.
ATOM_ROWS, ATOM_SCALES, ATOM_BYTES = 128, 4, 512
# The diagonal of the random Hadamard transform, as long as an NVFP4 block. It is fixed, not drawn: TransformerEngine
# ships this vector, and both operands of wgrad must use the same one.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
HADAMARD_SIZE = len(SIGNS)
FLT_MAX = (2 - 2.0**-23) * 2.0**127


def storage(
    format: str, shape: Sequence[int], axis: int, segments: int | None = None, atoms: bool = False
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, element format) of the buffers of a value [..., M, K], blocked along `axis` (0 is M) and with so
    many row segments, its scales in rows or in `atoms` of 128 x 4 (`formats.to_blocked`), 512 bytes each.

    Raises ValueError if the blocks do not divide the axis.
    """
    check_divides(format, shape, axis)
    *batch, m, k = shape
    lines, length = (m, k) if axis == 1 else (k, m)
    blocks = length // BLOCK[format]
    scale = (*batch, lines, blocks)
    if atoms:
        scale = (*batch, -(-lines // ATOM_ROWS), -(-blocks // ATOM_SCALES), ATOM_BYTES)
    if format == "mxfp8":
        return {"data": (tuple(shape), "u8"), "scale": (scale, "u8")}
    data = (*batch, lines, length // 2)
    amax = tuple(batch) if segments is None else (segments,)
    return {"data": (data, "u8"), "scale": (scale, "u8"), "amax": (amax, "f32")}


def check_divides(format: str, shape: Sequence[int], axis: int) -> None:
    """Raises ValueError unless blocks of `format` divide `axis` of a shape [..., M, K]."""
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
