"""Global, shared and cluster memory: values, bounds, never-written bytes, atomics."""

import numpy as np
import pytest
import torch
from snippets import Device, Options, evaluate, run

from nmoe.codegen.emulator import EmulationError, PtxError


def fails(pattern, body, *arguments, **options):
    with pytest.raises(EmulationError, match=pattern):
        run(body, *arguments, **options)


def test_out_of_bounds_names_the_buffer_and_the_line():
    device = Device()
    small = device.tensor(torch.zeros(4, dtype=torch.int32))
    fails(
        r"out of bounds: 16 bytes into buffer 0 of 16 bytes .*PTX line \d+: ld.global.b32",
        "ld.global.b32 %r1, [%rd0+16];",
        device,
        small,
    )
    fails("is in no registered buffer", "mov.u64 %rd0, 4096;\nst.global.b32 [%rd0], %r0;", device, small)


def test_never_written_memory_and_misalignment():
    device = Device()
    out = device.empty((32,), torch.int32)
    fails(
        "read of never-written global memory: 4 bytes into buffer 0",
        "st.global.b32 [%rd0], %r0;\nld.global.b32 %r1, [%rd0+4];",
        device,
        out,
    )
    fails("misaligned access: 8 bytes at address", "ld.global.b64 %rd1, [%rd0+4];", device, out)
    fails(
        "never-written shared memory at 0x400",
        "ld.shared.b32 %r1, [buf];",
        device,
        out,
        declarations=".shared .align 4 .b8 buf[4];",
    )
    fails(
        r"shared offset 0x408 .* out of bounds",
        "st.shared.b32 [buf+8], %r0;",
        device,
        out,
        declarations=".shared .align 4 .b8 buf[8];",
    )


def test_vectors_signs_and_widths():
    bytes_in = np.arange(-128, 128, dtype=np.int8)
    padded = np.repeat(bytes_in, 4).view(np.uint32)
    device = Device()
    source, out = (
        device.tensor(torch.from_numpy(padded.view(np.int32).copy())),
        device.empty((256,), torch.int64),
    )
    run(
        "mad.wide.u32 %rd10, %r0, 4, %rd0;\n"
        "ld.global.s8 %rd11, [%rd10+1];\n"
        "mad.wide.u32 %rd12, %r0, 8, %rd1;\n"
        "st.global.b64 [%rd12], %rd11;",
        device,
        source,
        out,
        threads=256,
    )
    np.testing.assert_array_equal(out.torch.numpy(), bytes_in)


@pytest.mark.parametrize("hints", ["", ".L1::no_allocate", ".nc.L1::no_allocate.L2::256B"])
@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        *(("", k) for k in ("b8", "u8", "b16", "f32", "b32", "b64", "f64")),
        *((".v2", k) for k in ("b8", "b16", "f32", "b32", "b64", "f64", "u64")),
        *((".v4", k) for k in ("b8", "b16", "f32", "b32", "b64", "f64")),
        *((".v8", k) for k in ("f32", "b32", "u32")),
    ],
)
def test_vectors_of_every_type_keep_their_bytes(vector, kind, hints):
    count, bits = int(vector[2:] or 1), int(kind[1:])
    size = count * bits // 8
    device = Device()
    data = torch.randint(0, 256, (32 * size,), dtype=torch.uint8)
    source, out = device.tensor(data), device.empty((32 * size,), torch.uint8)
    prefix = "%rd2" if bits == 64 else "%r2" if bits == 32 else "%h"
    registers = ", ".join(f"{prefix}{i}" for i in range(count))
    registers = f"{{{registers}}}" if vector else registers
    body = (
        f"mad.wide.u32 %rd10, %r0, {size}, %rd0;\nmad.wide.u32 %rd11, %r0, {size}, %rd1;\n"
        f"ld.global{hints}{vector}.{kind} {registers}, [%rd10];\n"
        f"st.global{vector}.{kind} [%rd11], {registers};"
    )
    run(body, device, source, out)
    assert torch.equal(out.torch, data)


@pytest.mark.parametrize(
    ("operation", "kind", "start", "want"),
    [
        ("add", "u32", 5, 5 + 496),
        ("min", "s32", 7, 0),
        ("max", "u32", 7, 31),
        ("or", "b32", 64, 95),
        ("and", "b32", 15, 0),
        ("xor", "b32", 1, 1),
    ],
)
def test_integer_atomics(operation, kind, start, want):
    device = Device()
    cell, old = device.tensor(torch.tensor([start], dtype=torch.int32)), device.empty((32,), torch.int32)
    run(
        f"atom.global.{operation}.{kind} %r1, [%rd0], %r0;\n"
        f"mad.wide.u32 %rd10, %r0, 4, %rd1;\n"
        f"st.global.b32 [%rd10], %r1;",
        device,
        cell,
        old,
    )
    assert cell.torch.item() == want
    assert old.torch[0].item() == start


