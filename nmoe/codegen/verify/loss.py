"""Cross-entropy against float64.

With u = 2^-24: x − maximum is exact within 2u relative, times log2 e again, so an exponential is within
2^-22 · (1 + |x − maximum|) relative, a sum of a row within (columns of a thread + 64) · 2u, and its logarithm as far
absolutely. A probability adds the rounding of x · log2 e and of the logarithm. The gradient is stored in BF16.
"""

from __future__ import annotations

import torch

from nmoe.codegen.loss import CrossEntropyProblem, LossConfig
from nmoe.codegen.problem import TOKENS, resolve
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.codegen.verify.gemm import STORE, TINY, U
from nmoe.codegen.verify.rows import DTYPES

EXP = 2.0**-22  # of ex2.approx and of its argument, relative to 1 + the argument
WEIGHT = 0.3
IGNORED = 0.2  # share of rows without a target


def case(
    problem: CrossEntropyProblem, config: LossConfig, seed: int, rows: int = 0, device: str = "cpu"
) -> Tensors:
    """Random logits of a spread that differs between rows; a loss that is there before; results poisoned."""
    gen = torch.Generator(device).manual_seed(seed)
    rows = rows or 1 + 2 * seed
    made: Tensors = {"weight": WEIGHT}
    for operand in problem.operands(config):
        if operand.shape:
            shape = tuple(resolve(n, {TOKENS: rows}) for n in operand.shape)
            made[operand.name] = torch.full(
                shape, -1 if operand.format == "i32" else float("nan"), dtype=DTYPES[operand.format], device=device
            )  # fmt: skip
    spread = torch.exp2(torch.randint(-2, 4, (rows, 1), generator=gen, device=device).float())
    shift = torch.randn(rows, 1, generator=gen, device=device) * 10
    made["logits"].normal_(generator=gen).mul_(spread).add_(shift)
    made["targets"].random_(0, problem.vocabulary, generator=gen)
    made["targets"][torch.rand(rows, generator=gen, device=device) < IGNORED] = -1
    made["scale"].fill_(1 / rows)
    made["loss"].fill_(2.5)
    return made


def check(problem: CrossEntropyProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound."""
    x, targets = before["logits"].double(), before["targets"].long()
    seen, rows = targets >= 0, torch.arange(len(targets), device=targets.device)
    scale, log_sum = before["scale"].double(), x.logsumexp(-1)
    chosen = x[rows, targets.clamp(min=0)]
    spread = (x - x.amax(-1, keepdim=True)).abs().amax(-1)
    slack = EXP * (1 + spread) + (problem.vocabulary / 32 + 64) * 2 * U
    slack = slack + 4 * U * (log_sum.abs() + chosen.abs())
    losses = torch.where(seen, log_sum - chosen, 0.0)
    want = before["loss"].double() + scale * losses.sum()
    bound = scale * (slack * seen).sum() + (len(rows) + 4) * U * (scale * losses.abs().sum() + want.abs())
    worst = {"loss": _share("loss", after["loss"].double(), want, bound)}
    p = (x - log_sum[:, None]).exp()
    vague = p * (slack + 4 * U * (x.abs().amax(-1) + 1))[:, None]
    onehot = torch.zeros_like(p)
    onehot[rows, targets.clamp(min=0)] = 1.0
    factor = (scale * before["weight"] * seen)[:, None]
    gradient = factor * (p - onehot)
    bound = factor * (vague + 4 * U * (p + onehot)) + STORE * gradient.abs()
    worst["dlogits"] = _share("dlogits", after["dlogits"].double(), gradient, bound)
    return worst


def _share(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    error = (got - want).abs()
    if lost := int(error.isnan().sum()):
        raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
    share = float(torch.where(error == 0, 0.0, error / (bound + TINY)).max())
    if share > 1:
        raise Mismatch(f"{name}: {share:.3g} of the bound")
    return share
