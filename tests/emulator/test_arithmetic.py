"""Lane-wise arithmetic against NumPy and Python integers, edge values included."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from snippets import evaluate

EDGES = [
    0,
    1,
    2,
    3,
    5,
    31,
    32,
    33,
    127,
    255,
    0x7FFF,
    0x8000,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFE,
    0xFFFFFFFF,
]
A, B = (np.array(x, np.uint32) for x in zip(*[(a, b) for a in EDGES for b in EDGES], strict=True))
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38, 1.1754944e-38, 0.1, -7.25],
    np.float32,
)
FA, FB = (np.array(x, np.float32) for x in zip(*[(a, b) for a in SPECIAL for b in SPECIAL], strict=True))


def signed(x):
    return x.view(np.int32).astype(np.int64)


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("add.s32 %d, %a, %b;", lambda a, b: a + b),
        ("sub.u32 %d, %a, %b;", lambda a, b: a - b),
        ("mul.lo.s32 %d, %a, %b;", lambda a, b: a * b),
        ("mul.hi.u32 %d, %a, %b;", lambda a, b: (a.astype(np.uint64) * b) >> np.uint64(32)),
        ("mul.hi.s32 %d, %a, %b;", lambda a, b: (signed(a) * signed(b)) >> 32),
        (
            "{.reg .b16 x, y, z;\ncvt.u16.u32 x, %a;\ncvt.u16.u32 y, %b;\nmul.hi.u16 z, x, y;\ncvt.u32.u16 %d, z;}",
            lambda a, b: (a & 0xFFFF) * (b & 0xFFFF) >> np.uint32(16),
        ),
        ("min.s32 %d, %a, %b;", lambda a, b: np.minimum(signed(a), signed(b))),
        ("max.u32 %d, %a, %b;", np.maximum),
        ("add.sat.s32 %d, %a, %b;", lambda a, b: np.clip(signed(a) + signed(b), -(2**31), 2**31 - 1)),
        ("and.b32 %d, %a, %b;", lambda a, b: a & b),
        ("shl.b32 %d, %a, %b;", lambda a, b: np.where(b > 31, 0, a.astype(np.uint64) << np.minimum(b, 63))),
        ("shr.u32 %d, %a, %b;", lambda a, b: np.where(b > 31, 0, a >> np.minimum(b, 31))),
        ("shr.s32 %d, %a, %b;", lambda a, b: signed(a) >> np.minimum(b, 31)),
        ("clz.b32 %d, %a;", lambda a, b: [32 - int(x).bit_length() for x in a]),
        ("popc.b32 %d, %a;", lambda a, b: [int(x).bit_count() for x in a]),
        ("brev.b32 %d, %a;", lambda a, b: [int(f"{x:032b}"[::-1], 2) for x in a]),
        ("shf.l.wrap.b32 %d, %a, %b, 8;", lambda a, b: b << np.uint32(8) | a >> np.uint32(24)),
        ("shf.r.clamp.b32 %d, %a, %b, 40;", lambda a, b: b),
        (
            "prmt.b32 %d, %a, %b, 0x6420;",
            lambda a, b: a & 255 | (a >> 16 & 255) << 8 | (b & 255) << 16 | (b >> 16 & 255) << 24,
        ),
        ("lop3.b32 %d, %a, %b, 15, 0x96;", lambda a, b: a ^ b ^ np.uint32(15)),
        ("lop3.b32 %d, %a, %b, 15, 0xE8;", lambda a, b: (a & b) | (a & 15) | (b & 15)),
        ("bfe.u32 %d, %a, 4, 8;", lambda a, b: a >> np.uint32(4) & np.uint32(255)),
        ("bfe.s32 %d, %a, 28, 8;", lambda a, b: signed(a) >> 28),
        ("bfi.b32 %d, %a, %b, 8, 4;", lambda a, b: (b & ~np.uint32(0xF00)) | (a & 15) << 8),
        ("div.u32 %d, %a, %b;", lambda a, b: np.where(b == 0, 2**32 - 1, a // np.maximum(b, 1))),
        ("abs.s32 %d, %a;", lambda a, b: np.abs(signed(a))),
        ("not.b32 %d, %a;", lambda a, b: ~a),
    ],
)
def test_integer_operations_on_edge_values(operation, reference):
    expected = np.asarray(reference(A, B)).astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(evaluate(operation, np.uint32, A, B), expected)


def test_signed_division_truncates_and_remainder_takes_the_sign_of_the_dividend():
    a, b = signed(A)[B != 0], signed(B)[B != 0]
    quotient = np.array(
        [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)]
    )
    raw_a, raw_b = A[B != 0], B[B != 0]
    np.testing.assert_array_equal(
        evaluate("div.s32 %d, %a, %b;", np.uint32, raw_a, raw_b), quotient.astype(np.uint32)
    )
    np.testing.assert_array_equal(
        evaluate("rem.s32 %d, %a, %b;", np.uint32, raw_a, raw_b), (a - quotient * b).astype(np.uint32)
    )


def test_wide_products_and_sums_keep_64_bits():
    wide = evaluate("mul.wide.s32 %d, %a, %b;", np.uint64, A, B)
    np.testing.assert_array_equal(wide.view(np.int64), signed(A) * signed(B))
    total = evaluate("mad.wide.u32 %d, %a, %b, %c;", np.uint64, A, B, wide)
    np.testing.assert_array_equal(total, A.astype(np.uint64) * B + wide)


@pytest.mark.parametrize("comparison", ["lt", "le", "gt", "ge"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_comparisons_follow_the_sign_of_the_type(comparison, kind):
    a, b = (signed(A), signed(B)) if kind == "s32" else (A, B)
    expected = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[comparison]
    got = evaluate(f"setp.{comparison}.{kind} %p1, %a, %b;\nselp.b32 %d, 1, 0, %p1;", np.uint32, A, B)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("comparison", "unordered"), [("lt", False), ("ltu", True), ("ne", False), ("neu", True), ("equ", True)]
)
def test_float_comparisons_treat_nan_as_named(comparison, unordered):
    got = evaluate(f"setp.{comparison}.f32 %p1, %a, %b;\nselp.b32 %d, 1, 0, %p1;", np.uint32, FA, FB)
    nan = np.isnan(FA) | np.isnan(FB)
    plain = {"lt": FA < FB, "ne": FA != FB, "eq": FA == FB}[
        comparison.rstrip("u") if comparison != "equ" else "eq"
    ]
    np.testing.assert_array_equal(got.astype(bool), np.where(nan, unordered, plain))


def test_setp_second_destination_and_boolean_combination():
    body = """
    setp.ne.u32 %p3, %b, 0;
    setp.lt.and.u32 %p1|%p2, %a, 32, %p3;
    selp.b32 %r9, 1, 0, %p1;
    selp.b32 %d, 2, 0, %p2;
    or.b32 %d, %d, %r9;
    """
    expected = ((A < 32) & (B != 0)) + 2 * ((A >= 32) & (B != 0))
    np.testing.assert_array_equal(evaluate(body, np.uint32, A, B), expected)


def exact(x: float) -> Fraction:
    return Fraction(float(x))


def directed(value: Fraction, mode: str) -> np.float32:
    """The float32 next to an exact value in the direction of the rounding mode."""
    nearest = np.float32(float(value))
    low = nearest if exact(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf))
    high = nearest if exact(nearest) >= value else np.nextafter(nearest, np.float32(np.inf))
    return {"rm": low, "rp": high, "rz": low if value >= 0 else high}[mode]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding_brackets_the_exact_result(mode):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(300).astype(np.float32) for _ in range(3))
    for operation, reference in [
        ("add", lambda x, y, z: x + y),
        ("mul", lambda x, y, z: x * y),
        ("fma", lambda x, y, z: x * y + z),
    ]:
        sources = "%a, %b, %c" if operation == "fma" else "%a, %b"
        got = evaluate(f"{operation}.{mode}.f32 %d, {sources};", np.float32, a, b, c)
        want = [
            directed(reference(exact(x), exact(y), exact(z)), mode) for x, y, z in zip(a, b, c, strict=True)
        ]
        np.testing.assert_array_equal(got, np.array(want, np.float32))


def test_fma_rounds_once():
    a = np.array([1 + 2**-12], np.float32)
    got = evaluate("fma.rn.f32 %d, %a, %a, %b;", np.float32, a, -(a * a))
    assert got[0] == np.float32(float(exact(a[0]) ** 2 - exact((a * a)[0])))
    assert got[0] != 0


def test_flush_to_zero_and_saturation():
    np.testing.assert_array_equal(
        evaluate("mul.ftz.f32 %d, %a, 0f3F800000;", np.uint32, SPECIAL)[8:10], [0, 0x80000000]
    )
    kept = evaluate("mul.f32 %d, %a, 0f3F800000;", np.float32, SPECIAL)
    np.testing.assert_array_equal(kept[8:10], SPECIAL[8:10])
    clamped = evaluate("add.sat.f32 %d, %a, 0f00000000;", np.float32, SPECIAL)
    np.testing.assert_array_equal(clamped, np.nan_to_num(np.clip(SPECIAL, 0, 1), nan=0.0))


def test_min_max_return_the_number_unless_nan_is_asked_for():
    both = np.isnan(FA) & np.isnan(FB)
    got = evaluate("max.f32 %d, %a, %b;", np.float32, FA, FB)
    np.testing.assert_array_equal(got, np.where(both, np.nan, np.fmax(FA, FB)))
    strict = evaluate("min.NaN.f32 %d, %a, %b;", np.float32, FA, FB)
    np.testing.assert_array_equal(strict, np.minimum(FA, FB))
    zeros = evaluate(
        "min.f32 %d, %a, %b;", np.uint32, np.array([0.0, -0.0], np.float32), np.array([-0.0, 0.0], np.float32)
    )
    np.testing.assert_array_equal(zeros, [0x80000000, 0x80000000])


def test_packed_f32_operations_keep_their_halves_apart():
    a, b = (np.random.default_rng(i).standard_normal(128).astype(np.float32) for i in (1, 2))
    got = evaluate("fma.rn.f32x2 %d, %a, %b, %a;", np.uint64, a.view(np.uint64), b.view(np.uint64)).view(
        np.float32
    )
    want = [np.float32(float(exact(x) * exact(y) + exact(x))) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.float32))
    np.testing.assert_array_equal(
        evaluate("mul.rn.f32x2 %d, %a, %b;", np.uint64, a.view(np.uint64), b.view(np.uint64)).view(
            np.float32
        ),
        a * b,
    )


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_pairs_match_torch(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, generator=generator).to(dtype) for _ in range(2))
    pairs = [t.view(torch.int16).numpy().view(np.uint32) for t in (a, b)]
    for operation, want in [("add", a + b), ("mul", a * b), ("max", torch.maximum(a, b))]:
        suffix = ".rn" if operation != "max" else ""
        got = evaluate(f"{operation}{suffix}.{kind}x2 %d, %a, %b;", np.uint32, *pairs)
        assert torch.equal(torch.from_numpy(got.view(np.int16)).view(dtype), want)
    fused = evaluate(f"fma.rn.{kind}x2 %d, %a, %b, %b;", np.uint32, *pairs)
    exact_result = (a.double() * b.double() + b.double()).to(dtype)
    assert torch.equal(torch.from_numpy(fused.view(np.int16)).view(dtype), exact_result)


@pytest.mark.parametrize(
    ("operation", "reference", "low", "high", "bound"),
    [
        ("ex2.approx.f32", np.exp2, -120, 120, 2.0**-22),
        ("lg2.approx.f32", np.log2, 2.0, 1e6, 2.0**-22),
        ("rcp.approx.f32", lambda x: 1 / x, 0.01, 100, 2.0**-23),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 0.01, 100, 2.0**-22.9),
        ("sqrt.approx.f32", np.sqrt, 0.01, 100, 2.0**-23),
        ("tanh.approx.f32", np.tanh, -4, 4, 2.0**-10.987),
        ("sin.approx.f32", np.sin, 0.5, 2.5, 2.0**-20.5),
    ],
)
def test_special_functions_are_within_their_documented_error(operation, reference, low, high, bound):
    x = np.random.default_rng(0).uniform(low, high, 1000).astype(np.float32)
    want = reference(x.astype(np.float64))
    got = evaluate(f"{operation} %d, %a;", np.float32, x).astype(np.float64)
    assert np.max(np.abs(got - want) / np.abs(want)) <= bound


def test_moves_pack_and_unpack_low_part_first():
    got = evaluate(
        "mov.b64 %rd20, {%a, %b};\nmov.b64 {%r8, %r9}, %rd20;\nsub.u32 %d, %r9, %r8;", np.uint32, A, B
    )
    np.testing.assert_array_equal(got, B - A)
    halves = evaluate("mov.b32 {%h1, %h2}, %a;\nmov.b32 %d, {%h2, %h1};", np.uint32, A)
    np.testing.assert_array_equal(halves, A >> np.uint32(16) | A << np.uint32(16))
    quarters = evaluate(
        ".reg .b8 %q<4>;\nmov.b32 {%q0, %q1, %q2, %q3}, %a;\nmov.b32 %d, {%q3, %q2, %q1, %q0};", np.uint32, A
    )
    np.testing.assert_array_equal(quarters, A.byteswap())


def test_divergent_branches_reconverge_and_loops_end_lane_by_lane():
    body = """
    mov.u32 %d, 0;
    and.b32 %r9, %a, 15;
    LOOP: setp.eq.u32 %p1, %r9, 0;
    @%p1 bra DONE;
    and.b32 %r8, %r9, 1;
    setp.eq.u32 %p2, %r8, 1;
    @%p2 bra ODD;
    add.u32 %d, %d, 100;
    bra.uni NEXT;
    ODD: add.u32 %d, %d, 1;
    NEXT: sub.u32 %r9, %r9, 1;
    bra LOOP;
    DONE: activemask.b32 %r7;
    setp.ne.u32 %p3, %r7, -1;
    @%p3 mov.u32 %d, 77777;
    """
    a = np.arange(64, dtype=np.uint32)
    n = a & 15
    np.testing.assert_array_equal(evaluate(body, np.uint32, a), (n // 2) * 100 + (n + 1) // 2)


@pytest.mark.parametrize(
    ("operation", "a", "b", "c"),
    [
        ("add.f32 %d, %a, %b;", 0x7F800001, 0x3F800000, 0),
        ("add.f32 %d, %a, %b;", 0x7F800000, 0xFF800000, 0),
        ("add.rz.ftz.f32 %d, %a, %b;", 0xFFC12345, 0, 0),
        ("mul.rp.f32 %d, %a, %b;", 0x7F800000, 0, 0),
        ("fma.rn.f32 %d, %a, %b, %c;", 0x3F800000, 0x3F800000, 0xFFFFFFFF),
        ("div.rn.f32 %d, %a, %b;", 0, 0, 0),
        ("sqrt.rn.f32 %d, %a;", 0xBF800000, 0, 0),
        ("rcp.rn.f32 %d, %a;", 0x7FC00001, 0, 0),
        ("min.f32 %d, %a, %b;", 0xFFC00000, 0x7FC00001, 0),
        ("max.NaN.f32 %d, %a, %b;", 0x3F800000, 0xFFC00000, 0),
        ("lg2.approx.f32 %d, %a;", 0xFF800000, 0, 0),
        ("cos.approx.f32 %d, %a;", 0x7F800000, 0, 0),
    ],
)
def test_an_f32_nan_is_canonical_whatever_made_it(operation, a, b, c):
    """Seen on an H100; PTX leaves the payload open."""
    inputs = (np.uint32([value]) for value in (a, b, c))
    assert evaluate(operation, np.uint32, *inputs)[0] == 0x7FFFFFFF


def test_bf16_fma_rounds_once():
    """7 x 37 = 259 lies half way between 258 and 260, 9 x 29 = 261 between 260 and 262: a c far below decides."""
    a, b = np.float32([7, 7, 7, 9, 9, 9, -7]), np.float32([37, 37, 37, 29, 29, 29, 37])
    tiny = np.float32(2.0**-120)
    c = np.float32([-tiny, 0, tiny, -tiny, 0, tiny, tiny])
    want = np.float32([258, 260, 260, 260, 260, 262, -258])
    packed = [(x.view(np.uint32) >> 16) * np.uint32(0x10001) for x in (a, b, c)]
    got = evaluate("fma.rn.bf16x2 %d, %a, %b, %c;", np.uint32, *packed)
    np.testing.assert_array_equal((got << 16).view(np.float32), want)
    np.testing.assert_array_equal((got & 0xFFFF0000).view(np.float32), want)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mixed_operations_widen_their_16_bit_sources_exactly(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(512, generator=generator).to(dtype) for _ in range(2))
    c = torch.randn(512, generator=generator)
    narrow = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b)]
    for operation, want in [("add", a.float() + c), ("sub", a.float() - c)]:
        got = evaluate(f"{operation}.rn.f32.{kind} %d, %a, %b;", np.float32, narrow[0], c.numpy())
        np.testing.assert_array_equal(got, want.numpy())
    got = evaluate(f"fma.rn.f32.{kind} %d, %a, %b, %c;", np.float32, *narrow, c.numpy())
    exact = (a.double() * b.double() + c.double()).float()
    np.testing.assert_array_equal(got, exact.numpy())
