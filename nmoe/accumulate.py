"""What the micro-batches of a step add up to, in the tree order of nmoe/rdep/sums.py: the same bits however many ranks
share them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nmoe.rdep.sizes import depth


class Accumulator:
    """Sums `tensors` over `terms` micro-batches. Each finds `cleared`, of which they are parts, at zero and adds to it.
    Further ones are added in place."""

    def __init__(
        self, tensors: Sequence[torch.Tensor], terms: int, *, cleared: Sequence[torch.Tensor]
    ) -> None:
        self._tensors, self._terms, self._cleared = tensors, terms, cleared
        self._partial = [[torch.empty_like(t) for t in tensors] for _ in range(depth(terms) - 1)]
        self._held: list[int] = []  # terms in each partial sum in use
        self._done = 0

    def begin(self) -> None:
        self._held, self._done = [], 0
        self._zero()

    def add(self) -> None:
        """Call after each micro-batch; after the last one `tensors` hold the sums."""
        self._done += 1
        last, terms = self._done >= self._terms, 1
        while self._held and (last or self._held[-1] == terms):
            terms += self._held.pop()
            for tensor, partial in zip(self._tensors, self._partial[len(self._held)], strict=True):
                tensor.add_(partial)
        if not last:
            for tensor, partial in zip(self._tensors, self._partial[len(self._held)], strict=True):
                partial.copy_(tensor)
            self._held.append(terms)
            self._zero()

    def _zero(self) -> None:
        for tensor in self._cleared:
            tensor.zero_()
