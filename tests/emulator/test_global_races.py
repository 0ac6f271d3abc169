"""Races on global memory between CTAs, clusters, proxies and devices; flags that order them, and each half missing."""

import struct

import pytest
import torch
from snippets import Device, Options, module, run

from nmoe.codegen.emulator import EmulationError, together
from nmoe.codegen.emulator.mutate import mutants, survey

RACE = "race on global memory"
SEEDS = [Options(seed=seed) for seed in range(4)]
BY_CTA = "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 0;\n"


def words(device, *values):
    return device.tensor(torch.tensor(values, dtype=torch.int32))


def racy(body, *arguments, match=RACE, **options):
    with pytest.raises(EmulationError, match=match):
        run(body, *arguments, **options)


@pytest.mark.parametrize("options", SEEDS)
def test_two_ctas_write_one_word(options):
    device = Device(options)
    body = BY_CTA + "st.global.b32 [%rd0+{at}], %r1;"
    racy(
        body.format(at=4),
        device,
        words(device, 0, 0),
        grid=2,
        match=r"4 bytes into buffer 0: this write .* the write",
    )
    racy(body.format(at=4), device, words(device, 0, 0), grid=2, cluster=2)
    own = BY_CTA + "mad.wide.u32 %rd1, %r1, 4, %rd0;\nst.global.b32 [%rd1], %r1;"
    run(own, device, words(device, 0, 0), grid=2)


def test_bytes_of_one_word_are_apart():
    device = Device()
    body = BY_CTA + "mad.wide.u32 %rd1, %r1, {step}, %rd0;\nst.global.b{bits} [%rd1], %r1;"
    for bits, step in ((8, 1), (16, 2)):
        run(body.format(bits=bits, step=step), device, words(device, 0), grid=2)
    racy(body.format(bits=16, step=0), device, words(device, 0), grid=2)


@pytest.mark.parametrize("options", SEEDS)
def test_a_read_races_with_a_write_in_either_order(options):
    device = Device(options)
    body = BY_CTA + "@%p1 st.global.b32 [%rd0], 7;\n@!%p1 ld.global.b32 %r2, [%rd0];"
    racy(body, device, words(device, 0), grid=2, match="not ordered after the (write|read)")
    run("ld.global.b32 %r2, [%rd0];", device, words(device, 0), grid=2)


def test_launches_and_warps_of_a_barrier_are_ordered():
    device = Device()
    out = words(device, *range(64))
    body = "xor.b32 %r1, %r0, {turn};\nmad.wide.u32 %rd1, %r1, 4, %rd0;\nst.global.b32 [%rd1], %r0;\n"
    run(body.format(turn=0), device, out, threads=64)
    run(body.format(turn=32), device, out, threads=64)
    assert torch.equal(out.torch, torch.arange(64, dtype=torch.int32) ^ 32)
    run(body.format(turn=0) + "bar.sync 0;\n" + body.format(turn=32), device, out, threads=64)
    racy(body.format(turn=0) + body.format(turn=32), device, out, threads=64)


# CTA 0: two warps write data, one thread then raises the flag. CTA 1 polls it and reads.
FLAG = """
    mov.u32 %r1, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    @%p1 bra CONSUME;
    st.global.b32 [%rd2], %r0;
    {before}
    setp.ne.u32 %p2, %r0, 0;
    @%p2 bra END;
    {release}
    bra END;
    CONSUME: {acquire}
    setp.eq.u32 %p3, %r3, 0;
    @%p3 bra CONSUME;
    {after}
    ld.global.b32 %r4, [%rd2];
    END:
"""
RIGHT = {
    "plain": {
        "before": "bar.sync 0;",
        "release": "st.release.{s}.global.b32 [%rd1], 1;",
        "acquire": "ld.acquire.{s}.global.b32 %r3, [%rd1];",
        "after": "",
    },
    "fences": {
        "before": "bar.sync 0;",
        "release": "fence.acq_rel.{s};\nst.relaxed.{s}.global.b32 [%rd1], 1;",
        "acquire": "ld.relaxed.{s}.global.b32 %r3, [%rd1];",
        "after": "fence.acq_rel.{s};",
    },
    "atomics": {
        "before": "bar.sync 0;",
        "release": "red.release.{s}.global.add.u32 [%rd1], 1;",
        "acquire": "atom.acquire.{s}.global.or.b32 %r3, [%rd1], 0;",
        "after": "",
    },
    "membar": {
        "before": "bar.sync 0;",
        "release": "membar.{m};\nst.volatile.global.b32 [%rd1], 1;",
        "acquire": "ld.volatile.global.b32 %r3, [%rd1];",
        "after": "membar.{m};",
    },
}
BROKEN = {
    "the barrier": {**RIGHT["plain"], "before": ""},
    "the release": {**RIGHT["plain"], "release": "st.relaxed.{s}.global.b32 [%rd1], 1;"},
    "the acquire": {**RIGHT["plain"], "acquire": "ld.relaxed.{s}.global.b32 %r3, [%rd1];"},
    "a strong store": {**RIGHT["plain"], "release": "st.global.b32 [%rd1], 1;"},
    "a strong load": {**RIGHT["plain"], "acquire": "ld.global.b32 %r3, [%rd1];"},
    "the writer's fence": {**RIGHT["fences"], "release": "st.relaxed.{s}.global.b32 [%rd1], 1;"},
    "the reader's fence": {**RIGHT["fences"], "after": ""},
    "the release of an atomic": {**RIGHT["atomics"], "release": "red.relaxed.{s}.global.add.u32 [%rd1], 1;"},
    "the acquire of an atomic": {
        **RIGHT["atomics"],
        "acquire": "atom.relaxed.{s}.global.or.b32 %r3, [%rd1], 0;",
    },
    "the writer's scope": {**RIGHT["plain"], "release": "st.release.cta.global.b32 [%rd1], 1;"},
    "the reader's scope": {**RIGHT["plain"], "acquire": "ld.acquire.cluster.global.b32 %r3, [%rd1];"},
    "the fence's scope": {
        **RIGHT["fences"],
        "release": "fence.acq_rel.cta;\nst.relaxed.{s}.global.b32 [%rd1], 1;",
    },
}


