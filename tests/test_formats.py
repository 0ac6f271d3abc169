"""formats, tensor by tensor: special values, properties of the copies, buffers, mistakes."""

import itertools
import math

import numpy as np
import pytest
import torch
from formats_common import COPIES, SEEDS, buffers, randn, same
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe import formats
from nmoe.formats import block_scaled, dequantize, quantize
from nmoe.storage import BLOCK, storage

INF, NAN = math.inf, math.nan


# Special values


@pytest.mark.parametrize("axis", [0, 1])
def test_special_values_mxfp8(axis):
    x = torch.ones(4, 32)
    x[0] = 0
    x[1, 3] = NAN
    x[2, 3] = -INF
    q = quantize(x if axis == 1 else x.T, "mxfp8", axis)
    data = q.data if axis == 1 else q.data.T
    assert q.scale[:, 0].tolist() == [0x00, 0xFF, 0xFE, 119]
    assert data[0].tolist() == [0] * 32
    assert (data[1] & 0x7F == 0x7F).all()
    assert data[2].tolist() == [0] * 3 + [0xFE] + [0] * 28
    result = dequantize(q) if axis == 1 else dequantize(q).T
    assert torch.equal(result[0], x[0]) and torch.equal(result[3], x[3])
    assert result[1].isnan().all()
    assert result[2, 3] == -INF


@pytest.mark.parametrize(("bad", "amax"), [(NAN, NAN), (INF, INF), (-INF, INF)])
def test_a_bad_value_spoils_its_nvfp4_tensor(bad, amax):
    """One NaN or infinity must not disappear: nothing that it shares the global factor with is finite."""
    x = randn(4, 32, 32)
    x[3, 3] = bad
    q = quantize(x, "nvfp4", 1)
    assert q.amax.isnan() if math.isnan(amax) else q.amax == amax
    assert not dequantize(q).isfinite().any()
    if math.isinf(bad):  # the scales stay numbers, as TransformerEngine's do
        assert (q.scale < 0x7F).all() and q.scale[3, 0] == 0x7E
    batch = quantize(torch.stack([x, randn(5, 32, 32)]), "nvfp4", 1)
    assert dequantize(batch)[1].isfinite().all()
    rows = quantize(torch.cat([x, x.nan_to_num(0, 0, 0)]), "nvfp4", 0, segments=torch.tensor([0, 32, 64]))
    assert dequantize(rows)[32:].isfinite().all() and not dequantize(rows)[:32].isfinite().any()


@pytest.mark.parametrize(("format", "axis"), COPIES)
def test_zeros(format, axis):
    x = torch.zeros(32, 32)
    x[5, 5] = -0.0
    q = quantize(x, format, axis)
    assert (q.scale == 0).all() and (dequantize(q) == 0).all()
    assert (q.data & (0x7F if format == "mxfp8" else 0x77) == 0).all()
    assert q.amax is None or q.amax == 0


@pytest.mark.parametrize(("format", "axis"), COPIES)
def test_subnormal_input(format, axis):
    x = torch.full((32, 32), 1e-42)
    q = quantize(x, format, axis)
    assert dequantize(q).isfinite().all()
    assert (dequantize(q).abs() <= 2e-42).all()
    if format == "mxfp8":
        assert ((dequantize(q) - x).abs() <= 2.0**-137).all()


def test_extreme_finite_input():
    x = torch.full((1, 32), 1.9 * 2.0**127)  # from 1.9375 · 2^127 on E4M3 rounds up to 2^128
    assert ((dequantize(quantize(x, "mxfp8", 1)) / x - 1).abs() <= 2.0**-4).all()
    assert ((dequantize(quantize(x, "nvfp4", 1)) / x - 1).abs() <= 2.0**-20).all()


# Properties of the copies


@settings(max_examples=30, deadline=None)
@given(
    SEEDS,
    st.sampled_from(COPIES),
    st.sampled_from(["nearest", "stochastic"]),
    st.sampled_from([0.0, 5.0]),
    st.integers(-90, 90),
)
def test_error_bounds(seed, copy, rounding, spread, exponent):
    format, axis = copy
    rounding = rounding if format == "nvfp4" else "nearest"
    x = randn(seed, 2, 64, 64, spread=spread) * 2.0**exponent
    q = quantize(x, format, axis, rounding=rounding, seed=seed if rounding == "stochastic" else None)
    dim = axis - 2
    blocks = x.double().unflatten(dim, (-1, BLOCK[format]))
    peak = blocks.abs().amax(dim, keepdim=True)
    bound = formats.error_bound(format, rounding)
    limit = torch.maximum(bound.relative * blocks.abs(), bound.block * peak).flatten(dim - 1, dim)
    limit += bound.tensor * x.abs().amax((-1, -2), keepdim=True)
    error = (dequantize(q, torch.float64) - x).abs()
    assert (error <= limit * (1 + 1e-6)).all()
    assert (error / limit).max() > 0.4  # the bound is not vacuous


