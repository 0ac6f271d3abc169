"""RDEP's kernels between hosts as the templates see them. A rail is the GPUs of one index, one on each host.

    counts ── NVSHMEM ──▶ place                                to all ranks of the other hosts
    rows   ── NVSHMEM ──▶ await ─▶ move of what landed ─▶ raise    rows to the hosts that need them,
    return ── NVSHMEM ──▶ await ─▶ move of what landed ─▶ raise    and back

What calls NVSHMEM is linked with its device code of VERSION, and refused by a host library of an earlier one.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import Format, Operand, Problem
from nmoe.codegen.rdep import SLOTS, UNIT, Channel, RdepConfig, RdepProblem

PACKAGE, VERSION = "nvidia-nvshmem-cu13", "3.8.0"
CHUNK = 32  # rows that go in a message: a lane each
BATCH = 128  # rows that return in a message
WHOLE = 1 << 24  # what the messages of a transfer to one rank add to its rails.full


@dataclass(frozen=True)
class Rails(RdepProblem):
    """Of `hosts`, at least two. A template of what is `linked` is one of a compute capability."""

    part: ClassVar[str]

    @property
    def linked(self) -> bool:
        return True

    def template(self, target: str) -> str:
        return f"rdep_rail.{self.part}{HARDWARE[target].capability[0]}0"

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if self.hosts < 2:
            found.append(f"{self.ranks} ranks of {self.gpus} GPUs a host: no rails")
        return found


@dataclass(frozen=True)
class RailCountsProblem(Rails):
    """This rank's counts, of `experts` of all ranks, to all ranks of the other hosts."""

    experts: int

    kernel, part = "rail counts", "Counts"

    def arguments(self) -> tuple[Operand, ...]:
        return ()


@dataclass(frozen=True)
class RailProblem(Rails):
    """Rows of `parts` bytes to the GPUs of this rank's index on other hosts. places int32[…, fan]: numbers of all
    ranks, so many a rank. `describes`: with values."""

    parts: tuple[int, ...]
    tokens: int
    local: int  # experts of a rank
    describes: bool

    channel: ClassVar[Channel]

    @abstractmethod
    def mailboxes(self, name: str) -> tuple[Operand, ...]:
        """Symmetric memory; `name` is staged or landed."""

    def configs(self, target: str) -> list[RdepConfig]:
        return [RdepConfig(blocks=16)]

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if any(size % 16 or size <= 0 for size in self.parts):
            found.append(f"parts {self.parts}: whole 16 bytes are copied")
        return found


@dataclass(frozen=True)
class RailRowsProblem(RailProblem):
    """A token's row once to every other host that has one of its `fan` places; of others' hosts these arrive as −1.

    landed, of the same form on all ranks, takes in [(hosts − 1) · tokens] the rows of host s in block s − host − 1 (mod
    hosts): in each CHUNK tokens' worth those that came, in their order, then places of −1. `describes`: with values
    and the origins of their first choices.
    """

    fan: int

    kernel, part, channel = "rail rows", "Rows", "rows"

    @property
    def notes(self) -> dict[str, tuple[Format, int]]:
        """What travels beside the rows, of whole chunks: formats and widths."""
        values: dict[str, tuple[Format, int]] = {"values": ("f32", self.fan)} if self.describes else {}
        origins: dict[str, tuple[Format, int]] = {"origins": ("i32", 1)} if self.describes else {}
        return values | {"places": ("i32", self.fan)} | origins

    @property
    def messages(self) -> int:
        """Of a transfer from one rank to another."""
        return self.tokens // CHUNK * (len(self.parts) + len(self.notes))

    def mailboxes(self, name: str) -> tuple[Operand, ...]:
        size = (self.hosts - 1) * self.tokens
        rows = (Operand(f"{name} rows{i}", "u8", (size, part)) for i, part in enumerate(self.parts))
        notes = (Operand(f"{name} {note}", kind, (size, n)) for note, (kind, n) in self.notes.items())
        return (*rows, *notes)

    def arguments(self) -> tuple[Operand, ...]:
        """All extents are fixed."""
        rows = tuple(Operand(f"rows{i}", "u8", (self.tokens, size)) for i, size in enumerate(self.parts))
        values = (Operand("values", "f32", (self.tokens, self.fan)),) if self.describes else ()
        own = (*rows, *values, Operand("places", "i32", (self.tokens, self.fan)))
        mail = (*self.mailboxes("staged"), *self.mailboxes("landed"))
        return (*own, *mail, Operand("each", "i32", ()), Operand("choices", "i32", ()))

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if self.tokens % CHUNK:
            found.append(f"{self.tokens} rows: a multiple of {CHUNK}, a message")
        if self.messages > WHOLE:
            found.append(f"{self.messages} messages: at most {WHOLE}")
        return found


@dataclass(frozen=True)
class RailReturnsProblem(RailProblem):
    """Slots' rows back to the hosts that they came from. Those of an expert from one host follow each other, in the
    order of their places, so that they are sent from where they lie.

    landed[rows]: those of a host from a multiple of UNIT on, where the plan's `bases` say; and count
    int32[hosts − 1, 2]: the first row and how many, of host s in row s − host − 1 (mod hosts).
    """

    topk: int

    kernel, part, channel = "rail returns", "Returns", "returns"

    @property
    def rows(self) -> int:
        """That land at most: each choice of this host's tokens is an expert's on one rail."""
        return self.gpus * self.tokens * min(self.topk, self.hosts * self.local) + UNIT * (self.hosts - 1)

    def mailboxes(self, name: str) -> tuple[Operand, ...]:
        count = Operand(f"{name} count", "i32", (self.hosts - 1, 2))
        if name == "staged":
            return (count,)
        rows = (Operand(f"{name} rows{i}", "u8", (self.rows, part)) for i, part in enumerate(self.parts))
        values = (Operand(f"{name} values", "f32", (self.rows, 1)),) if self.describes else ()
        return (*rows, *values, Operand(f"{name} places", "i32", (self.rows, 1)), count)

    def arguments(self) -> tuple[Operand, ...]:
        rows = tuple(Operand(f"rows{i}", "u8", (SLOTS, size)) for i, size in enumerate(self.parts))
        values = (Operand("values", "f32", (SLOTS, 1)),) if self.describes else ()
        plan = (Operand("offsets", "i32", (self.local + 1,)), Operand("ends", "i32", (self.local,)),
                Operand("bases", "i32", (self.hosts - 1,)))  # fmt: skip
        mail = (*self.mailboxes("staged"), *self.mailboxes("landed"))
        return (
            *rows,
            *values,
            Operand("places", "i32", (SLOTS, 1)),
            *plan,
            *mail,
            Operand("each", "i32", ()),
        )

    def shared_bytes(self, config: RdepConfig, target: str) -> int:
        return 8 * (self.hosts - 1) * self.local + 1024


@dataclass(frozen=True)
class RailFlagProblem(Rails):
    """await: until the rows of all hosts have landed. raise: tells their senders that they have been consumed, as by
    the kernels before it on the stream."""

    action: Literal["await", "raise"]

    kernel, part = "rail flag", "Raise"

    @property
    def linked(self) -> bool:
        return self.action == "raise"

    def arguments(self) -> tuple[Operand, ...]:
        return ()

    def template(self, target: str) -> str:
        return super().template(target) if self.linked else "rdep_rail.Await"


def linked(problem: Problem) -> bool:
    """Whether its kernel is linked with NVSHMEM: then the driver launches it, with addresses and 32-bit scalars."""
    return isinstance(problem, Rails) and problem.linked
