"""A rank's end of the protocol: the plan of a layer, the dispatch of rows to their experts and their return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe.rdep import plan as slots
from nmoe.rdep.plan import Plan
from nmoe.rdep.protocol import PROTOCOL, Protocol
from nmoe.rdep.transfer import Transfers
from nmoe.rdep.transport import Buffer, Transport
from nmoe.storage import BLOCK


@dataclass(frozen=True)
class Routing:
    """One layer's rows as this rank knows them. Of its own choices, flat [T·k]: `owner`, the rank, and `slot`, the
    row there. Of the rows that it holds, [total]: `source`, the rank, and `choice`, t·k + j there; padding is −1."""

    topk: int
    owner: Tensor
    slot: Tensor
    source: Tensor
    choice: Tensor


def buffers(
    ranks: int, experts: int, tokens: int, topk: int, width: int, capacity: int, dtype: torch.dtype,
    quantized: bool = False,
) -> dict[str, Buffer]:  # fmt: skip
    """What a transport must hold for layers of these sizes; all layers share it. `tokens`: of the fullest rank;
    `quantized`: rows may come in MXFP8, too."""
    choices = tokens * topk
    codes = {
        "rows.codes": Buffer((capacity, width), torch.uint8),
        "rows.scale": Buffer((capacity, width // BLOCK["mxfp8"]), torch.uint8),
    }
    return (codes if quantized else {}) | {
        "counts": Buffer((ranks, experts), torch.int64),
        "rows.choice": Buffer((capacity,), torch.int64),
        "rows.data": Buffer((capacity, width), dtype),
        "rows.weight": Buffer((capacity,), torch.float32),
        "returns.data": Buffer((choices, width), dtype),
        "returns.value": Buffer((choices,), torch.float32),
    }


class Exchange:
    """Executes `protocol` over a transport that holds `buffers`. All ranks make the same calls in the same order."""

    def __init__(self, transport: Transport, protocol: Protocol = PROTOCOL) -> None:
        self.transport = transport
        self.transfers = Transfers(transport, protocol)
        self._transfer = self.transfers.run

    def plan(self, indices: Tensor, experts: int, align: int) -> tuple[Plan, Routing]:
        """The slots of indices int32[T, k]. Raises CapacityError, on all ranks or none, before any row travels."""
        t = self.transport

        def put() -> None:
            mine = slots.count(indices, experts).unsqueeze(0)
            for peer in range(t.ranks):
                t.put(peer, "counts", torch.tensor([t.rank]), mine)

        counts = self._transfer("counts", put, lambda: t.local("counts").clone())
        made = slots.plan(counts, align)
        slots.check_capacity(made, t.local("rows.data").shape[0])
        owner, slot = (x.view(-1) for x in slots.place(made, indices, t.rank))
        source = made.sources(t.rank)
        routing = Routing(indices.shape[1], owner, slot, source, torch.empty_like(source))
        numbers = torch.arange(indices.numel())
        self._send(routing, {"rows.choice": lambda choice: numbers[choice]}, {"rows.choice": routing.choice})
        routing.choice[source < 0] = -1
        return made, routing

    def dispatch(
        self, routing: Routing, x: Sequence[Tensor], weights: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """x[T, d], or elements and scale factors of MXFP8, weights FP32[T, k]? → likewise rows[total, d], row weights
        FP32[total]; zero on padding."""
        names = ("rows.data",) if len(x) == 1 else ("rows.codes", "rows.scale")
        rows = [part.new_empty(len(routing.source), part.shape[1]) for part in x]
        payload: dict[str, Callable[[Tensor], Tensor]] = {
            name: lambda choice, part=part: part[choice // routing.topk]  # type: ignore[misc]
            for name, part in zip(names, x, strict=True)
        }
        into, row_weight = dict(zip(names, rows, strict=True)), None
        if weights is not None:
            flat = weights.reshape(-1)
            payload["rows.weight"] = lambda choice: flat[choice]
            into["rows.weight"] = row_weight = flat.new_empty(len(routing.source))
        self._send(routing, payload, into)
        for tensor in into.values():
            tensor[routing.source < 0] = 0
        return rows, row_weight

    def combine(
        self, routing: Routing, rows: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """rows[total, d], values FP32[total]? → y[T, d], the sum of each token's rows in FP32 in the order of its
        choices; values FP32[T, k]."""
        t, n = self.transport, len(routing.owner)

        def put() -> None:
            for peer in range(t.ranks):
                (held,) = torch.where(routing.source == peer)
                t.put(peer, "returns.data", routing.choice[held], rows[held])
                if values is not None:
                    t.put(peer, "returns.value", routing.choice[held], values[held])

        def read() -> tuple[Tensor, Tensor | None]:
            returned = t.local("returns.data")[:n].view(-1, routing.topk, rows.shape[1])
            total = torch.zeros(returned[:, 0].shape)
            for k in range(routing.topk):
                total += returned[:, k]
            brought = None if values is None else t.local("returns.value")[:n].clone().view(-1, routing.topk)
            return total.to(rows.dtype), brought

        return self._transfer("returns", put, read)

    def _send(
        self, routing: Routing, payload: dict[str, Callable[[Tensor], Tensor]], into: dict[str, Tensor]
    ) -> None:
        """One transfer of rows: `payload` gives a buffer's rows for given choices of this rank."""
        t = self.transport

        def put() -> None:
            for peer in range(t.ranks):
                (choice,) = torch.where(routing.owner == peer)
                for buffer, rows in payload.items():
                    t.put(peer, buffer, routing.slot[choice], rows(choice))

        def read() -> None:
            for buffer, tensor in into.items():
                tensor.copy_(t.local(buffer)[: len(tensor)])

        self._transfer("rows", put, read)
