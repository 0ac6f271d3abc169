"""What the grouped GEMMs of both architectures share: the cut of the problem, tensor maps, the host side."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import BFloat16, Float32, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.gemm import ROW_TILE, SLICE, GemmConfig, GemmProblem
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.epilogue import PartialSum
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.tiles import RaggedDepth, RaggedRows


class Copy(NamedTuple):
    """A TMA copy: its atom and the tensor of coordinates that it understands."""

    atom: cute.CopyAtom
    tensor: cute.Tensor


class GroupedGemm(Fixed):
    """An architecture gives `threads`, `unit_rows`, `b_rows`, its load operations and `kernel`."""

    threads: int
    unit_rows: int  # rows of the tile that one epilogue unit stores

    def __init__(self, problem: GemmProblem, config: GemmConfig) -> None:
        self.problem, self.config, self.cluster = problem, config, config.cluster
        self.paired = problem.epilogue == "swiglu"  # a column tile is tile_n / 2 pairs of gate and up
        self.reads = problem.epilogue == "dswiglu"
        self.columns = -(-problem.columns // (config.tile_n // 2 if self.paired else config.tile_n))
        self.tiles: RaggedRows | RaggedDepth
        if problem.ragged == "rows":
            slices = -(-problem.depth // SLICE)
            self.tiles = RaggedRows(problem.groups, self.columns, slices, self.cluster, config.band)
        else:
            self.tiles = RaggedDepth(problem.groups, problem.n, self.columns, self.cluster)
        self.out_type = Float32 if problem.epilogue == "accumulate" else BFloat16

    @property
    def b_rows(self) -> int:
        """Rows of B in one thread block's shared memory."""
        raise NotImplementedError

    def load_operations(self):  # type: ignore[no-untyped-def]
        """TMA operations for A and for B."""
        raise NotImplementedError

    def kernel(self, *args):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of GemmProblem.operands, the number of clusters, the stream."""
        *tensors, clusters, stream = args
        problem = self.problem
        named = {o.name: t for o, t in zip(problem.operands(self.config), tensors, strict=True)}
        a_layout = layouts.operand(problem.a_mn_major, ROW_TILE, self.config.stages)
        b_layout = layouts.operand(problem.b_mn_major, self.b_rows, self.config.stages)
        # The box is half of B whether a thread block loads one half or both.
        half = layouts.operand(problem.b_mn_major, self.config.tile_n // 2, 1)
        units = ROW_TILE // self.unit_rows
        buffers = layouts.buffers(self.out_type, self.unit_rows, units * self.config.buffers)
        load_a, load_b = self.load_operations()
        adds = problem.epilogue == "accumulate"
        store = cpasync.CopyReduceBulkTensorTileS2GOp() if adds else cpasync.CopyBulkTensorTileS2GOp()

        def copy(operation, name: str, layout) -> Copy:  # type: ignore[no-untyped-def]
            box = cute.select(layout, [0, 1])
            tile = tuple(cute.size(box, mode=[i]) for i in range(2))
            made = cpasync.make_tiled_tma_atom(
                operation, layouts.view(named[name], problem.modes(name)), box, tile
            )
            return Copy(made.atom, layouts.widened(made.tma_tensor))

        stores = [copy(store, name, buffers) for name in problem.stored]
        read = (
            copy(cpasync.CopyBulkTensorTileG2SOp(), "h", buffers) if cutlass.const_expr(self.reads) else None
        )
        a, b = copy(load_a, "a", a_layout), copy(load_b, "b", half)
        extra = named.get("offsets"), named.get("s"), named.get("partial")
        self.kernel(a, b, stores, read, *extra, a_layout, b_layout, buffers).launch(
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

    @cute.jit
    def sync_cluster(self) -> None:
        """All threads of the cluster, or of the thread block when it is alone."""
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
