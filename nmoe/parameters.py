"""The model's parameters: gradients, the weights that the GEMMs read, and the FP32 masters of this rank's share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe.checkpoint_parts import Part
from nmoe.executor import DTYPES
from nmoe.graph import Graph
from nmoe.model import group_of, is_norm
from nmoe.ops import numel
from nmoe.shards import Segment, layout


@dataclass(frozen=True)
class Shard:
    """A segment on this rank: gradient and weights whole, [n] each, and the master of its share. Weights in FP32 are
    their own master."""

    segment: Segment
    grad: Tensor
    weights: Tensor
    master: Tensor

    @property
    def own_grad(self) -> Tensor:
        return self.grad[self.segment.own]

    @property
    def own_weights(self) -> Tensor:
        return self.weights[self.segment.own]


class Parameters:
    """What rank `rank` of `world` holds, `group` consecutive ones sharing a set of experts. `grad`: one flat tensor;
    `shards`: parts of it and what belongs to them; `grads`, `weights`: views by parameter name. The padding between
    parameters is zero and stays zero."""

    def __init__(
        self,
        graph: Graph,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
        group: int = 1,
    ) -> None:
        segments, self._places = layout(graph, rank, world, group)
        wide = DTYPES["f64" if any(t.format == "f64" for t in graph.of_kind("param")) else "f32"]
        self._share = rank % group  # of the experts
        self.grad = torch.zeros(segments[-1].end, dtype=wide, device=device)
        self.shards: list[Shard] = []
        for s in segments:
            weights = torch.zeros(s.end - s.start, dtype=torch.bfloat16 if s.narrow else wide, device=device)
            master = torch.zeros(s.share, dtype=wide, device=device) if s.narrow else weights[s.own]
            self.shards.append(Shard(s, self.grad[s.start : s.end], weights, master))
        self.grads = self._views([shard.grad for shard in self.shards])
        self.weights = self._views([shard.weights for shard in self.shards])

    def _views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Each parameter's part of tensors that are the segments."""
        views = {}
        for name, place in self._places.items():
            at = place.start - self.shards[place.segment].segment.start
            views[name] = flats[place.segment][at : at + numel(place.shape)].view(place.shape)
        return views

    def masters(self) -> dict[str, Tensor]:
        """By parameter name, of a rank that shares nothing with others."""
        assert all(shard.segment.owners == 1 for shard in self.shards)
        return self._views([shard.master for shard in self.shards])

    def _pieces(self) -> Iterator[tuple[str, Shard, int, tuple[int, ...]]]:
        """(name, shard, first element there, shape) of each parameter, each expert's by itself under
        `<name>.<expert>`, the expert's number among all ranks'."""
        for name, place in self._places.items():
            shard = self.shards[place.segment]
            at = place.start - shard.segment.start
            if group_of(name) != "expert":
                yield name, shard, at, place.shape
                continue
            count, shape = place.shape[0], place.shape[1:]
            for i in range(count):
                yield f"{name}.{self._share * count + i}", shard, at + i * numel(shape), shape

    def parts(self, flats: Sequence[Tensor]) -> dict[str, Part]:
        """Of tensors that are this rank's shares of the segments, what belongs to each piece, if anything does."""
        flat = dict(zip(map(id, self.shards), flats, strict=True))
        parts = {}
        for name, shard, at, shape in self._pieces():
            size, own = numel(shape), shard.segment.own
            first, end = max(at, own.start), min(at + size, own.stop)
            if first < end:
                parts[name] = Part(flat[id(shard)][first - own.start : end - own.start], first - at, size)
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """What an executor binds: weights by name, gradients as `<name>.grad`."""
        return self.weights | {f"{name}.grad": grad for name, grad in self.grads.items()}

    def assign(self, name: str, values: Tensor) -> None:
        """Sets a parameter; of experts, those that this rank holds."""
        place = self._places[name]
        shard = self.shards[place.segment]
        _set(shard, place.start - shard.segment.start, values)

    def initialise(self, seed: int, std: float) -> None:
        """Normal(0, std) matrices and unit norms. Each parameter, and each expert, draws from a generator of its
        own, so that the values depend on the seed and the name alone, not on who else holds what or in which order."""

        def draw(piece: tuple[str, Shard, int, tuple[int, ...]]) -> None:
            name, shard, at, shape = piece
            values = torch.ones(shape) if is_norm(name) else _normal(shape, seed, name, std)
            _set(shard, at, values)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # torch draws without the GIL
            list(threads.map(draw, self._pieces()))

    def refresh(self) -> None:
        """Rounds the masters into this rank's share of the weights."""
        for shard in self.shards:
            if shard.segment.narrow:
                shard.own_weights.copy_(shard.master)


def _set(shard: Shard, at: int, values: Tensor) -> None:
    """Weights from element `at` on, and what lies in this rank's share of the master."""
    own, end = shard.segment.own, at + values.numel()
    flat = values.reshape(-1)
    shard.weights[at:end].copy_(flat)
    first, last = max(at, own.start), min(end, own.stop)
    if first < last:
        shard.master[first - own.start : last - own.start].copy_(flat[first - at : last - at])


def _normal(shape: tuple[int, ...], seed: int, name: str, std: float) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
