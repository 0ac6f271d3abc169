"""`nmoe compile --verify`: kernels of the config's families on the PTX emulator, against float64.

A family is a kernel's role, epilogue, formats and config; sizes and experts are compiled in, so a small member of it is
compiled and run: random problems with ragged, empty and single-row experts, under warp schedules with race detection.

Bounds, with u = 2^-24. Products of BF16 are exact in FP32. A tensor core adds a step's products to the accumulator
with truncation at FP32's last place or below it, so a sum of `d` terms is within (d / 16 + 16) · 4u of Σ|a·b|.
Storing rounds by 2^-8 relative (BF16). sigmoid from ex2.approx and rcp.approx is within 2^-20 relative plus the
error of its argument, |x|·log2(e)·u·2 in the exponent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from nmoe import autotune
from nmoe.codegen import compiler, gemm
from nmoe.codegen.gemm import ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.spec import KernelSpec
from nmoe.errors import UserError

U = 2.0**-24
STORE = 2.0**-8
SIGMOID = 2.0**-18
TINY = 2.0**-120
SMALL = {"fprop": (400, 192), "dgrad": (200, 264), "wgrad": (192, 328)}  # n, k: neither fills its tiles
COUNTS = {1: [130, 0, 1], 2: [1, 257, 0]}  # rows of each expert, by the seed of the warp schedule

Tensors = dict[str, torch.Tensor]


class Mismatch(Exception):
    """A kernel's result is not what its operands make it."""


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


def run(function: Any, problem: GemmProblem, config: GemmConfig, counts: list[int], seed: int) -> float:
    """One emulated launch of a traced function; its largest share of a bound. Raises Mismatch, EmulationError and
    PtxError. `seed` names the warp schedule and the inputs."""
    from nmoe.codegen.emulator import Device, Options, bind

    tensors = inputs(problem, counts[: problem.groups], seed, spare=64)
    rows = tensors["a"].shape[0]
    tensors["partial"] = torch.full((-(-problem.k // config.tile_n), rows), float("nan"))
    before = {name: t.clone() for name, t in tensors.items()}
    device = Device(Options(seed=seed, races=True))
    held = {name: device.tensor(t) for name, t in tensors.items()}
    operands = [held[operand.name] for operand in problem.operands(config.tile_n)]
    bind(function)(
        device, *operands, seed, 0
    )  # as many clusters as the seed, so that tiles share them unevenly
    return max(check(problem, before, {name: t.torch for name, t in held.items()}).values())


def verify_family(problem: GemmProblem, config: GemmConfig, target: str) -> str:
    """What became of a problem under every schedule: `ok: …`, `differs: …` or `emulator error: …`."""
    function = compiler.trace(problem, config, target, "--keep-ptx --generate-line-info")
    worst = 0.0
    for seed, counts in COUNTS.items():
        try:
            worst = max(worst, run(function, problem, config, counts, seed))
        except Mismatch as error:
            return f"differs: {error} (schedule {seed})"
        except UserError as error:
            return f"emulator error: {error} (schedule {seed})"
    return f"ok: {worst:.3g} of the bound, {len(COUNTS)} schedules"


def verify(specs: Sequence[KernelSpec], report: Callable[[str], None]) -> int:
    """Tells `report` a line for each spec that has a template; returns how many are not ok. Specs of one family and
    config share a run."""
    compiler.check_toolchain()
    outcomes: dict[tuple[GemmProblem, GemmConfig, str], str] = {}
    failures = 0
    for spec in specs:
        problem = gemm.match(spec)
        if isinstance(problem, str) or compiler.unsupported(spec):
            continue
        n, k = SMALL[problem.role]
        small = replace(problem, experts=min(problem.experts, 3), n=n, k=k)
        family = (small, autotune.choose(problem, spec.target), spec.target)
        if family not in outcomes:
            outcomes[family] = verify_family(*family)
        failures += not outcomes[family].startswith("ok")
        report(f"{spec.key}  {' + '.join(map(str, spec.parts))}: {outcomes[family]}")
    return failures
