"""The MoE layer's kernels around its GEMMs (ops/moe.py): router, plan, dispatch and combine, as the templates see them.

Says nothing of CuTeDSL. Counts of rows in `flops` and `bytes` are tokens; each has `topk` expert rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from nmoe.codegen import rows as row_kernels
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import ROWS, TOKENS, VECTOR, Config, Operand, Problem
from nmoe.codegen.spec import KernelSpec

MAX_TOPK = 32  # a lane a choice
MAX_EXPERTS = 512  # a token's scores are 16 registers a lane
MAX_GROUPS = 32  # a lane a group

# The router's products (templates/products.py): depth of a slice, slices under way or read.
PRODUCT_DEPTH, PRODUCT_STAGES = 32, 4
PRODUCT_WAVE = 2 * 132  # thread blocks that an H100 runs at once: registers allow two a multiprocessor
PRODUCT_SHARED = min(hardware.shared for hardware in HARDWARE.values())


@dataclass(frozen=True)
class Product:
    """A product's tile of rows and columns, a warp's share of it, and the BF16 parts of its operands, in slices; of B
    so many stay in shared memory, if any. A result in BF16 is `rounded` there."""

    tile: tuple[int, int]
    warp: tuple[int, int]
    parts: tuple[int, int]
    resident: int = 0
    rounded: bool = False

    @property
    def warps(self) -> tuple[int, int]:
        return self.tile[0] // self.warp[0], self.tile[1] // self.warp[1]

    @property
    def shared_bytes(self) -> int:
        (rows, columns), (of_a, of_b) = self.tile, self.parts
        lines = rows * of_a * PRODUCT_STAGES + columns * of_b * (self.resident or PRODUCT_STAGES)
        return 2 * (lines * PRODUCT_DEPTH + self.rounded * rows * (columns + VECTOR))


LOGITS, ROUTER_WGRAD = Product((128, 64), (64, 32), (1, 3)), Product((64, 128), (32, 64), (3, 1))


@dataclass(frozen=True)
class RoutingConfig(Config):
    """`warps` of a thread block; `blocks` a multiprocessor, of kernels that give a warp a token; `parts` that tokens
    are cut into, one a thread block, where the order of sums or of rows depends on the cut."""

    warps: int = 8
    blocks: int = 4
    parts: int = 128

    def __str__(self) -> str:
        return f"{self.warps} warps, {self.blocks} blocks an SM, {self.parts} parts"


@dataclass(frozen=True)
class RoutingProblem(Problem):
    """What the kernels share: one config, a warp a token, sizes that are compiled in."""

    experts: int
    topk: int

    @abstractmethod
    def refusal(self) -> str:
        """Why no template builds this; empty if one does."""

    def configs(self, target: str) -> Sequence[RoutingConfig]:
        return [RoutingConfig()]

    def shared_bytes(self, config: RoutingConfig, target: str) -> int:
        """Of the launch that uses the most."""
        return 0

    def violations(self, config: RoutingConfig, target: str) -> list[str]:
        hardware, found = HARDWARE[target], []
        if config.warps not in range(1, 33):
            found.append(f"{config.warps} warps: a thread block has 1 to 32")
        if config.blocks < 1 or config.parts not in range(32, 1025, 32):
            found.append(
                f"{config.blocks} blocks, {config.parts} parts: at least 1; a multiple of 32 up to 1024"
            )
        if (used := self.shared_bytes(config, target)) > hardware.shared:
            found.append(
                f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}"
            )
        return found

    def clusters(self, config: RoutingConfig, sms: int) -> int:
        return sms * config.blocks

    def bytes(self, rows: int) -> float:
        extents = {TOKENS: rows, ROWS: rows * self.topk}
        return float(sum(o.bytes(extents) for o in self.operands(RoutingConfig()) if o.shape))

    def flops(self, rows: int) -> float:
        return 0.0


@dataclass(frozen=True)
class PlanProblem(RoutingProblem):
    """indices → slots, row_source, offsets; load is added to. Expert segments start on multiples of `align` rows.

    Where the rows do not fit R, offsets stop at the last multiple of `align` in R, choices without a row have slot −1
    and every load is NaN.
    """

    align: int

    family: ClassVar[str] = "moe_plan"

    def operands(self, config: RoutingConfig) -> tuple[Operand, ...]:
        choices = (TOKENS, self.topk)
        return (Operand("indices", "i32", choices), Operand("slots", "i32", choices),
                Operand("row_source", "i32", (ROWS,)), Operand("offsets", "i32", (self.experts + 1,)),
                Operand("load", "f32", (self.experts,)),
                Operand("counts", "i32", (self.experts, config.parts)))  # fmt: skip

    def template(self, target: str) -> str:
        return "plan.Plan"

    def configs(self, target: str) -> Sequence[RoutingConfig]:
        return [RoutingConfig(warps=16)]

    def shared_bytes(self, config: RoutingConfig, target: str) -> int:
        """Choices of each expert in each warp; before, count and start of each expert."""
        return 4 * (self.experts * (config.warps + 3) + 1)

    def small(self) -> PlanProblem:
        return replace(self, experts=min(self.experts, 40))

    def refusal(self) -> str:
        return _too_many(self.experts, self.topk)


@dataclass(frozen=True)
class DispatchProblem(RoutingProblem):
    """x[T, hidden], weights? → rows[R, hidden], row_weight?; padding rows become zero. `hidden` 0: weights alone."""

    hidden: int
    weighted: bool

    family: ClassVar[str] = "dispatch"

    def operands(self, config: RoutingConfig) -> tuple[Operand, ...]:
        choices = (TOKENS, self.topk)
        weights = (Operand("weights", "f32", choices),) if self.weighted else ()
        row_weight = (Operand("row_weight", "f32", (ROWS,)),) if self.weighted else ()
        x = (Operand("x", "bf16", (TOKENS, self.hidden)),) if self.hidden else ()
        rows = (Operand("rows", "bf16", (ROWS, self.hidden)),) if self.hidden else ()
        return (*x, *weights, Operand("slots", "i32", choices), Operand("row_source", "i32", (ROWS,)),
                Operand("offsets", "i32", (self.experts + 1,)), *rows, *row_weight)  # fmt: skip

    def template(self, target: str) -> str:
        return "dispatch.Dispatch"

    def configs(self, target: str) -> Sequence[RoutingConfig]:
        return [RoutingConfig(blocks=blocks) for blocks in (8, 4, 2)]

    def small(self) -> DispatchProblem:
        return replace(self, experts=min(self.experts, self.topk + 3), hidden=8 * 67 if self.hidden else 0)

    def refusal(self) -> str:
        return _too_many(self.experts, self.topk) or _uneven(self.hidden)


@dataclass(frozen=True)
class CombineProblem(RoutingProblem):
    """rows[R, hidden], row_values?, addends → y[T, hidden], values?: y is the sum of a token's rows in FP32, in their
    order; a choice without a row (slot −1) makes its token NaN. `addends` tensors are added to it, each sum rounded."""

    hidden: int
    valued: bool
    addends: int = 0

    family: ClassVar[str] = "combine"

    @property
    def addend_names(self) -> tuple[str, ...]:
        return tuple(f"addend{i}" for i in range(self.addends))

    def operands(self, config: RoutingConfig) -> tuple[Operand, ...]:
        choices, row = (TOKENS, self.topk), (TOKENS, self.hidden)
        row_values = (Operand("row_values", "f32", (ROWS,)),) if self.valued else ()
        addends = (Operand(name, "bf16", row) for name in self.addend_names)
        y = (Operand("y", "bf16", row),)
        values = (Operand("values", "f32", choices),) if self.valued else ()
        return (Operand("rows", "bf16", (ROWS, self.hidden)), *row_values, Operand("slots", "i32", choices),
                Operand("row_source", "i32", (ROWS,)), Operand("offsets", "i32", (self.experts + 1,)), *addends,
                *((*values, *y) if self.addends else (*y, *values)))  # fmt: skip

    def template(self, target: str) -> str:
        return "combine.Combine"

    def configs(self, target: str) -> Sequence[RoutingConfig]:
        return [RoutingConfig(blocks=blocks) for blocks in (4, 2, 8)]

    def small(self) -> CombineProblem:
        return replace(self, experts=min(self.experts, self.topk + 3), hidden=8 * 67)

    def refusal(self) -> str:
        return _too_many(self.experts, self.topk) or _uneven(self.hidden)


@dataclass(frozen=True)
class ScoredProblem(RoutingProblem):
    """What router and router_bwd share: how logits become weights, and the auxiliary losses."""

    hidden: int
    score: Literal["sigmoid", "softmax"]
    normalize: bool
    balance: bool
    z: bool

    def tallies(self, config: RoutingConfig) -> tuple[Operand, ...]:
        """Workspace: how often each part of the tokens chose each expert."""
        return (Operand("tallies", "i32", (config.parts, self.experts)),) if self.balance else ()

    def scalars(self) -> tuple[Operand, ...]:
        """Attributes of the op that are launch arguments."""
        auxiliary = (Operand("seq_len", "i32", ()), Operand("inverse_sequences", "f32", ()))
        return (Operand("route_scale", "f32", ()), *(auxiliary if self.balance or self.z else ()),
                *((Operand("balance", "f32", ()),) if self.balance else ()),
                *((Operand("z", "f32", ()),) if self.z else ()))  # fmt: skip

    def configs(self, target: str) -> Sequence[RoutingConfig]:
        return [RoutingConfig(warps=16)]

    def refusal(self) -> str:
        if self.experts % 4:
            return f"{self.experts} experts: logits are stored in whole 16 bytes"
        return _too_many(self.experts, self.topk) or _uneven(self.hidden)


@dataclass(frozen=True)
class RouterProblem(ScoredProblem):
    """x[T, hidden], w[experts, hidden], bias? → indices, weights, logits; balance_loss and z_loss are added to."""

    groups: int
    topk_groups: int
    biased: bool

    family: ClassVar[str] = "router"

    @property
    def splits(self) -> int:
        """Parts of the depth that logits are summed over: a thread block for each tile of some 8,000 tokens would leave
        half of a device idle, with the longest sums of all."""
        return max(1, min(8, self.hidden // 1024) // -(-self.experts // LOGITS.tile[1]))

    def operands(self, config: RoutingConfig) -> tuple[Operand, ...]:
        choices = (TOKENS, self.topk)
        losses = [name for name in ("balance", "z") if getattr(self, name)]
        bias = (Operand("bias", "f32", (self.experts,)),) if self.biased else ()
        return (Operand("x", "bf16", (TOKENS, self.hidden)), Operand("w", "f32", (self.experts, self.hidden)), *bias,
                Operand("indices", "i32", choices), Operand("weights", "f32", choices),
                Operand("logits", "f32", (TOKENS, self.experts)),
                *(Operand(f"{name}_loss", "f32", (1,)) for name in losses),
                Operand("w_parts", "bf16", (LOGITS.parts[1], self.experts, self.hidden)),
                Operand("products", "f32", (self.splits, TOKENS, self.experts)),
                *((Operand("partial", "f32", (2, config.parts)),) if losses else ()), *self.tallies(config),
                *self.scalars())  # fmt: skip

    def template(self, target: str) -> str:
        return "router.Router"

    def shared_bytes(self, config: RoutingConfig, target: str) -> int:
        """Each warp's scores; or the products' slices."""
        return max(4 * self.experts * (config.warps + 1) + 256, LOGITS.shared_bytes)

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.experts * self.hidden

    def small(self) -> RouterProblem:
        return replace(self, hidden=72)

    def refusal(self) -> str:
        if self.groups > MAX_GROUPS or self.experts % self.groups:
            return f"{self.groups} groups of {self.experts} experts: at most {MAX_GROUPS} equal ones"
        if self.topk_groups * (self.experts // self.groups) < self.topk:
            return f"{self.topk_groups} groups hold fewer than {self.topk} experts"
        return super().refusal()


@dataclass(frozen=True)
class RouterBwdProblem(ScoredProblem):
    """dweights[T, topk], x, w, indices, logits, addends → dx; dw is added to. `addends` tensors are added to dx, each
    sum rounded."""

    addends: int = 0

    family: ClassVar[str] = "router_bwd"

    @property
    def addend_names(self) -> tuple[str, ...]:
        return tuple(f"addend{i}" for i in range(self.addends))

    @property
    def pitch(self) -> int:
        """Of a token's dL/dlogits: whole 16 bytes."""
        return -(-self.experts // VECTOR) * VECTOR

    @property
    def dgrad(self) -> Product:
        """dx = dlogits · w, of two parts each. w's columns stay in shared memory where all experts fit."""
        found = Product((64, 128), (32, 32), (2, 2), -(-self.pitch // PRODUCT_DEPTH), rounded=True)
        return found if found.shared_bytes <= PRODUCT_SHARED else replace(found, resident=0)

    @property
    def groups(self) -> int:
        """Thread blocks that share a column tile's rows of dx."""
        return max(1, PRODUCT_WAVE // -(-self.hidden // self.dgrad.tile[1]))

    @property
    def splits(self) -> int:
        """Parts of the tokens that dw's tiles are summed over: the fewest that fill waves of thread blocks but for a
        twentieth, on every device, so that the sum's order is the same."""
        tiles = -(-self.experts // ROUTER_WGRAD.tile[0]) * -(-self.hidden // ROUTER_WGRAD.tile[1])

        def idle(splits: int) -> float:
            return -(-tiles * splits // PRODUCT_WAVE) * PRODUCT_WAVE / (tiles * splits) - 1

        return next((s for s in range(1, 33) if idle(s) < 0.05), min(range(1, 33), key=idle))

    def operands(self, config: RoutingConfig) -> tuple[Operand, ...]:
        choices, row, matrix = (TOKENS, self.topk), (TOKENS, self.hidden), (self.experts, self.hidden)
        dx, dw = Operand("dx", "bf16", row), Operand("dw", "f32", matrix)
        addends = (Operand(name, "bf16", row) for name in self.addend_names)
        results = (*addends, dw, dx) if self.addends else (dx, dw)
        return (Operand("dweights", "f32", choices), Operand("x", "bf16", (TOKENS, self.hidden)),
                Operand("w", "f32", matrix), Operand("indices", "i32", choices),
                Operand("logits", "f32", (TOKENS, self.experts)), *results,
                Operand("dlogits", "bf16", (ROUTER_WGRAD.parts[0], TOKENS, self.pitch)),
                Operand("w_parts", "bf16", (self.dgrad.parts[1], *matrix)),
                Operand("partial", "f32", (self.splits, *matrix)), *self.tallies(config), *self.scalars())  # fmt: skip

    def template(self, target: str) -> str:
        return "router_bwd.RouterBwd"

    def shared_bytes(self, config: RoutingConfig, target: str) -> int:
        return max(4 * self.experts + 256, self.dgrad.shared_bytes, ROUTER_WGRAD.shared_bytes)

    def flops(self, rows: int) -> float:
        return 4.0 * rows * self.experts * self.hidden

    def small(self) -> RouterBwdProblem:
        return replace(self, hidden=72)


def _too_many(experts: int, topk: int) -> str:
    if experts > MAX_EXPERTS or topk > min(MAX_TOPK, experts):
        return f"{topk} of {experts} experts: at most {MAX_TOPK} of {MAX_EXPERTS}"
    return ""


def _uneven(hidden: int) -> str:
    return f"hidden {hidden}: rows are read in whole 16 bytes" if hidden % VECTOR else ""


def match(spec: KernelSpec) -> RoutingProblem | row_kernels.RowProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, attrs = spec.parts[0], dict(spec.parts[0].attrs)
    ins, outs = list(spec.inputs), list(spec.outputs)
    if anchor.kind in ("moe_plan", "dispatch", "combine") and attrs.get("ranks", 1) > 1:
        return f"{anchor.kind} of {attrs['ranks']} ranks is several kernels of RDEP (codegen/rdep.py)"
    quantized = {part.kind for part in spec.parts[1:]} == {"quantize"} or ins[0].format == "mxfp8"
    if anchor.kind == "dispatch" and quantized:
        return row_kernels.match(spec)  # rows are gathered into tiles, which copies down the columns need
    addends = len(spec.parts) - 1
    sums = anchor.kind in ("combine", "router_bwd") and all(part.kind == "add" for part in spec.parts[1:])
    if addends and not sums:
        return f"no template for {' + '.join(map(str, spec.parts))} yet"
    problem: RoutingProblem
    if anchor.kind == "moe_plan":
        problem = PlanProblem(attrs["experts"], int(ins[0].shape[1]), attrs["align"])
    elif anchor.kind in ("dispatch", "combine"):
        rows, given, slots, _, offsets = (None if i is None else spec.values[i] for i in anchor.inputs)
        assert slots and offsets
        hidden = int(rows.shape[1]) if rows else 0
        sizes = (int(offsets.shape[0]) - 1, int(slots.shape[1]), hidden, given is not None)
        problem = CombineProblem(*sizes, addends) if anchor.kind == "combine" else DispatchProblem(*sizes)
    else:
        scored = {k: attrs[k] for k in ("score", "normalize", "balance", "z")}
        w = next(v for v in ins if v.format == "f32" and v.shape[0] != "T")
        common = {"experts": int(w.shape[0]), "hidden": int(w.shape[1]), "topk": attrs["topk"], **scored}
        if anchor.kind == "router":
            groups = {k: attrs[k] for k in ("groups", "topk_groups")}
            problem = RouterProblem(**common, **groups, biased=len(ins) == 3)
        else:
            problem = RouterBwdProblem(**common, addends=addends)
    formats = [o.format for o in problem.operands(RoutingConfig()) if o.shape]
    found = [v.format for v in (*ins, *outs)]
    if found != formats[: len(found)]:
        return f"no template for these formats: {' '.join(found)}"
    return problem.refusal() or problem
