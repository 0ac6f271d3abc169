"""tcgen05.fence: the canonical patterns of the PTX ISA (9.7.16.6.4), right and with each part missing."""

import numpy as np
import pytest
import torch
from snippets import Device, Options, run
from test_tensor import ALLOCATE, FREE, LOAD, SMEM, instruction, k_major, raw, registers, small_integers

from nmoe.codegen.emulator import EmulationError

BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
SYNC = "bar.sync 0;"
RELAXED = """
    mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [turn];
    R: mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 %p5, [turn], 0;
    @!%p5 bra R;
"""
DECLARATIONS = SMEM + "\n.shared .align 8 .b8 turn[8];"
MISSING = (
    r"tcgen05.fence::before_thread_sync \(or a commit\) is missing before the signal, or ::after_thread_sync"
)

# D = 7 by tcgen05.st, synchronise, D += A B by one thread, commit, every thread reads its row of D.
BODY = (
    ALLOCATE.format(group=1)
    + "@%p1 mbarrier.init.shared.b64 [turn], 128;\nbar.sync 0;\n"
    + LOAD.replace(AFTER, "@loaded")
    + "\n".join(f"mov.b32 %r{20 + i}, 0f40E00000;" for i in range(16))
    + f"""
    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r4], {registers(20, 16)};
    tcgen05.wait::st.sync.aligned;
    @before
    @sync
    @!%p1 bra ISSUED;
    @after
    and.b32 %r5, %r2, 0x3FFFF;
    shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %rd20, %r5;
    add.u64 %rd21, %rd20, @a;
    add.u64 %rd22, %rd20, @b;
    setp.eq.u32 %p4, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd21, %rd22, {instruction(128, 16, 0, 0)}, %p4;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];
    ISSUED: mbarrier.try_wait.parity@relaxed.shared::cta.b64 %p2, [bar], 0;
    @!%p2 bra ISSUED;
    @done
    tcgen05.ld.sync.aligned.32x32b.x16.b32 {registers(20, 16)}, [%r4];
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd10, %r0, 64, %rd0;
    """
    + "\n".join(f"st.global.b32 [%rd10+{4 * i}], %r{20 + i};" for i in range(16))
    + FREE.format(group=1)
)


def accumulate(options=None, **parts):
    a, b = small_integers(128, 16), small_integers(16, 16, seed=1)
    (ia, da), (ib, db) = k_major(raw(a, torch.float16)), k_major(raw(b, torch.float16))
    device = Device(options)
    out = device.empty((128, 16), torch.float32)
    source = device.tensor(torch.from_numpy(np.concatenate([ia, ib])))
    defaults = {"loaded": AFTER, "before": BEFORE, "sync": SYNC, "after": AFTER, "relaxed": "", "done": AFTER}
    body = BODY.replace("{size}", str(ia.size + ib.size)).replace("{source}", "%rd1").replace("{tag}", "0")
    for name, text in {**defaults, "a": str(da), "b": str((ia.size >> 4) + db), **parts}.items():
        body = body.replace(f"@{name}", text)
    run(body, device, out, source, threads=128, declarations=DECLARATIONS)
    np.testing.assert_array_equal(out.torch.numpy(), 7 + a @ b.T)


@pytest.mark.parametrize("sync", [SYNC, RELAXED])
@pytest.mark.parametrize("relaxed", ["", ".relaxed.cluster"])
@pytest.mark.parametrize("seed", range(4))
def test_fences_order_tensor_memory_across_warps(sync, relaxed, seed):
    accumulate(Options(seed=seed), sync=sync, relaxed=relaxed)


@pytest.mark.parametrize("sync", [SYNC, RELAXED])
@pytest.mark.parametrize("part", ["before", "after", "done"])
def test_each_fence_is_needed(sync, part):
    with pytest.raises(EmulationError, match=MISSING if sync == SYNC else "is not ordered after"):
        accumulate(sync=sync, **{part: ""})


def test_one_fence_is_not_the_other():
    with pytest.raises(EmulationError, match=MISSING):
        accumulate(before=AFTER)
    with pytest.raises(EmulationError, match=MISSING):
        accumulate(done=BEFORE)


def test_a_fence_on_the_wrong_side_of_the_barrier_orders_nothing():
    with pytest.raises(EmulationError, match=MISSING):
        accumulate(before="", sync=SYNC + BEFORE)
    with pytest.raises(EmulationError, match=MISSING):
        accumulate(sync=AFTER + SYNC, after="")


def test_barriers_may_be_made_to_suffice():
    options = Options(implicit_order=True)
    accumulate(options, before="", after="", done="")
    accumulate(options, sync=RELAXED, relaxed=".relaxed.cluster")
    with pytest.raises(EmulationError, match=r"is not ordered after the write by tcgen05.st"):
        accumulate(options, sync=RELAXED, before="", after="")


def test_operands_that_a_barrier_has_announced_need_the_fence_too():
    accumulate(loaded="")  # the one after the stores' barrier covers it
    with pytest.raises(EmulationError, match=r"race on shared memory .*" + MISSING):
        accumulate(loaded="", after="")
