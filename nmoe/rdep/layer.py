"""The ops of an expert-parallel layer on several ranks: what their references in nmoe/ops/moe.py are on one.

A slot is a row of the buffers of all ranks of the group, one after the other: rank · R + row. A row's source is a
choice of all their tokens, likewise. On one rank both are what the references write.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmoe.formats import buffers
from nmoe.graph import Op
from nmoe.rdep.exchange import Exchange, Routing


class Layer:
    """Binds `moe_plan`, `dispatch` and `combine` to an exchange that all layers share."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.implementations = {
            kind: partial(partial, run)
            for kind, run in (
                ("moe_plan", self._plan),
                ("dispatch", self._dispatch),
                ("combine", self._combine),
            )
        }

    def _plan(self, op: Op, ins: list[Any], outs: list[Any]) -> None:
        (indices,), (slots, row_source, offsets, load, runs) = ins, outs
        rank = self._exchange.transport.rank
        plan, routing = self._exchange.plan(indices, op.attrs["experts"], op.attrs["align"])
        total = plan.totals[rank]
        slots.view(-1).copy_(routing.owner * len(row_source) + routing.slot)
        source = routing.source * slots.numel() + routing.choice
        row_source[:total].copy_(source.masked_fill_(routing.source < 0, -1))
        row_source[total:].fill_(-1)
        offsets.copy_(plan.offsets[rank])
        if runs is not None:
            local = len(offsets) - 1
            runs[:-1].view(local, -1).copy_(plan.base[:, rank * local : (rank + 1) * local].T)
            runs[-1] = total
        load.add_(plan.counts[rank])

    def _dispatch(self, op: Op, ins: list[Any], outs: list[Any]) -> None:
        x, weights, *plan = ins
        rows, row_weight = self._exchange.dispatch(_routing(*plan), buffers(x), weights)
        for part, arrived in zip(buffers(outs[0]), rows, strict=True):
            part[: len(arrived)].copy_(arrived)
        if row_weight is not None:
            outs[1][: len(row_weight)].copy_(row_weight)

    def _combine(self, op: Op, ins: list[Any], outs: list[Any]) -> None:
        rows, values, *plan = ins
        y, brought = self._exchange.combine(_routing(*plan), rows, values)
        outs[0].copy_(y)
        if brought is not None:
            outs[1].copy_(brought)


def _routing(slots: Tensor, row_source: Tensor, offsets: Tensor) -> Routing:
    """The routing that a plan's tensors hold."""
    slot, source = slots.view(-1).long(), row_source[: int(offsets[-1])].long()
    rows, choices = len(row_source), slots.numel()
    return Routing(
        slots.shape[1],
        owner=slot // rows,
        slot=slot % rows,
        source=torch.div(source, choices, rounding_mode="floor"),
        choice=(source % choices).masked_fill_(source < 0, -1),
    )
