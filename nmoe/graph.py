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
PHASES: tuple[Phase, ...] = ("init", "step", "micro")
STAGES: tuple[Stage, ...] = ("forward", "backward")
Name = str | None  # None: an optional operand that is absent

# "register": a value that a fused kernel never stores.
ELEMENT_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "i64": 8, "i32": 4, "bool": 1, "u8": 1, "register": 0}
QUANTIZED = ("mxfp8", "nvfp4")


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and format of a value. Of a quantized format, `axis` is the blocked axis, `segments` the number of row
    segments (experts) that have a global scale of their own, 0 for one, and `atoms` says that scale factors lie in
    atoms of 128 x 4 (formats.to_blocked), not in rows."""

    shape: Shape
    format: str
    axis: int | None = None
    segments: int = 0
    atoms: bool = False


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
    """Verifies the rules that every pass keeps: a tensor is written before it is read, once, by an op of the same or
    an earlier phase and stage; what an op takes and gives is what its own rule says, in shape, format and blocked
    axis; only gradients and state are accumulated, and parameters and inputs never written.

    Raises GraphError naming the op and the tensor.
    """
    from nmoe.ops import OPS

    external = {t.name for t in graph.of_kind("input", "param", "grad", "state")}
    writer: dict[str, Op] = {}
    names: set[str] = set()
    for op in graph.ops:
        if op.name in names:
            raise GraphError(f"two ops are named {op.name}")
        names.add(op.name)
        for name in op.inputs:
            if name is None or name in external:
                continue
            if name not in writer:
                raise GraphError(f"op {op.name} reads {name} before any op writes it")
            if _moment(op) < _moment(writer[name]):
                raise GraphError(
                    f"op {op.name} reads {name}, which {writer[name].name} writes in a later phase or stage"
                )
        for label, out, spec in _results(graph, op):
            if out not in graph.tensors:
                raise GraphError(f"op {op.name} writes {label} to {out}, which is not declared")
            tensor = graph.tensors[out]
            if tensor.spec != spec:
                raise GraphError(f"op {op.name}: {out} is {tensor.spec}, its rule gives {spec}")
            accumulates = label in OPS[op.kind].accumulates
            if tensor.kind not in (("grad", "state") if accumulates else ("activation", "const", "output")):
                verb = "accumulates into" if accumulates else "writes"
                raise GraphError(f"op {op.name} {verb} {out}, whose kind is {tensor.kind}")
            if out in writer and not accumulates:
                raise GraphError(f"{out} is written by {writer[out].name} and by {op.name}")
            writer[out] = op
    for tensor in graph.of_kind("output"):
        if tensor.name not in writer:
            raise GraphError(f"no op writes the output {tensor.name}")


def _moment(op: Op) -> tuple[int, int]:
    return PHASES.index(op.phase), STAGES.index(op.stage)


def _results(graph: Graph, op: Op) -> Iterator[tuple[str, str | None, Spec]]:
    """Label, tensor and spec, by the op's own rule, of each of its outputs."""
    from nmoe.ops import OPS

    if op.kind not in OPS:
        raise GraphError(f"op {op.name}: unknown kind {op.kind}")
    definition = OPS[op.kind]
    try:
        specs = definition.infer(op.attrs, *[None if i is None else graph.tensors[i].spec for i in op.inputs])
    except Exception as error:  # whatever a rule trips over when it meets operands that it was not made for
        raise GraphError(
            f"op {op.name}: {op.kind} cannot take {', '.join(map(str, op.inputs))}: {error}"
        ) from error
    given = {label for label, out in zip(definition.outputs, op.outputs, strict=False) if out is not None}
    if len(op.outputs) != len(definition.outputs) or given != set(specs):
        raise GraphError(f"op {op.name} writes {op.outputs} where {op.kind} gives {', '.join(specs)}")
    return (
        (label, out, specs[label]) for label, out in zip(definition.outputs, op.outputs, strict=True) if out
    )
