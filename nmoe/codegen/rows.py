"""Kernels that go through rows once: quantization, norms, activations, rotary embedding, sums and concatenations.

A row kernel computes a body (norm, SwiGLU, …) for every row of a tensor [batch, rows, width], adds residuals, and
stores the result in BF16, as quantized copies, or both. Says nothing of CuTeDSL, so that specs can be matched and
listed on a machine without the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import (
    EXTENTS,
    POSITIONS,
    TOKENS,
    VECTOR,
    Config,
    Operand,
    Problem,
    quantized,
    stored_formats,
)
from nmoe.codegen.spec import KernelSpec, Part, Value
from nmoe.storage import ATOM_ROWS, BLOCK

Body = Literal[
    "load", "swiglu", "rms_norm", "rms_norm_bwd", "rope", "concat", "split", "embedding", "dispatch"
]
BODIES: dict[str, Body] = {
    "quantize": "load", "add": "load", "swiglu": "swiglu", "rms_norm": "rms_norm", "rms_norm_bwd": "rms_norm_bwd",
    "rope": "rope", "concat": "concat", "split": "split", "embedding": "embedding", "dispatch": "dispatch",
}  # fmt: skip

STRIPES = (
    256  # clusters that sum a norm's weight gradient, on every device, so that the sum's order is the same
)
MAX_CLUSTER = 8  # thread blocks, on every device


@dataclass(frozen=True)
class Copy:
    """A quantized copy of the result: ops/quantize.py's attributes, and where its scale factors lie."""

    format: Literal["mxfp8", "nvfp4"]
    axis: Literal[0, 1]
    scales: Literal["rows", "blocked"]
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hadamard: bool = False
    square: bool = False

    @property
    def name(self) -> str:
        return ("col", "row")[self.axis]


