"""Ops that work row by row: norm, activation, sums and copies, the embedding."""

from __future__ import annotations

import pytest
import torch
from harness import compare, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.graph import Spec
from nmoe.ops import OPS

sizes, seeds = st.integers(1, 17), st.integers(0, 99)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
dtypes = st.sampled_from(list(TOLERANCE))
some = settings(max_examples=25, deadline=None)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@given(sizes, sizes, seeds, st.sampled_from([1e-6, 0.1]), dtypes)
@some
def test_rms_norm(tokens, width, seed, eps, dtype):
    def oracle(x, w):
        rstd = 1 / torch.sqrt((x**2).sum(-1) / width + eps)
        return {"y": x * rstd[:, None] * w, "rstd": rstd}

    x, w = randn(seed, tokens, width, dtype=dtype), randn(seed + 1, width, dtype=wide(dtype))
    compare(
        "rms_norm", [x, w], {"eps": eps}, oracle, gradient_of=["y"], params=[1], tolerance=TOLERANCE[dtype]
    )


@given(sizes, sizes, seeds, st.booleans(), dtypes)
@some
def test_swiglu(tokens, width, seed, weighted, dtype):
    def oracle(h, s=None):
        gate, up = h.split(width, dim=1)
        a = gate / (1 + torch.exp(-gate)) * up
        return {"a": a if s is None else s[:, None] * a}

    h = randn(seed, tokens, 2 * width, dtype=dtype) * 3
    s = randn(seed + 1, tokens, dtype=wide(dtype)) if weighted else None
    tolerance = TOLERANCE[dtype] if not weighted or dtype != torch.bfloat16 else 3e-2
    compare("swiglu", [h, s], {}, oracle, gradient_of=["a"], tolerance=tolerance)


@given(sizes, sizes, seeds, dtypes)
@some
def test_add(tokens, width, seed, dtype):
    a, b = randn(seed, tokens, width, dtype=dtype), randn(seed + 1, tokens, width, dtype=dtype)
    compare("add", [a, b], {}, lambda a, b: {"y": a + b}, gradient_of=["y"], tolerance=TOLERANCE[dtype])


def test_add_of_unlike_operands():
    with pytest.raises(ValueError, match="add needs two operands of one shape and format"):
        OPS["add"].infer({}, Spec((2, 3), "f32"), Spec((2, 3), "bf16"))


@given(sizes, sizes, sizes, seeds)
@some
def test_split_and_concat(tokens, n, m, seed):
    def split(x):
        a, b = x.tensor_split([n], dim=1)
        return {"a": a, "b": b}

    a, b = randn(seed, tokens, n), randn(seed + 1, tokens, m)
    compare("concat", [a, b], {}, lambda a, b: {"y": torch.cat([a, b], 1)}, gradient_of=["y"])
    compare("split", [torch.cat([a, b], 1)], {"at": n}, split, gradient_of=["a", "b"])


@given(st.lists(st.integers(-3, 6), min_size=1, max_size=40), sizes, seeds, dtypes)
@some
def test_embedding(tokens, width, seed, dtype):
    """Tokens repeat, so that their gradients add up; negative ones read row 0."""
    tokens = torch.tensor(tokens, dtype=torch.int32)

    def oracle(tokens, w):
        hot = torch.nn.functional.one_hot(tokens.clamp(min=0).long(), 7).double()
        return {"x": hot @ w}

    w = randn(seed, 7, width, dtype=dtype)
    compare("embedding", [tokens, w], {}, oracle, gradient_of=["x"], params=[1], tolerance=TOLERANCE[dtype])
