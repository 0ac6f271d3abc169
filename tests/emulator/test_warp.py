"""Instructions between the lanes of a warp."""

import numpy as np
import pytest
import torch
from snippets import Device, evaluate, run

from nmoe.codegen.emulator import EmulationError

LANES = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("operation", "want"),
    [
        ("shfl.sync.idx.b32 %d, %a, 5, 31, -1;", np.full(32, 5)),
        ("shfl.sync.idx.b32 %d, %a, 3, 0x181f, -1;", LANES // 8 * 8 + 3),
        ("shfl.sync.up.b32 %d, %a, 1, 0, -1;", np.maximum(LANES.astype(int) - 1, 0)),
        ("shfl.sync.down.b32 %d, %a, 4, 31, -1;", np.where(LANES + 4 > 31, LANES, LANES + 4)),
        ("shfl.sync.bfly.b32 %d, %a, 16, 31, -1;", LANES ^ 16),
        ("shfl.sync.down.b32 %d|%p1, %a, 30, 31, -1;\nselp.b32 %d, 1, 0, %p1;", LANES < 2),
        ("setp.gt.u32 %p1, %a, 27;\nvote.sync.ballot.b32 %d, %p1, -1;", np.full(32, 0xF0000000)),
        ("setp.ge.u32 %p1, %a, 0;\nvote.sync.all.pred %p2, %p1, -1;\nselp.b32 %d, 1, 0, %p2;", np.ones(32)),
        ("setp.eq.u32 %p1, %a, 9;\nvote.sync.any.pred %p2, %p1, -1;\nselp.b32 %d, 1, 0, %p2;", np.ones(32)),
        ("setp.eq.u32 %p1, %a, 9;\nvote.sync.uni.pred %p2, %p1, -1;\nselp.b32 %d, 1, 0, %p2;", np.zeros(32)),
        ("shr.u32 %r9, %a, 4;\nmatch.any.sync.b32 %d, %r9, -1;", np.where(LANES < 16, 0xFFFF, 0xFFFF0000)),
        ("match.all.sync.b32 %d|%p1, %a, -1;", np.zeros(32)),
        ("redux.sync.add.u32 %d, %a, -1;", np.full(32, 496)),
        ("redux.sync.max.s32 %d, %a, -1;", np.full(32, 31)),
        ("redux.sync.xor.b32 %d, %a, -1;", np.zeros(32)),
    ],
)
def test_exchange_between_lanes(operation, want):
    np.testing.assert_array_equal(evaluate(operation, np.uint32, LANES), np.asarray(want).astype(np.uint32))


def test_f32_redux_takes_absolute_values_and_skips_nan_unless_told():
    x = np.float32(np.linspace(-3, 2, 32))
    assert evaluate("redux.sync.max.abs.f32 %d, %a, -1;", np.float32, x)[0] == 3
    assert evaluate("redux.sync.min.f32 %d, %a, -1;", np.float32, x)[7] == -3
    x[4] = np.nan
    assert evaluate("redux.sync.max.f32 %d, %a, -1;", np.float32, x)[0] == 2
    assert np.isnan(evaluate("redux.sync.max.NaN.f32 %d, %a, -1;", np.float32, x)[0])


def test_elect_chooses_one_lane_of_the_member_mask():
    got = evaluate("elect.sync %r9|%p1, -1;\nselp.b32 %d, 1, 0, %p1;", np.uint32, LANES)
    assert got.sum() == 1


