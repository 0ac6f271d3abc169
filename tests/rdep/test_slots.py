"""The slot plan against plain Python, against the one-rank plan of nmoe.ops, and at its limits."""

from __future__ import annotations

import re

import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.rdep.plan import CapacityError, check_capacity, count, place, plan
from nmoe.rdep.sizes import worst_case

ALIGNS = st.sampled_from([1, 4, 16, 128])


RANKS = st.sampled_from([1, 2, 3, 4])


@st.composite
def routings(draw, ranks=RANKS):
    """int32[ranks, tokens, topk] of distinct experts a token, some experts unused, and how many experts there are."""
    size, local = draw(ranks), draw(st.integers(1, 4))
    experts = size * local
    topk, tokens = draw(st.integers(1, experts)), draw(st.integers(1, 9))
    used = draw(st.permutations(range(experts)))[: draw(st.integers(topk, experts))]
    rows = [[draw(st.permutations(used))[:topk] for _ in range(tokens)] for _ in range(size)]
    return torch.tensor(rows, dtype=torch.int32), experts


def matrix(indices, experts):
    return torch.stack([count(own, experts) for own in indices])


@given(routings(), ALIGNS)
@settings(max_examples=80, deadline=None)
def test_rows_are_ordered_by_expert_source_token_and_choice(routing, align):
    indices, experts = routing
    ranks, tokens, topk = indices.shape
    made = plan(matrix(indices, experts), align)
    local = experts // ranks
    found: list[dict[int, tuple]] = [{} for _ in range(ranks)]
    for source in range(ranks):
        owners, slots = place(made, indices[source], source)
        for token in range(tokens):
            for k in range(topk):
                expert = int(indices[source, token, k])
                owner, slot = int(owners[token, k]), int(slots[token, k])
                assert owner == expert // local
                assert slot not in found[owner], "two rows in one slot"
                found[owner][slot] = (expert, source, token, k)
    assert sum(map(len, found)) == ranks * tokens * topk
    for rank, rows in enumerate(found):
        expected, slot = {}, 0
        for expert in range(rank * local, (rank + 1) * local):
            assert int(made.offsets[rank, expert - rank * local]) == slot
            arrivals = sorted(row for row in rows.values() if row[0] == expert)
            expected |= {slot + i: row for i, row in enumerate(arrivals)}
            slot += -(-len(arrivals) // align) * align
        assert rows == expected
        assert made.totals[rank] == slot
        assert made.sources(rank).tolist() == [rows[i][1] if i in rows else -1 for i in range(slot)]


@given(routings(ranks=st.just(1)), ALIGNS)
@settings(max_examples=40, deadline=None)
def test_one_rank_is_the_plan_of_the_op(routing, align):
    indices, experts = routing
    (_, tokens, topk), attrs = (
        indices.shape,
        {"experts": experts, "ranks": 1, "align": align, "format": "f32"},
    )
    rows = worst_case(1, tokens, topk, experts, align)
    out = run_op("moe_plan", [indices[0]], attrs, rows=rows, into={"load": torch.zeros(experts)}).outputs
    made = plan(matrix(indices, experts), align)
    assert torch.equal(place(made, indices[0], 0)[1], out["slots"].long())
    assert torch.equal(made.offsets[0], out["offsets"].long())


@given(routings(), ALIGNS)
@settings(max_examples=60, deadline=None)
def test_ranks_hold_what_one_rank_would_hold(routing, align):
    """Rank after rank, the segments of the group are those of one rank that holds all tokens."""
    indices, experts = routing
    ranks, _, topk = indices.shape
    many, one = plan(matrix(indices, experts), align), plan(matrix(indices.view(1, -1, topk), experts), align)
    starts = torch.tensor([0, *many.totals]).cumsum(0)
    together = torch.cat(
        [place(many, indices[r], r)[1] + starts[place(many, indices[r], r)[0]] for r in range(ranks)]
    )
    assert torch.equal(together, place(one, indices.view(-1, topk), 0)[1])


@given(routings(), ALIGNS)
@settings(max_examples=40, deadline=None)
def test_nothing_exceeds_the_worst_case(routing, align):
    indices, experts = routing
    ranks, tokens, topk = indices.shape
    check_capacity(plan(matrix(indices, experts), align), worst_case(ranks, tokens, topk, experts, align))


@pytest.mark.parametrize(
    ("ranks", "tokens", "topk", "experts", "align"), [(2, 8, 1, 4, 4), (1, 5, 2, 3, 4), (4, 3, 1, 8, 8)]
)
def test_the_worst_case_occurs(ranks, tokens, topk, experts, align):
    """Over all ways to share the rows among one rank's experts; each expert is chosen once a token at most."""
    local, total = experts // ranks, ranks * tokens
    rows = total * min(topk, local)
    best, todo = 0, [(0, rows, 0)]
    while todo:
        expert, left, used = todo.pop()
        if expert == local:
            best = max(best, used if not left else 0)
            continue
        todo += [(expert + 1, left - n, used + -(-n // align) * align) for n in range(min(left, total) + 1)]
    assert worst_case(ranks, tokens, topk, experts, align) == best


def test_overflow_names_rank_need_capacity_and_remedy():
    made = plan(torch.tensor([[4, 0, 5, 0], [4, 0, 4, 1]]), 4)
    assert made.totals == [8, 16]
    check_capacity(made, 16)
    message = (
        "rank 1 of 2 would receive 16 expert rows, the capacity is 15: raise [rdep] capacity to at least 16, or set it "
        "to 0 for the worst case"
    )
    with pytest.raises(CapacityError, match=f"^{re.escape(message)}$"):
        check_capacity(made, 15)
