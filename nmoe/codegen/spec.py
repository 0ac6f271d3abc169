"""What a kernel computes: the identity under which it is compiled, tuned and cached.

A kernel is a short program: an anchor op and its epilogues over numbered values. Names, layers and whatever is passed
when the kernel is launched (scalars, seeds, token counts) are left out, so that equal layers share one kernel and a
longer batch needs no new one. How it computes (tiles, stages, clusters) is the kernel's config, not its spec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from nmoe.config import Config
from nmoe.graph import QUANTIZED, Graph, Op, Tensor
from nmoe.schedule import Schedule

# What each attribute of an op means to its kernel: "code" changes the generated code, "flag" only by whether it is
# zero, "launch" is an argument and "shape" repeats what the operands' shapes and formats say.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "add": {},
    "attention": {"heads": "code", "nope": "code", "rope": "code", "v": "code", "window": "launch", "seq_len": "launch",
                  "scale": "launch"},
    "combine": {"ranks": "code"},
    "concat": {},
    "cross_entropy": {"weight": "launch"},
    "dispatch": {"ranks": "code"},
    "embedding": {},
    "embedding_bwd": {},
    "gemm": {"role": "code", "format": "shape", "precision": "shape"},
    "grouped_gemm": {"role": "code", "format": "shape", "precision": "shape", "experts": "shape"},
    "linear_cross_entropy_fwd_bwd": {"weight": "launch"},
    "moe_plan": {"experts": "code", "ranks": "code", "align": "code", "format": "shape"},
    "quantize": {"format": "shape", "axis": "shape", "rounding": "code", "hadamard": "code", "square": "code",
                 "atoms": "shape", "seed": "launch"},
    "rms_norm": {"eps": "launch"},
    "rope": {"heads": "code", "dim": "code", "inverse": "code"},
    "router": {"topk": "code", "groups": "code", "topk_groups": "code", "score": "code", "normalize": "code",
               "balance": "flag", "z": "flag", "route_scale": "launch", "seq_len": "launch",
               "inverse_sequences": "launch"},
    "split": {"at": "shape"},
    "swiglu": {},
}  # fmt: skip
ATTRIBUTES |= {
    "attention_bwd": ATTRIBUTES["attention"],
    "linear_cross_entropy": ATTRIBUTES["linear_cross_entropy_fwd_bwd"],
    "linear_cross_entropy_bwd": ATTRIBUTES["linear_cross_entropy_fwd_bwd"],
    "rms_norm_bwd": {},
    "router_bwd": ATTRIBUTES["router"],
    "swiglu_bwd": {},
}


@dataclass(frozen=True, slots=True)
class Value:
    """An operand, a result or an intermediate. Dimensions are ints or "T", "R" and "S": tokens, expert rows and
    positions of the rotary table, which the kernel learns at launch. `axis` and `scales` are of quantized formats,
    `segments` counts row segments with a scale of their own; `stored` is false in registers."""

    shape: tuple[int | str, ...]
    format: str
    axis: int | None = None
    segments: int = 0
    scales: str = ""
    stored: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.format}{'' if self.axis is None else ('/col', '/row')[self.axis]}[{size}]"


@dataclass(frozen=True, slots=True)
class Part:
    """One op of a kernel: its kind, the attributes that change code, and its operands and results by number."""

    kind: str
    attrs: tuple[tuple[str, Any], ...]
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]

    def __str__(self) -> str:
        role = dict(self.attrs).get("role")
        return f"{self.kind}.{role}" if role else self.kind


@dataclass(frozen=True)
class KernelSpec:
    """The anchor and its epilogues in order; before a GEMM, the dispatch whose rows its loads gather."""

    target: str
    values: tuple[Value, ...]
    parts: tuple[Part, ...]

    @property
    def gathers(self) -> bool:
        """Whether an operand is gathered instead of read."""
        return (
            self.parts[0].kind == "dispatch"
            and self.parts[1:2] != ()
            and self.parts[1].kind == "grouped_gemm"
        )

    @property
    def anchor(self) -> Part:
        return self.parts[int(self.gathers)]

    @property
    def name(self) -> str:
        """The anchor's kind and role: "grouped_gemm.dgrad"."""
        return str(self.anchor)

    @property
    def inputs(self) -> Iterator[Value]:
        """What the kernel loads, in the order of first use."""
        made = {i for part in self.parts for i in part.outputs}
        return (self.values[i] for i in self._used("inputs") if i not in made)

    @property
    def outputs(self) -> Iterator[Value]:
        """What the kernel stores."""
        return (self.values[i] for i in self._used("outputs") if self.values[i].stored)

    def _used(self, side: str) -> list[int]:
        return list(dict.fromkeys(i for part in self.parts for i in getattr(part, side) if i is not None))

    def json(self) -> str:
        """Canonical: equal specs give equal text, whatever the process or the Python."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> KernelSpec:
        raw = json.loads(text)
        values = (Value(**{**value, "shape": tuple(value["shape"])}) for value in raw["values"])
        parts = (
            Part(p["kind"], tuple((k, v) for k, v in p["attrs"]), tuple(p["inputs"]), tuple(p["outputs"]))
            for p in raw["parts"]
        )
        return cls(raw["target"], tuple(values), tuple(parts))

    @cached_property
    def key(self) -> str:
        """Names the kernel in listings and in the cache: 16 hex digits of the SHA-256 of `json`."""
        return hashlib.sha256(self.json().encode()).hexdigest()[:16]


def specs(schedule: Schedule) -> dict[KernelSpec, list[str]]:
    """Every kernel that a schedule launches and the calls that use it, in the order of first use."""
    uses: dict[KernelSpec, list[str]] = {}
    for call in schedule.calls:
        if call.workspace is not None:
            spec = spec_of(schedule.graph, schedule.target, call.ops, schedule.fused)
            uses.setdefault(spec, []).append(call.name)
    return uses


def spec_of(graph: Graph, target: str, ops: tuple[Op, ...], fused: frozenset[str]) -> KernelSpec:
    """The spec of the kernel that computes `ops`; it keeps the values in `fused` to itself."""
    number: dict[str, int] = {}
    values: list[Value] = []

    def index(name: str | None) -> int | None:
        if name is None:
            return None
        if name not in number:
            number[name] = len(values)
            values.append(_value(graph.tensors[name], name not in fused))
        return number[name]

    parts = [
        Part(op.kind, _attributes(op), tuple(map(index, op.inputs)), tuple(map(index, op.outputs)))
        for op in ops
    ]
    return KernelSpec(target, tuple(values), tuple(parts))


def _value(tensor: Tensor, stored: bool) -> Value:
    spec, shape = tensor.spec, tensor.shape
    if tensor.kind == "const":  # the rotary table, as long as a sequence
        shape = ("S", *shape[1:])
    scales = ("blocked" if spec.atoms else "rows") if spec.format in QUANTIZED else ""
    return Value(shape, spec.format, spec.axis, spec.segments, scales, stored)


def _attributes(op: Op) -> tuple[tuple[str, Any], ...]:
    meaning = ATTRIBUTES[op.kind]
    kept = {
        name: bool(value) if meaning[name] == "flag" else value
        for name, value in op.attrs.items()
        if meaning[name] in ("code", "flag")
    }
    return tuple(sorted(kept.items()))


def format_specs(config: Config, uses: Mapping[KernelSpec, list[str]]) -> str:
    """One line a kernel: key, uses, what it is, operands -> results."""
    target = config.target.device
    if not uses:
        return (
            f"{config.run.name} for {target}: no kernels to build; this target runs each op's reference math"
        )
    rows = [
        (spec.key, f"{len(calls)}x", " + ".join(map(str, spec.parts)), *(
            " ".join(map(str, side)) for side in (spec.inputs, spec.outputs)))
        for spec, calls in uses.items()
    ]  # fmt: skip
    width = max(len(row[2]) for row in rows)
    calls = sum(map(len, uses.values()))
    lines = [
        f"{config.run.name} for {target}: {len(rows)} kernels, {calls} launches in a step of one micro-batch"
    ]
    lines += [
        f"{key}  {count:>5}  {kernel:<{width}}  {ins} -> {outs}" for key, count, kernel, ins, outs in rows
    ]
    return "\n".join(lines)
