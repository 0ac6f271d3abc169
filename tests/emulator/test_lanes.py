"""Races between lanes of one warp on shared memory: right with bar.warp.sync, reported without."""

import pytest
import torch
from snippets import Device, Options, run

from nmoe.codegen.emulator import EmulationError

BUFFER = ".shared .align 128 .b8 buf[4096];\n.shared .align 8 .b8 bar[8];"
PLACES = """
    mov.u32 %r2, buf;
    mad.lo.u32 %r3, %r0, 4, %r2;
    xor.b32 %r4, %r0, 1;
    mad.lo.u32 %r4, %r4, 4, %r2;
    setp.eq.u32 %p1, %r0, 0;
"""
WRITE, EXCHANGE = "st.shared.b32 [%r3], %r0;", "ld.shared.b32 %r5, [%r4];"
RESULT = "\nmad.wide.u32 %rd1, %r0, 4, %rd0;\nst.global.b32 [%rd1], %r5;"
SYNC = "bar.warp.sync -1;"
SWAPPED = torch.arange(32, dtype=torch.int32) ^ 1


def lanes(body, expected=SWAPPED, options=None):
    device = Device(options)
    out = device.empty((32,), torch.int32)
    run(PLACES + body + RESULT, device, out, declarations=BUFFER)
    assert torch.equal(out.torch, expected)


@pytest.mark.parametrize(
    "sync", [SYNC, "bar.sync 0;", "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"]
)
@pytest.mark.parametrize("seed", range(4))
def test_synchronised_lanes_exchange_through_shared_memory(sync, seed):
    lanes(WRITE + sync + EXCHANGE, options=Options(seed=seed))


@pytest.mark.parametrize(
    "between",
    [
        "",
        "shfl.sync.idx.b32 %r6, %r0, 0, 31, -1;",
        "vote.sync.ballot.b32 %r6, %p1, -1;",
        "fence.acq_rel.cta;",
        "fence.proxy.async.shared::cta;",
    ],
)
def test_nothing_but_a_barrier_orders_lanes(between):
    message = r"this read by lane 0 is not ordered after the write by lane 1 of the same warp: bar.warp.sync is missing"
    with pytest.raises(EmulationError, match=message):
        lanes(WRITE + between + EXCHANGE)
    lanes(WRITE + between + EXCHANGE, options=Options(races=False))


def test_a_write_after_another_lanes_read_is_a_race():
    again = "add.u32 %r6, %r0, 9;\nst.shared.b32 [%r3], %r6;"
    lanes(WRITE + SYNC + EXCHANGE + SYNC + again)
    with pytest.raises(EmulationError, match="this write by lane 0 is not ordered after the read by lane 1"):
        lanes(WRITE + SYNC + EXCHANGE + again)
    with pytest.raises(
        EmulationError, match="this write by lane 0 is not ordered after the read by several lanes"
    ):
        lanes(WRITE + SYNC + "ld.shared.b32 %r5, [%r2];" + again)


def test_a_lane_may_read_its_own_writes_and_neighbours_share_a_word():
    own = torch.arange(32, dtype=torch.int32)
    lanes(WRITE + "ld.shared.b32 %r5, [%r3];", own)
    halves = "mad.lo.u32 %r6, %r0, 2, %r2;\ncvt.u16.u32 %h1, %r0;\nst.shared.b16 [%r6], %h1;\nld.shared.u16 %r5, [%r6];"
    lanes(halves, own)


def test_lanes_that_write_one_word_together_must_agree():
    read = SYNC + "ld.shared.b32 %r5, [%r2];"
    lanes("st.shared.b32 [%r2], 7;" + read, torch.full((32,), 7, dtype=torch.int32))
    with pytest.raises(EmulationError, match="lanes 0 and 1 write different values in one instruction"):
        lanes("st.shared.b32 [%r2], %r0;" + read)
    with pytest.raises(
        EmulationError, match="this write by lane 0 is not ordered after the write by lane 31"
    ):
        lanes("st.shared.b32 [%r2], 7;\nst.shared.b32 [%r2], 7;" + read)


MATRIX = """
    mad.lo.u32 %r6, %r0, 16, %r2;
    {write}
    {first}
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
    {second}
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {{%r10, %r11, %r12, %r13}};
    {third}
    ld.shared.b32 %r5, [%r6];
"""


def test_matrix_loads_and_stores_belong_to_the_whole_warp():
    write = "st.shared.v4.b32 [%r6], {%r0, %r0, %r0, %r0};"
    good = {"write": write, "first": SYNC, "second": "", "third": SYNC}
    own = torch.arange(32, dtype=torch.int32)
    lanes(MATRIX.format(**good), own)
    with pytest.raises(
        EmulationError, match="this read by the whole warp is not ordered after the write by lane 0"
    ):
        lanes(MATRIX.format(**good | {"first": ""}))
    with pytest.raises(
        EmulationError, match="this read by lane 0 is not ordered after the write by several lanes"
    ):
        lanes(MATRIX.format(**good | {"third": ""}))


STORE = """
    st.shared.b32 [%r3], %r0;
    fence.proxy.async.shared::cta;
    {first}
    @!%p1 bra SENT;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 128;
    cp.async.bulk.commit_group;
    {one}
    SENT: {every}
    {second}
    st.shared.b32 [%r3], 5;
"""


def send(first, second, seed=0, one="", every=""):
    device = Device(Options(seed=seed))
    out = device.empty((32,), torch.int32)
    body = PLACES + STORE.format(first=first, second=second, one=one, every=every)
    run(body, device, out, declarations=BUFFER)
    assert torch.equal(out.torch, torch.arange(32, dtype=torch.int32))


@pytest.mark.parametrize("waits", ["one", "every"])
@pytest.mark.parametrize("read", ["", ".read"])
@pytest.mark.parametrize("seed", range(4))
def test_one_lane_stores_what_all_have_written(waits, read, seed):
    """Only the lane that has issued a bulk store can wait for it."""
    wait = {waits: f"cp.async.bulk.wait_group{read} 0;"}
    send(SYNC, SYNC, seed, **wait)
    with pytest.raises(EmulationError, match="this read by lane 0 is not ordered after the write by lane 1"):
        send("", SYNC, seed, **wait)
    with pytest.raises(
        EmulationError, match="lane 1 overwrites what a bulk store reads, for which other lanes"
    ):
        send(SYNC, "", seed, **wait)
