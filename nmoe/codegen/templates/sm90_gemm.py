"""Grouped GEMM for Hopper: TMA → shared memory → WGMMA → registers → epilogue → TMA, persistent and warp-specialised.

warpgroup 0  warp 0 loads: for every 64-deep slice of a tile A[128, 64] and B[tile_n, 64] into the next stage. Its
             other three warps idle: their registers go to the consumers.
warpgroup 1  rows 0..63 of the tile    wgmma m64 × tile_n × k16, accumulators in registers;
warpgroup 2  rows 64..127 of the tile  then the epilogue, while warp 0 already fills the next tile's stages

                 ┌ stage 0 ┬ stage 1 ┬ … ┐   full[s]:  1 arrival (expect_tx) + the bytes of A and B
warp 0 ── TMA ──▶│  A  B   │  A  B   │   │   empty[s]: one arrival from each consumer warp of the cluster
                 └─────────┴─────────┴───┘
Cluster of 2: the thread blocks work on neighbouring row tiles of one column tile. Each loads half of B and
multicasts it to both, which halves the traffic from L2; a stage is free when both have left it.

barriers: full, empty (ring.py); named 1 and 2: the threads of a consumer warpgroup; arrived[2]: h has been read,
a pair for each warpgroup (dSwiGLU).
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from nmoe.codegen.gemm import ROW_TILE
from nmoe.codegen.templates import layouts
from nmoe.codegen.templates.epilogue import Epilogue, Fragment
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.grouped import GroupedGemm, Plain
from nmoe.codegen.templates.layouts import major
from nmoe.codegen.templates.load import Loader
from nmoe.codegen.templates.ring import Ring
from nmoe.codegen.templates.tiles import Segments

GROUP = 128  # threads of a warpgroup
# What a thread of 3 · GROUP has at the start, the most that a consumer may have, and what that leaves: registers change
# hands only within a thread block, so one too many and the consumers wait for ever.
ENTRY_REGISTERS = 65536 // (3 * GROUP) // 8 * 8
MATH_REGISTERS = 240
LOAD_REGISTERS = 3 * ENTRY_REGISTERS - 2 * MATH_REGISTERS


class Sm90GroupedGemm(GroupedGemm):
    threads = 3 * GROUP
    unit_rows = 64
    read_rows = ROW_TILE
    narrows = True

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
        buffers = None
        if cutlass.const_expr(self.config.buffers > 0):
            buffers = smem.allocate_tensor(self.out_type, buffer_layout.outer, 1024, swizzle=buffer_layout.inner)
        ring = Ring(smem.allocate_array(Int64, 2 * self.config.stages), self.config.stages)

        if warp == 0:
            cpasync.prefetch_descriptor(a.atom)
            cpasync.prefetch_descriptor(b.atom)
            with cute.arch.elect_one():
                ring.init(arrivals=8 * self.cluster)
            cute.arch.mbarrier_init_fence()
        self.sync_cluster()

        if warp < 4:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
            if warp == 0:
                loader = Loader(self, ring, a, b, a_stages, b_stages, shared=self.cluster > 1,
                                reads=[*zip(reads, self._landings(a_stages, b_stages))])  # fmt: skip
                loader.run(segments, cluster, clusters, rank)
        else:
            cute.arch.setmaxregister_increase(MATH_REGISTERS)
            self._math(ring, a_stages, b_stages, buffers, stores, segments, plain, cluster, clusters, rank)
        self.sync_cluster()  # a thread block stays until its neighbour has sent and signalled all that it will

    def _landings(self, a_stages: cute.Tensor, b_stages: cute.Tensor) -> list[cute.Tensor]:
        """Where a stage holds each of the pieces that the epilogue reads, [128, 64, stage]: the first in place of A, the
        second of B."""

        def pieces(stages: cute.Tensor, each: int) -> cute.Tensor:
            layout = layouts.buffers(BFloat16, ROW_TILE, each * self.config.stages)
            start = cute.recast_ptr(stages.iterator, layout.inner, BFloat16)
            held = cute.make_tensor(start, layout.outer)
            box = (ROW_TILE, cute.size(held, mode=[1]), each)
            return cute.flat_divide(held, box)[None, None, 0, 0, 0, None]

        operands = ((a_stages, 1), (b_stages, self.config.tile_n // ROW_TILE))
        return [pieces(*operand) for operand in operands[: len(self.problem.read)]]

    @cute.jit
    def _math(  # type: ignore[no-untyped-def]
        self, ring, a_stages, b_stages, buffers, stores, segments, plain, cluster, clusters, rank,
    ):  # fmt: skip
        thread = cute.arch.thread_idx()[0] % GROUP
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // GROUP) - 1
        acc = cute.make_rmem_tensor(self.mma(self.config.tile_n).partition_shape_C((64, self.config.tile_n)), Float32)
        rows = cute.flat_divide(a_stages, (64, self.problem.slice))[None, None, group, 0, None]
        full = Products(self, self.config.tile_n, acc, rows, b_stages, thread)
        half = Products(self, self.config.tile_n // 2, acc, rows, b_stages, thread)
        landings = [
            cute.flat_divide(landing, (64, cute.size(landing, mode=[1])))[None, None, group, 0, None]
            for landing in self._landings(a_stages, b_stages)
        ]
        if cutlass.const_expr(self.config.buffers > 0):
            own = cute.flat_divide(buffers, (64, buffers.shape[1], self.config.buffers))
            own = own[None, None, None, 0, 0, group]
        else:
            own = landings[0]
        fragment = WgmmaFragment(self, own, thread, group)
        epilogue = RingEpilogue(self, fragment, own, stores, group, ring, landings)

        stage, phase = Int32(0), Int32(0)
        tile, expert, first = self.tiles.begin(segments, cluster)
        while self.tiles.live(tile, expert):
            place = self.tiles.place(segments, tile, expert, first, rank)
            if place.exists:
                if place.column < self.whole:
                    stage, phase = self._multiply(ring, full, place.slices, stage, phase)
                if cutlass.const_expr(self.narrow):
                    if place.column == self.whole:
                        stage, phase = self._multiply(ring, half, place.slices, stage, phase)
                if cutlass.const_expr(len(self.problem.read) > 0):
                    stage, phase = epilogue.read(acc, place, plain, stage, phase)
                else:
                    epilogue.store(acc, place, plain)
            else:
                stage, phase = self._skip(ring, place, stage, phase)
            tile, expert, first = self.tiles.seek(segments, tile + clusters, expert, first)
        epilogue.finish()

    @cute.jit
    def _multiply(self, ring, products, slices, stage, phase):  # type: ignore[no-untyped-def]
        """The accumulators are A·Bᵀ over `slices` stages, one slice of wgmma in flight while the next is issued."""
        products.acc.fill(0.0)
        done = Int32(-1)  # the stage that the wgmma in flight reads
        warpgroup.fence()
        for _ in cutlass.range(slices, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            for k in cutlass.range_constexpr(self.problem.slice // 16):
                products.add(k, stage)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if done >= 0:
                ring.release(done, self.cluster)
            done = stage
            stage, phase = ring.after(stage, phase)
        warpgroup.wait_group(0)
        if done >= 0:
            ring.release(done, self.cluster)
        return stage, phase

    @cute.jit
    def _skip(self, ring, place, stage, phase):  # type: ignore[no-untyped-def]
        """A thread block without rows takes part in the loads of B."""
        slices = place.slices
        if cutlass.const_expr(len(self.problem.read) > 0):
            slices += self.pieces if place.column < self.whole else self.least
        for _ in cutlass.range(slices, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            ring.release(stage, self.cluster)
            stage, phase = ring.after(stage, phase)
        return stage, phase


class Products(Fixed):
    """wgmma of a warpgroup's 64 rows with the first `width` rows of B, into the first `width` columns of `acc`."""

    def __init__(self, gemm: Sm90GroupedGemm, width: int, acc, rows, b_stages, thread: Int32) -> None:  # type: ignore[no-untyped-def]
        self.mma = gemm.mma(width)
        self.mma.set(warpgroup.Field.ACCUMULATE, True)
        part = self.mma.get_slice(thread)
        columns = cute.flat_divide(b_stages, (width, gemm.problem.slice))[None, None, 0, 0, None]
        self.a = self.mma.make_fragment_A(part.partition_A(rows))
        self.b = self.mma.make_fragment_B(part.partition_B(columns))
        self.acc = cute.make_tensor(acc.iterator, cute.make_layout(self.mma.partition_shape_C((64, width))))

    def add(self, k: int, stage: Int32) -> None:
        cute.gemm(self.mma, self.acc, self.a[None, None, k, stage], self.b[None, None, k, stage], self.acc)


