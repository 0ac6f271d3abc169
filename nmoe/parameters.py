"""The model's parameters: FP32 masters and gradients in flat buffers, and the copies that the GEMMs read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nmoe.executor import DTYPES
from nmoe.graph import Graph
from nmoe.model import GROUPS, group_of, is_norm

ALIGNMENT = 64  # elements: every parameter starts on a cache line, in BF16 too


@dataclass(frozen=True)
class Segment:
    """A run of the flat buffers that the optimizer treats alike; `narrow`: the GEMMs read a rounded copy."""

    group: str
    decayed: bool
    narrow: bool
    start: int
    end: int


class Parameters:
    """`master`, `grad`: one flat tensor each; `masters`, `grads`, `working`: views of them by parameter name.

    A parameter whose working format is the master's own has no copy: its working view is the master's. The padding
    between parameters is zero and stays zero. Experts come last, from element `experts` on; `share` says which of
    `[rdep] ranks` equal shares of them the graph holds.
    """

    def __init__(self, graph: Graph, device: torch.device | str = "cpu", share: int = 0) -> None:
        def key(name: str) -> tuple:
            spec = graph.tensors[name].spec
            return GROUPS.index(group_of(name)), is_norm(name), spec.format != "bf16"

        names = sorted((t.name for t in graph.of_kind("param")), key=key)
        wide = DTYPES["f64" if any(graph.tensors[n].format == "f64" for n in names) else "f32"]
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.segments: list[Segment] = []
        size = 0
        for name in names:
            shape = tuple(int(d) for d in graph.tensors[name].shape)
            places[name] = (size, shape)
            end = size + -(-_count(shape) // ALIGNMENT) * ALIGNMENT
            group, norm, is_wide = key(name)
            last = self.segments[-1] if self.segments else None
            if last and (last.group, last.decayed, last.narrow) == (GROUPS[group], not norm, not is_wide):
                self.segments[-1] = Segment(last.group, last.decayed, last.narrow, last.start, end)
            else:
                self.segments.append(Segment(GROUPS[group], not norm, not is_wide, size, end))
            size = end
        self.experts = next((s.start for s in self.segments if s.group == "expert"), size)
        self._share = share
        self.master, self.grad = (torch.zeros(size, dtype=wide, device=device) for _ in range(2))
        narrow_size = size if any(s.narrow for s in self.segments) else 0
        self.narrow = torch.zeros(narrow_size, dtype=torch.bfloat16, device=device)
        self._places = places
        self.masters, self.grads = self.views(self.master), self.views(self.grad)
        copies = self.views(self.narrow) if narrow_size else {}
        self.working = {n: copies[n] if graph.tensors[n].format == "bf16" else self.masters[n] for n in names}

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each parameter's part of a flat buffer of this layout."""
        return {n: flat[at : at + _count(shape)].view(shape) for n, (at, shape) in self._places.items()}

    def pieces(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, each expert's part by itself under `<name>.<expert>`, the expert's number among all ranks'."""
        parts: dict[str, torch.Tensor] = {}
        for name, view in self.views(flat).items():
            if group_of(name) == "expert":
                first = self._share * len(view)
                parts |= {f"{name}.{first + i}": weight for i, weight in enumerate(view)}
            else:
                parts[name] = view
        return parts

    def tensors(self) -> dict[str, torch.Tensor]:
        """What an executor binds: working copies by name, gradients as `<name>.grad`."""
        return self.working | {f"{name}.grad": grad for name, grad in self.grads.items()}

    def initialise(self, seed: int, std: float) -> None:
        """Normal(0, std) matrices and unit norms. Each parameter, and each expert, draws from a generator of its
        own, so that the values depend on the seed and the name alone, not on who else holds what or in which order."""

        def draw(piece: tuple[str, torch.Tensor]) -> None:
            name, master = piece
            if is_norm(name):
                master.fill_(1.0)
            else:
                _normal(master, seed, name, std)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # torch draws without the GIL
            list(threads.map(draw, self.pieces(self.master).items()))
        self.refresh()

    def refresh(self, segments: Iterable[Segment] | None = None) -> None:
        """Rounds the masters into the working copies."""
        for s in segments or self.segments:
            if s.narrow:
                self.narrow[s.start : s.end].copy_(self.master[s.start : s.end])


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _normal(out: torch.Tensor, seed: int, name: str, std: float) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    out.copy_(torch.empty(out.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
