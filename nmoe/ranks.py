"""The processes of a run: who they are, which of them share experts, and what they add up.

They meet through gloo, which checkpoints use too; the rows and gradients of a step travel through shared memory
(nmoe/rdep), where every wait is bounded and names who is missing. gpu_ranks.py says what is different on GPUs, and
torchrun.py starts either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.binding import Launcher
from nmoe.errors import UserError
from nmoe.executor import Implementations
from nmoe.parameters import Shard
from nmoe.rdep import sums
from nmoe.rdep.exchange import Exchange
from nmoe.rdep.layer import Layer
from nmoe.rdep.shm import Shm
from nmoe.rdep.sums import Sums
from nmoe.rdep.transfer import Transfers
from nmoe.rdep.transport import Local, Missing, Part
from nmoe.schedule import Schedule

_Error = TypeVar("_Error", bound=BaseException)


class Peers(Protocol):
    """What a rank knows of the others: see Shm."""

    rank: int
    ranks: int

    def arrive(self) -> None: ...

    def dead(self) -> list[int]: ...

    def late(self) -> list[int]: ...


class Ranks:
    """This process, `rank` of `world`. Each `group` consecutive ranks share one set of experts, of which this one holds
    share number `share`; the ranks of the other groups that hold the same are its replicas."""

    def __init__(self, shm: Shm | None = None, group: int = 1, peers: Peers | None = None) -> None:
        """`peers` are all ranks, where `shm` reaches some of them."""
        transport = shm or Local({})
        self._peers = peers or transport
        self.rank, self.world, self.group = self._peers.rank, self._peers.ranks, group
        self.share = self.rank % group
        first = self.rank - self.share
        self._everyone = range(self.world)
        self._group = range(first, first + group)
        self._replicas = range(self.share, self.world, group)
        self._transport = transport
        self._sums = Sums(Transfers(transport))

    def place(
        self, schedules: Sequence[Schedule], device: torch.device, launcher: Launcher | None
    ) -> tuple[Tensor, Implementations]:
        """An arena for the executors of this rank's schedules, and what runs the ops that move expert rows. Call it
        once."""
        arena = torch.empty(max(s.arena_bytes for s in schedules), dtype=torch.uint8, device=device)
        if self.group == 1:
            return arena, {}
        return arena, Layer(Exchange(Part(self._transport, self._group))).implementations

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def owners(self, shard: Shard) -> Sequence[int]:
        """The ranks that hold the same parameters, in the order of their shares."""
        return self._replicas if shard.segment.group == "expert" else self._everyone

    def add_everywhere(self, tensor: Tensor) -> None:
        """Replaces FP32 tensor[n·sums.ROW] by its sum over all ranks."""
        self._sums.add(tensor, self._everyone)

    def gather_everywhere(self, tensor: Tensor) -> None:
        """Replaces each rank's equal part of tensor, whole rows of sums.ROW · 4 bytes, by that rank's."""
        self._sums.all_gather(tensor, self._everyone)

    def add_gradients(self, shards: Sequence[Shard], counted: Tensor) -> None:
        """Replaces `counted` by its sum over all ranks, and this rank's share of each gradient by its sum over the
        owners. The rest of the gradients is of no use afterwards."""
        self._sums.add(counted, self._everyone)
        for shard in shards:
            self._sums.reduce_scatter(shard.grad, self.owners(shard))

    def gather_weights(self, shards: Sequence[Shard]) -> None:
        """Replaces each owner's share of the weights by that owner's."""
        for shard in shards:
            self._sums.all_gather(shard.weights, self.owners(shard))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        word = torch.zeros(sums.ROW).fill_(float(flag))
        self.add_everywhere(word)
        return bool(word[0] > 0)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        if self.world > 1:
            self.arrive()
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def union(self, names: list[str]) -> list[str]:
        """Those of all ranks, in the order of the ranks, each once."""
        found: list[list[str]] = [names] * self.world
        if self.world > 1:
            self.arrive()
            dist.all_gather_object(found, names)
        return list(dict.fromkeys(name for some in found for name in some))

    def arrive(self) -> None:
        """Call it before a collective of gloo or NCCL: who has come to fewer is late."""
        self._peers.arrive()

    def explain(self, error: _Error) -> _Error | UserError:
        """Who is missing, when an error is what gloo noticed of it; any other error as it is."""
        return self.missing() if "gloo" in str(error) else error

    def missing(self) -> Missing:
        """An error that names the rank for which a collective waited in vain."""
        dead = self._peers.dead()
        late = dead or self._peers.late()
        who = f"rank {late[0]}" if late else "one"
        who = (
            f"{who} of {self.world} {'has died' if dead else 'is stuck' if late else 'has died or is stuck'}"
        )
        return Missing(f"{who}. Look for the first error in its log, then continue with --resume")
