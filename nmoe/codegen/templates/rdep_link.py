"""A rank's link to its peers, as kernels see it: addresses, epochs, flags raised with release and awaited with acquire.

    sender                                          receiver
    all threads put ─▶ bar.sync ─▶ thread 0:        thread p: ld.acquire.sys of peer p's word
      fence.acq_rel.sys, a ticket (acq_rel, gpu)      until it holds the epoch, or time is over:
    thread block with the last ticket:                write the report, fence.sys, trap
    thread p: st.release.sys of the epoch to peer p ─▶ bar.sync ─▶ all threads read

A flag word has one writer, is never reset and holds int64 epochs, which do not wrap. The epoch of a channel lies in
`state` and is advanced by the last thread block of what sends on it, so a replayed graph needs nothing from the host.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Int32, Int64, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute import AddressSpace
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator

from nmoe.codegen.rdep import COLUMNS, FLAGS, LINE, REPORT, STATE, TIMEOUT, RdepConfig, RdepProblem
from nmoe.codegen.templates.fixed import Fixed


@dsl_user_op
def trap(*, loc=None, ip=None) -> None:  # type: ignore[no-untyped-def]
    """Ends the launch, and with it the context, with an error."""
    llvm.inline_asm(None, [], "trap;", "", has_side_effects=True, loc=loc, ip=ip)


class Named(Fixed):
    """A kernel's operands by name, for functions that it calls inside of loops and branches."""

    def __init__(self, operands) -> None:  # type: ignore[no-untyped-def]
        self._operands = dict(operands)

    def __getitem__(self, name: str):  # type: ignore[no-untyped-def]
        return self._operands[name]


