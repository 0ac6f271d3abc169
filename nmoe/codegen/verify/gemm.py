"""GEMMs against float64.

Bounds, with u = 2^-24. Products of BF16 are exact in FP32. A tensor core adds a step's products to the accumulator
with truncation at FP32's last place or below it, so a sum of `d` terms is within (d / 16 + 16) · 4u of Σ|a·b|.
Storing rounds by 2^-8 relative (BF16). sigmoid from ex2.approx and rcp.approx is within 2^-20 relative plus the
error of its argument, |x|·log2(e)·u·2 in the exponent.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from nmoe.codegen.gemm import ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.verify.base import Mismatch, Tensors

U = 2.0**-24
STORE = 2.0**-8
SIGMOID = 2.0**-18
TINY = 2.0**-120
COUNTS = {1: [130, 0, 1], 2: [1, 257, 0]}  # rows of each expert, by the seed of the warp schedule


def case(problem: GemmProblem, config: GemmConfig, seed: int, counts: list[int] | None = None) -> Tensors:
    """Random operands; by default with ragged, empty and single-row experts, by the seed."""
    counts = counts or COUNTS[1 + seed % len(COUNTS)][: problem.groups]
    tensors = inputs(problem, counts, seed, spare=64)
    return tensors | {
        "partial": torch.full((-(-problem.k // config.tile_n), len(tensors["a"])), float("nan"))
    }


def inputs(problem: GemmProblem, counts: list[int], seed: int, spare: int = 0, device: str = "cpu"):
    """Tensors by GemmProblem's names, results poisoned. `spare` rows past the last segment hold NaN."""
    gen = torch.Generator(device).manual_seed(seed)
    n, k, e = problem.n, problem.k, problem.groups
    if problem.dense:  # all rows are one segment, which need not fill a tile
        offsets, spare = torch.tensor([0, counts[0]], dtype=torch.int32), 0
    else:
        padded = torch.tensor([0, *(-(-c // ROW_TILE) * ROW_TILE for c in counts)])
        offsets = padded.cumsum(0).to(torch.int32)
    total = int(offsets[-1])
    real = torch.zeros(total + spare, dtype=torch.bool)
    for first, count in zip(offsets.tolist(), counts, strict=False):
        real[first : first + count] = True
    real = real.to(device)

    def rows(width: int) -> torch.Tensor:
        t = torch.randn(total + spare, width, generator=gen, device=device).masked_fill_(~real[:, None], 0.0)
        t[total:] = float("nan")
        return t.bfloat16()

    def poison(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    r = total + spare
    matrix = (n, k) if problem.dense else (e, n, k)
    made: Tensors = {"offsets": offsets.to(device)}
    if problem.role != "wgrad":
        made["b"] = (torch.randn(*matrix, generator=gen, device=device) * 0.1).bfloat16()
        weight = torch.rand(r, generator=gen, device=device).masked_fill_(~real, 0.0)
        made["s"] = torch.ones_like(weight) if problem.dense else weight
    if problem.role == "fprop":
        made |= {"a": rows(k), "y": poison(r, n), "h": poison(r, n), "act": poison(r, n // 2)}
    elif problem.role == "dgrad":
        made |= {"a": rows(n), "h": rows(2 * k), "y": poison(r, k), "dh": poison(r, 2 * k)}
        made |= {"ds": poison(r, dtype=torch.float32)}
    else:
        made |= {"a": rows(n), "b": rows(k), "dw": torch.randn(*matrix, generator=gen, device=device)}
    return made


def _products(problem: GemmProblem, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The grouped product and the sum of its terms' magnitudes, float64, rows up to offsets[E]."""
    ends = t["offsets"].tolist()
    parts, sizes = [], []
    for e, (lo, hi) in enumerate(pairwise(ends)):
        a = t["a"][lo:hi].double()
        if problem.role == "wgrad":
            a, b = a.T, t["b"][lo:hi].double()
        else:
            b = (t["b"] if problem.dense else t["b"][e]).double()
            b = b.T if problem.role == "fprop" else b
        parts.append(a @ b)
        sizes.append(a.abs() @ b.abs())
    if problem.role == "wgrad":
        return (parts[0], sizes[0]) if problem.dense else (torch.stack(parts), torch.stack(sizes))
    return torch.cat(parts), torch.cat(sizes)


def check(problem: GemmProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound; raises Mismatch where that is above 1."""
    exact, size = _products(problem, before)
    total = int(before["offsets"][-1])
    depth = {"fprop": problem.k, "dgrad": problem.n}.get(problem.role) or int(before["offsets"].diff().max())
    product = (depth / 16 + 16) * 4 * U * size
    worst: dict[str, float] = {}

    def compare(name: str, want: torch.Tensor, bound: torch.Tensor) -> None:
        got, past = after[name][: len(want)], after[name][len(want) :]
        error = (got.double() - want).abs()
        if lost := int(error.isnan().sum()):
            raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
        share = error / (bound + TINY)
        worst[name] = float(share.max()) if share.numel() else 0.0
        where = torch.unravel_index(share.argmax(), share.shape) if share.numel() else ()
        if worst[name] > 1:
            raise Mismatch(
                f"{name}: {worst[name]:.3g} of the bound at {[int(i) for i in where]}: "
                f"{got[where].item():.6g}, expected {want[where].item():.6g} ± {bound[where].item():.2g}"
            )
        if not past.isnan().all():
            raise Mismatch(f"{name}: rows past the last expert were written")

    if problem.epilogue == "accumulate":
        want = before["dw"].double() + exact
        compare("dw", want, product + 2 * U * (want.abs() + exact.abs()))
        return worst
    if problem.epilogue in ("store", "swiglu"):
        compare("y" if problem.epilogue == "store" else "h", exact, product + STORE * (exact.abs() + product))
        if problem.epilogue == "store":
            return worst
        gate, up = after["h"][:total].double().chunk(2, 1)
        want = before["s"][:total, None].double() * gate * gate.sigmoid() * up
        compare("act", want, (STORE + SIGMOID * (1 + gate.abs())) * want.abs())
        return worst
    gate, up = before["h"][:total].double().chunk(2, 1)
    s, sigma = before["s"][:total, None].double(), gate.sigmoid()
    silu, slope = gate * sigma, sigma * (1 + gate * (1 - sigma))
    want = torch.cat([exact * s * up * slope, exact * s * silu], 1)
    slack = SIGMOID * (1 + gate.abs())
    # slope is a sum whose terms may cancel: its error is relative to the terms
    steep = sigma + silu.abs() * (2 - sigma)
    bound = torch.cat([
        s * up.abs() * (product * slope.abs() + exact.abs() * steep * slack),
        s * silu.abs() * (product + exact.abs() * slack),
    ], 1)  # fmt: skip
    compare("dh", want, bound + STORE * (want.abs() + bound))
    if problem.dense:
        return worst
    terms = (exact * silu * up).abs()
    bound = (product * (silu * up).abs() + terms * slack).sum(1) + (problem.k + 8) * U * terms.sum(1)
    compare("ds", (exact * silu * up).sum(1), bound)
    return worst
