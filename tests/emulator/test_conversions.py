"""Conversions between number formats, against tables of the formats and torch."""

import numpy as np
import pytest
import torch
from snippets import evaluate

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ALL_F16 = np.arange(65536, dtype=np.uint16)
FINITE = np.concatenate(
    [
        ALL_F16.view(np.float16)[np.isfinite(ALL_F16.view(np.float16))].astype(np.float32),
        np.float32([448, 464, 465, 1e30, -1e30]),
    ]
)


def torch_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return (
        torch.from_numpy(values).to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy()
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "largest"), [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)]
)
def test_f32_to_fp8_rounds_to_nearest_even_and_saturates(kind, dtype, largest):
    swapped = FINITE[::-1].copy()
    got = evaluate(
        f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a, %b;\ncvt.u32.u16 %d, %h1;", np.uint32, FINITE, swapped
    )
    for part, values in [(got >> 8, FINITE), (got & 255, swapped)]:
        np.testing.assert_array_equal(part, torch_bits(np.clip(values, -largest, largest), dtype))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_to_f16_is_exact_for_every_code(kind):
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    codes = np.arange(256, dtype=np.uint32) | np.arange(255, -1, -1, dtype=np.uint32) << 8
    got = evaluate(f"cvt.u16.u32 %h1, %a;\ncvt.rn.f16x2.{kind}x2 %d, %h1;", np.uint32, codes)
    for shift in (0, 8):
        want = torch.from_numpy((codes >> shift & 255).astype(np.uint8)).view(dtype).half().numpy()
        np.testing.assert_array_equal((got >> 2 * shift & 0xFFFF).astype(np.uint16).view(np.float16), want)