@dataclass(frozen=True)
class RowProblem(Problem):
    """result[batch, rows, width] = body + `addends` tensors, each sum rounded to BF16.

    `rows` may be dynamic. The body's value is stored as "y" if `keeps_body`, the last sum as "sum" if `keeps_sum`, and
    the last of them is quantized into `copies`. With `segments`, rows from offsets[segments] on are zero and, in NVFP4,
    each segment has an amax of its own.

    `source`: the format of x, which quantize and dispatch also take in MXFP8, quantized along its rows; what dispatch
    stores is in it, too. `weighted`: router weights, SwiGLU's, or those that dispatch brings to its rows; `topk`:
    choices of its tokens. `at`: where concat's second operand and split's second result start. `heads`, `rotary`,
    `inverse`: rope turns the last `rotary` columns of each head. `vocabulary`: rows of the embedding.
    """

    body: Body
    rows: int
    width: int
    batch: int = 0
    addends: int = 0
    keeps_body: bool = True
    keeps_sum: bool = False
    copies: tuple[Copy, ...] = ()
    segments: int = 0
    weighted: bool = False
    source: Literal["bf16", "mxfp8"] = "bf16"
    at: int = 0
    heads: int = 0
    rotary: int = 0
    inverse: bool = False
    vocabulary: int = 0
    topk: int = 0

    family: ClassVar[str] = "rows"

    def __str__(self) -> str:
        parts = [self.body] * (self.body != "load") + ["add"] * self.addends
        parts = [f"from {self.source}"] * (self.source != "bf16") + parts
        return " + ".join(parts + [f"{c.format}/{c.name}" for c in self.copies]) + f" {self.width}"

    @property
    def statistic(self) -> bool:
        """Does a row's result depend on a sum over the row?"""
        return self.body in ("rms_norm", "rms_norm_bwd")

    @property
    def held_names(self) -> tuple[str, ...]:
        """Tensors whose pieces wait in shared memory for the sums of their rows."""
        own = {"rms_norm": ("x",), "rms_norm_bwd": ("x", "dy")}.get(self.body)
        return (*own, *(f"addend{i}" for i in range(self.addends))) if own else ()

    @property
    def stochastic(self) -> bool:
        return any(copy.rounding == "stochastic" for copy in self.copies)

    @property
    def columns(self) -> bool:
        """Is there a copy whose blocks run down the rows?"""
        return any(copy.axis == 0 or copy.square for copy in self.copies)

    def operands(self, config: RowConfig) -> tuple[Operand, ...]:
        workspace, scalars = [], []
        if self.body == "rms_norm_bwd":
            workspace.append(Operand("partial", "f32", (STRIPES, self.width)))
        if self.body == "rms_norm":
            scalars.append(Operand("eps", "f32", ()))
        scalars += [Operand(self.seed(c), "i64", ()) for c in self.copies if c.rounding == "stochastic"]
        return (*self._inputs(), *self._outputs(), *workspace, *scalars)

    def seed(self, copy: Copy) -> str:
        """The name of a copy's seed, an attribute of its op: the body, if there is one, and the sums come before it."""
        return f"seed.{(self.body != 'load') + self.addends + self.copies.index(copy)}"

    def _inputs(self) -> tuple[Operand, ...]:
        lead = (self.batch,) if self.batch else ()
        rows, width = self.rows, self.width
        result = (*lead, rows, width)
        x, tokens = (self._stored("x", shape) for shape in (result, (TOKENS, width)))
        weight = Operand("w", "f32", (width,))
        table = (POSITIONS, self.rotary // 2)
        bodies: dict[Body, tuple[Operand, ...]] = {
            "load": x,
            "split": x,
            "swiglu": (
                Operand("x", "bf16", (*lead, rows, 2 * width)),
                *((Operand("s", "f32", (rows,)),) if self.weighted else ()),
            ),
            "rms_norm": (*x, weight),
            "rms_norm_bwd": (Operand("dy", "bf16", result), *x, weight, Operand("rstd", "f32", (rows,))),
            "rope": (*x, Operand("positions", "i32", (rows,)), *(Operand(n, "f32", table) for n in ("cos", "sin"))),
            "concat": (Operand("a", "bf16", (rows, self.at)), Operand("b", "bf16", (rows, width - self.at))),
            "dispatch": (
                *tokens,
                *((Operand("weights", "f32", (TOKENS, self.topk)),) if self.weighted else ()),
                Operand("slots", "i32", (TOKENS, self.topk)),
                Operand("row_source", "i32", (rows,)),
            ),
            "embedding": (Operand("tokens", "i32", (rows,)), Operand("table", "bf16", (self.vocabulary, width))),
        }  # fmt: skip
        addends = (Operand(f"addend{i}", "bf16", result) for i in range(self.addends))
        offsets = (Operand("offsets", "i32", (self.segments + 1,)),) if self.segments else ()
        counter = (Operand("counter", "i64", (1,)),) if self.stochastic else ()
        return (*bodies[self.body], *addends, *offsets, *counter)

    def _stored(self, name: str, shape: tuple[int, ...]) -> tuple[Operand, ...]:
        """Operands that hold a tensor in the format of x."""
        if self.source == "bf16":
            return (Operand(name, "bf16", shape),)
        return quantized(name, self.source, shape, 1, (), False)

    def _outputs(self) -> tuple[Operand, ...]:
        lead = (self.batch,) if self.batch else ()
        result = (*lead, self.rows, self.width)
        found: list[Operand] = []
        if self.body == "split":
            return (
                Operand("a", "bf16", (self.rows, self.at)),
                Operand("b", "bf16", (self.rows, self.width - self.at)),
            )
        if self.keeps_body:
            found += self._stored("y", result)
        if self.body == "rms_norm":
            found.append(Operand("rstd", "f32", (self.rows,)))
        if self.body == "dispatch" and self.weighted:
            found.append(Operand("row_weight", "f32", (self.rows,)))
        if self.body == "rms_norm_bwd":
            found.append(Operand("dw", "f32", (self.width,)))
        if self.keeps_sum:
            found.append(Operand("sum", "bf16", result))
        amax = (self.segments,) if self.segments else lead or (1,)
        for copy in self.copies:
            found += quantized(copy.name, copy.format, result, copy.axis, amax, copy.scales == "blocked")
        return tuple(found)

    def flops(self, rows: int) -> float:
        return 0.0

    def bytes(self, rows: int) -> float:
        """NVFP4 reads its operands twice, for the amax first; the embedding reads the rows that are looked up."""
        extents = dict.fromkeys(EXTENTS.values(), rows)
        once = sum(o.bytes(extents) for o in self._outputs())
        reads = sum(o.bytes(extents) for o in self._inputs() if o.name not in ("table", "cos", "sin"))
        if self.body == "embedding":
            reads += once
        return float(once + reads * (2 if self.two_passes else 1))

    @property
    def two_passes(self) -> bool:
        return any(copy.format == "nvfp4" for copy in self.copies)

    def template(self, target: str) -> str:
        return {"sm_90a": "rows.Sm90Rows", "sm_100a": "rows.Sm100Rows"}[target]

    def clusters(self, config: RowConfig, sms: int) -> int:
        """A thread block a tile; the template counts them itself."""
        return 1

    def configs(self, target: str) -> list[RowConfig]:
        """The first are the fastest of most measured (docs/kernels.md)."""
        if self.statistic:
            return self._norms()
        if self.two_passes and self.columns:
            resident = {"sm_90a": 3, "sm_100a": 2}[target]  # with three, sm_100a's lack a few registers
            return [RowConfig(8, 16, 2, 2, resident), RowConfig(8, 16, 1, 4, resident)]
        if self.columns:
            if (
                self.source == "mxfp8" and len(self.copies) == 1
            ):  # elements of one byte: twice the rows in flight
                sizes = [RowConfig(16, 16, 4, 1, 3), RowConfig(16, 16, 8, 1, 2)]
                return sizes[::-1] if self.body == "dispatch" else sizes
            return [RowConfig(8, 8, 2, 2, 4), RowConfig(8, 8, 4, 2, 2), RowConfig(8, 8, 1, 4, 4)]
        across = self._across(32, 8)
        return [RowConfig(32, rows, 8 // across, across, 8 // rows) for rows in (2, 4)]

    def _norms(self) -> list[RowConfig]:
        """Registers are some 130 a thread with copies both ways, and 100 with one; more in NVFP4, 16 rows a thread."""
        if not self.columns:
            once = self.copies and not self.two_passes
            held = {"rms_norm": (4, 8) if once else (8, 4), "rms_norm_bwd": (4,)}[self.body]
            return [RowConfig(32, rows, 1, self._across(32, 8), 2) for rows in held]
        if self.two_passes:
            across = self._across(16, 4)
            return [RowConfig(16, 16, 1, across, max(1, 256 // (32 * across)))]
        threads = 448 if len(self.copies) == 2 else 640
        sizes = dict.fromkeys(self._across(8, most) for most in (4, 8))
        return [RowConfig(8, 8, 1, across, max(1, threads // (32 * across))) for across in sizes]

    def _across(self, lanes: int, most: int) -> int:
        """Warps along a row: the fewest that need no more tiles than `most` do, and, of norms, no larger cluster than
        there are."""
        tiles = -(-self.width // (most * lanes * VECTOR))
        if self.statistic:
            tiles = min(tiles, MAX_CLUSTER)
        warps = -(-self.width // (tiles * lanes * VECTOR))
        return (
            -(-warps * lanes * VECTOR // ATOM_ROWS) * ATOM_ROWS // (lanes * VECTOR) if self.copies else warps
        )

    def small(self) -> RowProblem:
        """Wider than a chunk of any config and no multiple of it; rows that fill no tile."""
        rows = self.rows if self.rows < 0 else 160
        width = min(self.width, 1056 if self.statistic else 416)
        changes: dict[str, Any] = {
            "rows": rows,
            "width": width,
            "batch": min(self.batch, 2),
            "segments": min(self.segments, 3),
        }
        if self.body in ("concat", "split"):
            changes["at"] = 96 if width == 416 else self.at
        if self.body == "rope":
            head = self.width // self.heads
            changes["heads"] = min(self.heads, 3)
            changes["width"] = head * changes["heads"]
        if self.body == "embedding":
            changes["vocabulary"] = 50
        return replace(self, **changes)

    def tiles(self, config: RowConfig) -> int:
        """Of a row."""
        return -(-self.width // config.columns)

    def turns(self, config: RowConfig) -> int:
        """Tiles, one below the other, that a thread block of a norm takes before it stores its columns' scale factors:
        those of an atom's rows."""
        return max(1, ATOM_ROWS // config.rows) if self.statistic and self.columns else 1

    def buffers(self, config: RowConfig, target: str) -> int:
        """Of a norm's pieces: two where a thread block takes turns and the resident ones have room for them."""
        room = (HARDWARE[target].shared + RESERVED) // config.resident - RESERVED
        return 2 if self.turns(config) > 1 and self._shared_bytes(config, 2) <= room else 1

    def shared_bytes(self, config: RowConfig, target: str) -> int:
        """Pieces and sums of rows, sums of weight gradients, scale factors and transposed FP4 of a tile."""
        return self._shared_bytes(config, self.buffers(config, target))

    def _shared_bytes(self, config: RowConfig, buffers: int) -> int:
        held = 2 * buffers * len(self.held_names) * config.rows * config.columns
        chunks = self.tiles(config)
        sums = 2 * config.warps_across + (2 * chunks + 5 if chunks > 1 else 0)
        gradient = 4 * config.columns if self.body == "rms_norm_bwd" else 0
        found = held + 4 * config.rows * sums * self.statistic + gradient
        for copy in self.copies:
            turns = 1 if copy.axis else self.turns(config)
            found += turns * config.rows * config.columns // BLOCK[copy.format]
            if copy.format == "nvfp4" and copy.axis == 0:
                found += config.columns * (config.rows // 2 + FP4_PAD)
        return found + 128

    def violations(self, config: RowConfig, target: str) -> list[str]:
        found = []
        hardware = HARDWARE[target]

        def limit(ok: bool, text: str) -> None:
            if not ok:
                found.append(text)

        limit(config.resident >= 1, f"{config.resident} thread blocks resident: at least 1")
        limit(config.lanes in (4, 8, 16, 32), f"{config.lanes} lanes along a row: 4, 8, 16 or 32")
        limit(config.threads <= 1024, f"{config.threads} threads: a thread block has at most 1024")
        limit(config.threads * config.resident <= 2048,
              f"{config.resident} thread blocks of {config.threads} threads: a multiprocessor has 2048")  # fmt: skip
        if self.statistic:
            limit(
                config.warps_down == 1, f"{config.warps_down} warps down the rows: sums over rows are of one"
            )
            tiles = self.tiles(config)
            limit(
                tiles <= MAX_CLUSTER, f"{tiles} tiles along a row: a cluster has {MAX_CLUSTER} thread blocks"
            )
            limit(config.rows <= config.threads, f"{config.rows} rows: a thread sums one")
        if self.copies:
            limit(
                config.columns % ATOM_ROWS == 0,
                f"{config.columns} columns: whole atoms of {ATOM_ROWS} scale factors",
            )
        for copy in self.copies:
            if copy.axis == 0 and copy.format == "mxfp8":
                limit(config.warp_rows == 32, f"{config.warp_rows} rows a warp: a block of MXFP8 is 32")
            if copy.format == "nvfp4" and (copy.axis == 0 or copy.square):
                limit(config.vectors == 16, f"{config.vectors} rows a thread: a block of NVFP4 is 16")
        used = self.shared_bytes(config, target)
        limit(used <= hardware.shared,
              f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}")  # fmt: skip
        return found


RESERVED = 1024  # bytes of shared memory that every thread block takes beside its own
FP4_PAD = 16  # bytes between the lines of transposed FP4, against bank conflicts


@dataclass(frozen=True)
class RowConfig(Config):
    """A thread holds `vectors` consecutive rows of 8 columns; `lanes` of a warp lie along the columns, the others down
    the rows; so do `warps_across` and `warps_down` of the thread block. A multiprocessor has registers for `resident`
    thread blocks at least."""

    lanes: int
    vectors: int
    warps_down: int
    warps_across: int
    resident: int

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.columns}, {self.threads} x {self.vectors} rows of 8, {self.resident} resident"
        )

    @property
    def warp_rows(self) -> int:
        return 32 // self.lanes * self.vectors

    @property
    def rows(self) -> int:
        return self.warps_down * self.warp_rows

    @property
    def columns(self) -> int:
        return self.warps_across * self.lanes * VECTOR

    @property
    def threads(self) -> int:
        return 32 * self.warps_down * self.warps_across


def match(spec: KernelSpec) -> RowProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts
    values, body = spec.values, BODIES[anchor.kind]
    adds = [part for part in spec.parts if part.kind == "add"]
    quantizes = [part for part in spec.parts if part.kind == "quantize"]
    if others := {part.kind for part in rest} - {"quantize", "add"}:
        return f"no row kernel goes on with {', '.join(sorted(others))}"
    # Every sum takes the value before it, and what is quantized is the last.
    last = _first(anchor.inputs if anchor.kind in ("quantize", "add") else anchor.outputs)
    made = anchor.kind not in ("quantize", "add", "split") and values[last].stored
    for part in adds:
        if last not in part.inputs or (part is not adds[-1] and values[_first(part.outputs)].stored):
            return "its sums are not a chain of which only the last is stored"
        last = _first(part.outputs)
    if any(part.inputs[0] != last for part in quantizes):
        return "it quantizes something else than its last value"
    copies = tuple(_copy(part, values) for part in quantizes)
    if len({copy.axis for copy in copies}) < len(copies):
        return "it makes two copies along one axis"
    if any(copy.hadamard and copy.axis == 1 for copy in copies):
        return "no Hadamard transform along rows"
    first, attrs = values[_first(anchor.inputs)], dict(anchor.attrs)
    *lead, rows, width = (first if body == "split" else values[last]).shape
    plan = anchor.inputs[4:] if body == "dispatch" else ()
    ends = [values[i] for i in (*plan, *(i for part in quantizes for i in part.inputs[1:2])) if i is not None]
    problem = RowProblem(
        body, EXTENTS[rows] if isinstance(rows, str) else rows, int(width), int(lead[0]) if lead else 0, len(adds),
        keeps_body=made, keeps_sum=bool(adds) and values[last].stored, copies=copies,
        segments=int(ends[0].shape[0]) - 1 if ends else 0,
        weighted=body in ("swiglu", "dispatch") and anchor.inputs[1:2] not in ((), (None,)),
        source="mxfp8" if body in ("load", "dispatch") and not adds and first.format == "mxfp8" else "bf16",
        at=int((values[last] if body == "split" else first).shape[1]) if body in ("split", "concat") else 0,
        heads=attrs.get("heads", 0), rotary=attrs.get("dim", 0), inverse=attrs.get("inverse", False),
        vocabulary=int(values[1].shape[0]) if body == "embedding" else 0,
        topk=int(values[_first(anchor.inputs[2:])].shape[1]) if body == "dispatch" else 0,
    )  # fmt: skip
    expected = [o.format for o in (*problem._inputs(), *problem._outputs())]
    found = [name for value in (*spec.inputs, *spec.outputs) for name in stored_formats(value.format)]
    if found != expected:
        return f"its operands are {', '.join(found)}, a row kernel's {', '.join(expected)}"
    if problem.width % VECTOR or problem.at % VECTOR:
        return f"{problem.width} columns: threads load rows of whole 16 bytes"
    if problem.heads and (problem.width // problem.heads % VECTOR or problem.rotary % VECTOR):
        return f"heads of {problem.width // problem.heads} columns: threads load whole 16 bytes of one"
    return problem


def _first(numbers: tuple[int | None, ...]) -> int:
    return next(i for i in numbers if i is not None)


def _copy(part: Part, values: tuple[Value, ...]) -> Copy:
    q: Any = values[_first(part.outputs)]
    attrs: Any = dict(part.attrs)
    return Copy(q.format, q.axis, q.scales, attrs["rounding"], attrs["hadamard"], attrs["square"])
