"""Reverse-mode differentiation of a layer graph, from each op's own gradient rule."""

from __future__ import annotations

from collections import defaultdict

from nmoe.graph import Graph, Name
from nmoe.ops import OPS


def differentiate(forward: Graph) -> Graph:
    """The forward graph followed by its backward ops.

    An op is differentiated when the gradient of one of its outputs is known, or when it accumulates a loss (a state
    tensor named `loss.*`), whose seed is one. Contributions to one tensor are summed from the last that the reverse
    pass meets, whose kernel can add the others. Gradients of parameters accumulate in `<param>.grad`.
    """
    g = forward.copy()
    g.stage = "backward"
    contributions: dict[str, list[Name]] = defaultdict(list)

    def gradient_of(name: Name) -> Name:
        if name is None or not contributions[name]:
            return None
        parts = contributions[name]
        while len(parts) > 1:
            *_, a, b = parts
            (total,) = g.emit("add", f"{name}.sum.{len(parts)}", [a, b])
            parts[-2:] = [total]
        return parts[0]

    for op in reversed(forward.ops):
        douts = tuple(gradient_of(name) for name in op.outputs)
        is_loss = any(name is not None and name.startswith("loss.") for name in op.outputs)
        if all(d is None for d in douts) and not (is_loss and op.kind != "router"):
            continue
        for name, gradient in zip(op.inputs, OPS[op.kind].gradient(g, op, douts), strict=True):
            if gradient is not None and name is not None and g.tensors[name].kind == "activation":
                contributions[name].append(gradient)
    return g
