"""formats, value by value: elements, scales, random bits and the blocked layout, against their definitions."""

import itertools
import math

import pytest
import torch
from formats_common import nearest_code, randn, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.moe_training.kernels.mxfp8.quant import (
    torch_to_blocked_2d_K_groups,
    torch_to_blocked_2d_M_groups,
)
from torchao.prototype.mx_formats.utils import from_blocked as ao_from_blocked
from torchao.prototype.mx_formats.utils import to_blocked as ao_to_blocked

from nmoe import formats
from nmoe.formats import dequantize, quantize

INF, NAN = math.inf, math.nan


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


# Elements and scales, value by value


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
