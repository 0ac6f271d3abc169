"""Grouped GEMM for Blackwell: TMA → shared memory → tcgen05.mma → tensor memory → epilogue → TMA, persistent.

warps 0..3  epilogue: each drains its 32 lanes of tensor memory (32 rows of the tile) and stores them by itself
warp 4      one thread issues the products: 4 × tcgen05.mma of k16 a slice
warp 5      loads: for every 64-deep slice of a tile A and B into the next stage; rows of tokens with warp 6 (gather.py)

                 ┌ stage 0 ┬ stage 1 ┬ … ┐             tensor memory, 512 columns
warp 5 ── TMA ──▶│  A  B   │  A  B   │   │── warp 4 ──▶ ┌ tile i ┬ tile i+1 ┐ ──▶ warps 0..3
                 └─────────┴─────────┴───┘              └ tile_n ┴  tile_n  ┘
full[s]:  1 arrival (expect_tx) + bytes       done[t]: the products of accumulator t are complete (commit)
empty[s]: the products that read s (commit)   free[t]: one arrival from each epilogue warp of the cluster

Two accumulators: a tile's epilogue runs while the next tile is multiplied. With scale factors (block_scaled.py) two of
256 columns do not fit, and the last columns of the first are the first of the second:

    columns 0 ┬ accumulator 0 ───────┬ 256
                         overlap ┬ ──┴ accumulator 1 ────┬ scale factors ┬ 512
A tile's epilogue starts with the piece that covers the overlap and then signals free[t], which the next tile waits for;
without an overlap it signals when it is through, and the tile after the next waits.

Cluster of 2: one MMA of M = 256 on the tensor cores of both thread blocks (cta_group::2). Each loads its own 128
rows of A and its half of B, and keeps the accumulators of its own rows. The first thread block's warp 4 issues
for both; its barriers count the bytes of both, and its commits arrive at the barriers of both.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int16, Int32, Int64, cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator

from nmoe.codegen.gemm import ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.templates import block_scaled, gather
from nmoe.codegen.templates.epilogue import Epilogue, Fragment
from nmoe.codegen.templates.grouped import GroupedGemm, Plain
from nmoe.codegen.templates.layouts import major
from nmoe.codegen.templates.load import Loader
from nmoe.codegen.templates.ring import Ring
from nmoe.codegen.templates.tiles import Segments

EPILOGUE_WARPS, MMA_WARP, LOAD_WARP = 4, 4, 5
ACCUMULATORS = 2


class Sm100GroupedGemm(GroupedGemm):
    target = "sm_100a"
    unit_rows = 32

    def __init__(self, problem: GemmProblem, config: GemmConfig) -> None:
        super().__init__(problem, config)
        self.threads = 32 * (LOAD_WARP + (gather.WARPS if problem.gathered else 1))

    @property
    def b_rows(self) -> int:
        return self.config.tile_n // self.cluster

    @property
    def group(self) -> tcgen05.CtaGroup:
        return tcgen05.CtaGroup.TWO if self.cluster == 2 else tcgen05.CtaGroup.ONE

    def load_operations(self):  # type: ignore[no-untyped-def]
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        return load, load

    def gather(self, tensor, row_source):  # type: ignore[no-untyped-def]
        return gather.copy(self.group, tensor, row_source)

    def scales(self, named):  # type: ignore[no-untyped-def]
        return block_scaled.copies(self, named, self.load_operations()[0]) if self.scaled else ()

    @property
    def scaled(self) -> bool:
        return self.problem.multiplied != "bf16"

    def mma(self):  # type: ignore[no-untyped-def]
        if self.scaled:
            tile = (ROW_TILE * self.cluster, self.config.tile_n)
            return block_scaled.mma(self.problem, tile, self.group)
        op = tcgen05.MmaF16BF16Op(
            BFloat16, Float32, (ROW_TILE * self.cluster, self.config.tile_n, 16), self.group,
            tcgen05.OperandSource.SMEM, major(self.problem.a_mn_major),
            major(self.problem.b_mn_major),
        )  # fmt: skip
        return cute.make_tiled_mma(op)

    @cute.kernel
    def kernel(self, a, b, scales, stores, reads, plain, a_layout, b_layout, buffer_layout):  # type: ignore[no-untyped-def]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        _, cluster, _ = cute.arch.block_idx()
        _, clusters, _ = cute.arch.grid_dim()
        plain = Plain(self.plain, plain)
        segments = Segments(
            plain.offsets, cute.size(a.tensor, mode=[0 if self.problem.ragged == "rows" else 1])
        )

        smem = SmemAllocator()
        a_stages = smem.allocate_tensor(self.element, a_layout.outer, 1024, swizzle=a_layout.inner)
        b_stages = smem.allocate_tensor(self.element, b_layout.outer, 1024, swizzle=b_layout.inner)
        buffers = smem.allocate_tensor(self.out_type, buffer_layout.outer, 1024, swizzle=buffer_layout.inner)
        ring = Ring(smem.allocate_array(Int64, 2 * self.config.stages), self.config.stages)
        accumulators = Ring(smem.allocate_array(Int64, 2 * ACCUMULATORS), ACCUMULATORS)
        arrived = smem.allocate_array(Int64, 2 * EPILOGUE_WARPS)
        base = smem.allocate_array(Int32, 1)

        if warp == 0:
            cpasync.prefetch_descriptor(a.atom)
            cpasync.prefetch_descriptor(b.atom)
            with cute.arch.elect_one():
                ring.init(arrivals=1)
                accumulators.init(arrivals=EPILOGUE_WARPS * self.cluster)
                for i in cutlass.range_constexpr(2 * EPILOGUE_WARPS):
                    cute.arch.mbarrier_init(arrived + i, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.alloc_tmem(self._tensor_columns, base, is_two_cta=self.cluster == 2)
        self.sync_cluster()
        memory = cute.arch.retrieve_tmem_ptr(Float32, 16, base)
        factors = None
        if cutlass.const_expr(self.scaled):
            factors = block_scaled.Scales(self, scales, smem, base[0] + self.stride + self.config.tile_n)

        if warp >= LOAD_WARP:
            gathers = None
            if cutlass.const_expr(self.problem.gathered != ""):
                of = (a, a_stages) if self.problem.gathered == "a" else (b, b_stages)
                gathers = gather.Gather(self, of[0], plain.row_source, of[1], warp - LOAD_WARP)
            loader = Loader(self, ring, a, b, a_stages, b_stages, False, factors, gathers)
            loader.run(segments, cluster, clusters, rank)
        elif warp == MMA_WARP:
            if rank == 0:
                self._multiply(ring, accumulators, a_stages, b_stages, factors, memory,
                               segments, cluster, clusters, rank)  # fmt: skip
        else:
            self._drain(accumulators, buffers, memory, stores, reads, arrived,
                        segments, plain, warp, cluster, clusters, rank)  # fmt: skip
        self.sync_cluster()  # a thread block stays until its neighbour has sent and signalled all that it will
        if warp == 0:
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.cluster == 2)
            cute.arch.dealloc_tmem(memory, self._tensor_columns, is_two_cta=self.cluster == 2)

    @property
    def stride(self) -> int:
        return self.problem.accumulator_columns(self.config)

    @property
    def overlaps(self) -> bool:
        return self.stride < self.config.tile_n

    @property
    def _tensor_columns(self) -> int:
        """What is allocated: a power of two."""
        used = self.stride + self.config.tile_n + self.problem.scale_columns(self.config)
        return 1 << (used - 1).bit_length()

    def _accumulators(self, memory):  # type: ignore[no-untyped-def]
        """Tensor memory as the MMA sees it: [tile, 1, 1, ACCUMULATORS]."""
        mma = self.mma()
        shape = mma.partition_shape_C((ROW_TILE * self.cluster, self.config.tile_n))
        one = mma.make_fragment_C(shape).layout
        return cute.make_tensor(memory, cute.append(one, cute.make_layout(ACCUMULATORS, stride=self.stride)))

    @cute.jit
    def _multiply(  # type: ignore[no-untyped-def]
        self, ring, accumulators, a_stages, b_stages, factors, memory, segments, cluster, clusters, rank
    ):
        mma = self.mma()
        step = cute.size(mma.shape_mnk, mode=[2])
        fa = mma.make_fragment_A(cute.group_modes(cute.flat_divide(a_stages, (ROW_TILE, step)), 0, 2))
        fb = mma.make_fragment_B(cute.group_modes(cute.flat_divide(b_stages, (self.b_rows, step)), 0, 2))
        acc = self._accumulators(memory)
        both = Int16(3) if cutlass.const_expr(self.cluster == 2) else None
        stage, phase, turn, side = Int32(0), Int32(0), Int32(0), Int32(1)
        tile, expert, first = self.tiles.begin(segments, cluster)
        while self.tiles.live(tile, expert):
            place = self.tiles.place(segments, tile, expert, first, rank)
            if place.slices > 0:
                if cutlass.const_expr(self.overlaps):  # for the last tile, in the other accumulator
                    cute.arch.mbarrier_wait(accumulators.empty + (turn ^ 1), side ^ turn)
                else:
                    cute.arch.mbarrier_wait(accumulators.empty + turn, side)
                _after_sync()
                mma.set(tcgen05.Field.ACCUMULATE, False)
                for _ in cutlass.range(place.slices, unroll=1):
                    cute.arch.mbarrier_wait(ring.full + stage, phase)
                    _after_sync()
                    if cutlass.const_expr(factors is not None):
                        with cute.arch.elect_one():
                            factors.copy(stage)
                    for k in cutlass.range_constexpr(self.problem.slice // step):
                        if cutlass.const_expr(factors is not None):
                            factors.point(mma, k)
                        target = acc[None, None, None, turn]
                        cute.gemm(mma, target, fa[None, None, k, stage], fb[None, None, k, stage], target)
                        mma.set(tcgen05.Field.ACCUMULATE, True)
                    with cute.arch.elect_one():
                        tcgen05.commit(ring.empty + stage, both, self.group)
                    stage, phase = ring.after(stage, phase)
                with cute.arch.elect_one():
                    tcgen05.commit(accumulators.full + turn, both, self.group)
                turn, side = accumulators.after(turn, side)
            tile, expert, first = self.tiles.seek(segments, tile + clusters, expert, first)

    @cute.jit
    def _drain(  # type: ignore[no-untyped-def]
        self, accumulators, buffers, memory, stores, reads, arrived,
        segments, plain, warp, cluster, clusters, rank,
    ):  # fmt: skip
        own = cute.flat_divide(buffers, (32, buffers.shape[1], self.config.buffers))
        own = own[None, None, None, 0, 0, warp]
        fragment = TensorMemoryFragment(self, own)
        epilogue = Epilogue(self, fragment, own, stores, reads, arrived + 2 * warp, warp)
        acc = self._accumulators(memory)
        phase, turn, side = Int32(0), Int32(0), Int32(0)
        tile, expert, first = self.tiles.begin(segments, cluster)
        while self.tiles.live(tile, expert):
            place = self.tiles.place(segments, tile, expert, first, rank)
            if place.slices > 0:
                free, flip = accumulators.empty + turn, 0
                if cutlass.const_expr(self.overlaps):
                    flip = (epilogue.steps - 1) * (1 - turn)
                if place.exists:
                    epilogue.prefetch(place, flip)
                cute.arch.mbarrier_wait(accumulators.full + turn, side)
                _after_sync()
                if place.exists:
                    early = free if cutlass.const_expr(self.overlaps) else None
                    phase = epilogue.run(acc[(None, None), 0, 0, turn], place, plain, phase, flip, early)
                if cutlass.const_expr(not self.overlaps) or not place.exists:
                    fragment.release(free)
                turn, side = accumulators.after(turn, side)
            tile, expert, first = self.tiles.seek(segments, tile + clusters, expert, first)
        epilogue.finish()


@cute.jit
def _before_sync() -> None:
    """Orders this thread's accesses to tensor memory before the barrier that it signals next (PTX tcgen05.fence)."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


