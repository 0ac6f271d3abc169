"""GEMMs, dense or grouped by experts, as the templates see them: what is multiplied, in which layout, what follows,
and how it may be cut.

Says nothing of CuTeDSL, so that specs can be matched and listed on a machine without the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import ROWS, TOKENS, Config, Operand, Problem, per, quantized
from nmoe.codegen.spec import KernelSpec
from nmoe.storage import ATOM_BYTES, ATOM_ROWS, ATOM_SCALES, BLOCK

Role = Literal["fprop", "dgrad", "wgrad"]
Epilogue = Literal["store", "swiglu", "dswiglu", "accumulate"]
Precision = Literal["bf16", "mxfp8", "nvfp4"]
Scales = Literal["", "rows", "blocked"]
Copy = Literal["row", "col"]
Modes = tuple[tuple[int, int], ...]

ROW_TILE = 128  # rows to which expert segments are padded
MAX_EXPERTS = 1024
BITS: dict[Precision, int] = {"bf16": 16, "mxfp8": 8, "nvfp4": 4}
TENSOR_COLUMNS = HARDWARE["sm_100a"].tensor_columns
BARRIER_BYTES = 1024
# Can a cluster's thread blocks be in different column tiles? A pair's MMA has rows of both and one B.
PARTS = {"sm_90a": True, "sm_100a": False}


class Blocks:
    """An expert's row tiles × `columns` column tiles, dealt out to clusters: row blocks, each the `cluster` row tiles
    that share B. Where they `part`, a row tile that is left over has its column tiles dealt out instead, so that no
    thread block computes for nothing; otherwise it has a block of its own.

    Row tiles are numbers, or a kernel's values.
    """

    def __init__(self, columns: int, cluster: int, parts: bool) -> None:
        self.columns, self.cluster, self.parts = columns, cluster, parts and cluster > 1

    def whole(self, row_tiles):  # type: ignore[no-untyped-def]
        """Row blocks."""
        return (row_tiles + (0 if self.parts else self.cluster - 1)) // self.cluster

    def count(self, row_tiles):  # type: ignore[no-untyped-def]
        """Tiles of clusters."""
        rest = row_tiles % self.cluster if self.parts else 0
        return self.whole(row_tiles) * self.columns + rest * per(self.columns, self.cluster)


@dataclass(frozen=True)
class GemmProblem(Problem):
    """A GEMM over W[experts, n, k] and packed rows whose segments `offsets` bounds.

    fprop: y[R, n] = rows · Wᵀ; dgrad: y[R, k] = rows · W; wgrad: dw[experts, n, k] += rowsᵀ · rows. y of a store may
    have `addends` tensors added, each sum rounded.
    swiglu follows an fprop of n = 2·pairs and stores h = [gate | up], unless it keeps none, and
    act = s · silu(gate) · up; dswiglu follows a dgrad, reads h[R, 2k] and stores dh and ds. Instead of act or dh their
    MXFP8 `copies` may be stored.

    `precision` is of both operands of the product. Where `scales` is "blocked" the tensor cores take them as they are,
    where it is "rows" they are dequantized to BF16 first.

    A dense layer has `experts` 0: W[n, k], dw[n, k], all rows in one segment, no offsets, and neither s nor ds.

    Where an operand is `gathered`, it is given as its tokens' rows [T, …], each of which the loads take for its `topk`
    expert rows: row r is that of token row_source[r] // topk, or zeros where row_source[r] is −1.

    A `transposed` wgrad adds to dw[experts, k, n]: see `tiled`.
    """

    role: Role
    experts: int
    n: int
    k: int
    epilogue: Epilogue
    precision: Precision = "bf16"
    scales: Scales = ""
    addends: int = 0
    copies: tuple[Copy, ...] = ()
    keeps_h: bool = True
    gathered: Literal["", "a", "b"] = ""
    topk: int = 0
    transposed: bool = False

    family: ClassVar[str] = "gemm"

    def __str__(self) -> str:
        return f"{self.precision} {self.role} {self.n}x{self.k}"

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
    def multiplied(self) -> Precision:
        """What the tensor cores multiply."""
        return self.precision if self.scales == "blocked" else "bf16"

    @property
    def slice(self) -> int:
        """Depth of a pipeline stage: the 128 bytes that the widest swizzle spans. Experts end at multiples of 128 rows,
        so a slice of rows is not deeper."""
        widest = 128 * 8 // BITS[self.multiplied]
        return min(widest, ROW_TILE) if self.role == "wgrad" else widest

    @property
    def scale_atoms(self) -> int:
        """Atoms of scale factors along a slice."""
        return 0 if self.multiplied == "bf16" else self.slice // (BLOCK[self.precision] * ATOM_SCALES)

    @property
    def a_mn_major(self) -> bool:
        return self.role == "wgrad" and self.precision != "nvfp4"

    @property
    def b_mn_major(self) -> bool:
        return self.role != "fprop" and self.precision != "nvfp4"

    @property
    def read(self) -> tuple[str, ...]:
        """The operands that the epilogue reads a piece of for every piece of the product: dswiglu two, gate and up."""
        if self.epilogue == "dswiglu":
            return ("h", "h")
        return ("addend", "addend2")[: self.addends]

    @property
    def stored(self) -> tuple[str, ...]:
        """The operands that the epilogue stores through TMA."""
        stores: dict[Epilogue, tuple[str, ...]] = {
            "store": ("y",),
            "swiglu": (*(("h",) if self.keeps_h else ()), *(self.copies or ("act",))),
            "dswiglu": self.copies or ("dh",),
            "accumulate": ("dw",),
        }
        return stores[self.epilogue]

    def _quantized(self, name: str, shape: tuple[int, ...], axis: int) -> tuple[Operand, ...]:
        """An operand of the product [..., m, k], its scales as `scales` says."""
        if self.precision == "bf16":
            return (Operand(name, "bf16", shape),)
        return quantized(name, self.precision, shape, axis, (self.groups,), self.scales == "blocked")

    def operands(self, config: GemmConfig) -> tuple[Operand, ...]:
        packed = self._packed(config)
        if not self.gathered:
            return packed
        tokens = Operand(self.gathered, "bf16", (TOKENS, self.extents(self.gathered)[-1]))
        plan = (Operand("slots", "i32", (TOKENS, self.topk)), Operand("row_source", "i32", (ROWS,)))
        offsets = next(o for o in packed if o.name == "offsets")
        return (tokens, *plan, offsets, *(o for o in packed if o.name not in (self.gathered, "offsets")))

    def _packed(self, config: GemmConfig) -> tuple[Operand, ...]:
        """The operands of a product of expert rows."""
        n, k = self.n, self.k
        matrix = (n, k) if self.dense else (self.experts, n, k)
        offsets = () if self.dense else (Operand("offsets", "i32", (self.experts + 1,)),)
        if self.role == "wgrad":
            a, b = self._quantized("a", (ROWS, n), 0), self._quantized("b", (ROWS, k), 0)
            return (*a, *b, *offsets, Operand("dw", "f32", matrix), *self._wide())
        a = self._quantized("a", (ROWS, self.depth), 1)
        first = (*a, *self._quantized("b", matrix, int(self.role == "fprop")), *offsets)
        if self.epilogue == "store":
            addends = (Operand(name, "bf16", (ROWS, self.columns)) for name in self.read)
            return (*first, *addends, Operand("y", "bf16", (ROWS, self.columns)), *self._wide())
        weight = () if self.dense else (Operand("s", "f32", (ROWS,)),)
        if self.epilogue == "swiglu":
            h = (Operand("h", "bf16", (ROWS, n)),) if self.keeps_h else ()
            return (*first, *weight, *h, *self._results("act", n // 2), *self._wide())
        ds = () if self.dense else (Operand("ds", "f32", (ROWS,)),)
        partial = () if self.dense else (Operand("partial", "f32", (per(k, config.tile_n), ROWS)),)
        results = self._results("dh", 2 * k)
        ordered = (*ds, *results) if self.copies else (*results, *ds)
        return (*first, Operand("h", "bf16", (ROWS, 2 * k)), *weight, *ordered, *self._wide(), *partial)

    def _results(self, name: str, width: int) -> tuple[Operand, ...]:
        """What is stored of act or dh: itself, or its copies."""
        if not self.copies:
            return (Operand(name, "bf16", (ROWS, width)),)
        parts = (quantized(c, "mxfp8", (ROWS, width), int(c == "row"), (), True) for c in self.copies)
        return tuple(operand for part in parts for operand in part)

    def _wide(self) -> tuple[Operand, ...]:
        """Workspace: the BF16 operands that quantized ones are dequantized to, in the order of their data."""
        if self.scales != "rows":
            return ()
        return tuple(Operand(f"{name}_wide", "bf16", self.extents(name)) for name in ("a", "b"))

    def extents(self, name: str) -> tuple[int, ...]:
        """Elements of operand a or b as its data lie in memory, row-major."""
        lead = () if self.dense else (self.experts,)
        kept = {
            ("fprop", "a"): (ROWS, self.k), ("fprop", "b"): (*lead, self.n, self.k),
            ("dgrad", "a"): (ROWS, self.n), ("dgrad", "b"): (*lead, self.n, self.k),
            ("wgrad", "a"): (ROWS, self.n), ("wgrad", "b"): (ROWS, self.k),
        }[self.role, name]  # fmt: skip
        turned = self.precision == "nvfp4" and (self.role, name) in (
            ("dgrad", "b"),
            ("wgrad", "a"),
            ("wgrad", "b"),
        )
        return (*kept[:-2], kept[-1], kept[-2]) if turned else kept

    def modes(self, name: str) -> Modes:
        """(extent, stride) of an operand's modes as the main loop and the epilogue index it.

        a: (m, depth); b: (n, depth, half, expert); results: (m, n), with a half for [gate | up] or an expert. A mode
        of its own for the halves makes TMA clip each of them at its own end.
        """
        n, k, e = self.n, self.k, self.groups
        turned = self.precision == "nvfp4"
        by_rows: dict[tuple[Role, str], Modes] = {
            ("fprop", "a"): ((ROWS, k), (k, 1)),
            ("fprop", "b"): ((n, k), (k, 1), (1, 0), (e, n * k)),
            ("dgrad", "a"): ((ROWS, n), (n, 1)),
            ("dgrad", "b"): (*(((k, n), (n, 1)) if turned else ((k, 1), (n, k))), (1, 0), (e, n * k)),
            ("wgrad", "a"): ((n, ROWS), (ROWS, 1)) if turned else ((n, 1), (ROWS, n)),
            ("wgrad", "b"): (*(((k, ROWS), (ROWS, 1)) if turned else ((k, 1), (ROWS, k))), (1, 0), (1, 0)),
            ("wgrad", "dw"): (*(((n, 1), (k, n)) if self.transposed else ((n, k), (k, 1))), (e, n * k)),
        }
        if self.epilogue == "swiglu":
            half = n // 2
            by_rows["fprop", "b"] = ((half, k), (k, 1), (2, half * k), (e, n * k))
            by_rows["fprop", "h"] = ((ROWS, n), (half, 1), (2, half))
            for result in ("act", *self.copies):
                by_rows["fprop", result] = ((ROWS, half), (half, 1), (1, 0))
        for result in ("h", "dh", *self.copies) if self.epilogue == "dswiglu" else ():
            by_rows["dgrad", result] = ((ROWS, 2 * k), (k, 1), (2, k))
        for result in ("y", "addend", "addend2"):
            by_rows[self.role, result] = ((ROWS, self.columns), (self.columns, 1), (1, 0))
        return by_rows[self.role, name]

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.n * self.k

    def bytes(self, rows: int) -> float:
        """Accumulating, and the partial sums of ds, are written and read."""
        twice = ("dw", "partial")
        operands = self.operands(GemmConfig(256, 2, 1))
        extents = {ROWS: rows, TOKENS: rows // max(1, self.topk)}
        return float(sum(o.bytes(extents) * (2 if o.name in twice else 1) for o in operands))

    def template(self, target: str) -> str:
        return {"sm_90a": "sm90_gemm.Sm90GroupedGemm", "sm_100a": "sm100_gemm.Sm100GroupedGemm"}[target]

    def tiled(self, config: GemmConfig) -> GemmProblem:
        """The problem whose result's tiles are computed: a wgrad's dwᵀ = bᵀ · a, where the config wants it."""
        if not config.transposed:
            return self
        gathered: dict[str, Literal["", "a", "b"]] = {"": "", "a": "b", "b": "a"}
        return replace(self, n=self.k, k=self.n, gathered=gathered[self.gathered], transposed=True)

    def blocks(self, config: GemmConfig, target: str) -> Blocks:
        """How an expert's tiles are dealt out: columns of the result, or pairs of gate and up, half as many a tile."""
        wide = config.tile_n // 2 if self.epilogue == "swiglu" else config.tile_n
        return Blocks(per(self.columns, wide), config.cluster, PARTS[target])

    def tiles(self, config: GemmConfig, target: str, rows: int = 0) -> int:
        """Tiles of an expert with so many rows, or of its dw; a cluster's counted once."""
        of = self.tiled(config)
        height = rows if self.ragged == "rows" else of.n
        return of.blocks(config, target).count(per(height, ROW_TILE))

    def clusters(self, config: GemmConfig, sms: int) -> int:
        """Persistent: as many as run at once."""
        return sms // config.cluster

    def configs(self, target: str) -> list[GemmConfig]:
        """Of each tile, cluster and number of buffers the most stages that fit, and of wgrads the orientation of fewer
        tiles: 1408 columns are eleven of 128 and five and a half of 256. 128 wide and alone is left out: it reads the
        most from L2 and was never within 20 % of the best on the H100."""
        found = []
        for (tile_n, cluster), buffers in product(((256, 2), (256, 1), (128, 2)), (1, 2, 3, 4)):
            for stages in range(8, 1, -1):
                config = GemmConfig(tile_n, stages, cluster, buffers)
                if not self.violations(config, target):
                    turned = replace(config, transposed=True)
                    fewer = self.role == "wgrad" and self.tiles(turned, target) < self.tiles(config, target)
                    found.append(turned if fewer else config)
                    break
        return found

    def small(self) -> GemmProblem:
        """Neither n nor k fills its tiles, as far as blocks and atoms of scales permit."""
        n, k = {"fprop": (400, 192), "dgrad": (200, 264), "wgrad": (192, 328)}[self.role]
        if self.precision != "bf16":
            n, k = {"fprop": (400, 192), "dgrad": (192, 320), "wgrad": (192, 336)}[self.role]
            n = 768 if self.epilogue == "swiglu" else n
        return replace(self, experts=min(self.experts, 3), n=n, k=k)

    def accumulator_columns(self, config: GemmConfig) -> int:
        """From the first accumulator in tensor memory to the second: less than a tile where two do not fit beside the
        scale factors, so that the last columns of one are the first of the other."""
        return min(config.tile_n, TENSOR_COLUMNS - self.scale_columns(config) - config.tile_n)

    def scale_columns(self, config: GemmConfig) -> int:
        """Columns of tensor memory that hold the scale factors of a slice of A and B: 4 an atom."""
        return 4 * self.scale_atoms * (1 + config.tile_n // ATOM_ROWS)

    def stage_bytes(self, config: GemmConfig, b_rows: int) -> int:
        """What a thread block loads for a slice, with so many rows of B."""
        scales = ATOM_BYTES * self.scale_atoms * (1 + config.tile_n // ATOM_ROWS)
        return (ROW_TILE + b_rows) * self.slice * BITS[self.multiplied] // 8 + scales

    def shared_bytes(self, config: GemmConfig, target: str) -> int:
        """Shared memory of a thread block. On sm_100a a pair's MMA reads half of B from each of them."""
        b_rows = config.tile_n // config.cluster if target == "sm_100a" else config.tile_n
        stages = config.stages * self.stage_bytes(config, b_rows)
        return stages + config.buffers * ROW_TILE * 128 + BARRIER_BYTES

    def pieces(self, config: GemmConfig) -> int:
        """Pieces of 128 bytes' width that a row of the tile's results is stored in."""
        if self.epilogue == "accumulate":
            return config.tile_n // 32
        if self.epilogue == "swiglu":
            return config.tile_n // 128 * (3 if self.keeps_h else 1)
        return config.tile_n // 64

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
        limit(not self.gathered or target == "sm_100a",
              f"rows of tokens: TMA gathers them from sm_100a on, {hardware.name} reads boxes")  # fmt: skip
        limit(not config.transposed or self.role == "wgrad",
              f"transposed {self.role}: only a wgrad's result can be computed either way")  # fmt: skip
        limit(config.stages >= 2, f"stages {config.stages}: loads overlap the products with 2 or more")
        limit(config.band >= 1, f"band {config.band}: at least 1 row block")
        used = self.shared_bytes(config, target)
        limit(used <= hardware.shared,
              f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}")  # fmt: skip
        if self.multiplied != "bf16":
            limit(config.tile_n == 256 or self.epilogue != "swiglu",
                  f"tile_n {config.tile_n}: gate and up come with whole atoms of 128 rows of scales: 256")  # fmt: skip
            limit(config.tile_n == 256 or not self.b_mn_major,
                  f"tile_n {config.tile_n}: a half of B is a box of 128 one-byte elements across: 256")  # fmt: skip
        if self.read:
            slots = 1 if target == "sm_90a" else 2
            limit(config.buffers == slots * len(self.read),
                  f"{config.buffers} buffers: {slots} times the {len(self.read)} pieces that are read")  # fmt: skip
        else:
            count = self.pieces(config)
            limit(config.buffers >= 2 and count % config.buffers == 0,
                  f"{config.buffers} buffers for {count} epilogue pieces: at least 2, "
                  "each as often as the others")  # fmt: skip
        return found


@dataclass(frozen=True)
class GemmConfig(Config):
    """How a grouped GEMM is cut: the output tile of a thread block, pipeline stages, thread blocks of a cluster along
    the rows (they share B), epilogue buffers of 128 bytes' width for each unit of rows, row blocks of a band, and
    whether a wgrad's tiles are of dwᵀ."""

    tile_n: int
    stages: int
    cluster: int
    buffers: int = 2
    band: int = 8
    transposed: bool = False

    def __str__(self) -> str:
        turned = ", transposed" if self.transposed else ""
        return f"128x{self.tile_n} x{self.stages}, cluster {self.cluster}, {self.buffers} buffers{turned}"


def match(spec: KernelSpec) -> GemmProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts[int(spec.gathers) :]
    values = spec.values
    role: Role = dict(anchor.attrs)["role"]
    first, second = (values[i] for i in anchor.inputs[:2] if i is not None)
    if first.format != second.format or first.format not in BITS:
        return f"no template for {first.format} times {second.format}"
    tail = tuple(part.kind for part in rest)
    quantizes = tail.count("quantize")
    made = [values[i] for part in rest for i in part.outputs if part.kind == "quantize" and i is not None]
    copies: tuple[Copy, ...] = tuple("row" if value.axis else "col" for value in made)
    epilogues: dict[tuple[Role, tuple[str, ...]], Epilogue] = {
        ("fprop", ()): "store",
        ("dgrad", ()): "store",
        ("fprop", ("swiglu",)): "swiglu",
        ("dgrad", ("swiglu_bwd",)): "dswiglu",
        ("wgrad", ()): "accumulate",
    }
    addends = tail.count("add")
    plain = tuple(kind for kind in tail if kind != "add")[: len(tail) - quantizes]
    if (role, plain) not in epilogues or tail != (*plain, *("add",) * addends, *("quantize",) * quantizes):
        return f"no epilogue for {' + '.join(map(str, spec.parts))}"
    ins, outs = list(spec.inputs), list(spec.outputs)
    *lead, n, k = outs[0].shape if role == "wgrad" else second.shape
    h = anchor.outputs[0]
    keeps_h = "swiglu" not in plain or (h is not None and values[h].stored)
    scales: Scales = "blocked" if first.scales == "blocked" else "rows" if first.scales else ""
    gathered: Literal["", "a", "b"] = ""
    topk = 0
    if spec.gathers:
        _, _, slots, *_ = spec.parts[0].inputs
        rows = spec.parts[0].outputs[0]
        assert rows is not None and slots is not None
        if spec.target != "sm_100a" or values[rows].stored:
            return "rows that sm_90a loads, or that others read, are dispatched by a kernel of their own"
        gathered, topk = "a" if rows == anchor.inputs[0] else "b", int(values[slots].shape[1])
    problem = GemmProblem(
        role, int(lead[0]) if lead else 0, int(n), int(k), epilogues[role, plain], first.format, scales,
        addends, copies, keeps_h, gathered, topk,
    )  # fmt: skip
    if [value.format for value in (*ins, *outs)] != _formats(problem):
        return "no template that loads and stores these values"
    return refusal(problem) or problem


def _formats(p: GemmProblem) -> list[str]:
    """Of the values that a problem loads and stores."""
    own = {"a": p.precision, "b": p.precision, "row": "mxfp8", "col": "mxfp8"}
    workspace = ("_scale", "_amax", "_wide", "partial")
    operands = [o for o in p.operands(GemmConfig(256, 2, 1)) if not o.name.endswith(workspace)]
    return [own.get(o.name, o.format) for o in operands]


def refusal(p: GemmProblem) -> str:
    """Why no template builds a problem; empty if one does."""
    if p.copies and (p.epilogue == "store" or p.scales != "blocked"):
        return "its result is quantized by a kernel of its own"
    whole = {"bf16": 8, "mxfp8": 16, "nvfp4": 32}[p.precision]
    if p.columns % 8 or p.n % whole or p.k % whole:
        return f"sizes {p.n} x {p.k} in {p.precision}: TMA needs rows of whole 16 bytes"
    if p.multiplied != "bf16" and p.epilogue == "swiglu" and p.columns % ATOM_ROWS:
        return f"{p.columns} pairs: gate and up need whole atoms of {ATOM_ROWS} rows of scales each"
    if p.copies and p.columns % 64:
        return f"{p.columns} columns: copies are stored in pieces of 64"
    if p.experts > MAX_EXPERTS:
        return f"{p.experts} experts on a rank: at most {MAX_EXPERTS}"
    return ""
