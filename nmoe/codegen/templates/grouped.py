"""What the grouped GEMMs of both architectures share: the cut of the problem, tensor maps, the host side."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import BFloat16, Float4E2M1FN, Float8E4M3FN, Float32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.gemm import ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.templates import dequantize, layouts
from nmoe.codegen.templates.epilogue import PartialSum
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.tiles import RaggedDepth, RaggedRows

ELEMENTS = {"bf16": BFloat16, "mxfp8": Float8E4M3FN, "nvfp4": Float4E2M1FN}


class Copy(NamedTuple):
    """A TMA copy: its atom and the tensor of coordinates that it understands."""

    atom: cute.CopyAtom
    tensor: cute.Tensor


class Plain(Fixed):
    """Operands that threads read and write themselves; None for those that the problem lacks."""

    NAMES = ("offsets", "row_source", "s", "partial", "a_amax", "b_amax", "row_scale", "col_scale")

    def __init__(self, names: list[str], tensors: list[cute.Tensor]) -> None:
        held = dict(zip(names, tensors, strict=True))
        (
            self.offsets, self.row_source, self.weight, self.partial, self.a_amax, self.b_amax, self.row_scale,
            self.col_scale,
        ) = (held.get(name) for name in self.NAMES)  # fmt: skip


def exchanged(name: str) -> str:
    """The name of what takes an operand's part when A and B are exchanged: "b_scale" of "a_scale"."""
    head, *rest = name.split("_")
    return "_".join([{"a": "b", "b": "a"}.get(head, head), *rest])


class GroupedGemm(Fixed):
    """An architecture gives `target`, `threads`, `unit_rows`, `b_rows`, its load operations and `kernel`."""

    target: str
    threads: int
    unit_rows: int  # rows of the tile that one epilogue unit stores

    def __init__(self, problem: GemmProblem, config: GemmConfig) -> None:
        self.given, self.config, self.cluster = problem, config, config.cluster
        self.problem = problem = problem.tiled(config)
        self.paired = problem.epilogue == "swiglu"  # a column tile is tile_n / 2 pairs of gate and up
        blocks = problem.blocks(config, self.target)
        self.columns = blocks.columns
        self.tiles: RaggedRows | RaggedDepth
        if problem.ragged == "rows":
            slices = -(-problem.depth // problem.slice)
            self.tiles = RaggedRows(problem.groups, slices, blocks, config.band)
        else:
            self.tiles = RaggedDepth(problem.groups, problem.n, problem.slice, blocks)
        self.plain = [o.name for o in problem.operands(config) if o.name in Plain.NAMES]
        self.element = ELEMENTS[problem.multiplied]
        self.out_type = Float32 if problem.epilogue == "accumulate" else BFloat16

    @property
    def b_rows(self) -> int:
        """Rows of B in one thread block's shared memory."""
        raise NotImplementedError

    def load_operations(self):  # type: ignore[no-untyped-def]
        """TMA operations for A and for B."""
        raise NotImplementedError

    def gather(self, tensor: cute.Tensor, row_source: cute.Tensor) -> Copy:
        """The TMA copy of rows of [T, width] by their tokens."""
        raise NotImplementedError

    def scales(self, named):  # type: ignore[no-untyped-def]
        """TMA copies of the scale factors of A and B, where the tensor cores take them."""
        return ()

    def kernel(self, *args):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of GemmProblem.operands, the number of clusters, the stream."""
        *tensors, clusters, stream = args
        problem = self.problem
        named = {o.name: t for o, t in zip(self.given.operands(self.config), tensors, strict=True)}
        if cutlass.const_expr(problem.scales == "rows"):
            dequantize.launch(problem, named, stream)
            named |= {"a": named["a_wide"], "b": named["b_wide"]}
        if cutlass.const_expr(problem.transposed):
            named = {exchanged(name): tensor for name, tensor in named.items()}
        a_layout = layouts.operand(
            self.element, problem.a_mn_major, ROW_TILE, problem.slice, self.config.stages
        )
        b_layout = layouts.operand(
            self.element, problem.b_mn_major, self.b_rows, problem.slice, self.config.stages
        )
        # The box is half of B whether a thread block loads one half or both.
        half = layouts.operand(self.element, problem.b_mn_major, self.config.tile_n // 2, problem.slice, 1)
        units = ROW_TILE // self.unit_rows
        buffers = layouts.buffers(
            self.out_type, self.unit_rows, units * self.config.buffers, problem.transposed
        )
        load_a, load_b = self.load_operations()
        adds = problem.epilogue == "accumulate"
        store = cpasync.CopyReduceBulkTensorTileS2GOp() if adds else cpasync.CopyBulkTensorTileS2GOp()
        rows = named["row_source"].shape[0] if problem.gathered else self._rows(named["a"])

        def copy(operation, name: str, element, layout) -> Copy:  # type: ignore[no-untyped-def]
            box = cute.select(layout, [0, 1])
            tile = tuple(cute.size(box, mode=[i]) for i in range(2))
            view = layouts.view(named[name], element, problem.modes(name), rows)
            made = cpasync.make_tiled_tma_atom(operation, view, box, tile)
            return Copy(made.atom, layouts.widened(made.tma_tensor))

        def operand(operation, name: str, layout) -> Copy:  # type: ignore[no-untyped-def]
            if cutlass.const_expr(name == problem.gathered):
                return self.gather(named[name], named["row_source"])
            return copy(operation, name, self.element, layout)

        def result(name: str) -> Copy:
            if cutlass.const_expr(name in problem.copies):
                return copy(store, name, Float8E4M3FN, layouts.copies(self.unit_rows, 1))
            return copy(store, name, self.out_type, buffers)

        stores = [result(name) for name in problem.stored]
        read = cpasync.CopyBulkTensorTileG2SOp()
        reads = [copy(read, name, BFloat16, buffers) for name in problem.read]
        a, b = operand(load_a, "a", a_layout), operand(load_b, "b", half)
        plain = [named[name] for name in self.plain]
        self.kernel(a, b, self.scales(named), stores, reads, plain, a_layout, b_layout, buffers).launch(
            grid=[self.cluster, clusters, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )
        if cutlass.const_expr("ds" in named):
            PartialSum(problem.experts, self.columns).launch(
                named["partial"], named["offsets"], named["ds"], stream
            )

    def _rows(self, a: cute.Tensor):  # type: ignore[no-untyped-def]
        """How many rows A has."""
        problem = self.problem
        if problem.role != "wgrad" or problem.a_mn_major:
            return a.shape[0]
        return a.shape[1] * (2 if problem.multiplied == "nvfp4" else 1)

    @cute.jit
    def sync_cluster(self) -> None:
        """All threads of the cluster, or of the thread block when it is alone."""
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
