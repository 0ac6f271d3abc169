"""AdamW (arXiv 1711.05101), in Triton: every operand once, a program a block of elements.

    gradient · scale ─▶ moments ─▶ master · keep − step · m / (√v / root + ε) ─▶ master, and rounded to BF16

The arithmetic is FP32, as nmoe/optim.py's; moments may be stored in BF16. The rates of a step come from memory, in the
order of optimizer.RATES, so that a launch is bound once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update(master, grad, m, v, rates, rounded, parameters, ROUNDED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < parameters
    scale, keep, step, root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2), tl.load(rates + 3)
    beta1, beta2, epsilon = tl.load(rates + 4), tl.load(rates + 5), tl.load(rates + 6)
    g = tl.load(grad + at, mask=inside, other=0.0) * scale
    first = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    first += (g - first) * (1.0 - beta1)
    second = second * beta2 + g * g * (1.0 - beta2)
    w = tl.load(master + at, mask=inside, other=0.0) * keep
    w -= step * first / (tl.sqrt(second) / root + epsilon)
    tl.store(master + at, w, mask=inside)
    tl.store(m + at, first.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, second.to(v.dtype.element_ty), mask=inside)
    if ROUNDED:
        tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask=inside)
