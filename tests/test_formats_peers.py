"""formats against torchao 0.18 and an FP32 transcription of TransformerEngine's operations."""

import numpy as np
import torch
from formats_common import SEEDS, nearest_code, positive_bfloat16, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from nmoe import formats
from nmoe.formats import Quantized, dequantize, quantize

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
