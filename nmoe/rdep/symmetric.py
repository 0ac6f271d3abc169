"""Symmetric memory of the GPUs of one host: a heap of the same layout on each, all mapped into every process.

NVSHMEM allocates and maps; from then on kernels use plain addresses (nvshmem_ptr), so that they carry none of its
device code and work with any version of it. Needs nvshmem4py, and torch.distributed for the ranks to meet.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.codegen.rdep import COLUMNS, REPORT, STATE
from nmoe.errors import UserError
from nmoe.rdep.device import Group, check, offsets


class Heap:
    """One rank's heap. The constructor is collective over the default process group, whose rank and size are the
    group's; the current CUDA device is the rank's.

    `addresses` and `state` are what kernels take (nmoe.codegen.rdep); `report` is host memory that they write to.
    `timeout`, in seconds, bounds every wait of a kernel.
    """

    def __init__(self, group: Group, *, timeout: float = 30.0) -> None:
        self.rank, self.timeout = dist.get_rank(), timeout
        if dist.get_world_size() != group.ranks:
            raise UserError(
                f"{dist.get_world_size()} processes for an RDEP group of {group.ranks}: start as many as [rdep] ranks"
            )
        self._buffers = group.buffers()
        self._at, size = offsets(self._buffers)
        self._memory, bases = _allocate(size)
        self._memory.zero_()
        table = [[base + self._at[name] for name in COLUMNS] for base in bases]
        self.report = torch.zeros(group.ranks, len(REPORT), dtype=torch.int64).pin_memory()
        state = dict.fromkeys(STATE, 0) | {"timeout": int(timeout * 1e9), "report": self.report.data_ptr()}
        self.addresses = torch.tensor(table, device="cuda")
        self.state = torch.tensor([state[name] for name in STATE], device="cuda")
        torch.cuda.synchronize()
        dist.barrier()  # no peer writes before this rank's flags are zero

    def __getitem__(self, name: str) -> Tensor:
        """This rank's buffer; peers write to it until a flag says otherwise."""
        buffer = self._buffers[name]
        return self._memory[self._at[name] :][: buffer.bytes].view(buffer.dtype).view(buffer.shape)

    def check(self) -> None:
        """Raises what a kernel reported (Missing, CapacityError). For when the device has raised an error, and, as it
        waits for nothing, at any other time."""
        check(self.report, self.timeout)

    def close(self) -> None:
        """Collective. After a fault leave it: the peers may be gone."""
        import nvshmem.core as nvshmem
        from nvshmem.core.interop.torch import free_tensor

        free_tensor(self._memory)
        nvshmem.finalize()


def _allocate(size: int) -> tuple[Tensor, list[int]]:
    """uint8[size] of the symmetric heap, and where it lies on every rank. Collective."""
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
    bases = [bindings.ptr(memory.data_ptr(), peer) for peer in range(ranks)]
    if not all(bases):
        far = bases.index(0)
        raise UserError(
            f"rank {rank} cannot address the memory of rank {far}: RDEP needs NVLink (or PCIe peer access) between the "
            "GPUs of a group; see nvidia-smi topo -p2p rw"
        )
    return memory, bases