@cute.jit
def _after_sync() -> None:
    """Orders this thread's accesses to tensor memory after the barrier that it has waited for."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


class TensorMemoryFragment(Fragment):
    """tcgen05.ld 32x32b: lane = row, register = column; a warp reaches the 32 lanes of its number modulo 4."""

    rows = 32
    lanes = 1
    parts = 2

    def __init__(self, gemm: Sm100GroupedGemm, buffers: cute.Tensor) -> None:
        self.leader = 0 if gemm.cluster == 2 else None
        self.lane = cute.arch.lane_idx()
        self.thread = cute.arch.thread_idx()[0]
        self.mine = (self.lane,)
        self.leads = True
        self.width = cute.size(buffers, mode=[1])

    def stored(self, buffer: cute.Tensor) -> cute.Tensor:
        return buffer[self.lane, None]

    def piece(self, acc: cute.Tensor, index: int | Int32, parts: int = 1) -> cute.Tensor:
        width = self.width // parts
        tile = cute.flat_divide(acc, (ROW_TILE, width))[None, None, 0, index]
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(width)), Float32)
        copy = tcgen05.make_tmem_copy(atom, tile).get_slice(self.thread)
        shape = copy.partition_D(cute.make_identity_tensor((ROW_TILE, width))).shape
        target = cute.make_rmem_tensor(shape, Float32)
        cute.copy(atom, copy.partition_S(tile), target)
        cute.arch.fence_view_async_tmem_load()
        return cute.make_tensor(target.iterator, cute.make_layout(width))

    def row(self, value: int) -> int:
        return 0

    def sync(self) -> None:
        cute.arch.sync_warp()

    @cute.jit
    def release(self, free) -> None:  # type: ignore[no-untyped-def]
        _before_sync()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(free, self.leader)
