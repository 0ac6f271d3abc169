"""Where every activation lies: liveness, in-place reuse and offsets in one arena."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALIGNMENT = 256  # bytes: TMA and vector loads need 128, and a scale-factor atom is 512 only in its own tensor


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer that is needed from call `start` to call `end`, both included, on the main stream's clock."""

    name: str
    bytes: int
    start: int
    end: int

    @property
    def room(self) -> int:
        """Bytes that it takes in the arena."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


def place(lifetimes: Iterable[Lifetime], turn: int) -> tuple[dict[str, int], int]:
    """Offsets in an arena, and the arena's bytes.

    Best fit in the order of time, in two regions: buffers that live across `turn`, the first backward call, in one
    and the others in the other, so that the many short-lived ones do not split the room of the long-lived.
    """
    short: list[Lifetime] = []
    long: list[Lifetime] = []
    for life in lifetimes:
        (long if life.start < turn <= life.end else short).append(life)
    offsets, base = _best_fit(long)
    rest, top = _best_fit(short)
    offsets.update({name: base + offset for name, offset in rest.items()})
    return offsets, base + top


def _best_fit(lifetimes: list[Lifetime]) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    holes: list[tuple[int, int]] = []  # (offset, bytes), sorted by offset, never adjacent
    ending: dict[int, list[tuple[int, int]]] = {}
    top = now = 0
    for life in sorted(lifetimes, key=lambda life: (life.start, -life.bytes)):
        while now < life.start:
            for block in ending.pop(now, ()):
                _release(holes, block)
            now += 1
        size = life.room
        fitting = [(bytes_, index) for index, (_, bytes_) in enumerate(holes) if bytes_ >= size]
        if fitting:
            bytes_, index = min(fitting)
            offset = holes[index][0]
            if bytes_ == size:
                del holes[index]
            else:
                holes[index] = (offset + size, bytes_ - size)
        elif holes and sum(holes[-1]) == top:
            offset = holes.pop()[0]  # grow the last hole
            top = offset + size
        else:
            offset, top = top, top + size
        offsets[life.name] = offset
        ending.setdefault(life.end, []).append((offset, size))
    return offsets, top


def _release(holes: list[tuple[int, int]], block: tuple[int, int]) -> None:
    low, high = 0, len(holes)
    while low < high:
        middle = (low + high) // 2
        if holes[middle][0] < block[0]:
            low = middle + 1
        else:
            high = middle
    holes.insert(low, block)
    if low + 1 < len(holes) and sum(holes[low]) == holes[low + 1][0]:
        holes[low] = (holes[low][0], holes[low][1] + holes.pop(low + 1)[1])
    if low and sum(holes[low - 1]) == holes[low][0]:
        holes[low - 1] = (holes[low - 1][0], holes[low - 1][1] + holes.pop(low)[1])


def peak(lifetimes: Iterable[Lifetime]) -> tuple[int, int]:
    """The most bytes alive at once and the call at which that is: the least any placement needs."""
    change: dict[int, int] = {}
    for life in lifetimes:
        size = life.room
        change[life.start] = change.get(life.start, 0) + size
        change[life.end + 1] = change.get(life.end + 1, 0) - size
    most = at = alive = 0
    for call in sorted(change):
        alive += change[call]
        if alive > most:
            most, at = alive, call
    return most, at


def largest(lifetimes: Iterable[Lifetime], at: int, count: int = 5) -> list[Lifetime]:
    """The largest buffers alive at a call, for the error of a plan that does not fit."""
    return sorted((life for life in lifetimes if life.start <= at <= life.end), key=lambda x: -x.bytes)[
        :count
    ]


def overlaps(lifetimes: Mapping[str, Lifetime], offsets: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of buffers that are alive at once and share bytes: empty for a correct plan."""
    order = sorted(lifetimes.values(), key=lambda life: life.start)
    alive: list[Lifetime] = []
    found = []
    for life in order:
        alive = [other for other in alive if other.end >= life.start]
        low, high = offsets[life.name], offsets[life.name] + life.bytes
        found += [
            (o.name, life.name) for o in alive if offsets[o.name] < high and low < offsets[o.name] + o.bytes
        ]
        alive.append(life)
    return found
