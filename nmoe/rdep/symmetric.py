"""Symmetric memory of the GPUs of a group: a heap of the same layout on each, mapped into every process of its host.

NVSHMEM allocates and maps; from then on kernels use plain addresses (nvshmem_ptr), so that they carry none of its
device code and work with any version of it. Between hosts they call NVSHMEM, of one version (nmoe.codegen.rails).
Needs nvshmem4py, and torch.distributed for the ranks to meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.codegen.rdep import COLUMNS, REPORT, STATE
from nmoe.errors import UserError
from nmoe.rdep.device import check, offsets
from nmoe.rdep.transport import Buffer


class Heap:
    """This rank's part of the symmetric memory of the group `members`, ranks of the default process group in order.
    The constructor is collective over that process group, all of whose ranks pass the same `buffers`, of which flags
    are zero at first; the current CUDA device is the rank's. Of the members `gpus` are on each host.

    `rank` is the number in the group. `state` is what kernels take (nmoe.codegen.rdep), `addresses` alike where the
    heap holds a buffer for each of COLUMNS; `report` is host memory that they write to. `timeout`, in seconds, bounds
    every wait of a kernel.
    """

    def __init__(
        self, buffers: Mapping[str, Buffer], members: Sequence[int], gpus: int, *, timeout: float = 30.0
    ) -> None:
        self.rank, self.timeout = members.index(dist.get_rank()), timeout
        self._members, self._buffers = members, buffers
        self._at, size = offsets(buffers)
        first = self.rank // gpus * gpus
        near = members[first : first + gpus]
        self._memory, bases = _allocate(size, near)
        self._bases = {first + i: base for i, base in enumerate(bases)}  # by rank of this host
        self["flags"].zero_()
        self.report = torch.zeros(len(members), len(REPORT), dtype=torch.int64).pin_memory()
        state = dict.fromkeys(STATE, 0) | {"timeout": int(timeout * 1e9), "report": self.report.data_ptr(),
                                           "first": members[0]}  # fmt: skip
        self.state = torch.tensor([state[name] for name in STATE], device="cuda")
        self.addresses = self.table()
        torch.cuda.synchronize()
        dist.barrier()  # no peer writes before this rank's flags are zero

    def __getitem__(self, name: str) -> Tensor:
        """This rank's buffer; peers write to it until a flag says otherwise."""
        buffer = self._buffers[name]
        return self._memory[self._at[name] :][: buffer.bytes].view(buffer.dtype).view(buffer.shape)

    def table(self, **places: Tensor) -> Tensor:
        """int64[ranks, len(COLUMNS)]: where each buffer lies on each rank of this host, 0 for those that the heap lacks
        and for ranks of other hosts; the columns `places` where tensors of the heap do."""
        at = self._at | {name: t.data_ptr() - self._bases[self.rank] for name, t in places.items()}
        rows = torch.zeros(len(self._members), len(COLUMNS), dtype=torch.int64)
        for rank, base in self._bases.items():
            rows[rank] = torch.tensor([base + at[name] if name in at else 0 for name in COLUMNS])
        return rows.cuda()

    def empty(self, buffer: Buffer) -> Tensor:
        """Memory of this rank alone."""
        return torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")

    def check(self, names: Sequence[str] = ()) -> None:
        """Raises what a kernel reported (Missing, CapacityError); `names` are what the launches' numbers stand for.
        For when the device has raised an error, and, as it waits for nothing, at any other time."""
        check(self.report, self.timeout, self._members, names)

    def close(self) -> None:
        """Collective. After a fault leave it: the peers may be gone."""
        import nvshmem.core as nvshmem
        from nvshmem.core.interop.torch import free_tensor

        free_tensor(self._memory)
        nvshmem.finalize()


def _allocate(size: int, members: Sequence[int]) -> tuple[Tensor, list[int]]:
    """uint8[size] of the symmetric heap, and where it lies on each of `members`, of one host. Collective."""
    try:
        import nvshmem.core as nvshmem
        from cuda.core import Device
        from nvshmem import bindings
        from nvshmem.core.interop.torch import tensor
    except ImportError as error:
        raise UserError(f"RDEP on GPUs needs nvshmem4py ({error}): pip install 'nmoe[cuda]'") from error
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = Device(torch.cuda.current_device())
    device.set_current()
    unique = nvshmem.get_unique_id(empty=rank != 0)
    shared = torch.from_numpy(unique._data.view(np.uint8))
    dist.broadcast(shared, 0)  # in place
    nvshmem.init(device=device, uid=unique, rank=rank, nranks=ranks, initializer_method="uid")
    memory = tensor((size,), dtype=torch.uint8)
    bases = [bindings.ptr(memory.data_ptr(), peer) for peer in members]
    if not all(bases):
        far = members[bases.index(0)]
        raise UserError(
            f"rank {rank} cannot address the memory of rank {far}: RDEP needs NVLink (or PCIe peer access) between the "
            "GPUs of a group on one host; see nvidia-smi topo -p2p rw"
        )
    return memory, bases
