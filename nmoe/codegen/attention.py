"""Attention's kernels: forward, and backward as three launches. They are written in Triton (templates/attention.py).

Says nothing of Triton, so that specs can be matched, listed and launched on a machine without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import TOKENS, Config, Launch, Operand, Problem, per
from nmoe.codegen.spec import KernelSpec

Pass = Literal["forward", "backward"]
PASSES: dict[str, Pass] = {"attention": "forward", "attention_bwd": "backward"}
LEAST_DIM = 16  # of a product's operands
SUM_ROWS = 32  # tokens whose heads' parts a program of sum_heads adds


@dataclass(frozen=True)
class Blocks:
    """How one launch is cut: queries and keys of a block, warps, stages of the loads."""

    m: int
    n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class AttentionConfig(Config):
    """`queries`: forward's blocks, or those of dq; `keys`: of dk and dv, backward only."""

    queries: Blocks
    keys: Blocks | None = None

    def __str__(self) -> str:
        return str(self.queries) + (f"; keys {self.keys}" if self.keys else "")


# The fastest measured by bench/attention.py on an H100; on a B200 nothing has been measured.
CONFIGS: dict[tuple[str, Pass], AttentionConfig] = {
    ("sm_90a", "forward"): AttentionConfig(Blocks(128, 64, 8, 3)),
    ("sm_90a", "backward"): AttentionConfig(Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 3)),
    ("sm_100a", "forward"): AttentionConfig(Blocks(128, 64, 8, 3)),
    ("sm_100a", "backward"): AttentionConfig(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
}


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """Operands as ops/attention.py's: a head's query is [nope | rope] columns, its key and value [nope | value] columns
    of kv, and the rotary key is one for all heads. Sequence length, window (0: none) and scale come at launch."""

    kind: Pass
    heads: int
    nope: int
    rope: int
    value: int

    family: ClassVar[str] = "attention"
    language: ClassVar = "triton"

    def __str__(self) -> str:
        return f"{self.kind} {self.heads}x({self.nope}+{self.rope}, {self.value})"

    def operands(self, config: AttentionConfig) -> tuple[Operand, ...]:
        t, heads = TOKENS, self.heads
        q = Operand("q", "bf16", (t, heads * (self.nope + self.rope)))
        kv = Operand("kv", "bf16", (t, heads * (self.nope + self.value)))
        k_rope, positions = Operand("k_rope", "bf16", (t, self.rope)), Operand("positions", "i32", (t,))
        o, lse = Operand("o", "bf16", (t, heads * self.value)), Operand("lse", "f32", (heads, t))
        scalars = (Operand("seq_len", "i32", ()), Operand("window", "i32", ()), Operand("scale", "f32", ()))
        if self.kind == "forward":
            return (q, kv, k_rope, positions, o, lse, *scalars)
        gradients = (replace(q, name="dq"), replace(kv, name="dkv"), replace(k_rope, name="dk_rope"))
        workspace = (replace(lse, name="delta"), Operand("partial", "f32", (heads, t, self.rope)))
        return (replace(o, name="do"), q, kv, k_rope, positions, o, lse, *gradients, *workspace, *scalars)

    def launches(self, config: AttentionConfig) -> tuple[Launch, ...]:
        queries, keys = config.queries, config.keys
        last = ("tokens", "seq_len", "window", "scale")
        if self.kind == "forward":
            first = ("q", "kv", "k_rope", "positions", "o", "lse")
            return (self._launch("forward", (*first, *last), queries, queries.m),)
        assert keys is not None
        inputs = ("do", "q", "kv", "k_rope", "positions")
        return (
            self._launch("backward_queries", (*inputs, "o", "lse", "dq", "delta", *last), queries, queries.m),
            self._launch("backward_keys", (*inputs, "lse", "delta", "dkv", "partial", *last), keys, keys.n),
            Launch("sum_heads", ("partial", "dk_rope", "tokens"),
                   {"HEADS": self.heads, "ROPE": self.rope, "ROWS": SUM_ROWS}, 4, 2,
                   lambda x: (per(x["tokens"], SUM_ROWS), 1, 1)),
        )  # fmt: skip

    def _launch(self, function: str, arguments: tuple[str, ...], blocks: Blocks, rows: int) -> Launch:
        """A program for each `rows` rows of each head of each sequence."""
        constants = {"HEADS": self.heads, "NOPE": self.nope, "ROPE": self.rope, "VALUE": self.value,
                     "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}  # fmt: skip

        def grid(x: Mapping[str, Any]) -> tuple[int, int, int]:
            return per(x["seq_len"], rows), self.heads, x["tokens"] // x["seq_len"]

        return Launch(function, arguments, constants, blocks.warps, blocks.stages, grid)

    def configs(self, target: str) -> list[AttentionConfig]:
        return [CONFIGS[target, self.kind]]

    def violations(self, config: AttentionConfig, target: str) -> list[str]:
        used, hardware = self.shared_bytes(config, target), HARDWARE[target]
        if used <= hardware.shared:
            return []
        return [f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}"]

    def shared_bytes(self, config: AttentionConfig, target: str) -> int:
        """Of the larger launch: its own rows, and stages of the others. Triton may need more, which its report says."""
        query, key, value = (2 * n for n in (self.nope + self.rope, self.nope + self.rope, self.value))
        queries, keys = config.queries, config.keys
        found = queries.m * query + queries.stages * queries.n * (key + value)
        if keys is not None:
            found += queries.m * value
            found = max(found, keys.n * (key + value) + keys.stages * keys.m * (query + value))
        return found

    def template(self, target: str) -> str:
        return "attention.launches"

    def clusters(self, config: AttentionConfig, sms: int) -> int:
        """A program a block of rows; the launches' grids count them."""
        return 1

    def flops(self, rows: int) -> float:
        """As if the rows were one sequence and one document."""
        key, value = self.nope + self.rope, self.value
        products = (
            key + value if self.kind == "forward" else 4 * key + 3 * value
        )  # both launches need the scores
        return float(rows) * rows * self.heads * products

    def bytes(self, rows: int) -> float:
        return float(sum(o.bytes({TOKENS: rows}) for o in self.operands(self.configs("sm_90a")[0])))

    def small(self) -> AttentionProblem:
        return replace(self, heads=2, nope=32, rope=16, value=32)


def match(spec: KernelSpec) -> AttentionProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts
    if rest:
        return "nothing is fused into attention"
    attrs: Any = dict(anchor.attrs)
    problem = AttentionProblem(PASSES[anchor.kind], attrs["heads"], attrs["nope"], attrs["rope"], attrs["v"])
    for name, width in (("nope", problem.nope), ("rope", problem.rope), ("v", problem.value)):
        if width < LEAST_DIM or width & (width - 1):
            return f"heads of {name} = {width} columns: powers of two from {LEAST_DIM} on"
    operands = [o for o in problem.operands(problem.configs(spec.target)[0]) if o.shape]
    found = [value.format for value in (*spec.inputs, *spec.outputs)]
    expected = [o.format for o in operands[: len(found)]]
    if found != expected:
        return f"its operands are {', '.join(found)}, the kernel's {', '.join(expected)}"
    if window := problem.violations(problem.configs(spec.target)[0], spec.target):
        return "; ".join(window)
    return problem