@given(SEEDS, st.sampled_from(COPIES))
@settings(max_examples=20, deadline=None)
def test_quantization_is_idempotent(seed, copy):
    """What a format represents, it represents again, with the same codes up to the choice of scale."""
    x = randn(seed, 32, 64)
    once = dequantize(quantize(x, *copy))
    if copy[0] == "mxfp8":
        assert torch.equal(dequantize(quantize(once, *copy)), once)
    else:
        again = dequantize(quantize(once, *copy))
        assert ((again - once).abs() <= 1e-6 * once.abs()).all()


@pytest.mark.parametrize(("format", "axis"), COPIES)
def test_axis_zero_is_axis_one_of_the_transpose(format, axis):
    x = randn(6, 2, 64, 96)
    q = quantize(x, format, axis)
    t = quantize(x.mT, format, 1 - axis)
    assert torch.equal(q.scale, t.scale)
    assert torch.equal(dequantize(q), dequantize(t).mT)
    if format == "nvfp4":
        assert torch.equal(q.data, t.data)


@pytest.mark.parametrize(("format", "axis"), COPIES)
def test_the_default_dtype_does_not_matter(format, axis):
    x = randn(16, 32, 32)
    q = quantize(x, format, axis)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(q, quantize(x, format, axis)) and dequantize(q).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(5, 32, 48), (1, 96, 32), (160, 64)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "mxfp8"},
        {"format": "nvfp4", "square": True},
        {"format": "nvfp4", "rounding": "stochastic", "seed": 2**63 + 9, "hadamard": True},
    ],
)
def test_pieces_do_not_show(monkeypatch, shape, axis, options):
    """The size of the pieces in which the work is done changes no byte; 1 makes them as small as they get."""
    x = randn(15, *shape, spread=1)
    if options["format"] == "mxfp8" and axis == 1:
        x = x[..., :32]
    segments = torch.tensor([0, 64, 64, 128]) if x.ndim == 2 else None
    results, values = [], []
    for piece in (1, 32 * 48 * 2, 1 << 20):
        monkeypatch.setattr(block_scaled, "_PIECE", piece)
        results.append(quantize(x, axis=axis, segments=segments, **options))
        values.append(dequantize(results[0]))
    assert same(results[0], results[2]) and same(results[1], results[2])
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[2])


@pytest.mark.parametrize(("format", "axis"), COPIES)
@pytest.mark.parametrize("shape", [(0, 32), (0, 32, 32), (3, 0, 32)])
def test_no_elements(format, axis, shape):
    q = quantize(torch.ones(shape), format, axis)
    assert dequantize(q).shape == shape
    assert q.amax is None or (q.amax == 0).all()


@pytest.mark.parametrize(("format", "axis"), COPIES)
def test_input_types_and_strides(format, axis):
    x = randn(7, 64, 64, dtype=torch.bfloat16)
    q = quantize(x, format, axis)
    assert same(q, quantize(x.float(), format, axis)) and same(q, quantize(x.double(), format, axis))
    assert same(q, quantize(x.T.contiguous().T, format, axis))
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q).bfloat16())
    target = torch.empty(64, 64, dtype=torch.bfloat16)
    assert dequantize(q, out=target) is target
    assert torch.equal(target, dequantize(q, torch.bfloat16))


def test_without_global_leaves_the_factor_out():
    x = randn(8, 3, 32, 64)
    q = quantize(x, "nvfp4", 0)
    values = dequantize(q, torch.bfloat16, without_global=True)
    factor = formats.global_scale(q.amax)
    assert torch.equal(factor, torch.from_numpy(q.amax.numpy() / np.float32(2688)))
    assert torch.equal(values.float() * factor[:, None, None], dequantize(q))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.booleans())
def test_square_scales_agree_between_axes(seed, batched):
    x = randn(seed, *((2,) if batched else ()), 48, 80, spread=2)
    row, column = (quantize(x, "nvfp4", axis, square=True) for axis in (1, 0))
    assert torch.equal(dequantize(row), dequantize(column))
    tiles = row.scale.unflatten(-2, (-1, 16))
    assert (tiles == tiles[..., :1, :]).all()
    assert not torch.equal(dequantize(quantize(x, "nvfp4", 1)), dequantize(quantize(x, "nvfp4", 0)))


