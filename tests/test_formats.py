"""formats and recipes: against exhaustive definitions, an independent FP32 transcription and torchao 0.18."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.moe_training.kernels.mxfp8.quant import (
    torch_to_blocked_2d_K_groups,
    torch_to_blocked_2d_M_groups,
)
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.prototype.mx_formats.utils import from_blocked as ao_from_blocked
from torchao.prototype.mx_formats.utils import to_blocked as ao_to_blocked

from nmoe import formats, recipes
from nmoe.formats import BLOCK, Quantized, block_scaled, dequantize, quantize

INF, NAN = math.inf, math.nan
FORMATS = ("mxfp8", "nvfp4")
COPIES = tuple(itertools.product(FORMATS, (0, 1)))
SEEDS = st.integers(0, 2**32 - 1)


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def positive_bfloat16() -> torch.Tensor:
    """Every positive finite value."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def randn(seed: int, *shape: int, spread: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers whose magnitude varies from row to row by e^(spread · normal)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))).to(dtype)


def buffers(q: Quantized) -> list[torch.Tensor]:
    return [b for b in (q.data, q.scale, q.amax) if b is not None]


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(x, y) for x, y in zip(buffers(a), buffers(b), strict=True))


# Elements and scales, value by value


def nearest_code(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest of ascending non-negative `values`, ties to the even code, sign apart."""
    distance = (x.double().abs().clamp(max=float(values[-1])).unsqueeze(-1) - values.double()).abs()
    odd = torch.arange(len(values)) % 2
    best = distance.amin(-1, keepdim=True)
    return torch.where(distance == best, odd, 2).argmin(-1)


def test_e4m3_values():
    def value(code: int) -> float:
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        return math.copysign(NAN if code & 127 == 127 else magnitude, -1 if code & 128 else 1)

    codes = torch.arange(256, dtype=torch.uint8)
    decoded = formats.decode_e4m3(codes)
    expected = torch.tensor([value(code) for code in range(256)])
    assert torch.equal(decoded.nan_to_num(), expected.nan_to_num())
    assert decoded.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert decoded.nan_to_num().max() == 448
    finite = ~decoded.isnan()
    assert torch.equal(formats.encode_e4m3(decoded)[finite], codes[finite])


def test_e2m1_values():
    codes = torch.arange(16, dtype=torch.uint8)
    decoded = formats.decode_e2m1(codes)
    assert decoded.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(formats.encode_e2m1(decoded), codes)  # the sign of zero too
    pairs = torch.arange(256, dtype=torch.uint8)
    unpacked = formats.unpack_e2m1(pairs).view(256, 2)
    assert torch.equal(unpacked[:, 0], decoded[(pairs & 15).long()])
    assert torch.equal(unpacked[:, 1], decoded[(pairs >> 4).long()])
    assert torch.equal(formats.pack_e2m1(formats.encode_e2m1(unpacked)).flatten(), pairs)


@pytest.mark.parametrize(
    ("encode", "decode", "positive", "sign"),
    [(formats.encode_e4m3, formats.decode_e4m3, 127, 128), (formats.encode_e2m1, formats.decode_e2m1, 8, 8)],
)
def test_elements_round_to_nearest_even_and_saturate(encode, decode, positive, sign):
    values = decode(torch.arange(positive, dtype=torch.uint8))
    midpoints = (values[1:] + values[:-1]) / 2
    ulps = torch.arange(-2, 3, dtype=torch.int32)
    x = torch.cat(
        [
            all_bfloat16().float(),
            (midpoints.view(torch.int32).unsqueeze(-1) + ulps).view(torch.float32).flatten(),
            randn(0, 20_000, 1, spread=3).flatten(),
        ]
    )
    x = x[~x.isnan()]
    code = encode(x).long()
    assert torch.equal(code % sign, nearest_code(x, values))
    assert torch.equal(decode(code.to(torch.uint8)).signbit(), x.signbit())


def test_nan_elements():
    x = torch.tensor([NAN, -NAN])
    assert (formats.encode_e4m3(x) & 0x7F).tolist() == [0x7F, 0x7F]
    assert (formats.encode_e2m1(x) & 7).tolist() == [7, 7]


def test_e8m0_is_the_power_of_two_at_or_above():
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = formats.decode_e8m0(codes)
    assert decoded[255].isnan()
    assert decoded[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert torch.equal(formats.encode_e8m0(decoded), codes)
    up = decoded[:254].nextafter(torch.tensor(INF))
    assert torch.equal(formats.encode_e8m0(up), codes[1:255])
    down = decoded[1:255].nextafter(torch.tensor(0.0))
    assert torch.equal(formats.encode_e8m0(down), codes[1:255])
    special = torch.tensor([0.0, 1e-45, 3e38, INF, NAN])
    assert formats.encode_e8m0(special).tolist() == [0, 0, 254, 254, 255]


# Stochastic rounding


def test_philox_known_answers():
    """Random123's known-answer vectors for philox4x32-10."""
    full = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    vectors = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0_A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in vectors:
        assert tuple(int(word) for word in formats.philox(counter, key)) == words


def test_random_bits_depend_on_seed_and_position_alone():
    bits = formats.random_bits(7, (3, 40, 5))
    assert bits.shape == (3, 40, 5, 16)
    assert torch.equal(bits[:1, :17, :2], formats.random_bits(7, (1, 17, 2)))
    words = formats.philox((4, 39, 2, 0), 7)
    assert bits[2, 39, 4].tolist() == [int(w) >> 8 * i & 255 for w in words for i in range(4)]
    assert not torch.equal(bits, formats.random_bits(8, (3, 40, 5)))
    assert not torch.equal(bits, formats.random_bits(7 + 2**32, (3, 40, 5)))


@settings(deadline=None)
@given(st.floats(-6, 6, width=32))
def test_stochastic_rounding_goes_up_in_proportion(value):
    """Of the 256 bytes, floor(256 · fraction) round |value| away from zero, all others towards zero."""
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    below = max(v for v in grid if v <= abs(value))
    above = min((v for v in grid if v > below), default=6)
    fraction = (abs(value) - below) / (above - below) if above > below else 0
    bytes_ = torch.arange(256, dtype=torch.uint8)
    codes = formats.encode_e2m1(torch.full((256,), value, dtype=torch.float32), bytes_)
    result = formats.decode_e2m1(codes).abs()
    up = int(256 * fraction)
    assert (result[: 256 - up] == below).all()
    assert (result[256 - up :] == above).all()


def test_stochastic_rounding_is_unbiased():
    """The mean over n seeds is within 5 standard errors of x - bias, 0 ≤ bias < step / 256.

    A rounded value has a variance of at most step² / 4, and |x| ≤ 6 has steps of at most 2.
    """
    n = 400
    x = torch.linspace(-5.9, 5.9, 256).view(1, 256)
    x[0, 0::16] = 6.0  # every block's scale is 1
    total = torch.zeros_like(x, dtype=torch.float64)
    for seed in range(n):
        q = quantize(x, "nvfp4", 1, rounding="stochastic", seed=seed)
        total += dequantize(q, without_global=True)
    unit = formats.decode_e4m3(torch.tensor([0x7E], dtype=torch.uint8)).item()  # the scale of 448
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    error = (total / n / unit - x) * x.sign()
    assert (error < 5 * step / 2 / n**0.5).all()
    assert (error > -5 * step / 2 / n**0.5 - step / 256).all()
    assert abs((error / step).mean()) < 5 / 2 / (n * x.numel()) ** 0.5 + 1 / 256


def test_stochastic_rounding_repeats_on_any_number_of_threads():
    x = randn(1, 512, 256)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantize(x, "nvfp4", 0, rounding="stochastic", seed=5, hadamard=True))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)
    assert not same(results[0], quantize(x, "nvfp4", 0, rounding="stochastic", seed=6, hadamard=True))


