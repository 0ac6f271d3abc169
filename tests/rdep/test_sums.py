"""One tree for all sums: whoever adds which terms first, the bits are the same."""

from __future__ import annotations

import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.accumulate import Accumulator
from nmoe.rdep.sums import tree_sum


def terms(count: int, seed: int = 0, size: int = 8) -> list[torch.Tensor]:
    """Of many magnitudes, so that another order shows."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-12, 12, (count, size), generator=generator)
    return list(torch.randn(count, size, generator=generator) * 2.0**scale)


def by_definition(values: list[torch.Tensor]) -> torch.Tensor:
    """The left subtree holds the largest power of two of the terms that is less than all of them."""
    if len(values) == 1:
        return values[0]
    left = 1
    while 2 * left < len(values):
        left *= 2
    return by_definition(values[:left]) + by_definition(values[left:])


@given(st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_the_tree(count, seed):
    values = terms(count, seed)
    assert torch.equal(tree_sum(values), by_definition(values))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8])
def test_micro_batches_shared_out_among_ranks(turns, ranks):
    """Each turn is summed over the ranks, then the turns are."""
    values = terms(turns * ranks, seed=turns)
    total, other = torch.full((8,), torch.nan), torch.full((1,), torch.nan)
    sums = Accumulator((total, other), turns, cleared=(total, other))
    for _ in range(2):  # and once more, with what the first left behind
        sums.begin()
        for turn in range(turns):
            total.add_(tree_sum(values[turn * ranks : (turn + 1) * ranks]))
            other.add_(1.0)
            sums.add()
        assert torch.equal(total, by_definition(values)) and float(other) == turns
    if len(values) > 8:
        assert not torch.equal(total, by_definition([*values[1:], values[0]])), (
            "the order shows in these terms"
        )


@given(
    st.lists(st.integers(0, 9), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]), st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_an_experts_weight_gradient_is_that_of_so_many_ranks(counts, runs, seed):
    """Each run of rows alone, then the tree; rows and products as if each run were an expert's."""
    experts, n, k = 12 // runs, 16, 32  # every row starts on a cache line: MKL's bits depend on the alignment
    generator = torch.Generator().manual_seed(seed)
    rows = sum(counts)
    dy, x = torch.randn(rows, n, generator=generator), torch.randn(rows, k, generator=generator)
    w = torch.randn(experts, n, k, generator=generator)
    ends = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    attrs = {"role": "wgrad", "format": "f32", "precision": {}, "experts": experts}
    into = {"dw": torch.zeros(experts, n, k)}
    found = run_op("grouped_gemm", [dy, x, ends], attrs, rows=rows, rows_of=[0, 1], into=into).outputs["dw"]
    alone = run_op("grouped_gemm", [dy, x, ends], attrs | {"experts": 12}, rows=rows, rows_of=[0, 1],
                   into={"dw": torch.zeros(12, n, k)}).outputs["dw"]  # fmt: skip
    for e in range(experts):
        assert torch.equal(found[e], by_definition(list(alone[e * runs : (e + 1) * runs])) + 0.0)
    y = run_op(
        "grouped_gemm", [x, w, ends], attrs | {"role": "fprop"}, rows=rows, rows_of=[0], params=[1]
    ).outputs["y"]
    many = w.repeat_interleave(runs, 0)
    same = run_op(
        "grouped_gemm", [x, many, ends], attrs | {"role": "fprop"}, rows=rows, rows_of=[0], params=[1]
    )
    assert torch.equal(y, same.outputs["y"])
