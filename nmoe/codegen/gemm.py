"""GEMMs, dense or grouped by experts, as the templates see them: what is multiplied, in which layout, what follows,
and how it may be cut.

Says nothing of CuTeDSL, so that specs can be matched and listed on a machine without the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import ROWS, Config, Operand, Problem
from nmoe.codegen.spec import KernelSpec

Role = Literal["fprop", "dgrad", "wgrad"]
Epilogue = Literal["store", "swiglu", "dswiglu", "accumulate"]
Modes = tuple[tuple[int, int], ...]

ROW_TILE = 128  # rows to which expert segments are padded
SLICE = 64  # depth of a pipeline stage: 64 BF16 are the 128 bytes that the widest swizzle spans
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class GemmProblem(Problem):
    """A GEMM over W[experts, n, k] and packed rows whose segments `offsets` bounds.

    fprop: y[R, n] = rows · Wᵀ; dgrad: y[R, k] = rows · W; wgrad: dw[experts, n, k] += rowsᵀ · rows.
    swiglu follows an fprop of n = 2·pairs and stores h = [gate | up] and act = s · silu(gate) · up;
    dswiglu follows a dgrad, reads h[R, 2k] and stores dh and ds.

    A dense layer has `experts` 0: W[n, k], dw[n, k], all rows in one segment, no offsets, and neither s nor ds.
    """

    role: Role
    experts: int
    n: int
    k: int
    epilogue: Epilogue

    family: ClassVar[str] = "gemm"

    def __str__(self) -> str:
        return f"{self.role} {self.n}x{self.k}"

    @property
    def dense(self) -> bool:
        return self.experts == 0

    @property
    def groups(self) -> int:
        """Segments of rows, each with a matrix of its own."""
        return max(1, self.experts)

    @property
    def ragged(self) -> Literal["rows", "depth"]:
        """Which dimension the experts' row counts vary: that of the result's rows, or the contracted one."""
        return "depth" if self.role == "wgrad" else "rows"

    @property
    def columns(self) -> int:
        """Columns of the result; pairs for swiglu."""
        if self.epilogue == "swiglu":
            return self.n // 2
        return self.n if self.role == "fprop" else self.k

    @property
    def depth(self) -> int:
        """The contracted dimension where it is the same for all experts."""
        return self.k if self.role == "fprop" else self.n

    @property
    def a_mn_major(self) -> bool:
        return self.role == "wgrad"

    @property
    def b_mn_major(self) -> bool:
        return self.role != "fprop"

    @property
    def stored(self) -> tuple[str, ...]:
        """The operands that the epilogue stores through TMA."""
        stores: dict[Epilogue, tuple[str, ...]] = {
            "store": ("y",), "swiglu": ("h", "act"), "dswiglu": ("dh",), "accumulate": ("dw",)
        }  # fmt: skip
        return stores[self.epilogue]

    def operands(self, config: GemmConfig) -> tuple[Operand, ...]:
        n, k = self.n, self.k
        matrix = (n, k) if self.dense else (self.experts, n, k)
        offsets = () if self.dense else (Operand("offsets", "i32", (self.experts + 1,)),)
        if self.role == "wgrad":
            return (Operand("a", "bf16", (ROWS, n)), Operand("b", "bf16", (ROWS, k)), *offsets,
                    Operand("dw", "f32", matrix))  # fmt: skip
        a = Operand("a", "bf16", (ROWS, self.depth))
        first = (a, Operand("b", "bf16", matrix), *offsets)
        weight = () if self.dense else (Operand("s", "f32", (ROWS,)),)
        if self.epilogue == "store":
            return (*first, Operand("y", "bf16", (ROWS, self.columns)))
        if self.epilogue == "swiglu":
            return (*first, *weight, Operand("h", "bf16", (ROWS, n)), Operand("act", "bf16", (ROWS, n // 2)))
        sums = (Operand("ds", "f32", (ROWS,)), Operand("partial", "f32", (-(-k // config.tile_n), ROWS)))
        return (*first, Operand("h", "bf16", (ROWS, 2 * k)), *weight, Operand("dh", "bf16", (ROWS, 2 * k)),
                *(() if self.dense else sums))  # fmt: skip

    def modes(self, name: str) -> Modes:
        """(extent, stride) of an operand's modes as the main loop and the epilogue index it.

        a: (m, depth); b: (n, depth, half, expert); results: (m, n), with a half for [gate | up] or an expert. A mode
        of its own for the halves makes TMA clip each of them at its own end.
        """
        n, k, e = self.n, self.k, self.groups
        by_rows: dict[tuple[Role, str], Modes] = {
            ("fprop", "a"): ((ROWS, k), (k, 1)),
            ("fprop", "b"): ((n, k), (k, 1), (1, 0), (e, n * k)),
            ("dgrad", "a"): ((ROWS, n), (n, 1)),
            ("dgrad", "b"): ((k, 1), (n, k), (1, 0), (e, n * k)),
            ("wgrad", "a"): ((n, 1), (ROWS, n)),
            ("wgrad", "b"): ((k, 1), (ROWS, k), (1, 0), (1, 0)),
            ("wgrad", "dw"): ((n, k), (k, 1), (e, n * k)),
        }
        if self.epilogue == "swiglu":
            half = n // 2
            by_rows["fprop", "b"] = ((half, k), (k, 1), (2, half * k), (e, n * k))
            by_rows["fprop", "h"] = ((ROWS, n), (half, 1), (2, half))
            by_rows["fprop", "act"] = ((ROWS, half), (half, 1))
        by_rows["dgrad", "h"] = by_rows["dgrad", "dh"] = ((ROWS, 2 * k), (k, 1), (2, k))
        by_rows[self.role, "y"] = ((ROWS, self.columns), (self.columns, 1))
        return by_rows[self.role, name]

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.n * self.k

    def bytes(self, rows: int) -> float:
        """Accumulating, and the partial sums of ds, are written and read."""
        twice = ("dw", "partial")
        operands = self.operands(GemmConfig(256, 2, 1))
        return float(sum(o.bytes({ROWS: rows}) * (2 if o.name in twice else 1) for o in operands))

    def template(self, target: str) -> str:
        return {"sm_90a": "sm90_gemm.Sm90GroupedGemm", "sm_100a": "sm100_gemm.Sm100GroupedGemm"}[target]

    def clusters(self, config: GemmConfig, sms: int) -> int:
        """Persistent: as many as run at once."""
        return sms // config.cluster

    def configs(self, target: str) -> list[GemmConfig]:
        """Of each tile, cluster and number of buffers the most stages that fit. 128 wide and alone is left out: it
        reads the most from L2 and was never within 20 % of the best on the H100."""
        found = []
        for (tile_n, cluster), buffers in product(((256, 2), (256, 1), (128, 2)), (2, 3, 4)):
            for stages in range(8, 1, -1):
                config = GemmConfig(tile_n, stages, cluster, buffers)
                if not self.violations(config, target):
                    found.append(config)
                    break
        return found

    def small(self) -> GemmProblem:
        """Neither n nor k fills its tiles."""
        n, k = {"fprop": (400, 192), "dgrad": (200, 264), "wgrad": (192, 328)}[self.role]
        return replace(self, experts=min(self.experts, 3), n=n, k=k)

    def shared_bytes(self, config: GemmConfig, target: str) -> int:
        """Shared memory of a thread block. On sm_100a a pair's MMA reads half of B from each of them."""
        b_rows = config.tile_n // config.cluster if target == "sm_100a" else config.tile_n
        stage = (ROW_TILE + b_rows) * SLICE * 2
        return config.stages * stage + config.buffers * ROW_TILE * 128 + BARRIER_BYTES

    def pieces(self, config: GemmConfig) -> int:
        """Pieces of 128 bytes' width that a row of the tile's results is stored in."""
        if self.epilogue == "accumulate":
            return config.tile_n // 32
        return config.tile_n // 64 + (config.tile_n // 128 if self.epilogue == "swiglu" else 0)

    def violations(self, config: GemmConfig, target: str) -> list[str]:
        found = []
        hardware = HARDWARE[target]

        def limit(ok: bool, text: str) -> None:
            if not ok:
                found.append(text)

        limit(config.tile_n in range(128, 257, 128),
              f"tile_n {config.tile_n}: a half of B is a box of whole 64-element swizzle atoms, and wgmma's n is "
              "at most 256: 128 or 256")  # fmt: skip
        limit(config.cluster in (1, 2), f"cluster {config.cluster}: 1, or 2 that load half of B each")
        limit(config.stages >= 2, f"stages {config.stages}: loads overlap the products with 2 or more")
        limit(config.band >= 1, f"band {config.band}: at least 1 row block")
        used = self.shared_bytes(config, target)
        limit(used <= hardware.shared,
              f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}")  # fmt: skip
        if hardware.tensor_columns:
            limit(2 * config.tile_n <= hardware.tensor_columns,
                  f"{2 * config.tile_n} columns of tensor memory for two accumulators: "
                f"there are {hardware.tensor_columns}")  # fmt: skip
        if self.epilogue == "dswiglu":
            limit(config.buffers == 4, f"{config.buffers} buffers: dswiglu has gate and up in two slots, 4")
        else:
            count = self.pieces(config)
            limit(config.buffers >= 2 and count % config.buffers == 0,
                  f"{config.buffers} buffers for {count} epilogue pieces: at least 2, "
                  "each as often as the others")  # fmt: skip
        return found


