"""The recipe tables against their sources, and the three products of a linear layer under each."""

import itertools

import pytest
import torch
from formats_common import FORMATS, randn

from nmoe import recipes
from nmoe.formats import dequantize, quantize


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


def test_eligible_gemms():
    quantized = {kind for kind, eligible in recipes.ELIGIBLE.items() if eligible}
    assert quantized == {"attention_projection", "dense_ffn", "shared_expert", "routed_expert"}
    assert set(recipes.ELIGIBLE) - quantized == {"attention_bmm", "embedding", "head", "router"}
