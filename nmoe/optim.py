"""AdamW with decoupled weight decay (arXiv 1711.05101) over flat buffers, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch

from nmoe import autotune
from nmoe.binding import Bound, Launcher
from nmoe.codegen.optimizer import RATES, AdamWProblem
from nmoe.config import Optim
from nmoe.parameters import Parameters, Segment

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
    """Moments in FP32 or BF16; the arithmetic and the masters are FP32. The CPU updates a chunk after another, a GPU by
    a kernel to which it has to be bound (`bind`)."""

    def __init__(self, parameters: Parameters, optim: Optim) -> None:
        self.parameters, self.optim = parameters, optim
        narrow = optim.state_precision == "bf16"
        dtype = torch.bfloat16 if narrow else parameters.master.dtype
        self.m = torch.zeros_like(parameters.master, dtype=dtype)
        self.v = torch.zeros_like(self.m)
        self.steps = 0
        self._scratch = parameters.master.new_empty(3, min(CHUNK, parameters.master.numel()))
        self._updates: list[Bound] = []  # by segment; empty: by torch
        self._rates = parameters.master.new_zeros(len(parameters.segments), len(RATES))

    def bind(self, launcher: Launcher, target: str) -> None:
        p, narrow = self.parameters, self.m.dtype == torch.bfloat16
        for segment, rates in zip(p.segments, self._rates, strict=True):
            problem = AdamWProblem(narrow, segment.narrow)
            config, _ = autotune.choose(problem, target, launcher.root)
            part = slice(segment.start, segment.end)
            operands = [p.master[part], p.grad[part], self.m[part], self.v[part], rates]
            operands += [p.narrow[part]] if segment.narrow else []
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
        for segment in p.segments:
            lr = factor * peak[segment.group]
            keep = 1.0 - lr * o.weight_decay if segment.decayed else 1.0
            rates.append((scale, keep, lr / correction1, correction2, beta1, beta2, o.eps, 0.0))
        if self._updates:
            self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype))
            for update in self._updates:
                update()
            return
        for segment, rate in zip(p.segments, rates, strict=True):
            self._update(segment, rate)
        p.refresh()

    def _update(self, segment: Segment, rates: tuple[float, ...]) -> None:
        """In chunks whose operands all stay in a core's cache."""
        p = self.parameters
        scale, keep, step, root, beta1, beta2, eps, _ = rates
        for start in range(segment.start, segment.end, CHUNK):
            part = slice(start, min(start + CHUNK, segment.end))
            g, w = p.grad[part], p.master[part]
            stored_m, stored_v = self.m[part], self.v[part]
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

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by parameter and expert, for a checkpoint."""
        return {f"{label}.{name}": view for label, flat in (("m", self.m), ("v", self.v))
                for name, view in self.parameters.pieces(flat).items()}  # fmt: skip
