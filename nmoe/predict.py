"""How long the kernels and wires of a schedule should take: a roofline over its calls and the formulas of docs/plan.md.

Predictions, not measurements: device peaks times the shares that nmoe/devices.py says kernels attain. Launch gaps, L2
reuse, imbalance between ranks and power limits are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nmoe import model
from nmoe.config import Config, Moe
from nmoe.devices import Device
from nmoe.graph import QUANTIZED, Op
from nmoe.ops import Cost, row_parts
from nmoe.schedule import Call, Schedule
from nmoe.schedule.overlap import COMM, MAIN, SIDE

# Floating-point work that the model needs for each that its forward op does: backward is twice the forward. Scores
# that attention's backward computes again are not needed, so it counts as part of its forward op.
_MODEL_WORK = {"gemm": 1, "grouped_gemm": 1, "attention": 3, "router": 1, "router_bwd": 1}
_MODEL_WORK |= {f"linear_cross_entropy{suffix}": 1 for suffix in ("", "_bwd", "_fwd_bwd")}


@dataclass(frozen=True)
class Wire:
    """Bytes that a rank sends: to ranks of its NVLink domain and to other nodes."""

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.nvlink + other.nvlink, self.network + other.network)

    def times(self, count: int) -> Wire:
        return Wire(self.nvlink * count, self.network * count)

    def seconds(self, device: Device) -> float:
        """Chunks cross both kinds of link in a pipeline, so the slower one decides."""
        return max(
            self.nvlink / (device.nvlink * device.attained["nvlink"]),
            self.network / (device.network * device.attained["network"]),
        )


def expected_rows(config: Config, schedule: Schedule) -> dict[str, int]:
    """The expert rows of a micro-batch under balanced routing: T·topk of a rank's own group, and half an alignment of
    padding an expert. Never more than the buffers hold."""
    if config.moe is None:
        return {}
    align = model.row_align(config)
    padding = config.moe.experts // config.rdep.ranks * (align - 1) // 2
    rows = -(-(schedule.dims["T"] * config.moe.topk + padding) // align) * align
    return {"R": min(schedule.dims["R"], rows)}


def model_flops(config: Config, schedule: Schedule) -> float:
    """Floating-point operations that the model needs for a micro-batch: its matrix products, forward and backward, on
    the rows that routing sends. Neither recomputation nor padding counts."""
    rows = {"R": schedule.dims["T"] * config.moe.topk} if config.moe else {}
    return sum(
        _MODEL_WORK[op.kind] * schedule.cost(op, rows).flops
        for op in schedule.graph.ops
        if op.kind in _MODEL_WORK and not op.name.endswith(".again")
    )


def call_cost(schedule: Schedule, call: Call, rows: Mapping[str, int]) -> Cost:
    """What one kernel does. Values that stay inside it cost no traffic; what several of its ops read counts once."""
    return sum((cost for _, cost in schedule.costs(call, rows)), Cost())


def call_seconds(schedule: Schedule, call: Call, rows: Mapping[str, int], device: Device) -> float:
    """Roofline: arithmetic at the attained share of its precision's peak, or memory traffic, whichever is longer."""
    arithmetic = traffic = 0.0
    for op, cost in schedule.costs(call, rows):
        precision, attained = _unit(schedule, op)
        arithmetic += cost.flops / (device.peak[precision] * device.attained[attained])
        traffic += cost.bytes
    return max(arithmetic, traffic / (device.bandwidth * device.attained["memory"]))


def _unit(schedule: Schedule, op: Op) -> tuple[str, str]:
    """The precision whose peak bounds an op's arithmetic, and whose attained share it has."""
    if op.kind not in _MODEL_WORK and op.kind != "attention_bwd":
        return "fp32", "fp32"
    formats = {schedule.graph.tensors[name].format for name in op.inputs[:2] if name is not None}
    if len(formats) == 1 and formats <= set(QUANTIZED):
        precision = formats.pop()
    else:
        precision = "fp32" if formats & {"f32", "f64"} else "bf16"
    return precision, "attention" if op.kind.startswith("attention") else precision


