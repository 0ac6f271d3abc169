"""Where expert rows go: pure integer functions of the counts that the ranks of a group exchange.

A row is one (token, k) choice. The experts lie on the ranks in equal contiguous blocks; a rank holds its experts' rows
ordered by (expert, source rank, token, k), each expert's segment padded to `align` rows. When the ranks hold
consecutive tokens this is the order of one rank that holds them all, so that an expert's GEMM, and the sums of its
weight gradient, see the same rows in the same order whatever the number of ranks.

Every rank computes the whole plan from the same matrix, so that all decide alike without asking each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe.rdep.sizes import CapacityError


@dataclass(frozen=True)
class Plan:
    """`counts` int64[ranks, experts]: rows that a source sends to an expert. `base`, alike: the slot, on the expert's
    rank, of the first of them. `offsets` int64[ranks, local + 1]: the first slot of each of a rank's `local` experts;
    the last is the rank's total, padding included."""

    counts: Tensor
    base: Tensor
    offsets: Tensor

    @property
    def totals(self) -> list[int]:
        """Slots in use on each rank."""
        return self.offsets[:, -1].tolist()

    def sources(self, rank: int) -> Tensor:
        """int64[total of the rank]: the rank that each slot's row comes from, −1 on padding."""
        ranks, local = len(self.counts), self.offsets.shape[1] - 1
        runs = torch.empty(
            local, ranks + 1, dtype=torch.int64
        )  # an expert's rows of every source, then its padding
        runs[:, :-1] = self.counts[:, rank * local : (rank + 1) * local].T
        runs[:, -1] = self.offsets[rank].diff() - runs[:, :-1].sum(1)
        source = torch.arange(ranks + 1)
        source[-1] = -1
        return source.repeat(local).repeat_interleave(runs.view(-1))


def count(indices: Tensor, experts: int) -> Tensor:
    """int64[experts]: how many of the choices indices[T, k] fall on each expert."""
    return torch.bincount(indices.reshape(-1), minlength=experts)


def plan(counts: Tensor, align: int) -> Plan:
    """The plan of counts int64[ranks, experts], `experts` being a multiple of `ranks`."""
    ranks, experts = counts.shape
    padded = (counts.sum(0) + (align - 1)) // align * align
    offsets = counts.new_zeros(ranks, experts // ranks + 1)
    torch.cumsum(padded.view(ranks, -1), 1, out=offsets[:, 1:])
    before = counts.cumsum(0) - counts  # rows of the lower ranks for the same expert
    return Plan(counts, offsets[:, :-1].reshape(-1) + before, offsets)


def check_capacity(plan: Plan, capacity: int) -> None:
    """Raises CapacityError when the rows of any rank do not fit `capacity`, with the same words on every rank."""
    need = max(plan.totals)
    if need > capacity:
        full = plan.totals.index(need)
        raise CapacityError(
            f"rank {full} of {len(plan.totals)} would receive {need} expert rows, the capacity is {capacity}: raise "
            f"[rdep] capacity to at least {need}, or set it to 0 for the worst case"
        )


def place(plan: Plan, indices: Tensor, source: int) -> tuple[Tensor, Tensor]:
    """(owner, slot), both int64[T, k]: the rank that takes each of `source`'s choices, and the row there."""
    flat = indices.reshape(-1).long()
    local = plan.offsets.shape[1] - 1
    ranked, order = torch.sort(flat, stable=True)
    own = plan.counts[source]
    first = own.cumsum(0) - own  # of each expert's choices in the sorted order
    position = torch.empty_like(flat)
    position[order] = torch.arange(len(flat)) - first[ranked]
    slot = plan.base[source][flat] + position
    return (flat // local).view(indices.shape), slot.view(indices.shape)
