"""Unmodified CuTeDSL host code and kernels on the emulator.

Needs nvidia-cutlass-dsl; without it the whole file is skipped, and pytest's summary gives the reason.
"""

from pathlib import Path

import pytest
import torch

from nmoe.codegen.emulator import Device, EmulationError, HostFunction, bind

cutlass = pytest.importorskip(
    "cutlass", reason="nvidia-cutlass-dsl is not installed: CuTeDSL kernels are not emulated here"
)
cute = pytest.importorskip("cutlass.cute")
cpasync = pytest.importorskip("cutlass.cute.nvgpu").cpasync
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed: CuTeDSL host code cannot be called")


def options(arch: str, folder: Path) -> str:
    """The DSL writes the PTX that it keeps to the dump directory."""
    return f"--enable-tvm-ffi --keep-ptx --generate-line-info --gpu-arch={arch} --dump-dir={folder}"


@cute.kernel
def axpy_kernel(
    x: cute.Tensor, y: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32, overrun: cutlass.Constexpr
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    index = block * 128 + thread
    if index < cute.size(out) + overrun:
        out[index] = (factor * x[index].to(cutlass.Float32) + y[index].to(cutlass.Float32)).to(
            out.element_type
        )


@cute.jit
def axpy(
    x: cute.Tensor, y: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32, overrun: cutlass.Constexpr = 0
):
    blocks = cute.ceil_div(cute.size(out), 128)
    axpy_kernel(x, y, out, factor, overrun).launch(grid=[blocks, 1, 1], block=[128, 1, 1])


@cute.kernel
def move_kernel(
    load: cute.CopyAtom,
    source: cute.Tensor,
    store: cute.CopyAtom,
    target: cute.Tensor,
    layout: cute.Layout,
    kind: cutlass.Constexpr,
):
    """One 32 x 64 tile a CTA, through shared memory and back out, both ways by the TMA unit."""
    row, column, _ = cute.arch.block_idx()
    smem = cutlass.memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    tile = smem.allocate_tensor(kind, layout, 128)
    with cute.arch.elect_one():
        cute.arch.mbarrier_init(barrier, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    parts = []
    for atom, tensor in ((load, source), (store, target)):
        block = cute.local_tile(tensor, (32, 64), (row, column))
        one = cute.make_layout(1)
        parts.append(
            cpasync.tma_partition(atom, 0, one, cute.group_modes(tile, 0, 2), cute.group_modes(block, 0, 2))
        )
    (shared, outside), (staged, result) = parts
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, 32 * 64 * kind.width // 8)
    cute.copy(load, outside, shared, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    cute.copy(store, staged, result)
    cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0)


@cute.jit
def move(source: cute.Tensor, target: cute.Tensor):
    layout = cute.make_layout((32, 64), stride=(64, 1))
    load, from_tensor = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), source, layout, (32, 64)
    )
    store, to_tensor = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), target, layout, (32, 64)
    )
    grid = cute.ceil_div((*target.layout.shape, 1), (32, 64))
    move_kernel(load, from_tensor, store, to_tensor, layout, source.element_type).launch(
        grid=grid, block=[32, 1, 1]
    )


def vector(kind):
    return cute.runtime.make_fake_compact_tensor(kind, (cute.sym_int(),))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_an_elementwise_kernel_in_process_and_ahead_of_time(arch, tmp_path: Path):
    kinds = [vector(cutlass.BFloat16), vector(cutlass.Float8E4M3FN), vector(cutlass.Float16)]
    compiled = cute.compile(axpy, *kinds, cutlass.Float32(0), options=options(arch, tmp_path))
    compiled.export_to_c(str(tmp_path / f"axpy_{arch}.o"), "axpy")
    x, y = torch.randn(300).bfloat16(), torch.randn(300).to(torch.float8_e4m3fn)
    want = (2.0 * x.float() + y.float()).half()
    for function in (bind(compiled), HostFunction(tmp_path / f"axpy_{arch}.o", "axpy", compiled.__ptx__)):
        device = Device()
        out = device.empty((300,), torch.float16)
        function(device, device.tensor(x), device.tensor(y), out, 2.0)
        assert torch.equal(out.torch, want)
        assert device.reports[0].grid == (3, 1, 1)


def test_a_fault_names_the_python_line(tmp_path: Path):
    kinds = [vector(cutlass.Float32) for _ in range(3)]
    function = bind(cute.compile(axpy, *kinds, cutlass.Float32(0), 1, options=options("sm_100a", tmp_path)))
    device = Device()
    out = device.empty((4,), torch.float32)
    with pytest.raises(
        EmulationError, match=r"out of bounds: 16 bytes into buffer 1 of 16 bytes .*test_host.py:\d+\)"
    ):
        function(device, device.tensor(torch.zeros(4)), device.tensor(torch.zeros(4)), out, 1.0)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_tensor_maps_that_the_host_code_encodes(arch, tmp_path: Path):
    matrix = cute.runtime.make_fake_tensor(
        cutlass.Float16,
        (cute.sym_int(), cute.sym_int(divisibility=8)),
        (cute.sym_int64(divisibility=8), 1),
        assumed_align=16,
    )
    function = bind(cute.compile(move, matrix, matrix, options=options(arch, tmp_path)))
    device = Device()
    x, out = torch.randn(70, 200).half(), device.empty((70, 200), torch.float16)
    function(device, device.tensor(x), out)
    assert torch.equal(out.torch, x)
    assert device.reports[0].counters["tma_load_bytes"] == 3 * 4 * 32 * 64 * 2


def test_the_host_wrapper_still_checks_its_arguments(tmp_path: Path):
    kinds = [vector(cutlass.Float32) for _ in range(3)]
    function = bind(cute.compile(axpy, *kinds, cutlass.Float32(0), options=options("sm_100a", tmp_path)))
    device = Device()
    wrong = device.tensor(torch.zeros(4, dtype=torch.float16))
    with pytest.raises((TypeError, ValueError), match=r"Float16|float16|dtype"):
        function(device, wrong, wrong, wrong, 1.0)