@settings(max_examples=30, deadline=None)
@given(
    SEEDS,
    st.sampled_from(COPIES),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(0, 2),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_segments_are_independent_and_the_tail_is_ignored(seed, copy, sizes, tail, dtype):
    format, axis = copy
    block = BLOCK[format]
    offsets = [block * n for n in itertools.accumulate(sizes, initial=0)]
    x = randn(seed, offsets[-1] + block * tail, 64, spread=3)
    x[offsets[-1] :] = NAN
    if not len(x):
        return
    q = quantize(x, format, axis, segments=torch.tensor(offsets, dtype=dtype))
    values = dequantize(q)
    for segment, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start == end:
            assert q.amax is None or q.amax[segment] == 0
            continue
        alone = quantize(x[start:end], format, axis)
        assert torch.equal(values[start:end], dequantize(alone))
        assert q.amax is None or q.amax[segment] == alone.amax
    assert (values[offsets[-1] :] == 0).all()
    live = offsets[-1]
    tails = [q.data[live:] if format == "mxfp8" or axis == 1 else q.data[:, live // 2 :]]
    tails.append(q.scale[live:] if axis == 1 else q.scale[:, live // block :])
    assert all((t == 0).all() for t in tails)


@pytest.mark.parametrize(("format", "axis"), COPIES)
@pytest.mark.parametrize("offsets", [None, [0, 32, 32, 64], [0, 0, 0, 0]])
def test_every_byte_of_out_is_written(format, axis, offsets):
    x = randn(10, 96, 64)
    segments = None if offsets is None else torch.tensor(offsets)
    outs = []
    for poison in (0x00, 0xAB):
        out = formats.empty(format, (96, 64), axis, None if offsets is None else 3)
        for buffer in buffers(out):
            buffer.view(torch.uint8).fill_(poison) if buffer.ndim else buffer.fill_(NAN)
        q = quantize(x, format, axis, segments=segments, out=out)
        assert all(a is b for a, b in zip(buffers(q), buffers(out), strict=True))
        outs.append(q)
    assert same(*outs) and same(outs[0], quantize(x, format, axis, segments=segments))


@pytest.mark.parametrize(("format", "axis"), COPIES)
@pytest.mark.parametrize(("shape", "segments"), [((64, 96), None), ((4, 64, 96), None), ((64, 96), 3)])
def test_storage_describes_the_buffers(format, axis, shape, segments):
    described = storage(format, shape, axis, segments)
    offsets = None if segments is None else torch.tensor([0, 32, 32, 64])
    q = quantize(torch.randn(shape), format, axis, segments=offsets)
    found = {name: getattr(q, name) for name in described}
    assert {name: (tuple(b.shape), b.dtype) for name, b in found.items()} == {
        name: (size, block_scaled.DTYPES[element]) for name, (size, element) in described.items()
    }
    bits = 8 * sum(b.numel() * b.element_size() for b in (q.data, q.scale))
    assert bits == math.prod(shape) * {"mxfp8": 8.25, "nvfp4": 4.5}[format]
    rebuilt = formats.from_buffers(format, shape, axis, found, segments=offsets)
    assert torch.equal(dequantize(rebuilt), dequantize(q))


# The Hadamard transform


def hadamard_matrix() -> torch.Tensor:
    """diag(signs) · Sylvester's matrix / 4 by its definition: H[i, j] = (-1)^popcount(i & j)."""
    signs = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    rows = [[signs[i] * (-1) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1])
def test_hadamard_is_the_orthogonal_matrix(axis):
    matrix = hadamard_matrix()
    assert torch.equal(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))
    x = randn(11, 2, 48, 32)
    tiles = x.double().unflatten(axis - 2, (-1, 16))
    expected = tiles @ matrix if axis == 1 else matrix.T @ tiles
    actual = formats.hadamard_transform(x, axis)
    assert torch.allclose(actual.double(), expected.reshape(x.shape), atol=1e-6, rtol=0)
    units = torch.eye(16) if axis == 1 else torch.eye(16).T
    expected = matrix if axis == 1 else matrix.T
    assert torch.equal(formats.hadamard_transform(units, axis).double(), expected)  # exact for single entries


def test_hadamard_cancels_in_wgrad_and_spreads_outliers():
    dy, x = randn(12, 256, 48), randn(13, 256, 64)
    dy[17] *= 100  # one token's gradient
    exact = dy.double().T @ x.double()
    transformed = [formats.hadamard_transform(t, 0).double() for t in (dy, x)]
    assert torch.allclose(transformed[0].T @ transformed[1], exact, rtol=1e-5, atol=1e-4)

    def error(hadamard: bool) -> float:
        q = [quantize(t, "nvfp4", 0, hadamard=hadamard) for t in (dy, x)]
        assert all(t.hadamard is hadamard for t in q)
        a, b = (dequantize(t, torch.float64) for t in q)
        return float((a.T @ b - exact).norm() / exact.norm())

    assert error(True) < 0.25
    small = dy.clone()
    small[17] = 0
    lost = [dequantize(quantize(dy, "nvfp4", 0, hadamard=h), torch.float64) for h in (False, True)]
    assert (lost[0][16:32] != 0).float().mean() < (lost[1][16:32] != 0).float().mean()


# Mistakes


def test_wrong_axis_is_refused():
    q = quantize(torch.ones(32, 32), "mxfp8", 1)
    formats.check_operand(q, 1)
    with pytest.raises(ValueError) as error:
        formats.check_operand(q, 0)
    assert str(error.value) == (
        "mxfp8 operand of shape (32, 32) is quantized along axis 1, but this operand contracts along axis 0: "
        "quantize the high-precision tensor along axis 0"
    )


ONES = torch.ones(32, 32)
MISTAKES = [
    ((ONES, "fp8", 1), {}, "unknown format 'fp8', expected one of mxfp8, nvfp4"),
    ((ONES, "mxfp8", 2), {}, "axis is 2, expected 0 (blocks along rows) or 1 (along the last dimension)"),
    ((ONES.half(), "mxfp8", 1), {}, "x is torch.float16, expected float32, bfloat16 or float64"),
    ((ONES[0], "mxfp8", 1), {}, "shape is (32,), expected [..., M, K]"),
    (
        (ONES[:, :20], "mxfp8", 1),
        {},
        "K = 20 of shape (32, 20) is not a multiple of mxfp8's block of 32: pad it with zeros",
    ),
    (
        (ONES[:20], "nvfp4", 0),
        {},
        "M = 20 of shape (20, 32) is not a multiple of nvfp4's block of 16: pad it with zeros",
    ),
    (
        (ONES[:20], "nvfp4", 1),
        {"square": True},
        "M = 20 of shape (20, 32) is not a multiple of nvfp4's block of 16: pad it with zeros",
    ),
    (
        (ONES, "mxfp8", 1),
        {"hadamard": True},
        "mxfp8 rounds to nearest and has no Hadamard transform or square scaling: use nvfp4",
    ),
    (
        (ONES, "nvfp4", 1),
        {"rounding": "stochastic"},
        "rounding is 'stochastic' and seed is None: stochastic rounding, and it alone, takes a seed",
    ),
    (
        (ONES, "nvfp4", 1),
        {"seed": 3},
        "rounding is 'nearest' and seed is 3: stochastic rounding, and it alone, takes a seed",
    ),
    ((ONES, "nvfp4", 1), {"rounding": "up"}, "rounding is 'up', expected 'nearest' or 'stochastic'"),
    (
        (ONES, "nvfp4", 1),
        {"rounding": "stochastic", "seed": -1},
        "seed is -1, expected 0 ≤ seed < 2^64",
    ),
    (
        (ONES, "nvfp4", 0),
        {"segments": torch.tensor([0, 24, 32])},
        "segments [0, 24, 32] are not multiples of the block 16: pad every segment with zero rows",
    ),
    (
        (ONES, "mxfp8", 0),
        {"segments": torch.tensor([0, 64])},
        "segments [0, 64] do not divide the rows of shape (32, 32): expected ascending offsets from 0 to at "
        "most the number of rows of a two-dimensional tensor",
    ),
    (
        (ONES, "nvfp4", 0),
        {"out": formats.empty("nvfp4", (32, 32), 1)},
        "buffers are for nvfp4, axis 1, (32, 32); expected nvfp4, axis 0, (32, 32)",
    ),
    (
        (ONES, "nvfp4", 0),
        {"out": formats.empty("nvfp4", (32, 32), 0, 2)},
        "buffer amax is ((2,), torch.float32), expected ((), torch.float32)",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), MISTAKES)
def test_mistakes(arguments, options, message):
    with pytest.raises(ValueError) as error:
        quantize(*arguments, **options)
    assert str(error.value) == message


def test_wrong_out_shape():
    q = quantize(ONES, "mxfp8", 1)
    with pytest.raises(ValueError, match=r"out has shape \(32, 16\), expected \(32, 32\)"):
        dequantize(q, out=torch.empty(32, 16))