# MXFP8 against torchao


def torchao_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale, data = to_mx(x.contiguous(), torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    return data.view(torch.uint8), scale.view(torch.uint8)


def test_mxfp8_matches_torchao_for_every_bfloat16_amax():
    amax = torch.cat([torch.tensor([0.0], dtype=torch.bfloat16), positive_bfloat16()])
    x = (torch.rand(len(amax), 32, generator=torch.Generator().manual_seed(2)) * 2 - 1).bfloat16() * amax[
        :, None
    ]
    x[:, 5] = amax
    data, scale = torchao_mxfp8(x)
    q = quantize(x, "mxfp8", 1)
    assert torch.equal(q.scale, scale)
    # torchao multiplies a block by 1 instead of 2^127 when its scale code is 0, which flushes it to zero.
    subnormal = q.scale[:, 0] == 0
    assert torch.equal(q.data[~subnormal], data[~subnormal])
    assert (amax[subnormal].float() <= 448 * 2.0**-127).all()
    assert (data[subnormal] & 0x7F == 0).all()
    flushed = dequantize(q)[subnormal] - x[subnormal].float()
    assert (flushed.abs() <= 2.0**-127 * 16).all()  # half of the largest step, 32


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 8.0]))
def test_mxfp8_matches_torchao_on_random_tensors(seed, dtype, spread):
    x = randn(seed, 3, 64, 96, spread=spread, dtype=dtype)
    for axis in (0, 1):
        data, scale = torchao_mxfp8(x if axis == 1 else x.mT)
        q = quantize(x, "mxfp8", axis)
        assert torch.equal(q.scale, scale)
        assert torch.equal(q.data, data if axis == 1 else data.mT)


