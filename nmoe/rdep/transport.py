"""What moves rows between the ranks of a group: one small interface, part of a group, and the group of one rank.

A transport gives every rank the same named buffers and lets each write into its peers': the model of symmetric memory.
It orders nothing but what its flags order; `ordered=False` asks for a flag that orders nothing, which only tests do.
shm.py serves processes of one host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nmoe.errors import UserError
from nmoe.rdep.protocol import PROTOCOL

FLAGS = tuple(f"{channel}.{flag}" for channel in PROTOCOL for flag in ("full", "free"))


class Missing(UserError):
    """A rank of the group did not answer in time; the message names the one on which all wait in the end."""

    exit_code = 4


class Buffer(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Transport(Protocol):
    rank: int
    ranks: int

    def local(self, buffer: str) -> Tensor:
        """This rank's buffer, to read; a peer may write to it until a flag says otherwise."""

    def put(self, peer: int, buffer: str, index: Tensor, values: Tensor) -> None:
        """peer's buffer[index] = values: index int64[n], values[n, …] of the buffer's dtype."""

    def raise_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        """Sets this rank's word of a flag on `peer`. A release: whoever waits for it sees all puts before it."""

    def wait_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        """Returns when `peer` has raised the flag here for `epoch` or a later one. An acquire. Raises Missing."""


class Part:
    """Some ranks of a transport as a group of their own, numbered in the order of `members`."""

    def __init__(self, whole: Transport, members: Sequence[int]) -> None:
        self._whole, self._members = whole, members
        self.rank, self.ranks = members.index(whole.rank), len(members)

    def local(self, buffer: str) -> Tensor:
        return self._whole.local(buffer)

    def put(self, peer: int, buffer: str, index: Tensor, values: Tensor) -> None:
        self._whole.put(self._members[peer], buffer, index, values)

    def raise_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        self._whole.raise_flag(self._members[peer], flag, epoch, ordered=ordered)

    def wait_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        self._whole.wait_flag(self._members[peer], flag, epoch, ordered=ordered)


class Local:
    """The group of one rank: its buffers, and no flag that anyone would wait for."""

    rank, ranks = 0, 1

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        self._buffers = {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in buffers.items()}

    def local(self, buffer: str) -> Tensor:
        return self._buffers[buffer]

    def put(self, peer: int, buffer: str, index: Tensor, values: Tensor) -> None:
        self._buffers[buffer].index_copy_(0, index, values)

    def raise_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        raise AssertionError("a group of one rank has no peers")

    wait_flag = raise_flag

    def arrive(self) -> None:
        pass

    def dead(self) -> list[int]:
        return []

    late = dead
