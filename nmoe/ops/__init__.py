"""The op kinds. Importing this package registers them all in `OPS`."""

from nmoe.ops import activation, attention, elementwise, embedding, gemm, loss, moe, norm, quantize
from nmoe.ops.base import OPS, Cost, OpDef, nbytes, numel, row_parts

__all__ = ["OPS", "Cost", "OpDef", "nbytes", "numel", "row_parts"]
_ = (activation, attention, elementwise, embedding, gemm, loss, moe, norm, quantize)
