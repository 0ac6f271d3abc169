"""What the oracles of the kernel families share."""

from __future__ import annotations

from typing import Any

Tensors = dict[str, Any]  # by operand: tensors, and numbers for scalars


class Mismatch(Exception):
    """A kernel's result is not what its operands make it."""
