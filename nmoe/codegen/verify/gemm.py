"""GEMMs against float64.

Bounds, with u = 2^-24. Products of BF16 are exact in FP32. A tensor core adds a step's products to the accumulator
with truncation at FP32's last place or below it, so a sum of `d` terms is within (d / 16 + 16) · 4u of Σ|a·b|.
Storing rounds by 2^-8 relative (BF16). sigmoid from ex2.approx and rcp.approx is within 2^-20 relative plus the
error of its argument, |x|·log2(e)·u·2 in the exponent. dSwiGLU may round the gradient of act before it uses it.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from nmoe import formats
from nmoe.codegen.gemm import ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.problem import ROWS, resolve
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.storage import BLOCK, Axis

U = 2.0**-24
STORE = 2.0**-8
SIGMOID = 2.0**-18
TINY = 2.0**-120
POISON = 0xA5  # of bytes that a kernel is to write
COUNTS = {1: [130, 0, 1], 2: [1, 257, 0]}  # rows of each expert, by the seed of the warp schedule


def case(
    problem: GemmProblem, config: GemmConfig, seed: int, counts: list[int] | None = None, spare: int = 64
) -> Tensors:
    """Random operands with `spare` rows; by default ragged, empty and single-row experts, by the seed."""
    counts = counts or COUNTS[1 + seed % len(COUNTS)][: problem.groups]
    tensors = inputs(problem, counts, seed, spare)
    return tensors | workspace(problem, config, len(tensors["s"]))


def workspace(problem: GemmProblem, config: GemmConfig, rows: int, device: str = "cpu") -> Tensors:
    """What a launch on so many rows needs beside inputs and results, poisoned."""
    made: Tensors = {}
    for operand in problem.operands(config):
        if operand.name == "partial" or operand.name.endswith("_wide"):
            shape = [resolve(extent, {ROWS: rows}) for extent in operand.shape]
            dtype = torch.float32 if operand.format == "f32" else torch.bfloat16
            made[operand.name] = torch.full(shape, float("nan"), dtype=dtype, device=device)
    return made


def inputs(problem: GemmProblem, counts: list[int], seed: int, spare: int = 0, device: str = "cpu"):
    """Tensors by GemmProblem's names, results poisoned. `spare` rows past the last segment hold NaN."""
    gen = torch.Generator(device).manual_seed(seed)
    n, k, e = problem.n, problem.k, problem.groups
    if problem.dense:  # all rows are one segment, which need not fill a tile
        block = 1 if problem.precision == "bf16" else 32
        offsets, spare = torch.tensor([0, -(-counts[0] // block) * block], dtype=torch.int32), 0
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
    weight = torch.rand(r, generator=gen, device=device).masked_fill_(~real, 0.0)
    made: Tensors = {"offsets": offsets.to(device), "s": torch.ones_like(weight) if problem.dense else weight}
    a = rows(n if problem.role != "fprop" else k)
    matrices = torch.randn(*matrix, generator=gen, device=device)
    b = rows(k) if problem.role == "wgrad" else (matrices * 0.1).bfloat16()
    if problem.gathered:
        a, b, plan = _by_tokens(problem, a, b, real, gen)
        made |= plan
    for name, tensor in (("a", a), ("b", b)):
        segments = None if problem.dense or tensor.ndim == 3 else made["offsets"]
        made |= _buffers(problem, name, tensor, segments)
    if problem.role == "wgrad":
        return made | {"dw": matrices}
    made |= {name: rows(problem.columns) for name in ("addend", "addend2")}
    if problem.role == "fprop":
        made |= {"y": poison(r, n), "h": poison(r, n), "act": poison(r, n // 2)}
    else:
        made |= {"h": rows(2 * k), "y": poison(r, k), "dh": poison(r, 2 * k)}
        made |= {"ds": poison(r, dtype=torch.float32)}
    width = n // 2 if problem.role == "fprop" else 2 * k
    for copy in problem.copies:
        lines, length = (r, width) if copy == "row" else (width, r)
        scale = (-(-lines // 128), -(-length // 128), 512)
        made |= {
            copy: torch.full((r, width), POISON, dtype=torch.uint8, device=device),
            f"{copy}_scale": torch.full(scale, POISON, dtype=torch.uint8, device=device),
        }
    return made


def _by_tokens(
    problem: GemmProblem, a: torch.Tensor, b: torch.Tensor, real: torch.Tensor, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Operands of which one has a row for each token, and the plan that its expert rows come from: any choices, each
    once. Tokens without a row are NaN."""
    rows, device = a if problem.gathered == "a" else b, real.device
    count, topk = int(real.sum()), problem.topk
    tokens = -(-count // topk) + 2
    chosen = torch.randperm(topk * tokens, generator=gen, device=device)[:count].int()
    source = torch.full((len(rows),), -1, dtype=torch.int32, device=device)
    source[real] = chosen
    x = torch.full((tokens, rows.shape[1]), float("nan"), dtype=rows.dtype, device=device)
    used = torch.unique(chosen // topk).long()
    x[used] = torch.randn(len(used), x.shape[1], generator=gen, device=device).to(x.dtype)
    slots = torch.full((tokens, topk), -1, dtype=torch.int32, device=device)
    slots.view(-1)[chosen.long()] = real.nonzero()[:, 0].int()
    plan = {"slots": slots, "row_source": source}
    return (x, b, plan) if problem.gathered == "a" else (a, x, plan)


def _axis(problem: GemmProblem, name: str) -> Axis:
    """Along which operand a or b is quantized: the one that is contracted."""
    return 1 if problem.role == "fprop" or (problem.role, name) == ("dgrad", "a") else 0


def _buffers(problem: GemmProblem, name: str, x: torch.Tensor, segments: torch.Tensor | None) -> Tensors:
    """An operand of the product as the kernel loads it. Rows past the last segment are NaN where the format has one."""
    if problem.precision == "bf16":
        return {name: x}
    axis = _axis(problem, name)
    q = formats.quantize(x, problem.precision, axis, segments=segments)
    if segments is not None:
        nan, end = {"mxfp8": 0xFF, "nvfp4": 0x7F}[problem.precision], int(segments[-1])
        (q.scale[end:] if axis else q.scale[:, end // BLOCK[problem.precision] :]).fill_(nan)
    scale = q.scale
    if problem.scales == "blocked":
        scale = formats.to_blocked(scale).flatten(-3)
    amax = {} if q.amax is None else {f"{name}_amax": q.amax.reshape(-1)}
    return {name: q.data, f"{name}_scale": scale, **amax}


def _logical(problem: GemmProblem, t: Tensors, name: str) -> torch.Tensor:
    """An operand of the product as the float64 numbers that it stands for, [..., M, K]."""
    if name == problem.gathered:
        source = t["row_source"].long()
        rows = t[name].double()[source.clamp(min=0) // problem.topk]
        return rows.masked_fill_(source[:, None] < 0, 0.0)
    if problem.precision == "bf16":
        return t[name].double()
    data, scale, amax = t[name], t[f"{name}_scale"], t.get(f"{name}_amax")
    axis = _axis(problem, name)
    *lead, lines, length = data.shape
    if problem.precision == "nvfp4":
        length *= 2
        shape = (*lead, lines, length) if axis else (*lead, length, lines)
    else:
        shape = tuple(data.shape)
        lines, length = (lines, length) if axis else (length, lines)
    if problem.scales == "blocked":
        atoms = scale.unflatten(-1, (32, 4, 4))
        scale = formats.from_blocked(atoms, lines, length // BLOCK[problem.precision])
    buffers = {"data": data, "scale": scale}
    if amax is not None:
        buffers["amax"] = data.new_ones(
            lead, dtype=torch.float32
        )  # the global scale is applied below, in float64
    q = formats.from_buffers(problem.precision, shape, axis, buffers)
    plain = formats.dequantize(q, without_global=True).double()
    if amax is None:
        return plain
    factor = amax.double() / 2688
    if lead or problem.dense:
        return plain * factor.view(*lead, 1, 1)
    ends = t["offsets"].tolist()
    for e, (lo, hi) in enumerate(pairwise(ends)):
        plain[lo:hi] *= factor[e]
    return plain


def _products(problem: GemmProblem, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The grouped product and the sum of its terms' magnitudes, float64, rows up to offsets[E]."""
    ends = t["offsets"].tolist()
    parts, sizes = [], []
    left, right = _logical(problem, t, "a"), _logical(problem, t, "b")
    for e, (lo, hi) in enumerate(pairwise(ends)):
        a = left[lo:hi]
        if problem.role == "wgrad":
            a, b = a.T, right[lo:hi]
        else:
            b = right if problem.dense else right[e]
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
    if problem.precision == "nvfp4":
        product = product + 6 * U * exact.abs()  # the global scales' product and its own
    worst: dict[str, float] = {}

    def compare(name: str, want: torch.Tensor, bound: torch.Tensor) -> None:
        got, past = after[name][: len(want)], after[name][len(want) :]
        worst[name] = _share(name, got.double(), want, bound)
        if not past.isnan().all():
            raise Mismatch(f"{name}: rows past the last expert were written")

    def result(name: str, want: torch.Tensor, bound: torch.Tensor) -> None:
        """What is stored in BF16, or only in MXFP8."""
        bound = bound + STORE * (want.abs() + bound)
        for copy in problem.copies:
            worst[copy] = _copy(copy, after, want, bound)
        if not problem.copies:
            compare(name, want, bound)

    if problem.epilogue == "accumulate":
        want = before["dw"].double() + exact
        compare("dw", want, product + 2 * U * (want.abs() + exact.abs()))
        return worst
    rounded = product + STORE * (exact.abs() + product)
    if problem.epilogue == "store":
        for name in problem.read:
            exact = exact + before[name][:total].double()
            rounded = rounded + STORE * (exact.abs() + rounded)
        compare("y", exact, rounded)
        return worst
    s = before["s"][:total, None].double()
    if problem.epilogue == "swiglu":
        h, off = exact, rounded
        if problem.keeps_h:
            compare("h", exact, rounded)
            h, off = after["h"][:total].double(), torch.zeros_like(exact)
        (gate, up), (dg, du) = h.chunk(2, 1), off.chunk(2, 1)
        want = s * gate * gate.sigmoid() * up
        # silu's slope is below 1.1
        moved = s * (1.1 * dg * (up.abs() + du) + (gate * gate.sigmoid()).abs() * du)
        result("act", want, SIGMOID * (1 + gate.abs() + dg) * (want.abs() + moved) + moved)
        return worst
    gate, up = before["h"][:total].double().chunk(2, 1)
    sigma = gate.sigmoid()
    silu, slope = gate * sigma, sigma * (1 + gate * (1 - sigma))
    want = torch.cat([exact * s * up * slope, exact * s * silu], 1)
    slack = SIGMOID * (1 + gate.abs())
    # slope is a sum whose terms may cancel: its error is relative to the terms
    steep = sigma + silu.abs() * (2 - sigma)
    bound = torch.cat([
        s * up.abs() * (rounded * slope.abs() + exact.abs() * steep * slack),
        s * silu.abs() * (rounded + exact.abs() * slack),
    ], 1)  # fmt: skip
    result("dh", want, bound)
    if problem.dense:
        return worst
    terms = (exact * silu * up).abs()
    bound = (rounded * (silu * up).abs() + terms * slack).sum(1) + (problem.k + 8) * U * terms.sum(1)
    compare("ds", (exact * silu * up).sum(1), bound)
    return worst


def _share(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest share of the bound; raises Mismatch above 1."""
    error = (got - want).abs()
    if lost := int(error.isnan().sum()):
        raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
    if not want.numel():
        return 0.0
    share = error / (bound + TINY)
    where = torch.unravel_index(share.argmax(), share.shape)
    if share[where] > 1:
        raise Mismatch(
            f"{name}: {share[where]:.3g} of the bound at {[int(i) for i in where]}: "
            f"{got[where].item():.6g}, expected {want[where].item():.6g} ± {bound[where].item():.2g}"
        )
    return float(share[where])


def _copy(name: str, after: Tensors, want: torch.Tensor, bound: torch.Tensor) -> float:
    """An MXFP8 copy of a value within `bound` of `want`: each block's scale is that of an amax which the bound permits,
    each element off by at most half a step more."""
    total, width = want.shape
    data, atoms = after[name], after[f"{name}_scale"].unflatten(-1, (32, 4, 4))
    axis: Axis = 1 if name == "row" else 0
    lines, length = (total, width) if axis else (width, total)
    scale = formats.from_blocked(atoms, lines, length // 32)
    q = formats.from_buffers("mxfp8", (total, width), axis, {"data": data[:total], "scale": scale})
    dim = -1 if axis else -2
    largest = want.abs().unflatten(dim, (-1, 32)), bound.unflatten(dim, (-1, 32))
    low, high = (
        formats.encode_e8m0(((largest[0] + sign * largest[1]).clamp(min=0).amax(dim) / 448).float())
        for sign in (-1, 1)
    )
    codes = scale if axis else scale.mT
    if wrong := int(((codes < low) | (codes > high)).sum()):
        raise Mismatch(f"{name}: {wrong} scales are not those of their blocks")
    factor = formats.decode_e8m0(codes).double().repeat_interleave(32, dim)
    step = torch.maximum((want.abs() + bound) / 16, factor / 1024)
    share = _share(name, formats.dequantize(q).double(), want, bound + step)
    tiles = -(-total // ROW_TILE)
    past = (atoms[tiles:] if axis else atoms[:, tiles:], data[total:])
    if not all((p == POISON).all() for p in past):
        raise Mismatch(f"{name}: rows past the last expert were written")
    return share
