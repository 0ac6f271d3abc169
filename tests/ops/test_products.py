"""gemm and grouped_gemm in their three roles: the reverse pass makes dgrad and wgrad of fprop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from harness import compare, randn, run_op
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.graph import Spec
from nmoe.ops import OPS

sizes = st.integers(1, 9)
counts = st.lists(st.integers(0, 6), min_size=1, max_size=5)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}
dtypes = st.sampled_from(list(TOLERANCE))


def attrs(dtype: torch.dtype) -> dict:
    return {"role": "fprop", "format": NAMES[dtype], "precision": {}}


@given(sizes, sizes, sizes, st.integers(0, 99), dtypes)
@settings(max_examples=25, deadline=None)
def test_gemm(tokens, n, k, seed, dtype):
    x, w = randn(seed, tokens, k, dtype=dtype), randn(seed + 1, n, k, dtype=dtype)
    compare("gemm", [x, w], attrs(dtype), lambda x, w: {"y": torch.einsum("tk,nk->tn", x, w)},
            gradient_of=["y"], params=[1], tolerance=TOLERANCE[dtype])  # fmt: skip


def grouped(counts, align, tail, n, k, seed, dtype):
    """Rows past the last segment hold NaN: the op may neither read them nor write them."""
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + -(-count // align) * align)
    live, rows = ends[-1], ends[-1] + tail
    x, w = randn(seed, rows, k, dtype=dtype), randn(seed + 1, len(counts), n, k, dtype=dtype)
    x[live:] = torch.nan

    def oracle(x, w, offsets):
        parts = [torch.einsum("tk,nk->tn", x[a:b], w[e]) for e, (a, b) in enumerate(pairwise(ends))]
        return {"y": torch.cat(parts)}

    compare("grouped_gemm", [x, w, torch.tensor(ends, dtype=torch.int32)], attrs(dtype), oracle, gradient_of=["y"],
            params=[1], rows=rows, rows_of=[0], valid=live, tolerance=TOLERANCE[dtype])  # fmt: skip


@given(counts, st.sampled_from([1, 16, 32]), st.integers(0, 5), sizes, sizes, st.integers(0, 99), dtypes)
@settings(max_examples=40, deadline=None)
def test_grouped_gemm(counts, align, tail, n, k, seed, dtype):
    grouped(counts, align, tail, n, k, seed, dtype)


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 40, 0], [7]])
def test_experts_without_tokens_and_one_with_all(counts):
    grouped(counts, 1, 3, 4, 5, 0, torch.float64)


def test_weight_gradient_is_added():
    x, w, dy = randn(0, 3, 4), randn(1, 2, 4), randn(2, 3, 2)
    once = run_op("gemm", [x, w], attrs(torch.float64), params=[1], cotangents={"y": dy}).grads[1]
    assert torch.allclose(once, dy.T @ x)
    dw = torch.ones(2, 4, dtype=torch.float64)
    OPS["gemm"].reference({"role": "wgrad"}, [dy, x], [None, dw], [])
    assert torch.allclose(dw, once + 1)


@pytest.mark.parametrize("role, axes", [("fprop", (0, 1)), ("dgrad", (1, 1)), ("wgrad", (0, 1))])
def test_operand_quantized_along_the_other_axis(role, axes):
    a, b = (Spec((32, 32), "mxfp8", axis) for axis in axes)
    with pytest.raises(
        ValueError, match=rf"{role} contracts axis \d, but an operand is quantized along axis \d"
    ):
        OPS["gemm"].infer({"role": role, "format": "bf16"}, a, b)
