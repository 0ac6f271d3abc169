"""A rank's end of the protocol on a GPU: launches of generated kernels on symmetric memory, nothing else.

Every transfer is two calls, so that other work of the step can lie between them: `send_…` puts rows to the peers and
raises flags, `receive_…` waits for the peers' flags on the device. None waits on the host, allocates, or depends on a
number that the host would have to read: a step of them can be captured in a CUDA graph and replayed.

The same calls drive the emulator in tests: all that this module knows of memory is what it hands to `launch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from nmoe.codegen.rails import WHOLE, RailProblem
from nmoe.codegen.rdep import FLAGS, LINE, OVERFLOW, TILE, TIMEOUT, RdepProblem
from nmoe.codegen.transfers import transfers
from nmoe.executor import DTYPES
from nmoe.rdep.plan import CapacityError
from nmoe.rdep.transport import Buffer, Missing


@dataclass(frozen=True)
class Group:
    """What all ranks of a group agree on. `gpus`: of its ranks on each host, numbered host by host. `experts`: of all
    ranks. `tokens`: of the fullest rank; across hosts all have as many. `capacity`: slots of a rank. `align`: rows that
    segments are padded to. `parts`: bytes of a dispatched row, in BF16 one part, quantized the elements and their
    scales. `width`: elements of a returned row, BF16."""

    ranks: int
    gpus: int
    experts: int
    tokens: int
    topk: int
    capacity: int
    align: int
    parts: tuple[int, ...]
    width: int

    @property
    def choices(self) -> int:
        return self.tokens * self.topk

    @property
    def local(self) -> int:
        return self.experts // self.ranks

    def sending(self, parts: tuple[int, ...]) -> Group:
        """The group, when it dispatches rows of `parts`."""
        return replace(self, parts=parts)

    def mailboxes(self) -> dict[str, Buffer]:
        """Symmetric memory that all layers share."""
        return {
            "flags": Buffer((len(FLAGS), self.ranks, LINE), torch.int64),
            "counts": Buffer((self.ranks, self.experts), torch.int32),
            "returned": Buffer((self.choices, self.width), torch.bfloat16),
            "returned value": Buffer((self.choices,), torch.float32),
        } | self._rails()

    def _rails(self) -> dict[str, Buffer]:
        """What rows pass through between hosts, by channel."""
        return {
            f"{rail.channel} {operand.name}": Buffer(operand.shape, DTYPES[operand.format])
            for rail in self.problems().values()
            if isinstance(rail, RailProblem) and rail.describes  # the others need less
            for name in ("staged", "landed")
            for operand in rail.mailboxes(name)
        }

    def slots(self) -> dict[str, Buffer]:
        """Symmetric memory that a dispatch fills, with `mailboxes` a buffer for each of COLUMNS."""
        parts = (*self.parts, 0)[:2]
        return {
            "origin": Buffer((self.capacity,), torch.int32),
            "value": Buffer((self.capacity,), torch.float32),
            "data": Buffer((self.capacity, parts[0]), torch.uint8),
            "scale": Buffer((self.capacity, parts[1]), torch.uint8),
        }

    def problems(self) -> dict[str, RdepProblem]:
        """Every kernel of a layer's forward and backward, by the step of Exchange that launches it."""
        return transfers(
            self.ranks, self.gpus, self.experts, self.tokens, self.topk, self.capacity, self.align, self.parts,
            self.width,
        )  # fmt: skip

    def routing(self, tokens: int) -> dict[str, Buffer]:
        """What Routing holds of a layer for `tokens` tokens of this rank."""
        choices = tokens * self.topk
        return {
            "slots": Buffer((tokens, self.topk), torch.int32),
            "order": Buffer((tokens, self.topk), torch.int32),
            "tiles": Buffer((-(-choices // TILE), self.experts), torch.int32),
            "offsets": Buffer((self.local + 1,), torch.int32),
            "ends": Buffer((self.local,), torch.int32),
            "bases": Buffer((max(1, self.ranks // self.gpus - 1),), torch.int32),
        }


class Routing(NamedTuple):
    """A layer's plan on this rank, kept for its backward: slots int32[T, k], owner · capacity + slot of each choice;
    order int32[T, k], the choices in the order of their slots; offsets int32[local + 1] and ends int32[local] of its
    experts' segments; bases int32[hosts − 1], where returns land on other hosts; tiles is workspace of the counts. With
    the origins int32[capacity] that the first dispatch brings, backward can follow other layers."""

    slots: Any
    order: Any
    tiles: Any
    offsets: Any
    ends: Any
    bases: Any


class Buffers(Protocol):
    def __getitem__(self, name: str) -> Any:
        """This rank's buffer."""


class Launch(Protocol):
    def __call__(self, problem: RdepProblem, *arguments: Any) -> None:
        """Launches a problem's kernel, in the order of the stream, with its operands."""


class Exchange:
    """`addresses` and `state`: the tables of nmoe.codegen.rdep. `heap` gives this rank's buffers by name. All ranks
    make the same calls in the same order.

    Between hosts rows go to the rank of the same index of a host, and on from there: while they are on their way, the
    near rows are moved. Slots and origins are the plan's, so that nothing else knows of hosts."""

    def __init__(
        self, group: Group, rank: int, addresses: Any, state: Any, heap: Buffers, launch: Launch
    ) -> None:
        self.group, self.rank, self._heap = group, rank, heap
        self._problems = group.problems()
        self._addresses, self._state, self._launch = addresses, state, launch

    def send_counts(self, indices: Any, routing: Routing, layer: int) -> None:
        """indices int32[T, k]: the experts that each token chose."""
        self._run("send_counts", layer, indices, routing.slots, routing.tiles)
        if "relay_counts" in self._problems:
            self._run("relay_counts", layer)

    def receive_counts(self, indices: Any, routing: Routing, layer: int) -> None:
        """Fills the routing. Too many rows for a rank set `overflow` on all: what follows moves nothing."""
        slots, order, tiles, offsets, ends, bases = routing
        plan = (slots, tiles, order, offsets, ends, *((bases,) if self.group.gpus < self.group.ranks else ()))
        self._run("receive_counts", layer, indices, *plan, self.group.capacity)

    def send_rows(self, rows: tuple[Any, ...], values: Any | None, routing: Routing, layer: int) -> None:
        """rows u8[T, bytes] of each part to all slots of each token; zero to this rank's padding. The first dispatch
        of a layer brings values f32[T, k], the router weights, and tells the slots whose rows they hold."""
        sizes = self.group.capacity, self.group.choices
        if values is None:
            self._move("resend_rows", layer, (*rows, routing.slots), (), (), sizes, routing)
        else:
            given = (*rows, values, routing.slots)
            self._move("send_rows", layer, given, (routing.order,), (), sizes, routing)

    def receive_rows(self, layer: int) -> None:
        """Until all rows are in data, scale, value and origin."""
        self._run("receive_rows", layer)

    def release_rows(self, layer: int) -> None:
        """The peers may put the next rows: what was where they go has been consumed."""
        self._run("release_rows", layer)

    def send_returns(self, rows: Any, values: Any | None, origins: Any, routing: Routing, layer: int) -> None:
        """rows u8[slots, 2 · width], BF16, and values f32[slots, 1]? back to their origins int32[slots, 1]."""
        step = "send_returns" if values is None else "send_returns_values"
        given = (rows, *(() if values is None else (values,)), origins)
        plan = routing.offsets, routing.ends, routing.bases
        self._move(step, layer, given, (), plan, (self.group.choices,), routing)

    def receive_returns(self, y: Any, layer: int) -> None:
        """y bf16[T, width] = each token's rows, summed in FP32 in the order of its choices; the values are in the
        heap's `returned value`, [T · k]."""
        self._run("receive_returns", layer, y)

    def _move(
        self, step: str, layer: int, given: tuple[Any, ...], order: tuple[Any, ...], bound: tuple[Any, ...],
        sizes: tuple[int, ...], routing: Routing,
    ) -> None:  # fmt: skip
        """`given` rows, values and places to their places; `order` is what their own kernel takes besides, `bound` and
        `sizes` what a rail takes."""
        segments = routing.offsets, routing.ends, self.group.capacity, self.group.choices
        rail = self._problems.get(f"{step} rail")
        if not isinstance(rail, RailProblem):
            self._run(step, layer, *given, *order, *segments)
            return
        staged, landed = (
            [self._heap[f"{rail.channel} {operand.name}"] for operand in rail.mailboxes(name)]
            for name in ("staged", "landed")
        )
        self._run(f"{step} rail", layer, *given, *bound, *staged, *landed, *sizes)
        self._run(step, layer, *given, *order, *segments)
        self._run("await_rails", layer)
        self._run(f"{step} landed", layer, *landed, *segments)
        self._run("raise_rails", layer)

    def _run(self, step: str, layer: int, *arguments: Any) -> None:
        self._launch(self._problems[step], *arguments, self._addresses, self._state, self.rank, layer)


def check(
    report: torch.Tensor, timeout: float, members: Sequence[int] = (), names: Sequence[str] = ()
) -> None:
    """Raises what a kernel reported, int64[ranks, len(REPORT)] in host memory: Missing or CapacityError. `members`
    are the numbers of the group's ranks in the run, `names` what the launches' numbers stand for."""
    for kind, rank, peer, layer, flag, expected, seen in report.tolist():
        where = names[layer] if names else f"layer {layer}"
        rank, peer = (members[r] if members else r for r in (rank, peer))
        if FLAGS[flag] == "rails.full":
            expected, seen = expected // WHOLE, seen // WHOLE
        if kind == TIMEOUT:
            raise Missing(
                f"{where}: rank {rank} waited {timeout:g} s for {FLAGS[flag]} {expected} (seen {seen}) of rank {peer}. "
                f"Look for the first error in rank {peer}'s log, then continue with --resume"
            )
        if kind == OVERFLOW:
            raise CapacityError(
                f"{where}: rank {peer} would receive {expected} expert rows, the capacity is {seen}: raise [rdep] "
                f"capacity to at least {expected}, or set it to 0 for the worst case"
            )


def offsets(buffers: Mapping[str, Buffer], align: int = 1024) -> tuple[dict[str, int], int]:
    """Where each buffer lies in a heap, in bytes, and the size of all."""
    at, found = 0, {}
    for name, buffer in buffers.items():
        found[name] = at
        at += -(-buffer.bytes // align) * align
    return found, at
