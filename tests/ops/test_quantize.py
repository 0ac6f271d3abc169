"""The quantize op, and linear layers whose operands the schedule has quantized."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from harness import POISONS, close, poisoned_executor, randn, run_op, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe import formats
from nmoe.executor import allocate
from nmoe.graph import Graph
from nmoe.schedule import passes, place

PLAIN = {"rounding": "nearest", "hadamard": False, "square": False, "seed": 7 << 32}


def quantized(x, attrs, offsets=None, counter=None):
    """The op's result under both poisons, whose bits must agree; the op itself reads no memory but its operands'."""
    results = []
    for poison in POISONS:
        graph = Graph()
        graph.add("x", tuple(x.shape), "f32" if x.dtype == torch.float32 else "bf16", "input")
        values = {"x": x}
        if offsets is not None:
            values[graph.add("offsets", tuple(offsets.shape), "i32", "input")] = offsets
        if counter is not None:
            values[graph.add("counter", (1,), "i64", "state")] = torch.tensor([counter])
        names = ["x", *(name if name in values else None for name in ("offsets", "counter"))]
        (name,) = graph.emit("quantize", "q", names, {**PLAIN, **attrs})
        schedule = place(graph, "cpu", {})
        tensors = allocate(schedule)
        for key, value in values.items():
            tensors[key].copy_(value)
        executor = poisoned_executor(schedule, tensors, poison)
        executor.run("micro")  # not `poisoned_run`, after which the result, that no op reads, would be gone
        q = executor.operand(name)
        results.append([part.clone() for part in (q.data, q.scale, q.amax) if part is not None])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    return q, results[0]


@given(st.sampled_from(["mxfp8", "nvfp4"]), st.integers(0, 1), st.sampled_from([torch.float32, torch.bfloat16]),
       st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_quantize_is_the_format(fmt, axis, dtype, rows, columns, seed):
    x = randn(seed, 32 * rows, 32 * columns, dtype=dtype)
    _, parts = quantized(x, {"format": fmt, "axis": axis})
    expected = formats.quantize(x, fmt, axis)
    for part, wanted in zip(parts, (expected.data, expected.scale, expected.amax), strict=False):
        assert same_bits(part, wanted)


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_row_segments_do_not_mix(fmt, axis):
    """Each expert's rows are quantized as if alone; the rows past the last are not read and become zeros."""
    offsets = torch.tensor([0, 32, 32, 96], dtype=torch.int32)
    x = randn(0, 128, 32, dtype=torch.float32) * torch.logspace(-3, 3, 128)[:, None]
    x[96:] = torch.nan
    q, _ = quantized(x, {"format": fmt, "axis": axis}, offsets)
    values = formats.dequantize(q)
    for start, end in pairwise(offsets.tolist()):
        if end > start:
            close(
                values[start:end],
                formats.dequantize(formats.quantize(x[start:end].contiguous(), fmt, axis)),
                0,
            )
    assert values[96:].abs().sum() == 0


def test_stochastic_rounding_follows_the_counter():
    x = randn(0, 32, 32, dtype=torch.float32)
    attrs = {"format": "nvfp4", "axis": 1, "rounding": "stochastic"}
    parts = [quantized(x, attrs, counter=counter)[1] for counter in (3, 3, 4)]
    assert same_bits(parts[0][0], parts[1][0]) and not same_bits(parts[0][0], parts[2][0])


RECIPES = {
    # format → role → the two operands: blocked axis and options (arXiv 2509.25149 §4; TransformerEngine's MXFP8)
    "mxfp8": {"fprop": ((1, {}), (1, {})), "dgrad": ((1, {}), (0, {})), "wgrad": ((0, {}), (0, {}))},
    "nvfp4": {"fprop": ((1, {}), (1, {"square": True}))},
}  # fmt: skip


def through(x, fmt, how):
    axis, options = how
    return formats.dequantize(formats.quantize(x, fmt, axis, **options)).double()


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
def test_linear_layer_in_low_precision(fmt):
    """Each product is that of the operands as its recipe quantizes them, accumulated in FP32."""
    x, w = randn(0, 64, 96, dtype=torch.bfloat16), randn(1, 32, 96, dtype=torch.bfloat16)
    dy = randn(2, 64, 32, dtype=torch.bfloat16)
    attrs = {"role": "fprop", "format": "bf16", "precision": dict.fromkeys(("fprop", "dgrad", "wgrad"), fmt)}
    result = run_op(
        "gemm", [x, w], attrs, params=[1], cotangents={"y": dy}, stages=[passes.quantize_operands]
    )
    recipe = RECIPES[fmt]
    a, b = (through(v, fmt, how) for v, how in zip((x, w), recipe["fprop"], strict=True))
    close(result.outputs["y"], a @ b.T, 4e-3)
    if fmt == "mxfp8":
        a, b = (through(v, fmt, how) for v, how in zip((dy, w), recipe["dgrad"], strict=True))
        close(result.grads[0], a @ b, 4e-3)
        a, b = (through(v, fmt, how) for v, how in zip((dy, x), recipe["wgrad"], strict=True))
        close(result.grads[1], a.T @ b, 1e-6)
    else:  # stochastic rounding: near the exact product, and not it
        for found, exact in (
            (result.grads[0], dy.double() @ w.double()),
            (result.grads[1], dy.double().T @ x.double()),
        ):
            error = ((found.double() - exact).norm() / exact.norm()).item()
            assert 0.05 < error < 0.25


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("counts", [[32, 0, 64], [0, 0, 0], [96, 0, 0]])
def test_experts_in_low_precision(fmt, counts):
    """As one linear layer an expert; NaN past the last row reaches nothing."""
    ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
    rows, live = 128, ends[-1]
    x, w = randn(0, rows, 32, dtype=torch.bfloat16), randn(1, 3, 64, 32, dtype=torch.bfloat16)
    x[live:] = torch.nan
    dy = randn(2, live, 64, dtype=torch.bfloat16)
    attrs = {"role": "fprop", "format": "bf16", "precision": dict.fromkeys(("fprop", "dgrad", "wgrad"), fmt)}
    operands = [x, w, torch.tensor(ends, dtype=torch.int32)]
    result = run_op("grouped_gemm", operands, attrs, params=[1], rows=rows, rows_of=[0], cotangents={"y": dy},
                    stages=[passes.quantize_operands])  # fmt: skip
    for e, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            assert result.grads[1][e].abs().sum() == 0
            continue
        how = RECIPES[fmt]["fprop"]
        a, b = through(x[start:end], fmt, how[0]), through(w[e], fmt, how[1])
        close(result.outputs["y"][start:end], a @ b.T, 4e-3)
        exact = dy[start:end].double().T @ x[start:end].double()
        error = ((result.grads[1][e].double() - exact).norm() / exact.norm()).item()
        assert error < (0.05 if fmt == "mxfp8" else 0.25)
        if fmt == "mxfp8":
            a, b = (through(v[start:end], fmt, (0, {})) for v in (dy, x))
            close(result.grads[1][e], a.T @ b, 1e-6)
