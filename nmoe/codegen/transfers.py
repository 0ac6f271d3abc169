"""Which of RDEP's kernels a layer launches: inside a host (rdep.py), and between hosts (rails.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nmoe.codegen.rails import RailCountsProblem, RailFlagProblem, RailReturnsProblem, RailRowsProblem
from nmoe.codegen.rdep import (
    CombineProblem,
    CountProblem,
    FlagProblem,
    MoveProblem,
    PlaceProblem,
    RdepProblem,
)
from nmoe.ops import row_parts
from nmoe.schedule import Schedule


def transfers(
    ranks: int, gpus: int, experts: int, tokens: int, topk: int, capacity: int, align: int, parts: tuple[int, ...],
    width: int,
) -> dict[str, RdepProblem]:  # fmt: skip
    """Every kernel of a layer's forward and backward, by the step of nmoe.rdep.device.Exchange that launches it; the
    sizes are those of its Group. Between hosts a step that moves rows launches three: "… rail", itself of the near
    rows, "… landed"."""
    group, local, returned = (ranks, gpus), experts // ranks, (2 * width,)
    found: dict[str, RdepProblem] = {
        "send_counts": CountProblem(*group, experts, topk),
        "receive_counts": PlaceProblem(*group, experts, topk, align),
        "send_rows": MoveProblem(*group, "rows", parts, topk, local, True),
        "resend_rows": MoveProblem(*group, "rows", parts, topk, local, False),
        "receive_rows": FlagProblem(*group, "await"),
        "release_rows": FlagProblem(*group, "raise"),
        "send_returns": MoveProblem(*group, "returns", returned, topk, local, False),
        "send_returns_values": MoveProblem(*group, "returns", returned, topk, local, True),
        "receive_returns": CombineProblem(*group, topk, width),
    }
    if ranks > gpus:
        for step, move in list(found.items()):
            if isinstance(move, MoveProblem):
                sent = (*group, move.parts, tokens, local, move.describes, topk)
                rail = RailRowsProblem if move.channel == "rows" else RailReturnsProblem
                found[f"{step} rail"] = rail(*sent)
                found[step], found[f"{step} landed"] = replace(move, of="near"), replace(move, of="landed")
        found |= {"relay_counts": RailCountsProblem(*group, experts), "await_rails": RailFlagProblem(*group, "await"),
                  "raise_rails": RailFlagProblem(*group, "raise")}  # fmt: skip
    return found


def payloads(schedules: Sequence[Schedule]) -> list[tuple[int, ...]]:
    """As what rows travel in the schedules of a run, the largest first."""
    dispatched = (
        schedule.graph.tensors[op.outputs[0] or ""].spec
        for schedule in schedules
        for op in schedule.graph.ops
        if op.kind == "dispatch" and op.outputs[0] is not None
    )
    return sorted(set(map(row_parts, dispatched)), key=sum, reverse=True)


def transfers_of(schedule: Schedule, gpus: int) -> list[RdepProblem]:
    """What the layers of a schedule for several ranks launch, with `gpus` ranks on each host."""
    found: dict[RdepProblem, None] = {}
    for op in schedule.graph.ops:
        if op.kind == "dispatch" and "ranks" in op.attrs:
            rows = schedule.graph.tensors[op.outputs[0] or ""].spec
            width = int(rows.shape[1])
            plan = next(o for o in schedule.graph.ops if o.kind == "moe_plan" and op.inputs[2] in o.outputs)
            (topk,) = schedule.graph.shape(plan.inputs[0])[1:]
            ranks, tokens, capacity = plan.attrs["ranks"], schedule.dims["T"], schedule.dims["R"]
            found |= dict.fromkeys(
                transfers(ranks, gpus, plan.attrs["experts"], tokens, topk, capacity, plan.attrs["align"],
                          row_parts(rows), width).values()
            )  # fmt: skip
    return list(found)
