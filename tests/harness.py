"""Runs one op, or a whole schedule, through the real path: graph, reverse pass, memory plan, executor.

`run_op` surrounds the op by three helper ops of its own. `test.source` turns a parameter into an activation, so that
the reverse pass gives it a gradient, which ends in the parameter's accumulator. `test.probe` makes a result an
output of the graph and gives it a cotangent. What an op has not written itself is poison: see `poisoned_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nmoe import formats
from nmoe.differentiate import differentiate
from nmoe.executor import DTYPES, Executor, allocate
from nmoe.graph import Graph, Phase, Spec, check
from nmoe.model import COUNTER
from nmoe.ops import OPS
from nmoe.ops.base import OpDef, wide
from nmoe.schedule import Schedule, passes, place

FORMATS = {dtype: name for name, dtype in DTYPES.items()}
POISONS = (0xFF, 0x7B)  # bytes: NaN and −1; huge but finite


class Source(OpDef):
    kind, outputs = "test.source", ("x",)

    def infer(self, attrs, x):
        return {"x": x}

    def gradient(self, g, op, douts):
        g.emit("test.sink", f"{op.name}.bwd", [douts[0]], into={"d": g.grad(op.inputs[0])})
        return (None,)

    def reference(self, attrs, ins, outs, scratch):
        outs[0].copy_(ins[0])


class Sink(OpDef):
    kind, outputs, accumulates = "test.sink", ("d",), ("d",)

    def infer(self, attrs, d):
        return {"d": Spec(d.shape, wide(d.format))}

    def reference(self, attrs, ins, outs, scratch):
        outs[0].add_(ins[0])


class Probe(OpDef):
    kind, outputs = "test.probe", ("seen",)

    def infer(self, attrs, y, cotangent=None):
        return {"seen": y}

    def gradient(self, g, op, douts):
        if op.inputs[1] is None:
            return (None, None)
        return (*g.emit("test.source", f"{op.name}.cotangent", [op.inputs[1]]), None)

    def reference(self, attrs, ins, outs, scratch):
        outs[0].copy_(ins[0])


for _definition in (Source(), Sink(), Probe()):
    OPS[_definition.kind] = _definition


@dataclass
class Result:
    outputs: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # by the op's label, accumulated ones included
    grads: dict[int, torch.Tensor] = field(default_factory=dict)  # by the operand's index


def run_op(
    kind: str,
    operands: Sequence[torch.Tensor | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    cotangents: Mapping[str, torch.Tensor] | None = None,
    params: Sequence[int] = (),
    rows: int = 0,
    rows_of: Sequence[int] = (),
    into: Mapping[str, torch.Tensor] | None = None,
    stages: Sequence[Callable[[Graph], Graph]] = (),
) -> Result:
    """Runs an op forward, and backward from `cotangents` (by output label).

    `params` are the operands whose gradient the op itself accumulates; other floating-point operands become
    activations. `rows` binds the symbol "R", the first dimension of the operands `rows_of`; `into` holds the initial
    values of accumulated outputs; `stages` are passes to apply. The op runs once for each poison.
    Cotangents of outputs of R rows may be shorter: the rest is NaN.
    """
    cotangents, into = cotangents or {}, into or {}
    graph, names = Graph(), []
    values: dict[str, torch.Tensor] = {}

    def declare(name, x, shape, kind):
        values[name] = x
        return graph.add(name, shape, FORMATS[x.dtype], kind)

    for i, x in enumerate(operands):
        if x is None:
            names.append(None)
            continue
        shape = ("R" if i in rows_of else x.shape[0], *x.shape[1:])
        active = x.is_floating_point() and i not in params
        name = declare(f"in{i}", x, shape, "param" if active or i in params else "input")
        names.append(graph.emit("test.source", f"{name}.source", [name])[0] if active else name)
    place_of = {
        label: f"loss.{label}" for label in OPS[kind].outputs
    }  # the reverse pass starts at "loss." names
    place_of |= {label: f"state.{label}" for label in into if label != "loss"}
    targets = {label: declare(place_of[label], x, tuple(x.shape), "state") for label, x in into.items()}
    made = graph.emit(kind, "op", names, attrs, into=targets)
    for label, name in zip(OPS[kind].outputs, made, strict=True):
        if name is not None and label not in into:
            spec, cotangent = graph.tensors[name].spec, None
            if label in cotangents:
                c = cotangents[label]
                if spec.shape[0] == "R":
                    c = torch.cat([c, torch.full((rows - len(c), *c.shape[1:]), torch.nan, dtype=c.dtype)])
                cotangent = declare(f"cotangent.{label}", c, spec.shape, "input")
            seen = graph.add(f"loss.{label}", spec.shape, spec.format, "output")
            graph.emit("test.probe", f"{label}.probe", [name, cotangent], into={"seen": seen})
    graph = differentiate(graph)
    graph.add(COUNTER, (1,), "i64", "state")
    for stage in (*stages, passes.drop_unused):
        graph = stage(graph)
    check(graph)
    schedule = place(graph, "cpu", {"R": rows})

    results = []
    for poison in POISONS:
        tensors = allocate(schedule)
        for name, x in values.items():
            tensors[name].copy_(x)
        executor = poisoned_executor(schedule, tensors, poison)
        poisoned_run(executor, "step", poison)
        poisoned_run(executor, "micro", poison)
        for name, x in values.items():
            if name.startswith("in"):
                assert same_bits(tensors[name], x), f"{kind} wrote into its operand {name}"
        seen = {label: executor.operand(at).clone() for label, at in place_of.items() if at in graph.tensors}
        grads = {i: tensors[f"in{i}.grad"] for i in range(len(operands)) if f"in{i}.grad" in tensors}
        results.append(Result(seen, grads))
    for label, x in results[0].outputs.items():
        if graph.tensors[place_of[label]].shape[:1] != ("R",) or not x.is_floating_point():
            assert same_bits(x, results[1].outputs[label]), f"{kind}'s {label} depends on what lay in memory"
    for i, x in results[0].grads.items():
        if i not in rows_of:  # rows past the last expert's may hold anything
            assert same_bits(x, results[1].grads[i]), f"the gradient of {i} depends on what lay in memory"
    return results[0]


def compare(
    kind: str,
    operands: Sequence[torch.Tensor | None],
    attrs: Mapping[str, Any],
    oracle: Callable[..., dict[str, torch.Tensor]],
    *,
    gradient_of: Sequence[str] = (),
    tolerance: float = 1e-11,
    valid: int | None = None,
    **options: Any,
) -> Result:
    """Runs the op and compares outputs and gradients with those of `oracle`, differentiated by autograd in float64.

    The oracle maps the operands to outputs by label; those in `gradient_of` get random cotangents, the op's format
    permitting, and scalars that it accumulates ("into") a cotangent of one. Of tensors of `rows` rows, `valid` count.
    """
    rows_of, into = options.get("rows_of", ()), options.get("into") or {}
    leaves = [x.double().requires_grad_() if x is not None and x.is_floating_point() else x for x in operands]
    expected = oracle(*leaves)
    generator = torch.Generator().manual_seed(len(operands))
    fmt = next(x.dtype for x in operands if x is not None and x.is_floating_point())
    cotangents, total = {}, torch.zeros(())
    for label in gradient_of:
        y = expected[label]
        c = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(fmt)
        total = total + (y * c.double()).sum()
        cotangents[label] = c
    for label in into:
        if expected[label].requires_grad:
            total = total + expected[label].sum()
    result = run_op(kind, operands, attrs, cotangents=cotangents, **options)
    for label, y in expected.items():
        found = result.outputs[label]
        if label in into:
            y = y + into[label]
        close(found[: len(y)], y.detach(), tolerance, f"{kind}'s {label}")
    if total.requires_grad:
        tracked = [i for i, x in enumerate(leaves) if x is not None and x.requires_grad]
        grads = dict(
            zip(
                tracked,
                torch.autograd.grad(total, [leaves[i] for i in tracked], allow_unused=True),
                strict=True,
            )
        )
        for i, found in result.grads.items():
            upto = valid if i in rows_of else None
            assert grads[i] is not None, f"{kind} gives operand {i} a gradient that it has not"
            close(found[:upto], grads.pop(i)[:upto], tolerance, f"{kind}'s gradient of operand {i}")
        left = [i for i, x in grads.items() if x is not None and x.abs().sum() > 0]
        assert not left, f"{kind} gives operands {left} no gradient"
    return result


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-11, what: str = "") -> None:
    """|found − expected| ≤ tolerance · (the largest |expected| + 1), everywhere."""
    assert found.shape == expected.shape, (
        f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    )
    if found.numel() == 0:
        return
    worst = (found.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * (expected.double().abs().max().item() + 1), f"{what} is off by {worst:.3g}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned_executor(schedule: Schedule, tensors: Mapping[str, torch.Tensor], poison: int) -> Executor:
    return Executor(schedule, tensors, torch.full((schedule.arena_bytes,), poison, dtype=torch.uint8))


def poisoned_run(executor: Executor, phase: Phase, poison: int) -> None:
    """`executor.run`, but what an op is going to write, and its scratch, is overwritten by `poison` before it runs, and
    what nobody will read any more after it has run.

    An op that reads what it has not written, and a memory plan that gives away what is still read, compute on poison.
    """
    aliases = executor.schedule.aliases
    ops = {op.name: op for op in executor.schedule.graph.ops}

    def buffers(names):
        return {aliases.get(name, name) for name in names if name is not None}

    calls = executor._phases[phase]
    last_use = {name: op for op, _ in calls for name in buffers((*ops[op].inputs, *ops[op].outputs))}
    made = buffers(name for op, _ in calls for name in ops[op].outputs)
    made = {name for name in made if executor.schedule.graph.tensors[name].kind == "activation"}
    with torch.no_grad():
        for name, call in calls:
            op = ops[name]
            assert isinstance(call, partial)
            _, _, outs, scratch = call.args
            definition, sources = OPS[op.kind], buffers(op.inputs)
            for label, out, x in zip(definition.outputs, op.outputs, outs, strict=True):
                if out is not None and label not in definition.accumulates and not buffers([out]) & sources:
                    fill(x, poison)
            for x in scratch:
                fill(x, poison)
            call()
            for x in scratch:
                fill(x, poison)
            for buffer in buffers((*op.inputs, *op.outputs)) & made:
                if last_use[buffer] == name and phase == "micro":
                    fill(executor.operand(buffer), poison)


def fill(x: Any, poison: int) -> None:
    parts = [x.data, x.scale, x.amax] if isinstance(x, formats.Quantized) else [x]
    for part in parts:
        if part is not None and part.numel():
            part.reshape(-1).view(torch.uint8).fill_(poison)
