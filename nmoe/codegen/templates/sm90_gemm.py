"""Grouped GEMM for Hopper: TMA → shared memory → WGMMA → registers → epilogue → TMA, persistent and warp-specialised.

warpgroup 0  warp 0 loads: for every 64-deep slice of a tile A[128, 64] and B[tile_n, 64] into the next stage. Its
             other three warps idle: their registers go to the consumers.
warpgroup 1  rows 0..63 of the tile    wgmma m64 × tile_n × k16, accumulators in registers, and between the slices
warpgroup 2  rows 64..127 of the tile  the epilogue of the tile before (deferred.py)

                 ┌ stage 0 ┬ stage 1 ┬ … ┐   full[s]:  1 arrival (expect_tx) + the bytes of A and B
warp 0 ── TMA ──▶│  A  B   │  A  B   │   │   empty[s]: one arrival from each consumer warp of the cluster
                 └─────────┴─────────┴───┘
Cluster of 2: the thread blocks work on neighbouring row tiles of one column tile. Each loads half of B and
multicasts it to both, which halves the traffic from L2; a stage is free when both have left it. A row tile without a
neighbour is worked on by both, in neighbouring column tiles, each with a B of its own.

barriers: full, empty (ring.py); named 1 and 2: the threads of a consumer warpgroup; arrived, one for each warpgroup:
what its epilogue reads is there.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from nmoe.codegen.templates.deferred import Deferred
from nmoe.codegen.templates.epilogue import Epilogue, Fragment
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.grouped import GroupedGemm, Plain
from nmoe.codegen.templates.layouts import major
from nmoe.codegen.templates.load import Loader
from nmoe.codegen.templates.ring import Ring
from nmoe.codegen.templates.tiles import Segments

GROUP = 128  # threads of a warpgroup
LOAD_REGISTERS, MATH_REGISTERS = 40, 232


class Sm90GroupedGemm(GroupedGemm):
    target = "sm_90a"
    threads = 3 * GROUP
    unit_rows = 64

    @property
    def b_rows(self) -> int:
        return self.config.tile_n

    def load_operations(self):  # type: ignore[no-untyped-def]
        load = cpasync.CopyBulkTensorTileG2SOp()
        return load, cpasync.CopyBulkTensorTileG2SMulticastOp() if self.cluster > 1 else load

    def mma(self, tile_n: int):  # type: ignore[no-untyped-def]
        op = warpgroup.MmaF16BF16Op(
            BFloat16, Float32, (64, tile_n, 16), warpgroup.OperandSource.SMEM,
            major(self.problem.a_mn_major), major(self.problem.b_mn_major),
        )  # fmt: skip
        return cute.make_tiled_mma(cute.make_mma_atom(op))

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
        a_stages = smem.allocate_tensor(BFloat16, a_layout.outer, 1024, swizzle=a_layout.inner)
        b_stages = smem.allocate_tensor(BFloat16, b_layout.outer, 1024, swizzle=b_layout.inner)
        buffers = smem.allocate_tensor(self.out_type, buffer_layout.outer, 1024, swizzle=buffer_layout.inner)
        ring = Ring(smem.allocate_array(Int64, 2 * self.config.stages), self.config.stages)
        arrived = smem.allocate_array(Int64, 2)

        if warp == 0:
            cpasync.prefetch_descriptor(a.atom)
            cpasync.prefetch_descriptor(b.atom)
            with cute.arch.elect_one():
                ring.init(arrivals=8 * self.cluster)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(arrived + i, 1)
            cute.arch.mbarrier_init_fence()
        self.sync_cluster()

        if warp < 4:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
            if warp == 0:
                loader = Loader(self, ring, a, b, a_stages, b_stages, shared=self.cluster > 1)
                loader.run(segments, cluster, clusters, rank)
        else:
            cute.arch.setmaxregister_increase(MATH_REGISTERS)
            self._math(ring, a_stages, b_stages, buffers, stores, reads, arrived,
                       segments, plain, cluster, clusters, rank)  # fmt: skip
        self.sync_cluster()  # a thread block stays until its neighbour has sent and signalled all that it will

    @cute.jit
    def _math(  # type: ignore[no-untyped-def]
        self, ring, a_stages, b_stages, buffers, stores, reads, arrived,
        segments, plain, cluster, clusters, rank,
    ):  # fmt: skip
        thread = cute.arch.thread_idx()[0] % GROUP
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // GROUP) - 1
        loop = MainLoop(self, ring, a_stages, b_stages, thread, group)
        own = cute.flat_divide(buffers, (64, buffers.shape[1], self.config.buffers))
        own = own[None, None, None, 0, 0, group]
        fragment = WgmmaFragment(self, own, thread, group)
        epilogue = Epilogue(self, fragment, own, stores, reads, arrived + group, group)
        deferred = Deferred(epilogue, self.mma(64), thread, self.config.tile_n, plain)
        tasks = deferred.tasks()

        stage, phase = Int32(0), Int32(0)
        tile, expert, first = self.tiles.begin(segments, cluster)
        while self.tiles.live(tile, expert):
            place = self.tiles.place(segments, tile, expert, first, rank)
            if place.slices > 0:  # an expert without rows adds nothing to its gradient
                stage, phase = loop.run(place.slices, tasks, stage, phase)
                deferred.take(loop.acc, place)
            tile, expert, first = self.tiles.seek(segments, tile + clusters, expert, first)
        for task in tasks:
            task()
        epilogue.finish()


class MainLoop(Fixed):
    """A consumer warpgroup's main loop: acc[64, tile_n] = A · Bᵀ. A slice of wgmma is under way while the next one is
    issued, and while a task runs."""

    def __init__(
        self, gemm: Sm90GroupedGemm, ring: Ring, a_stages, b_stages, thread: Int32, group: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        self.ring, self.cluster, self.steps = ring, gemm.cluster, gemm.problem.slice // 16
        self.over, self.onto = gemm.mma(gemm.config.tile_n), gemm.mma(gemm.config.tile_n)
        self.over.set(warpgroup.Field.ACCUMULATE, False)
        self.onto.set(warpgroup.Field.ACCUMULATE, True)
        part = self.onto.get_slice(thread)
        rows = cute.flat_divide(a_stages, (64, gemm.problem.slice))[None, None, group, 0, None]
        self.a = self.onto.make_fragment_A(part.partition_A(rows))
        self.b = self.onto.make_fragment_B(part.partition_B(b_stages))
        self.acc = cute.make_rmem_tensor(self.onto.partition_shape_C((64, gemm.config.tile_n)), Float32)

    @cute.jit
    def run(self, slices: Int32, tasks: cutlass.Constexpr, stage: Int32, phase: Int32):  # type: ignore[no-untyped-def]
        """A tile of at least one slice, with the tasks spread over them. Returns the next position in the ring."""
        self._issue(True, stage, phase)
        done = stage  # that the wgmma under way read
        stage, phase = self.ring.after(stage, phase)
        begin = Int32(1)
        for i in cutlass.range_constexpr(len(tasks) + 1):
            end = 1 + (i + 1) * (slices - 1) // (len(tasks) + 1)
            for _ in cutlass.range(end - begin, unroll=1):
                self._issue(False, stage, phase)
                warpgroup.wait_group(1)
                self._leave(done)
                done = stage
                stage, phase = self.ring.after(stage, phase)
            if cutlass.const_expr(i < len(tasks)):
                tasks[i]()
            begin = end
        warpgroup.wait_group(0)
        self._leave(done)
        return stage, phase

    @cute.jit
    def _issue(self, first: cutlass.Constexpr, stage: Int32, phase: Int32) -> None:
        """A slice's wgmma. Those of a tile's first overwrite acc: with zeros in it, and a number of slices that is not
        known, ptxas runs all products one by one."""
        cute.arch.mbarrier_wait(self.ring.full + stage, phase)
        warpgroup.fence()  # each slice: with one before the loop ptxas runs the products one by one
        for k in cutlass.range_constexpr(self.steps):
            mma = self.over if cutlass.const_expr(first and k == 0) else self.onto
            cute.gemm(mma, self.acc, self.a[None, None, k, stage], self.b[None, None, k, stage], self.acc)
        warpgroup.commit_group()

    @cute.jit
    def _leave(self, stage: Int32) -> None:
        """This warp has read a stage."""
        lane = cute.arch.lane_idx()
        if lane < self.cluster:
            cute.arch.mbarrier_arrive(self.ring.empty + stage, lane)


class WgmmaFragment(Fragment):
    """D of wgmma m64nNk16: value 4j + 2i + c of thread t is row 16·(t/32) + (t%32)/4 + 8i, column 8j + 2·(t%4) + c."""

    rows = 64
    lanes = 4

    def __init__(self, gemm: Sm90GroupedGemm, buffers: cute.Tensor, thread: Int32, group: Int32) -> None:
        self.group = group
        first = thread // 32 * 16 + thread % 32 // 4
        self.mine = (first, first + 8)
        self.leads = cute.arch.make_warp_uniform(thread // 32) == 0
        self.slice = gemm.mma(cute.size(buffers, mode=[1])).get_slice(thread)
        self.shape = self.stored(buffers[None, None, 0]).shape

    def stored(self, buffer: cute.Tensor) -> cute.Tensor:
        return self.slice.partition_C(buffer)

    def piece(self, acc: cute.Tensor, index: int | Int32, parts: int = 1) -> cute.Tensor:
        return cute.make_tensor(acc.iterator + index * cute.size(self.shape), cute.make_layout(self.shape))

    def row(self, value: int) -> int:
        return value // 2 % 2

    def sync(self) -> None:
        cute.arch.barrier(barrier_id=1 + self.group, number_of_threads=GROUP)
