"""GEMMs, dense or grouped by experts, as the templates see them: what is multiplied, in which layout, what follows,
and how it may be cut.

Says nothing of CuTeDSL, so that specs can be matched and listed on a machine without the compiler.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.spec import KernelSpec
from nmoe.errors import UserError

Role = Literal["fprop", "dgrad", "wgrad"]
Epilogue = Literal["store", "swiglu", "dswiglu", "accumulate"]
Modes = tuple[tuple[int, int], ...]

ROW_TILE = 128  # rows to which expert segments are padded
SLICE = 64  # depth of a pipeline stage: 64 BF16 are the 128 bytes that the widest swizzle spans
ROWS = -1  # a dynamic extent: the packed rows
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Operand:
    """A kernel argument: `shape` with ROWS for the dynamic extent, row-major."""

    name: str
    format: Literal["bf16", "f32", "i32"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GemmProblem:
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

    def operands(self, tile_n: int) -> tuple[Operand, ...]:
        """The arguments in call order: the spec's inputs, its outputs, then workspace."""
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
        sums = (Operand("ds", "f32", (ROWS,)), Operand("partial", "f32", (-(-k // tile_n), ROWS)))
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
        """Least traffic: every operand once; accumulating reads and writes."""
        size = {"bf16": 2, "f32": 4, "i32": 4}
        total = 0.0
        for operand in self.operands(256):
            elements = 1
            for extent in operand.shape:
                elements *= rows if extent == ROWS else extent
            total += elements * size[operand.format] * (2 if operand.name in ("dw", "partial") else 1)
        return total


@dataclass(frozen=True)
class GemmConfig:
    """How a grouped GEMM is cut: the output tile of a thread block, pipeline stages, thread blocks of a cluster along
    the rows (they share B), epilogue buffers of 128 bytes' width for each unit of rows, and row blocks of a band."""

    tile_n: int
    stages: int
    cluster: int
    buffers: int = 2
    band: int = 8

    def __str__(self) -> str:
        return f"128x{self.tile_n}x64 x{self.stages}, cluster {self.cluster}, {self.buffers} buffers"

    def json(self) -> dict[str, int]:
        return asdict(self)


BARRIER_BYTES = 1024


def shared_bytes(problem: GemmProblem, config: GemmConfig, target: str) -> int:
    """Shared memory of a thread block. On sm_100a a pair's MMA reads half of B from each of them."""
    b_rows = config.tile_n // config.cluster if target == "sm_100a" else config.tile_n
    stage = (ROW_TILE + b_rows) * SLICE * 2
    return config.stages * stage + config.buffers * ROW_TILE * 128 + BARRIER_BYTES


def pieces(problem: GemmProblem, config: GemmConfig) -> int:
    """Pieces of 128 bytes' width that a row of the tile's results is stored in."""
    if problem.epilogue == "accumulate":
        return config.tile_n // 32
    return config.tile_n // 64 + (config.tile_n // 128 if problem.epilogue == "swiglu" else 0)


def violations(problem: GemmProblem, config: GemmConfig, target: str) -> list[str]:
    """Why a config cannot be built for a problem: each limit with what was found; empty for a legal one."""
    found = []
    hardware = HARDWARE[target]

    def limit(ok: bool, text: str) -> None:
        if not ok:
            found.append(text)

    limit(config.tile_n in range(128, 257, 128),
          f"tile_n {config.tile_n}: a half of B is a box of whole 64-element swizzle atoms, and wgmma's n is at most "
          "256: 128 or 256")  # fmt: skip
    limit(config.cluster in (1, 2), f"cluster {config.cluster}: 1, or 2 that load half of B each")
    limit(config.stages >= 2, f"stages {config.stages}: loads overlap the products with 2 or more")
    limit(config.band >= 1, f"band {config.band}: at least 1 row block")
    used = shared_bytes(problem, config, target)
    limit(used <= hardware.shared,
          f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}")  # fmt: skip
    if hardware.tensor_columns:
        limit(2 * config.tile_n <= hardware.tensor_columns,
              f"{2 * config.tile_n} columns of tensor memory for two accumulators: "
            f"there are {hardware.tensor_columns}")  # fmt: skip
    if problem.epilogue == "dswiglu":
        limit(config.buffers == 4, f"{config.buffers} buffers: dswiglu has gate and up in two slots, 4")
    else:
        count = pieces(problem, config)
        limit(config.buffers >= 2 and count % config.buffers == 0,
              f"{config.buffers} buffers for {count} epilogue pieces: at least 2, "
              "each as often as the others")  # fmt: skip
    return found


def match(spec: KernelSpec) -> GemmProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts
    tail = tuple(part.kind for part in rest)
    if anchor.kind not in ("gemm", "grouped_gemm"):
        return f"no template for {anchor.kind}"
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
    expected = [operand.format for operand in problem.operands(256) if operand.name != "partial"]
    if [value.format for value in (*ins, *outs)] != expected:
        return "its operands are not those of a SwiGLU that keeps its pre-activation"
    if problem.columns % 8 or problem.n % 8 or problem.k % 8:
        return f"sizes {problem.n} x {problem.k}: TMA needs rows of whole 16 bytes"
    if problem.experts > MAX_EXPERTS:
        return f"{problem.experts} experts on a rank: at most {MAX_EXPERTS}"
    return problem


class IllegalConfig(UserError):
    """A config that breaks a limit of the target."""


def require_legal(problem: GemmProblem, config: GemmConfig, target: str) -> None:
    if found := violations(problem, config, target):
        raise IllegalConfig(
            f"{problem.role} {problem.n}x{problem.k} for {target}, {config}: {'; '.join(found)}"
        )