def test_a_member_that_is_elsewhere_is_an_error():
    with pytest.raises(
        EmulationError, match=r"lanes ffff0000 of the member mask ffffffff do not execute.*PTX line"
    ):
        evaluate(
            "setp.gt.u32 %p1, %a, 15;\n@%p1 bra END;\nshfl.sync.idx.b32 %d, %a, 0, 31, -1;", np.uint32, LANES
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_fragments(transposed):
    device = Device()
    rows = torch.arange(32 * 8, dtype=torch.int16).reshape(32, 8)
    source, out = device.tensor(rows), device.empty((4, 32, 2), torch.int16)
    trans = ".trans" if transposed else ""
    run(
        f"""
    mad.wide.u32 %rd10, %r0, 16, %rd0;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd10];
    shl.b32 %r5, %r0, 4;
    mov.u32 %r6, buf;
    add.u32 %r6, %r6, %r5;
    st.shared.v4.b32 [%r6], {{%r1, %r2, %r3, %r4}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
    mad.wide.u32 %rd11, %r0, 4, %rd1;
    st.global.b32 [%rd11], %r10;
    st.global.b32 [%rd11+128], %r11;
    st.global.b32 [%rd11+256], %r12;
    st.global.b32 [%rd11+384], %r13;
    """,
        device,
        source,
        out,
        declarations=".shared .align 16 .b8 buf[512];",
    )
    for matrix in range(4):
        block = rows[8 * matrix : 8 * matrix + 8]
        block = block.T if transposed else block
        assert torch.equal(out.torch[matrix], block.reshape(32, 2))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_mma_multiplies_fragments(kind):
    """Fragments laid out by hand from PTX ISA 9.7.14.5.8: groupID = lane / 4, threadID_in_group = lane % 4."""
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 9, shape, generator=gen) for shape in ((16, 16), (16, 8)))
    c = torch.randint(-99, 99, (16, 8), generator=gen)
    registers = torch.empty(32, 10, dtype=torch.int32)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        pairs = [[a[group + 8 * (i % 2), 2 * member + 8 * (i // 2) + j] for j in (0, 1)] for i in range(4)]
        pairs += [[b[2 * member + 8 * i + j, group] for j in (0, 1)] for i in range(2)]
        registers[lane, :6] = torch.tensor(pairs).to(kind).view(torch.int32)[:, 0]
        sums = [c[group + 8 * (i // 2), 2 * member + i % 2] for i in range(4)]
        registers[lane, 6:] = torch.tensor(sums).float().view(torch.int32)
    device = Device()
    given, out = device.tensor(registers), device.empty((32, 4), torch.float32)
    loads = "\n".join(f"ld.global.b32 %r{i + 10}, [%rd10+{4 * i}];" for i in range(10))
    stores = "\n".join(f"st.global.b32 [%rd11+{4 * i}], %r{i + 30};" for i in range(4))
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[kind]
    run(
        f"""
    mad.wide.u32 %rd10, %r0, 40, %rd0;
    {loads}
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r30, %r31, %r32, %r33}}, {{%r10, %r11, %r12, %r13}},
        {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
    mad.wide.u32 %rd11, %r0, 16, %rd1;
    {stores}
    """,
        device,
        given,
        out,
    )
    want = (a @ b + c).float()
    for lane in range(32):
        for i in range(4):
            assert out.torch[lane, i] == want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]


def test_stmatrix_is_the_inverse_of_ldmatrix():
    device = Device()
    out = device.empty((32, 8), torch.int16)
    run(
        """
    mov.u32 %r6, buf;
    shl.b32 %r5, %r0, 4;
    add.u32 %r6, %r6, %r5;
    shl.b32 %r7, %r0, 1;
    add.u32 %r8, %r7, 1;
    shl.b32 %r8, %r8, 16;
    or.b32 %r9, %r7, %r8;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {%r9, %r9, %r9, %r9};
    bar.sync 0;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r6];
    mad.wide.u32 %rd10, %r0, 16, %rd0;
    st.global.v4.b32 [%rd10], {%r1, %r2, %r3, %r4};
    """,
        device,
        out,
        declarations=".shared .align 16 .b8 buf[512];",
    )
    assert torch.equal(out.torch, torch.arange(64, dtype=torch.int16).reshape(8, 8).repeat(4, 1))
