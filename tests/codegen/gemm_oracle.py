"""Random grouped-GEMM problems, their float64 results and how far a kernel may be from them.

Bounds, with u = 2^-24. Products of BF16 are exact in FP32. A tensor core adds a step's products to the accumulator
with truncation at FP32's last place or below it, so a sum of `d` terms is within (d / 16 + 16) · 4u of Σ|a·b|.
Storing rounds by 2^-8 relative (BF16). sigmoid from ex2.approx and rcp.approx is within 2^-20 relative plus the
error of its argument, |x|·log2(e)·u·2 in the exponent.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from nmoe.codegen.gemm import GemmProblem

U = 2.0**-24
STORE = 2.0**-8
SIGMOID = 2.0**-18
TINY = 2.0**-120
ALIGN = 128


def offsets_of(counts: list[int]) -> torch.Tensor:
    """First row of each expert's segment, padded to 128 rows; the last is the total."""
    padded = torch.tensor([0, *(-(-c // ALIGN) * ALIGN for c in counts)])
    return padded.cumsum(0).to(torch.int32)


def inputs(problem: GemmProblem, counts: list[int], seed: int, spare: int = 0, device: str = "cpu"):
    """Tensors by GemmProblem's names, results poisoned. `spare` rows past the last segment hold NaN."""
    gen = torch.Generator(device).manual_seed(seed)
    n, k, e = problem.n, problem.k, problem.groups
    if problem.dense:  # all rows are one segment, which need not fill a tile
        offsets, spare = torch.tensor([0, counts[0]], dtype=torch.int32), 0
    else:
        offsets = offsets_of(counts)
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
    made: dict[str, torch.Tensor] = {"offsets": offsets.to(device)}
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


def _products(problem: GemmProblem, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
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


def check(
    problem: GemmProblem, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Asserts every result of a kernel; returns the largest error of each as a share of its bound."""
    exact, size = _products(problem, before)
    total = int(before["offsets"][-1])
    depth = {"fprop": problem.k, "dgrad": problem.n}.get(problem.role) or int(before["offsets"].diff().max())
    product = (depth / 16 + 16) * 4 * U * size
    worst: dict[str, float] = {}

    def compare(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
        error = (got.double() - want).abs()
        assert not error.isnan().any(), f"{name}: {int(error.isnan().sum())} elements were not written"
        share = error / (bound + TINY)
        worst[name] = float(share.max()) if share.numel() else 0.0
        where = torch.unravel_index(share.argmax(), share.shape) if share.numel() else ()
        assert worst[name] <= 1, f"{name}: {worst[name]:.3g} of the bound at {[int(i) for i in where]}"

    def untouched(name: str) -> None:
        assert after[name][total:].isnan().all(), f"{name}: rows past the last expert were written"

    if problem.epilogue == "accumulate":
        want = before["dw"].double() + exact
        compare("dw", after["dw"], want, product + 2 * U * (want.abs() + exact.abs()))
        return worst
    if problem.epilogue == "store":
        compare("y", after["y"][:total], exact, product + STORE * (exact.abs() + product))
        untouched("y")
        return worst
    if problem.epilogue == "swiglu":
        compare("h", after["h"][:total], exact, product + STORE * (exact.abs() + product))
        gate, up = after["h"][:total].double().chunk(2, 1)
        want = before["s"][:total, None].double() * gate * gate.sigmoid() * up
        compare("act", after["act"][:total], want, (STORE + SIGMOID * (1 + gate.abs())) * want.abs())
        untouched("h"), untouched("act")
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
    compare("dh", after["dh"][:total], want, bound + STORE * (want.abs() + bound))
    untouched("dh")
    if problem.dense:
        return worst
    terms = (exact * silu * up).abs()
    bound = (product * (silu * up).abs() + terms * slack).sum(1) + (problem.k + 8) * U * terms.sum(1)
    compare("ds", after["ds"][:total], (exact * silu * up).sum(1), bound)
    untouched("ds")
    return worst