@dataclass(frozen=True)
class GemmConfig(Config):
    """How a grouped GEMM is cut: the output tile of a thread block, pipeline stages, thread blocks of a cluster along
    the rows (they share B), epilogue buffers of 128 bytes' width for each unit of rows, and row blocks of a band."""

    tile_n: int
    stages: int
    cluster: int
    buffers: int = 2
    band: int = 8

    def __str__(self) -> str:
        return f"128x{self.tile_n}x64 x{self.stages}, cluster {self.cluster}, {self.buffers} buffers"


BARRIER_BYTES = 1024


def match(spec: KernelSpec) -> GemmProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts
    tail = tuple(part.kind for part in rest)
    role: Role = dict(anchor.attrs)["role"]
    formats = {value.format for value in spec.inputs} - {"bf16", "f32", "i32"}
    if formats:
        return f"no template for {', '.join(sorted(formats))} operands yet"
    epilogues: dict[tuple[Role, tuple[str, ...]], Epilogue] = {
        ("fprop", ()): "store",
        ("dgrad", ()): "store",
        ("fprop", ("swiglu",)): "swiglu",
        ("dgrad", ("swiglu_bwd",)): "dswiglu",
        ("wgrad", ()): "accumulate",
    }
    if (role, tail) not in epilogues:
        return f"no epilogue for {' + '.join(map(str, spec.parts))} yet"
    ins, outs = list(spec.inputs), list(spec.outputs)
    *lead, n, k = outs[0].shape if role == "wgrad" else ins[1].shape
    experts = int(lead[0]) if lead else 0
    problem = GemmProblem(role, experts, int(n), int(k), epilogues[role, tail])
    expected = [
        operand.format for operand in problem.operands(GemmConfig(256, 2, 1)) if operand.name != "partial"
    ]
    if [value.format for value in (*ins, *outs)] != expected:
        return "its operands are not those of a SwiGLU that keeps its pre-activation"
    if problem.columns % 8 or problem.n % 8 or problem.k % 8:
        return f"sizes {problem.n} x {problem.k}: TMA needs rows of whole 16 bytes"
    if problem.experts > MAX_EXPERTS:
        return f"{problem.experts} experts on a rank: at most {MAX_EXPERTS}"
    return problem
