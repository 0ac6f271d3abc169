"""Products of the rarer kinds of tcgen05.mma and wgmma, and every shape of tcgen05.cp."""

import numpy as np
import pytest
import torch
from snippets import Device, run
from test_tensor import ALLOCATE, FREE, LOAD, SMEM, instruction, k_major, product, registers, small_integers

CODES6 = np.arange(64)
SIGN6 = np.where(CODES6 & 32, -1.0, 1.0)
E2M3 = SIGN6 * np.where(
    CODES6 >> 3 & 3, (1 + (CODES6 & 7) / 8) * 2.0 ** ((CODES6 >> 3 & 3) - 1), (CODES6 & 7) / 8
)
E3M2 = SIGN6 * np.where(
    CODES6 >> 2 & 7, (1 + (CODES6 & 3) / 4) * 2.0 ** ((CODES6 >> 2 & 7) - 3.0), (CODES6 & 3) / 16
)


def six_bit_rows(codes: np.ndarray) -> np.ndarray:
    """16 codes in the first 12 bytes of a 16-byte slot, the first in the low bits; the rest holds junk."""
    rows, count = codes.shape
    bits = (codes[..., None] >> np.arange(6) & 1).reshape(rows, count // 16, 96).astype(np.uint8)
    packed = np.packbits(bits, axis=2, bitorder="little")
    return np.concatenate([packed, np.full((rows, count // 16, 4), 0xAA, np.uint8)], axis=2).reshape(
        rows, count
    )


@pytest.mark.parametrize(("type_a", "values_a"), [(3, E2M3), (4, E3M2)])
@pytest.mark.parametrize(("type_b", "values_b"), [(3, E2M3), (4, E3M2)])
def test_6_bit_operands(type_a, values_a, type_b, values_b):
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 64, (128, 32)), rng.integers(0, 64, (16, 32))
    (ia, da), (ib, db) = k_major(six_bit_rows(a)), k_major(six_bit_rows(b))
    got = product("f8f6f4", instruction(128, 16, type_a, type_b), ia, da, ib, db, 16)
    np.testing.assert_array_equal(got[0], (values_a[a] @ values_b[b].T).astype(np.float32))


def test_tf32_drops_the_low_13_bits_of_its_operands():
    a, b = small_integers(128, 8), small_integers(16, 8, seed=1)
    noisy = (a.view(np.uint32) | np.where(a, 0x1FFF, 0).astype(np.uint32)).view(np.float32)
    (ia, da), (ib, db) = k_major(noisy.view(np.uint8)), k_major(b.view(np.uint8))
    got = product("tf32", instruction(128, 16, 2, 2), ia, da, ib, db, 16)
    np.testing.assert_array_equal(got[0], a @ b.T)


@pytest.mark.parametrize(("signed_a", "signed_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_integer_products_follow_the_sign_of_each_operand(signed_a, signed_b):
    rng = np.random.default_rng(9)
    a, b = (rng.integers(0, 256, shape).astype(np.uint8) for shape in ((128, 32), (16, 32)))
    wide = [x.view(np.int8 if s else np.uint8).astype(np.int32) for x, s in ((a, signed_a), (b, signed_b))]
    (ia, da), (ib, db) = k_major(a), k_major(b)
    got = product("i8", instruction(128, 16, signed_a, signed_b, d=2), ia, da, ib, db, 16)
    np.testing.assert_array_equal(got[0].view(np.int32), wide[0] @ wide[1].T)


def rows_of(lane: int, shape: str) -> int | None:
    """Which source row lands in a lane of tensor memory."""
    return {
        "128x256b": lane,
        "128x128b": lane,
        "4x256b": lane // 32 if lane % 32 == 0 else None,
        "64x128b.warpx2::02_13": lane % 64,
        "64x128b.warpx2::01_23": lane % 32 + 32 * (lane // 64),
        "32x128b.warpx4": lane % 32,
    }[shape]


@pytest.mark.parametrize(
    "shape",
    ["128x256b", "128x128b", "4x256b", "64x128b.warpx2::02_13", "64x128b.warpx2::01_23", "32x128b.warpx4"],
)
def test_copies_to_tensor_memory(shape):
    """Lanes and columns that a copy leaves alone keep the zeros that were stored first."""
    count, chunks = 4 if shape[:2] == "4x" else int(shape.split("x")[0]), 2 if "256b" in shape else 1
    words = np.arange(1, max(count, 8) * 4 * chunks + 1, dtype=np.int32).reshape(-1, 4 * chunks)
    image, description = k_major(words.view(np.uint8))
    device = Device()
    out, source = device.empty((128, 8), torch.int32), device.tensor(torch.from_numpy(image))
    zeros = "\n".join(f"mov.u32 %r{20 + i}, 0;" for i in range(8))
    stores = "\n".join(f"st.global.b32 [%rd10+{4 * i}], %r{20 + i};" for i in range(8))
    body = (
        ALLOCATE.format(group=1)
        + LOAD.format(size=image.size, source="%rd1", tag=0)
        + f"""
    {zeros}
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r4], {registers(20, 8)};
    tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    @!%p1 bra ISSUED;
    and.b32 %r5, %r2, 0x3FFFF;
    shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %rd20, %r5;
    add.u64 %rd21, %rd20, {description};
    tcgen05.cp.cta_group::1.{shape} [%r1], %rd21;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];
    ISSUED: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra ISSUED;
    tcgen05.fence::after_thread_sync;
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {registers(20, 8)}, [%r4];
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd10, %r0, 32, %rd0;
    {stores}
    """
        + FREE.format(group=1)
    )
    run(body, device, out, source, threads=128, declarations=SMEM)
    want = np.zeros((128, 8), np.int32)
    for lane in range(128):
        if (row := rows_of(lane, shape)) is not None:
            want[lane, : 4 * chunks] = words[row]
    np.testing.assert_array_equal(out.torch.numpy(), want)