def test_atomic_increment_and_decrement_wrap_at_the_operand():
    device = Device()
    cells = device.tensor(torch.tensor([0, 1], dtype=torch.int32))
    run("red.global.inc.u32 [%rd0], 4;\nred.global.dec.u32 [%rd0+4], 6;", device, cells)
    assert cells.torch.tolist() == [32 % 5, (1 - 32) % 7]


def test_floating_reductions_and_compare_and_swap():
    device = Device()
    sums = device.tensor(torch.zeros(8))
    run("red.global.add.v4.f32 [%rd0], {0f3F800000, 0f40000000, 0f40400000, 0f3F000000};", device, sums)
    assert sums.torch.tolist() == [32, 64, 96, 16, 0, 0, 0, 0]
    pair = device.tensor(torch.zeros(2, dtype=torch.bfloat16))
    run("mov.b32 %r1, 0x3F804000;\nred.global.add.noftz.bf16x2 [%rd0], %r1;", device, pair)
    assert pair.torch.tolist() == [64, 32]
    eight = device.tensor(torch.zeros(8, dtype=torch.bfloat16))
    values = ", ".join(f"%r{i}" for i in range(1, 5))
    run(
        "\n".join(f"mov.b32 %r{i}, 0x3F80{0x3F80 + i:x};" for i in range(1, 5))
        + f"\nred.global.add.noftz.v4.bf16x2 [%rd0], {{{values}}};",
        device,
        eight,
        threads=1,
    )
    assert eight.torch.view(torch.int16).tolist() == [
        0x3F81,
        0x3F80,
        0x3F82,
        0x3F80,
        0x3F83,
        0x3F80,
        0x3F84,
        0x3F80,
    ]
    wide = device.tensor(torch.tensor([5], dtype=torch.int64))
    run("atom.acq_rel.sys.global.add.u64 %rd1, [%rd0], 4294967296;", device, wide, threads=2)
    assert wide.torch.item() == 5 + 2**33
    lock = device.tensor(torch.tensor([7], dtype=torch.int32))
    run("atom.global.cas.b32 %r1, [%rd0], 7, 9;\natom.global.cas.b32 %r1, [%rd0], 7, 11;", device, lock)
    assert lock.torch.item() == 9


def test_generic_addresses_reach_every_window():
    device = Device()
    out = device.empty((32,), torch.int32)
    body = """
    mov.u32 %r1, buf;
    cvt.u64.u32 %rd1, %r1;
    cvta.shared.u64 %rd2, %rd1;
    mad.wide.u32 %rd2, %r0, 4, %rd2;
    st.b32 [%rd2], %r0;
    isspacep.shared %p1, %rd2;
    isspacep.global %p2, %rd0;
    and.pred %p1, %p1, %p2;
    ld.b32 %r2, [%rd2];
    mov.u64 %rd5, stack;
    cvta.local.u64 %rd6, %rd5;
    st.b32 [%rd6], %r2;
    ld.local.b32 %r3, [stack];
    @!%p1 mov.u32 %r3, 99;
    mad.wide.u32 %rd4, %r0, 4, %rd0;
    st.b32 [%rd4], %r3;
    """
    run(body, device, out, declarations=".shared .align 4 .b8 buf[128];\n.local .align 4 .b8 stack[4];")
    assert torch.equal(out.torch, torch.arange(32, dtype=torch.int32))


def test_constant_variables_hold_their_initialisers():
    device = Device()
    out = device.empty((32,), torch.int32)
    run(
        "and.b32 %r1, %r0, 3;\n"
        "mov.u64 %rd1, table;\n"
        "mad.wide.u32 %rd1, %r1, 4, %rd1;\n"
        "ld.global.b32 %r2, [%rd1];\n"
        "mad.wide.u32 %rd4, %r0, 4, %rd0;\n"
        "st.global.b32 [%rd4], %r2;",
        device,
        out,
        outer=".global .align 4 .b32 table[4] = {10, 20, 30, 40};",
    )
    assert out.torch[:5].tolist() == [10, 20, 30, 40, 10]


CLUSTER = """
    mov.u32 %r1, %cluster_ctarank;
    mov.u32 %r2, buf;
    add.u32 %r3, %r1, 100;
    st.shared.b32 [%r2], %r3;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r4, %r1, 1;
    mapa.shared::cluster.u32 %r5, %r2, %r4;
    ld.shared::cluster.b32 %r6, [%r5];
    getctarank.shared::cluster.u32 %r7, %r5;
    mad.lo.u32 %r6, %r7, 1000, %r6;
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    st.global.b32 [%rd1], %r6;
    {tail}
"""