def timeline(calls: tuple[Call, ...], seconds: list[float]) -> tuple[float, float]:
    """(duration of a micro-batch, of which computing) when every stream runs its calls in order, a call starts when
    those that it waits for have ended, MAIN and SIDE take turns on the device and COMM has the wires."""
    queues: dict[int, list[int]] = {MAIN: [], COMM: [], SIDE: []}
    for index in reversed(range(len(calls))):
        if calls[index].phase == "micro":
            queues[calls[index].stream].append(index)
    ended: dict[int, float] = {}
    free = {"device": 0.0, "wires": 0.0}
    computing = 0.0
    while any(queues.values()):
        ready = []
        for stream, queue in queues.items():
            waits = [w for w in calls[queue[-1]].waits if calls[w].phase == "micro"] if queue else []
            if queue and all(w in ended for w in waits):
                unit = "wires" if stream == COMM else "device"
                ready.append((max([free[unit], *(ended[w] for w in waits)]), stream, unit))
        start, stream, unit = min(ready)
        index = queues[stream].pop()
        ended[index] = free[unit] = start + seconds[index]
        computing += seconds[index] if unit == "device" else 0.0
    return max(ended.values()), computing


# ---- wires --------------------------------------------------------------------------------------------------


def spread(moe: Moe, nodes: int) -> float:
    """Expected number of distinct nodes among `nodes` that a token's experts lie on, choices being uniform.

    Group-limited routing sees only topk_groups of the groups' nodes when whole nodes make up a group.
    """
    experts = moe.experts
    if moe.groups > 1 and nodes % moe.groups == 0:
        nodes = nodes * moe.topk_groups // moe.groups
        experts = experts * moe.topk_groups // moe.groups
    return nodes * (1.0 - math.comb(experts - experts // nodes, moe.topk) / math.comb(experts, moe.topk))


def dispatch_wire(moe: Moe, tokens: int, row: float, ranks: int, node: int) -> Wire:
    """Rows of `row` bytes to the ranks of their experts: over the network once a (token, node), then over NVLink once
    a (token, expert)."""
    inside = min(ranks, node)
    nodes = -(-ranks // inside)
    return Wire(
        nvlink=tokens * moe.topk * (inside - 1) / inside * row,
        network=tokens * spread(moe, nodes) * (nodes - 1) / nodes * row,
    )


def return_wire(moe: Moe, tokens: int, row: float, ranks: int, node: int) -> Wire:
    """Rows back to their tokens, once a (token, expert) everywhere: summing on the way would change the bits."""
    inside = min(ranks, node)
    nodes = -(-ranks // inside)
    rows = tokens * moe.topk
    return Wire(rows * (inside - 1) / inside * row, rows * (nodes - 1) / nodes * row)


def wires(config: Config, schedule: Schedule, node: int) -> list[Wire]:
    """What each call sends: nothing unless it moves expert rows between ranks, `node` of which NVLink joins."""
    moe, tokens, ranks = config.moe, schedule.dims["T"], config.rdep.ranks
    if moe is None or ranks == 1:
        return [Wire()] * len(schedule.calls)
    payload = payload_bytes(schedule)

    def sent(op: Op | None) -> Wire:
        if op is None:
            return Wire()
        formula = dispatch_wire if op.kind == "dispatch" else return_wire
        return formula(moe, tokens, payload[op.name], ranks, node)

    return [sent(carrier(call)) for call in schedule.calls]


def payload_bytes(schedule: Schedule) -> dict[str, float]:
    """Bytes of a row that travels, by the op that moves it: in the format of the residual stream, with the gradient of
    its router weight where it returns in backward."""

    def payload(op: Op) -> float:
        name = op.outputs[0] if op.kind == "dispatch" else op.inputs[0]
        rows = schedule.graph.tensors[name or ""]
        valued = op.kind == "combine" and op.inputs[1] is not None
        return sum(row_parts(rows.spec)) + (4 if valued else 0)

    return {op.name: payload(op) for op in schedule.graph.ops if op.kind in ("dispatch", "combine")}


def carrier(call: Call) -> Op | None:
    """The op of a call that moves rows between ranks."""
    return next((op for op in call.ops if op.kind in ("dispatch", "combine")), None)


def sync_wire(members: int, near: int, reduced: float, gathered: float) -> Wire:
    """Reduce-scatter of `reduced` and all-gather of `gathered` bytes among `members` ranks, `near` of them on a node:
    the node goes first, so that each of its ranks exchanges its own share with the other nodes."""
    near = min(members, near)
    nodes = -(-members // near)
    total = reduced + gathered
    return Wire(total * (near - 1) / near, total / near * (nodes - 1) / nodes)
