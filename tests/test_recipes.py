"""The recipe tables against their sources, and the three products of a linear layer under each."""

import itertools

import pytest
import torch
from formats_common import FORMATS, randn

from nmoe import recipes
from nmoe.formats import dequantize, quantize
from nmoe.schedule import lower


def test_recipes_contract_along_the_right_axis():
    """x, dy and W of y = x Wᵀ: fprop contracts K, dgrad N, wgrad the tokens."""
    axes = {"fprop": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}
    roles = {
        "fprop": ("activation", "weight"),
        "dgrad": ("gradient", "weight"),
        "wgrad": ("gradient", "activation"),
    }
    for precision, pass_ in itertools.product(FORMATS, axes):
        specs = [recipes.operand(precision, pass_, slot) for slot in "AB"]
        assert tuple(s.axis for s in specs) == axes[pass_]
        assert tuple(s.role for s in specs) == roles[pass_]
        assert all(s.format == precision for s in specs)
    for precision, pass_, slot in itertools.product(("fp32", "bf16"), axes, "AB"):
        assert recipes.operand(precision, pass_, slot) is None


def test_nvfp4_recipe():
    """arXiv 2509.25149: gradients round stochastically, wgrad is transformed, weights are square."""
    for (pass_, _), spec in recipes.NVFP4.items():
        assert (spec.rounding == "stochastic") == (spec.role == "gradient")
        assert spec.hadamard == (pass_ == "wgrad")
        assert spec.square == (spec.role == "weight")


@pytest.mark.parametrize(("precision", "limit"), [("mxfp8", 0.05), ("nvfp4", 0.25)])
def test_recipes_compute_the_three_products(precision, limit):
    x, w, dy = randn(20, 128, 64), randn(21, 96, 64), randn(22, 128, 96)
    tensors = {"activation": x, "weight": w, "gradient": dy}
    products = {
        "fprop": lambda a, b: a @ b.T,
        "dgrad": lambda a, b: a @ b,
        "wgrad": lambda a, b: a.T @ b,
    }
    for pass_, product in products.items():
        specs = [recipes.operand(precision, pass_, slot) for slot in "AB"]
        exact = product(*(tensors[s.role].double() for s in specs))
        operands = []
        for s in specs:
            seed = 1 if s.rounding == "stochastic" else None
            q = quantize(
                tensors[s.role],
                s.format,
                s.axis,
                rounding=s.rounding,
                seed=seed,
                hadamard=s.hadamard,
                square=s.square,
            )
            operands.append(dequantize(q, torch.float64))
        error = float((product(*operands) - exact).norm() / exact.norm())
        assert limit / 10 < error < limit


def test_rows_travel_in_mxfp8_where_every_gemm_takes_them_so(tiny):
    """Forward's rows are an operand of fprop and wgrad, the gradients' of dgrad and wgrad."""

    def formats(width=512, **schedule):
        model = {"hidden_size": width}
        schedule = {"precision": "mxfp8"} | schedule
        graph = lower(tiny(model=model, schedule=schedule)).graph
        dispatched = [op.outputs[0] for op in graph.ops if op.kind == "dispatch" and ".1.moe" in op.name]
        return [graph.tensors[name].format for name in dispatched]

    assert formats() == ["mxfp8", "mxfp8"]
    assert formats(recompute="full") == ["mxfp8"] * 3
    assert formats(fprop="bf16") == ["bf16", "mxfp8"]
    assert formats(dgrad="nvfp4") == ["mxfp8", "bf16"]
    assert formats(wgrad="bf16") == formats(precision="nvfp4") == formats(width=576) == ["bf16", "bf16"]


def test_what_travels_changes_column_copies_alone():
    """The row copy of rows in MXFP8 is the one that would have been made of BF16 rows; one down the columns stands for
    numbers within 1e-4 of their norm."""
    for seed in range(3):
        rows = (randn(seed, 256, 512) * torch.exp2(randn(seed + 9, 256, 1).round() * 4)).bfloat16()
        sent = quantize(rows, "mxfp8", 1)
        arrived = dequantize(sent, torch.bfloat16)
        assert torch.equal(dequantize(quantize(arrived, "mxfp8", 1)), dequantize(sent))
        once, twice = (dequantize(quantize(x, "mxfp8", 0), torch.float64) for x in (rows, arrived))
        assert float((once - twice).norm() / once.norm()) < 1e-4


def test_which_gemms_of_a_model_are_quantized(tiny):
    graph = lower(tiny(schedule={"precision": "nvfp4"})).graph
    low, high = set(), set()
    for op in graph.ops:
        if op.attrs.get("role") == "fprop":
            formats = {graph.tensors[name].format for name in op.inputs[:2]}
            (low if formats == {"nvfp4"} else high).add(op.name.split(".", 2)[-1])
    assert low == {
        "attn.q.gemm", "attn.kv_a.gemm", "attn.kv_b.gemm", "attn.o.gemm", "ffn.gate_up.gemm", "ffn.down.gemm",
        "moe.gemm1", "moe.gemm2", "moe.shared.gate_up.gemm", "moe.shared.down.gemm",
    }  # fmt: skip
    assert not high, "the head's product is in the loss op, the router's in its own"
    head = next(op for op in graph.ops if op.kind == "linear_cross_entropy_fwd_bwd")
    assert {graph.tensors[name].format for name in head.inputs[:2]} == {"bf16"}
