"""Rotary embedding and attention against the whole S × S matrix and complex multiplication."""

from __future__ import annotations

import math

import pytest
import torch
from harness import compare, randn, run_op
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.ops.attention import QUERY_BLOCK, rope_frequencies

NO_YARN = {"factor": 1.0}
YARN = {"factor": 40.0, "original_seq_len": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 0.0}  # fmt: skip


def documents(lengths: list[int], seq: int) -> torch.Tensor:
    """Positions int32[seq] of documents of such lengths, cycled until the sequence is full."""
    positions: list[int] = []
    while len(positions) < seq:
        for length in lengths:
            positions += range(length)
    return torch.tensor(positions[:seq], dtype=torch.int32)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_rope(sequences, heads, plain, half, inverse, seed):
    seq = 6
    positions = torch.cat([documents([i + 2, 3], seq) for i in range(sequences)])
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * randn(seed, half)

    def oracle(x, positions, cos, sin):
        x = x.view(len(positions), heads, plain + 2 * half)
        turn = torch.polar(torch.ones_like(angles), -angles if inverse else angles)[positions.long()]
        pairs = (
            torch.view_as_complex(x[..., plain:].reshape(*x.shape[:2], half, 2).contiguous()) * turn[:, None]
        )
        return {"y": torch.cat([x[..., :plain], torch.view_as_real(pairs).flatten(-2)], -1).flatten(1)}

    x = randn(seed, len(positions), heads * (plain + 2 * half))
    attrs = {"dim": 2 * half, "heads": heads, "inverse": inverse}
    compare("rope", [x, positions, angles.cos(), angles.sin()], attrs, oracle, gradient_of=["y"])


def test_rope_inverse_undoes_rope():
    x, positions = randn(0, 8, 12), torch.arange(8, dtype=torch.int32)
    angles = randn(1, 8, 2)
    there = run_op(
        "rope", [x, positions, angles.cos(), angles.sin()], {"dim": 4, "heads": 2, "inverse": False}
    )
    y = there.outputs["y"]
    back = run_op("rope", [y, positions, angles.cos(), angles.sin()], {"dim": 4, "heads": 2, "inverse": True})
    assert torch.allclose(back.outputs["y"], x, atol=1e-14) and not torch.allclose(y, x)


def test_rope_table():
    attrs = {"seq_len": 50, "dim": 8, "theta": 100.0, "yarn": NO_YARN, "format": "f64"}
    table = run_op_without_inputs(attrs)
    for position in (0, 1, 49):
        for i in range(4):
            angle = position / 100.0 ** (2 * i / 8)
            assert table["cos"][position, i].item() == pytest.approx(math.cos(angle), abs=1e-12)
            assert table["sin"][position, i].item() == pytest.approx(math.sin(angle), abs=1e-12)


def run_op_without_inputs(attrs):
    from nmoe.executor import Executor
    from nmoe.graph import Graph
    from nmoe.schedule import place

    graph = Graph()
    names = graph.emit("rope_table", "table", [], attrs, phase="init")
    executor = Executor(place(graph, "cpu", {}), {})
    return dict(zip(("cos", "sin"), map(executor.operand, names), strict=True))


def test_yarn_frequencies():
    """arXiv 2309.00071 eq. 17–23, dimension by dimension, with the ramp's ends rounded outwards as DeepSeek does."""
    dim, theta = 64, 10000.0
    frequencies, scale = rope_frequencies(dim, theta, YARN)
    turns_at = [4096 / (2 * math.pi * theta ** (2 * i / dim)) for i in range(dim // 2)]
    for i, turns in enumerate(turns_at):
        base = theta ** (-2 * i / dim)
        if turns > 32 * theta ** (2 / dim):  # a dimension inside the rounding of the ramp's end
            assert frequencies[i].item() == pytest.approx(base)
        elif turns < 1 / theta ** (2 / dim):
            assert frequencies[i].item() == pytest.approx(base / 40)
        else:
            assert base / 40 * 0.999 <= frequencies[i].item() <= base * 1.001
    assert bool((frequencies.diff() < 0).all())
    assert scale == pytest.approx(0.1 * math.log(40) + 1)
    assert rope_frequencies(dim, theta, {**YARN, "mscale_all_dim": 1.0})[1] == pytest.approx(1.0)


def whole_matrix(heads, nope, rope, v, seq, window, scale):
    def oracle(q, kv, k_rope, positions):
        q = q.view(-1, seq, heads, nope + rope)
        kv = kv.view(-1, seq, heads, nope + v)
        shared = k_rope.view(-1, seq, 1, rope).expand(-1, -1, heads, -1)
        k = torch.cat([kv[..., :nope], shared], -1)
        at = torch.arange(seq)
        starts = at - positions.view(-1, seq).long()  # where each token's document starts
        seen = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= starts[:, :, None])
        if window:
            seen &= at[None, None, :] > at[None, :, None] - window
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), kv[..., nope:])
        lse = scores.logsumexp(-1)
        return {"o": o.reshape(-1, heads * v), "lse": lse.transpose(0, 1).reshape(heads, -1)}

    return oracle


def attend(sequences, seq, heads, nope, rope, v, window, lengths, seed, dtype=torch.float64, tolerance=1e-11):
    positions = torch.cat([documents([n + i for n in lengths], seq) for i in range(sequences)])
    tokens, scale = sequences * seq, 1.3 / math.sqrt(nope + rope)
    q = randn(seed, tokens, heads * (nope + rope), dtype=dtype)
    kv = randn(seed + 1, tokens, heads * (nope + v), dtype=dtype)
    k_rope = randn(seed + 2, tokens, rope, dtype=dtype)
    attrs = {
        "heads": heads,
        "nope": nope,
        "rope": rope,
        "v": v,
        "window": window,
        "seq_len": seq,
        "scale": scale,
    }
    compare("attention", [q, kv, k_rope, positions], attrs, whole_matrix(heads, nope, rope, v, seq, window, scale),
            gradient_of=["o"], tolerance=tolerance)  # fmt: skip


dims = st.integers(1, 5)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), dims, dims, dims, st.integers(0, 8),
       st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention(sequences, seq, heads, nope, rope, v, window, lengths, seed):
    attend(sequences, seq, heads, nope, rope, v, window, lengths, seed)


@pytest.mark.parametrize("seq", [QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 37])
@pytest.mark.parametrize("window", [0, 1, 50, QUERY_BLOCK, QUERY_BLOCK + 60])
@pytest.mark.parametrize("lengths", [[10_000], [40, 200], [QUERY_BLOCK]])
def test_attention_over_query_blocks(seq, window, lengths):
    attend(2, seq, 2, 3, 2, 4, window, lengths, seq + window)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_in_lower_precision(dtype, tolerance):
    attend(2, 150, 2, 8, 4, 8, 0, [60, 100], 3, dtype, tolerance)


def test_attention_of_large_scores_stays_finite():
    q = torch.full((4, 2), 1e3, dtype=torch.float32)
    attrs = {"heads": 1, "nope": 1, "rope": 1, "v": 1, "window": 0, "seq_len": 4, "scale": 1.0}
    operands = [q, torch.full((4, 2), 1e3), torch.full((4, 1), 1e3), torch.arange(4, dtype=torch.int32)]
    result = run_op("attention", operands, attrs, cotangents={"o": torch.ones(4, 1)})
    assert all(bool(x.isfinite().all()) for x in (*result.outputs.values(), *result.grads.values()))
