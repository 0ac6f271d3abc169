"""Dispatch and return between ranks: right against autograd, and the same bits on any number of ranks, under the
weakest memory order, with any scheduling; and every act of the protocol is needed there too."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from checker import mutants
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import Problem, equal, joined, run
from weak import Weak

from nmoe.rdep.exchange import Exchange, buffers
from nmoe.rdep.plan import CapacityError
from nmoe.rdep.protocol import PROTOCOL
from nmoe.rdep.sizes import worst_case
from nmoe.rdep.transport import Local

PROBLEMS = st.builds(
    Problem, tokens=st.sampled_from([2, 7, 24]), topk=st.integers(1, 4), experts=st.sampled_from([4, 8]),
    align=st.sampled_from([1, 4, 16]), skew=st.integers(0, 7), seed=st.integers(0, 999),
)  # fmt: skip


@functools.cache
def alone(problem, steps=1):
    return joined([run(problem, Exchange(Local(problem.buffers(1))), steps)])


def together(problem, ranks, seed, steps=1, protocol=PROTOCOL, capacity=0):
    group = Weak(ranks, problem.buffers(ranks, capacity), seed)
    return group.run(lambda transport: run(problem, Exchange(transport, protocol), steps))


@given(PROBLEMS)
@settings(max_examples=25, deadline=None)
def test_one_rank_against_autograd(problem):
    (found,) = alone(problem)
    p = problem
    leaf = lambda name, *shape: p.randn(name, *shape).double().requires_grad_()  # noqa: E731
    x, weights = leaf("x 0", p.tokens, p.width), leaf("weights 0", p.tokens, p.topk)
    w1, w2 = (leaf(n, p.experts, p.width, p.width) for n in ("w1", "w2"))
    chosen = p.indices(0).long()
    inner = torch.tanh(torch.einsum("td,tkdn->tkn", x, w1[chosen])) * weights.unsqueeze(-1)
    y = torch.einsum("tkn,tknd->td", inner, w2[chosen])
    y.backward(p.randn("dy 0", p.tokens, p.width).double())
    expected = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, "dw1": w1.grad, "dw2": w2.grad}
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-4), name


@given(PROBLEMS)
@settings(max_examples=25, deadline=None)
def test_one_rank_is_the_ops_of_the_layer_graph(problem):
    p, exchange = problem, Exchange(Local(problem.buffers(1)))
    indices, x, weights = p.indices(0), p.randn("x", p.tokens, p.width), p.randn("w", p.tokens, p.topk)
    capacity = p.buffers(1)["rows.data"].shape[0]
    attrs = {"experts": p.experts, "ranks": 1, "align": p.align, "format": "f32"}
    planned = run_op(
        "moe_plan", [indices], attrs, rows=capacity, into={"load": torch.zeros(p.experts)}
    ).outputs
    plan = [planned[name] for name in ("slots", "row_source", "offsets")]
    sent = run_op("dispatch", [x, weights, *plan], {}, rows=capacity, rows_of=[3]).outputs
    _, routing = exchange.plan(indices, p.experts, p.align)
    (rows,), row_weight = exchange.dispatch(routing, [x], weights)
    assert torch.equal(rows, sent["rows"][: len(rows)]) and torch.equal(
        row_weight, sent["row_weight"][: len(rows)]
    )
    back = run_op(
        "combine", [sent["rows"], sent["row_weight"], *plan], {}, rows=capacity, rows_of=[0, 1, 3]
    ).outputs
    y, values = exchange.combine(routing, rows, row_weight)
    assert torch.equal(y, back["y"]) and torch.equal(values, back["values"])


@given(PROBLEMS, st.sampled_from([1, 2, 4]), st.integers(0, 9999))
@settings(max_examples=25, deadline=None)
def test_rows_in_two_parts_arrive_as_they_are(problem, ranks, seed):
    """Elements and scale factors of MXFP8, byte for byte, to every slot of each token; zero on padding."""
    p, width = problem, 64
    random = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(1, 256, (p.tokens, n), generator=random, dtype=torch.uint8)
        for n in (width, width // 32)
    ]
    own = -(-p.tokens // ranks)
    capacity = worst_case(ranks, own, p.topk, p.experts, p.align)
    held = buffers(ranks, p.experts, own, p.topk, width, capacity, torch.bfloat16, quantized=True)

    def work(exchange):
        t = exchange.transport
        mine = slice(p.tokens * t.rank // ranks, p.tokens * (t.rank + 1) // ranks)
        _, routing = exchange.plan(p.indices(0)[mine], p.experts, p.align)
        rows, _ = exchange.dispatch(routing, [part[mine] for part in parts])
        return routing, rows

    for routing, rows in Weak(ranks, held, seed).run(lambda transport: work(Exchange(transport))):
        starts = torch.tensor([p.tokens * rank // ranks for rank in range(ranks)])
        pads = routing.source < 0
        token = starts[routing.source.clamp(min=0)] + routing.choice.clamp(min=0) // p.topk
        for part, arrived in zip(parts, rows, strict=True):
            assert torch.equal(arrived, part[token].masked_fill(pads[:, None], 0))


@given(PROBLEMS, st.sampled_from([2, 4]), st.integers(0, 9999))
@settings(max_examples=25, deadline=None)
def test_any_number_of_ranks_gives_the_same_bits(problem, ranks, seed):
    results = together(problem, ranks, seed, steps=2)
    assert equal(joined(results), alone(problem, 2))
    assert all(not part["pads"].any() for parts in results for part in parts)


def test_repeats_give_the_same_bits():
    """100 other schedules of the ranks, and of what travels between them."""
    problem = Problem(tokens=8, skew=4)
    for seed in range(100):
        assert equal(joined(together(problem, 2, seed)), alone(problem))


SHOWN = {name: mutant for name, mutant in mutants(PROTOCOL).items() if name != "unordered raise free of rows"}


@pytest.mark.parametrize("mutant", SHOWN.values(), ids=SHOWN.keys())  # the one left out: see weak.py
def test_nothing_can_be_left_out(mutant):
    """A schedule shows it: by a rank that waits for ever, a wrong plan or wrong bits."""
    problem = Problem(tokens=8)
    for seed in range(60):
        results = together(problem, 2, seed, steps=2, protocol=mutant)
        if any(isinstance(r, Exception) for r in results) or not equal(joined(results), alone(problem, 2)):
            return
    pytest.fail("60 schedules did not show it")


def test_overflow_is_the_same_error_on_every_rank_and_nothing_travels():
    problem = Problem(skew=6)
    group = Weak(4, problem.buffers(4, capacity=20), seed=1)
    results = group.run(lambda transport: run(problem, Exchange(transport)))
    message = (
        "rank 0 of 4 would receive 48 expert rows, the capacity is 20: raise [rdep] capacity to at least 48, or set it "
        "to 0 for the worst case"
    )
    for error in results:
        assert isinstance(error, CapacityError)
        assert re.fullmatch(re.escape(message), str(error))
    assert not any(memory[name].any() for memory in group.memory for name in memory if name != "counts")
