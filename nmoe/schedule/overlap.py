"""What runs while rows travel between ranks: the order and the streams of a schedule's calls.

    COMM   plan ─▶ dispatch ─┐            ┌▶ combine ─┐       ┌▶ dispatch of dy ─┐            ┌▶ combine of dx ─┐
    SIDE        └▶ gate, up ─│────────────│▶ down ────│  …   ─┤▶ down's ─────────│────────────│▶ gate's, up's ──│
    MAIN   router            └▶ experts ──┘           └▶      │  gradients       └▶ experts' ─┘  gradients      └▶ …

The shared expert is cut at its activation. Without transfers there is one stream, MAIN, in the order of the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nmoe.graph import Op

if TYPE_CHECKING:
    from nmoe.schedule.lower import Call

MAIN, COMM, SIDE = 0, 1, 2  # compute; rows between ranks; the shared expert, while rows travel
TRANSFERS = ("moe_plan", "dispatch", "combine")  # all on one stream: their order is that of the protocol
ACTIVATION = {"forward": "swiglu", "again": "swiglu", "backward": "swiglu_bwd"}


def stream_of(ops: Sequence[Op]) -> int:
    """Where a kernel of these ops runs when rows travel between ranks."""
    if ops[0].phase != "micro":
        return MAIN
    if any(op.kind in TRANSFERS for op in ops):
        return COMM
    return SIDE if ".moe.shared." in ops[0].name else MAIN


def late(ops: Sequence[Op], moved: Collection[str]) -> bool:
    """Whether a kernel of these ops would keep the shared expert waiting for rows, of which `moved` are made."""
    return stream_of(ops) == SIDE and any(name in moved for op in ops for name in op.inputs)


def reorder(calls: Sequence[Call]) -> list[Call]:
    """Puts the shared expert of a layer behind its transfers: up to the activation, or its gradient, behind the
    dispatch of the pass, what follows behind the combine; what others need before, or what needs what is made later, as
    near to that as it can be. Forward, recomputation and backward are passes of their own."""
    makers = _makers(calls)
    side = [stream_of(call.ops) == SIDE for call in calls]
    halves: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    acted: set[tuple[str, str]] = set()
    for index, call in enumerate(calls):
        if side[index]:
            layer, run = _layer_and_pass(call)
            halves[layer, run, "combine" if (layer, run) in acted else "dispatch"].append(index)
            if any(op.kind == ACTIVATION[run] for op in call.ops):
                acted.add((layer, run))
    order: dict[int, None] = {}  # a set that keeps its order

    def ready(index: int) -> bool:
        """Whether all that the shared expert needs for a call is made, but by itself."""
        return all(maker in order or (side[maker] and ready(maker)) for maker in makers[index])

    def put(index: int) -> None:
        """A call, behind those of the shared expert that it needs."""
        for maker in sorted(makers[index] - order.keys()):
            put(maker)
        order[index] = None

    for index, call in enumerate(calls):
        if not side[index]:
            put(index)
            half = halves.get((*_layer_and_pass(call), call.ops[0].kind), [])
            for each in half if all(map(ready, half)) else ():
                put(each)
    for index in range(len(calls)):
        put(index)
    return [calls[index] for index in order]


def _layer_and_pass(call: Call) -> tuple[str, str]:
    name = call.name
    return name.split(".moe.")[0], "again" if name.endswith(".again") else call.ops[0].stage


def assign_streams(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Rows travel on COMM, and the shared expert runs on SIDE, from when the transfer before it begins.

    A call waits for the calls of other streams that make what it reads, where no earlier wait implies it.
    """
    placed: list[Call] = []
    ended: list[
        dict[int, int]
    ] = []  # for each call: stream → the last of its calls that ended before, or itself
    heads: dict[int, dict[int, int]] = {MAIN: {}, COMM: {}, SIDE: {}}
    sent: set[int] = set()  # what the last transfer waited for
    for index, (call, needed) in enumerate(zip(calls, _makers(calls), strict=True)):
        stream = stream_of(call.ops)
        if stream == COMM:
            sent = needed
        elif stream == SIDE:
            needed |= sent
        known, waits = dict(heads[stream]), []
        for producer in sorted(needed, reverse=True):
            if producer > known.get(placed[producer].stream, -1) and placed[producer].stream != stream:
                waits.append(producer)
                for other, last in ended[producer].items():
                    known[other] = max(known.get(other, -1), last)
        heads[stream] = known | {stream: index}
        ended.append(heads[stream])
        placed.append(replace(call, stream=stream, waits=tuple(sorted(waits))))
    return tuple(placed)


def _makers(calls: Sequence[Call]) -> list[set[int]]:
    """For each call, the calls before it that made, last, what it reads."""
    made_by: dict[str, int] = {}
    makers = []
    for index, call in enumerate(calls):
        makers.append({made_by[name] for name in call.inputs if name in made_by})
        made_by.update(dict.fromkeys(call.outputs, index))
    return makers
