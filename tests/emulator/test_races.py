"""Happens-before detection: what must be flagged, what must not, and the mutation tool on top of it."""

import pytest
import torch
from snippets import Device, Options, module, run

from nmoe.codegen.emulator import EmulationError
from nmoe.codegen.emulator.mutate import mutants, survey

SLOT = ".shared .align 16 .b8 slot[1024];\n.shared .align 8 .b8 bar[16];"
EXCHANGE = """
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, slot;
    add.u32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %r0;
    {first}
    xor.b32 %r4, %r1, 128;
    add.u32 %r5, %r2, %r4;
    ld.shared.b32 %r6, [%r5];
    {second}
    st.shared.b32 [%r3], %r6;
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    st.global.b32 [%rd1], %r6;
"""
STORE = """
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, slot;
    add.u32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %r0;
    {fence}
    bar.sync 0;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 256;
    cp.async.bulk.commit_group;
    {wait}
    {after}
    END:
"""


def out_of(device, size=64):
    return device.empty((size,), torch.int32)


def test_barriers_order_the_warps():
    device = Device()
    out = out_of(device)
    run(
        EXCHANGE.format(first="bar.sync 0;", second="bar.sync 0;"), device, out, threads=64, declarations=SLOT
    )
    assert torch.equal(out.torch, torch.arange(64, dtype=torch.int32) ^ 32)


@pytest.mark.parametrize(("first", "second"), [("bar.sync 0;", ""), ("bar.sync 0;", "bar.warp.sync -1;")])
@pytest.mark.parametrize("seed", range(3))
def test_a_missing_barrier_is_found_under_any_schedule(first, second, seed):
    device = Device(Options(seed=seed))
    with pytest.raises(
        EmulationError, match=r"race on shared memory 0x4\w\w of CTA rank 0: .* is not ordered after the"
    ):
        run(
            EXCHANGE.format(first=first, second=second), device, out_of(device), threads=64, declarations=SLOT
        )


def test_without_detection_the_same_program_runs():
    device = Device(Options(races=False))
    run(
        EXCHANGE.format(first="bar.sync 0;", second=""), device, out_of(device), threads=64, declarations=SLOT
    )


def test_a_bulk_store_needs_the_proxy_fence():
    device = Device()
    wait = "cp.async.bulk.wait_group 0;"
    good = STORE.format(fence="fence.proxy.async.shared::cta;", wait=wait, after="")
    out = out_of(device)
    run(good, device, out, threads=64, declarations=SLOT)
    assert torch.equal(out.torch, torch.arange(64, dtype=torch.int32))
    with pytest.raises(EmulationError, match=r"for the async proxy: fence.proxy.async is missing"):
        run(STORE.format(fence="", wait=wait, after=""), device, out, threads=64, declarations=SLOT)


def test_a_bulk_store_must_have_read_before_its_source_is_written_or_the_cta_exits():
    device = Device()
    fence = "fence.proxy.async.shared::cta;"
    early = STORE.format(
        fence=fence, wait="", after="st.shared.b32 [slot], %r0;\ncp.async.bulk.wait_group 0;"
    )
    with pytest.raises(
        EmulationError, match=r"this write is not ordered after the read by a bulk store of warp 0"
    ):
        run(early, device, out_of(device), threads=64, declarations=SLOT)
    with pytest.raises(EmulationError, match="the CTA exits while a bulk store of warp 0 may still read"):
        run(
            STORE.format(fence=fence, wait="", after=""),
            device,
            out_of(device),
            threads=64,
            declarations=SLOT,
        )


LOAD = """
    mov.u32 %r2, slot;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 256, [bar];
    W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra W;
    mad.lo.u32 %r3, %r0, 4, %r2;
    ld.shared.b32 %r4, [%r3];
    mad.wide.u32 %rd2, %r0, 4, %rd1;
    st.global.b32 [%rd2], %r4;
"""


def test_mutation_of_a_bulk_load_is_noticed_except_where_redundant():
    device = Device()
    source, out = device.tensor(torch.arange(64, dtype=torch.int32)), out_of(device)
    report = run(LOAD, device, source, out, threads=64, declarations=SLOT)

    def again(changed, options):
        device.options = options
        device.launch(device.program(changed, "k"), (1, 1, 1), (64, 1, 1), params)
        return torch.equal(out.torch, source.torch)

    params = b"".join(t.pointer.to_bytes(8, "little") for t in (source, out))
    base = module(LOAD, 2, SLOT)
    assert again(base, Options())
    verdicts = survey(mutants(base, [report]), again, [Options(seed=s, limit=10_000) for s in range(4)])
    noticed = {v.mutant.instruction.opcode.split(".shared")[0]: v.noticed for v in verdicts}
    assert len(verdicts) == 4
    assert "fence.mbarrier_init" in noticed["fence.mbarrier_init.release.cluster"]
    assert "not ordered after" in noticed["bar.sync"] or "no mbarrier" in noticed["bar.sync"]
    assert "deadlock" in noticed["mbarrier.arrive.expect_tx"]
    assert (
        "never-written" in noticed["mbarrier.try_wait.parity"]
        or "race" in noticed["mbarrier.try_wait.parity"]
    )


def test_reports_count_work_and_coverage():
    device = Device()
    source, out = device.tensor(torch.arange(64, dtype=torch.int32)), out_of(device)
    report = run(
        LOAD + "setp.gt.u32 %p5, %r0, 99;\n@%p5 trap;", device, source, out, threads=64, declarations=SLOT
    )
    assert report.counters["tma_load_bytes"] == 256
    assert report.by_opcode()["ld.shared"] == 2
    assert report.roles.sum() == report.counters["instructions"]
    assert [i.opcode for i in report.uncovered()] == ["trap"]


FLAG = """
    setp.ge.u32 %p3, %r0, 32;
    @%p3 bra CONSUME;
    mad.lo.u32 %r1, %r0, 4, 0;
    mov.u32 %r2, slot;
    add.u32 %r2, %r2, %r1;
    st.shared.b32 [%r2], %r0;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra END;
    {release}
    bra END;
    CONSUME: ld.acquire.cta.shared.b32 %r3, [flag];
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra CONSUME;
    ld.shared.b32 %r4, [slot];
    END:
"""
FLAG_HEAD = "mov.u32 %r9, 0;\nsetp.eq.u32 %p5, %r0, 0;\n@%p5 st.shared.b32 [flag], %r9;\nbar.sync 0;"


@pytest.mark.parametrize(
    "release",
    [
        "st.release.cta.shared.b32 [flag], 1;",
        "red.release.cta.shared.add.u32 [flag], 1;",
        "fence.acq_rel.cta;\nst.relaxed.cta.shared.b32 [flag], 1;",
    ],
)
def test_flags_in_memory_order_what_they_release(release):
    declarations = SLOT + "\n.shared .align 4 .b8 flag[4];"
    run(FLAG_HEAD + FLAG.format(release=release), Device(), threads=64, declarations=declarations)
    with pytest.raises(EmulationError, match="not ordered after the write by warp 0"):
        unfenced = "st.relaxed.cta.shared.b32 [flag], 1;"
        run(FLAG_HEAD + FLAG.format(release=unfenced), Device(), threads=64, declarations=declarations)