def test_mxfp8_decodes_as_torchao_for_every_code():
    data = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(254, 1)
    scale = torch.arange(1, 255, dtype=torch.uint8).repeat_interleave(8).view(-1, 1)
    q = formats.from_buffers("mxfp8", tuple(data.shape), 1, {"data": data, "scale": scale})
    theirs = to_dtype(
        data.view(torch.float8_e4m3fn),
        scale.view(torch.float8_e8m0fnu),
        torch.float8_e4m3fn,
        32,
        torch.float32,
    )
    torch.testing.assert_close(dequantize(q), theirs, rtol=0, atol=0, equal_nan=True)


def test_scale_rounds_up_where_torchao_loses_the_last_place():
    """torchao takes log2 in FP32: an amax just above 448 · 2^e gets the scale 2^e there, 2^(e+1) here."""
    x = torch.zeros(1, 32)
    x[0, 0] = 448 * 2.0**60 * (1 + 2.0**-22)
    assert torchao_mxfp8(x)[1].item() == 127 + 60
    assert quantize(x, "mxfp8", 1).scale.item() == 127 + 61


# NVFP4 against TransformerEngine's order of operations and torchao


def transcribed_nvfp4(x: np.ndarray, amax: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Scale codes and element values of one line [C] in numpy FP32, ordered as in core_nvfp4.cuh."""
    f32 = np.float32
    biggest = np.finfo(f32).max
    encode = f32(1) if amax == 0 else min(f32(448 * 6) / amax, biggest)
    encode = encode if encode != 0 else f32(1)
    grid = formats.decode_e4m3(torch.arange(127, dtype=torch.uint8))
    levels = formats.decode_e2m1(torch.arange(8, dtype=torch.uint8))
    scales, values = [], []
    for block in x.reshape(-1, 16):
        peak = np.abs(block).max()
        code = nearest_code(torch.tensor(peak * (encode * (f32(1) / f32(6)))).clamp(max=448), grid).item()
        with np.errstate(divide="ignore", over="ignore"):
            inverse = min(f32(1) / (grid[code].numpy() * (f32(1) / encode)), biggest)
            scaled = np.clip(block * inverse, f32(-6), f32(6))
        magnitude = levels[nearest_code(torch.from_numpy(scaled), levels)].numpy()
        scales.append(code)
        values.append(np.copysign(magnitude, scaled))
    return np.array(scales), np.concatenate(values)


@settings(max_examples=25, deadline=None)
@given(
    SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 6.0]), st.floats(-30, 30)
)
def test_nvfp4_matches_the_transcription(seed, dtype, spread, exponent):
    x = (randn(seed, 8, 64, spread=spread) * 2.0**exponent).to(dtype)
    q = quantize(x, "nvfp4", 1)
    assert q.amax == x.abs().max()
    values = formats.unpack_e2m1(q.data)
    for row in range(8):
        scale, expected = transcribed_nvfp4(x[row].float().numpy(), np.float32(q.amax.item()))
        assert q.scale[row].tolist() == scale.tolist()
        assert torch.equal(values[row], torch.from_numpy(expected))


def near(exact: torch.Tensor, midpoint: torch.Tensor) -> torch.Tensor:
    """A tie to within the FP32 rounding of the at most five operations that form the value."""
    return (exact / midpoint - 1).abs() < 6 * 2.0**-24


def assert_explained(x: torch.Tensor, q: Quantized, scale: torch.Tensor, data: torch.Tensor) -> int:
    """torchao's codes equal q's but in blocks that its 2^-6 clamp changes and for ties; counts the former.

    x [L, C], amax [] or [L].
    """
    amax = q.amax.double().view(-1, 1)
    block, their_block = formats.decode_e4m3(q.scale).double(), formats.decode_e4m3(scale).double()
    blocks = x.double().unflatten(-1, (-1, 16))
    exact_block = blocks.abs().amax(-1) * 448 / amax
    clamped = (block < 2.0**-6) & (their_block == 2.0**-6)
    differs = (q.scale != scale) & ~clamped
    assert near(exact_block, (block + their_block) / 2)[differs].all()

    exact = (blocks * 2688 / (amax * block).unsqueeze(-1)).abs()
    ours, theirs = (formats.unpack_e2m1(d).unflatten(-1, (-1, 16)) for d in (q.data, data))
    differs = (ours != theirs) & (q.scale == scale).unsqueeze(-1)
    assert near(exact, (ours.abs() + theirs.abs()) / 2)[differs].all()
    return int((clamped & (q.scale != scale)).sum())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 4.0]))
def test_nvfp4_differs_from_torchao_by_its_clamp_and_ties_alone(seed, dtype, spread):
    x = randn(seed, 64, 128, spread=spread, dtype=dtype)
    scale, data = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
    assert_explained(x, quantize(x, "nvfp4", 1), scale.view(torch.uint8), data)


def test_nvfp4_for_every_bfloat16_amax():
    """Every amax as that of a tensor (leading dimension) and as that of a block in a tensor of amax 2688."""
    amax = positive_bfloat16()
    amax = amax[amax.float() >= 2.0**-100]  # below, torchao's factor becomes subnormal
    x = (torch.rand(len(amax), 16, generator=torch.Generator().manual_seed(3)) * 2 - 1).bfloat16() * amax[
        :, None
    ]
    x[:, 3] = amax
    x = x.unsqueeze(1)
    q = quantize(x, "nvfp4", 1)
    assert torch.equal(q.amax, amax.float())
    assert (q.scale == 0x7E).all()
    factor = per_tensor_amax_to_scale(amax).view(-1, 1, 1)
    scale, data = nvfp4_quantize(x, 16, factor)
    flat = Quantized("nvfp4", 1, (len(amax), 16), q.data.flatten(0, 1), q.scale.flatten(0, 1), q.amax)
    assert assert_explained(x[:, 0], flat, scale.view(torch.uint8).view(-1, 1), data.view(-1, 8)) == 0

    x = x[amax <= 2688, 0]
    q = quantize(x, "nvfp4", 1)
    assert q.amax == 2688
    scale, data = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(q.amax))
    assert assert_explained(x, q, scale.view(torch.uint8), data) > 0


def test_small_blocks_keep_their_values_where_torchao_clamps_their_scale():
    """In a tensor of factor 1, a block of amax 6 · 2^-9 gets the scale 2^-9 here and 2^-6 in torchao."""
    x = torch.zeros(1, 32)
    x[0, 0] = 2688.0
    x[0, 16:] = 1.5 * 2.0**-9
    x[0, 16] = 6 * 2.0**-9
    q = quantize(x, "nvfp4", 1)
    assert q.scale.tolist() == [[0x7E, 0x01]]
    assert torch.equal(dequantize(q), x)
    scale, data = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
    assert scale.view(torch.uint8).tolist() == [[0x7E, 0x08]]
    assert formats.unpack_e2m1(data)[0, 16:].tolist() == [1.0] + [0.0] * 15


def test_nvfp4_packs_as_torchao():
    x = randn(9, 16, 64) * 2
    codes = formats.encode_e2m1(x)
    assert torch.equal(codes, f32_to_f4_unpacked(x.clamp(-6, 6)))
    assert torch.equal(formats.pack_e2m1(codes), pack_uint4(codes))
    assert torch.equal(formats.pack_e2m1(codes.T, dim=-2), pack_uint4(codes).T)


def test_products_are_exact_in_bfloat16():
    """What lets Hopper form Blackwell's products: E2M1 · E4M3 always, E4M3 · 2^e for e in [-124, 119]."""
    e4m3 = formats.decode_e4m3(torch.arange(127, dtype=torch.uint8)).double()
    e2m1 = formats.decode_e2m1(torch.arange(16, dtype=torch.uint8)).double()
    product = torch.outer(e4m3, e2m1)
    assert torch.equal(product.bfloat16().double(), product)
    exact = []
    for e in range(-127, 128):
        product = e4m3 * 2.0**e
        if torch.equal(product.bfloat16().double(), product):
            exact.append(e)
    assert exact == list(range(-124, 120))


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
    described = formats.storage(format, shape, axis, segments)
    offsets = None if segments is None else torch.tensor([0, 32, 32, 64])
    q = quantize(torch.randn(shape), format, axis, segments=offsets)
    found = {name: getattr(q, name) for name in described}
    assert {name: (tuple(b.shape), b.dtype) for name, b in found.items()} == described
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


# The blocked layout


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 11))
def test_blocked_layout_is_torchaos(rows, columns):
    scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    blocked = formats.to_blocked(scale)
    assert blocked.shape == (-(-rows // 128), -(-columns // 4), 32, 4, 4)
    assert torch.equal(blocked.flatten(), ao_to_blocked(scale))
    assert torch.equal(formats.from_blocked(blocked, rows, columns), scale)
    assert torch.equal(ao_from_blocked(blocked.flatten(), rows, columns), scale)


def test_blocked_offsets_are_the_formula():
    """CUTLASS's atom: offset of (r, c) in bytes."""
    rows, columns = 256, 8
    scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    flat = formats.to_blocked(scale).flatten()
    for r, c in itertools.product(range(rows), range(columns)):
        offset = (r // 128 * 2 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        assert flat[offset] == scale[r, c]


def test_blocked_layout_of_experts():
    scale = torch.randint(0, 256, (5, 130, 6), dtype=torch.uint8)
    blocked = formats.to_blocked(scale)
    assert all(torch.equal(blocked[e], formats.to_blocked(scale[e])) for e in range(5))
    assert torch.equal(formats.from_blocked(blocked, 130, 6), scale)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(0, 40))
def test_blocked_rows_of_segments(sizes, tail):
    offsets = list(itertools.accumulate(sizes, initial=0))
    scale = torch.randint(1, 256, (offsets[-1] + tail, 8), dtype=torch.uint8)
    segments = torch.tensor(offsets)
    blocked = formats.to_blocked(scale, segments)
    theirs, _ = torch_to_blocked_2d_M_groups(scale, segments[1:])
    assert torch.equal(blocked.flatten(), theirs.flatten()[: blocked.numel()])
    assert (theirs.flatten()[blocked.numel() :] == 0).all()
    scale[offsets[-1] :] = 0
    assert torch.equal(formats.from_blocked(blocked, *scale.shape, segments), scale)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3), st.sampled_from([128, 200]))
