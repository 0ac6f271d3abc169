"""RDEP's kernels between hosts as the templates see them. A rail is the GPUs of one index, one on each host.

    counts ── NVSHMEM ──▶ place                                to all ranks of the other hosts
    rail   ── NVSHMEM ──▶ await ─▶ move of what landed ─▶ raise    rows to the hosts that need them, and back

What calls NVSHMEM is linked with its device code of VERSION, and refused by a host library of an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import Format, Operand, Problem
from nmoe.codegen.rdep import Channel, RdepConfig, RdepProblem

PACKAGE, VERSION = "nvidia-nvshmem-cu13", "3.8.0"
CHUNK = 32  # rows of a message: a lane each
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
    """Rows of `parts` bytes to every other host that one of a row's `fan` places lies on, once, to the GPU of this
    rank's index. places int32[tokens, fan]: numbers of all ranks, `each` a rank, −1 for nowhere; of others' hosts
    they arrive as −1. Of returns the rows before offsets[local] are sent.

    landed, of the same form on all ranks, takes in [(hosts − 1) · tokens] the rows of host s in block s − host − 1 (mod
    hosts): in each CHUNK tokens' worth those that came, in their order, then places of −1. `describes`: with values,
    and rows with the origins of their first choices.
    """

    channel: Channel
    parts: tuple[int, ...]
    tokens: int
    fan: int
    local: int  # experts of a rank
    describes: bool

    kernel, part = "rail", "Rail"

    @property
    def notes(self) -> dict[str, tuple[Format, int]]:
        """What travels beside the rows, of whole chunks: formats and widths."""
        values: dict[str, tuple[Format, int]] = {"values": ("f32", self.fan)} if self.describes else {}
        told = self.describes and self.channel == "rows"
        origins: dict[str, tuple[Format, int]] = {"origins": ("i32", 1)} if told else {}
        return values | {"places": ("i32", self.fan)} | origins

    @property
    def messages(self) -> int:
        """Of a transfer from one rank to another."""
        return self.tokens // CHUNK * (len(self.parts) + len(self.notes))

    def mailboxes(self, name: str) -> tuple[Operand, ...]:
        """`name` is staged or landed."""
        size = (self.hosts - 1) * self.tokens
        rows = (Operand(f"{name} rows{i}", "u8", (size, part)) for i, part in enumerate(self.parts))
        notes = (Operand(f"{name} {note}", kind, (size, n)) for note, (kind, n) in self.notes.items())
        return (*rows, *notes)

    def arguments(self) -> tuple[Operand, ...]:
        """All extents are fixed."""
        rows = tuple(Operand(f"rows{i}", "u8", (self.tokens, size)) for i, size in enumerate(self.parts))
        values = (Operand("values", "f32", (self.tokens, self.fan)),) if self.describes else ()
        own = (*rows, *values, Operand("places", "i32", (self.tokens, self.fan)))
        mail, each = (*self.mailboxes("staged"), *self.mailboxes("landed")), Operand("each", "i32", ())
        if self.channel == "returns":
            return (*own, Operand("offsets", "i32", (self.local + 1,)), *mail, each)
        return (*own, *mail, each, Operand("choices", "i32", ()))

    def configs(self, target: str) -> list[RdepConfig]:
        return [RdepConfig(blocks=16)]

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if any(size % 16 or size <= 0 for size in self.parts):
            found.append(f"parts {self.parts}: whole 16 bytes are copied")
        if self.tokens % CHUNK:
            found.append(f"{self.tokens} rows: a multiple of {CHUNK}, a message")
        if self.messages > WHOLE:
            found.append(f"{self.messages} messages: at most {WHOLE}")
        return found


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
