"""The MoE layer's routing kernels against the reference math of ops/moe.py: exactly where nothing is rounded, otherwise
in float64, from the same operands, within bounds.

Bounds, u = 2^-24. The router's products are of BF16 parts on tensor cores, 16 deep a step: whether in one or two
halves, each addend may be truncated at the last place of the largest, 2u, and each sum: n steps are within 40n·u of
Σ|a·b|. Three parts are the value; two are within 2^-16 of it, as is the product of two second parts, which is left out.
A score is computed from ex2.approx and rcp.approx, within 2^-20 relative, and its argument x is rounded on the way,
which changes exp(x) by |x|·2u; softmax's sum of E positive terms adds E·u. Storing as BF16 rounds by 2^-8 relative.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch

from nmoe.codegen.problem import ROWS, TOKENS
from nmoe.codegen.routing import (
    PRODUCT_DEPTH,
    CombineProblem,
    DispatchProblem,
    PlanProblem,
    RouterBwdProblem,
    RouterProblem,
    RoutingConfig,
    RoutingProblem,
    ScoredProblem,
)  # fmt: skip
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.graph import Spec
from nmoe.ops import OPS

U = 2.0**-24
STORE = 2.0**-8
EXP = 2.0**-20
TINY = 2.0**-120
TWO_STEPS = 2 * 40 * U  # of tensor cores: a slice of the router's products, for each pair of parts
ALIGN = 128
COUNTS = (39, 1)  # tokens, by the seed of the warp schedule
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
    indices = liking.topk(problem.topk).indices.int()
    counts = indices.flatten().long().bincount(minlength=problem.experts)
    made = _plan(problem, indices, int(((counts + ALIGN - 1) // ALIGN * ALIGN).sum()) + SPARE)
    made |= {"route_scale": 2.5, "inverse_sequences": 0.5, "balance": 0.7, "z": 0.3,
             "seq_len": tokens // 3 if tokens % 3 == 0 else tokens}  # fmt: skip
    results = RESULTS[problem.family]
    for operand in problem.operands(config):
        shape = [{ROWS: len(made["row_source"]), TOKENS: tokens}.get(n, n) for n in operand.shape]
        like: Any = {"dtype": FORMATS[operand.format], "device": device}
        if operand.name in results or operand.name in WORKSPACE:
            made[operand.name] = torch.full(
                shape, POISON if operand.format == "i32" else float("nan"), **like
            )
        elif operand.shape and operand.name not in made:
            made[operand.name] = torch.randn(shape, generator=gen, device=device).to(**like)
    if "w" in made:
        made["w"] *= 2 / made["w"].shape[1] ** 0.5  # logits of a few units
    for name in ("rows", "row_values"):
        if name in made and name not in results:
            made[name][int(made["offsets"][-1]) :] = float("nan")
    return {o.name: made[o.name] for o in problem.operands(config)}


POISON = -77
RESULTS = {
    "moe_plan": ("slots", "row_source", "offsets"), "dispatch": ("rows", "row_weight"), "combine": ("y", "values"),
    "router": ("indices", "weights", "logits"), "router_bwd": ("dx",),
}  # fmt: skip
WORKSPACE = ("counts", "products", "partial", "dlogits", "w_parts", "tallies")


def _reference(kind: str, attrs: dict[str, Any], ins: list[Any], outs: list[Any]) -> None:
    """Runs an op's reference math on tensors of any float width."""

    def specs(tensors: list[Any]) -> list[Any]:
        return [None if t is None else Spec(tuple(t.shape), NAMES[t.dtype]) for t in tensors]

    device = next(t.device for t in ins if t is not None)
    scratch = OPS[kind].scratch(attrs, specs(ins), specs(outs))
    held = [torch.empty(s.shape, dtype=FORMATS[s.format], device=device) for s in scratch]
    OPS[kind].reference(attrs, ins, outs, held)


def _plan(problem: RoutingProblem, indices: torch.Tensor, rows: int) -> Tensors:
    experts = problem.experts
    align = problem.align if isinstance(problem, PlanProblem) else ALIGN
    outs = [torch.empty_like(indices), indices.new_empty(rows), indices.new_empty(experts + 1),
            torch.zeros(experts, device=indices.device)]  # fmt: skip
    _reference("moe_plan", {"experts": experts, "ranks": 1, "align": align, "format": "f32"}, [indices], outs)
    return dict(zip(("indices", "slots", "row_source", "offsets"), [indices, *outs[:3]], strict=True))


