"""Waits for what a warp has under way: tcgen05.ld and st, cp.async. Right with them, reported without each."""

import pytest
import torch
from snippets import Device, Options, run
from test_tensor import ALLOCATE, FREE, SMEM

from nmoe.codegen.emulator import EmulationError

LOAD_WAIT, STORE_WAIT = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
MOVE = (
    ALLOCATE.format(group=1)
    + """
    tcgen05.st.sync.aligned.32x32b.x2.b32 [%r4], {%r0, %r1};
    @1
    tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r20, %r21}, [%r4];
    mov.b64 %rd20, {%r20, %r21};
    mov.b64 %rd21, %rd20;
    mov.b64 {%r22, %r23}, %rd21;
    mov.b32 %r24, %r22;
    @2
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    @3
    add.u32 %r25, %r24, 1;
    st.global.b32 [%rd10], %r25;
    """
    + FREE.format(group=1)
)


def tensor_moves(first=STORE_WAIT, second=LOAD_WAIT, third="", options=None):
    device = Device(options)
    out = device.empty((128,), torch.int32)
    body = MOVE.replace("@1", first).replace("@2", second).replace("@3", third)
    run(body, device, out, threads=128, declarations=SMEM)
    assert torch.equal(out.torch, torch.arange(1, 129, dtype=torch.int32))


def test_moves_may_come_before_the_wait_for_a_load():
    tensor_moves()
    tensor_moves(second="", third=LOAD_WAIT)


@pytest.mark.parametrize("other", ["", STORE_WAIT, "tcgen05.fence::after_thread_sync;"])
def test_arithmetic_on_a_loaded_value_needs_the_wait(other):
    with pytest.raises(EmulationError, match=r"tcgen05.ld is used, but no tcgen05.wait::ld.*add.u32 %r25"):
        tensor_moves(second=other)


@pytest.mark.parametrize(
    "use", ["st.global.b32 [%rd10], %r22;", "add.u64 %rd22, %rd20, 1;", "setp.eq.u32 %p3, %r20, 0;"]
)
def test_every_use_needs_the_wait(use):
    with pytest.raises(EmulationError, match=r"tcgen05.ld is used, but no tcgen05.wait::ld"):
        tensor_moves(second="", third=use + LOAD_WAIT)


def test_use_may_be_made_to_wait():
    options = Options(implicit_order=True)
    tensor_moves(second="", options=options)
    with pytest.raises(EmulationError, match=r"this write is not ordered after the read by tcgen05.ld"):
        overwrite = f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%r4], {{%r0}};\n{STORE_WAIT}"
        tensor_moves(second="", third=overwrite, options=options)


@pytest.mark.parametrize("other", ["", LOAD_WAIT])
def test_a_load_after_a_store_needs_the_wait(other):
    with pytest.raises(
        EmulationError, match=r"this read is not ordered after the write by tcgen05.st of warp"
    ):
        tensor_moves(first=other)


def test_columns_are_not_freed_or_overwritten_under_a_load():
    overwrite = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r4], {%r0};\n"
    with pytest.raises(
        EmulationError, match=r"this write is not ordered after the read by tcgen05.ld of warp"
    ):
        tensor_moves(second=overwrite + LOAD_WAIT + STORE_WAIT)
    tensor_moves(third=overwrite + STORE_WAIT)
    unread = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r30}, [%r4];"
    with pytest.raises(
        EmulationError, match=r"this write is not ordered after the read by tcgen05.ld of warp"
    ):
        tensor_moves(third=unread)


COPY = """
    mov.u32 %r2, buf;
    mad.lo.u32 %r3, %r0, 16, %r2;
    mad.wide.u32 %rd2, %r0, 16, %rd0;
    setp.eq.u32 %p1, %r0, 0;
    cp.async.cg.shared.global [%r3], [%rd2], 16;
    @1
    cp.async.cg.shared.global [%r3+1024], [%rd2+1024], 16;
    @2
    ld.shared.b32 %r5, [%r3];
    @3
    ld.shared.b32 %r6, [%r3+1024];
    add.u32 %r7, %r5, %r6;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
    st.global.b32 [%rd3], %r7;
"""
COMMIT, WAIT_ALL = "cp.async.commit_group;", "cp.async.wait_all;"
BUFFER = ".shared .align 16 .b8 buf[2048];\n.shared .align 8 .b8 bar[8];"


def copies(first, second, third="", head="", options=None):
    device = Device(options)
    source = device.tensor(torch.arange(512, dtype=torch.int32))
    out = device.empty((64,), torch.int32)
    body = head + COPY.replace("@1", first).replace("@2", second).replace("@3", third)
    run(body, device, source, out, threads=64, declarations=BUFFER)
    assert torch.equal(out.torch, 256 + 8 * torch.arange(64, dtype=torch.int32))


@pytest.mark.parametrize(
    "waits",
    [
        ("", WAIT_ALL),
        (COMMIT, COMMIT + "cp.async.wait_group 0;"),
        (COMMIT, COMMIT + "cp.async.wait_group 1;", "cp.async.wait_group 0;"),
        (COMMIT, "cp.async.wait_group 0;", WAIT_ALL),
    ],
)
def test_copies_are_there_after_the_wait_for_their_group(waits):
    copies(*waits)


@pytest.mark.parametrize(
    "waits",
    [
        ("", ""),
        (COMMIT, COMMIT),
        ("", "cp.async.wait_group 0;"),
        (COMMIT, COMMIT + "cp.async.wait_group 1;"),
        (COMMIT, COMMIT + "cp.async.wait_group 2;", "cp.async.wait_group 0;"),
        (WAIT_ALL, ""),
    ],
)
def test_a_read_before_the_wait_is_a_race(waits):
    with pytest.raises(EmulationError, match=r"this read is not ordered after the write by cp.async of warp"):
        copies(*waits)


INIT = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 64;
    bar.sync 0;
"""
ARRIVE = "cp.async.mbarrier.arrive.noinc.shared.b64 [bar];"
POLL = "W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;\n@!%p2 bra W;"


@pytest.mark.parametrize("seed", range(4))
def test_copies_arrive_on_an_mbarrier(seed):
    copies("", ARRIVE + POLL, head=INIT, options=Options(seed=seed))
    with pytest.raises(EmulationError, match=r"not ordered after the write by cp.async of warp"):
        copies(ARRIVE, POLL, head=INIT, options=Options(seed=seed))
    with pytest.raises(EmulationError, match=r"not ordered after the write by cp.async of warp"):
        copies("", "mbarrier.arrive.shared.b64 _, [bar];" + POLL, head=INIT, options=Options(seed=seed))


def test_bulk_stores_of_copied_memory_need_the_proxy_fence():
    store = "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;\ncp.async.bulk.commit_group;\n"
    store = (
        "bar.sync 0;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra PAST;\n"
        + store
        + "cp.async.bulk.wait_group 0;\nPAST: bar.sync 0;"
    )
    copies("", WAIT_ALL + "fence.proxy.async.shared::cta;" + store)
    with pytest.raises(EmulationError, match=r"by cp.async of warp . for the async proxy"):
        copies("", WAIT_ALL + store)