def test_blocked_columns_of_segments(sizes, tail, rows):
    """Ours is one matrix of atoms; torchao stores a segment's atom columns contiguously: the same atoms."""
    offsets = list(itertools.accumulate(sizes, initial=0))
    scale = torch.randint(1, 256, (rows, offsets[-1] + tail), dtype=torch.uint8)
    segments = torch.tensor(offsets)
    blocked = formats.to_blocked(scale, segments, dim=-1)
    theirs, starts = torch_to_blocked_2d_K_groups(scale, segments[1:])
    padded_rows = blocked.shape[0] * 128
    for start, end in itertools.pairwise(starts.tolist()):
        chunk = theirs.flatten()[start * padded_rows : end * padded_rows]
        assert torch.equal(blocked[:, start // 4 : end // 4].flatten(), chunk)
    scale[:, offsets[-1] :] = 0
    assert torch.equal(formats.from_blocked(blocked, *scale.shape, segments, dim=-1), scale)


def test_aligned_segments_need_no_padding():
    """With experts padded to 128 rows the grouped layouts are the plain one, in both orientations."""
    segments = torch.tensor([0, 128, 128, 384])
    q = quantize(randn(14, 384, 64), "nvfp4", 1, segments=segments)
    assert torch.equal(formats.to_blocked(q.scale, segments), formats.to_blocked(q.scale))
    q = quantize(randn(14, 384, 64), "nvfp4", 0, segments=segments)
    assert torch.equal(formats.to_blocked(q.scale, segments // 16, dim=-1), formats.to_blocked(q.scale))


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


# Recipes


def test_recipes_contract_along_the_right_axis():
    """x, dy and W of y = x Wᵀ: fprop contracts K, dgrad N, wgrad the tokens."""
    axes = {"fprop": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}
    roles = {
        "fprop": ("activation", "weight"),
        "dgrad": ("gradient", "weight"),
        "wgrad": ("gradient", "activation"),
    }
    for precision, pass_ in itertools.product(FORMATS, axes):
        specs = [recipes.operand(precision, pass_, slot) for slot in "AB"]
        assert tuple(s.axis for s in specs) == axes[pass_]
        assert tuple(s.role for s in specs) == roles[pass_]
        assert all(s.format == precision for s in specs)
    for precision, pass_, slot in itertools.product(("fp32", "bf16"), axes, "AB"):
        assert recipes.operand(precision, pass_, slot) is None


def test_nvfp4_recipe():
    """arXiv 2509.25149: gradients round stochastically, wgrad is transformed, weights are square."""
    for (pass_, _), spec in recipes.NVFP4.items():
        assert (spec.rounding == "stochastic") == (spec.role == "gradient")
        assert spec.hadamard == (pass_ == "wgrad")
        assert spec.square == (spec.role == "weight")


@pytest.mark.parametrize(("precision", "limit"), [("mxfp8", 0.05), ("nvfp4", 0.25)])
def test_recipes_compute_the_three_products(precision, limit):
    x, w, dy = randn(20, 128, 64), randn(21, 96, 64), randn(22, 128, 96)
    tensors = {"activation": x, "weight": w, "gradient": dy}
    products = {
        "fprop": lambda a, b: a @ b.T,
        "dgrad": lambda a, b: a @ b,
        "wgrad": lambda a, b: a.T @ b,
    }
    for pass_, product in products.items():
        specs = [recipes.operand(precision, pass_, slot) for slot in "AB"]
        exact = product(*(tensors[s.role].double() for s in specs))
        operands = []
        for s in specs:
            seed = 1 if s.rounding == "stochastic" else None
            q = quantize(
                tensors[s.role],
                s.format,
                s.axis,
                rounding=s.rounding,
                seed=seed,
                hadamard=s.hadamard,
                square=s.square,
            )
            operands.append(dequantize(q, torch.float64))
        error = float((product(*operands) - exact).norm() / exact.norm())
        assert limit / 10 < error < limit


def test_eligible_gemms():
    quantized = {kind for kind, eligible in recipes.ELIGIBLE.items() if eligible}
    assert quantized == {"attention_projection", "dense_ffn", "shared_expert", "routed_expert"}
    assert set(recipes.ELIGIBLE) - quantized == {"attention_bmm", "embedding", "head", "router"}