@singledispatch
def check(problem: RoutingProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound; raises Mismatch where that is above 1."""
    raise NotImplementedError(f"no oracle for {type(problem).__name__}")


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


@check.register
def _(problem: PlanProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    names = ("slots", "row_source", "offsets", "load")
    outs = [before[name].clone() for name in names]
    attrs = {"experts": problem.experts, "ranks": 1, "align": problem.align, "format": "f32"}
    _reference("moe_plan", attrs, [before["indices"]], outs)
    return _exact(names, outs, after)


@check.register
def _(problem: DispatchProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    outs = [before[name].clone() if name in before else None for name in RESULTS["dispatch"]]
    ins = [before.get(name) for name in ("x", "weights", "slots", "row_source", "offsets")]
    _reference("dispatch", {}, ins, outs)
    wanted = {name: out for name, out in zip(RESULTS["dispatch"], outs, strict=True) if out is not None}
    live = int(before["offsets"][-1])
    for name, out in wanted.items():  # on a GPU the reference fills what lies past the last expert, too
        out[live:] = before[name][live:]
    return _exact(tuple(wanted), list(wanted.values()), after)


@check.register
def _(problem: CombineProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    chosen = before["rows"][before["slots"].long()].double()
    want, size = chosen.sum(1), chosen.abs().sum(1)
    bound = problem.topk * U * size
    bound = bound + STORE * (want.abs() + bound)
    for name in problem.addend_names:
        want = want + before[name].double()
        bound = bound + STORE * (want.abs() + bound)
    found = _within("y", after["y"], want, bound)
    if problem.valued:
        found |= _exact(("values",), [before["row_values"][before["slots"].long()]], after)
    return found


def _product(depth: int, splits: int) -> float:
    """Of a product with an FP32 operand in three parts, relative to Σ|a·b|: a slice's chain and the sums of slices."""
    return 3 * TWO_STEPS + (-(-depth // PRODUCT_DEPTH) + splits + 2) * U


def _scores(problem: ScoredProblem, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of FP32 logits in float64 and the kernel's relative error in any of a token's."""
    x = logits.double()
    if problem.score == "sigmoid":
        return x.sigmoid(), EXP * (2 + x.abs().amax(1, keepdim=True))
    spread = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    return x.softmax(1), EXP * (2 + spread) + problem.experts * U


def _attrs(problem: ScoredProblem, values: Tensors) -> dict[str, Any]:
    """The op's attributes."""
    kept = {name: values.get(name, 0.0) for name in ("route_scale", "inverse_sequences", "balance", "z")}
    grouped = {}
    if isinstance(problem, RouterProblem):
        grouped = {"groups": problem.groups, "topk_groups": problem.topk_groups}
    return {"topk": problem.topk, "score": problem.score, "normalize": problem.normalize, **grouped, **kept,
            "seq_len": values.get("seq_len", 1)}  # fmt: skip


def _clear(problem: RouterProblem, choice: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """The tokens whose choices do not depend on rounding: the best groups with the best of the others, then the best
    experts of those groups with the best of their others, are equal or further apart than their `slack` together."""
    found = torch.ones(len(choice), dtype=torch.bool, device=choice.device)
    if problem.groups > 1:
        members, slacks = (t.view(len(choice), problem.groups, -1) for t in (choice, slack))
        best = members.topk(min(2 if problem.score == "sigmoid" else 1, members.shape[2]))
        values, near = best.values.sum(2), slacks.gather(2, best.indices).sum(2)
        found &= _apart(values, near, problem.topk_groups)
        dropped = values.sort(dim=1, descending=True, stable=True).indices[:, problem.topk_groups :]
        choice = members.scatter(1, dropped[:, :, None].expand(-1, -1, members.shape[2]), -torch.inf).flatten(
            1
        )
    return found & _apart(choice, slack, problem.topk)


def _apart(values: torch.Tensor, slack: torch.Tensor, count: int) -> torch.Tensor:
    """Whether each row's `count` + 1 largest values are equal or further apart than their `slack` together."""
    order = values.sort(1, descending=True)
    gaps = -order.values[:, : count + 1].diff(dim=1)
    near = slack.gather(1, order.indices[:, : count + 1])
    return ((gaps == 0) | (gaps > near[:, 1:] + near[:, :-1])).all(1)


@check.register
def _(problem: RouterProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    x, w, bias = before["x"].double(), before["w"].double(), before.get("bias")
    logits = x @ w.T
    found = _within(
        "logits", after["logits"], logits, _product(problem.hidden, problem.splits) * (x.abs() @ w.abs().T)
    )

    # What follows from the kernel's own logits. Choices may turn only where scores are equal but for rounding.
    logits, indices = after["logits"].double(), after["indices"].long()
    scores, error = _scores(problem, after["logits"])
    outs = [after["indices"].clone(), torch.empty_like(after["weights"], dtype=torch.float64), logits.clone()]
    losses = [before.get(f"{name}_loss") for name in ("balance", "z")]
    outs += [None if loss is None else loss.double() for loss in losses]  # type: ignore[misc]
    biases = None if bias is None else bias.double()
    attrs = _attrs(problem, before)
    _reference(
        "router",
        attrs,
        [logits, torch.eye(problem.experts).to(logits), biases],
        outs,
    )
    choice = scores if biases is None else scores + biases
    clear = _clear(problem, choice, error * scores + U * choice.abs())
    if (wrong := (clear[:, None] & (outs[0] != indices)).nonzero()).numel():
        token = int(wrong[0, 0])
        raise Mismatch(
            f"indices: token {token} has {indices[token].tolist()}, expected {outs[0][token].tolist()}"
        )
    ranked = indices.sort(1).values
    if (
        (ranked.diff(dim=1) <= 0).any()
        or (ranked[:, 0] < 0).any()
        or (ranked[:, -1] >= problem.experts).any()
    ):
        raise Mismatch("indices: a token's choices are not distinct experts")
    if clear.double().mean() < 0.9 and len(clear) > 1:
        raise Mismatch("indices: the problem says little, scores of most tokens are close")

    weights = scores.gather(1, indices)
    if problem.normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights = weights * before["route_scale"]
    found |= _within("weights", after["weights"], weights, (2 * error + (problem.topk + 4) * U) * weights)
    if problem.balance and clear.all():
        found |= _loss(problem, "balance", before, after, outs[3], 3 * float(error.max()))
    if problem.z:
        found |= _loss(problem, "z", before, after, outs[4], 0.0)
    return found


def _loss(
    problem: RouterProblem, name: str, before: Tensors, after: Tensors, want: torch.Tensor, relative: float
) -> dict[str, float]:
    """A sum of non-negative terms of relative error `relative`; of z, (log Σ exp)², whose logarithm is within 2^-18."""
    tokens, start = len(before["x"]), before[f"{name}_loss"].double()
    grown = want - start
    bound = (relative + (tokens + problem.experts + 64) * U) * grown + 2 * U * (want.abs() + grown)
    if name == "z":
        sizes = after["logits"].double().logsumexp(1).abs() + 1
        scale = before["z"] * before["inverse_sequences"] / before["seq_len"]
        bound = bound + scale * (2.0**-18 * (2 * sizes + 1) * sizes).sum()
    return _within(f"{name}_loss", after[f"{name}_loss"], want, bound)


@check.register
def _(problem: RouterBwdProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    x, w = before["x"].double(), before["w"].double()
    logits, indices = before["logits"].double(), before["indices"]
    experts = problem.experts
    eye = torch.eye(experts).to(logits)
    d, unused = torch.empty_like(logits), torch.zeros_like(eye)
    attrs = _attrs(problem, before)
    ins = [before["dweights"].double(), torch.zeros_like(logits), eye, indices, logits]
    _reference("router_bwd", attrs, ins, [d, unused])
    error = _dlogits_error(problem, before, attrs)
    size = d.abs() + error
    want = d @ w
    two = 3.1 * 2.0**-16 + 3 * TWO_STEPS * -(
        -experts // PRODUCT_DEPTH
    )  # both operands' rest, their second parts
    bound = error @ w.abs() + two * (size @ w.abs())
    bound = bound + STORE * (want.abs() + bound)
    for name in problem.addend_names:
        want = want + before[name].double()
        bound = bound + STORE * (want.abs() + bound)
    found = _within("dx", after["dx"], want, bound)
    want = before["dw"].double() + d.T @ x
    bound = error.T @ x.abs() + _product(len(x), problem.splits) * (size.T @ x.abs()) + 2 * U * want.abs()
    return found | _within("dw", after["dw"], want, bound)


def _dlogits_error(problem: RouterBwdProblem, before: Tensors, attrs: dict[str, Any]) -> torch.Tensor:
    """Of dL/dlogits: each of its terms' magnitudes, which are products of up to 6 scores and their sums' inverses,
    times the relative error of those and of the sums' roundings."""
    logits, indices = before["logits"], before["indices"].long()
    scores, relative = _scores(problem, logits)
    chosen, grads = scores.gather(1, indices), before["dweights"].double().abs()
    if problem.normalize:
        total = chosen.sum(1, keepdim=True) + 1e-20
        grads = (grads + (grads * chosen).sum(1, keepdim=True) / total) / total
    terms = torch.zeros_like(scores).scatter_(1, indices, grads * attrs["route_scale"])
    if problem.balance:
        per = before["seq_len"]
        often = torch.zeros(len(logits) // per, problem.experts, dtype=torch.float64, device=logits.device)
        often.scatter_add_(1, indices.view(len(often), -1), torch.ones_like(grads).view(len(often), -1))
        scale = attrs["balance"] * attrs["inverse_sequences"] / per * problem.experts / (problem.topk * per)
        often = often.repeat_interleave(per, 0) * scale
        total = scores.sum(1, keepdim=True)
        terms += (often + (often * scores).sum(1, keepdim=True) / total) / total
    size = terms * scores
    if problem.score == "softmax":
        size = size + scores * size.sum(1, keepdim=True)
    rounding = 8 * relative + (problem.experts + 32) * U
    found = rounding * size
    if problem.z:
        x = logits.double()
        spread = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        relative = EXP * (2 + spread) + (problem.experts + 8) * U
        log = x.logsumexp(1, keepdim=True).abs()
        factor = 2 * attrs["z"] * attrs["inverse_sequences"] / attrs["seq_len"]
        found = found + factor * x.softmax(1) * (log * relative + 2.0**-18 * (log + 1))
    return found
