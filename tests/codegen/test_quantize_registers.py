"""MXFP8 on registers gives the bits that nmoe.formats gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nmoe import formats


def blocks() -> torch.Tensor:
    """Blocks of 32 with everything that their scale or their elements may trip over, and random ones."""
    gen = torch.Generator().manual_seed(0)
    rows = [torch.zeros(32)]
    for exponent in range(-149, 128):  # all powers of two, one ulp beside them, and E4M3's limit at each
        power = torch.tensor(2.0, dtype=torch.float64).pow(exponent).float()
        peaks = (
            power,
            power.nextafter(torch.tensor(0.0)),
            power.nextafter(torch.tensor(torch.inf)),
            1.75 * power,
        )
        rows += [torch.randn(32, generator=gen).clamp(-1, 1) * peak for peak in peaks]
        rows += [torch.cat([peak[None], torch.zeros(31)]) for peak in peaks]
    for special in (torch.inf, -torch.inf, torch.nan):
        rows.append(torch.randn(32, generator=gen).index_fill(0, torch.tensor([7]), special))
    rows.append(torch.full((32,), torch.finfo(torch.float32).max))
    found = torch.stack(rows)
    return torch.cat([found, torch.randn(-len(found) % 128, 32, generator=gen)])


def kernel() -> Any:
    from cutlass import Float8E4M3FN, Float32, Int32, Uint8, cute

    from nmoe.codegen.templates import quantize

    @cute.kernel
    def scale(x, data, codes):  # type: ignore[no-untyped-def]
        row = cute.arch.block_idx()[0] * 128 + cute.arch.thread_idx()[0]
        values = cute.make_rmem_tensor(32, Float32)
        cute.autovec_copy(x[row, None], values)
        code = quantize.block(values)
        rounded = cute.make_rmem_tensor(32, Float8E4M3FN)
        rounded.store(values.load().to(Float8E4M3FN))
        cute.autovec_copy(cute.recast_tensor(rounded, Uint8), data[row, None])
        codes[row] = Uint8(code)

    @cute.jit
    def host(x, data, codes, stream):  # type: ignore[no-untyped-def]
        scale(x, data, codes).launch(grid=[Int32(x.shape[0]) // 128, 1, 1], block=[128, 1, 1], stream=stream)

    return host


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_a_block_has_the_bits_of_the_formats(target: str) -> None:
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    from nmoe.codegen.emulator import Device, Options, bind

    x = blocks()
    fakes = [
        make_fake_compact_tensor(kind, shape, stride_order=order, assumed_align=16)
        for kind, shape, order in (
            (cutlass.Float32, x.shape, (1, 0)), (cutlass.Uint8, x.shape, (1, 0)), (cutlass.Uint8, x.shape[:1], (0,)))
    ]  # fmt: skip
    options = f"--enable-tvm-ffi --gpu-arch={target} --keep-ptx"
    function = cute.compile(kernel(), *fakes, make_fake_stream(), options=options)
    device = Device(Options(seed=1))
    data, codes = device.empty(tuple(x.shape), torch.uint8), device.empty((len(x),), torch.uint8)
    bind(function)(device, device.tensor(x), data, codes, 0)
    want = formats.quantize(x, "mxfp8", 1)
    assert torch.equal(codes.torch, want.scale[:, 0])
    assert torch.equal(data.torch, want.data)
