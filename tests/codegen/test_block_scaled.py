"""Block-scaled GEMMs: what their machine code holds, and the bits of the copies that their epilogues store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nmoe import formats
from nmoe.codegen import compiler, report, verify
from nmoe.codegen.gemm import GemmConfig, GemmProblem
from nmoe.codegen.verify import gemm as oracle

CONFIGS = Path(__file__).parents[2] / "configs"

# Bytes of a stage, a thread block of a pair, 256 columns: A[128], half of B, atoms of scales for A and for all of B.
MXFP8 = 128 * 128 + 128 * 128 + 512 * 3
NVFP4 = 128 * 128 + 128 * 128 + 4 * 512 * 3
WGRAD4 = 128 * 64 + 128 * 64 + 2 * 512 * 3
# problem, thread blocks of a cluster, products and copies of scales a slice, bytes that a stage waits for
CASES = [
    (GemmProblem("fprop", 64, 2048, 1408, "store", "mxfp8", "blocked"), 2, "UTCQMMA.2CTA", 4, 3, 2 * MXFP8),
    (GemmProblem("wgrad", 64, 2048, 1408, "accumulate", "mxfp8", "blocked"), 2, "UTCQMMA.2CTA", 4, 3, 2 * MXFP8),
    (GemmProblem("fprop", 0, 2816, 2048, "store", "nvfp4", "blocked", 2), 2, "UTCOMMA.2CTA.4X", 4, 12, 2 * NVFP4),
    (GemmProblem("wgrad", 64, 2048, 1408, "accumulate", "nvfp4", "blocked"), 2, "UTCOMMA.2CTA.4X", 2, 6, 2 * WGRAD4),
    (GemmProblem("dgrad", 64, 2816, 2048, "store", "mxfp8", "blocked"), 1, "UTCQMMA", 4, 3, MXFP8 + 128 * 128),
    (GemmProblem("dgrad", 64, 2048, 1408, "dswiglu", "mxfp8", "blocked", 0, ("col", "row")), 2, "UTCQMMA.2CTA", 4, 3,
     2 * MXFP8),
]  # fmt: skip


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("problem", "cluster", "mma", "products", "copies", "size"), CASES)
def test_machine_code_holds_a_slices_products_and_scales_and_no_spills(
    problem: GemmProblem, cluster: int, mma: str, products: int, copies: int, size: int
) -> None:
    config = next(c for c in problem.configs("sm_100a") if (c.tile_n, c.cluster) == (256, cluster))
    function = compiler.trace(problem, config, "sm_100a")
    stated = report.stated(function.__ptx__)
    assert size in stated["expected_bytes"] and stated["tensor_columns"] == 512
    if report.tool("nvdisasm") is None:
        pytest.skip("no disassembler")
    (found,) = report.resources([[function.__cubin__]], "sm_100a")
    assert found["sass"]["mma"] == {mma: products}
    assert sum(n for op, n in found["sass"]["tensor memory"].items() if op.startswith("UTCCP")) == copies
    assert found["sass"]["local"] == {} and all(k["stack"] == 0 for k in found["kernels"].values())


def act(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """templates/activation.py, operation by operation; the emulator rounds ex2 and rcp correctly."""
    gate, up = h.float().chunk(2, 1)
    power = torch.exp2((gate * -1.4426950408889634).double()).float()
    sigmoid = (1.0 + power).double().reciprocal().float()
    return (gate * sigmoid * up * weight[:, None]).bfloat16()


@pytest.mark.usefixtures("emulator")
def test_copies_in_the_epilogue_have_the_bits_of_the_formats() -> None:
    """Given h as the kernel stores it: act is rounded to BF16 and then quantized, as the schedule's ops say."""
    problem = GemmProblem("fprop", 2, 512, 128, "swiglu", "mxfp8", "blocked", 0, ("row", "col"))
    config = GemmConfig(256, 3, 2, 2)
    tensors = oracle.case(problem, config, 1, [300, 129])
    total = int(tensors["offsets"][-1])
    tensors["s"][0:3] = torch.tensor([torch.nan, torch.inf, 0.0])  # a NaN, an infinite and an empty row
    function = compiler.trace(problem, config, "sm_100a")
    after = verify.launch(function, problem, config, tensors, 2)
    x = act(after["h"][:total], tensors["s"][:total])
    assert x[0].isnan().all() and x[1].isinf().any() and (x[2] == 0).all()
    for copy, axis in (("row", 1), ("col", 0)):
        want = formats.quantize(x, "mxfp8", axis)  # type: ignore[arg-type]
        atoms = formats.to_blocked(want.scale).flatten(-3)
        got = after[f"{copy}_scale"][: total // 128] if axis else after["col_scale"][:, : total // 128]
        assert torch.equal(got, atoms), copy
        assert torch.equal(after[copy][:total], want.data), copy
