"""Which ops one kernel computes: a list of consecutive ops whose later members are epilogues of the first; before a
grouped GEMM, the dispatch whose rows its loads gather."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nmoe.graph import Graph, Op

Builds = Callable[[tuple[Op, ...]], bool]  # whether there is a kernel that computes these ops

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


def fuse(graph: Graph, builds: Builds = lambda ops: True) -> list[tuple[Op, ...]]:
    """Groups the graph's ops, in order: the longest run of ops from each on that fusion allows and a kernel `builds`,
    or the op alone. A GEMM that accumulates a weight gradient stands alone."""
    ops, groups, uses = graph.ops, [], readers(graph)
    start = 0
    while start < len(ops):
        end = start + 1
        while end < len(ops) and _joins(ops[start:end], ops[end], uses):
            end += 1
        while end > start + 1 and not builds(tuple(ops[start:end])):
            end -= 1
        groups.append(tuple(ops[start:end]))
        start = end
    return groups


def _joins(group: list[Op], op: Op, uses: Counter[str]) -> bool:
    first, *rest = group
    if op.phase != first.phase or op.stage != first.stage:
        return False
    if (
        first.kind == "dispatch" and op.kind == "grouped_gemm"
    ):  # whose loads gather rows that nobody else reads
        rows = first.outputs[0] or ""
        return not rest and "ranks" not in first.attrs and rows in op.inputs and uses[rows] == 1
    if rest and rest[0].kind == "grouped_gemm":
        first = rest[0]
    if first.attrs.get("role") == "wgrad":
        return False
    if op.kind not in EPILOGUES.get(first.kind, ()):
        return False
    axis = op.attrs.get("axis")
    if axis is not None and any(other.attrs.get("axis") == axis for other in group):
        return False  # a kernel makes one copy along an axis: not that which travels beside that which stays
    if first.kind == "quantize":
        return op.inputs[0] == first.inputs[0]
    made = {out for member in group for out in member.outputs if out is not None}
    return op.inputs[0] in made or (op.kind == "add" and op.inputs[1] in made)


def readers(graph: Graph) -> Counter[str]:
    """How many operands of ops each tensor is."""
    return Counter(name for op in graph.ops for name in op.inputs if name is not None)


def internal(graph: Graph, uses: Counter[str], group: tuple[Op, ...]) -> frozenset[str]:
    """Activations that only the group that makes them reads: a fused kernel keeps them in registers. `uses` are the
    graph's `readers`."""
    inside = Counter(name for op in group for name in op.inputs if name is not None)
    made = (out for op in group for out in op.outputs if out is not None)
    return frozenset(
        out
        for out in made
        if inside[out] and inside[out] == uses[out] and graph.tensors[out].kind == "activation"
    )
