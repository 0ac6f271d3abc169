"""Which ops one kernel computes: a list of consecutive ops whose later members are epilogues of the first."""

from __future__ import annotations

from collections import Counter

from nmoe.graph import Graph, Op

# What may follow in the kernel that an op of this kind starts. A GEMM's epilogue sees one tile, so whatever needs
# whole rows (a norm) cannot follow it; row kernels hold whole rows and can go on.
TILE = frozenset({"swiglu", "swiglu_bwd", "quantize", "add"})
ROW = frozenset({"add", "rms_norm", "quantize"})
EPILOGUES = {
    "gemm": TILE,
    "grouped_gemm": TILE,
    "add": ROW,
    "combine": ROW,
    "dispatch": frozenset({"quantize"}),
    "rms_norm": frozenset({"quantize"}),
    "rms_norm_bwd": ROW,
    "router_bwd": frozenset({"add"}),
    "swiglu": frozenset({"quantize"}),
    "swiglu_bwd": frozenset({"quantize"}),
    "concat": frozenset({"quantize"}),
    "attention": frozenset({"quantize"}),
    "rope": frozenset({"quantize"}),
    "quantize": frozenset({"quantize"}),  # the row and the column copy of one tensor, from one read
}


def fuse(graph: Graph, target: str) -> list[tuple[Op, ...]]:
    """Groups the graph's ops, in order. A GEMM that accumulates a weight gradient stands alone."""
    groups: list[list[Op]] = []
    for op in graph.ops:
        if groups and _joins(groups[-1], op, target):
            groups[-1].append(op)
        else:
            groups.append([op])
    return [tuple(g) for g in groups]


def _joins(group: list[Op], op: Op, target: str) -> bool:
    first = group[0]
    if first.attrs.get("role") == "wgrad" or op.phase != first.phase or op.stage != first.stage:
        return False
    if op.kind not in EPILOGUES.get(first.kind, ()):
        return False
    if op.kind == "quantize" and first.kind in ("gemm", "grouped_gemm") and not _in_a_tile(op, target):
        return False
    if first.kind == "quantize":
        return op.inputs[0] == first.inputs[0]
    made = {out for member in group for out in member.outputs if out is not None}
    return op.inputs[0] in made or (op.kind == "add" and op.inputs[1] in made)


def _in_a_tile(quantize: Op, target: str) -> bool:
    """NVFP4 needs the amax of a whole tensor or segment first. On Hopper, where a quantized product is a check of the
    numerics and not fast, MXFP8 copies are made by a kernel of their own, too."""
    return quantize.attrs["format"] == "mxfp8" and target != "sm_90a"


def internal(graph: Graph, groups: list[tuple[Op, ...]]) -> set[str]:
    """Activations that only the group that makes them reads: a fused kernel keeps them in registers."""
    uses = Counter(name for op in graph.ops for name in op.inputs if name is not None)
    result: set[str] = set()
    for group in groups:
        inside = Counter(name for op in group for name in op.inputs if name is not None)
        for op in group:
            for out in op.outputs:
                if out is not None and inside[out] and inside[out] == uses[out]:
                    result.add(out)
    return {name for name in result if graph.tensors[name].kind == "activation"}
