"""tcgen05: allocation, register moves, copies and every kind of matrix product, against layouts built by hand."""

import numpy as np
import pytest
import torch
from snippets import Device, run

from nmoe.codegen.emulator import EmulationError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SMEM = (
    ".shared .align 1024 .b8 buf[131072];\n"
    ".shared .align 8 .b8 bar[8];\n"
    ".shared .align 8 .b8 loaded[8];\n"
    ".shared .align 4 .b8 base[4];"
)
ALLOCATE = """
    setp.lt.u32 %p9, %r0, 32;
    @!%p9 bra ALLOCATED;
    tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [base], 512;
    ALLOCATED: setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1;
    @%p1 mbarrier.init.shared.b64 [loaded], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    ld.shared.b32 %r1, [base];
    mov.u32 %r2, buf;
    shr.u32 %r3, %r0, 5;
    shl.b32 %r4, %r3, 21;
    add.u32 %r4, %r4, %r1;
"""
FREE = """
    bar.sync 0;
    @!%p9 bra FREED;
    tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r1, 512;
    FREED:
"""
LOAD = """
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [loaded], {size};
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [{source}], {size}, [loaded];
    L{tag}: mbarrier.try_wait.parity.shared.b64 %p2, [loaded], 0;
    @!%p2 bra L{tag};
    tcgen05.fence::after_thread_sync;
"""


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def read_back(columns: int) -> str:
    """Each thread writes its row of D, `columns` words, to %rd0."""
    lines = [
        f"tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {registers(20, columns)}, [%r4];",
        "tcgen05.wait::ld.sync.aligned;",
        f"mad.wide.u32 %rd10, %r0, {4 * columns}, %rd0;",
    ]
    return "\n".join(lines + [f"st.global.b32 [%rd10+{4 * i}], %r{20 + i};" for i in range(columns)])


