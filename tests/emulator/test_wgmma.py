"""wgmma on sm_90a: fragments, operand layouts, and the rules for registers in flight."""

import numpy as np
import pytest
import torch
from snippets import Device, run
from test_tensor import k_major, mn_major_128, raw, registers, small_integers

from nmoe.codegen.emulator import EmulationError

SMEM = ".shared .align 1024 .b8 buf[65536];\n.shared .align 8 .b8 bar[8];"


def hopper(descriptor: int) -> int:
    """The sm_90 descriptor: no version bits, swizzle in bits 62-63 (1 = 128 B, 2 = 64 B, 3 = 32 B)."""
    mode = {0: 0, 2: 1, 4: 2, 6: 3}[descriptor >> 61]
    return descriptor & ~(7 << 46) & ((1 << 61) - 1) | mode << 62


def fragment_rows_columns(n):
    """Register e of thread t of the warpgroup: row and column of the 64 x n accumulator (PTX 9.7.15.5, layout D)."""
    t, e = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    return 16 * (t // 32) + t % 32 // 4 + 8 * (e // 2 % 2), e // 4 * 8 + t % 4 * 2 + e % 2


def product(
    shape,
    types,
    a_image,
    a_desc,
    b_image,
    b_desc,
    n,
    majors="",
    a_registers=None,
    fence=True,
    wait="wgmma.wait_group.sync.aligned 0;",
    out_words=None,
):
    images = [np.ascontiguousarray(i).view(np.uint8).ravel() for i in (a_image, b_image)]
    padded = np.zeros(-(-images[0].size // 1024) * 1024 + images[1].size, np.uint8)
    padded[: images[0].size] = images[0]
    b_at = -(-images[0].size // 1024) * 1024
    padded[b_at:] = images[1]
    words = out_words or n // 2
    device = Device()
    out, source = device.empty((128, words), torch.int32), device.tensor(torch.from_numpy(padded))
    fragments = (
        device.tensor(torch.from_numpy(a_registers.view(np.int32))) if a_registers is not None else source
    )
    a = "{%r210, %r211, %r212, %r213}" if a_registers is not None else "%rd21"
    body = f"""
    mov.u32 %r2, buf;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], {padded.size};
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], {padded.size}, [bar];
    W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra W;
    shr.u32 %r5, %r2, 4;
    cvt.u64.u32 %rd20, %r5;
    add.u64 %rd21, %rd20, {hopper(a_desc)};
    add.u64 %rd22, %rd20, {hopper(b_desc) + (b_at >> 4)};
    mad.wide.u32 %rd11, %r0, 16, %rd2;
    {"ld.global.v4.b32 {%r210, %r211, %r212, %r213}, [%rd11];" if a_registers is not None else ""}
    {"wgmma.fence.sync.aligned;" if fence else ""}
    setp.ne.u32 %p4, 0, 0;
    wgmma.mma_async.sync.aligned.{shape}.{types} {registers(20, words)}, {a}, %rd22, %p4, 1, 1{majors};
    wgmma.commit_group.sync.aligned;
    {wait}
    mad.wide.u32 %rd10, %r0, {4 * words}, %rd0;
    """ + "\n".join(f"st.global.b32 [%rd10+{4 * i}], %r{20 + i};" for i in range(words))
    run(body, device, out, source, fragments, threads=128, declarations=SMEM, target="sm_90a")
    return out.torch.numpy()


def matrix(fragments, n):
    rows, columns = fragment_rows_columns(n)
    result = np.zeros((64, n), np.float32)
    result[rows, columns] = fragments.view(np.float32)
    return result


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_shared_operands_in_every_k_major_swizzle(swizzle):
    a, b = small_integers(64, 16), small_integers(32, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16), swizzle), k_major(raw(b, torch.float16), swizzle)
    got = product("m64n32k16", "f32.f16.f16", ia, da, ib, db, 32, ", 0, 0")
    np.testing.assert_array_equal(matrix(got, 32), a @ b.T)


def test_mn_major_operands():
    a, b = small_integers(64, 16), small_integers(64, 16, seed=1)
    (ia, da), (ib, db) = (mn_major_128(raw(x, torch.bfloat16).view(np.uint16)) for x in (a, b))
    got = product("m64n64k16", "f32.bf16.bf16", ia, da, ib, db, 64, ", 1, 1")
    np.testing.assert_array_equal(matrix(got, 64), a @ b.T)


def test_a_in_registers_and_fp8():
    a, b = small_integers(64, 32), small_integers(16, 32, seed=1)
    codes = raw(a, torch.float8_e4m3fn)
    words = np.zeros((128, 4), np.uint32)
    for t in range(128):
        for r in range(4):
            row, k = 16 * (t // 32) + t % 32 // 4 + 8 * (r % 2), t % 4 * 4 + 16 * (r // 2)
            words[t, r] = codes[row, k : k + 4].copy().view(np.uint32)[0]
    ib, db = k_major(raw(b, torch.float8_e4m3fn))
    got = product("m64n16k32", "f32.e4m3.e4m3", np.zeros(16, np.uint8), 0, ib, db, 16, a_registers=words)
    np.testing.assert_array_equal(matrix(got, 16), a @ b.T)


def test_half_precision_accumulators_are_packed():
    a, b = small_integers(64, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    got = product("m64n16k16", "f16.f16.f16", ia, da, ib, db, 16, ", 0, 0", out_words=4)
    rows, columns = fragment_rows_columns(16)
    result = np.zeros((64, 16), np.float16)
    result[rows, columns] = got.view(np.float16).reshape(128, 8)
    np.testing.assert_array_equal(result, (a @ b.T).astype(np.float16))


def test_register_rules():
    a = small_integers(64, 16)
    image, desc = k_major(raw(a, torch.float16))
    with pytest.raises(EmulationError, match=r"wgmma.wait_group is missing before this"):
        product("m64n64k16", "f32.f16.f16", image, desc, image, desc, 64, ", 0, 0", wait="")
    with pytest.raises(EmulationError, match=r"must follow a wgmma.fence"):
        product("m64n64k16", "f32.f16.f16", image, desc, image, desc, 64, ", 0, 0", fence=False)


def test_registers_that_others_have_used_need_a_fence_before_the_next_product():
    a, b = small_integers(64, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    again = (
        "wgmma.wait_group.sync.aligned 0;\n{use}\n{fence}\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {d}, %rd21, %rd22, 1, 1, 1, 0, 0;\n"
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
    )

    def twice(use: str, fence: str) -> np.ndarray:
        wait = again.format(use=use, fence=fence, d=registers(20, 8))
        return matrix(product("m64n16k16", "f32.f16.f16", ia, da, ib, db, 16, ", 0, 0", wait=wait), 16)

    np.testing.assert_array_equal(twice("", ""), 2 * (a @ b.T))
    np.testing.assert_array_equal(twice("mov.b32 %r20, %r20;", "wgmma.fence.sync.aligned;"), 2 * (a @ b.T))
    with pytest.raises(EmulationError, match=r"used by another instruction since the last wgmma.fence"):
        twice("mov.b32 %r20, %r20;", "")
