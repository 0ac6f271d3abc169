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