def flag_body(parts, scope):
    fill = {"s": scope, "m": {"gpu": "gl", "sys": "sys"}[scope]}
    return FLAG.format(**{name: text.format(**fill) for name, text in parts.items()})


@pytest.mark.parametrize("options", SEEDS)
@pytest.mark.parametrize("form", RIGHT)
def test_a_flag_orders_two_ctas(form, options):
    device = Device(options)
    data, flag = words(device, *[0] * 64), words(device, 0)
    run(flag_body(RIGHT[form], "gpu"), device, data, flag, grid=2, threads=64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("missing", BROKEN)
def test_a_flag_without(missing, seed):
    device = Device(Options(seed=seed, limit=10**6))
    data, flag = words(device, *[0] * 64), words(device, 0)
    racy(flag_body(BROKEN[missing], "gpu"), device, data, flag, grid=2, threads=64)


TICKET = """
    mov.u32 %r1, %ctaid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd0;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra END;
    st.global.b32 [%rd2], %r1;
    atom.{order}.gpu.global.add.u32 %r2, [%rd1], 1;
    setp.ne.u32 %p2, %r2, 3;
    @%p2 bra END;
    ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd0];
    END:
"""


@pytest.mark.parametrize("options", SEEDS)
def test_the_last_to_take_a_ticket_may_read_what_all_wrote(options):
    device = Device(options)
    data, counter = words(device, 0, 0, 0, 0), words(device, 0)
    run(TICKET.format(order="acq_rel"), device, data, counter, grid=4)
    for half in ("relaxed", "acquire", "release"):
        counter.torch.zero_()
        racy(TICKET.format(order=half), device, data, counter, grid=4)


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses():
    device = Device()
    out = words(device, 0)
    run("red.global.add.u32 [%rd0], 1;", device, out, grid=3)
    assert out.torch.item() == 96
    racy(
        "red.cta.global.add.u32 [%rd0], 1;",
        device,
        out,
        grid=2,
        match="the scope of one of them does not reach",
    )
    racy(BY_CTA + "@%p1 red.global.add.u32 [%rd0], 1;\n@!%p1 ld.global.b32 %r2, [%rd0];", device, out, grid=2)
    racy(BY_CTA + "@%p1 red.global.add.u32 [%rd0], 1;\n@!%p1 st.global.b32 [%rd0], %r1;", device, out, grid=2)


BULK_HEAD = ".shared .align 128 .b8 slot[256];\n.shared .align 8 .b8 bar[8];"
BULK_STORE = """
    mov.u32 %r1, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    mov.u32 %r2, slot;
    mad.lo.u32 %r3, %r0, 4, %r2;
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    @%p1 bra CONSUME;
    st.shared.b32 [%r3], %r0;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p2, %r0, 0;
    @%p2 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{read} 0;
    st.release.gpu.global.b32 [%rd1], 1;
    cp.async.bulk.wait_group 0;
    bra END;
    CONSUME: ld.acquire.gpu.global.b32 %r4, [%rd1];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra CONSUME;
    ld.global.b32 %r5, [%rd2];
    END:
"""


@pytest.mark.parametrize("options", SEEDS)
def test_a_bulk_store_is_there_when_its_group_is_complete_not_merely_read(options):
    device = Device(options)
    arguments = words(device, *[0] * 32), words(device, 0)
    run(BULK_STORE.format(read=""), device, *arguments, grid=2, declarations=BULK_HEAD)
    arguments[1].torch.zero_()
    racy(
        BULK_STORE.format(read=".read"),
        device,
        *arguments,
        grid=2,
        declarations=BULK_HEAD,
        match="by a bulk copy of warp 0",
    )


BULK_LOAD = """
    mov.u32 %r2, slot;
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    mad.lo.u32 %r3, %r0, 4, %r2;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1;
    fence.proxy.async.shared::cta;
    st.global.b32 [%rd1], %r0;
    {fence}
    bar.warp.sync -1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 128;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 128, [bar];
    {early}
    W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra W;
    st.global.b32 [%rd1], %r0;
"""


@pytest.mark.parametrize("fence", ["fence.proxy.async;", "fence.proxy.async.global;"])
def test_a_bulk_load_of_plainly_written_memory_needs_the_proxy_fence(fence):
    device = Device()
    out = words(device, *[0] * 32)
    run(BULK_LOAD.format(fence=fence, early=""), device, out, declarations=BULK_HEAD)
    for missing in ("", "fence.proxy.async.shared::cta;"):
        body = BULK_LOAD.format(fence=missing, early="")
        racy(body, device, out, declarations=BULK_HEAD, match="fence.proxy.async is missing")
    overwritten = BULK_LOAD.format(fence=fence, early="st.global.b32 [%rd1], %r0;")
    racy(
        overwritten,
        device,
        out,
        declarations=BULK_HEAD,
        match="this write is not ordered after the read by an async",
    )


def test_bulk_reductions_of_two_ctas_add_up():
    device = Device()
    out = words(device, *[0] * 32)
    body = """
    mov.u32 %r2, slot;
    mad.lo.u32 %r3, %r0, 4, %r2;
    st.shared.b32 [%r3], %r0;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra END;
    {operation} [%rd0], [%r2], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    END:
    """
    add = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32"
    run(body.format(operation=add), device, out, grid=2, declarations=BULK_HEAD)
    assert out.torch.tolist() == [2 * i for i in range(32)]
    copy = "cp.async.bulk.global.shared::cta.bulk_group"
    racy(body.format(operation=copy), device, out, grid=2, declarations=BULK_HEAD)


def test_everyone_polling_what_nobody_writes_is_a_deadlock():
    device = Device()
    body = "L: ld.acquire.gpu.global.b32 %r1, [%rd0+4];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra L;"
    with pytest.raises(EmulationError, match=r"deadlock: all who run poll .*\n.* 4 bytes into buffer 0"):
        run(body, device, words(device, 0, 0), grid=2)


@pytest.mark.parametrize("seed", range(9))
def test_all_who_poll_let_the_last_cta_start(seed):
    device = Device(Options(seed=seed, limit=10**6))
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p1, %r1, 7;
    setp.eq.and.u32 %p2, %r0, 0, %p1;
    @%p2 st.release.gpu.global.b32 [%rd0], 1;
    L: ld.acquire.gpu.global.b32 %r2, [%rd0];
    add.u32 %r3, %r3, %r2;
    xor.b32 %r4, %r3, %r2;
    setp.eq.u32 %p3, %r2, 0;
    @%p3 bra L;
    """
    run("mov.u32 %r3, 0;\n" + body, device, words(device, 0), grid=8, threads=96)


@pytest.mark.parametrize("seed", range(9))
def test_two_who_poll_for_each_other_take_turns(seed):
    """A token goes to and fro between two CTAs forty times."""
    device = Device(Options(seed=seed, limit=10**6))
    body = """
    mov.u32 %r1, %ctaid.x;
    L: ld.acquire.gpu.global.b32 %r2, [%rd0];
    and.b32 %r3, %r2, 1;
    setp.ne.u32 %p1, %r3, %r1;
    @%p1 bra L;
    add.u32 %r2, %r2, 1;
    st.release.gpu.global.b32 [%rd0], %r2;
    setp.lt.u32 %p2, %r2, 39;
    @%p2 bra L;
    """
    token = words(device, 0)
    run(body, device, token, grid=2, threads=1)
    assert token.torch.item() == 40


def test_polling_takes_time():
    device = Device()
    out = words(device, 0, 0)
    body = """
    mov.u64 %rd1, %globaltimer;
    L: ld.acquire.sys.global.b32 %r1, [%rd0];
    mov.u64 %rd2, %globaltimer;
    sub.u64 %rd3, %rd2, %rd1;
    setp.lt.u64 %p1, %rd3, 1000000000;
    @%p1 bra L;
    setp.eq.u32 %p2, %r0, 0;
    @%p2 st.global.b32 [%rd0+4], 1;
    """
    run(body, device, out)
    assert out.torch.tolist() == [0, 1]


def test_parts_of_a_grid_in_threads_must_not_touch():
    device = Device(Options(threads=2))
    own = (
        BY_CTA
        + "mad.wide.u32 %rd1, %r1, 4, %rd0;\nst.global.b32 [%rd1], %r1;\nred.global.add.u32 [%rd0+16], 1;"
    )
    out = words(device, *[9] * 5)
    run(own, device, out, grid=4)
    assert out.torch.tolist() == [0, 1, 2, 3, 9 + 128]
    racy(BY_CTA + "st.global.b32 [%rd0], %r1;", device, out, grid=2, match="that nothing orders")
    racy(BY_CTA + "@%p1 st.global.b32 [%rd0], 1;\n@!%p1 ld.global.b32 %r2, [%rd0];", device, out, grid=2)
    racy("ld.acquire.gpu.global.b32 %r2, [%rd0];", device, out, grid=2, match="talk through global memory")


def start(device, text, *tensors):
    program = device.program(text, "k")
    params = struct.pack(f"<{len(tensors)}Q", *(t.pointer for t in tensors))
    return device.launch(program, (1, 1, 1), (64, 1, 1), params)


def rank_bodies(parts, scope):
    """The two sides of FLAG as launches of their own."""
    body = flag_body(parts, scope)
    return [module(body.replace("mov.u32 %r1, %ctaid.x;", f"mov.u32 %r1, {rank};"), 2) for rank in (0, 1)]


@pytest.mark.parametrize("options", SEEDS)
@pytest.mark.parametrize("form", RIGHT)
def test_a_flag_orders_two_devices(form, options):
    ranks = Device(options), Device(options)
    data, flag = words(ranks[1], *[0] * 64), words(ranks[1], 0)
    write, read = rank_bodies(RIGHT[form], "sys")
    with together(*ranks):
        start(ranks[1], read, data, flag)
        report = start(ranks[0], write, data, flag)
        assert report.counters["instructions"] == 0
    assert report.counters["instructions"] > 0
    assert ranks[0].reports == [report]
    assert len(ranks[1].reports) == 1


@pytest.mark.parametrize("missing", [*BROKEN, "system scope"])
def test_a_flag_between_devices_without(missing):
    ranks = Device(), Device()
    data, flag = words(ranks[1], *[0] * 64), words(ranks[1], 0)
    parts, scope = (RIGHT["plain"], "gpu") if missing == "system scope" else (BROKEN[missing], "sys")
    write, read = rank_bodies(parts, scope)
    with pytest.raises(EmulationError, match=RACE), together(*ranks):
        start(ranks[0], write, data, flag)
        start(ranks[1], read, data, flag)


@pytest.mark.parametrize(
    ("form", "count"), [("plain", 5), ("fences", 7), ("atomics", 5), ("membar", 5)], ids=lambda x: str(x)
)
def test_every_mutation_of_a_flag_between_devices_is_noticed(form, count):
    write, read = rank_bodies(RIGHT[form], "sys")

    def both(first, second, options):
        ranks = Device(options), Device(options)
        data, flag = words(ranks[1], *[0] * 64), words(ranks[1], 0)
        with together(*ranks):
            reports = start(ranks[0], first, data, flag), start(ranks[1], second, data, flag)
        return reports

    options = [Options(seed=seed, limit=10**6) for seed in range(2)]
    reports = both(write, read, options[0])
    verdicts = survey(mutants(write, reports[:1]), lambda m, o: bool(both(m, read, o)), options)
    verdicts += survey(mutants(read, reports[1:]), lambda m, o: bool(both(write, m, o)), options)
    assert len(verdicts) == count
    assert [v.mutant for v in verdicts if not v.noticed] == []


def test_a_device_runs_its_launches_in_order_and_tells_what_it_heard():
    ranks = Device(), Device()
    data, flag = words(ranks[1], *[0] * 64), words(ranks[1], 0)
    read_data = module("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.b32 %r4, [%rd2];", 2)
    write, read = rank_bodies(RIGHT["plain"], "sys")
    with together(*ranks):
        start(ranks[0], write, data, flag)
        start(ranks[1], read, data, flag)
        start(ranks[1], read_data, data, flag)  # later on the device that has acquired
    flag.torch.zero_()
    with pytest.raises(EmulationError, match="on another device"), together(*ranks):
        start(ranks[0], write, data, flag)
        start(ranks[1], read_data, data, flag)


def test_devices_that_run_together_need_the_same_options():
    ranks = Device(), Device(Options(seed=1))
    text = module("", 0)
    with pytest.raises(EmulationError, match="same options"), together(*ranks):
        start(ranks[0], text)
