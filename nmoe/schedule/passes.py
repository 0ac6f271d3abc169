"""Graph → graph: the loss's two halves become one, which on a GPU becomes GEMMs and a kernel between them; operands are
quantized, activations are computed again, rows are gathered where they are multiplied.

Every pass takes and returns a whole graph and keeps the rules of `graph.check`.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Literal, NamedTuple

from nmoe import recipes
from nmoe.graph import Graph, Name, Op, Phase, Spec, Stage
from nmoe.model import COUNTER
from nmoe.ops import OPS
from nmoe.ops.base import OpDef
from nmoe.ops.gemm import CONTRACTED
from nmoe.schedule.fuse import readers

Recompute = Literal["none", "selective", "full"]


class _Wanted(NamedTuple):
    """A quantized copy; of rows whose segments begin at `offsets`."""

    how: recipes.QuantizeSpec
    offsets: Name
    atoms: bool


def merge_loss(graph: Graph) -> Graph:
    """Replaces each cross-entropy and its gradient by the op that does both with one product for the logits."""
    g = graph.copy()
    backward = {op.inputs: op for op in g.ops if op.kind == "linear_cross_entropy_bwd"}
    dropped = {op.name for op in backward.values()}
    ops: list[Op] = []
    for op in g.ops:
        if op.kind == "linear_cross_entropy" and op.inputs in backward:
            twin = backward[op.inputs]
            ops.append(
                replace(op, kind="linear_cross_entropy_fwd_bwd", outputs=(op.outputs[0], *twin.outputs[1:]))
            )
        elif op.name not in dropped:
            ops.append(op)
    g.ops = ops
    return g


def split_loss(graph: Graph) -> Graph:
    """Replaces each op of `merge_loss` by the GEMMs that it stands for and cross-entropy between them, whose logits all
    exist at once."""
    g = graph.copy()
    g.ops = []
    for op in graph.ops:
        if op.kind != "linear_cross_entropy_fwd_bwd":
            g.ops.append(op)
            continue
        (h, w, targets, scale), (loss, dh, dw) = op.inputs, op.outputs
        g.stage = op.stage
        attrs = {"format": g.tensors[h or ""].format, "precision": {}}
        logits, _ = g.emit("gemm", f"{op.name}.logits", [h, w], {**attrs, "role": "fprop"})
        _, dlogits = g.emit(
            "cross_entropy", op.name, [logits, targets, scale], op.attrs, into={"loss": loss or ""}
        )
        g.emit("gemm", f"{op.name}.wgrad", [dlogits, h], {**attrs, "role": "wgrad"}, into={"dw": dw or ""})
        g.emit("gemm", f"{op.name}.dgrad", [dlogits, w], {**attrs, "role": "dgrad"}, into={"y": dh or ""})
    return g


def quantize_operands(graph: Graph, atoms: bool = False) -> Graph:
    """Puts each operand of a low-precision GEMM into its recipe's format.

    A copy is made right where the tensor is produced, once for all its users, so that it can be fused into the
    producer; a parameter's copies are made once an optimizer step. `atoms`: scale factors lie as block-scaled MMA
    reads them, but those of rows that are dispatched: rows that every GEMM takes in MXFP8 are quantized before, and
    other copies are made of what has arrived.
    """
    g = graph.copy()
    g.ops = []
    wanted: dict[str, dict[str, _Wanted]] = {}  # tensor → copy's suffix → how
    users: dict[tuple[str, int], str] = {}  # (op, operand) → what it reads instead
    read = readers(graph)

    def want(name: str, how: recipes.QuantizeSpec, offsets: Name = None, atoms: bool = atoms) -> str:
        suffix = f"{how.format}.{'row' if how.axis else 'col'}{'.sr' if how.rounding == 'stochastic' else ''}"
        found = wanted.setdefault(name, {})
        if suffix in found and found[suffix].atoms != atoms:
            suffix += ".sent"
        found[suffix] = _Wanted(how, offsets, atoms)
        return f"{name}.{suffix}.q"

    operands: dict[str, list[tuple[tuple[str, int], recipes.QuantizeSpec, Name]]] = {}
    for op in graph.ops:
        if op.kind not in ("gemm", "grouped_gemm") or not op.attrs["precision"]:
            continue
        role = op.attrs["role"]
        slots: tuple[recipes.Slot, recipes.Slot] = ("A", "B")
        for slot, operand in enumerate(slots):
            name = op.inputs[slot]
            how = recipes.operand(op.attrs["precision"][role], role, operand)
            if how is None or name is None:
                continue
            assert how.axis == CONTRACTED[role][slot]
            is_rows = op.kind == "grouped_gemm" and graph.tensors[name].kind != "param"
            operands.setdefault(name, []).append(((op.name, slot), how, op.inputs[2] if is_rows else None))
    sent: dict[str, recipes.QuantizeSpec] = {}  # rows that travel quantized
    for op in graph.ops:
        rows = op.outputs[0] if op.kind == "dispatch" else None
        if rows is None or len(operands.get(rows, ())) < read[rows]:
            continue
        shape = graph.shape(rows)
        if how := recipes.payload([how for _, how, _ in operands[rows]], shape[1]):
            sent[rows] = how
            g.tensors[rows] = replace(g.tensors[rows], spec=Spec(shape, how.format, how.axis))
    for name, uses in operands.items():
        for user, how, offsets in uses:
            travels = name in sent and how == sent[name] and not atoms
            users[user] = name if travels else want(name, how, offsets)
    for op in graph.ops:
        if op.kind == "dispatch" and (rows := op.outputs[0]) in sent:
            users[op.name, 0] = want(op.inputs[0] or "", sent[rows], atoms=False)

    def copies(name: str, phase: Phase, stage: Stage) -> None:
        for suffix, (how, offsets, atoms) in wanted.pop(name, {}).items():
            attrs = {"format": how.format, "axis": how.axis, "rounding": how.rounding, "hadamard": how.hadamard,
                     "square": how.square, "atoms": atoms,
                     "seed": zlib.crc32(f"{name}.{suffix}".encode()) << 31}  # an int64  # fmt: skip
            g.stage = stage
            counter = COUNTER if how.rounding == "stochastic" else None
            g.emit("quantize", f"{name}.{suffix}", [name, offsets, counter], attrs, phase=phase)

    for name in list(wanted):
        if graph.tensors[name].kind == "param":
            copies(name, "step", "forward")
    for op in graph.ops:
        inputs = tuple(users.get((op.name, i), x) for i, x in enumerate(op.inputs))
        g.ops.append(replace(op, inputs=inputs))
        for output in op.outputs:
            if output is not None:
                copies(output, op.phase, op.stage)
    return g


def recompute(graph: Graph, policy: Recompute) -> Graph:
    """Drops forward activations that the backward pass can compute again.

    "selective" recomputes the outputs of memory-bound ops and their quantized copies, "full" everything in a layer
    but what its router decided. Ops that accumulate (losses, expert loads) run once. A recomputed op stands right
    before its first backward user and gives the same bits, since no op draws on anything but its inputs.
    """
    if policy == "none":
        return graph
    producer = {out: op for op in graph.ops if op.stage == "forward" for out in op.outputs if out is not None}

    def layer_of(op: Op) -> tuple[str, ...]:
        return tuple(op.name.split(".")[:2])

    boundary = {
        name
        for op in graph.ops
        if op.stage == "forward"
        for name in op.inputs
        if name in producer and layer_of(producer[name]) != layer_of(op)
    }

    def again(op: Op) -> bool:
        definition: OpDef = OPS[op.kind]
        pairs = zip(definition.outputs, op.outputs, strict=True)
        adds = any(out is not None and label in definition.accumulates for label, out in pairs)
        if op.phase != "micro" or adds or op.kind in ("router", "moe_plan"):
            return False
        if policy == "selective":
            if op.kind == "quantize":  # a copy is as cheap as what it is made from
                source = producer.get(op.inputs[0] or "")
                return source is not None and again(source)
            return definition.cheap
        return op.name.startswith(("layers.", "mtp.")) and not any(out in boundary for out in op.outputs)

    quantizers: dict[Name, list[str]] = {}
    for op in graph.ops:
        if op.kind == "quantize":
            quantizers.setdefault(op.inputs[0], []).extend(out for out in op.outputs if out is not None)
    g = graph.copy()
    g.ops = []
    copies: dict[str, str] = {}

    def available(name: Name) -> Name:
        if name is None or name not in producer or not again(producer[name]):
            return name
        if name in copies:
            return copies[name]
        op = producer[name]
        inputs = tuple(available(x) for x in op.inputs)
        if name not in copies:  # an input's copies may have brought it
            for out in op.outputs:
                if out is not None:
                    copies[out] = f"{out}.again"
                    g.tensors[copies[out]] = replace(g.tensors[out], name=copies[out])
            outputs = tuple(copies[out] if out is not None else None for out in op.outputs)
            g.ops.append(
                replace(op, name=f"{op.name}.again", inputs=inputs, outputs=outputs, stage="backward")
            )
            for out in op.outputs:  # beside their source, so that one kernel makes them from registers
                for copy in quantizers.get(out, ()):
                    available(copy)
        return copies[name]

    for op in graph.ops:
        if op.stage == "forward":
            g.ops.append(op)
        else:
            inputs = tuple(available(name) for name in op.inputs)
            g.ops.append(replace(op, inputs=inputs))
    return g


def gather_rows(graph: Graph) -> Graph:
    """Gives each GEMM that reads dispatched rows a dispatch of its own, right before it, so that its loads can gather
    them and no memory holds them; router weights are dispatched alone.

    Rows that another rank sends or that are quantized are needed whole.
    """
    kept = {name for op in graph.ops if op.kind != "grouped_gemm" for name in op.inputs}
    g = graph.copy()
    g.ops = []
    dispatched: dict[Name, Op] = {}
    for op in graph.ops:
        rows = op.outputs[0]
        if op.kind == "dispatch" and "ranks" not in op.attrs and rows is not None and rows not in kept:
            dispatched[rows] = op
            if op.outputs[1] is not None:
                g.ops.append(replace(op, inputs=(None, *op.inputs[1:]), outputs=(None, op.outputs[1])))
            continue
        for name in op.inputs:
            if name is not None and name in dispatched:
                (x, _, *plan), own = dispatched[name].inputs, f"{op.name}.rows"
                g.tensors[own] = replace(g.tensors[name], name=own)
                g.ops.append(replace(dispatched[name], name=own, inputs=(x, None, *plan), outputs=(own, None),
                                     phase=op.phase, stage=op.stage))  # fmt: skip
                op = replace(op, inputs=tuple(own if i == name else i for i in op.inputs))
        g.ops.append(op)
    return g


def drop_unused(graph: Graph) -> Graph:
    """Removes ops whose results nobody reads, and tensors that no op touches."""
    g = graph.copy()
    needed: set[str] = set()
    kept: list[Op] = []
    for op in reversed(g.ops):
        definition = OPS[op.kind]
        lasting = any(
            out is not None and (label in definition.accumulates or g.tensors[out].kind == "output")
            for label, out in zip(definition.outputs, op.outputs, strict=True)
        )
        if lasting or any(out in needed for out in op.outputs):
            kept.append(op)
            needed.update(name for name in op.inputs if name is not None)
            needed.update(name for name in op.outputs if name is not None)
    g.ops = kept[::-1]
    g.tensors = {name: t for name, t in g.tensors.items() if t.kind != "activation" or name in needed}
    return g