class RingEpilogue(Epilogue):
    """An epilogue that finds what it reads in the ring's stages, where the loader puts it while the slices before it are
    still multiplied. Results take its place there, and the stage is free when the copy engine has read them."""

    def __init__(self, gemm, fragment, buffers, stores, unit: Int32, ring, landings) -> None:  # type: ignore[no-untyped-def]
        super().__init__(gemm, fragment, buffers, stores, (), None, unit)
        self.ring, self.landings = ring, landings
        if landings:
            self.results = [self._partition(stores[0], landing) for landing in landings]

    @cute.jit
    def store(self, acc, place, plain) -> None:  # type: ignore[no-untyped-def]
        """Finishes a tile for which nothing is read."""
        if cutlass.const_expr(self.problem.epilogue == "swiglu"):
            self._swiglu(acc, place, plain, None, 0, None)
        else:
            self._store_pieces(acc, place, 0, self.gemm.least)
            if place.column < self.gemm.whole:
                self._store_pieces(acc, place, self.gemm.least, self.pieces)

    @cute.jit
    def _store_pieces(self, acc, place, begin: cutlass.Constexpr, end: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        batch = place.expert if cutlass.const_expr(self.problem.epilogue == "accumulate") else 0
        for p in cutlass.range_constexpr(begin, end):
            at = (self._row(place), place.column * self.pieces + p, batch)
            self._put(self.fragment.piece(acc, p), p % self.buffers, self.problem.stored[0], at)

    @cute.jit
    def read(self, acc, place, plain, stage, phase):  # type: ignore[no-untyped-def]
        """Finishes a tile whose pieces begin at this position of the ring; returns the position after them."""
        weights = self._weights(plain.weight, place)
        sums = [Float32(0.0) for _ in self.fragment.mine]
        done = Int32(-1)  # the stage that the copy engine still reads
        for p in cutlass.range_constexpr(self.gemm.least):
            sums, done, stage, phase = self._read(acc, place, weights, sums, p, done, stage, phase)
        if place.column < self.gemm.whole:
            for p in cutlass.range_constexpr(self.gemm.least, self.pieces):
                sums, done, stage, phase = self._read(acc, place, weights, sums, p, done, stage, phase)
        self._stored()
        self.ring.release(done, self.gemm.cluster)
        if cutlass.const_expr(plain.partial is not None):
            self._partial(sums, place, plain.partial)
        return stage, phase

    @cute.jit
    def _read(self, acc, place, weights, sums, p: cutlass.Constexpr, done, stage, phase):  # type: ignore[no-untyped-def]
        values = self.fragment.piece(acc, p)
        spots = [self.fragment.stored(landing[None, None, stage]) for landing in self.landings]
        cute.arch.mbarrier_wait(self.ring.full + stage, phase)
        results = 1
        if cutlass.const_expr(self.problem.epilogue == "dswiglu"):
            results = 2
            sums = self._gradients(values, spots, weights, sums)
        else:
            cute.autovec_copy(self._sum(values, spots), spots[0])
        cute.arch.fence_proxy("async.shared", space="cta")
        self._stored()
        if cutlass.const_expr(p > 0):
            self.ring.release(done, self.gemm.cluster)
        if self.fragment.leads:
            for i in cutlass.range_constexpr(results):
                atom, source, target = self.results[i]
                at = place.column * self.pieces + p
                cute.copy(atom, source[None, stage], target[None, self._row(place), at, i])
            cute.arch.cp_async_bulk_commit_group()
        done = stage
        stage, phase = self.ring.after(stage, phase)
        return sums, done, stage, phase

    @cute.jit
    def _stored(self) -> None:
        """Waits until the copy engine has read the piece before, and for the other threads."""
        if self.fragment.leads:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        self.fragment.sync()


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
