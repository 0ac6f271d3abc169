"""Between hosts: this rank's counts, and rows to the GPU of its index on every other host.

Rows are gathered into chunks, one message a chunk for each part:

    block ─▶ (host, chunk of 32 rows)    lane r: does any place of row r lie there?  ballot ─▶ which rows go, and where
        rows that go, in their order ──▶ staged       their places and values, then places of −1 ──▶ staged
        fence.sys ─▶ bar.sync ─▶ put_signal of each: staged ──▶ the peer's landed, rails.full += 1

A signal comes after what its own put wrote, and says nothing of other puts: `rails.full` adds up messages, the first
chunk's last one so much that each transfer adds WHOLE, and all have arrived when it has reached so many epochs' worth.
There is room for all rows, so that where a chunk begins is known beforehand. `move` takes what has landed on inside
the host.

Returns go from where they lie, BATCH rows a message: an expert's rows of one host are a range, for they are in the
order of their sources, and its ends are found by bisection. They land one after the other from the plan's base on. One
more message says how many they are, and signals what is missing to WHOLE.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.memory import SmemAllocator

from nmoe.codegen.rails import BATCH, CHUNK, WHOLE
from nmoe.codegen.rdep import STATE
from nmoe.codegen.templates.layouts import flat
from nmoe.codegen.templates.nvshmem import Nvshmem
from nmoe.codegen.templates.rdep_link import Kernel, Link, Named

PIECE = 16  # bytes that a lane copies at once


class Linked(Kernel):
    capability: int

    def pe(self, link: Link, peer: Int32) -> Int32:
        """NVSHMEM's number of a rank of the group."""
        return Int32(link.state[STATE.index("first")]) + peer


class Counts(Linked):
    """One block: this rank's row of the counts, which `count` has written here, to where it lies elsewhere."""

    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        problem, link = self.problem, self.link(named)
        nvshmem = Nvshmem(self.capability)
        row = link.at(link.rank, "counts", Int32) + link.rank * problem.experts
        here = link.rank // problem.gpus * problem.gpus
        for i in cutlass.range(problem.gpus, problem.ranks):
            peer = self.pe(link, (here + i) % problem.ranks)
            nvshmem.put(
                row, row, Int64(4 * problem.experts), link.flag("counts.full", link.rank), Int64(1), peer
            )
        cute.arch.sync_threads()
        if cute.arch.thread_idx()[0] == 0:
            nvshmem.quiet()  # the next layer's counts are written over what has been read


