"""Grouped GEMM for Hopper: TMA → shared memory → WGMMA → registers → epilogue → TMA, persistent and warp-specialised.

    warpgroup 0  warp 0: walks the tiles; for every 64-deep slice of a tile loads A[128, 64] and its part of
                 B[tile_n, 64] into the next stage. The other three warps idle: their registers go to the consumers.
    warpgroup 1  rows 0..63 of the tile    wgmma m64 × tile_n × k16, accumulators in registers;
    warpgroup 2  rows 64..127 of the tile  then the epilogue, while warp 0 already fills the next tile's stages

                     ┌ stage 0 ┬ stage 1 ┬ … ┐   full[s]:  1 arrival (expect_tx) + the bytes of A and B
    warp 0 ── TMA ──▶│  A  B   │  A  B   │   │   empty[s]: one arrival from each consumer warp of the cluster
                     └─────────┴─────────┴───┘
    Cluster of 2: the CTAs work on neighbouring row tiles of one column tile. Each loads half of B and multicasts it
    to both, which halves the traffic from L2; a stage is free when the consumers of both CTAs have left it.

    epilogue, each warpgroup by itself: 64 × 128 B pieces of its rows → swizzled buffer → TMA store or reduce-add.
    Pieces are clipped at the tensor's edges by TMA. Two buffers, or four when the epilogue also reads (dSwiGLU).

The gate and up halves of a SwiGLU tile are two half boxes of B, so that one thread holds both values of a pair.
Operand layouts come from their strides: K-major and MN-major operands differ in descriptors only.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator

from nmoe.codegen.gemm import BUFFERS, ROW_TILE, ROWS, SLICE, GemmConfig, GemmProblem, Modes
from nmoe.codegen.templates import activation
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.ring import Ring
from nmoe.codegen.templates.tiles import RaggedDepth, RaggedRows

GROUP = 128  # threads of a warpgroup
PIECE_BYTES = 128  # width of an epilogue piece
LOAD_REGISTERS, MATH_REGISTERS = 40, 232


class Sm90GroupedGemm(Fixed):
    def __init__(self, problem: GemmProblem, config: GemmConfig) -> None:
        self.problem, self.config = problem, config
        self.cluster = config.cluster
        self.half_n = config.tile_n // 2
        self.paired = problem.epilogue == "swiglu"  # a column tile is tile_n / 2 pairs
        self.reads = problem.epilogue == "dswiglu"
        width = self.half_n if self.paired else config.tile_n
        columns = -(-problem.columns // width)
        self.columns = columns
        self.tiles: RaggedRows | RaggedDepth
        if problem.ragged == "rows":
            self.tiles = RaggedRows(problem.experts, ROW_TILE, columns, self.cluster, config.band)
        else:
            self.tiles = RaggedDepth(problem.experts, -(-problem.n // ROW_TILE), columns, self.cluster)
        self.slices = -(-problem.depth // SLICE)
        self.out_type = Float32 if problem.epilogue == "accumulate" else BFloat16
        self.piece = PIECE_BYTES * 8 // self.out_type.width  # columns of an epilogue piece
        self.buffers = BUFFERS[problem.epilogue]
        self.a_major = warpgroup.OperandMajorMode.MN if problem.a_mn_major else warpgroup.OperandMajorMode.K
        self.b_major = warpgroup.OperandMajorMode.MN if problem.b_mn_major else warpgroup.OperandMajorMode.K

    # ---- host ----

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of GemmProblem.operands, the number of clusters, the stream."""
        *tensors, clusters, stream = args
        problem = self.problem
        named = {o.name: t for o, t in zip(problem.operands(self.config.tile_n), tensors, strict=True)}
        a, b = (_view(named[name], problem.modes(name)) for name in ("a", "b"))
        a_layout = self._operand_layout(self.a_major, ROW_TILE, self.config.stages)
        b_layout = self._operand_layout(self.b_major, self.config.tile_n, self.config.stages)
        half = self._operand_layout(self.b_major, self.half_n, 1)
        load = cpasync.CopyBulkTensorTileG2SOp()
        share = cpasync.CopyBulkTensorTileG2SMulticastOp() if self.cluster > 1 else load
        a_tma = cpasync.make_tiled_tma_atom(load, a, cute.select(a_layout, [0, 1]), (ROW_TILE, SLICE))
        # The box is half of B whether or not the cluster shares it: each CTA of the cluster loads one half.
        b_tma = cpasync.make_tiled_tma_atom(share, b, cute.select(half, [0, 1]), (self.half_n, SLICE))
        buffer = self._buffer_layout()
        piece = cute.select(buffer, [0, 1])
        adds = problem.epilogue == "accumulate"
        store = cpasync.CopyReduceBulkTensorTileS2GOp() if adds else cpasync.CopyBulkTensorTileS2GOp()
        results = tuple(
            cpasync.make_tiled_tma_atom(
                store, _view(named[name], problem.modes(name)), piece, (64, self.piece)
            )
            for name in problem.stored
        )
        read_atom = read = None
        if cutlass.const_expr(self.reads):
            view = _view(named["h"], problem.modes("h"))
            read_atom, read = cpasync.make_tiled_tma_atom(load, view, piece, (64, self.piece))
        offsets, weight, partial = named["offsets"], named.get("s"), named.get("partial")
        self.kernel(
            a_tma.atom, a_tma.tma_tensor, b_tma.atom, b_tma.tma_tensor,
            tuple(r.atom for r in results), tuple(r.tma_tensor for r in results),
            read_atom, read, offsets, weight, partial, a_layout, b_layout, buffer,
        ).launch(  # fmt: skip
            grid=[self.cluster, clusters, 1], block=[3 * GROUP, 1, 1], cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip
        if cutlass.const_expr(self.reads):
            ds = named["ds"]
            self.sum_partials(partial, offsets, ds).launch(
                grid=[cute.ceil_div(cute.size(ds), 256), 1, 1], block=[256, 1, 1], stream=stream
            )

    def _operand_layout(self, major, rows: int, stages: int):  # type: ignore[no-untyped-def]
        """Swizzled stages [rows, 64, stages]; each half of the rows is contiguous, so that it can be one box."""
        mn = major == warpgroup.OperandMajorMode.MN
        kind = warpgroup.SmemLayoutAtomKind.MN_SW128 if mn else warpgroup.SmemLayoutAtomKind.K_SW128
        atom = warpgroup.make_smem_layout_atom(kind, BFloat16)
        return cute.tile_to_shape(atom, (rows, SLICE, stages), order=(1, 0, 2) if mn else (0, 1, 2))

    def _buffer_layout(self):  # type: ignore[no-untyped-def]
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.out_type)
        return cute.tile_to_shape(atom, (64, self.piece, 2 * self.buffers), order=(0, 1, 2))

    def _mma(self, tile_n: int):  # type: ignore[no-untyped-def]
        op = warpgroup.MmaF16BF16Op(
            BFloat16, Float32, (64, tile_n, 16), warpgroup.OperandSource.SMEM, self.a_major, self.b_major
        )
        return cute.make_tiled_mma(cute.make_mma_atom(op))

    # ---- device ----

    @cute.kernel
    def kernel(  # type: ignore[no-untyped-def]
        self,
        a_atom, a_tensor, b_atom, b_tensor, store_atoms, stores, read_atom, read,
        offsets, weight, partial, a_layout, b_layout, buffer_layout,
    ):  # fmt: skip
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        _, cluster, _ = cute.arch.block_idx()
        _, clusters, _ = cute.arch.grid_dim()

        smem = SmemAllocator()
        a_stages = smem.allocate_tensor(BFloat16, a_layout.outer, 1024, swizzle=a_layout.inner)
        b_stages = smem.allocate_tensor(BFloat16, b_layout.outer, 1024, swizzle=b_layout.inner)
        buffers = smem.allocate_tensor(self.out_type, buffer_layout.outer, 1024, swizzle=buffer_layout.inner)
        ring = Ring(smem.allocate_array(cutlass.Int64, 2 * config.stages), config.stages)
        arrived = smem.allocate_array(cutlass.Int64, 4) if cutlass.const_expr(self.reads) else None

        if warp == 0:
            cpasync.prefetch_descriptor(a_atom)
            cpasync.prefetch_descriptor(b_atom)
            with cute.arch.elect_one():
                ring.init(arrivals=8 * self.cluster)
                if cutlass.const_expr(self.reads):
                    for i in cutlass.range_constexpr(4):
                        cute.arch.mbarrier_init(arrived + i, 1)
            cute.arch.mbarrier_init_fence()
        self._sync_cluster()

        if warp < 4:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
            if warp == 0:
                self._load(ring, a_atom, a_tensor, a_stages, b_atom, b_tensor, b_stages, offsets,
                           cluster, clusters, rank)  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(MATH_REGISTERS)
            self._math(ring, a_stages, b_stages, buffers, store_atoms, stores, read_atom, read, arrived,
                       offsets, weight, partial, cluster, clusters, rank)  # fmt: skip
        self._sync_cluster()  # a CTA stays until its neighbour has sent and signalled all that it will

    @cute.jit
    def _sync_cluster(self) -> None:
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    # the producer

    @cute.jit
    def _load(  # type: ignore[no-untyped-def]
        self, ring, a_atom, a_tensor, a_stages, b_atom, b_tensor, b_stages, offsets, cluster, clusters, rank
    ):
        ga = cute.local_tile(a_tensor, (ROW_TILE, SLICE), (None, None))
        gb = cute.local_tile(b_tensor, (self.half_n, SLICE), (None, None, None, None))
        one = cute.make_layout(1)
        sa, ga = cpasync.tma_partition(
            a_atom, 0, one, cute.group_modes(a_stages, 0, 2), cute.group_modes(ga, 0, 2)
        )
        halves = cute.make_tensor(
            b_stages.iterator,
            cute.composition(
                b_stages.layout, cute.make_layout((self.config.tile_n, SLICE, self.config.stages))
            ),
        )
        halves = cute.flat_divide(halves, (self.half_n, SLICE))[None, None, None, 0, None]
        sb, gb = cpasync.tma_partition(
            b_atom, 0, one, cute.group_modes(halves, 0, 2), cute.group_modes(gb, 0, 2)
        )
        stage, phase = Int32(0), Int32(1)
        if cutlass.const_expr(self.problem.ragged == "rows"):
            tile, expert, first = cluster, Int32(0), Int32(0)
            expert, first = self.tiles.seek(offsets, tile, expert, first)
            while expert < self.problem.experts:
                row, column, _ = self.tiles.place(offsets, tile - first, expert, rank)
                stage, phase = self._load_tile(
                    ring, a_atom, sa, ga, b_atom, sb, gb, row, column, expert,
                    Int32(0), Int32(self.slices), rank, stage, phase)  # fmt: skip
                tile += clusters
                expert, first = self.tiles.seek(offsets, tile, expert, first)
        else:
            tile = cluster
            while tile < self.tiles.total:
                row, column, expert = self.tiles.place(tile, rank)
                begin, end = offsets[expert] // SLICE, offsets[expert + 1] // SLICE
                stage, phase = self._load_tile(
                    ring, a_atom, sa, ga, b_atom, sb, gb, row, column, Int32(0),
                    begin, end, rank, stage, phase)  # fmt: skip
                tile += clusters

    @cute.jit
    def _load_tile(  # type: ignore[no-untyped-def]
        self, ring, a_atom, sa, ga, b_atom, sb, gb, row, column, expert, begin, end, rank, stage, phase
    ):
        bytes_of_stage = (ROW_TILE + self.config.tile_n) * SLICE * 2
        for k in cutlass.range(begin, end, unroll=1):
            cute.arch.mbarrier_wait(ring.empty + stage, phase)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, bytes_of_stage)
            cute.copy(a_atom, ga[None, row, k], sa[None, stage], tma_bar_ptr=ring.full + stage)
            if cutlass.const_expr(self.cluster == 2):
                self._load_half(ring, b_atom, sb, gb, column, expert, k, stage, rank)
            else:
                for half in cutlass.range_constexpr(2):
                    self._load_half(ring, b_atom, sb, gb, column, expert, k, stage, half)
            stage, phase = ring.after(stage, phase)
        return stage, phase

    @cute.jit
    def _load_half(self, ring, b_atom, sb, gb, column, expert, k, stage, half):  # type: ignore[no-untyped-def]
        """Half of a column tile: its gate or up columns, or its left or right ones."""
        if cutlass.const_expr(self.paired):
            box = gb[None, column, k, half, expert]
        else:
            box = gb[None, 2 * column + half, k, 0, expert]
        mask = cutlass.Int16(3) if cutlass.const_expr(self.cluster == 2) else None
        cute.copy(b_atom, box, sb[None, half, stage], tma_bar_ptr=ring.full + stage, mcast_mask=mask)

    # the consumers

    @cute.jit
    def _math(  # type: ignore[no-untyped-def]
        self, ring, a_stages, b_stages, buffers, store_atoms, stores, read_atom, read, arrived,
        offsets, weight, partial, cluster, clusters, rank,
    ):  # fmt: skip
        thread = cute.arch.thread_idx()[0] % GROUP
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // GROUP) - 1
        mma = self._mma(self.config.tile_n)
        rows = cute.flat_divide(a_stages, (64, SLICE))[None, None, group, 0, None]
        part = mma.get_slice(thread)
        fa = mma.make_fragment_A(part.partition_A(rows))
        fb = mma.make_fragment_B(part.partition_B(b_stages))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((64, self.config.tile_n)), Float32)
        epilogue = Epilogue(self, buffers, store_atoms, stores, read_atom, read, arrived, thread, group)
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(self.problem.ragged == "rows"):
            tile, expert, first = cluster, Int32(0), Int32(0)
            expert, first = self.tiles.seek(offsets, tile, expert, first)
            while expert < self.problem.experts:
                row, column, exists = self.tiles.place(offsets, tile - first, expert, rank)
                if cutlass.const_expr(self.reads):
                    if exists:
                        epilogue.prefetch(2 * row + group, column)
                stage, phase = self._multiply(ring, mma, fa, fb, acc, Int32(self.slices), stage, phase)
                if exists:
                    turn = epilogue.rows(acc, 2 * row + group, column, weight, partial, turn)
                tile += clusters
                expert, first = self.tiles.seek(offsets, tile, expert, first)
        else:
            tile = cluster
            while tile < self.tiles.total:
                row, column, expert = self.tiles.place(tile, rank)
                slices = (offsets[expert + 1] - offsets[expert]) // SLICE
                if slices > 0:
                    stage, phase = self._multiply(ring, mma, fa, fb, acc, slices, stage, phase)
                    epilogue.add(acc, 2 * row + group, column, expert)
                tile += clusters
        epilogue.finish()

    @cute.jit
    def _multiply(self, ring, mma, fa, fb, acc, slices, stage, phase):  # type: ignore[no-untyped-def]
        """acc = A·Bᵀ over `slices` stages, one slice of wgmma in flight while the next is issued."""
        lane = cute.arch.lane_idx()
        acc.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        done = Int32(-1)  # the stage that the wgmma in flight reads
        warpgroup.fence()
        for _ in cutlass.range(slices, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            for k in cutlass.range_constexpr(SLICE // 16):
                cute.gemm(mma, acc, fa[None, None, k, stage], fb[None, None, k, stage], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if done >= 0 and lane < self.cluster:
                cute.arch.mbarrier_arrive(ring.empty + done, lane)
            done = stage
            stage, phase = ring.after(stage, phase)
        warpgroup.wait_group(0)
        if lane < self.cluster:
            cute.arch.mbarrier_arrive(ring.empty + done, lane)
        return stage, phase

    @cute.kernel
    def sum_partials(self, partial: cute.Tensor, offsets: cute.Tensor, ds: cute.Tensor):  # type: ignore[no-untyped-def]
        """ds[r] = Σ over column tiles, in their order, of partial[tile, r]."""
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        row = block * 256 + thread
        if row < offsets[self.problem.experts]:
            total = Float32(0.0)
            for column in cutlass.range_constexpr(self.columns):
                total += partial[column, row]
            ds[row] = total


class Epilogue(Fixed):
    """From a warpgroup's accumulators to memory, in pieces of 64 rows × 128 bytes through its own buffers.

    Accumulators of thread t, piece p: value 32p' + 4j + 2i + c is row 16·(t/32) + (t%32)/4 + 8i, column
    8j + 2·(t%4) + c of the piece (wgmma's D fragment); a piece of FP32 is half as wide.
    """

    def __init__(self, gemm, buffers, store_atoms, stores, read_atom, read, arrived, thread, group):  # type: ignore[no-untyped-def]
        self.gemm, self.thread, self.group = gemm, thread, group
        self.store_atoms, self.read_atom = store_atoms, read_atom
        self.warp = cute.arch.make_warp_uniform(thread // 32)
        self.arrived = arrived
        mine = cute.flat_divide(buffers, (64, gemm.piece, gemm.buffers))[None, None, None, 0, 0, group]
        self.fragment = gemm._mma(gemm.piece).get_slice(thread).partition_C(mine)
        one = cute.make_layout(1)
        flat = cute.group_modes(mine, 0, 2)

        def pieces(tensor):  # type: ignore[no-untyped-def]
            return cute.group_modes(
                cute.local_tile(tensor, (64, gemm.piece), (None,) * cute.rank(tensor)), 0, 2
            )

        parts = [
            cpasync.tma_partition(a, 0, one, flat, pieces(t))
            for a, t in zip(store_atoms, stores, strict=True)
        ]
        self.sources = [source for source, _ in parts]
        self.targets = [target for _, target in parts]
        if read is not None:
            self.landing, self.origin = cpasync.tma_partition(read_atom, 0, one, flat, pieces(read))

    @cute.jit
    def _barrier(self) -> None:
        """The four warps of this warpgroup."""
        cute.arch.barrier(barrier_id=1 + self.group, number_of_threads=GROUP)

    @cute.jit
    def _put(self, values, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        """Stores one piece from registers. At most one earlier store may still be reading the other buffer."""
        if self.warp == 0:
            cute.arch.cp_async_bulk_wait_group(1, read=True)
        self._barrier()
        self._write(values, buffer)
        self._send(buffer, result, at)

    @cute.jit
    def _write(self, values, buffer: cutlass.Constexpr) -> None:  # type: ignore[no-untyped-def]
        target = self.fragment[None, None, None, buffer]
        converted = cute.make_rmem_tensor(target.shape, self.gemm.out_type)
        converted.store(values.load().to(self.gemm.out_type))
        cute.autovec_copy(converted, target)

    @cute.jit
    def _send(self, buffer: cutlass.Constexpr, result: cutlass.Constexpr, at) -> None:  # type: ignore[no-untyped-def]
        cute.arch.fence_proxy("async.shared", space="cta")
        self._barrier()
        if self.warp == 0:
            cute.copy(
                self.store_atoms[result],
                self.sources[result][None, buffer],
                self.targets[result][(None, *at)],
            )
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish(self) -> None:
        if self.warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    def _piece(self, acc, index: int):  # type: ignore[no-untyped-def]
        """Registers of piece `index` in the shape of a buffer's fragment."""
        shape = self.fragment[None, None, None, 0].shape
        size = cute.size(shape)
        flat = cute.make_tensor(acc.iterator + index * size, cute.make_layout(shape))
        return flat

    @cute.jit
    def add(self, acc, row: Int32, column: Int32, expert: Int32) -> None:  # type: ignore[no-untyped-def]
        pieces = self.gemm.config.tile_n // self.gemm.piece
        for p in cutlass.range_constexpr(pieces):
            self._put(self._piece(acc, p), p % 2, 0, (row, column * pieces + p, expert))

    @cute.jit
    def rows(self, acc, row: Int32, column: Int32, weight, partial, turn: Int32):  # type: ignore[no-untyped-def]
        """A row tile's epilogue; returns the turn of the read barriers' phases."""
        kind = self.gemm.problem.epilogue
        if cutlass.const_expr(kind == "store"):
            pieces = self.gemm.config.tile_n // self.gemm.piece
            for p in cutlass.range_constexpr(pieces):
                self._put(self._piece(acc, p), p % 2, 0, (row, column * pieces + p))
        elif cutlass.const_expr(kind == "swiglu"):
            self._swiglu(acc, row, column, weight)
        else:
            turn = self._dswiglu(acc, row, column, weight, partial, turn)
        return turn

    def _weights(self, weight, row):  # type: ignore[no-untyped-def]
        """The router weights of this thread's two rows: r and r + 8."""
        if weight is None:
            return Float32(1.0), Float32(1.0)
        r = row * 64 + self.warp * 16 + (self.thread % 32) // 4
        return weight[r], weight[r + 8]

    @cute.jit
    def _swiglu(self, acc, row: Int32, column: Int32, weight) -> None:  # type: ignore[no-untyped-def]
        """h = [gate | up] and a = weight · silu(gate) · up, of h as it is stored, so that recomputing a gives it again."""
        half = self.gemm.half_n // self.gemm.piece
        weights = self._weights(weight, row)
        for p in cutlass.range_constexpr(half):
            at = column * half + p
            gate, up = self._piece(acc, p), self._piece(acc, half + p)
            gate.store(gate.load().to(BFloat16).to(Float32))
            up.store(up.load().to(BFloat16).to(Float32))
            self._put(gate, (3 * p) % 2, 0, (row, at, 0))
            self._put(up, (3 * p + 1) % 2, 0, (row, at, 1))
            for i in cutlass.range_constexpr(cute.size(gate)):
                gate[i] = activation.swiglu(gate[i], up[i], weights[i // 2 % 2])
            self._put(gate, (3 * p + 2) % 2, 1, (row, at))

    @cute.jit
    def prefetch(self, row: Int32, column: Int32) -> None:
        """Starts reading h for the tile's first two pieces; they arrive during the main loop."""
        pieces = self.gemm.config.tile_n // self.gemm.piece
        if self.warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            for p in cutlass.range_constexpr(2):
                self._fetch(p, row, column * pieces + p)

    @cute.jit
    def _fetch(self, slot: cutlass.Constexpr, row: Int32, at: Int32) -> None:
        """Gate and up of one piece into buffers 2·slot and 2·slot + 1."""
        barrier = self.arrived + 2 * self.group + slot
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, 2 * 64 * PIECE_BYTES)
        for half in cutlass.range_constexpr(2):
            cute.copy(self.read_atom, self.origin[None, row, at, half],
                      self.landing[None, 2 * slot + half], tma_bar_ptr=barrier)  # fmt: skip

    @cute.jit
    def _dswiglu(self, acc, row: Int32, column: Int32, weight, partial, turn: Int32):  # type: ignore[no-untyped-def]
        """dh = [d gate | d up] in place of h in the buffers, and this tile's part of d weight."""
        pieces = self.gemm.config.tile_n // self.gemm.piece
        weights = self._weights(weight, row)
        sums = [Float32(0.0), Float32(0.0)]
        for p in cutlass.range_constexpr(pieces):
            slot = p % 2
            at = column * pieces + p
            grad = self._piece(acc, p)
            cute.arch.mbarrier_wait(self.arrived + 2 * self.group + slot, turn)
            gate = cute.make_rmem_tensor(grad.shape, BFloat16)
            up = cute.make_rmem_tensor(grad.shape, BFloat16)
            cute.autovec_copy(self.fragment[None, None, None, 2 * slot], gate)
            cute.autovec_copy(self.fragment[None, None, None, 2 * slot + 1], up)
            for i in cutlass.range_constexpr(cute.size(grad)):
                dg, du, dw = activation.swiglu_backward(
                    grad[i], gate[i].to(Float32), up[i].to(Float32), weights[i // 2 % 2]
                )
                gate[i], up[i] = dg.to(BFloat16), du.to(BFloat16)
                sums[i // 2 % 2] += dw
            cute.autovec_copy(gate, self.fragment[None, None, None, 2 * slot])
            cute.autovec_copy(up, self.fragment[None, None, None, 2 * slot + 1])
            self._send(2 * slot, 0, (row, at, 0))
            self._send(2 * slot + 1, 0, (row, at, 1))
            if cutlass.const_expr(p + 2 < pieces):
                if self.warp == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                    self._fetch(slot, row, at + 2)
            if cutlass.const_expr(slot == 1):
                turn ^= 1
        self._partial(sums, row, column, partial)
        return turn

    @cute.jit
    def _partial(self, sums, row: Int32, column: Int32, partial) -> None:  # type: ignore[no-untyped-def]
        """Sums over the four threads that share a row, in a fixed order, into partial[column tile, row]."""
        for i in cutlass.range_constexpr(2):
            total = sums[i]
            total += cute.arch.shuffle_sync_bfly(total, 1)
            total += cute.arch.shuffle_sync_bfly(total, 2)
            if self.thread % 4 == 0:
                partial[column, row * 64 + self.warp * 16 + (self.thread % 32) // 4 + 8 * i] = total


def _view(tensor: cute.Tensor, modes: Modes) -> cute.Tensor:
    """The tensor with other modes, each (extent, stride) in elements; ROWS stands for its dynamic first extent."""
    shape = tuple(tensor.shape[0] if extent == ROWS else extent for extent, _ in modes)
    return cute.make_tensor(tensor.iterator, cute.make_layout(shape, stride=tuple(s for _, s in modes)))
