"""Tensor and bulk copies: boxes, out-of-bounds, swizzles, reductions, gather, multicast."""

import pytest
import torch
from snippets import Device, Options, run, tensor_map

from nmoe.codegen.emulator import EmulationError

DECLARATIONS = ".shared .align 1024 .b8 buf[8192];\n.shared .align 8 .b8 bar[8];"
BEGIN = """
    mov.u32 %r2, buf;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
    W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0;
    @!%p2 bra W;
"""
DUMP = """
    mov.u32 %r10, %r0;
    D: mad.lo.u32 %r11, %r10, 4, %r2;
    ld.shared.b32 %r12, [%r11];
    mad.wide.u32 %rd10, %r10, 4, %rd0;
    st.global.b32 [%rd10], %r12;
    add.u32 %r10, %r10, 32;
    setp.lt.u32 %p3, %r10, {words};
    @%p3 bra D;
"""


def load(device, source, box, coordinates, swizzle=0, mode="tile", options=None):
    """Load one box and return shared memory as it then is."""
    size = source.torch.dtype.itemsize
    for extent in box if mode == "tile" else (4, box[1]):
        size *= extent
    out = device.empty((size,), torch.uint8)
    descriptor = device.tensor(tensor_map(source, box, swizzle))
    rank = len(box)
    body = (
        BEGIN
        + f"""
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.{mode}.mbarrier::complete_tx::bytes
        [%r2], [%rd1, {{{coordinates}}}], [bar];
    """
        + WAIT
        + DUMP.format(words=size // 4)
    )
    run(body, device, out, descriptor, declarations=DECLARATIONS, options=options)
    return out.torch


@pytest.mark.parametrize("seed", range(4))
def test_a_box_is_dense_with_the_innermost_dimension_first(seed):
    device = Device()
    data = torch.randn(5, 12, 32)
    got = load(device, device.tensor(data), (2, 4, 8), "8, 3, 2", options=Options(seed=seed)).view(
        torch.float32
    )
    assert torch.equal(got.reshape(2, 4, 8), data[2:4, 3:7, 8:16])


def test_outside_is_zero_on_every_side():
    device = Device()
    data = torch.arange(1, 8 * 16 + 1, dtype=torch.int16).reshape(8, 16)
    got = load(device, device.tensor(data), (8, 16), "-4, 5").view(torch.int16).reshape(8, 16)
    want = torch.zeros(8, 16, dtype=torch.int16)
    want[:3, 4:] = data[5:, :12]
    assert torch.equal(got, want)
    below = load(device, device.tensor(data), (4, 16), "8, -2").view(torch.int16).reshape(4, 16)
    want = torch.zeros(4, 16, dtype=torch.int16)
    want[2:, :8] = data[:2, 8:]
    assert torch.equal(below, want)


@pytest.mark.parametrize(("swizzle", "width"), [(1, 32), (2, 64), (3, 128)])
def test_swizzle_permutes_16_byte_chunks_by_row(swizzle, width):
    """PTX 5.5.7: within 128 bytes x 8 rows, chunk c moves to c xor (row bits); narrow modes take fewer bits."""
    device = Device()
    data = torch.randint(0, 255, (32, width), dtype=torch.uint8)
    got = load(device, device.tensor(data), (32, width), "0, 0", swizzle).reshape(32, width // 16, 16)
    chunks = data.reshape(32, width // 16, 16)
    rows_per_line = 128 // width  # rows that share a 128-byte line use the same pattern
    for row in range(32):
        pattern = row // rows_per_line % (width // 16)
        for chunk in range(width // 16):
            assert torch.equal(got[row, chunk ^ pattern], chunks[row, chunk])


def test_gather_takes_four_rows():
    device = Device()
    data = torch.randn(20, 32)
    got = (
        load(device, device.tensor(data), (1, 16), "8, 3, 19, 0, 25", mode="tile::gather4")
        .view(torch.float32)
        .reshape(4, 16)
    )
    assert torch.equal(got[:3], data[[3, 19, 0], 8:24])
    assert not got[3].any()


STORE = (
    BEGIN
    + """
    mov.u32 %r10, %r0;
    F: mad.lo.u32 %r11, %r10, 4, %r2;
    mad.wide.u32 %rd10, %r10, 4, %rd0;
    ld.global.b32 %r12, [%rd10];
    st.shared.b32 [%r11], %r12;
    add.u32 %r10, %r10, 32;
    setp.lt.u32 %p3, %r10, {words};
    @%p3 bra F;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p1 bra END;
    {copy}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    END:
"""
)


def test_scatter_stores_four_rows():
    device = Device()
    values = torch.randn(4, 16)
    out = device.empty((20, 32), torch.float32)
    out.written[:] = 1
    descriptor = device.tensor(tensor_map(out, (1, 16)))
    copy = "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%rd1, {8, 3, 19, 0, 25}], [%r2];"
    run(
        STORE.format(words=64, copy=copy),
        device,
        device.tensor(values),
        descriptor,
        declarations=DECLARATIONS,
    )
    want = torch.zeros(20, 32)
    want[[3, 19, 0], 8:24] = values[:3]  # row 25 does not exist
    assert torch.equal(out.torch, want)


def test_store_clips_at_the_edge_and_marks_only_what_it_wrote():
    device = Device()
    tile = torch.arange(8 * 16, dtype=torch.float32).reshape(8, 16)
    target = device.empty((10, 20), torch.float32)
    copy = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd1, {8, 5}], [%r2];"
    run(
        STORE.format(words=128, copy=copy),
        device,
        device.tensor(tile),
        device.tensor(tensor_map(target, (8, 16))),
        declarations=DECLARATIONS,
    )
    written = torch.from_numpy(target.written).reshape(10, 20, 4).all(-1)
    assert written.sum() == 5 * 12
    assert torch.equal(target.torch[5:, 8:], tile[:5, :12])


@pytest.mark.parametrize("opcode", ["cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor"])
@pytest.mark.parametrize(
    ("dtype", "start", "message"),
    [
        (torch.float32, "-4, 0", "coordinate 0 is -4; expected none below 0"),
        (torch.float32, "0, -8", "coordinate 1 is -8; expected none below 0"),
        (torch.float32, "1, 0", "starts 32 bits into its row; expected a multiple of 128 bits"),
        (torch.bfloat16, "4, 0", "starts 64 bits into its row; expected a multiple of 128 bits"),
        (torch.bfloat16, "8, 0", None),
        (torch.float32, "32, 0", None),
        (torch.float32, "0, 20", None),
    ],
)
def test_stores_start_inside_and_on_16_bytes(opcode, dtype, start, message):
    """What an H100 runs, and what it stops as an illegal instruction."""
    device = Device()
    target = device.tensor(torch.zeros(20, 32, dtype=dtype))
    operation = ".add" if "reduce" in opcode else ""
    copy = f"{opcode}.2d.global.shared::cta{operation}.tile.bulk_group [%rd1, {{{start}}}], [%r2];"
    arguments = (
        STORE.format(words=8 * 16 * dtype.itemsize // 4, copy=copy),
        device,
        device.tensor(torch.ones(8, 16, dtype=dtype)),
        device.tensor(tensor_map(target, (8, 16))),
    )
    if message is None:
        run(*arguments, declarations=DECLARATIONS)
        column, row = (int(x) for x in start.split(","))
        assert target.torch.sum() == target.torch[row : row + 8, column : column + 16].numel()
        return
    with pytest.raises(EmulationError, match=f"tensor store: .*{message}"):
        run(*arguments, declarations=DECLARATIONS)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [("add", torch.float32), ("add", torch.bfloat16), ("max", torch.int32), ("min", torch.float16)],
)
def test_reductions_combine_with_what_is_there(operation, dtype):
    device = Device()
    generator = torch.Generator().manual_seed(0)
    tile, start = (torch.randint(-50, 50, (8, 16), generator=generator).to(dtype) for _ in range(2))
    target = device.tensor(start)
    copy = f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group [%rd1, {{0, 0}}], [%r2];"
    words = 128 * dtype.itemsize // 4
    run(
        STORE.format(words=words, copy=copy),
        device,
        device.tensor(tile),
        device.tensor(tensor_map(target, (8, 16))),
        declarations=DECLARATIONS,
    )
    want = {"add": start + tile, "max": torch.maximum(start, tile), "min": torch.minimum(start, tile)}[
        operation
    ]
    assert torch.equal(target.torch, want)


def test_bulk_reduction_in_bf16():
    device = Device()
    tile, target = (
        torch.full((64,), 1.5, dtype=torch.bfloat16),
        device.tensor(torch.arange(64).to(torch.bfloat16)),
    )
    copy = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%rd1], [%r2], 128;"
    run(STORE.format(words=32, copy=copy), device, device.tensor(tile), target, declarations=DECLARATIONS)
    assert torch.equal(target.torch, (torch.arange(64).float() + 1.5).to(torch.bfloat16))


@pytest.mark.parametrize("seed", range(3))
def test_multicast_writes_and_signals_every_cta_of_the_mask(seed):
    device = Device(Options(seed=seed))
    data = torch.randn(2, 32)
    source, out = device.tensor(data), device.empty((2, 2, 32), torch.float32)
    body = (
        BEGIN
        + """
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mov.u32 %r3, %cluster_ctarank;
    mad.lo.u32 %r4, %r3, 128, %r2;
    mov.u16 %h1, 3;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r4], [%rd1, {0, %r3}], [bar], %h1;
    """
        + WAIT
        + "mad.wide.u32 %rd0, %r3, 256, %rd0;"
        + DUMP.format(words=64)
        + """
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    )
    run(
        body,
        device,
        out,
        device.tensor(tensor_map(source, (1, 32))),
        grid=2,
        cluster=2,
        declarations=DECLARATIONS,
    )
    assert torch.equal(out.torch, data.expand(2, 2, 32))


def test_what_does_not_fit_is_an_error():
    device = Device()
    source = device.tensor(torch.zeros(8, 64))
    with pytest.raises(EmulationError, match="a box row of 256 bytes does not fit the 128-byte swizzle"):
        load(device, source, (8, 64), "0, 0", swizzle=3)
    with pytest.raises(EmulationError, match="tensor copy of rank 2 with a tensor map of rank 3"):
        body = (
            BEGIN + "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
            "[%r2], [%rd0, {0, 0}], [bar];"
        )
        run(
            body,
            device,
            device.tensor(tensor_map(device.tensor(torch.zeros(2, 2, 32)), (1, 1, 32))),
            declarations=DECLARATIONS,
        )
    with pytest.raises(EmulationError, match="must be multiples of 16"):
        run(
            BEGIN + "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 20, [bar];",
            device,
            source,
            threads=1,
            declarations=DECLARATIONS,
        )


def test_in_flight_data_cannot_be_read():
    """Under a lazy schedule the copy lands late: reading before the wait is reading nothing."""
    device = Device(Options(seed=2, races=False))
    source, out = device.tensor(torch.zeros(64)), device.empty((64,), torch.float32)
    body = (
        BEGIN
        + """
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 256, [bar];
    """
        + DUMP.format(words=64)
    )
    with pytest.raises(EmulationError, match="never-written shared memory"):
        run(body, device, out, source, declarations=DECLARATIONS)


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_clusters_are_run_by_those_who_took_them(seed):
    """Every tile of a grid of eight is written once, by its own CTA or by one that cancelled its launch."""
    device = Device(Options(seed=seed))
    out = device.tensor(torch.zeros(8, dtype=torch.int32))
    body = """
    mov.u32 %r2, buf;
    mbarrier.init.shared.b64 [bar], 1;
    fence.mbarrier_init.release.cluster;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r3, 0;
    NEXT: mad.wide.u32 %rd1, %r1, 4, %rd0;
    red.global.add.u32 [%rd1], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [bar], 16;
    clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r2], [bar];
    W: mbarrier.try_wait.parity.shared.b64 %p1, [bar], %r3;
    @!%p1 bra W;
    xor.b32 %r3, %r3, 1;
    ld.shared.v2.b64 {%rd2, %rd3}, [%r2];
    mov.b128 %q, {%rd2, %rd3};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q;
    @!%p2 bra END;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q;
    fence.proxy.async.shared::cta;
    bra NEXT;
    END:
    """
    report = run(body, device, out, threads=1, grid=8, declarations=DECLARATIONS + "\n.reg .b128 %q;")
    assert out.torch.tolist() == [1] * 8
    assert report.by_opcode()["clusterlaunchcontrol.try_cancel"] <= 9 + (seed != 0)


CLUSTER_BEGIN = (
    BEGIN
    + """
    mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r4, %r3, 1;
    mapa.shared::cluster.u32 %r5, %r2, %r4;
    mov.u32 %r6, bar;
    mapa.shared::cluster.u32 %r7, %r6, %r4;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 128;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""
)
CLUSTER_END = (
    WAIT
    + "mad.wide.u32 %rd0, %r3, 128, %rd0;"
    + DUMP.format(words=32)
    + """
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""
)


@pytest.mark.parametrize("seed", range(3))
def test_remote_stores_count_their_bytes(seed):
    device = Device(Options(seed=seed))
    out = device.empty((2, 32), torch.int32)
    body = (
        CLUSTER_BEGIN
        + """
    mad.lo.u32 %r8, %r3, 100, %r0;
    mad.lo.u32 %r9, %r0, 4, %r5;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r9], %r8, [%r7];
    """
    )
    run(body + CLUSTER_END, device, out, grid=2, cluster=2, declarations=DECLARATIONS)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out.torch, torch.stack([lanes + 100, lanes]))


@pytest.mark.parametrize("seed", range(3))
def test_bulk_copies_between_ctas(seed):
    device = Device(Options(seed=seed))
    out = device.empty((2, 32), torch.int32)
    body = (
        CLUSTER_BEGIN
        + """
    mad.lo.u32 %r8, %r3, 100, %r0;
    mad.lo.u32 %r9, %r0, 4, %r2;
    st.shared.b32 [%r9+4096], %r8;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    add.u32 %r9, %r2, 4096;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r5], [%r9], 128, [%r7];
    """
    )
    run(body + CLUSTER_END, device, out, grid=2, cluster=2, declarations=DECLARATIONS)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out.torch, torch.stack([lanes + 100, lanes]))


def test_a_tensor_map_edited_on_the_device_moves_the_box():
    """The map is copied to shared memory, given another address and width, and published from there."""
    device = Device()
    first, second = device.tensor(torch.zeros(8, 32)), device.tensor(torch.randn(4, 16))
    template, edited = device.tensor(tensor_map(first, (4, 16))), device.empty((128,), torch.uint8)
    out = device.empty((4, 16), torch.float32)
    body = (
        BEGIN
        + """
    mad.wide.u32 %rd10, %r0, 4, %rd1;
    ld.global.b32 %r3, [%rd10];
    mad.lo.u32 %r4, %r0, 4, %r2;
    st.shared.b32 [%r4+4096], %r3;
    bar.sync 0;
    add.u32 %r5, %r2, 4096;
    @%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r5], %rd3;
    @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r5], 0, 16;
    @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r5], 1, 4;
    @%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r5], 0, 64;
    bar.sync 0;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd2], [%r5], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd2, {0, 0}], [bar];
    """
        + WAIT
        + DUMP.format(words=64)
    )
    run(body, device, out, template, edited, second, declarations=DECLARATIONS)
    assert torch.equal(out.torch, second.torch)