class Rows(Linked):
    @cute.kernel
    def kernel(self, operands):  # type: ignore[no-untyped-def]
        problem, named = self.problem, Named(operands)
        link, nvshmem = self.link(named), Nvshmem(self.capability)
        epoch = link.epoch("rails") + 1
        link.wait("rails.free", epoch - 1, "rail")
        rows = Int32(problem.tokens)
        if link.overflowed():
            rows = Int32(0)  # peers still count on the messages
        chunks = problem.tokens // CHUNK
        for item in cutlass.range(
            cute.arch.block_idx()[0], (problem.hosts - 1) * chunks, cute.arch.grid_dim()[0]
        ):
            self._send(link, nvshmem, named, item // chunks, item % chunks * CHUNK, rows)
        if link.last(SmemAllocator()):
            if cute.arch.thread_idx()[0] == 0:
                nvshmem.quiet()  # the next launch stages over what has been read
            link.advance("rails", epoch)

    @cute.jit
    def _send(
        self, link: Link, nvshmem: Nvshmem, named: Named, hop: Int32, chunk: Int32, rows: Int32
    ) -> None:
        """Of the rows from `chunk` on those with a place on the host `hop` + 1 after this one."""
        problem = self.problem
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        host = (link.rank // problem.gpus + 1 + hop) % problem.hosts
        # The peer knows this host as its hosts − 2 − hop after next.
        begin, landed = hop * problem.tokens + chunk, (problem.hosts - 2 - hop) * problem.tokens + chunk
        row, places, goes = chunk + lane, [], False
        for j in cutlass.range_constexpr(problem.fan):
            place = Int32(-1)
            if row < rows:
                place = named["places"][row, j]
                if place // (named["each"] * problem.gpus) != host:
                    place = Int32(-1)
            places.append(place)
            goes |= place >= 0
        going = Uint32(cute.arch.vote_ballot_sync(goes))
        count, earlier = Int32(cute.arch.popc(going)), Int32(cute.arch.popc(going & cute.arch.lanemask_lt()))
        if warp == 0:
            to = begin + (earlier if goes else count + lane - earlier)
            for j in cutlass.range_constexpr(problem.fan):
                named["staged places"][to, j] = places[j]
                if cutlass.const_expr(problem.describes):
                    value = Float32(0.0)
                    if goes:
                        value = named["values"][row, j]
                    named["staged values"][to, j] = value
            if cutlass.const_expr(problem.describes):
                named["staged origins"][to, 0] = link.rank * named["choices"] + row * problem.fan
        for r in cutlass.range(warp, CHUNK, self.config.warps):
            if (going >> Uint32(r)) & 1 != 0:
                to = begin + Int32(cute.arch.popc(going & ((Uint32(1) << Uint32(r)) - 1)))
                for i in cutlass.range_constexpr(len(problem.parts)):
                    self._copy(named[f"rows{i}"][chunk + r, None], named[f"staged rows{i}"][to, None], lane)
        cute.arch.fence_acq_rel_sys()
        cute.arch.sync_threads()

        peer = self.pe(link, host * problem.gpus + link.rank % problem.gpus)
        flag, missing = link.flag("rails.full", link.rank), Int64(0)
        if chunk == 0:
            missing += WHOLE - problem.messages
        for i in cutlass.range_constexpr(len(problem.parts)):
            if count > 0:
                self._put(nvshmem, named, f"rows{i}", begin, landed, count, flag, Int64(1), peer)
            else:
                missing += 1
        for note in problem.notes:
            value = missing + 1 if cutlass.const_expr(note == "places") else Int64(1)
            self._put(nvshmem, named, note, begin, landed, Int32(CHUNK), flag, value, peer)

    @cute.jit
    def _copy(self, source: cute.Tensor, target: cute.Tensor, lane: Int32) -> None:
        source, target = (cute.zipped_divide(row, (PIECE,)) for row in (source, target))
        for at in cutlass.range(lane, cute.size(source, mode=[1]), 32):
            piece = cute.make_rmem_tensor((PIECE,), Uint8)
            cute.autovec_copy(source[None, at], piece)
            cute.autovec_copy(piece, target[None, at])

    def _put(self, nvshmem, named, name, begin, landed, count, flag, value, peer) -> None:  # type: ignore[no-untyped-def]
        """`count` rows of a staged buffer, from `begin` on, to where the peer has them of this host."""
        put_rows(
            nvshmem, named[f"staged {name}"], named[f"landed {name}"], begin, landed, count, flag, value, peer
        )


def put_rows(nvshmem, source, target, begin, landed, count, flag, value, peer) -> None:  # type: ignore[no-untyped-def]
    """`count` rows from `begin` on, to those from `landed` on of the peer's `target`."""
    width = source.shape[1]
    size = Int64(count) * (width * source.element_type.width // 8)
    to, what = (t.iterator + Int64(at) * width for t, at in ((target, landed), (source, begin)))
    nvshmem.put(to, what, size, flag, value, peer)


class Returns(Linked):
    @cute.kernel
    def kernel(self, operands):  # type: ignore[no-untyped-def]
        problem, named = self.problem, Named(operands)
        link, nvshmem, local = self.link(named), Nvshmem(self.capability), self.problem.local
        epoch = link.epoch("rails") + 1
        link.wait("rails.free", epoch - 1, "rail")
        smem = SmemAllocator()
        ranges = (problem.hosts - 1) * local
        first, count = (smem.allocate_tensor(Int32, cute.make_layout(ranges), 4) for _ in range(2))
        thread, threads = Int32(cute.arch.thread_idx()[0]), Int32(cute.arch.block_dim()[0])
        for i in cutlass.range(thread, ranges, threads):
            sources = problem.gpus * named["each"]  # places of a host
            host = (link.rank // problem.gpus + 1 + i // local) % problem.hosts
            begin = self._bisect(named, i % local, host * sources)
            first[i], count[i] = begin, self._bisect(named, i % local, (host + 1) * sources) - begin
        cute.arch.sync_threads()
        turn = Int32(0)  # messages' batches go to the thread blocks in turn
        for hop in cutlass.range(problem.hosts - 1):
            turn = self._send(link, nvshmem, named, first, count, hop, turn)
        if link.last(smem):
            if cute.arch.thread_idx()[0] == 0:
                nvshmem.quiet()  # what has been sent may be overwritten
            link.advance("rails", epoch)

    @cute.jit
    def _bisect(self, named: Named, expert: Int32, place: Int32) -> Int32:
        """The first slot of an expert's rows whose place is not before `place`."""
        places, begin, end = flat(named["places"]), named["offsets"][expert], named["ends"][expert]
        while begin < end:
            middle = (begin + end) // 2
            if places[middle] < place:
                begin = middle + 1
            else:
                end = middle
        return begin

    @cute.jit
    def _send(
        self, link: Link, nvshmem: Nvshmem, named: Named, first, count, hop: Int32, turn: Int32
    ) -> Int32:  # type: ignore[no-untyped-def]
        """The rows of the host `hop` + 1 after this one, and how many they are. Returns the next batch's turn."""
        problem, block, blocks = self.problem, Int32(cute.arch.block_idx()[0]), Int32(cute.arch.grid_dim()[0])
        host = (link.rank // problem.gpus + 1 + hop) % problem.hosts
        peer = self.pe(link, host * problem.gpus + link.rank % problem.gpus)
        flag, base = link.flag("rails.full", link.rank), named["bases"][hop]
        names = [
            *(f"rows{i}" for i in range(len(problem.parts))),
            *(["values"] if problem.describes else []),
            "places",
        ]
        landed, batches = base, Int32(0)
        for expert in cutlass.range(problem.local):
            start, rows = first[hop * problem.local + expert], count[hop * problem.local + expert]
            for done in cutlass.range(0, rows, BATCH):
                if turn % blocks == block:
                    for name in names:
                        put_rows(nvshmem, named[name], named[f"landed {name}"], start + done, landed + done,
                                 cutlass.min(rows - done, BATCH), flag, Int64(1), peer)  # fmt: skip
                turn += 1
                batches += 1
            landed += rows
        if turn % blocks == block:
            if cute.arch.thread_idx()[0] == 0:
                named["staged count"][hop, 0] = base
                named["staged count"][hop, 1] = landed - base
                cute.arch.fence_acq_rel_sys()
            cute.arch.sync_threads()
            rest = Int64(WHOLE) - Int64(batches) * len(names)
            put_rows(nvshmem, named["staged count"], named["landed count"], hop, problem.hosts - 2 - hop, Int32(1),
                     flag, rest, peer)  # fmt: skip
        return turn + 1


class Await(Kernel):
    """One block: until the rows of the epoch have landed from every host."""

    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        link = self.link(named)
        link.wait("rails.full", link.epoch("rails") * WHOLE, "rail")


class Raise(Linked):
    """One block: tells the senders that what landed has been consumed, as by the kernels before it on the stream."""

    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        link, nvshmem = self.link(named), Nvshmem(self.capability)
        threads = Int32(cute.arch.block_dim()[0])
        for peer in cutlass.range(Int32(cute.arch.thread_idx()[0]), self.problem.ranks, threads, unroll=1):
            if link.among("rail", peer):
                cute.arch.fence_acq_rel_sys()
                nvshmem.set(link.flag("rails.free", link.rank), link.epoch("rails"), self.pe(link, peer))


class Counts90(Counts):
    capability = 90


class Counts100(Counts):
    capability = 100


class Rows90(Rows):
    capability = 90


class Rows100(Rows):
    capability = 100


class Returns90(Returns):
    capability = 90


class Returns100(Returns):
    capability = 100


class Raise90(Raise):
    capability = 90


class Raise100(Raise):
    capability = 100