def test_distributed_shared_memory_and_exit_before_access():
    device = Device()
    out = device.empty((2,), torch.int32)
    barrier = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
    run(
        CLUSTER.format(tail=barrier),
        device,
        out,
        threads=1,
        grid=2,
        cluster=2,
        declarations=".shared .align 4 .b8 buf[4];",
    )
    assert out.torch.tolist() == [1101, 100]
    late = (
        "setp.eq.u32 %p1, %r1, 0;\n"
        "@%p1 bra END;\n"
        "L: add.u32 %r9, %r9, 1;\n"
        "setp.lt.u32 %p2, %r9, 500;\n"
        "@%p2 bra L;\n"
        "ld.shared::cluster.b32 %r6, [%r5];\n"
        "END:"
    )
    for races, message in ((True, "exits, which is not ordered after"), (False, "after that CTA has exited")):
        device = Device(Options(races=races))
        fails(
            message,
            CLUSTER.format(tail=late),
            device,
            device.empty((2,), torch.int32),
            threads=1,
            grid=2,
            cluster=2,
            declarations=".shared .align 4 .b8 buf[4];",
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", r"PTX line \d+: instruction frobnicate is not supported"),
        ("add.frobnicate.s32 %r1, %r2, %r3;", r"modifier .frobnicate is not supported"),
        ("add.s32 %r1, %rd2, %r3;", r"register %rd2 does not have the type"),
        ("mov.u32 %r1, %frobnicate;", "no known special register"),
        ("bra NOWHERE;", "unknown label NOWHERE"),
        ("add.s16x2 %r1, %r2, %r3;", r"PTX line \d+: this form is not supported"),
        ("ld.global.v2.b32 {%r1}, [%rd0];", "1 registers for a vector of v2"),
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(text, message):
    with pytest.raises(PtxError, match=message):
        run(text, Device())


def test_divergent_aligned_instruction_is_an_error():
    device = Device()
    fails(
        "aligned instruction is executed by lanes 00000001 of ffffffff",
        "setp.eq.u32 %p1, %r0, 0;\n@%p1 bar.sync 0;",
        device,
    )


def test_partial_warps_and_launch_geometry():
    device = Device()
    out = device.empty((40,), torch.int32)
    run("mad.wide.u32 %rd1, %r0, 4, %rd0;\nst.global.b32 [%rd1], %r0;", device, out, threads=40)
    assert torch.equal(out.torch, torch.arange(40, dtype=torch.int32))
    fails("is not made of clusters", "", device, grid=3, cluster=2)
    fails("bytes of shared memory", "", device, shared=1 << 20)


def test_arithmetic_on_addresses_wraps_like_hardware():
    got = evaluate("sub.u64 %rd9, %a, %a;\nsub.u64 %d, %rd9, 1;", np.uint64, np.arange(4, dtype=np.uint64))
    assert np.all(got == 2**64 - 1)


def test_small_asynchronous_copies_fill_with_zeros():
    device = Device()
    source, out = device.tensor(torch.arange(1, 129, dtype=torch.int32)), device.empty((32, 4), torch.int32)
    body = """
    mov.u32 %r2, buf;
    mad.lo.u32 %r3, %r0, 16, %r2;
    mad.wide.u32 %rd2, %r0, 16, %rd0;
    setp.lt.u32 %p1, %r0, 16;
    selp.b32 %r4, 16, 8, %p1;
    cp.async.cg.shared.global [%r3], [%rd2], 16, %r4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3];
    mad.wide.u32 %rd3, %r0, 16, %rd1;
    st.global.v4.b32 [%rd3], {%r5, %r6, %r7, %r8};
    """
    run(body, device, source, out, declarations=".shared .align 16 .b8 buf[512];")
    want = torch.arange(1, 129, dtype=torch.int32).reshape(32, 4)
    want[16:, 2:] = 0
    assert torch.equal(out.torch, want)


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_a_grid_side_by_side_give_the_same_sums(threads):
    device = Device(Options(threads=threads))
    cell, out = device.tensor(torch.zeros(1, dtype=torch.int32)), device.empty((64,), torch.int32)
    body = """
    mov.u32 %r1, %ctaid.x;
    red.global.add.u32 [%rd0], %r1;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    st.global.b32 [%rd2], %r1;
    """
    report = run(body, device, cell, out, grid=64)
    assert cell.torch.item() == 32 * (63 * 64 // 2)
    assert torch.equal(out.torch, torch.arange(64, dtype=torch.int32))
    assert report.by_opcode()["red.global"] == 64
    with pytest.raises(EmulationError, match="CTA \\(63,0,0\\)"):
        run("mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 63;\n@%p1 trap;", device, grid=64)
