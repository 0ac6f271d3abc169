"""Where each parameter lies in flat buffers, and which rank updates which part: plain integers, for a run and its plan.

ZeRO-1 (arXiv 1910.02054): ranks that hold the same parameters own equal consecutive shares of them. An owner alone has
the FP32 masters and the moments of its share.

    segment   ┌ embed ──┬ q ──┬ kv ─┬ … ──┬ padding ┐    what the optimizer treats alike
    shares    ├ rank 0 ────┬ rank 1 ───┬ rank 2 ────┤    boundaries are those of no parameter
"""

from __future__ import annotations

from dataclasses import dataclass

from nmoe.graph import Graph
from nmoe.model import GROUPS, group_of, is_norm
from nmoe.ops import numel

# Elements on which parameters and shares begin: a row of rdep/sums.py in BF16, and a block of norm.py.
ALIGNMENT = 128


@dataclass(frozen=True)
class Segment:
    """A run of the flat gradient. `narrow`: the GEMMs read a copy rounded to BF16. `owners` ranks hold the same, of
    which this one is number `owner`."""

    group: str
    decayed: bool
    narrow: bool
    start: int
    end: int
    owners: int
    owner: int

    @property
    def share(self) -> int:
        """Elements that an owner updates."""
        return (self.end - self.start) // self.owners

    @property
    def own(self) -> slice:
        """This rank's share, counted from the segment's start."""
        return slice(self.owner * self.share, (self.owner + 1) * self.share)


@dataclass(frozen=True)
class Place:
    """A parameter's: elements of the flat gradient from `start` on, in segment number `segment`."""

    segment: int
    start: int
    shape: tuple[int, ...]


def layout(
    graph: Graph, rank: int = 0, world: int = 1, group: int = 1
) -> tuple[list[Segment], dict[str, Place]]:
    """Segments, experts last, and the place of each parameter that `rank` of `world` holds, of whom `group` consecutive
    ones share a set of experts."""

    def key(name: str) -> tuple[int, bool, bool]:
        return GROUPS.index(group_of(name)), is_norm(name), graph.tensors[name].format != "bf16"

    kinds: dict[tuple[int, bool, bool], list[str]] = {}
    for name in sorted((t.name for t in graph.of_kind("param")), key=key):
        kinds.setdefault(key(name), []).append(name)
    segments: list[Segment] = []
    places: dict[str, Place] = {}
    start = 0
    for (kind, norm, wide), names in kinds.items():
        expert = GROUPS[kind] == "expert"
        owners, owner = (world // group, rank // group) if expert else (world, rank)
        end = start
        for name in names:
            shape = tuple(int(d) for d in graph.tensors[name].shape)
            places[name] = Place(len(segments), end, shape)
            end += _padded(numel(shape), 1)
        end = start + _padded(end - start, owners)
        segments.append(Segment(GROUPS[kind], not norm, not wide, start, end, owners, owner))
        start = end
    return segments, places


def _padded(elements: int, parts: int) -> int:
    """The next number of elements that makes so many aligned parts."""
    return -(-elements // (parts * ALIGNMENT)) * parts * ALIGNMENT