def test_special_values_in_fp8():
    x = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    got = evaluate("cvt.rn.satfinite.e4m3x2.f32 %h1, 0f00000000, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x)
    np.testing.assert_array_equal(got, [0x7F, 0x7E, 0xFE, 0x80])
    got = evaluate("cvt.rn.satfinite.e5m2x2.f32 %h1, 0f00000000, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x)
    np.testing.assert_array_equal(got, [0x7F, 0x7B, 0xFB, 0x80])


def nearest_e2m1(x: float) -> int:
    distances = [abs(abs(x) - v) for v in E2M1]
    best = min(range(8), key=lambda i: (distances[i], i & 1))  # a tie goes to the even code
    return best | (8 if np.signbit(x) else 0)


def test_e2m1_rounds_ties_to_even_and_puts_the_first_source_high():
    x = np.concatenate(
        [np.arange(-8, 8, 0.125), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -100.0]]
    ).astype(np.float32)
    y = x[::-1].copy()
    body = ".reg .b8 %q;\ncvt.rn.satfinite.e2m1x2.f32 %q, %a, %b;\ncvt.u32.u8 %d, %q;"
    got = evaluate(body, np.uint32, x, y)
    np.testing.assert_array_equal(
        got, [nearest_e2m1(a) << 4 | nearest_e2m1(b) for a, b in zip(x, y, strict=True)]
    )
    nan = evaluate(body, np.uint32, np.float32([np.nan]), np.float32([0.0]))
    assert nan[0] == 0x70  # no NaN in e2m1: the largest positive value


def test_every_e2m1_pair_decodes_low_nibble_to_the_low_half():
    codes = np.arange(256, dtype=np.uint32)
    got = evaluate(".reg .b8 %q;\ncvt.u8.u32 %q, %a;\ncvt.rn.f16x2.e2m1x2 %d, %q;", np.uint32, codes)
    table = np.array(E2M1 + [-v for v in E2M1], np.float16)
    np.testing.assert_array_equal((got & 0xFFFF).astype(np.uint16).view(np.float16), table[codes & 15])
    np.testing.assert_array_equal((got >> 16).astype(np.uint16).view(np.float16), table[codes >> 4])


@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_ue8m0_takes_the_power_of_two_below_or_above(mode):
    x = np.float32([0.0, 1.0, 1.0001, 1.9999, 2.0, 3.0, 2.0**-127, 2.0**127, 3e38, 1e-45, -4.0])
    got = evaluate(
        f"cvt.{mode}.satfinite.ue8m0x2.f32 %h1, 0f3F800000, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x
    )
    with np.errstate(divide="ignore"):
        exact = np.log2(np.abs(x.astype(np.float64)))
    power = np.floor(exact) if mode == "rz" else np.ceil(exact)
    want = np.where(x == 0, 0, np.clip(np.nan_to_num(power, neginf=0) + 127, 0, 254)).astype(np.uint32)
    np.testing.assert_array_equal(got & 255, want)
    np.testing.assert_array_equal(got >> 8, 127)


def test_ue8m0_nan_and_overflow_without_satfinite():
    x = np.float32([np.nan, np.inf])
    assert list(evaluate("cvt.rp.ue8m0x2.f32 %h1, 0f00000000, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x)) == [
        255,
        255,
    ]
    saturated = evaluate(
        "cvt.rp.satfinite.ue8m0x2.f32 %h1, 0f00000000, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x
    )
    assert list(saturated) == [255, 254]


def test_ue8m0_to_bf16_is_a_power_of_two():
    codes = np.arange(255, dtype=np.uint32)
    got = evaluate("cvt.u16.u32 %h1, %a;\ncvt.rn.bf16x2.ue8m0x2 %d, %h1;", np.uint32, codes)
    as_float = (got << 16).view(np.float32)
    np.testing.assert_array_equal(
        as_float, np.ldexp(np.float32(1), codes.astype(int) - 127).astype(np.float32)
    )


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_f32_to_16_bits_rounds_once_and_orders_halves(kind, dtype):
    x = np.random.default_rng(0).standard_normal(2048).astype(np.float32) * np.float32(
        2.0
    ) ** np.random.default_rng(1).integers(-30, 16, 2048)
    x = x.astype(np.float32)
    got = evaluate(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", np.uint32, x, -x)
    np.testing.assert_array_equal((got >> 16).astype(np.uint16), torch_bits(x, dtype).view(np.uint16))
    np.testing.assert_array_equal(got.astype(np.uint16), torch_bits(-x, dtype).view(np.uint16))
    toward_zero = evaluate(f"cvt.rz.{kind}.f32 %h1, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, x).astype(
        np.uint16
    )
    back = torch.from_numpy(toward_zero.view(np.int16)).view(dtype).float().numpy()
    assert np.all(np.abs(back) <= np.abs(x))


def test_float_to_integer_saturates_and_nan_is_zero():
    x = np.float32([2.5, 3.5, -2.5, 1e20, -1e20, np.nan, 0.4])
    np.testing.assert_array_equal(
        evaluate("cvt.rni.s32.f32 %d, %a;", np.int32, x), [2, 4, -2, 2**31 - 1, -(2**31), 0, 0]
    )
    np.testing.assert_array_equal(
        evaluate("cvt.rzi.u32.f32 %d, %a;", np.uint32, x), [2, 3, 0, 2**32 - 1, 0, 0, 0]
    )
    np.testing.assert_array_equal(evaluate("cvt.rmi.f32.f32 %d, %a;", np.float32, x[:3]), [2.0, 3.0, -3.0])


def test_integer_narrowing_wraps_and_saturates_when_asked():
    x = np.int32([300, -300, 5, 127, 128, -129])
    wrapped = evaluate("cvt.s8.s32 %h1, %a;\ncvt.s32.s16 %d, %h1;", np.int32, x)
    np.testing.assert_array_equal(wrapped, x.astype(np.int8))
    clamped = evaluate("cvt.sat.s8.s32 %h1, %a;\ncvt.s32.s16 %d, %h1;", np.int32, x)
    np.testing.assert_array_equal(clamped, np.clip(x, -128, 127))


def test_wide_integers_convert_to_f32_with_one_rounding():
    x = np.array([2**24 + 1, 2**60 + 2**36 + 1, 2**63 + 2**39 + 1], np.uint64)
    np.testing.assert_array_equal(evaluate("cvt.rn.f32.u64 %d, %a;", np.float32, x), x.astype(np.float32))


@pytest.mark.parametrize("position", range(4))
def test_stochastic_e2m1_carries_the_random_byte_of_its_source(position):
    """Source i of {a, b, e, f} takes byte 3, 1, 2, 0 of the random bits and lands in nibble 3 - i."""
    byte = (3, 1, 2, 0)[position]
    sources = ["0f00000000"] * 4
    sources[position] = "%a"
    bits = np.arange(256, dtype=np.uint32)
    x = np.full(256, 2.25, np.float32)  # a quarter of the way from 2 to 3
    body = f"cvt.rs.satfinite.e2m1x4.f32 %h1, {{{', '.join(sources)}}}, %b;\ncvt.u32.u16 %d, %h1;"
    got = evaluate(body, np.uint32, x, bits << np.uint32(8 * byte)) >> (4 * (3 - position))
    np.testing.assert_array_equal(
        got, np.where(bits >= 192, 5, 4)
    )  # up exactly when 64 + bits carries past 256
    elsewhere = evaluate(
        body, np.uint32, x, ~(np.uint32(255) << np.uint32(8 * byte)) & np.full(256, FULL, np.uint32)
    )
    np.testing.assert_array_equal(elsewhere >> (4 * (3 - position)) & 15, 4)


FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("kind", "x", "low", "high"), [("e4m3", 1.03125, 0x38, 0x39), ("e5m2", 1.0625, 0x3C, 0x3D)]
)
@pytest.mark.parametrize("position", range(4))
def test_stochastic_fp8_takes_the_half_of_its_pair(kind, x, low, high, position):
    """A quarter of the way to the next number: up when the random half is in its upper quarter. a and b share the upper
    half, e and f the lower; source i lands in byte 3 - i."""
    sources = ["0f00000000"] * 4
    sources[position] = "%a"
    half = np.arange(0, 1 << 16, 64, dtype=np.uint32)
    shift = np.uint32(16 if position < 2 else 0)
    body = f"cvt.rs.satfinite.{kind}x4.f32 %d, {{{', '.join(sources)}}}, %b;"
    value = np.full(half.size, x, np.float32)
    got = evaluate(body, np.uint32, value, half << shift | np.uint32(0xFFFF) << (16 - shift))
    other = evaluate(body, np.uint32, value, half << shift)
    np.testing.assert_array_equal(got, other)
    np.testing.assert_array_equal(got >> (8 * (3 - position)) & 255, np.where(half >= 0xC000, high, low))


def test_stochastic_bf16_and_f16_use_their_half_of_the_random_bits():
    x = np.full(4, 1 + 2**-9, np.float32)  # a quarter of a bf16 ulp, half of nothing else
    random = np.uint32([0x00000000, 0xBFFF0000, 0xC0000000, 0x0000FFFF])
    got = evaluate("cvt.rs.bf16x2.f32 %d, %a, 0f3F800000, %b;", np.uint32, x, random)
    np.testing.assert_array_equal(got >> 16, [0x3F80, 0x3F80, 0x3F81, 0x3F80])


def test_relu_conversions_drop_negative_values():
    x = np.float32([-1.5, 2.5])
    got = evaluate("cvt.rn.relu.f16x2.f32 %d, %a, %a;", np.uint32, x)
    np.testing.assert_array_equal(got, [0, 0x41004100])


def test_tf32_keeps_ten_mantissa_bits():
    x = np.float32([1 + 2**-11, 1 + 2**-11 + 2**-20, 1 + 2**-10])
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", np.float32, x)
    np.testing.assert_array_equal(got, np.float32([1 + 2**-10, 1 + 2**-10, 1 + 2**-10]))


def test_tf32_keeps_the_upper_bits_of_a_nan():
    """Seen on an H100, down to a NaN that so becomes an infinity."""
    x = np.uint32([0x7FFE380E, 0xFF815466, 0x7F8011BE])
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", np.uint32, x)
    assert [hex(v) for v in got] == ["0x7ffe2000", "0xff814000", "0x7f800000"]


@pytest.mark.parametrize("kind", ["e2m3", "e3m2"])
def test_6_bit_formats_round_trip_and_saturate(kind):
    """Every code through f16 and back; the first source goes to the high byte."""
    codes = np.arange(64, dtype=np.uint32)
    pairs = codes | codes[::-1] << np.uint32(8)
    halves = evaluate(f"cvt.u16.u32 %h1, %a;\ncvt.rn.f16x2.{kind}x2 %d, %h1;", np.uint32, pairs)
    low, high = (halves >> s & 0xFFFF for s in (0, 16))
    low, high = (x.astype(np.uint16).view(np.float16).astype(np.float32) for x in (low, high))
    assert np.array_equal(low, high[::-1])
    assert low.max() == (7.5 if kind == "e2m3" else 28.0)
    back = evaluate(f"cvt.rn.satfinite.{kind}x2.f32 %h1, %b, %a;\ncvt.u32.u16 %d, %h1;", np.uint32, low, high)
    np.testing.assert_array_equal(back, pairs)
    big = evaluate(
        f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a, %a;\ncvt.u32.u16 %d, %h1;",
        np.uint32,
        np.float32([1e9, -1e9]),
    )
    np.testing.assert_array_equal(big, [0x1F1F, 0x3F3F])
