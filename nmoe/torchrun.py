"""The processes that torchrun started, as the ranks of a run: `torchrun --nproc-per-node N -m nmoe train …`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from nmoe import model
from nmoe.config import Config, layers
from nmoe.errors import UserError
from nmoe.gpu_ranks import BACKEND, GpuRanks, prepare
from nmoe.plan import micro_batch
from nmoe.ranks import Ranks
from nmoe.rdep import exchange, sums
from nmoe.rdep.shm import Shm
from nmoe.rdep.transport import Buffer, Missing


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
    timeout, gpus = config.rdep.timeout, config.target.device != "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local != world and not gpus:
        raise UserError(
            f"{world} processes on several hosts: ranks on CPUs share the memory of one; start all with "
            "`torchrun --nproc-per-node` on one host"
        )
    if gpus:
        prepare(config.target.device)
    try:
        dist.init_process_group(BACKEND if gpus else "gloo", timeout=timedelta(seconds=timeout))
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
    except (RuntimeError, ValueError) as error:  # gloo's and the store's errors are RuntimeErrors
        raise Missing(
            f"the {world} processes did not find each other within {timeout:g} s: {str(error).splitlines()[0]}. Start "
            f"them with `torchrun --nproc-per-node {world} -m nmoe train …` and look for the first error in their logs"
        ) from error
    if gpus:
        host, rank = divmod(dist.get_rank(), local)
        shm = Shm(f"{name[0]}-{host}", rank, local, sums.buffers(local), timeout=timeout)
        ranks: Ranks = GpuRanks(shm, config, sequences)
    else:
        shm = Shm(name[0], dist.get_rank(), world, symmetric(config, sequences, world), timeout=timeout)
        ranks = Ranks(shm, config.rdep.ranks)
    with ranks:
        yield ranks


def symmetric(config: Config, sequences: int, world: int) -> dict[str, Buffer]:
    """What every rank's shared memory holds: expert rows and gradients on their way."""
    buffers = sums.buffers(world)
    moe, dims = config.moe, model.bind_dims(config, sequences)
    if moe and config.rdep.ranks > 1:
        dtype = torch.float32 if config.schedule.precision == "fp32" else torch.bfloat16
        buffers |= exchange.buffers(
            config.rdep.ranks, moe.experts, dims["T"], moe.topk, config.model.hidden_size, dims["R"], dtype,
            quantized=any("mxfp8" in layer.precision for layer in layers(config)),
        )  # fmt: skip
    return buffers
