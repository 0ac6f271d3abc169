"""Router, slot plan, dispatch and combine against per-token Python and autograd."""

from __future__ import annotations

import re

import pytest
import torch
from harness import close, compare, randn, run_op
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nmoe.executor import allocate
from nmoe.graph import Graph
from nmoe.ops.moe import CapacityError
from nmoe.schedule import place

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}


def choose(scores, bias, attrs):
    """Expert indices of one token by falling score, ties to the lower expert; plain Python."""
    score = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(score) // attrs["groups"]
    best = 2 if attrs["score"] == "sigmoid" else 1
    value = {g: sum(sorted(score[g * size : (g + 1) * size])[-best:]) for g in range(attrs["groups"])}
    open_groups = sorted(value, key=lambda g: (-value[g], g))[: attrs["topk_groups"]]
    candidates = [e for e in range(len(score)) if e // size in open_groups]
    return sorted(candidates, key=lambda e: (-score[e], e))[: attrs["topk"]]


def route(x, w, bias, attrs):
    """All outputs of the router as a function of x and w."""
    logits = x @ w.T
    scores = torch.sigmoid(logits) if attrs["score"] == "sigmoid" else logits.softmax(-1)
    shift = [0.0] * w.shape[0] if bias is None else bias.tolist()
    indices = torch.tensor([choose(row, shift, attrs) for row in scores.tolist()])
    weights = torch.stack([s[i] for s, i in zip(scores, indices, strict=True)])
    if attrs["normalize"]:
        weights = weights / weights.sum(-1, keepdim=True)
    outputs = {"indices": indices, "weights": weights * attrs["route_scale"], "logits": logits}
    sequences = len(x) // attrs["seq_len"]
    if attrs["balance"]:
        loss = 0.0
        for b in range(sequences):
            rows = slice(b * attrs["seq_len"], (b + 1) * attrs["seq_len"])
            share = (scores[rows] / scores[rows].sum(-1, keepdim=True)).mean(0)
            for e in range(w.shape[0]):
                often = (indices[rows] == e).double().sum() * w.shape[0] / (attrs["topk"] * attrs["seq_len"])
                loss = loss + attrs["balance"] * often * share[e]
        outputs["balance"] = (loss * attrs["inverse_sequences"])[None]
    if attrs["z"]:
        z = torch.log(torch.exp(logits).sum(-1)) ** 2
        outputs["z"] = (attrs["z"] * attrs["inverse_sequences"] * z.sum() / attrs["seq_len"])[None]
    return outputs


@st.composite
def routings(draw):
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    topk_groups = draw(st.integers(1, groups))
    return {
        "groups": groups, "topk_groups": topk_groups, "topk": draw(st.integers(1, topk_groups * size)),
        "score": draw(st.sampled_from(["sigmoid", "softmax"])), "normalize": draw(st.booleans()),
        "route_scale": draw(st.sampled_from([1.0, 2.5])), "balance": draw(st.sampled_from([0.0, 0.7])),
        "z": draw(st.sampled_from([0.0, 0.4])), "seq_len": draw(st.integers(1, 6)), "inverse_sequences": 0.125,
    }, groups * size  # fmt: skip


@given(routings(), st.integers(1, 3), st.integers(1, 8), st.booleans(), st.integers(0, 99),
       st.sampled_from([torch.float64, torch.float32]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_router(routing, sequences, dim, biased, seed, dtype):
    attrs, experts = routing
    x = randn(seed, sequences * attrs["seq_len"], dim, dtype=dtype)
    w = randn(seed + 1, experts, dim, dtype=dtype)
    bias = randn(seed + 2, experts, dtype=dtype) * 0.3 if biased else None
    if dtype == torch.float32:  # no near-ties that rounding could turn
        scores = torch.cat([(x.double() @ w.double().T).sigmoid(), (x.double() @ w.double().T).softmax(-1)])
        assume(scores.sort(-1).values.diff().abs().min() > 1e-4 and not biased and attrs["groups"] == 1)
    into = {label: torch.tensor([1.5], dtype=dtype) for label in ("balance", "z") if attrs[label]}
    compare("router", [x, w, bias], attrs, lambda x, w, bias=None: route(x, w, bias, attrs), gradient_of=["weights"],
            params=[1] if bias is None else [1, 2], into=into,
            tolerance=1e-10 if dtype == torch.float64 else 1e-5)  # fmt: skip


def test_ties_go_to_the_lower_expert():
    attrs = {"groups": 2, "topk_groups": 1, "topk": 3, "score": "sigmoid", "normalize": True, "route_scale": 1.0,
             "balance": 0.0, "z": 0.0, "seq_len": 2, "inverse_sequences": 1.0}  # fmt: skip
    out = run_op("router", [torch.zeros(2, 4), torch.zeros(8, 4), None], attrs, params=[1]).outputs
    assert out["indices"].tolist() == [[0, 1, 2]] * 2
    close(out["weights"], torch.full((2, 3), 1 / 3), 1e-6)


def test_bias_chooses_and_does_not_weigh():
    attrs = {"groups": 1, "topk_groups": 1, "topk": 1, "score": "sigmoid", "normalize": False, "route_scale": 1.0,
             "balance": 0.0, "z": 0.0, "seq_len": 1, "inverse_sequences": 1.0}  # fmt: skip
    x, w = torch.tensor([[1.0]]), torch.tensor([[2.0], [-2.0]])
    out = run_op("router", [x, w, torch.tensor([0.0, 5.0])], attrs, params=[1, 2]).outputs
    assert out["indices"].tolist() == [[1]]
    close(out["weights"], torch.sigmoid(torch.tensor([[-2.0]])), 1e-6)


# ---- plan ----


def plan_attrs(experts, align):
    return {"experts": experts, "ranks": 1, "align": align, "format": "f32"}


def worst_case(tokens, topk, experts, align):
    rows = tokens * topk + experts * (align - 1)
    return -(-rows // align) * align


@st.composite
def choices(draw, max_tokens=12):
    experts = draw(st.integers(1, 6))
    topk = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, max_tokens))
    used = draw(st.integers(topk, experts))  # the others stay empty
    rows = [draw(st.permutations(range(used)))[:topk] for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int32), experts


def plan(indices, experts, align, extra=0):
    rows = worst_case(*indices.shape, experts, align) + extra
    load = torch.arange(experts, dtype=torch.float32)
    return rows, run_op(
        "moe_plan", [indices], plan_attrs(experts, align), rows=rows, into={"load": load}
    ).outputs


aligns = st.sampled_from([1, 4, 16, 32])


@given(choices(), aligns, st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_plan(routing, align, extra):
    indices, experts = routing
    rows, out = plan(indices, experts, align, extra)
    slots, source, offsets = (out[label].tolist() for label in ("slots", "row_source", "offsets"))
    flat = indices.flatten().tolist()
    expected = [0]
    for e in range(experts):
        expected.append(expected[-1] + -(-flat.count(e) // align) * align)
    assert offsets == expected
    # every choice has one row of its expert's segment, in the order of (expert, token, k); the rest is padding
    order = sorted(range(len(flat)), key=lambda choice: (flat[choice], choice))
    assert [s for s in source if s >= 0] == order
    assert len(source) == rows and sum(s >= 0 for s in source) == len(flat)
    for choice, slot in enumerate(x for token in slots for x in token):
        assert source[slot] == choice
        assert offsets[flat[choice]] <= slot < offsets[flat[choice]] + flat.count(flat[choice])
    assert out["load"].tolist() == [e + flat.count(e) for e in range(experts)]


def test_plan_beyond_capacity_names_the_layer_and_the_remedy():
    from nmoe.executor import Executor

    graph = Graph()
    graph.add("indices", (4, 2), "i32", "input")
    graph.add("load", (3,), "f32", "state")
    graph.emit("moe_plan", "layers.7.moe.plan", ["indices"], plan_attrs(3, 4), into={"load": "load"})
    schedule = place(graph, "cpu", {"R": 8})
    tensors = allocate(schedule)
    tensors["indices"].copy_(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]))
    message = "layers.7.moe.plan: 12 expert rows arrived, the capacity is 8: raise [rdep] capacity to at least 12, or set it to 0 for the worst case"  # noqa: E501 fmt: skip
    with pytest.raises(CapacityError, match=re.escape(message)):
        Executor(schedule, tensors).run("micro")
    assert tensors["load"].tolist() == [0, 0, 0]


# ---- dispatch and combine ----


def live_rows(out, rows):
    """True where a row holds a choice; padding and the rows past the last segment hold none."""
    return (out["row_source"] >= 0) & (torch.arange(rows) < out["offsets"][-1])


@given(choices(), aligns, st.integers(1, 5), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_dispatch(routing, align, dim, weighted, seed):
    indices, experts = routing
    rows, out = plan(indices, experts, align, extra=3)
    (tokens, topk), n = indices.shape, int(out["offsets"][-1])
    x, weights = randn(seed, tokens, dim), randn(seed + 1, tokens, topk) if weighted else None

    def oracle(x, weights, slots, source, offsets):
        at = torch.nn.functional.one_hot(slots.long(), n).double()  # [tokens, topk, rows]
        moved = {"rows": torch.einsum("tkr,td->rd", at, x)}
        return moved if weights is None else moved | {"row_weight": torch.einsum("tkr,tk->r", at, weights)}

    operands = [x, weights, out["slots"], out["row_source"], out["offsets"]]
    if weighted:
        compare(
            "dispatch",
            operands,
            {},
            oracle,
            gradient_of=["rows", "row_weight"],
            rows=rows,
            rows_of=[3],
            valid=n,
        )
    found = run_op("dispatch", operands, {}, rows=rows, rows_of=[3]).outputs
    padding = ~live_rows(out, rows)[:n]
    for label, y in oracle(*operands).items():
        close(found[label][:n], y)
        assert found[label][:n][padding].abs().sum() == 0


@given(
    choices(), aligns, st.integers(1, 5), st.integers(0, 99), st.sampled_from([torch.float64, torch.bfloat16])
)
@settings(max_examples=40, deadline=None)
def test_combine(routing, align, dim, seed, dtype):
    """Padding holds NaN, which must not reach a token; its gradient is zero."""
    indices, experts = routing
    rows, out = plan(indices, experts, align, extra=3)
    live, n = live_rows(out, rows), int(out["offsets"][-1])
    y = randn(seed, rows, dim, dtype=dtype).masked_fill(~live[:, None], torch.nan)

    def oracle(y, values, slots, source, offsets):
        return {"y": torch.stack([sum(y[slot] for slot in token) for token in slots.tolist()])}

    operands = [y, None, out["slots"], out["row_source"], out["offsets"]]
    result = compare("combine", operands, {}, oracle, gradient_of=["y"], rows=rows, rows_of=[0, 3], valid=n,
                     tolerance=1e-12 if dtype == torch.float64 else 1e-2)  # fmt: skip
    assert result.grads[0][:n][~live[:n]].abs().sum() == 0


def test_combine_sums_in_fp32_in_the_order_of_the_choices():
    big, small = 256.0, 0.5  # bfloat16 sums would lose each of the small ones
    y = torch.tensor([[big], [small], [small], [small], [small]], dtype=torch.bfloat16)
    slots = torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.int32)
    operands = [y, None, slots, torch.arange(5, dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)]
    assert run_op("combine", operands, {}, rows=5, rows_of=[0, 3]).outputs["y"].item() == 258.0
