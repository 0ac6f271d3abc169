"""Sums over ranks in the order of one fixed tree, so that the same terms give the same bits on any number of ranks.

The terms are paired: (0 + 1), (2 + 3), …, then those sums, and so on; a last one without a partner waits. Aligned
blocks of 2^n terms are subtrees. Hence a rank, or a group of ranks, that holds such a block may add its own terms
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nmoe.rdep.transfer import Transfers
from nmoe.rdep.transport import Buffer

ROW = 64  # elements; a tensor to be summed is a multiple of it
SLICE = 4096  # rows that a rank adds at a time


def buffers(ranks: int, slice: int = SLICE) -> dict[str, Buffer]:
    """What a transport must hold for `Sums` among so many ranks."""
    rows = Buffer((ranks * slice, ROW), torch.float32)
    return {"terms.data": rows, "totals.data": rows}


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the terms in the tree's order, in a tensor of its own unless there is one term."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + list(terms[len(pairs) * 2 :])
    return terms[0]


class Sums:
    """A tensor's rows are cut into as many equal slices as there are members, in their order. Slices travel a piece
    after the other, and every piece by both transfers, though one may carry nothing: its flags say that what the other
    brought has been read. Every rank has a block of its own in the buffers of each, so that sums among some ranks meet
    none among others."""

    def __init__(self, transfers: Transfers, slice: int = SLICE) -> None:
        self._transfers, self._slice = transfers, slice

    def add(self, tensor: Tensor, members: Sequence[int]) -> None:
        """Replaces FP32 tensor[n·ROW] by its sum over the ranks `members`, in their order, on all of them. The
        other ranks do the same meanwhile, in groups of the same size."""
        self._exchange(tensor, members, reduce=True, gather=True)

    def reduce_scatter(self, tensor: Tensor, members: Sequence[int]) -> None:
        """The same of each member's own slice; the others keep its terms."""
        self._exchange(tensor, members, reduce=True, gather=False)

    def all_gather(self, tensor: Tensor, members: Sequence[int]) -> None:
        """Replaces each slice by its member's. Of any type, in whole rows of ROW · 4 bytes."""
        self._exchange(tensor, members, reduce=False, gather=True)

    def _exchange(self, tensor: Tensor, members: Sequence[int], *, reduce: bool, gather: bool) -> None:
        if len(members) == 1:
            return
        transfers = self._transfers.among(members)
        t = transfers.transport
        rows = tensor.view(torch.float32).view(-1, ROW)
        share = -(-len(rows) // t.ranks)
        blocks = [member * self._slice for member in members]  # where each rank's begins
        peers = [(t.rank + i) % t.ranks for i in range(1, t.ranks)]
        for start in range(0, share, self._slice):
            slices = [rows[i * share : (i + 1) * share][start : start + self._slice] for i in range(t.ranks)]
            mine = slices[t.rank]

            def put(buffer: str, pieces: list[Tensor]) -> None:
                for peer in peers:
                    index = torch.arange(len(pieces[peer])) + blocks[t.rank]
                    t.put(peer, buffer, index, pieces[peer])

            def add(mine: Tensor = mine) -> None:
                terms = t.local("terms.data")
                parts = [mine if i == t.rank else terms[at : at + len(mine)] for i, at in enumerate(blocks)]
                mine.copy_(tree_sum(parts))

            def read(slices: list[Tensor] = slices) -> None:
                totals = t.local("totals.data")
                for peer in peers:
                    slices[peer].copy_(totals[blocks[peer] : blocks[peer] + len(slices[peer])])

            terms = (partial(put, "terms.data", slices), add) if reduce else _NOTHING
            totals = (partial(put, "totals.data", [mine] * t.ranks), read) if gather else _NOTHING
            transfers.run("terms", *terms)
            transfers.run("totals", *totals)


_NOTHING = (lambda: None, lambda: None)
