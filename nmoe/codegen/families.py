"""Which kernel family builds a spec. A family is a module with `match(spec) -> Problem | str`."""

from __future__ import annotations

from nmoe.codegen import attention, gemm, loss, optimizer, routing, rows
from nmoe.codegen.problem import Problem
from nmoe.codegen.spec import KernelSpec

FAMILIES = {  # by the kind of a spec's anchor
    "gemm": gemm, "grouped_gemm": gemm, "router": routing, "router_bwd": routing, "moe_plan": routing,
    **dict.fromkeys(rows.BODIES, rows), "dispatch": routing, "combine": routing,
    **dict.fromkeys(attention.PASSES, attention), "cross_entropy": loss,
    optimizer.KIND: optimizer,
}  # fmt: skip


def match(spec: KernelSpec) -> Problem | str:
    """The problem that a spec states, or why no template builds it."""
    kind = spec.anchor.kind
    if kind not in FAMILIES:
        return f"no template for {kind}"
    return FAMILIES[kind].match(spec)