class Link(Fixed):
    """addresses int64[ranks, len(COLUMNS)], state int64[len(STATE)]. Peers are the ranks of this host, which a rank
    addresses; those of its rail have its index on other hosts."""

    def __init__(
        self, problem: RdepProblem, addresses: cute.Tensor, state: cute.Tensor, rank: Int32, layer: Int32
    ) -> None:
        self.ranks, self.gpus = problem.ranks, problem.gpus
        self.addresses, self.state, self.rank, self.layer = addresses, state, rank, layer

    def first(self):  # type: ignore[no-untyped-def]
        """The first rank of this host."""
        return 0 if self.gpus == self.ranks else self.rank // self.gpus * self.gpus

    def among(self, whom: str, peer: Int32):  # type: ignore[no-untyped-def]
        """Whether a number, at least 0, is that of another rank: "all", of this host ("peers"), of its "rail"."""
        other = (peer < self.ranks) & (peer != self.rank)
        if self.gpus == self.ranks or whom == "all":
            return other
        if whom == "peers":
            return other & (peer // self.gpus == self.rank // self.gpus)
        return other & (peer % self.gpus == self.rank % self.gpus)

    def at(self, peer: Int32, column: str, element, align: int = 0) -> cute.Pointer:  # type: ignore[no-untyped-def]
        """The start of a peer's buffer."""
        address = self.addresses[peer, COLUMNS.index(column)]
        return cute.make_ptr(element, address, AddressSpace.gmem, assumed_align=align or element.width // 8)

    def own(self, column: str, element, count) -> cute.Tensor:  # type: ignore[no-untyped-def]
        """This rank's buffer, as `count` elements."""
        return cute.make_tensor(self.at(self.rank, column, element, 16), cute.make_layout(count))

    def word(self, name: str) -> cute.Pointer:
        return self.state.iterator + STATE.index(name)

    def epoch(self, channel: str) -> Int64:
        """Of the last transfer that this rank sent on a channel."""
        return self.state[STATE.index(channel)]

    def overflowed(self):  # type: ignore[no-untyped-def]
        return self.state[STATE.index("overflow")] != 0

    def flag(self, name: str, peer: Int32) -> cute.Pointer:
        """This rank's word that `peer` writes."""
        return self.at(self.rank, "flags", Int64) + (FLAGS.index(name) * self.ranks + peer) * LINE

    @cute.jit
    def report(self, kind: int, peer: Int32, flag: int, expected: Int64, seen: Int64) -> None:
        """Row `peer` of the host's report."""
        row = cute.make_ptr(Int64, self.state[STATE.index("report")], AddressSpace.gmem, assumed_align=8)
        row += peer * len(REPORT)
        for i, value in enumerate((kind, self.rank, peer, self.layer, flag, expected, seen)):
            cute.arch.store(row + i, Int64(value), sem="relaxed", scope="sys")
        cute.arch.fence_acq_rel_sys()

    @cute.jit
    def wait(self, flag: cutlass.Constexpr, epoch: Int64, whom: cutlass.Constexpr = "peers") -> None:
        """By all threads of the block: until every rank `among` whom has raised `flag` for `epoch` or a later one."""
        threads = Int32(cute.arch.block_dim()[0])
        for peer in cutlass.range(Int32(cute.arch.thread_idx()[0]), self.ranks, threads, unroll=1):
            if self.among(whom, peer):
                self._watch(flag, epoch, peer)
        cute.arch.sync_threads()

    @cute.jit
    def _watch(self, flag: cutlass.Constexpr, epoch: Int64, peer: Int32) -> None:
        """By one thread: until a peer has raised `flag`."""
        word = self.flag(flag, peer)
        budget = self.state[STATE.index("timeout")]
        seen = Int64(cute.arch.load(word, Int64, sem="acquire", scope="sys"))
        # Not before the first load: with a timer's read between them, ptxas (CuTeDSL 4.8.1 and CUDA 13.0, not at
        # -O1) issued the load 4 cycles after the IMAD.WIDE of its address, and it faulted on H100.
        begin = Int64(0)
        if seen < epoch:
            begin = Int64(cute.arch.globaltimer())
        while seen < epoch:
            late = Int64(cute.arch.globaltimer()) - begin > budget
            seen = Int64(cute.arch.load(word, Int64, sem="acquire", scope="sys"))
            if late and seen < epoch:
                self.report(TIMEOUT, peer, FLAGS.index(flag), epoch, seen)
                trap()

    @cute.jit
    def raise_all(self, flag: cutlass.Constexpr, epoch: Int64) -> None:
        """By a whole block whose puts lie before a bar.sync: a release to every peer."""
        threads = Int32(cute.arch.block_dim()[0])
        for peer in cutlass.range(Int32(cute.arch.thread_idx()[0]), self.ranks, threads, unroll=1):
            if self.among("peers", peer):
                word = self.at(peer, "flags", Int64) + (FLAGS.index(flag) * self.ranks + self.rank) * LINE
                cute.arch.fence_acq_rel_sys()
                cute.arch.store(word, epoch, sem="release", scope="sys")

    @cute.jit
    def last(self, smem: SmemAllocator):  # type: ignore[no-untyped-def]
        """By all threads of all blocks of a launch: whether this block ends last, so that what every block put
        before is ordered before what this one does next."""
        vote = smem.allocate_tensor(Int32, cute.make_layout(1), 4)
        cute.arch.sync_threads()
        if cute.arch.thread_idx()[0] == 0:
            cute.arch.fence_acq_rel_sys()
            ticket = cute.arch.atomic_add(self.word("done"), Int64(1), sem="acq_rel", scope="gpu")
            vote[0] = Int32(ticket == Int64(cute.arch.grid_dim()[0]) - 1)
        cute.arch.sync_threads()
        return vote[0] != 0

    @cute.jit
    def finish(self, channel: cutlass.Constexpr, epoch: Int64) -> None:
        """By the last block: the transfer is sent."""
        self.raise_all(f"{channel}.full", epoch)
        self.advance(channel, epoch)

    @cute.jit
    def advance(self, channel: cutlass.Constexpr, epoch: Int64) -> None:
        """By the last block: the next launch finds its counters at zero and the channel's epoch."""
        if cute.arch.thread_idx()[0] == 0:
            self.state[STATE.index("done")] = Int64(0)
            self.state[STATE.index("taken")] = Int64(0)
            self.state[STATE.index(channel)] = epoch


class Kernel(Fixed):
    """The host side of RDEP's kernels. A subclass gives `kernel`, which takes the operands, and may say `blocks` and
    `warps` of a block."""

    problem: Any  # of the subclass's own kind

    def __init__(self, problem: RdepProblem, config: RdepConfig) -> None:
        self.problem, self.config = problem, config

    def kernel(self, *args):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def blocks(self, named, clusters):  # type: ignore[no-untyped-def]
        return clusters

    def warps(self) -> int:
        return self.config.warps

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of the problem, the number of thread blocks, the stream."""
        *operands, clusters, stream = args
        named = {o.name: t for o, t in zip(self.problem.operands(self.config), operands, strict=True)}
        self.kernel(named).launch(
            grid=[self.blocks(named, clusters), 1, 1], block=[32 * self.warps(), 1, 1], stream=stream
        )

    def link(self, named) -> Link:  # type: ignore[no-untyped-def]
        return Link(self.problem, *(named[name] for name in ("addresses", "state", "rank", "layer")))


class Await(Kernel):
    """One block: until the rows of the epoch have arrived from every peer."""

    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        link = self.link(named)
        link.wait("rows.full", link.epoch("rows"))


class Raise(Kernel):
    """One block: tells every peer that this rank has consumed its rows, as the kernels before it on the stream did."""

    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        link = self.link(named)
        link.raise_all("rows.free", link.epoch("rows"))
