"""Rows to other GPUs: bulk copies into a ring of shared memory and out of it, straight to where each row belongs.

A unit is a stage full of consecutive rows. Every warp works alone on a ring of its own; lane s has stage s of it:

    lane of the stage   take a unit ─▶ load it when the stores of the unit before have read the stage
                          global ── cp.async.bulk ──▶ stage, full[stage] counts the bytes
    all lanes           wait full[stage]; lane l: destination l of the unit: one bulk store a part, a value by st
                          stage ── cp.async.bulk ──▶ peer;  commit_group;  wait_group.read behind

so stages − behind units are being loaded and `behind` stored at any time. The first units of a warp are given, the
others taken from a counter: where the link is full it serves some multiprocessors twice as fast as others, and equal
shares would leave it to the slow ones alone at the end. Which warp sends a row changes nothing of where it goes.

At the end every lane waits for its stores (wait_group 0), and the last block raises `full` (rdep_link.py). Padding of
this rank's own segments, of which it knows the place, is zeroed by one more warp of each block: nobody sends it. Then
that warp tells slots whose rows they hold, and the router weights, 32 choices at once in the order of their slots: a
packet of NVLink holds them all, where row by row each would be two of its own.

Across hosts a transfer is two launches: `near` rows to this host, while others are on their way; then what `landed`
from other hosts (rdep_rail.py). Of rows a unit is not read when its first goes nowhere, for then none does; of returns
`count` says where those of each host lie.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import flat
from nmoe.codegen.templates.rdep_link import Kernel, Link, Named

BUFFERS = {"rows": ("data", "scale"), "returns": ("returned",)}
ABREAST = 4  # packets of 32 choices of which a warp loads what it needs before it stores
VALUES = {"rows": "value", "returns": "returned value"}


def bulk(source: cute.Pointer, target: cute.Pointer, size: int, barrier: cute.Pointer | None = None) -> None:
    """One bulk copy of `size` bytes: from global to shared memory with a barrier, else back."""
    operation = cpasync.CopyBulkS2GOp() if barrier is None else cpasync.CopyBulkG2SOp()
    atom = cute.make_copy_atom(operation, Uint8, num_bits_per_copy=8 * size)
    layout = cute.make_layout((size,))
    extra = {} if barrier is None else {"mbar_ptr": barrier}
    cute.copy(atom, cute.make_tensor(source, layout), cute.make_tensor(target, layout), **extra)


class Units(Fixed):
    """Which rows a unit is. Of returns that have landed the units of each host follow each other, wherever its rows
    lie."""

    def __init__(self, problem, rows: int, named, smem: SmemAllocator) -> None:  # type: ignore[no-untyped-def]
        self.rows, self.counted, self.others = rows, problem.counted, problem.hosts - 1
        if self.counted:
            self.count = named["count"]
            self.ends = smem.allocate_tensor(Int32, cute.make_layout(self.others), 4)  # of a host's units

    @cute.jit
    def begin(self) -> Int32:
        """By all threads of a block: how many units have landed."""
        if cute.arch.thread_idx()[0] == 0:
            end = Int32(0)
            for host in cutlass.range(self.others):
                end += (self.count[host, 1] + self.rows - 1) // self.rows
                self.ends[host] = end
        cute.arch.sync_threads()
        return self.ends[self.others - 1]

    @cute.jit
    def row(self, unit: Int32):  # type: ignore[no-untyped-def]
        """The first row of a unit, and the first beyond the rows of its host."""
        if cutlass.const_expr(not self.counted):
            return unit * self.rows, (unit + 1) * self.rows
        host, earlier = Int32(0), Int32(0)
        for other in cutlass.range(self.others - 1):
            if unit >= self.ends[other]:
                host, earlier = other + 1, self.ends[other]
        first = self.count[host, 0]
        return first + (unit - earlier) * self.rows, first + self.count[host, 1]


class Stages(Fixed):
    """A warp's ring: stages of `rows` rows, part after part, and a barrier each."""

    def __init__(self, move, named, memory: cute.Pointer, full: cute.Pointer, units: Units) -> None:  # type: ignore[no-untyped-def]
        self.parts, self.rows, self.stages = move.problem.parts, move.config.rows, move.config.stages
        self.sources = [named[f"rows{i}"] for i in range(len(self.parts))]
        self.units, self.places = units, named["places"]
        self.skips = move.problem.of == "landed" and not units.counted
        self.memory, self.full = memory, full
        self.bytes = self.rows * sum(self.parts)

    def part(self, stage: Int32, index: int) -> cute.Pointer:
        return self.memory + (stage * self.bytes + self.rows * sum(self.parts[:index]))

    @cute.jit
    def load(self, stage: Int32, unit: Int32) -> None:
        """By the lane of the stage."""
        full, goes = self.full + stage, True
        row, _ = self.units.row(unit)
        if cutlass.const_expr(self.skips):
            goes = False
            for j in cutlass.range_constexpr(self.places.shape[1]):
                goes |= self.places[row, j] >= 0
        if goes:
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.bytes)
            for i, size in enumerate(self.parts):
                source = self.sources[i].iterator + Int64(row) * size
                bulk(source.align(16), self.part(stage, i), self.rows * size, full)
        else:
            cute.arch.mbarrier_arrive(full)


