"""What an op kind is: one `OpDef` holds its shape rule, gradient, cost and reference math.

The reference math, and it alone, imports torch, when it is called: whatever only describes a step needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nmoe.graph import ELEMENT_BYTES, QUANTIZED, Graph, Name, Op, Shape, Spec
from nmoe.storage import storage

Attrs = Mapping[str, Any]
Specs = list[Any]  # of operands in order: a Spec with concrete shape, or None where one is absent


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call needs: floating-point operations (a multiply-add is two) and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def numel(shape: Shape) -> int:
    return math.prod(int(d) for d in shape)


PART_ALIGNMENT = 16  # bytes: what vector loads and TMA ask of an address


@dataclass(frozen=True, slots=True)
class Part:
    """One buffer of a quantized value: where it starts in the value's memory, in bytes, and what it holds."""

    offset: int
    shape: tuple[int, ...]
    format: str  # of an element

    @property
    def end(self) -> int:
        return self.offset + numel(self.shape) * ELEMENT_BYTES[self.format]


def parts(spec: Spec) -> dict[str, Part]:
    """The buffers of a quantized value in the order of `storage`, each on a multiple of PART_ALIGNMENT."""
    placed: dict[str, Part] = {}
    end = 0
    assert spec.axis is not None
    stored = storage(spec.format, spec.shape, spec.axis, spec.segments or None, spec.atoms)
    for label, (shape, element) in stored.items():
        placed[label] = Part(-(-end // PART_ALIGNMENT) * PART_ALIGNMENT, shape, element)
        end = placed[label].end
    return placed


def nbytes(spec: Spec) -> int:
    """Bytes of a value whose shape is concrete; of a quantized one with its scale factors, amax and the gaps that
    align them."""
    if spec.format in QUANTIZED:
        return max(part.end for part in parts(spec).values())
    return numel(spec.shape) * ELEMENT_BYTES[spec.format]


def row_parts(rows: Spec) -> tuple[int, ...]:
    """Bytes of a row that travels: of its elements or, in MXFP8, of them and their scale factors."""
    width = int(rows.shape[1])
    if rows.format not in QUANTIZED:
        return (width * ELEMENT_BYTES[rows.format],)
    assert (rows.format, rows.axis) == ("mxfp8", 1), (
        f"rows of {rows.format} along axis {rows.axis} do not travel"
    )
    return tuple(shape[1] for shape, _ in storage(rows.format, (1, width), 1).values())


class OpDef:
    """Base of all op kinds. Tensors reach `reference` as torch tensors (or `formats.Quantized`) in the order of
    the op's inputs, outputs and `scratch`; absent ones are None. `reference` allocates nothing of its own: all it
    needs beside its operands is declared by `scratch`."""

    kind: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    accumulates: ClassVar[tuple[str, ...]] = ()  # outputs that are added to
    inplace: ClassVar[dict[str, int]] = {}  # output → index of the input whose buffer it may take
    waits: ClassVar[bool] = (
        False  # its reference reads values of the device on the host: no part of a CUDA graph
    )
    cheap: ClassVar[bool] = False  # memory-bound: `recompute = "selective"` computes it again for backward

    def infer(self, attrs: Attrs, *inputs: Any) -> dict[str, Spec]:
        raise NotImplementedError

    def gradient(self, g: Graph, op: Op, douts: tuple[Name, ...]) -> tuple[Name, ...]:
        """Emits the ops that turn the gradients of the outputs into those of the inputs.

        Returns one name for each input, None where there is no gradient or where it was accumulated in place.
        """
        raise NotImplementedError(f"{self.kind} has no gradient")

    def cost(self, attrs: Attrs, ins: Specs, outs: Specs) -> Cost:
        return Cost(0.0, float(sum(nbytes(s) for s in [*ins, *outs] if s is not None)))

    def scratch(self, attrs: Attrs, ins: Specs, outs: Specs) -> list[Spec]:
        return []

    def reference(self, attrs: Attrs, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        raise NotImplementedError


OPS: dict[str, OpDef] = {}


def register(definition: type[OpDef]) -> type[OpDef]:
    OPS[definition.kind] = definition()
    return definition


def wide(format: str) -> str:
    """The accumulation format: FP32, or FP64 where a test runs everything in float64."""
    return "f64" if format == "f64" else "f32"


def memory_bytes(*specs: Spec | None) -> float:
    return float(sum(nbytes(s) for s in specs if s is not None))
