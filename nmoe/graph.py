"""The intermediate representation: tensors and ops, nothing else.

A `Graph` is an ordered list of `Op`s over named `Tensor`s. Names are paths (`layers.3.moe.gemm1`), an op's
outputs are `<op>.<output>`. Shapes hold ints and two symbols: "T", the tokens of a rank's micro-batch, and
"R", the rows of the expert buffers. What an op means is its `OpDef` in nmoe/ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Shape = tuple[Any, ...]  # ints and symbols
Kind = Literal["input", "const", "param", "grad", "state", "activation", "output"]
Phase = Literal["init", "step", "micro"]  # once a process, once an optimizer step, once a micro-batch
Stage = Literal["forward", "backward"]
Name = str | None  # None: an optional operand that is absent

ELEMENT_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "i64": 8, "i32": 4, "bool": 1, "u8": 1}
QUANTIZED = ("mxfp8", "nvfp4")


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and format of a value. Of a quantized format, `axis` is the blocked axis and `segments` the number
    of row segments (experts) that have a global scale of their own, 0 for one."""

    shape: Shape
    format: str
    axis: int | None = None
    segments: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    spec: Spec
    kind: Kind = "activation"

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    @property
    def format(self) -> str:
        return self.spec.format


@dataclass(frozen=True, slots=True)
class Op:
    """One call of the op `kind`. `attrs` are plain data. Outputs listed in the OpDef's `accumulates` add to
    the tensor that they name instead of replacing it."""

    name: str
    kind: str
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    phase: Phase = "micro"
    stage: Stage = "forward"


class GraphError(Exception):
    """The graph breaks one of its own rules: a bug in the builder or in a pass, never a user's mistake."""


class Graph:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.stage: Stage = "forward"  # of the ops that `emit` appends

    def add(self, name: str, shape: Shape, format: str, kind: Kind) -> str:
        """Declares a tensor that no op of the graph produces, or that ops accumulate into."""
        if name in self.tensors:
            raise GraphError(f"tensor {name} is declared twice")
        self.tensors[name] = Tensor(name, Spec(shape, format), kind)
        return name

    def emit(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Name],
        attrs: Mapping[str, Any] | None = None,
        *,
        into: Mapping[str, str] | None = None,
        phase: Phase = "micro",
    ) -> tuple[Name, ...]:
        """Appends an op and declares its outputs; `into` names tensors that exist for some of them.

        Returns the outputs' names in the OpDef's order; None for an output that the op does not have here.
        """
        from nmoe.ops import OPS

        definition = OPS[kind]
        attrs = dict(attrs or {})
        specs = definition.infer(attrs, *[None if i is None else self.tensors[i].spec for i in inputs])
        outputs: list[Name] = []
        for label in definition.outputs:
            if into and label in into:
                outputs.append(into[label])
            elif label in specs:
                full = f"{name}.{label}"
                if full in self.tensors:
                    raise GraphError(f"op {name} writes {full}, which exists")
                self.tensors[full] = Tensor(full, specs[label], "const" if phase == "init" else "activation")
                outputs.append(full)
            else:
                outputs.append(None)
        self.ops.append(Op(name, kind, tuple(inputs), tuple(outputs), attrs, phase, self.stage))
        return tuple(outputs)

    def grad(self, param: Name) -> str:
        """The gradient accumulator of a parameter: FP32 (FP64 under float64), zeroed once a step."""
        assert param is not None
        name = f"{param}.grad"
        if name not in self.tensors:
            spec = self.tensors[param].spec
            self.add(name, spec.shape, "f64" if spec.format == "f64" else "f32", "grad")
        return name

    def shape(self, name: Name) -> Shape:
        assert name is not None
        return self.tensors[name].shape

    def of_kind(self, *kinds: Kind) -> Iterator[Tensor]:
        return (t for t in self.tensors.values() if t.kind in kinds)

    def copy(self) -> Graph:
        twin = Graph()
        twin.tensors, twin.ops, twin.stage = dict(self.tensors), list(self.ops), self.stage
        return twin


def check(graph: Graph) -> None:
    """Verifies the rules that every pass keeps: each tensor is written before it is read, by one op; shapes
    and formats are those that the op's own rule gives; nothing quantized is used along its other axis.

    Raises GraphError naming the op and the tensor.
    """
    from nmoe.ops import OPS

    written = {t.name for t in graph.tensors.values() if t.kind != "activation" and t.kind != "const"}
    writer: dict[str, str] = {}
    names: set[str] = set()
    for op in graph.ops:
        if op.name in names:
            raise GraphError(f"two ops are named {op.name}")
        names.add(op.name)
        definition = OPS.get(op.kind)
        if definition is None:
            raise GraphError(f"op {op.name}: unknown kind {op.kind}")
        for name in op.inputs:
            if name is not None and name not in written:
                raise GraphError(f"op {op.name} reads {name} before any op writes it")
        specs = definition.infer(
            dict(op.attrs), *[None if i is None else graph.tensors[i].spec for i in op.inputs]
        )
        if len(op.outputs) != len(definition.outputs):
            raise GraphError(
                f"op {op.name} has {len(op.outputs)} outputs, {op.kind} defines {definition.outputs}"
            )
        for label, out in zip(definition.outputs, op.outputs, strict=True):
            if out is None:
                continue
            if label not in specs:
                raise GraphError(f"op {op.name} writes {label}, which {op.kind} does not give here")
            tensor = graph.tensors[out]
            if tensor.shape != specs[label].shape:
                raise GraphError(
                    f"op {op.name}: {out} has shape {tensor.shape}, its rule gives {specs[label].shape}"
                )
            if label in definition.accumulates:
                if tensor.kind not in ("grad", "state"):
                    raise GraphError(f"op {op.name} accumulates into {out} of kind {tensor.kind}")
            else:
                if tensor.spec != specs[label]:
                    raise GraphError(f"op {op.name}: {out} is {tensor.spec}, its rule gives {specs[label]}")
                if out in writer:
                    raise GraphError(f"{out} is written by {writer[out]} and by {op.name}")
                writer[out] = op.name
            written.add(out)