class Move(Kernel):
    def warps(self) -> int:
        return self.config.warps + (self.problem.channel == "rows" and self.problem.of != "landed")

    @cute.kernel
    def kernel(self, operands):  # type: ignore[no-untyped-def]
        problem, config, named = self.problem, self.config, Named(operands)
        link = self.link(named)
        warp = cute.arch.make_warp_uniform(Int32(cute.arch.thread_idx()[0]) // 32)
        epoch = link.epoch(problem.channel) + 1

        smem = SmemAllocator()
        size = config.stages * config.rows * sum(problem.parts)
        memory = smem.allocate_tensor(Uint8, cute.make_layout(config.warps * size), 128).iterator
        barriers = smem.allocate_array(Int64, config.warps * config.stages)
        counted = Units(problem, config.rows, named, smem)
        stages = Stages(self, named, memory + warp * size, barriers + warp * config.stages, counted)
        if Int32(cute.arch.thread_idx()[0]) < config.warps * config.stages:
            cute.arch.mbarrier_init(barriers + cute.arch.thread_idx()[0], 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        own = cutlass.const_expr(problem.of != "landed")
        units = named["places"].shape[0] // config.rows
        if cutlass.const_expr(own and problem.channel == "returns"):
            units = named["offsets"][problem.local] // config.rows
        if cutlass.const_expr(problem.counted):
            units = counted.begin()
        if cutlass.const_expr(own and problem.channel == "rows"):
            link.wait("rows.free", epoch - 1)
        if link.overflowed():
            units = Int32(0)
        if warp < config.warps:
            self._send(link, named, stages, units, warp)
        if cutlass.const_expr(own and problem.channel == "rows"):
            if warp == config.warps and not link.overflowed():
                self._pad(link, named)
                if cutlass.const_expr(problem.describes):
                    self._describe(link, named)
        if link.last(smem):
            if cutlass.const_expr(problem.of == "near"):
                link.advance(problem.channel, epoch - 1)  # what has landed is still to be sent
            else:
                link.finish(problem.channel, epoch)

    @cute.jit
    def _send(self, link: Link, named: Named, stages: Stages, units: Int32, warp: Int32) -> None:
        """Units of rows to their destinations, until none is left."""
        config = self.config
        lane, blocks = Int32(cute.arch.lane_idx()), Int32(cute.arch.grid_dim()[0])
        ahead = config.stages - config.behind
        given = blocks * config.warps * ahead
        held = (lane * config.warps + warp) * blocks + Int32(cute.arch.block_idx()[0])  # unit of stage `lane`
        if lane < ahead and held < units:
            stages.load(lane, held)
        unit, i = cute.arch.shuffle_sync(held, 0), Int32(0)
        place, value = self._destination(link, named, stages, unit, units, lane)
        while unit < units:
            following = cute.arch.shuffle_sync(held, (i + 1) % config.stages)
            next_place, next_value = self._destination(link, named, stages, following, units, lane)
            mine = lane == (i + ahead) % config.stages
            if mine:
                ticket = cute.arch.atomic_add(link.word("taken"), Int64(1), sem="relaxed", scope="gpu")
                held = given + Int32(ticket)
            cute.arch.mbarrier_wait(stages.full + i % config.stages, i // config.stages % 2)
            if place >= 0:
                self._store(link, named, stages, i % config.stages, unit, lane, place, value)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(config.behind, read=True)
            cute.arch.sync_warp()
            if mine and held < units:
                stages.load(lane, held)
            unit, place, value, i = following, next_place, next_value, i + 1
        cute.arch.cp_async_bulk_wait_group(0)
        cute.arch.fence_proxy("async.global")

    @cute.jit
    def _destination(self, link: Link, named: Named, stages: Stages, unit: Int32, units: Int32, lane: Int32):  # type: ignore[no-untyped-def]
        """A lane's destination of a unit, −1 for none, and the value that goes there."""
        fan = self.config.rows * self.problem.fan
        place, value = Int32(-1), Float32(0.0)
        if lane < fan and unit < units:
            row, end = stages.units.row(unit)
            at = row * self.problem.fan + lane
            if at < end * self.problem.fan:
                place = self._near(link, named, flat(named["places"])[at])
                if cutlass.const_expr(self.valued):
                    value = flat(named["values"])[at]
        return place, value

    @property
    def valued(self) -> bool:
        """Whether values go with the rows: of dispatched ones that their source sends they go by `_describe`."""
        problem = self.problem
        return problem.describes and (problem.channel == "returns" or problem.of == "landed")

    @cute.jit
    def _near(self, link: Link, named: Named, place: Int32) -> Int32:
        """A place, or −1 for one that this launch sends nothing to."""
        if cutlass.const_expr(self.problem.of == "near"):
            peer = place // self._places(named) - link.first()
            if peer < 0 or peer >= self.problem.gpus:
                place = Int32(-1)
        return place

    def _places(self, named: Named):  # type: ignore[no-untyped-def]
        """Of a rank."""
        return named["capacity" if self.problem.channel == "rows" else "choices"]

    @cute.jit
    def _store(
        self, link: Link, named: Named, stages: Stages, stage: Int32, unit: Int32, lane: Int32, place: Int32,
        value: Float32,
    ) -> None:  # fmt: skip
        """A unit's row to a lane's destination, with what describes it."""
        problem = self.problem
        count = self._places(named)
        peer, row = place // count, place % count
        for i, size in enumerate(problem.parts):
            source = stages.part(stage, i) + lane // problem.fan * size
            target = link.at(peer, BUFFERS[problem.channel][i], Uint8, 16) + Int64(row) * size
            bulk(source.align(16), target.align(16), size)
        if cutlass.const_expr(self.valued):
            cute.arch.store(link.at(peer, VALUES[problem.channel], Float32) + row, value)
            if cutlass.const_expr(problem.channel == "rows"):
                origin = named["origins"][unit, 0] + lane
                cute.arch.store(link.at(peer, "origin", Int32) + row, origin)

    @cute.jit
    def _describe(self, link: Link, named: Named) -> None:
        """Origins and values to all slots, by a warp of each block."""
        order, places, values = (flat(named[name]) for name in ("order", "places", "values"))
        lane, block = Int32(cute.arch.lane_idx()), Int32(cute.arch.block_idx()[0])
        count, step = Int32(cute.size(order)), 32 * ABREAST
        for first in cutlass.range(block * step, count, Int32(cute.arch.grid_dim()[0]) * step, unroll=1):
            found = []
            for i in cutlass.range_constexpr(ABREAST):
                at = first + 32 * i + lane
                choice = order[cutlass.min(at, count - 1)]
                place = self._near(link, named, places[choice])
                if at >= count:
                    place = Int32(-1)
                found.append((choice, place, values[choice]))
            for choice, place, value in found:
                if place >= 0:
                    peer, row = place // named["capacity"], place % named["capacity"]
                    cute.arch.store(link.at(peer, "value", Float32) + row, value)
                    origin = link.rank * named["choices"] + choice
                    cute.arch.store(link.at(peer, "origin", Int32) + row, origin)

    @cute.jit
    def _pad(self, link: Link, named: Named) -> None:
        """Zeroes the padding of this rank's segments, a warp an expert."""
        problem, offsets, ends = self.problem, named["offsets"], named["ends"]
        lane, block, blocks = cute.arch.lane_idx(), cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        for expert in cutlass.range(block, problem.local, blocks):
            for row in cutlass.range(ends[expert], offsets[expert + 1]):
                for i, size in enumerate(problem.parts):
                    start = link.at(link.rank, BUFFERS["rows"][i], Int32, 16) + Int64(row) * (size // 4)
                    words = cute.make_tensor(start.align(16), cute.make_layout((4, size // 16)))
                    zero = cute.make_rmem_tensor(4, Int32)
                    zero.fill(0)
                    for vector in cutlass.range(lane, size // 16, 32):
                        cute.autovec_copy(zero, words[None, vector])
                if cutlass.const_expr(problem.describes):
                    if lane == 0:
                        link.own("origin", Int32, named["capacity"])[row] = Int32(-1)
                        link.own("value", Float32, named["capacity"])[row] = Float32(0.0)