def descriptor(leading: int, stride: int, swizzle: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | {0: 0, 32: 6, 64: 4, 128: 2}[swizzle] << 61


def k_major(rows: np.ndarray, swizzle: int = 0) -> tuple[np.ndarray, int]:
    """Shared-memory image of rows of bytes, and its descriptor without the address."""
    count, width = rows.shape
    image = np.zeros(count * max(width, swizzle), np.uint8)
    for r in range(count):
        for chunk in range(width // 16):
            if swizzle:
                line = r * swizzle // 128  # which 128-byte line: it selects the pattern
                place = r * swizzle + (chunk ^ line % (swizzle // 16)) * 16
            else:
                place = r // 8 * 128 + r % 8 * 16 + chunk * count * 16
            image[place : place + 16] = rows[r, 16 * chunk : 16 * chunk + 16]
    return image, descriptor(count * 16, 8 * (swizzle or 16), swizzle)


def mn_major_128(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Image of a [rows, k] matrix of 16-bit elements with 64 rows to a 128-byte line."""
    rows, k = matrix.shape
    image = np.zeros(rows * k, np.uint16)
    for r in range(rows):
        for kk in range(k):
            line = (r // 64) * (k // 8) * 8 + kk // 8 * 8 + kk % 8
            chunk = r % 64 // 8 ^ kk % 8
            image[line * 64 + chunk * 8 + r % 8] = matrix[r, kk]
    return image.view(np.uint8), descriptor(k // 8 * 1024, 1024, 128)


def instruction(m: int, n: int, a: int, b: int, d: int = 1, majors: int = 0, extra: int = 0) -> int:
    return d << 4 | a << 7 | b << 10 | majors << 15 | n // 8 << 17 | m // 16 << 24 | extra


def product(
    kind,
    idesc,
    a_image,
    a_desc,
    b_image,
    b_desc,
    n,
    steps=((0, 0, 0),),
    scales="",
    prologue="",
    extra_images=(),
    pair=False,
    rows=128,
):
    """D of a chain of tcgen05.mma: `steps` are (enable-d, byte offset in A, byte offset in B)."""
    group = 2 if pair else 1
    images = [np.ascontiguousarray(i).view(np.uint8).ravel() for i in (a_image, b_image, *extra_images)]
    offsets, parts, at = [], [], 0
    for image in images:
        offsets.append(at)
        padded = np.zeros(-(-image.size // 1024) * 1024, np.uint8)
        padded[: image.size] = image
        parts.append(padded)
        at += padded.size
    block = np.concatenate(parts)
    device = Device()
    out = device.empty((2 if pair else 1, rows, n), torch.float32)
    source = device.tensor(torch.from_numpy(block))
    lines = [ALLOCATE.format(group=group)]
    if pair:
        lines.append(
            "mov.u32 %r9, %cluster_ctarank;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
        )
        lines.append(f"mad.wide.u32 %rd0, %r9, {4 * rows * n}, %rd0;")
    lines.append(LOAD.format(size=block.size, source="%rd1", tag=0))
    if pair:
        lines.append(
            "barrier.cluster.arrive.aligned;\n"
            "barrier.cluster.wait.aligned;\n"
            "tcgen05.fence::after_thread_sync;\n"
            "setp.ne.and.u32 %p1, %r9, 99, %p1;\n"
            "setp.eq.and.u32 %p1, %r9, 0, %p1;"
        )
    lines.append(
        "@!%p1 bra ISSUED;\nand.b32 %r5, %r2, 0x3FFFF;\nshr.u32 %r5, %r5, 4;\ncvt.u64.u32 %rd20, %r5;"
    )
    lines.append(prologue.format(*[o >> 4 for o in offsets]))
    for enable, a_offset, b_offset in steps:
        lines += [
            f"add.u64 %rd21, %rd20, {(offsets[0] + a_offset >> 4) + a_desc};",
            f"add.u64 %rd22, %rd20, {(offsets[1] + b_offset >> 4) + b_desc};",
            f"setp.ne.u32 %p4, {enable}, 0;",
            f"tcgen05.mma.cta_group::{group}.kind::{kind} [%r1], %rd21, %rd22, {idesc}, {scales} %p4;",
        ]
    if pair:
        lines.append(
            "mov.u16 %h1, 3;\n"
            "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [bar], %h1;"
        )
    else:
        lines.append("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];")
    lines.append("ISSUED: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;\n@!%p2 bra ISSUED;")
    lines.append("tcgen05.fence::after_thread_sync;")
    lines.append(read_back(n))
    if pair:
        lines.append("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;")
    lines.append(FREE.format(group=group))
    run("\n".join(lines), device, out, source, threads=128, declarations=SMEM, grid=group, cluster=group)
    return out.torch.numpy()


def small_integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def raw(x, dtype):
    return torch.from_numpy(x).to(dtype).view(torch.uint8).numpy()


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_f16_in_every_k_major_swizzle(swizzle):
    a, b = small_integers(128, 16), small_integers(32, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16), swizzle), k_major(raw(b, torch.float16), swizzle)
    got = product("f16", instruction(128, 32, 0, 0), ia, da, ib, db, 32)
    np.testing.assert_array_equal(got[0], a @ b.T)


def test_bf16_accumulates_along_k_and_overwrites_when_told():
    a, b = small_integers(128, 64), small_integers(16, 64, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.bfloat16), 128), k_major(raw(b, torch.bfloat16), 128)
    idesc = instruction(128, 16, 1, 1)
    steps = [(int(i > 0), 32 * i, 32 * i) for i in range(4)]
    np.testing.assert_array_equal(product("f16", idesc, ia, da, ib, db, 16, steps)[0], a @ b.T)
    steps = [(int(i > 2), 32 * i, 32 * i) for i in (2, 3)]
    np.testing.assert_array_equal(
        product("f16", idesc, ia, da, ib, db, 16, steps)[0], a[:, 32:] @ b[:, 32:].T
    )


def test_mn_major_operands_and_negation():
    a, b = small_integers(128, 16), small_integers(64, 16, seed=1)
    (ia, da), (ib, db) = (mn_major_128(raw(x, torch.float16).view(np.uint16)) for x in (a, b))
    got = product("f16", instruction(128, 64, 0, 0, majors=3), ia, da, ib, db, 64)
    np.testing.assert_array_equal(got[0], a @ b.T)
    got = product("f16", instruction(128, 64, 0, 0, majors=3, extra=1 << 13), ia, da, ib, db, 64)
    np.testing.assert_array_equal(got[0], -(a @ b.T))


def test_fp8_operands_may_differ_in_type():
    a, b = small_integers(128, 32), small_integers(16, 32, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float8_e4m3fn)), k_major(raw(b, torch.float8_e5m2))
    got = product("f8f6f4", instruction(128, 16, 0, 1), ia, da, ib, db, 16)
    np.testing.assert_array_equal(got[0], a @ b.T)


def test_half_precision_accumulator_takes_the_low_half_of_a_column():
    a, b = small_integers(128, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    got = product("f16", instruction(128, 16, 0, 0, d=0), ia, da, ib, db, 16)[0].view(np.uint32)
    np.testing.assert_array_equal(got.astype(np.uint16).view(np.float16), (a @ b.T).astype(np.float16))
    assert not (got >> 16).any()


def test_m64_uses_sixteen_lanes_of_every_quadrant():
    a, b = small_integers(64, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    with pytest.raises(EmulationError, match="never-written tensor memory: CTA rank 0, lane 16, column 0"):
        product("f16", instruction(64, 16, 0, 0), ia, da, ib, db, 16)


def scale_image(scales: np.ndarray) -> np.ndarray:
    """[rows, 4] scale bytes as the 512-byte atoms that tcgen05.cp spreads: row r at (r % 32) * 16 + r / 32 * 4."""
    rows = -(-scales.shape[0] // 128) * 128
    image = np.zeros((rows // 128, 32, 4, 4), np.uint8)
    for r, values in enumerate(scales):
        image[r // 128, r % 32, r % 128 // 32] = values
    return image


COPY_SCALES = f"""
    add.u64 %rd23, %rd20, {{2}};
    add.u64 %rd23, %rd23, {descriptor(16, 128, 0)};
    add.u32 %r6, %r1, 256;
    tcgen05.cp.cta_group::1.32x128b.warpx4 [%r6], %rd23;
    add.u64 %rd24, %rd20, {{3}};
    add.u64 %rd24, %rd24, {descriptor(16, 128, 0)};
    add.u32 %r7, %r1, 260;
    tcgen05.cp.cta_group::1.32x128b.warpx4 [%r7], %rd24;
"""


@pytest.mark.parametrize("identifier", range(4))
def test_mxf8_scales_pick_their_byte_of_the_column(identifier):
    a, b = small_integers(128, 32), small_integers(16, 32, seed=1)
    rng = np.random.default_rng(2)
    sa, sb = (
        rng.integers(120, 134, (128, 4)).astype(np.uint8),
        rng.integers(120, 134, (16, 4)).astype(np.uint8),
    )
    (ia, da), (ib, db) = k_major(raw(a, torch.float8_e4m3fn)), k_major(raw(b, torch.float8_e4m3fn))
    other = (identifier + 1) % 4
    idesc = instruction(128, 16, 0, 0, d=0, extra=1 << 23 | identifier << 29 | other << 4)
    got = product(
        "mxf8f6f4.block_scale.block32",
        idesc,
        ia,
        da,
        ib,
        db,
        16,
        scales="[%r6], [%r7],",
        prologue=COPY_SCALES,
        extra_images=(scale_image(sa), scale_image(sb)),
    )
    scale = np.outer(2.0 ** (sa[:, identifier] - 127.0), 2.0 ** (sb[:, other] - 127.0))
    np.testing.assert_array_equal(got[0], ((a @ b.T) * scale).astype(np.float32))


@pytest.mark.parametrize(
    ("vector", "per_block", "kind"), [("block16", 16, "ue4m3"), ("block32", 32, "ue8m0")]
)
def test_nvfp4_nibbles_and_block_scales(vector, per_block, kind):
    """Codes are random and A differs from B, so a swapped nibble order shows."""
    rng = np.random.default_rng(3)
    codes_a, codes_b = rng.integers(0, 16, (128, 64)), rng.integers(0, 16, (16, 64))
    packed = [(c[:, 0::2] | c[:, 1::2] << 4).astype(np.uint8) for c in (codes_a, codes_b)]
    low, high = (0x30, 0x48) if kind == "ue4m3" else (125, 130)
    sa, sb = (
        rng.integers(low, high, (128, 4)).astype(np.uint8),
        rng.integers(low, high, (16, 4)).astype(np.uint8),
    )
    dtype = torch.float8_e4m3fn if kind == "ue4m3" else torch.float8_e8m0fnu
    fa, fb = (
        torch.from_numpy(s).view(dtype).float().double().numpy()[:, : 64 // per_block] for s in (sa, sb)
    )
    (ia, da), (ib, db) = k_major(packed[0]), k_major(packed[1])
    idesc = instruction(128, 16, 1, 1, d=0, extra=(kind == "ue8m0") << 23)
    got = product(
        f"mxf4nvf4.block_scale.{vector}",
        idesc,
        ia,
        da,
        ib,
        db,
        16,
        scales="[%r6], [%r7],",
        prologue=COPY_SCALES,
        extra_images=(scale_image(sa), scale_image(sb)),
    )
    want = (E2M1[codes_a] * fa.repeat(per_block, 1)) @ (E2M1[codes_b] * fb.repeat(per_block, 1)).T
    np.testing.assert_array_equal(got[0], want.astype(np.float32))


@pytest.mark.parametrize("m", [256, 128])
def test_a_pair_splits_rows_of_a_and_columns_of_b(m):
    """Both CTAs hold the same image, so A and B repeat; M = 128 keeps half of N in the upper lanes (layout B)."""
    a, b = small_integers(m // 2, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    columns = 32 if m == 256 else 16
    got = product("f16", instruction(m, 32, 0, 0), ia, da, ib, db, columns, pair=True)
    one = a @ b.T
    want = np.concatenate([one, one], 1 if m == 256 else 0)
    for rank in range(2):
        np.testing.assert_array_equal(got[rank], want)


def test_infinity_and_nan_flow_through():
    a, b = np.zeros((128, 16), np.float32), np.ones((16, 16), np.float32)
    a[0, 0], a[1, 0] = np.inf, np.nan
    b[1, 0] = 0
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    got = product("f16", instruction(128, 16, 0, 0), ia, da, ib, db, 16)[0]
    assert np.isinf(got[0, 0])
    assert np.isnan(got[0, 1])
    assert np.isnan(got[1]).all()
    assert not got[2:].any()


MOVE = (
    ALLOCATE.format(group=1)
    + """
    mad.lo.u32 %r5, %r0, 1000, 0;
"""
    + "\n".join(f"add.u32 %r{20 + i}, %r5, {i};" for i in range(16))
    + f"""
    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r4], {registers(20, 16)};
    tcgen05.wait::st.sync.aligned;
"""
)


@pytest.mark.parametrize(
    ("shape", "count", "place"),
    [
        ("16x64b.x4", 4, lambda t, r: (8 * (t & 1) + t // 4, (t >> 1 & 1) + 2 * r)),
        ("16x128b.x2", 4, lambda t, r: (t // 4 + 8 * (r & 1), t % 4 + 4 * (r // 2))),
        ("16x256b.x2", 8, lambda t, r: (t // 4 + 8 * (r // 2 & 1), 2 * (t % 4) + r % 2 + 8 * (r // 4))),
        ("16x32bx2.x4", 4, lambda t, r: (t % 16, r + 8 * (t // 16))),
    ],
)
def test_load_shapes_follow_the_published_fragments(shape, count, place):
    """Fragments as CUTLASS's TMEM copy traits give them; lane l, column c of a quadrant holds (32 w + l) * 1000 + c."""
    device = Device()
    out = device.empty((128, count), torch.int32)
    half = ", 8" if "bx2" in shape else ""
    stores = "\n".join(f"st.global.b32 [%rd10+{4 * i}], %r{100 + i};" for i in range(count))
    body = (
        MOVE
        + f"""
    tcgen05.ld.sync.aligned.{shape}.b32 {registers(100, count)}, [%r4]{half};
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd10, %r0, {4 * count}, %rd0;
    {stores}
    """
        + FREE.format(group=1)
    )
    run(body, device, out, threads=128, declarations=SMEM)
    for thread in range(128):
        for r in range(count):
            lane, column = place(thread % 32, r)
            assert out.torch[thread, r] == (thread // 32 * 32 + lane) * 1000 + column


def test_a_warp_reaches_only_its_quadrant():
    body = (
        ALLOCATE.format(group=1)
        + f"tcgen05.st.sync.aligned.32x32b.x2.b32 [%r1], {registers(20, 2)};"
        + FREE.format(group=1)
    )
    with pytest.raises(
        EmulationError, match=r"warp \d reaches lanes \d+..\d+ of tensor memory, the address names lane 0"
    ):
        run(body, Device(), threads=128, declarations=SMEM)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [base], 64;",
            "tensor memory leak: CTA rank 0 exits with columns 0..31",
        ),
        (
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [base], 48;",
            "expected a power of two from 32 to 512",
        ),
        (
            "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n"
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 "
            "[base], 32;",
            "after relinquish_alloc_permit",
        ),
        (
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [base], 64;\n"
            "tcgen05.dealloc.cta_group::1.sync.aligned.b32 0, 32;",
            "the allocation is larger",
        ),
        ("tcgen05.dealloc.cta_group::1.sync.aligned.b32 0, 32;", "column 0 is not part of that allocation"),
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r1];", "column 0 of CTA rank 0 is not allocated"),
        (
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [base], 512;\n"
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [base], 32;",
            "waits for free tensor memory",
        ),
        ("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [base], 32;", "CTA rank 0 has no peer"),
    ],
)
def test_allocation_rules(body, message):
    with pytest.raises(EmulationError, match=message):
        run(body, Device(), declarations=SMEM)


def test_bad_descriptors_are_refused():
    a = small_integers(128, 16)
    image, good = k_major(raw(a, torch.float16))
    for bad, message in [
        (good & ~(7 << 46), "bits 46-48"),
        (good | 1 << 49, "base offset"),
        (good | 1 << 61, "32B atoms"),
    ]:
        with pytest.raises(EmulationError, match=message):
            product("f16", instruction(128, 16, 0, 0), image, bad, image, good, 16)
    with pytest.raises(EmulationError, match="shape M=128 N=24 is not valid"):
        product("f16", instruction(128, 24, 0, 0), image, good, image, good, 16)


def test_m64_rows_sit_sixteen_to_a_quadrant():
    a, b = small_integers(64, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    full_a, full_b = np.zeros((128, 16), np.float32), small_integers(16, 16, seed=2)
    (iz, dz), (iy, dy) = k_major(raw(full_a, torch.float16)), k_major(raw(full_b, torch.float16))
    first = f"""
    add.u64 %rd30, %rd20, {{2}};
    add.u64 %rd30, %rd30, {dz};
    add.u64 %rd31, %rd20, {{3}};
    add.u64 %rd31, %rd31, {dy};
    setp.ne.u32 %p5, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd30, %rd31, {instruction(128, 16, 0, 0)}, %p5;
    """  # writes zeros to all lanes, so that the rest can be read
    got = product(
        "f16", instruction(64, 16, 0, 0), ia, da, ib, db, 16, prologue=first, extra_images=(iz, iy)
    )[0]
    want = np.zeros((128, 16), np.float32)
    for quadrant in range(4):
        want[32 * quadrant : 32 * quadrant + 16] = (a @ b.T)[16 * quadrant : 16 * quadrant + 16]
    np.testing.assert_array_equal(got, want)


def test_disabled_output_lanes_keep_their_contents():
    a, b = small_integers(128, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    idesc = instruction(128, 16, 0, 0)
    masked = f"""
    add.u64 %rd30, %rd20, {{0}};
    add.u64 %rd30, %rd30, {da};
    add.u64 %rd31, %rd20, {{1}};
    add.u64 %rd31, %rd31, {db};
    setp.ne.u32 %p5, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd30, %rd31, {idesc}, %p5;
    mov.u32 %r15, 0xFF;
    mov.u32 %r16, 0;
    """
    got = product(
        "f16",
        idesc,
        ia,
        da,
        ib,
        db,
        16,
        steps=((1, 0, 0),),
        scales="{%r15, %r16, %r16, %r15},",
        prologue=masked,
    )[0]
    kept = np.arange(128) // 8
    want = (a @ b.T) * np.where((kept == 0) | (kept == 12), 1, 2)[:, None]
    np.testing.assert_array_equal(got, want)


def test_a_comes_from_tensor_memory_two_elements_to_a_column():
    a, b = small_integers(128, 16), small_integers(16, 16, seed=1)
    words = raw(a, torch.bfloat16).reshape(128, 32).view(np.uint32)
    ib, db = k_major(raw(b, torch.bfloat16))
    device = Device()
    out, source = device.empty((128, 16), torch.float32), device.tensor(torch.from_numpy(ib))
    rows = device.tensor(torch.from_numpy(words.view(np.int32).copy()))
    loads = "\n".join(f"ld.global.b32 %r{20 + i}, [%rd10+{4 * i}];" for i in range(8))
    body = (
        ALLOCATE.format(group=1)
        + LOAD.format(size=ib.size, source="%rd1", tag=0)
        + f"""
    mad.wide.u32 %rd10, %r0, 32, %rd2;
    {loads}
    add.u32 %r6, %r4, 64;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r6], {registers(20, 8)};
    tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    @!%p1 bra ISSUED;
    and.b32 %r5, %r2, 0x3FFFF;
    shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %rd20, %r5;
    add.u64 %rd22, %rd20, {db};
    add.u32 %r6, %r1, 64;
    setp.ne.u32 %p4, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r1], [%r6], %rd22, {instruction(128, 16, 1, 1)}, %p4;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];
    ISSUED: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra ISSUED;
    tcgen05.fence::after_thread_sync;
    """
        + read_back(16)
        + FREE.format(group=1)
    )
    run(body, device, out, source, rows, threads=128, declarations=SMEM)
    np.testing.assert_array_equal(out.torch.numpy(), a @ b.T)


def test_4_bit_operands_of_mxf8f6f4_take_a_padded_slot():
    """Sixteen 4-bit elements fill the first half of a 16-byte slot; here A is e2m1 and B e4m3."""
    rng = np.random.default_rng(5)
    codes, b = rng.integers(0, 16, (128, 32)), small_integers(16, 32, seed=1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).reshape(128, 2, 8)
    slots = np.concatenate([packed, np.full_like(packed, 0xAA)], axis=2).reshape(128, 32)
    (ia, da), (ib, db) = k_major(slots), k_major(raw(b, torch.float8_e4m3fn))
    ones = np.full((128, 4), 127, np.uint8)
    idesc = instruction(128, 16, 5, 0, d=0, extra=1 << 23)
    got = product(
        "mxf8f6f4.block_scale.block32",
        idesc,
        ia,
        da,
        ib,
        db,
        16,
        scales="[%r6], [%r7],",
        prologue=COPY_SCALES,
        extra_images=(scale_image(ones), scale_image(ones[:16])),
    )
    np.testing.assert_array_equal(got[0], (E2M1[codes] @ b.T).astype(np.float32))
