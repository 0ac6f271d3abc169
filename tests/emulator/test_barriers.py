"""mbarriers, named barriers, cluster barriers: phases, counts, errors, and the report of a deadlock."""

import pytest
import torch
from snippets import Device, Options, run

from nmoe.codegen.emulator import EmulationError

BARRIER = ".shared .align 8 .b8 bar[16];"
INIT = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], {count};
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
    {label}: mbarrier.try_wait.parity.shared.b64 %p2, [bar], {parity};
    @!%p2 bra {label};
"""


def fails(pattern, body, *arguments, **options):
    with pytest.raises(EmulationError, match=pattern):
        run(body, *arguments, **options)


def test_phases_alternate_and_a_fresh_barrier_passes_parity_one():
    device = Device()
    out = device.empty((4,), torch.int32)
    body = (
        INIT.format(count=1)
        + """
    mbarrier.test_wait.parity.shared.b64 %p3, [bar], 1;
    mbarrier.test_wait.parity.shared.b64 %p4, [bar], 0;
    mbarrier.arrive.shared.b64 %rd9, [bar];
    mbarrier.test_wait.parity.shared.b64 %p5, [bar], 0;
    mbarrier.test_wait.shared.b64 %p6, [bar], %rd9;
    selp.b32 %r1, 1, 0, %p3;
    selp.b32 %r2, 1, 0, %p4;
    selp.b32 %r3, 1, 0, %p5;
    selp.b32 %r4, 1, 0, %p6;
    st.global.v4.b32 [%rd0], {%r1, %r2, %r3, %r4};
    """
    )
    run(body, device, out, threads=1, declarations=BARRIER)
    assert out.torch.tolist() == [1, 0, 1, 1]


def test_transaction_bytes_hold_the_phase_back():
    device = Device()
    out = device.empty((2,), torch.int32)
    body = (
        INIT.format(count=1)
        + """
    mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;
    mbarrier.test_wait.parity.shared.b64 %p3, [bar], 0;
    mbarrier.complete_tx.shared.b64 [bar], 64;
    mbarrier.test_wait.parity.shared.b64 %p4, [bar], 0;
    selp.b32 %r1, 1, 0, %p3;
    selp.b32 %r2, 1, 0, %p4;
    st.global.v2.b32 [%rd0], {%r1, %r2};
    """
    )
    run(body, device, out, threads=1, declarations=BARRIER)
    assert out.torch.tolist() == [0, 1]


def test_arrive_drop_lowers_the_count_of_later_phases():
    device = Device()
    body = (
        INIT.format(count=2)
        + """
    mbarrier.arrive_drop.shared.b64 %rd9, [bar];
    mbarrier.arrive.shared.b64 %rd9, [bar];
    mbarrier.arrive.shared.b64 %rd9, [bar];
    """
    )
    run(body + WAIT.format(label="A", parity=1), device, threads=1, declarations=BARRIER)


def test_mbarrier_misuse_is_reported():
    device = Device()
    twice = INIT.format(count=1) + "mbarrier.arrive.shared.b64 %rd9, [bar], 2;"
    fails(
        r"over-arrival, 2 arrivals but only 1 of 1 are pending",
        twice,
        device,
        threads=1,
        declarations=BARRIER,
    )
    fails(
        "no mbarrier is initialised at 0x400",
        "mbarrier.arrive.shared.b64 %rd9, [bar];",
        device,
        declarations=BARRIER,
    )
    fails("count 0; expected 1", INIT.format(count=0), device, threads=1, declarations=BARRIER)
    wild = INIT.format(count=1) + "mbarrier.inval.shared.b64 [bar];\nmbarrier.arrive.shared.b64 %rd9, [bar];"
    fails("no mbarrier is initialised", wild, device, threads=1, declarations=BARRIER)


@pytest.mark.parametrize("seed", range(4))
def test_deadlock_says_who_waits_for_what(seed):
    body = (
        INIT.format(count=2)
        + "@%p1 mbarrier.arrive.shared.b64 %rd9, [bar];"
        + WAIT.format(label="A", parity=0)
    )
    fails(
        r"deadlock: .*\n"
        r"  CTA \(0,0,0\) warp 0 at PTX line \d+: mbarrier.try_wait.*waits for mbarrier 0x400 of CTA rank 0: "
        r"phase 0 has 1 of 2 arrivals and 0 bytes pending\n  CTA \(0,0,0\) warp 1",
        body,
        Device(),
        threads=64,
        declarations=BARRIER,
        options=Options(seed=seed),
    )
    fails(
        r"waits for barrier 3: 32 of 64 threads",
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 3, 64;",
        Device(),
        threads=64,
        options=Options(seed=seed),
    )


def test_a_spin_that_never_ends_is_a_livelock():
    device = Device(Options(limit=10_000))
    fails("no end after 10000 warp instructions", "L: bra L;", device)


@pytest.mark.parametrize("seed", range(6))
def test_producer_and_consumer_alternate_under_every_schedule(seed):
    """Warp 0 hands 20 values to warp 1 through one slot and two mbarriers."""
    device = Device(Options(seed=seed))
    out = device.empty((20,), torch.int32)
    body = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 32;
    @%p1 mbarrier.init.shared.b64 [bar+8], 32;
    bar.sync 0;
    mov.u32 %r1, 0;
    setp.ge.u32 %p3, %r0, 32;
    @%p3 bra CONSUME;
    PRODUCE: and.b32 %r2, %r1, 1;
    xor.b32 %r3, %r2, 1;
    P: mbarrier.try_wait.parity.shared.b64 %p2, [bar+8], %r3;
    @!%p2 bra P;
    mul.lo.u32 %r4, %r1, %r1;
    @%p1 st.shared.b32 [slot], %r4;
    mbarrier.arrive.shared.b64 %rd9, [bar];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 20;
    @%p4 bra PRODUCE;
    bra END;
    CONSUME: and.b32 %r2, %r1, 1;
    C: mbarrier.try_wait.parity.shared.b64 %p2, [bar], %r2;
    @!%p2 bra C;
    ld.shared.b32 %r5, [slot];
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    st.global.b32 [%rd1], %r5;
    mbarrier.arrive.shared.b64 %rd9, [bar+8];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 20;
    @%p4 bra CONSUME;
    END:
    """
    run(body, device, out, threads=64, declarations=BARRIER + "\n.shared .align 4 .b8 slot[4];")
    assert out.torch.tolist() == [i * i for i in range(20)]


