"""RDEP's kernels inside a host as the templates see them: what a rank sends, waits for and sums on a GPU.

    plan      count ── counts ──▶ place          choices → slots on the owners' ranks
    payload   move ── rows ──▶ await … raise     rows to their slots; consumed in place between the two
    return    move ── returns ──▶ combine        rows back, to (token, choice), and their sum

The transfers are those of nmoe.rdep.protocol: each kernel is one side of one. Addresses, epochs and the rank come from
device memory and launch scalars (LAYOUT), so that one object serves every rank, layer, batch and replay of a graph.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import TOKENS, Config, Operand, Problem

TILES, SLOTS = -4, -5  # dynamic extents: tiles of choices, slots or tokens that are moved
THREADS = 256
TILE = 1024  # choices that a thread block of `count` and `place` takes
LINE = 16  # int64 words between flags: 128 bytes
UNIT = 8  # rows that a warp returns at once, at most

# What `addresses` int64[ranks, len(COLUMNS)] holds: where each buffer of the symmetric heap lies on each rank.
COLUMNS = ("flags", "counts", "origin", "value", "data", "scale", "returned", "returned value")
# Words of `state` int64[len(STATE)], this rank's own: the epoch of the last transfer that it sent on each channel,
# thread blocks that are done, units that a launch of `move` has given out, whether a layer overflowed, ns that a wait
# may last, where the host reads of a fault, the number of the group's first rank in the run.
STATE = ("counts", "rows", "returns", "done", "taken", "overflow", "timeout", "report", "rails", "first")
FLAGS = ("counts.full", "counts.free", "rows.full", "rows.free", "returns.full", "returns.free", "rails.full",
         "rails.free")  # fmt: skip
# A fault, one row a peer of the host's report: what happened, to whom, in which layer, which flag and epoch was awaited
# and which seen (TIMEOUT), or how many rows would come and how many fit (OVERFLOW).
REPORT = ("kind", "rank", "peer", "layer", "flag", "expected", "seen")
TIMEOUT, OVERFLOW = 1, 2

Channel = Literal["rows", "returns"]


@dataclass(frozen=True)
class RdepConfig(Config):
    """Thread blocks of a launch; for `move` also warps of one, the stages of a warp's ring, rows of a stage and how
    many stages may still be read by stores when the next is loaded."""

    blocks: int = 1
    warps: int = THREADS // 32
    stages: int = 0
    rows: int = 1
    behind: int = 0

    def __str__(self) -> str:
        ring = f", ring of {self.stages} x {self.rows} rows, {self.behind} behind" if self.stages else ""
        return f"{self.blocks} blocks of {self.warps} warps{ring}"


@dataclass(frozen=True)
class RdepProblem(Problem):
    """`ranks` of the group, numbered host by host, of which `gpus` are on each host and address each other."""

    ranks: int
    gpus: int

    kernel: ClassVar[str]
    family: ClassVar[str] = "rdep"

    def __str__(self) -> str:
        return f"rdep {self.kernel}"

    @property
    def hosts(self) -> int:
        return self.ranks // self.gpus

    @abstractmethod
    def arguments(self) -> tuple[Operand, ...]:
        """What a kernel takes beside what all take."""

    def operands(self, config: RdepConfig) -> tuple[Operand, ...]:
        """All end with addresses, state, and the numbers of the rank and of the layer."""
        return (*self.arguments(), Operand("addresses", "i64", (self.ranks, len(COLUMNS))),
                Operand("state", "i64", (len(STATE),)), Operand("rank", "i32", ()),
                Operand("layer", "i32", ()))  # fmt: skip

    def configs(self, target: str) -> list[RdepConfig]:
        return [RdepConfig()]

    def untuned(self, target: str) -> RdepConfig:
        """The first of `configs`: what runs."""
        return self.configs(target)[0]

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = []
        if not 1 <= self.ranks <= THREADS:
            found.append(f"{self.ranks} ranks: a thread each computes its segments, 1 to {THREADS}")
        if self.ranks % self.gpus:
            found.append(f"{self.ranks} ranks: a multiple of the {self.gpus} GPUs of a host")
        used = self.shared_bytes(config, target)
        if used > HARDWARE[target].shared:
            found.append(f"{used} bytes of shared memory: a thread block has {HARDWARE[target].shared}")
        return found

    def shared_bytes(self, config: RdepConfig, target: str) -> int:
        return 1024

    def clusters(self, config: RdepConfig, sms: int) -> int:
        return config.blocks

    def flops(self, rows: int) -> float:
        return 0.0

    def bytes(self, rows: int) -> float:
        extents = {TOKENS: rows, SLOTS: rows, TILES: -(-rows // TILE)}
        return float(sum(operand.bytes(extents) for operand in self.operands(RdepConfig())))

    def small(self) -> RdepProblem:
        return replace(self, ranks=2, gpus=2)


@dataclass(frozen=True)
class Plan(RdepProblem):
    """`experts` of all ranks, `topk` choices a token. count: a tile's choices by expert, and their sum to all ranks."""

    experts: int
    topk: int

    def choices(self) -> tuple[Operand, ...]:
        """slots: first a choice's place among those of its tile for its expert, then its destination."""
        return (Operand("indices", "i32", (TOKENS, self.topk)), Operand("slots", "i32", (TOKENS, self.topk)),
                Operand("tiles", "i32", (TILES, self.experts)))  # fmt: skip

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if self.experts % self.ranks or self.experts > 1024:
            found.append(f"{self.experts} experts: a multiple of {self.ranks} ranks, at most 1024")
        return found

    def shared_bytes(self, config: RdepConfig, target: str) -> int:
        return (THREADS // 32) * (self.experts + 1) * 4 + 1024


@dataclass(frozen=True)
class CountProblem(Plan):
    """slots int32[T, k] and tiles int32[⌈T·k / TILE⌉, experts]: of this rank's choices, how many precede each within
    its tile and its tile within the rank, for the same expert. Sends the rank's counts to all of its host."""

    kernel = "count"

    def arguments(self) -> tuple[Operand, ...]:
        return self.choices()

    def template(self, target: str) -> str:
        return "rdep_plan.Count"


@dataclass(frozen=True)
class PlaceProblem(Plan):
    """slots int32[T, k] becomes owner · capacity + slot; order int32[T, k]: the numbers of this rank's choices in the
    order of their experts, and so of their slots. offsets int32[local + 1] and ends int32[local]: where the segments
    of this rank's experts begin, padded to `align` rows, and where their rows end. Of several hosts, bases
    int32[hosts − 1]: where, on the host so many + 1 after this one, this rank's returns land. Waits for all counts."""

    align: int

    kernel = "place"

    def arguments(self) -> tuple[Operand, ...]:
        local = self.experts // self.ranks
        return (*self.choices(), Operand("order", "i32", (TOKENS, self.topk)),
                Operand("offsets", "i32", (local + 1,)), Operand("ends", "i32", (local,)),
                *((Operand("bases", "i32", (self.hosts - 1,)),) if self.hosts > 1 else ()),
                Operand("capacity", "i32", ()))  # fmt: skip

    def template(self, target: str) -> str:
        return "rdep_plan.Place"

    def shared_bytes(self, config: RdepConfig, target: str) -> int:
        return super().shared_bytes(config, target) + 4 * self.hosts**2


@dataclass(frozen=True)
class MoveProblem(RdepProblem):
    """Rows of `parts` bytes to where `places` says, one number of rank · rows + row each, −1 for nowhere.

    rows: token t goes to `topk` slots; padding becomes zero. `describes`: the slots learn whose they are (origin =
    rank · choices + choice) and their router weights, as the first dispatch of a layer must; later ones reuse it.
    They are told in the `order` of the slots, so that 32 lie side by side.
    returns: each slot's row goes to its origin, with its value if `describes`.

    `of` several hosts there are two launches: the near rows, with a place on this host; then those that have landed
    from others, which bring their places and the origins of their first choices or, of returns, how many came.
    """

    channel: Channel
    parts: tuple[int, ...]
    topk: int
    local: int  # experts of a rank
    describes: bool
    of: Literal["all", "near", "landed"] = "all"

    kernel = "move"

    @property
    def counted(self) -> bool:
        """Whether `count` says where rows lie: returns that have landed."""
        return self.of == "landed" and self.channel == "returns"

    @property
    def fan(self) -> int:
        """Destinations of a row."""
        return self.topk if self.channel == "rows" else 1

    def arguments(self) -> tuple[Operand, ...]:
        rows = tuple(Operand(f"rows{i}", "u8", (SLOTS, size)) for i, size in enumerate(self.parts))
        values = (Operand("values", "f32", (SLOTS, self.fan)),) if self.describes else ()
        told: tuple[Operand, ...] = ()
        if self.channel == "rows" and self.describes:
            whole = Operand("order", "i32", (SLOTS, self.fan))
            told = (Operand("origins", "i32", (SLOTS, 1)) if self.of == "landed" else whole,)
        if self.counted:
            told = (Operand("count", "i32", (self.hosts - 1, 2)),)
        return (*rows, *values, Operand("places", "i32", (SLOTS, self.fan)), *told,
                Operand("offsets", "i32", (self.local + 1,)), Operand("ends", "i32", (self.local,)),
                Operand("capacity", "i32", ()), Operand("choices", "i32", ()))  # fmt: skip

    def configs(self, target: str) -> list[RdepConfig]:
        """Of each number of thread blocks and warps the deepest ring that fits, half of it behind. The first is what
        runs untuned: within 2 % of the fastest on two H100s (docs/rdep.md). Returns take more blocks than rows, for
        they load as much as they store."""
        rows, numbers = (1, (24, 16, 32)) if self.channel == "rows" else (
            max(1, min(UNIT, 8192 // sum(self.parts))), (32, 24, 64))  # fmt: skip
        found = []
        for blocks, warps in product(numbers, (8, 4)):
            for stages in range(16, 2, -1):
                config = RdepConfig(blocks, warps, stages, rows, stages // 2)
                if not self.violations(config, target):
                    found.append(config)
                    break
        return found

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if any(size % 16 or size <= 0 for size in self.parts) or not 1 <= len(self.parts) <= 2:
            found.append(f"parts {self.parts}: one or two, of whole 16 bytes, are copied in bulk")
        if not 1 <= config.behind <= config.stages - 2:
            found.append(f"{config.behind} of {config.stages} stages behind: at least 1, at most all but 2")
        if config.rows * self.fan > 32 or 128 % config.rows:
            found.append(f"{config.rows} rows of {self.fan} destinations: a lane each, a divisor of 128")
        if not 1 <= config.warps <= 31:
            found.append(f"{config.warps} warps: 1 to 31, and one for padding")
        return found

    def shared_bytes(self, config: RdepConfig, target: str) -> int:
        return config.warps * config.stages * (config.rows * sum(self.parts) + 8) + 1024

    def template(self, target: str) -> str:
        return "rdep_move.Move"


@dataclass(frozen=True)
class FlagProblem(RdepProblem):
    """await: until every rank's rows have arrived. raise: tells every rank that they have been consumed."""

    action: Literal["await", "raise"]

    kernel = "flag"

    def arguments(self) -> tuple[Operand, ...]:
        return ()

    def template(self, target: str) -> str:
        return "rdep_link.Await" if self.action == "await" else "rdep_link.Raise"


@dataclass(frozen=True)
class CombineProblem(RdepProblem):
    """y bf16[T, width]: the FP32 sum of each token's returned rows in the order of its choices. Waits for returns."""

    topk: int
    width: int

    kernel = "combine"

    def arguments(self) -> tuple[Operand, ...]:
        return (Operand("y", "bf16", (TOKENS, self.width)),)

    def configs(self, target: str) -> list[RdepConfig]:
        return [RdepConfig(blocks=4 * HARDWARE[target].sms)]

    def violations(self, config: RdepConfig, target: str) -> list[str]:
        found = super().violations(config, target)
        if self.width % 8:
            found.append(f"width {self.width}: a thread sums 16 bytes, a multiple of 8")
        return found

    def template(self, target: str) -> str:
        return "rdep_combine.Combine"
