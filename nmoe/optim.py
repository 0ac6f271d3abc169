"""AdamW with decoupled weight decay (arXiv 1711.05101) over flat buffers, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmoe import autotune
from nmoe.binding import Bound, Launcher
from nmoe.checkpoint_parts import Part
from nmoe.codegen.optimizer import RATES, AdamWProblem
from nmoe.config import Optim
from nmoe.parameters import Parameters, Shard

CHUNK = 1 << 17  # elements that the CPU updates at a time


def lr_factor(optim: Optim, tokens: int, total: int) -> float:
    """Share of the peak learning rate for the step that ends at `tokens`: linear warm-up, constant, linear decay to
    `final_lr` over the last `decay_tokens` of `total` (WSD, arXiv 2404.06395)."""
    warm = min(1.0, tokens / optim.warmup_tokens) if optim.warmup_tokens else 1.0
    if not optim.decay_tokens:
        return warm
    left = max(0.0, (total - tokens) / optim.decay_tokens)
    return warm * (optim.final_lr + (1.0 - optim.final_lr) * min(1.0, left))


class AdamW:
    """Updates this rank's share of each segment: masters, moments and, in it, the weights that the GEMMs read. Moments
    are FP32 or BF16, the arithmetic and the masters FP32. The CPU updates a chunk after another, a GPU by a kernel to
    which it has to be bound (`bind`)."""

    def __init__(self, parameters: Parameters, optim: Optim) -> None:
        self.parameters, self.optim = parameters, optim
        narrow = optim.state_precision == "bf16"
        grad, shares = parameters.grad, [shard.segment.share for shard in parameters.shards]
        self.m = torch.zeros(sum(shares), dtype=torch.bfloat16 if narrow else grad.dtype, device=grad.device)
        self.v = torch.zeros_like(self.m)
        self.steps = 0
        self._moments = list(zip(self.m.split(shares), self.v.split(shares), strict=True))
        self._scratch = grad.new_empty(3, min(CHUNK, max(shares)))
        self._updates: list[Bound] = []  # by segment; empty: by torch
        self._rates = grad.new_zeros(len(shares), len(RATES))

    def bind(self, launcher: Launcher, target: str) -> None:
        narrow = self.m.dtype == torch.bfloat16
        for shard, moments, rates in zip(self.parameters.shards, self._moments, self._rates, strict=True):
            problem = AdamWProblem(narrow, shard.segment.narrow)
            config, _ = autotune.choose(problem, target, launcher.root)
            operands = [shard.master, shard.own_grad, *moments, rates]
            operands += [shard.own_weights] if shard.segment.narrow else []
            self._updates.append(launcher.bind(problem, config, target, operands))

    @torch.no_grad()
    def step(self, factor: float, grad_norm: float) -> None:
        """One update with `factor` of each group's peak learning rate, the gradients clipped to `clip_norm`."""
        o, p = self.optim, self.parameters
        self.steps += 1
        beta1, beta2 = o.betas
        correction1, correction2 = 1.0 - beta1**self.steps, math.sqrt(1.0 - beta2**self.steps)
        scale = min(1.0, o.clip_norm / (grad_norm + 1e-6)) if o.clip_norm else 1.0
        peak = {"dense": o.lr, "router": o.lr_router or o.lr, "expert": o.lr_expert or o.lr}
        rates = []
        for segment in (shard.segment for shard in p.shards):
            lr = factor * peak[segment.group]
            keep = 1.0 - lr * o.weight_decay if segment.decayed else 1.0
            rates.append((scale, keep, lr / correction1, correction2, beta1, beta2, o.eps, 0.0))
        if self._updates:
            self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype))
            for update in self._updates:
                update()
            return
        for shard, moments, rate in zip(p.shards, self._moments, rates, strict=True):
            self._update(shard, moments, rate)
        p.refresh()

    def _update(self, shard: Shard, moments: tuple[Tensor, Tensor], rates: tuple[float, ...]) -> None:
        """In chunks whose operands all stay in a core's cache."""
        scale, keep, step, root, beta1, beta2, eps, _ = rates
        for g, w, stored_m, stored_v in zip(
            *(x.split(CHUNK) for x in (shard.own_grad, shard.master, *moments)), strict=True
        ):
            wide_m, wide_v, below = self._scratch[:, : w.numel()]
            same = stored_m.dtype == w.dtype
            m = stored_m if same else wide_m.copy_(stored_m)
            v = stored_v if same else wide_v.copy_(stored_v)
            if scale != 1.0:
                g.mul_(scale)
            m.lerp_(g, 1.0 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            torch.sqrt(v, out=below).div_(root).add_(eps)
            if keep != 1.0:
                w.mul_(keep)
            w.addcdiv_(m, below, value=-step)
            if not same:
                stored_m.copy_(m)
                stored_v.copy_(v)

    def state(self) -> dict[str, Part]:
        """The moments by parameter and expert, for a checkpoint."""
        by_label = zip("mv", zip(*self._moments, strict=True), strict=True)
        return {f"{label}.{name}": part for label, flats in by_label
                for name, part in self.parameters.parts(flats).items()}  # fmt: skip
