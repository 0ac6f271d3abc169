"""Rows to other GPUs: bulk copies into a ring of shared memory and out of it, straight to where each row belongs.

Every warp works alone: unit u (a stage full of consecutive rows) goes to warp u mod warps of the launch, which runs

    lane 0         wait until the stores of unit i − behind have read their stage; load unit i − behind + stages into it
                        global ── cp.async.bulk ──▶ stage, full[stage] counts the bytes
    all lanes      wait full[stage]; lane l: destination l of the unit: one bulk store a part, origin and value by st
                        stage ── cp.async.bulk ──▶ peer;  commit_group

so stages − behind units are being loaded and `behind` stored at any time, and few blocks fill the link. At the end
every lane waits for its stores (wait_group 0), and the last block raises `full` (rdep_link.py).

Padding of this rank's own segments, of which it knows the place, is zeroed here: nobody sends it.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.rdep_link import Kernel, Link, Named

BUFFERS = {"rows": ("data", "scale"), "returns": ("returned",)}
VALUES = {"rows": "value", "returns": "returned value"}


def bulk(source: cute.Pointer, target: cute.Pointer, size: int, barrier: cute.Pointer | None = None) -> None:
    """One bulk copy of `size` bytes: from global to shared memory with a barrier, else back."""
    operation = cpasync.CopyBulkS2GOp() if barrier is None else cpasync.CopyBulkG2SOp()
    atom = cute.make_copy_atom(operation, Uint8, num_bits_per_copy=8 * size)
    layout = cute.make_layout((size,))
    extra = {} if barrier is None else {"mbar_ptr": barrier}
    cute.copy(atom, cute.make_tensor(source, layout), cute.make_tensor(target, layout), **extra)


class Stages(Fixed):
    """A warp's ring: stages of `rows` rows, part after part, and a barrier each."""

    def __init__(self, move, sources, memory: cute.Pointer, full: cute.Pointer) -> None:  # type: ignore[no-untyped-def]
        self.parts, self.rows, self.stages = move.problem.parts, move.config.rows, move.config.stages
        self.sources, self.memory, self.full = sources, memory, full
        self.bytes = self.rows * sum(self.parts)

    def part(self, stage: Int32, index: int) -> cute.Pointer:
        return self.memory + (stage * self.bytes + self.rows * sum(self.parts[:index]))

    @cute.jit
    def load(self, stage: Int32, unit: Int32) -> None:
        """By one lane."""
        full = self.full + stage
        cute.arch.mbarrier_arrive_and_expect_tx(full, self.bytes)
        for i, size in enumerate(self.parts):
            source = self.sources[i].iterator + Int64(unit) * (self.rows * size)
            bulk(source.align(16), self.part(stage, i), self.rows * size, full)


class Move(Kernel):
    @cute.kernel
    def kernel(self, operands):  # type: ignore[no-untyped-def]
        problem, config, named = self.problem, self.config, Named(operands)
        link, places, offsets = self.link(named), named["places"], named["offsets"]
        thread, block = Int32(cute.arch.thread_idx()[0]), Int32(cute.arch.block_idx()[0])
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        worker, workers = block * config.warps + warp, Int32(cute.arch.grid_dim()[0]) * config.warps
        epoch = link.epoch(problem.channel) + 1

        smem = SmemAllocator()
        size = config.stages * config.rows * sum(problem.parts)
        memory = smem.allocate_tensor(Uint8, cute.make_layout(config.warps * size), 128).iterator
        barriers = smem.allocate_array(Int64, config.warps * config.stages)
        sources = [named[f"rows{i}"] for i in range(len(problem.parts))]
        stages = Stages(self, sources, memory + warp * size, barriers + warp * config.stages)
        if lane < config.stages:
            cute.arch.mbarrier_init(stages.full + lane, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        units = offsets[problem.local] // config.rows
        if cutlass.const_expr(problem.channel == "rows"):
            units = sources[0].shape[0]
            link.wait("rows.free", epoch - 1)
        if link.overflowed():
            units = Int32(0)
        mine = cutlass.max((units - worker + workers - 1) // workers, 0)
        ahead = config.stages - config.behind
        if lane == 0:
            for i in cutlass.range(cutlass.min(mine, ahead)):
                stages.load(i, worker + i * workers)
        if cutlass.const_expr(problem.channel == "rows"):
            if mine >= 0 and not link.overflowed():
                self._pad(link, named, worker, workers, lane)

        fan = config.rows * problem.fan  # destinations of a unit
        numbers = cute.make_tensor(places.iterator, cute.make_layout(cute.size(places)))
        place = Int32(-1)
        if lane < fan and mine > 0:
            place = numbers[worker * fan + lane]
        for i in cutlass.range(mine):
            unit, stage = worker + i * workers, i % config.stages
            following = Int32(-1)
            if lane < fan and i + 1 < mine:
                following = numbers[(unit + workers) * fan + lane]
            cute.arch.mbarrier_wait(stages.full + stage, i // config.stages % 2)
            if place >= 0:
                self._store(link, named, stages, stage, unit * fan + lane, lane, place)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(config.behind, read=True)
            cute.arch.sync_warp()
            if lane == 0 and i + ahead < mine:
                stages.load((i + ahead) % config.stages, worker + (i + ahead) * workers)
            place = following
        cute.arch.cp_async_bulk_wait_group(0)
        cute.arch.fence_proxy("async.global")
        if link.last(smem):
            link.finish(problem.channel, epoch)

    @cute.jit
    def _store(
        self, link: Link, named: Named, stages: Stages, stage: Int32, number: Int32, lane: Int32, place: Int32
    ) -> None:  # type: ignore[no-untyped-def]
        """Destination `number` of the launch: its row and what describes it."""
        problem = self.problem
        count = named["capacity"] if cutlass.const_expr(problem.channel == "rows") else named["choices"]
        peer, row = place // count, place % count
        for i, size in enumerate(problem.parts):
            source = stages.part(stage, i) + lane // problem.fan * size
            target = link.at(peer, BUFFERS[problem.channel][i], Uint8, 16) + Int64(row) * size
            bulk(source.align(16), target.align(16), size)
        if cutlass.const_expr(problem.describes):
            values = named["values"]
            value = cute.make_tensor(values.iterator, cute.make_layout(cute.size(values)))[number]
            cute.arch.store(link.at(peer, VALUES[problem.channel], Float32) + row, value)
            if cutlass.const_expr(problem.channel == "rows"):
                origin = link.rank * named["choices"] + number
                cute.arch.store(link.at(peer, "origin", Int32) + row, origin)

    @cute.jit
    def _pad(self, link: Link, named: Named, worker: Int32, workers: Int32, lane: Int32) -> None:  # type: ignore[no-untyped-def]
        """Zeroes the padding of this rank's segments, a warp an expert."""
        problem, offsets, ends = self.problem, named["offsets"], named["ends"]
        for expert in cutlass.range(worker, problem.local, workers):
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