def test_barrier_reductions():
    device = Device()
    out = device.empty((2, 3), torch.int32)  # a row for each warp
    body = """
    setp.lt.u32 %p1, %r0, 40;
    bar.red.popc.u32 %r1, 1, %p1;
    bar.red.and.pred %p2, 1, %p1;
    bar.red.or.pred %p3, 1, %p1;
    selp.b32 %r2, 1, 0, %p2;
    selp.b32 %r3, 1, 0, %p3;
    shr.u32 %r4, %r0, 5;
    mad.wide.u32 %rd1, %r4, 12, %rd0;
    st.global.b32 [%rd1], %r1;
    st.global.b32 [%rd1+4], %r2;
    st.global.b32 [%rd1+8], %r3;
    """
    run(body, device, out, threads=64)
    assert out.torch.tolist() == [[40, 0, 1]] * 2


def test_remote_arrival_crosses_the_cluster():
    device = Device()
    out = device.empty((2,), torch.int32)
    body = """
    mov.u32 %r1, %cluster_ctarank;
    mbarrier.init.shared.b64 [bar], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.acquire.aligned;
    xor.b32 %r2, %r1, 1;
    mov.u32 %r3, bar;
    mapa.shared::cluster.u32 %r4, %r3, %r2;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];
    A: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra A;
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    st.global.b32 [%rd1], %r2;
    """
    run(body, device, out, threads=1, grid=2, cluster=2, declarations=BARRIER)
    assert out.torch.tolist() == [1, 0]
    unfenced = body.replace("fence.mbarrier_init.release.cluster;", "")
    fails(
        "not ordered after its initialisation",
        unfenced,
        device,
        out,
        threads=1,
        grid=2,
        cluster=2,
        declarations=BARRIER,
    )
