"""Row kernels: a thread block reads a tile [rows, columns] once, computes, and writes every result.

A thread holds 8 columns (16 bytes) of `vectors` consecutive rows; a warp's `lanes` lie along the columns.

    lanes 8, vectors 8        ◀── 64 columns ──▶
    lane  0 …  7   rows  0…7    one tile of a warp: 32 rows, so that an MXFP8 block down the rows is 8 rows of
    lane  8 … 15   rows  8…15   each of 4 lanes, and one along a row the columns of 4 neighbouring lanes
    lane 16 … 23   rows 16…23
    lane 24 … 31   rows 24…31

    loads ─▶ registers ─▶ body ─▶ + addends ─▶ BF16 ─▶ stores
                                                └─▶ copies (rows_copy.py)

Bodies that need a sum over whole rows (norms) share their rows among a cluster, a thread block a tile of columns:

    loads ─▶ shared memory ─▶ terms ─▶ lanes ─▶ warps ─▶ totals in every block's shared memory ─▶ cluster's barrier
                  └────────────────────────────────────────────────────────────────────────────────▶ body ─▶ …

A thread copies its own pieces there (cp.async) and reads them twice: in registers the compiler would keep their FP32
values across the barrier, and spill. Where copies run down the rows, a thread block takes 128 rows of its columns in
turns, and then writes their scale factors: a byte of every turn would cost more than its data. Where shared memory has
room, the next turn's pieces are under way while one computes.

The weight gradient of a norm is summed without atomics: STRIPES clusters add up their rows in shared memory and store
partial[stripe, width], which a second kernel adds to dw in the order of the stripes.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import VECTOR
from nmoe.codegen.rows import RESERVED, STRIPES, RowConfig, RowProblem
from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.quantize import MXFP8_BLOCK
from nmoe.codegen.templates.rows_body import RowBody, Spot, line, vector
from nmoe.codegen.templates.rows_copy import copies
from nmoe.storage import ATOM_ROWS

CLEARING = 128  # threads that set the amaxes to zero
ROWS_OF = {"concat": "a", "embedding": "tokens", "dispatch": "row_source"}  # whose extent is the rows'
TOGETHER = 8  # tiles down the rows that run side by side: their scale factors of a column fill 32 bytes


class Rows(Fixed):
    target: str

    def __init__(self, problem: RowProblem, config: RowConfig) -> None:
        self.problem, self.config = problem, config
        self.chunks = problem.tiles(config)
        self.turns = problem.turns(config)
        self.buffers = problem.buffers(config, self.target)
        self.sums = problem.body == "rms_norm_bwd"
        if problem.columns and (problem.statistic or problem.two_passes):
            self.ptxas = "--register-usage-level=0"  # by default it spills to have more loads under way
        self.together = TOGETHER if problem.columns and not problem.statistic else 1
        # What the resident thread blocks need of shared memory, in per cent; the rest of it is cache.
        used = config.resident * (problem.shared_bytes(config, self.target) + RESERVED)
        self.carveout = min(100, -(-100 * used // HARDWARE[self.target].shared))

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of RowProblem.operands, the number of clusters, the stream."""
        *tensors, _, stream = args
        problem, config = self.problem, self.config
        named = {o.name: t for o, t in zip(problem.operands(config), tensors, strict=True)}
        # Scale factors are written up to whole atoms.
        rows = self._extent(named)
        padded = cute.ceil_div(rows, ATOM_ROWS) * ATOM_ROWS if problem.copies else rows
        size = config.rows * self.turns * self.together
        everything = cute.ceil_div(padded, size) * self.together * self.chunks
        tiles = STRIPES * self.chunks if self.sums else everything
        shape = [1, max(1, problem.batch)]
        how: dict[str, Any] = {
            "block": [config.threads, 1, 1], "min_blocks_per_mp": config.resident, "stream": stream,
            "preferred_smem_carveout": self.carveout,
        }  # fmt: skip
        if cutlass.const_expr(problem.statistic):
            how["cluster"] = [self.chunks, 1, 1]
        if cutlass.const_expr(problem.two_passes):
            for copy in problem.copies:
                self.clear(named[f"{copy.name}_amax"]).launch(
                    grid=[1, 1, 1], block=[CLEARING, 1, 1], stream=stream
                )
            self.rows(tensors, padded, True).launch(grid=[everything, *shape], **how)
        self.rows(tensors, padded, False).launch(grid=[tiles, *shape], **how)
        if cutlass.const_expr(self.sums):
            WeightGradient(problem.width).launch(named["partial"], named["dw"], stream)

    def _extent(self, named) -> Int32:  # type: ignore[no-untyped-def]
        """How many rows the operands have."""
        return named[ROWS_OF.get(self.problem.body, "x")].shape[1 if self.problem.batch else 0]

    @cute.kernel
    def clear(self, amax: cute.Tensor):  # type: ignore[no-untyped-def]
        for i in cutlass.range(cute.arch.thread_idx()[0], cute.size(amax), CLEARING, unroll=1):
            amax[i] = Float32(0.0)

    @cute.kernel
    def rows(self, tensors, padded: Int32, measures: cutlass.Constexpr):  # type: ignore[no-untyped-def]
        problem, config = self.problem, self.config
        named = {o.name: t for o, t in zip(problem.operands(config), tensors, strict=True)}
        block, _, entry = cute.arch.block_idx()
        together = self.together
        chunk = block // together % self.chunks
        tile = block // (together * self.chunks) * together + block % together
        if cutlass.const_expr(problem.batch > 0):
            named = {n: member(t, entry) if cute.rank(t) > 2 else t for n, t in named.items()}
        rows = self._rows(named)
        live = named["offsets"][problem.segments] if cutlass.const_expr(problem.segments > 0) else rows
        smem = SmemAllocator()
        work = Tile(self, named, smem, rows, live, entry, measures, chunk)
        work.join()
        tiles = cute.ceil_div(padded, config.rows * self.turns)
        if cutlass.const_expr(self.sums and not measures):
            work.clear()
            for i in cutlass.range(tile, tiles, STRIPES, unroll=1):
                work.run(i, i // STRIPES)
            work.flush(tile)
        elif tile < tiles:
            work.run(tile, Int32(0))

    def _rows(self, named) -> Int32:  # type: ignore[no-untyped-def]
        return named[ROWS_OF.get(self.problem.body, "x")].shape[0]


def member(tensor: cute.Tensor, entry: Int32) -> cute.Tensor:
    """Entry `entry` of a batch of static size."""
    step = tensor.stride[0]
    offset = cute.assume(Int64(entry) * step, divby=step)
    return cute.make_tensor(
        tensor.iterator + offset, cute.select(tensor.layout, list(range(1, cute.rank(tensor))))
    )


@cute.jit
def sum_of(parts: cute.Tensor, row: Int32, parity: Int32) -> Float32:
    """Of parts[row, :, parity], in their order."""
    total = Float32(0.0)
    for i in cutlass.range_constexpr(parts.shape[1]):
        total += parts[row, i, parity]
    return total


class Tile(Fixed):
    """A thread block's work on one tile of rows."""

    def __init__(
        self, kernel: Rows, named, smem: SmemAllocator, rows: Int32, live: Int32, entry: Int32, measures: bool,
        chunk: Int32,
    ) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        self.problem, self.config, self.chunks, self.measures = (
            kernel.problem,
            kernel.config,
            kernel.chunks,
            measures,
        )
        self.turns, self.buffers = kernel.turns, kernel.buffers
        self.converts = kernel.target == "sm_100a"  # to FP4, by an instruction
        self.entry, self.chunk, self.sums = entry, chunk, kernel.sums and not measures
        # A norm's second pass reads what the first has found of the rows.
        self.known = self.problem.body == "rms_norm" and self.problem.two_passes and not measures
        config = self.config
        self.named, self.exists, self.live = named, rows, live
        self.body = RowBody(self.problem, named)
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = thread // 32, thread % 32
        self.thread, self.lane = thread, lane
        self.warp_across = warp % config.warps_across
        self.row = (
            warp // config.warps_across * (32 // config.lanes) + lane // config.lanes
        ) * config.vectors
        self.column = (self.warp_across * config.lanes + lane % config.lanes) * VECTOR
        if self.problem.statistic:
            self.partial = self._shared(smem, config.rows, config.warps_across, 2)
            if self.chunks > 1:
                self.totals = self._shared(smem, config.rows, self.chunks, 2)
                self.statistic = self._shared(smem, config.rows)
                self.arrived = smem.allocate_array(Int64, 2)
            size = (VECTOR, config.threads, config.vectors, len(self.problem.held_names), self.buffers)
            whole = smem.allocate_tensor(BFloat16, cute.make_layout(size), 16)
            self.held = whole[None, thread, None, None, None]
        if self.sums:
            self.gradient = self._shared(smem, config.columns)
        self.copies = copies(self, smem)

    @staticmethod
    def _shared(smem: SmemAllocator, *shape: int) -> cute.Tensor:
        return smem.allocate_tensor(Float32, cute.make_layout(shape), 16)

    @cute.jit
    def run(self, number: Int32, before: Int32) -> None:
        """Tile `number`, in turns, after `before` others, STRIPES apart."""
        rows = self.config.rows
        if cutlass.const_expr(self.buffers > 1):
            self.fetch(number * self.turns * rows, before * self.turns % 2)
        for turn in cutlass.range(self.turns, unroll=1):
            first, step = (number * self.turns + turn) * rows, before * self.turns + turn
            if cutlass.const_expr(self.buffers > 1):
                if turn < self.turns - 1:
                    self.fetch(first + rows, (step + 1) % 2)
                else:
                    cute.arch.cp_async_commit_group()
            self.step(first, turn, step)

    def spot(self, first: Int32) -> Spot:
        column = self.chunk * self.config.columns + self.column
        return Spot(self.problem, self.config.vectors, first + self.row, column, self.live, self.exists)

    @cute.jit
    def fetch(self, first: Int32, buffer: Int32) -> None:
        """Begins to copy the rows from `first` on, one group of copies."""
        self.body.fetch(self.spot(first), self.held[None, None, None, buffer])
        cute.arch.cp_async_commit_group()

    @cute.jit
    def step(self, first: Int32, turn: Int32, step: Int32) -> None:
        """The rows of a turn, from `first` on; `step` counts these calls."""
        spot = self.spot(first)
        if cutlass.const_expr(self.problem.statistic):
            if cutlass.const_expr(self.buffers == 1):
                self.fetch(first, Int32(0))
            cute.arch.cp_async_wait_group(self.buffers - 1)
            held = self.held[None, None, None, step % self.buffers]
            found = self.body.load(spot, held)
            if cutlass.const_expr(self.known):
                statistics = [self.named["rstd"][row] for row in spot.source]
            else:
                statistics = self.statistics(found, first, step)
                if cutlass.const_expr(self.problem.two_passes):
                    found = self.body.load(spot, held)  # kept until now, rstd and w would need local memory
            self.finish(found, first, turn, statistics)
        else:
            self.finish(self.body.load(spot), first, turn, [None] * self.config.vectors)

    @cute.jit
    def statistics(self, found, first: Int32, step: Int32):  # type: ignore[no-untyped-def]
        """Of each of the thread's rows, from sums in a fixed order: over lanes, then warps, then thread blocks."""
        config, parity = self.config, step % 2
        if cutlass.const_expr(self.sums):
            self.collect(found)
        for i in cutlass.range_constexpr(config.vectors):
            total = self.body.term(found, i) if found.spot.inside else Float32(0.0)
            distance = 1
            while cutlass.const_expr(distance < config.lanes):
                total += cute.arch.shuffle_sync_bfly(total, distance)
                distance *= 2
            if self.lane % config.lanes == 0:
                self.partial[self.row + i, self.warp_across, parity] = total
        cute.arch.sync_threads()
        if cutlass.const_expr(self.chunks == 1):
            statistics = []
            for i in cutlass.range_constexpr(config.vectors):
                statistics.append(self.statistic_of(self.partial, self.row + i, parity))
                if self.column == 0:
                    self.keep(first + self.row + i, statistics[i])
            return statistics
        if self.thread < 32:
            self.share(parity)
            cute.arch.mbarrier_wait(self.arrived + parity, step // 2 % 2)
            if self.thread < config.rows:
                statistic = self.statistic_of(self.totals, self.thread, parity)
                self.statistic[self.thread] = statistic
                if self.chunk == 0:
                    self.keep(first + self.thread, statistic)
        cute.arch.sync_threads()
        return [self.statistic[self.row + i] for i in range(config.vectors)]

    @cute.jit
    def statistic_of(self, parts: cute.Tensor, row: Int32, parity: Int32) -> Float32:
        return self.body.statistic(sum_of(parts, row, parity), self.named.get("eps"))

    @cute.jit
    def keep(self, row: Int32, statistic: Float32) -> None:
        """Stores what a norm's backward reads of a row."""
        if cutlass.const_expr(self.problem.body == "rms_norm"):
            if row < self.exists:
                self.named["rstd"][row] = statistic

    @cute.jit
    def share(self, parity: Int32) -> None:
        """A warp sends the totals of the thread block's rows, one a lane, to all blocks of the cluster. It arrives at
        their barriers, too: what it had two steps ago it has read."""
        arrived, lane = self.arrived + parity, self.thread
        cute.arch.sync_warp()
        if lane == self.chunk:
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, 4 * self.config.rows * self.chunks)
        elif lane < self.chunks:
            cute.arch.mbarrier_arrive(arrived, lane)
        if lane < self.config.rows:
            total = sum_of(self.partial, lane, parity)
            place = self.totals.iterator + self.totals.layout((lane, self.chunk, parity))
            for block in cutlass.range_constexpr(self.chunks):
                there, barrier = (cute.arch.map_dsmem_ptr(p, block).toint() for p in (place, arrived))
                cute.arch.inline_ptx(
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [{$r0}], {$r1}, [{$r2}];",
                    read_only_args=[there, total, barrier],
                )

    @cute.jit
    def join(self) -> None:
        """Waits until all thread blocks of the cluster run: their shared memory and barriers are there."""
        if cutlass.const_expr(self.problem.statistic and self.chunks > 1):
            if self.thread < 2:
                cute.arch.mbarrier_init(self.arrived + self.thread, self.chunks)
            cute.arch.mbarrier_init_fence()
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

    @cute.jit
    def finish(self, found, first: Int32, turn: Int32, statistics) -> None:  # type: ignore[no-untyped-def]
        """Body, addends, stores and copies of what has been loaded."""
        problem, spot = self.problem, found.spot
        result = cute.make_rmem_tensor((VECTOR, self.config.vectors), BFloat16)
        for i in cutlass.range_constexpr(self.config.vectors):
            result[None, i].store(self.body.value(found, i, statistics[i]).to(BFloat16))
        if cutlass.const_expr(problem.keeps_body and not self.measures):
            self.keep_body(found, result)
        if cutlass.const_expr(problem.body == "split"):
            self.split(result, spot)
        if cutlass.const_expr(problem.body == "dispatch" and problem.weighted and not self.measures):
            self.weigh(found, first)
        for a in cutlass.range_constexpr(problem.addends):
            if cutlass.const_expr(not problem.statistic):
                found.row(f"addend{a}", self.named[f"addend{a}"])
            for i in cutlass.range_constexpr(self.config.vectors):
                total = result[None, i].load().to(Float32) + found.floats(f"addend{a}", i)
                result[None, i].store(total.to(BFloat16))
        if cutlass.const_expr(problem.keeps_sum and not self.measures):
            self.store(result, self.named["sum"], spot)
        if cutlass.const_expr(problem.copies):
            for i in cutlass.range_constexpr(self.config.vectors):
                if not spot.alive[i]:
                    result[None, i].fill(0.0)
            group = self.group(first)
            for copy in self.copies:
                if cutlass.const_expr(self.measures):
                    copy.measure(result, group)
                else:
                    copy.write(result, spot, first, turn, self.chunk, group, self.entry)

    @cute.jit
    def keep_body(self, found, result) -> None:  # type: ignore[no-untyped-def]
        """What dispatch moves in MXFP8 it stores as it came."""
        spot = found.spot
        if cutlass.const_expr(self.problem.source == "bf16"):
            self.store(result, self.named["y"], spot)
        else:
            self.store(found.rows["codes"], self.named["y"], spot)
            scale, block = self.named["y_scale"], spot.column // MXFP8_BLOCK
            for i in cutlass.range_constexpr(self.config.vectors):
                if spot.alive[i] & (spot.column % MXFP8_BLOCK == 0):
                    scale[spot.row + i, block] = found.scales[i].to(Uint8)

    @cute.jit
    def group(self, first: Int32) -> Int32:
        """Which amax the tile has: its batch entry's, or its segment's, which is that of all its rows."""
        group = self.entry
        if cutlass.const_expr(self.problem.segments > 0 and self.problem.two_passes):
            ended = Int32(0)
            for i in cutlass.range(self.lane, self.problem.segments, 32, unroll=1):
                if self.named["offsets"][i + 1] <= first:
                    ended += 1
            group = cutlass.min(cute.arch.warp_redux_sync(ended, "add"), self.problem.segments - 1)
        return group

    @cute.jit
    def store(self, values, tensor, spot) -> None:  # type: ignore[no-untyped-def]
        for i in cutlass.range_constexpr(self.config.vectors):
            if spot.alive[i]:
                cute.autovec_copy(values[None, i], line(tensor, spot, i))

    @cute.jit
    def weigh(self, found, first: Int32) -> None:  # type: ignore[no-untyped-def]
        """Dispatch: each row's router weight, 0 of padding."""
        if self.chunk == 0 and self.column == 0:
            for i in cutlass.range_constexpr(self.config.vectors):
                choice, weight = found.choices[i], Float32(0.0)
                if choice >= 0:
                    weight = self.named["weights"][choice // self.problem.topk, choice % self.problem.topk]
                if found.spot.alive[i]:
                    self.named["row_weight"][first + self.row + i] = weight

    @cute.jit
    def split(self, values, spot) -> None:  # type: ignore[no-untyped-def]
        at = self.problem.at
        for i in cutlass.range_constexpr(self.config.vectors):
            if spot.alive[i]:
                if spot.column < at:
                    cute.autovec_copy(values[None, i], line(self.named["a"], spot, i))
                else:
                    cute.autovec_copy(values[None, i], line(self.named["b"], spot, i, -at))

    @cute.jit
    def clear(self) -> None:
        for column in cutlass.range(self.thread, self.config.columns, self.config.threads, unroll=1):
            self.gradient[column] = Float32(0.0)
        cute.arch.sync_threads()

    @cute.jit
    def collect(self, found) -> None:  # type: ignore[no-untyped-def]
        """Adds the tile's part of the weight gradient; the first lanes of a warp own its columns."""
        config, spot = self.config, found.spot
        total = cute.make_rmem_tensor(VECTOR, Float32)
        total.fill(0.0)
        for i in cutlass.range_constexpr(config.vectors):
            if spot.alive[i]:
                total.store(total.load() + self.body.gradient(found, i))
        distance = config.lanes
        while cutlass.const_expr(distance < 32):
            for j in cutlass.range_constexpr(VECTOR):
                total[j] += cute.arch.shuffle_sync_bfly(total[j], distance)
            distance *= 2
        if (self.lane < config.lanes) & spot.inside:
            mine = vector(self.gradient, 0, self.column)
            mine.store(mine.load() + total.load())

    @cute.jit
    def flush(self, stripe: Int32) -> None:
        cute.arch.sync_threads()
        first = self.chunk * self.config.columns
        for column in cutlass.range(self.thread, self.config.columns, self.config.threads, unroll=1):
            if first + column < self.problem.width:
                self.named["partial"][stripe, first + column] = self.gradient[column]


class WeightGradient(Fixed):
    """dw[column] += Σ over stripes of partial[stripe, column]: a lane a column, a warp some stripes, in their order,
    then the warps' sums, in theirs. All loads of a thread are under way at once: one after the other takes 19 µs."""

    WARPS = 8

    def __init__(self, width: int) -> None:
        self.width = width

    @cute.jit
    def launch(self, partial: cute.Tensor, dw: cute.Tensor, stream) -> None:  # type: ignore[no-untyped-def]
        self.sum_stripes(partial, dw).launch(
            grid=[-(-self.width // 32), 1, 1], block=[32 * self.WARPS, 1, 1], stream=stream
        )

    @cute.kernel
    def sum_stripes(self, partial: cute.Tensor, dw: cute.Tensor):  # type: ignore[no-untyped-def]
        thread, share = cute.arch.thread_idx()[0], STRIPES // self.WARPS
        warp, lane = thread // 32, thread % 32
        sums = SmemAllocator().allocate_tensor(Float32, cute.make_layout((self.WARPS, 32)), 16)
        column = cute.arch.block_idx()[0] * 32 + lane
        terms = cute.make_rmem_tensor(share, Float32)
        terms.fill(0.0)
        if column < self.width:
            for i in cutlass.range_constexpr(share):
                terms[i] = partial[warp * share + i, column]
        total = Float32(0.0)
        for i in cutlass.range_constexpr(share):
            total += terms[i]
        sums[warp, lane] = total
        cute.arch.sync_threads()
        if (warp == 0) & (column < self.width):
            for i in cutlass.range_constexpr(1, self.WARPS):
                total += sums[i, lane]
            dw[column] += total


class Sm90Rows(Rows):
    target = "sm_90a"


class Sm100Rows(Rows):
    target = "sm_100a"
