"""The plan on the device: how many choices fall on each expert, and the slot of each.

A choice's slot is: its expert's segment, the rows of lower ranks, of the rank's earlier tiles, of the tile's earlier
warps, chunks and lanes. Each of these counts is a sum over what comes before in one fixed order; nothing is counted in
the order of arrival.

count   a block a tile of 1024 choices; a warp 4 chunks of 32 in turn, equal lanes found by match.any
          table[warp, expert] ─ bar.sync ─ sums over warps ─ tiles[tile, expert], slots[choice] (place in the tile)
        the last block: sums over tiles, the rank's counts to all of its host, counts.full (to others: rdep_rail.py)
place   waits for counts.full; every block computes the segments for itself, then the slots of its tile, and where its
        choices are among the rank's own in the order of experts
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.rdep import OVERFLOW, STATE, THREADS, TILE, UNIT
from nmoe.codegen.templates.layouts import flat
from nmoe.codegen.templates.rdep_link import Kernel

WARPS = THREADS // 32
CHUNKS = TILE // THREADS  # of 32 choices, a warp's part of a tile
FULL = 0xFFFFFFFF


class Tiled(Kernel):
    def blocks(self, named, clusters):  # type: ignore[no-untyped-def]
        return named["tiles"].shape[0]


class Count(Tiled):
    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        experts, gpus = self.problem.experts, self.problem.gpus
        link = self.link(named)
        indices, slots, tiles = flat(named["indices"]), flat(named["slots"]), named["tiles"]
        count = cute.size(indices)
        thread, tile = Int32(cute.arch.thread_idx()[0]), Int32(cute.arch.block_idx()[0])
        warp, lane = thread // 32, thread % 32
        smem = SmemAllocator()
        # One expert more than there are: what lanes past the last choice count.
        table = smem.allocate_tensor(
            Int32, cute.make_layout((WARPS, experts + 1), stride=(experts + 1, 1)), 16
        )
        for i in cutlass.range(thread, cute.size(table), THREADS):
            table[i // (experts + 1), i % (experts + 1)] = Int32(0)
        cute.arch.sync_threads()

        first = tile * TILE + warp * (TILE // WARPS) + lane
        chosen = cute.make_rmem_tensor(CHUNKS, Int32)
        before = cute.make_rmem_tensor(CHUNKS, Int32)
        for chunk in cutlass.range_constexpr(CHUNKS):
            expert = Int32(experts)
            if first + chunk * 32 < count:
                expert = indices[first + chunk * 32]
            equal = cute.arch.match_sync(FULL, expert)
            earlier = Int32(cute.arch.popc(equal & ((Uint32(1) << Uint32(lane)) - 1)))
            so_far = table[warp, expert]
            cute.arch.sync_warp()
            if earlier == 0:
                table[warp, expert] = so_far + Int32(cute.arch.popc(equal))
            cute.arch.sync_warp()
            chosen[chunk], before[chunk] = expert, so_far + earlier
        cute.arch.sync_threads()
        for expert in cutlass.range(thread, experts, THREADS):
            total = Int32(0)
            for other in cutlass.range_constexpr(WARPS):
                found = table[other, expert]
                table[other, expert] = total
                total += found
            tiles[tile, expert] = total
        cute.arch.sync_threads()
        for chunk in cutlass.range_constexpr(CHUNKS):
            if first + chunk * 32 < count:
                slots[first + chunk * 32] = table[warp, chosen[chunk]] + before[chunk]

        epoch = link.epoch("counts") + 1  # read before the last block writes it
        if link.last(smem):
            for expert in cutlass.range(thread, experts, THREADS):
                total = Int32(0)
                for other in cutlass.range(tiles.shape[0], unroll=8):
                    found = tiles[other, expert]
                    tiles[other, expert] = total
                    total += found
                for peer in cutlass.range_constexpr(gpus):
                    counts = link.at(link.first() + peer, "counts", Int32)
                    cute.arch.store(counts + (link.rank * experts + expert), total)
            cute.arch.sync_threads()
            link.finish("counts", epoch)


class Place(Tiled):
    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        problem = self.problem
        experts, ranks, align = problem.experts, problem.ranks, problem.align
        local = experts // ranks
        link, capacity = self.link(named), named["capacity"]
        indices, slots, tiles = flat(named["indices"]), flat(named["slots"]), named["tiles"]
        offsets, ends, order = named["offsets"], named["ends"], flat(named["order"])
        thread, tile = Int32(cute.arch.thread_idx()[0]), Int32(cute.arch.block_idx()[0])
        link.wait("counts.full", link.epoch("counts"), "all")

        smem = SmemAllocator()
        rows = smem.allocate_tensor(Int32, cute.make_layout(experts), 16)  # of an expert
        first = smem.allocate_tensor(Int32, cute.make_layout(experts), 16)  # slot of this rank's first row
        mine = smem.allocate_tensor(
            Int32, cute.make_layout(experts), 16
        )  # this rank's rows; then those before
        sent = smem.allocate_tensor(Int32, cute.make_layout(ranks), 4)  # this rank's rows to an owner
        full = smem.allocate_tensor(Int32, cute.make_layout(ranks), 4)  # whether a rank's rows do not fit
        counts = link.own("counts", Int32, ranks * experts)
        for expert in cutlass.range(thread, experts, THREADS):
            total, lower = Int32(0), Int32(0)
            for source in cutlass.range(ranks, unroll=8):
                if source == link.rank:
                    lower = total
                total += counts[source * experts + expert]
            rows[expert], first[expert] = total, lower
            mine[expert] = counts[link.rank * experts + expert]
        cute.arch.sync_threads()

        if thread < ranks:  # of this owner: the segments
            slot, before = Int32(0), Int32(0)
            for i in cutlass.range(local):
                expert = thread * local + i
                first[expert] = first[expert] + slot
                own = mine[expert]
                mine[expert] = before
                before += own
                if thread == link.rank and tile == 0:
                    offsets[i] = slot
                    ends[i] = slot + rows[expert]
                slot += (rows[expert] + align - 1) // align * align
            if thread == link.rank and tile == 0:
                offsets[local] = slot
            sent[thread] = before
            full[thread] = Int32(slot > capacity)
            if slot > capacity and tile == 0:
                link.report(OVERFLOW, thread, 0, Int64(slot), Int64(capacity))
        cute.arch.sync_threads()
        for expert in cutlass.range(thread, experts, THREADS):
            before = Int32(0)
            for owner in cutlass.range(expert // local):
                before += sent[owner]
            mine[expert] = mine[expert] + before
        cute.arch.sync_threads()
        overflow = Int32(0)
        for owner in cutlass.range(ranks, unroll=8):
            overflow |= full[owner]
        if overflow != 0 and tile == 0:  # nothing is sent, and no kernel finds rows to work on
            if thread == 0:
                link.state[STATE.index("overflow")] = Int64(1)
            for i in cutlass.range(thread, local + 1, THREADS):
                offsets[i] = Int32(0)
            for i in cutlass.range(thread, local, THREADS):
                ends[i] = Int32(0)

        if cutlass.const_expr(problem.hosts > 1):
            if tile == 0:
                self._bases(link, smem, counts, named["bases"], thread)
        for chunk in cutlass.range_constexpr(TILE // THREADS):
            i = tile * TILE + chunk * THREADS + thread
            if i < cute.size(indices):
                expert = indices[i]
                earlier = tiles[tile, expert] + slots[i]
                order[mine[expert] + earlier] = i
                slots[i] = expert // local * capacity + first[expert] + earlier

    @cute.jit
    def _bases(self, link, smem, counts, bases, thread: Int32) -> None:  # type: ignore[no-untyped-def]
        """Where this rank's returns land on each host after its own: behind those of the hosts before it, among the
        rows that the host sent along this rail, each host's from a multiple of UNIT on."""
        problem = self.problem
        hosts, gpus, experts = problem.hosts, problem.gpus, problem.experts
        local = experts // problem.ranks
        moved = smem.allocate_tensor(
            Int32, cute.make_layout((hosts, hosts)), 4
        )  # from one host to another's experts
        for pair in cutlass.range(thread, hosts * hosts, THREADS):
            to, here = pair // hosts, pair % hosts  # this rail's rank on host `to`, tokens of host `here`
            first, total = (to * gpus + link.rank % gpus) * local, Int32(0)
            for source in cutlass.range(here * gpus, (here + 1) * gpus):
                for expert in cutlass.range(first, first + local):
                    total += counts[source * experts + expert]
            moved[to, here] = (total + UNIT - 1) // UNIT * UNIT
        cute.arch.sync_threads()
        own = link.rank // gpus
        if thread < hosts - 1:
            here, base = (own + 1 + thread) % hosts, Int32(0)
            for to in cutlass.range(own):
                if to != here:
                    base += moved[to, here]
            bases[thread] = base
