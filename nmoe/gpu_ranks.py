"""The ranks of a run on GPUs, one process a GPU.

Expert rows travel through symmetric memory (nmoe/rdep), gradients through NCCL, once a step, and the few numbers that
the host decides by through shared memory, as on the CPU, or between hosts through gloo. Every wait is bounded, on the
device too; what a rank meets is raised before anything is added up, and so before the optimizer changes anything.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.binding import Launcher
from nmoe.codegen.transfers import payloads
from nmoe.config import Config
from nmoe.errors import UserError
from nmoe.executor import Implementations
from nmoe.hosts import ranks_of_host
from nmoe.model import bind_dims, row_align
from nmoe.parameters import Shard
from nmoe.ranks import Ranks
from nmoe.rdep.device import Group
from nmoe.rdep.device_layer import DeviceLayer
from nmoe.rdep.shm import Shm
from nmoe.rdep.sums import Sums, tree_sum
from nmoe.rdep.symmetric import Heap
from nmoe.rdep.transport import Buffer
from nmoe.schedule import Schedule

BACKEND = "cpu:gloo,cuda:nccl"
PATIENCE = 1000  # looks, at least 0.05 s, between two at the other ranks
_Error = TypeVar("_Error", bound=BaseException)


def prepare(target: str) -> None:
    """Before the processes meet: makes the GPU of torchrun's LOCAL_RANK current. Raises UserError when there are fewer
    GPUs than processes."""
    rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (found := torch.cuda.device_count()) < processes:
        raise UserError(
            f'{processes} processes for [target] device = "{target}", one a GPU: this host has {found}; start '
            f"`torchrun --nproc-per-node {max(found, 1)}` or see CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(rank)
    # Waits are ours (`_await`), and name who is missing; by default NCCL's own timeout aborts the process.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"


class Several:
    """The ranks of all hosts as one of them knows them: shared memory shows it those of its own."""

    def __init__(self, shm: Shm) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._shm, self._first = shm, self.rank - shm.rank
        self.arrive = shm.arrive

    def dead(self) -> list[int]:
        return [self._first + rank for rank in self._shm.dead()]

    def late(self) -> list[int]:
        return [self._first + rank for rank in self._shm.late()]


class Gathered(Sums):
    """Between hosts: of few numbers, through gloo, where all ranks of the run meet. `run` starts collectives and waits
    for them."""

    def __init__(self, run: Callable[[Sequence[Callable[..., Any]]], None]) -> None:
        self._run = run

    def add(self, tensor: Tensor, members: Sequence[int]) -> None:
        every = torch.empty((len(members), *tensor.shape), dtype=tensor.dtype)
        every[dist.get_rank()] = tensor
        self.all_gather(every, members)
        tensor.copy_(tree_sum(list(every)))

    def all_gather(self, tensor: Tensor, members: Sequence[int]) -> None:
        parts = list(tensor.view(len(members), -1))
        self._run([partial(dist.all_gather, parts, parts[dist.get_rank()].clone())])


class GpuRanks(Ranks):
    """Use as a context: leaving it without an error ends NCCL and NVSHMEM. Those ends are collective, so after an
    error the process leaves them out, and so does its exit."""

    def __init__(self, shm: Shm, config: Config, sequences: int) -> None:
        several = Several(shm) if shm.ranks < dist.get_world_size() else None
        super().__init__(shm, config.rdep.ranks, several)
        if several:
            self._sums = Gathered(self._run)
        self._config, self._dims = config, bind_dims(config, sequences)
        self._heap: Heap | None = None
        self._names: list[str] = []
        shares = [list(range(share, self.world, self.group)) for share in range(self.group)]
        self._holders = [
            dist.new_group(ranks, backend="nccl") for ranks in shares if 1 < len(ranks) < self.world
        ]

    def place(
        self, schedules: Sequence[Schedule], device: torch.device, launcher: Launcher | None
    ) -> tuple[Tensor, Implementations]:
        moe, target = self._config.moe, self._config.target.device
        arena = Buffer((max(s.arena_bytes for s in schedules),), torch.uint8)
        if self.group == 1 or moe is None:
            return torch.empty(arena.shape, dtype=arena.dtype, device=device), {}
        assert launcher is not None
        width, dims = self._config.model.hidden_size, self._dims
        align = row_align(self._config)
        gpus = ranks_of_host(self.group)
        widest, *others = payloads(schedules)
        group = Group(self.group, gpus, moe.experts, dims["T"], moe.topk, dims["R"], align, widest, width)
        buffers = {"arena": arena} | group.mailboxes()
        for parts in others:
            for name, buffer in group.sending(parts).mailboxes().items():
                buffers[name] = max(buffers.get(name, buffer), buffer, key=lambda b: b.bytes)
        self._heap = Heap(buffers, self._group, gpus, timeout=self._config.rdep.timeout)
        layer = DeviceLayer(group, self._heap, launcher, target)
        self._names = layer.names
        return self._heap["arena"], layer.implementations

    def add_gradients(self, shards: Sequence[Shard], counted: Tensor) -> None:
        """After what the kernels of this rank reported has been raised."""
        ended = torch.cuda.Event()
        ended.record()
        self._await(ended.query, math.inf)  # a kernel's own waits are bounded
        if self._heap:
            self._heap.check(self._names)
        self._run([partial(dist.all_reduce, counted)])
        self._run_among(shards, lambda s: partial(dist.reduce_scatter_tensor, s.own_grad, s.grad))

    def gather_weights(self, shards: Sequence[Shard]) -> None:
        self._run_among(shards, lambda s: partial(dist.all_gather_into_tensor, s.weights, s.own_weights))

    def _run_among(self, shards: Sequence[Shard], collective: Callable[[Shard], Callable[..., Any]]) -> None:
        """A collective of each shard's owners, in place: NCCL takes a share of the tensor for the other operand."""
        everywhere = [s for s in shards if len(self.owners(s)) == self.world]
        replicated = [s for s in shards if 1 < len(self.owners(s)) < self.world]
        self._run([collective(s) for s in everywhere])
        self._run([partial(collective(s), group=self._holders[self.share]) for s in replicated])

    def _run(self, collectives: Sequence[Callable[..., Any]]) -> None:
        """Of NCCL or gloo, one after the other, of one group."""
        if not collectives:
            return
        self.arrive()
        for work in [collective(async_op=True) for collective in collectives]:
            self._await(work.is_completed, self._config.rdep.timeout)
            work.wait()  # orders the stream, or raises what gloo met

    def _await(self, done: Callable[[], bool], timeout: float) -> None:
        """Looks until something is done. Raises Missing at once when a rank has died, else after so many seconds."""
        end, looks = time.monotonic() + timeout, 0
        while not done():
            looks += 1
            if looks % PATIENCE == 0 and (self._peers.dead() or time.monotonic() > end):
                raise self.missing()
            time.sleep(5e-5)

    def explain(self, error: _Error) -> _Error | UserError:
        """What the kernels reported, or who is missing, when an error is what torch noticed of it."""
        if self._heap and not isinstance(error, UserError):
            try:
                self._heap.check(self._names)
            except UserError as cause:
                return cause
        return super().explain(error)

    def __enter__(self) -> GpuRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            atexit.register(_leave, code)
            return
        if self._heap:
            self._heap.close()
        dist.destroy_process_group()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
