"""The processes of a run: who they are, which of them share experts, and what they add up.

torchrun starts them and says so in the environment. They meet through gloo, which checkpoints use too; the rows and
gradients of a step travel through shared memory (nmoe/rdep), where every wait is bounded and names who is missing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe import model
from nmoe.config import Config
from nmoe.errors import UserError
from nmoe.plan import micro_batch
from nmoe.rdep import exchange, sums
from nmoe.rdep.exchange import Exchange
from nmoe.rdep.layer import Layer
from nmoe.rdep.shm import Shm
from nmoe.rdep.sums import Sums
from nmoe.rdep.transfer import Transfers
from nmoe.rdep.transport import Buffer, Local, Missing, Part, Transport

_Error = TypeVar("_Error", bound=BaseException)


class Ranks:
    """This process, `rank` of `world`. Each `group` consecutive ranks share one set of experts, of which this one holds
    share number `share`; the ranks of the other groups that hold the same are its replicas."""

    def __init__(self, transport: Transport | None = None, group: int = 1) -> None:
        transport = transport or Local({})
        self.rank, self.world, self.group = transport.rank, transport.ranks, group
        self.share = self.rank % group
        first = self.rank - self.share
        self._everyone = range(self.world)
        self._group = range(first, first + group)
        self._replicas = range(self.share, self.world, group)
        self._transport = transport
        self._sums = Sums(Transfers(transport))
        self.implementations: Mapping[str, Callable[..., None]] = {}
        if group > 1:
            self.implementations = Layer(Exchange(Part(transport, self._group))).implementations

    def add_everywhere(self, tensor: Tensor) -> None:
        """Replaces FP32 tensor[n·sums.ROW] by its sum over all ranks."""
        self._sums.add(tensor, self._everyone)

    def add_replicas(self, tensor: Tensor) -> None:
        """The same over the ranks that hold the experts of this one."""
        self._sums.add(tensor, self._replicas)

    def add_group(self, tensor: Tensor) -> None:
        """The same over the ranks of this one's group."""
        self._sums.add(tensor, self._group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        word = torch.zeros(sums.ROW).fill_(float(flag))
        self.add_everywhere(word)
        return bool(word[0] > 0)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def explain(self, error: _Error) -> _Error | Missing:
        """Who is missing, when an error is what gloo noticed of it; any other error as it is."""
        if "gloo" not in str(error) or not isinstance(self._transport, Shm):
            return error
        dead = self._transport.dead()
        who = (
            f"rank {dead[0]} of {self.world} has died" if dead else f"one of the {self.world} ranks is stuck"
        )
        return Missing(f"{who}. Look for the first error in its log, then continue with --resume")


@contextmanager
def launched(config: Config) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Raises UserError when the processes do not fit the config, Missing when one does not come.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sequences = micro_batch(config, world)
    if world == 1:
        yield Ranks()
        return
    if config.target.device != "cpu":
        raise UserError(
            f'{world} processes for [target] device = "{config.target.device}": this build trains on several ranks on '
            'device = "cpu" only; start one process'
        )
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        raise UserError(
            f"{world} processes on several hosts: the cpu target's ranks share memory; start all with "
            "`torchrun --nproc-per-node` on one host"
        )
    timeout = config.rdep.timeout
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
    except (RuntimeError, ValueError) as error:  # gloo's and the store's errors are RuntimeErrors
        raise Missing(
            f"the {world} processes did not find each other within {timeout:g} s: {str(error).splitlines()[0]}. Start "
            f"them with `torchrun --nproc-per-node {world} -m nmoe train …` and look for the first error in their logs"
        ) from error
    try:
        shm = Shm(name[0], dist.get_rank(), world, symmetric(config, sequences, world), timeout=timeout)
        yield Ranks(shm, config.rdep.ranks)
    finally:
        dist.destroy_process_group()


def symmetric(config: Config, sequences: int, world: int) -> dict[str, Buffer]:
    """What every rank's shared memory holds: expert rows and gradients on their way."""
    buffers = sums.buffers(world)
    moe, dims = config.moe, model.bind_dims(config, sequences)
    if moe and config.rdep.ranks > 1:
        dtype = torch.float32 if config.schedule.precision == "fp32" else torch.bfloat16
        buffers |= exchange.buffers(
            config.rdep.ranks, moe.experts, dims["T"], moe.topk, config.model.hidden_size, dims["R"], dtype
        )
    return buffers
