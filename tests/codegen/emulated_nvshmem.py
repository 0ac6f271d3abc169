"""What NVSHMEM does for a kernel, between ranks whose heaps lie one after another in one emulated memory."""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, Uint8, cute
from cutlass.cute import AddressSpace
from emulated_ranks import ARENA

from nmoe.codegen.templates.fixed import Fixed


class Nvshmem(Fixed):
    """See nmoe.codegen.templates.nvshmem."""

    def __init__(self, capability: int) -> None:
        assert capability == 90

    @staticmethod
    def there(pointer, peer, element) -> cute.Pointer:  # type: ignore[no-untyped-def]
        """Where the peer's heap has what lies at `pointer` in this rank's."""
        base, size = Int64(ARENA["base"]), Int64(ARENA["size"])
        at = base + Int64(peer) * size + (Int64(pointer.toint()) - base) % size
        return cute.make_ptr(element, at, AddressSpace.gmem, assumed_align=element.width // 8)

    @cute.jit
    def put(self, target, source, size, flag, value, peer) -> None:  # type: ignore[no-untyped-def]
        to = self.there(target, peer, Uint8)
        taken = cute.make_ptr(Uint8, source.toint(), AddressSpace.gmem, assumed_align=1)
        thread = Int32(cute.arch.thread_idx()[0])
        for i in cutlass.range(thread, Int32(size), Int32(cute.arch.block_dim()[0])):
            cute.arch.store(to + i, cute.arch.load(taken + i, Uint8))
        cute.arch.fence_acq_rel_sys()
        cute.arch.sync_threads()
        if thread == 0:
            cute.arch.atomic_add(self.there(flag, peer, Int64), Int64(value), sem="release", scope="sys")

    def set(self, flag, value, peer) -> None:  # type: ignore[no-untyped-def]
        cute.arch.store(self.there(flag, peer, Int64), Int64(value), sem="release", scope="sys")

    def quiet(self) -> None:
        pass
