"""The MoE layer's routing kernels against the reference math of ops/moe.py: exactly where nothing is rounded, otherwise
in float64, from the same operands, within bounds.

Bounds, u = 2^-24. A chain of n FP32 multiply-adds is within n·u of Σ|a·b|. A score is computed from ex2.approx and
rcp.approx, within 2^-20 relative, and its argument x is rounded on the way, which changes exp(x) by |x|·2u; softmax's sum
of E positive terms adds E·u. Storing as BF16 rounds by 2^-8 relative.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch

from nmoe.codegen.problem import ROWS, TOKENS
from nmoe.codegen.routing import (  # noqa: F401
    CombineProblem, DispatchProblem, PlanProblem, RouterBwdProblem, RouterProblem, RoutingConfig, RoutingProblem,
    ScoredProblem,
)  # fmt: skip
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.graph import Spec
from nmoe.ops import OPS

U = 2.0**-24
STORE = 2.0**-8
EXP = 2.0**-20
TINY = 2.0**-120
ALIGN = 128
COUNTS = (37, 1)  # tokens, by the seed of the warp schedule
SPARE = 64  # rows past the last expert
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64, "bool": torch.bool,
           "f64": torch.float64}  # fmt: skip
NAMES = {dtype: name for name, dtype in FORMATS.items()}


def case(problem: RoutingProblem, config: RoutingConfig, seed: int, tokens: int | None = None,
         skew: float = 0.0, device: str = "cpu") -> Tensors:  # fmt: skip
    """Random operands for `tokens` tokens (by default some, by the seed), results and workspace poisoned. `skew` draws
    all tokens to the first experts."""
    tokens = COUNTS[seed % len(COUNTS)] if tokens is None else tokens
    gen = torch.Generator(device).manual_seed(seed)
    liking = torch.rand(tokens, problem.experts, generator=gen, device=device)
    liking -= skew * torch.arange(problem.experts, device=device)
    indices = liking.argsort(1)[:, -problem.topk :].flip(1).int() if not skew else liking.topk(problem.topk).indices.int()
    counts = indices.flatten().long().bincount(minlength=problem.experts)
    rows = int(((counts + ALIGN - 1) // ALIGN * ALIGN).sum()) + SPARE
    made = _plan(problem, indices, rows)
    made |= {"route_scale": 2.5, "seq_len": tokens, "inverse_sequences": 0.5, "balance": 0.7, "z": 0.3}
    results = RESULTS[problem.family]
    for operand in problem.operands(config):
        shape = [{ROWS: rows, TOKENS: tokens}.get(n, n) for n in operand.shape]
        dtype = FORMATS[operand.format]
        if not operand.shape or (operand.name in made and operand.name not in results):
            continue
        if operand.name in results or operand.name in WORKSPACE:
            made[operand.name] = torch.full(shape, POISON if dtype == torch.int32 else float("nan"), dtype=dtype, device=device)
        else:
            made[operand.name] = torch.randn(shape, generator=gen, device=device).to(dtype)
    for name in ("rows", "row_values"):
        if name in made and name not in results:
            made[name][int(made["offsets"][-1]) :] = float("nan")
    return {o.name: made[o.name] for o in problem.operands(config)}


POISON = -77
RESULTS = {
    "moe_plan": ("slots", "row_source", "offsets"), "dispatch": ("rows", "row_weight"), "combine": ("y", "values"),
    "router": ("indices", "weights", "logits"), "router_bwd": ("dx",),
}  # fmt: skip
WORKSPACE = ("counts", "partial", "dlogits")


def _reference(kind: str, attrs: dict[str, Any], ins: list[Any], outs: list[Any]) -> None:
    """Runs an op's reference math on tensors of any float width."""

    def specs(tensors: list[Any]) -> list[Any]:
        return [None if t is None else Spec(tuple(t.shape), NAMES[t.dtype]) for t in tensors]

    device = next(t.device for t in ins if t is not None)
    scratch = OPS[kind].scratch(attrs, specs(ins), specs(outs))
    held = [torch.empty(s.shape, dtype=FORMATS[s.format], device=device) for s in scratch]
    OPS[kind].reference(attrs, ins, outs, held)


def _plan(problem: RoutingProblem, indices: torch.Tensor, rows: int) -> Tensors:
    experts, like = problem.experts, {"dtype": torch.int32, "device": indices.device}
    align = problem.align if isinstance(problem, PlanProblem) else ALIGN
    outs = [torch.empty_like(indices), torch.empty(rows, **like), torch.empty(experts + 1, **like),
            torch.zeros(experts, device=indices.device)]  # fmt: skip
    _reference("moe_plan", {"experts": experts, "ranks": 1, "align": align, "format": "f32"}, [indices], outs)
    return dict(zip(("indices", "slots", "row_source", "offsets"), [indices, *outs[:3]], strict=True))


def check(problem: RoutingProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound; raises Mismatch where that is above 1."""
    return _check(problem, before, after)


@singledispatch
def _check(problem: RoutingProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    raise NotImplementedError


def _exact(names: tuple[str, ...], wanted: list[torch.Tensor], after: Tensors) -> dict[str, float]:
    """Bit for bit, NaNs included."""
    for name, want in zip(names, wanted, strict=True):
        bits = torch.int16 if want.dtype == torch.bfloat16 else torch.int32
        wrong = (after[name].view(bits) != want.view(bits)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise Mismatch(
                f"{name}: {len(wrong)} elements differ, first {after[name][at].item()} at {list(at)}, "
                f"expected {want[at].item()}"
            )
    return dict.fromkeys(names, 0.0)


def _within(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> dict[str, float]:
    error = (got.double() - want).abs()
    if lost := int(error.isnan().sum()):
        raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
    share = error / (bound + TINY)
    worst = float(share.max()) if share.numel() else 0.0
    if worst > 1:
        where = torch.unravel_index(share.argmax(), share.shape)
        raise Mismatch(
            f"{name}: {worst:.3g} of the bound at {[int(i) for i in where]}: {got[where].item():.6g}, "
            f"expected {want[where].item():.6g} ± {bound[where].item():.2g}"
        )
    return {name: worst}


@_check.register
def _(problem: PlanProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    names = ("slots", "row_source", "offsets", "load")
    outs = [before[name].clone() for name in names]
    attrs = {"experts": problem.experts, "ranks": 1, "align": problem.align, "format": "f32"}
    _reference("moe_plan", attrs, [before["indices"]], outs)
    return _exact(names, outs, after)


@_check.register
def _(problem: DispatchProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    names = ("rows", "row_weight") if problem.weighted else ("rows",)
    outs = [before[name].clone() for name in names]
    ins = [before.get(name) for name in ("x", "weights", "slots", "row_source", "offsets")]
    _reference("dispatch", {}, ins, outs)
    return _exact(names, outs, after)


@_check.register
def _(problem: CombineProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    chosen = before["rows"][before["slots"].long()].double()
    want, size = chosen.sum(1), chosen.abs().sum(1)
    bound = problem.topk * U * size
    found = _within("y", after["y"], want, bound + STORE * (want.abs() + bound))
    if problem.valued:
        found |= _exact(("values",), [before["row_values"][before["slots"].long()]], after)
    return found
