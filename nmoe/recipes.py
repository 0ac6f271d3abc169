"""Which operand of which GEMM is quantized, and how: the precision recipes as data.

A linear layer y = x Wᵀ, W [N, K], x [M, K], runs three GEMMs, each over another axis:

    pass    result             contracts  operand A       operand B
    fprop   y  [M, N] = x Wᵀ   K          x,  axis 1      W, axis 1
    dgrad   dx [M, K] = dy W   N          dy, axis 1      W, axis 0
    wgrad   dW [N, K] = dyᵀ x  M          dy, axis 0      x, axis 0

Each pass may run in a precision of its own; every copy is quantized from the high-precision tensor, never
from another copy, but for rows that travel between ranks as one (`payload`). Sources: TransformerEngine's
MXFP8BlockScaling (E4M3 throughout, round to nearest) and the NVFP4 recipe of arXiv 2509.25149 §4
(TransformerEngine's NVFP4BlockScaling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nmoe.config import Precision
from nmoe.storage import Axis, Format, Rounding

Pass = Literal["fprop", "dgrad", "wgrad"]
Slot = Literal["A", "B"]
Role = Literal["activation", "weight", "gradient"]


@dataclass(frozen=True)
class QuantizeSpec:
    """How one operand of one GEMM is quantized."""

    role: Role
    format: Format
    axis: Axis
    rounding: Rounding = "nearest"
    hadamard: bool = False
    square: bool = False


Recipe = dict[tuple[Pass, Slot], QuantizeSpec]

MXFP8: Recipe = {
    ("fprop", "A"): QuantizeSpec("activation", "mxfp8", 1),
    ("fprop", "B"): QuantizeSpec("weight", "mxfp8", 1),
    ("dgrad", "A"): QuantizeSpec("gradient", "mxfp8", 1),
    ("dgrad", "B"): QuantizeSpec("weight", "mxfp8", 0),
    ("wgrad", "A"): QuantizeSpec("gradient", "mxfp8", 0),
    ("wgrad", "B"): QuantizeSpec("activation", "mxfp8", 0),
}

# Square weight scales make fprop and dgrad see one and the same weight. Stochastic rounding removes the bias
# of small gradients; on activations or weights it adds noise that diverges. The Hadamard transform spreads
# wgrad's outliers over 16 tokens and cancels between its operands.
NVFP4: Recipe = {
    ("fprop", "A"): QuantizeSpec("activation", "nvfp4", 1),
    ("fprop", "B"): QuantizeSpec("weight", "nvfp4", 1, square=True),
    ("dgrad", "A"): QuantizeSpec("gradient", "nvfp4", 1, rounding="stochastic"),
    ("dgrad", "B"): QuantizeSpec("weight", "nvfp4", 0, square=True),
    ("wgrad", "A"): QuantizeSpec("gradient", "nvfp4", 0, rounding="stochastic", hadamard=True),
    ("wgrad", "B"): QuantizeSpec("activation", "nvfp4", 0, hadamard=True),
}

RECIPES: dict[Precision, Recipe] = {"fp32": {}, "bf16": {}, "mxfp8": MXFP8, "nvfp4": NVFP4}


PAYLOAD = 512  # elements of MXFP8 whose scale factors fill the 16 bytes that bulk copies move at least


def payload(operands: Sequence[QuantizeSpec], width: int) -> QuantizeSpec | None:
    """As what rows of `width` elements travel to GEMMs that take them as `operands`; None: in BF16.

    In MXFP8, where all do. The copy along the rows is the one that the GEMM would have of BF16 rows; one along the
    columns is rounded twice, which moves it by some 1e-6 of its norm (docs/rdep.md, "What travels"). NVFP4 rows have a
    scale of all the rows of an expert, which nobody knows before they have arrived.
    """
    along = [how for how in operands if how.axis == 1]
    quantized = along and width % PAYLOAD == 0 and all(how.format == "mxfp8" for how in operands)
    return along[0] if quantized else None


def operand(precision: Precision, pass_: Pass, slot: Slot) -> QuantizeSpec | None:
    """How `slot` of the GEMM of `pass_` is quantized when that pass runs in `precision`; None: it is not."""
    return RECIPES[precision].get((pass_, slot))
