"""RDEP's kernels between hosts as the templates see them. A rail is the GPUs of one index, one on each host.

    rail ── NVSHMEM ──▶ await … raise            rows to the hosts that need them; moved on inside a host between

No layer launches them yet (docs/rdep.md, Across hosts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import Operand
from nmoe.codegen.rdep import RdepConfig, RdepProblem

CHUNK = 32  # rows of a message: a lane each


@dataclass(frozen=True)
class Rails(RdepProblem):
    """Of `ranks` GPUs, `gpus` on each host. A rail is the GPUs of one index; `ranks` are numbered host by host.
    `nvshmem`: the version whose device code is linked in and whose host library must load it."""

    gpus: int
    nvshmem: str

    @property
    def hosts(self) -> int:
        return self.ranks // self.gpus

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if self.ranks % self.gpus or self.hosts < 2:
            found.append(f"{self.ranks} ranks of {self.gpus} GPUs a host: no rails")
        return found


@dataclass(frozen=True)
class RailProblem(Rails):
    """Rows of `parts` bytes to every other host that one of a row's `fan` places lies on, once, to the GPU of this
    rank's index. places int32[tokens, fan]: numbers of all ranks, −1 for nowhere; those from base + host · stride on,
    `span` of them, lie on a host, and arrive there less the first of them. The first `rows` of `tokens` are sent.

    landing, of the same form on all ranks, takes in [hosts − 1, tokens] the rows of host s in block s − host − 1 (mod
    hosts): in each CHUNK tokens' worth those that came, in their order, then places of −1. `describes`: with values.
    """

    parts: tuple[int, ...]
    tokens: int
    fan: int
    describes: bool

    kernel = "rail"

    @property
    def messages(self) -> int:
        """Of a transfer from one rank to another."""
        return self.tokens // CHUNK * (len(self.parts) + 1 + self.describes)

    def arguments(self) -> tuple[Operand, ...]:
        """All extents are fixed: the kernel is launched by the driver, with addresses and scalars alone."""

        def whole(name: str, *lead: int) -> tuple[Operand, ...]:
            rows = tuple(Operand(f"{name}rows{i}", "u8", (*lead, size)) for i, size in enumerate(self.parts))
            values = (Operand(f"{name}values", "f32", (*lead, self.fan)),) if self.describes else ()
            return (*rows, Operand(f"{name}places", "i32", (*lead, self.fan)), *values)

        scalars = ("rows", "base", "stride", "span")
        return (*whole("", self.tokens), *whole("staged ", self.hosts - 1, self.tokens),
                *whole("landed ", self.hosts - 1, self.tokens), *(Operand(n, "i32", ()) for n in scalars))  # fmt: skip

    def configs(self, target: str) -> list[RdepConfig]:
        return [RdepConfig(blocks=16)]

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if any(size % 16 or size <= 0 for size in self.parts):
            found.append(f"parts {self.parts}: whole 16 bytes are copied")
        if self.tokens % CHUNK:
            found.append(f"{self.tokens} tokens: a multiple of {CHUNK}")
        return found

    def template(self, target: str) -> str:
        return f"rdep_rail.Rail{HARDWARE[target].capability[0]}0"


@dataclass(frozen=True)
class RailFlagProblem(Rails):
    """await: until the rows of all hosts have landed, `messages` from each. raise: tells their senders that they have
    been consumed."""

    action: Literal["await", "raise"]
    messages: int

    kernel = "rail flag"

    def arguments(self) -> tuple[Operand, ...]:
        return ()

    def template(self, target: str) -> str:
        name = "Await" if self.action == "await" else f"Raise{HARDWARE[target].capability[0]}0"
        return f"rdep_rail.{name}"
