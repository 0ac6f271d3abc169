"""What every kernel family states of its kernels, so that they are compiled, cached, tuned, verified, launched alike.

A `Problem` holds all that changes the generated code; what is passed at launch (token counts, scalars, seeds) is not in
it. A `Config` says how the code is cut. Nothing here needs the compiler, so that kernels can be matched and listed
without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from nmoe.errors import UserError
from nmoe.storage import ATOM_BYTES, ATOM_ROWS, ATOM_SCALES, BLOCK

# Dynamic extents, known at launch: expert rows of the rank (spec.py's "R"), its tokens ("T"), positions of the rotary
# table ("S"), elements of a segment of parameters ("P").
ROWS, TOKENS, POSITIONS, PARAMETERS = -1, -2, -3, -4
EXTENTS = {"R": ROWS, "T": TOKENS, "S": POSITIONS, "P": PARAMETERS}
COUNTS = {"tokens": TOKENS, "parameters": PARAMETERS}  # those that Triton's functions take as arguments

VECTOR = 8  # BF16 in the 16 bytes that a thread loads at once

PARTS = 8  # codes of whole extents end above -PARTS; `per` puts a divisor below


def per(extent: int, size: int) -> int:
    """⌈extent / size⌉; of a dynamic extent a code for it, in which a shape states blocks or atoms of rows."""
    return -(-extent // size) if extent >= 0 else extent - PARTS * size


def resolve(extent: int, extents: dict[int, int]) -> int:
    """The number that an extent stands for where ROWS and the others are `extents`. Raises KeyError when the dynamic
    extent that it is a part of is not among them."""
    if extent >= 0:
        return extent
    size, base = divmod(-extent - 1, PARTS)
    return -(-extents[-base - 1] // max(1, size))


Format = Literal["bf16", "f32", "i32", "i64", "u8", "e4m3", "bool"]
BYTES: dict[Format, int] = {"bf16": 2, "f32": 4, "i32": 4, "i64": 8, "u8": 1, "e4m3": 1, "bool": 1}


@dataclass(frozen=True)
class Operand:
    """A kernel argument: `shape`, row-major, may hold dynamic extents and parts of them (`per`). () is a scalar passed
    at launch."""

    name: str
    format: Format
    shape: tuple[int, ...]

    def bytes(self, extents: dict[int, int]) -> int:
        """Of a tensor whose dynamic extents are `extents`."""
        return math.prod(resolve(n, extents) for n in self.shape) * BYTES[self.format]


# What a value of a format is stored in: its own, or a quantized one's data, scale and amax.
BUFFERS: dict[str, tuple[Format, ...]] = {"mxfp8": ("u8", "u8"), "nvfp4": ("u8", "u8", "f32")}


def stored_formats(format: str) -> tuple[str, ...]:
    return BUFFERS.get(format, (format,))


def quantized(
    name: str, format: str, shape: tuple[int, ...], axis: int, amax: tuple[int, ...], atoms: bool
) -> tuple[Operand, ...]:
    """The buffers of a value [..., M, K] quantized along `axis`: storage.storage, for shapes with dynamic extents."""
    *lead, m, k = shape
    lines, length = (m, k) if axis else (k, m)
    block = BLOCK[format]
    scale: tuple[int, ...] = (lines, per(length, block))
    if atoms:
        scale = (per(lines, ATOM_ROWS), per(length, block * ATOM_SCALES), ATOM_BYTES)
    data = shape if format == "mxfp8" else (*lead, lines, per(length, 2))
    parts = (Operand(name, "u8", data), Operand(f"{name}_scale", "u8", (*lead, *scale)))
    return parts if format == "mxfp8" else (*parts, Operand(f"{name}_amax", "f32", amax))


@dataclass(frozen=True)
class Config:
    """How a kernel is cut; each family has its own fields."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Launch:
    """One function of a Triton template: its arguments, which are operands, scalars and COUNTS; its
    constants; warps and stages; and the grid for the values of its arguments that are numbers."""

    function: str
    arguments: tuple[str, ...]
    constants: Mapping[str, int]
    warps: int
    stages: int
    grid: Callable[[Mapping[str, Any]], tuple[int, int, int]]


@dataclass(frozen=True)
class Problem(ABC):
    """What a kernel computes, as its template sees it. Subclasses are frozen dataclasses of plain values."""

    family: ClassVar[str]
    language: ClassVar[Literal["cutedsl", "triton"]] = "cutedsl"  # of its template

    @abstractmethod
    def operands(self, config: Any) -> tuple[Operand, ...]:
        """The arguments in call order: the spec's stored inputs in the order of first use, its stored outputs (a
        quantized value is its buffers, in formats' order), then workspace, then scalars. The number of clusters and
        the stream follow."""

    @abstractmethod
    def configs(self, target: str) -> Sequence[Any]:
        """Every legal config worth timing."""

    @abstractmethod
    def violations(self, config: Any, target: str) -> list[str]:
        """Why a config cannot be built: each limit with what was found; empty for a legal one."""

    @abstractmethod
    def shared_bytes(self, config: Any, target: str) -> int:
        """Shared memory of a thread block."""

    @abstractmethod
    def template(self, target: str) -> str:
        """ "module.Class" under nmoe.codegen.templates. `Class(problem, config)` is called with the operands, the
        number of clusters and the stream. In Triton the module of the functions that `launches` names."""

    def launches(self, config: Any) -> tuple[Launch, ...]:
        """What a Triton kernel launches, in order."""
        raise NotImplementedError(f"{self.family} is not written in Triton")

    @abstractmethod
    def clusters(self, config: Any, sms: int) -> int:
        """How many clusters a launch on a device of `sms` multiprocessors asks for."""

    @abstractmethod
    def flops(self, rows: int) -> float:
        """Of one launch on `rows` rows or tokens."""

    @abstractmethod
    def bytes(self, rows: int) -> float:
        """Least traffic of one launch: every operand once."""

    @abstractmethod
    def small(self) -> Problem:
        """The member of this problem's family (same code paths, other sizes) that the emulator runs."""

    def require_legal(self, config: Any, target: str) -> None:
        if found := self.violations(config, target):
            raise IllegalConfig(f"{self} for {target}, {config}: {'; '.join(found)}")


class IllegalConfig(UserError):
    """A config that breaks a limit of the target."""
