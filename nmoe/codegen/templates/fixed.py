"""Helpers of a kernel that hold compile-time facts and handles."""

from __future__ import annotations


class Fixed:
    """An object whose attributes no control flow of the kernel reassigns.

    CuTeDSL carries whatever a run-time `if` or loop touches as values of that branch; a Fixed carries nothing.
    """

    def __extract_mlir_values__(self) -> list[object]:
        return []

    def __new_from_mlir_values__(self, values: list[object]) -> Fixed:
        return self
