"""AdamW against float64.

With u = 2^-24: moments are a few roundings of sums of positive multiples, √ and ÷ are within 2^-22 relative; the
quotient's error is that of its parts, and the master adds its own roundings. Moments in BF16 and the copy add 2^-8.
"""

from __future__ import annotations

import torch

from nmoe.codegen.optimizer import AdamWConfig, AdamWProblem
from nmoe.codegen.problem import PARAMETERS, resolve
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.codegen.verify.gemm import STORE, TINY, U
from nmoe.codegen.verify.rows import DTYPES

APPROXIMATE = 2.0**-21  # of √ and ÷ together


def case(
    problem: AdamWProblem, config: AdamWConfig, seed: int, count: int = 0, device: str = "cpu"
) -> Tensors:
    gen = torch.Generator(device).manual_seed(seed)
    count = count or config.block + 100 + seed
    made: Tensors = {}
    for operand in problem.operands(config):
        shape = tuple(resolve(n, {PARAMETERS: count}) for n in operand.shape)
        made[operand.name] = torch.randn(shape, generator=gen, device=device).to(DTYPES[operand.format])
    made["v"] = made["v"].square()
    made["grad"] *= torch.exp2(torch.randint(-8, 4, (count,), generator=gen, device=device).float())
    if problem.rounded:
        made["rounded"].fill_(float("nan"))
    made["rates"].copy_(torch.tensor([0.7, 1 - 1e-4, 3e-4, 0.31, 0.9, 0.95, 1e-8, float("nan")]))
    return made


def check(problem: AdamWProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound."""
    scale, keep, step, root, beta1, beta2, epsilon, _ = before["rates"].double()
    g, m, v, w = (before[n].double() for n in ("grad", "m", "v", "master"))
    g = g * scale
    first, second = m + (g - m) * (1 - beta1), v * beta2 + g * g * (1 - beta2)
    first_bound = 6 * U * (m.abs() + g.abs())
    second_bound = 8 * U * second
    below = second.sqrt() / root + epsilon
    ratio = first / below
    master = w * keep - step * ratio
    moved = step * (first_bound / below + ratio.abs() * (8 * U + APPROXIMATE))
    master_bound = moved + 3 * U * (w.abs() + (step * ratio).abs())
    store = STORE if problem.narrow else 0.0
    wanted = {
        "m": (first, first_bound + store * first.abs()),
        "v": (second, second_bound + store * second),
        "master": (master, master_bound),
    }
    if problem.rounded:
        wanted["rounded"] = master, master_bound + STORE * master.abs()
    worst = {}
    for name, (want, bound) in wanted.items():
        error = (after[name].double() - want).abs()
        if lost := int(error.isnan().sum()):
            raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
        worst[name] = float((error / (bound + TINY)).max())
        if worst[name] > 1:
            raise Mismatch(f"{name}: {worst[name]:.3g} of the bound")
    return worst
