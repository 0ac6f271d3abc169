"""Row kernels against float64, and bit for bit where nothing is approximated.

Sums, copies and norms (given the kernel's own rstd) round as the ops say and are compared bit for bit, and so is every
quantized copy of a result that the kernel stores too. Otherwise, with u = 2^-24: storing rounds by 2^-8 relative
(BF16); a sum over a row is a tree at most 64 additions deep, within 64u of the sum of magnitudes; rsqrt.approx is
within 2^-22; SwiGLU as in codegen/verify/gemm.py. A copy of such a result adds the format's own bound.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nmoe import formats
from nmoe.codegen.problem import POSITIONS, ROWS, TOKENS, resolve
from nmoe.codegen.rows import Copy, RowConfig, RowProblem
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.codegen.verify.gemm import SIGMOID, STORE, TINY, U
from nmoe.storage import BLOCK

EPS = 1e-5
TREE = 64 * U
RSTD = 2.0**-18
SEED, COUNTER = 0x1234_5678_9ABC, 41
DTYPES = {
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


def case(problem: RowProblem, config: RowConfig, seed: int, rows: int = 0, device: str = "cpu") -> Tensors:
    """Random operands with exponents that differ between blocks, results poisoned."""
    gen = torch.Generator(device).manual_seed(seed)
    rows = rows or _rows(problem, seed)
    extents = {TOKENS: rows, ROWS: rows, POSITIONS: 64}
    made: Tensors = {}
    results = {o.name for o in problem._outputs()} - {"dw"}
    for operand in problem.operands(config):
        shape = tuple(resolve(n, extents) for n in operand.shape)
        name, dtype = operand.name, DTYPES[operand.format]
        if not shape:
            made[name] = EPS if name == "eps" else SEED
        elif name in results:
            made[name] = _poison(shape, dtype, device)
        elif name in ("tokens", "positions"):
            made[name] = torch.randint(
                -3 if name == "tokens" else 0, 50, shape, generator=gen, device=device, dtype=dtype
            )
        elif name in ("slots", "row_source"):  # some rows are padding
            choices = torch.randint(0, rows * problem.topk, shape, generator=gen, device=device, dtype=dtype)
            made[name] = torch.where(choices % 5 == 0, -1, choices)
        elif name == "counter":
            made[name] = torch.tensor([COUNTER], device=device)
        elif name == "offsets":
            made[name] = _offsets(problem, rows).to(device)
        else:
            x = torch.randn(shape, generator=gen, device=device)
            if name == "x" or operand.format == "bf16":
                x *= torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=gen, device=device).float())
            made[name] = (x.abs() + 0.1 if name == "rstd" else x).to(torch.bfloat16 if name == "x" else dtype)
    if problem.source == "mxfp8":
        q = formats.quantize(made["x"], "mxfp8", 1)
        made["x"], made["x_scale"] = q.data, q.scale
    if problem.segments and problem.body != "dispatch":
        made["x"][int(made["offsets"][-1]) :] = 0x7F if problem.source == "mxfp8" else float("nan")
    return made


def _rows(problem: RowProblem, seed: int) -> int:
    if problem.rows > 0:
        return problem.rows
    if problem.segments:
        return 128 * problem.segments + 64
    return 160 + 32 * (seed % 2) if problem.columns else 77 + seed


def _offsets(problem: RowProblem, rows: int) -> torch.Tensor:
    """The first segment is empty, the second has what the others, of 128 rows, leave."""
    units = rows // 128
    ends = [0, *(max(0, units - (problem.segments - 1 - i)) for i in range(1, problem.segments))]
    return torch.tensor([0, *(128 * e for e in ends)], dtype=torch.int32)


def _poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, 0xA5 if dtype == torch.uint8 else float("nan"), dtype=dtype, device=device)


def check(problem: RowProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound; of what is compared bit for bit 0."""
    worst: dict[str, float] = {}
    live = int(before["offsets"][-1]) if problem.segments else None

    def compare(name: str, want: torch.Tensor, bound: torch.Tensor) -> None:
        got = after[name]
        if live is not None:
            got = got[..., :live, :] if got.ndim > 1 else got[:live]
        error = (got.double() - want).abs()
        if lost := int(error.isnan().sum()):
            raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
        share = torch.where(error == 0, 0.0, error / (bound + TINY))
        worst[name] = float(share.max())
        if worst[name] > 1:
            where = torch.unravel_index(share.argmax(), share.shape)
            raise Mismatch(
                f"{name}: {worst[name]:.3g} of the bound at {[int(i) for i in where]}: "
                f"{got[where].item():.6g}, expected {want[where].item():.6g} ± {bound[where].item():.2g}"
            )

    if problem.body == "split":
        for name, want in zip(
            ("a", "b"), (before["x"][:, : problem.at], before["x"][:, problem.at :]), strict=True
        ):
            compare(name, want.double(), torch.zeros(want.shape))
        return worst
    if problem.body == "rms_norm":
        exact = (before["x"].double().square().mean(-1) + EPS).rsqrt()
        compare("rstd", exact, RSTD * exact)
    value, bound = _body(problem, before, after, live)
    if problem.body == "rms_norm_bwd":
        terms = before["dy"].double() * before["x"].double() * before["rstd"].double()[:, None]
        want, depth = before["dw"].double() + terms.sum(0), len(terms) + 300
        compare("dw", want, depth * U * terms.abs().sum(0) + 2 * U * want.abs())
    if problem.body == "dispatch" and problem.weighted:
        source = before["row_source"][:live].long()
        weights = before["weights"].flatten()[source.clamp(min=0)].double().masked_fill(source < 0, 0.0)
        compare("row_weight", weights, torch.zeros_like(weights))
    if problem.keeps_body and problem.source == "mxfp8":
        worst["y"] = _moved(problem, before, after, live)
    elif problem.keeps_body:
        compare("y", value, bound)
        value, bound = after["y"][..., :live, :].double(), torch.zeros_like(bound)
    for i in range(problem.addends):
        total = value + before[f"addend{i}"].double()
        rounded = (value.float() + before[f"addend{i}"].float()).bfloat16().double()
        value = torch.where(bound > 0, total, rounded)
        bound = torch.where(bound > 0, bound + STORE * (total.abs() + bound), 0.0)
    if problem.keeps_sum:
        compare("sum", value, bound)
        value, bound = after["sum"].double(), torch.zeros_like(bound)
    for copy in problem.copies:
        worst[copy.name] = _copy(problem, copy, value, bound, before, after)
    return worst


def _body(
    problem: RowProblem, t: Tensors, after: Tensors, live: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The body's value in float64 and how far the kernel's, in BF16, may be from it; 0 where it is exact."""
    kind = problem.body
    if problem.source == "mxfp8":
        data, scale = t["x"], t["x_scale"]
        q = formats.from_buffers("mxfp8", tuple(data.shape), 1, {"data": data, "scale": scale})
        t = t | {"x": formats.dequantize(q, torch.bfloat16)}
    if kind == "concat":
        value = torch.cat([t["a"], t["b"]], 1).double()
    elif kind == "embedding":
        value = t["table"][t["tokens"].clamp(min=0).long()].double()
    elif kind == "dispatch":
        source = t["row_source"][:live].long()
        value = t["x"][source.clamp(min=0) // problem.topk].double()
        value = value.masked_fill((source < 0)[:, None], 0.0)
    elif kind == "rms_norm":
        value = (t["x"].float() * after["rstd"][:, None] * t["w"]).bfloat16().double()
    else:
        value = t["x"][..., :live, :].double()
    if kind == "swiglu":
        gate, up = value.chunk(2, -1)
        weight = t["s"][:live, None].double() if problem.weighted else 1.0
        value = weight * gate * gate.sigmoid() * up
        flushed = 2.0**-126 * (weight * gate * up).abs()  # where sigmoid is subnormal
        return value, (STORE + SIGMOID * (1 + gate.abs())) * value.abs() + flushed
    if kind == "rope":
        return _rope(problem, t)
    if kind == "rms_norm_bwd":
        dy, rstd, w = t["dy"].double(), t["rstd"].double()[:, None], t["w"].double()
        grad, xhat = dy * w, value * rstd
        mean, size = (grad * xhat).mean(-1, keepdim=True), (grad * xhat).abs().mean(-1, keepdim=True)
        want = rstd * (grad - xhat * mean)
        slack = rstd * (8 * U * (grad.abs() + (xhat * mean).abs()) + (TREE + 8 * U) * size * xhat.abs())
        return want, slack + STORE * (want.abs() + slack)
    return value, torch.zeros_like(value)


def _moved(problem: RowProblem, before: Tensors, after: Tensors, live: int | None) -> float:
    """Raises Mismatch unless dispatched MXFP8 rows are, byte for byte, their tokens', and zero where there is none."""
    source = before["row_source"][:live].long()
    for of_tokens, of_rows in (("x", "y"), ("x_scale", "y_scale")):
        want = before[of_tokens][source.clamp(min=0) // problem.topk].masked_fill((source < 0)[:, None], 0)
        if wrong := int((after[of_rows][:live] != want).sum()):
            raise Mismatch(
                f"{of_rows}: {wrong} of {want.numel()} bytes differ from the rows that were dispatched"
            )
    return 0.0


def _rope(problem: RowProblem, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    x = t["x"].double().unflatten(-1, (problem.heads, -1))
    cos, sin = (t[name][t["positions"].long()].double()[:, None] for name in ("cos", "sin"))
    sin = -sin if problem.inverse else sin
    want, size = x.clone(), torch.zeros_like(x)
    even, odd = x[..., -problem.rotary :: 2], x[..., 1 - problem.rotary :: 2]
    want[..., -problem.rotary :: 2], want[..., 1 - problem.rotary :: 2] = (
        even * cos - odd * sin,
        even * sin + odd * cos,
    )
    size[..., -problem.rotary :: 2] = (even * cos).abs() + (odd * sin).abs()
    size[..., 1 - problem.rotary :: 2] = (even * sin).abs() + (odd * cos).abs()
    bound = torch.where(size > 0, STORE * want.abs() + 4 * U * size, 0.0)
    return want.flatten(-2), bound.flatten(-2)


def _copy(
    problem: RowProblem, copy: Copy, value: torch.Tensor, bound: torch.Tensor, before: Tensors, after: Tensors
) -> float:
    """Raises Mismatch unless a copy is that of `value`, whose error is within `bound`."""
    operands = (before[o.name] for o in problem._inputs() if o.name == "x" or o.format == "bf16")
    rows = len(before["row_source"]) if problem.body == "dispatch" else next(operands).shape[-2]
    full = torch.zeros(*value.shape[:-2], rows, problem.width, dtype=torch.float64, device=value.device)
    full[..., : value.shape[-2], :] = value
    want = formats.quantize(
        full.bfloat16(), copy.format, copy.axis, rounding=copy.rounding, hadamard=copy.hadamard, square=copy.square,
        seed=SEED + COUNTER if copy.rounding == "stochastic" else None,
        segments=before["offsets"].long() if problem.segments else None,
    )  # fmt: skip
    scale = want.scale if copy.scales == "rows" else formats.to_blocked(want.scale).flatten(-3)
    got = after[copy.name], after[f"{copy.name}_scale"]
    if not bound.any():
        for name, a, b in zip(("data", "scale"), got, (want.data, scale), strict=True):
            nan = (
                (a & 0x7F == 0x7F) & (b & 0x7F == 0x7F)
                if copy.format == "mxfp8" and name == "data"
                else False
            )
            if wrong := int(((a != b) & ~torch.as_tensor(nan)).sum()):
                raise Mismatch(
                    f"{copy.name}: {wrong} of {a.numel()} bytes of {name} differ from formats.quantize"
                )
        return 0.0
    held = got[1]
    if copy.scales == "blocked":
        held = formats.from_blocked(held.unflatten(-1, (32, 4, 4)), *want.scale.shape[-2:])
    q = replace(want, data=got[0], scale=held)
    exact, slack = full.float(), torch.zeros_like(full)
    slack[..., : bound.shape[-2], :] = bound
    block, dim = BLOCK[copy.format], (-2, -1)[copy.axis]
    if copy.hadamard:  # every result is a sum of the block's 16 elements, divided by 4
        exact = formats.hadamard_transform(exact, copy.axis)
        slack = _spread(slack.unflatten(dim, (-1, block)).sum(dim, keepdim=True) / 4, dim, block)
    allowed, size = formats.error_bound(copy.format, copy.rounding), exact.abs().double() + slack
    peaks = _spread(size.unflatten(dim, (-1, block)).amax(dim, keepdim=True), dim, block)
    limit = (
        slack + torch.maximum(allowed.relative * size, allowed.block * peaks) + allowed.tensor * size.amax()
    )
    share = (formats.dequantize(q).double() - exact.double()).abs() / (limit + TINY)
    if not bool((share <= 1).all()):
        raise Mismatch(f"{copy.name}: {float(share.nan_to_num(float('inf')).max()):.3g} of the bound")
    return float(share.max())


def _spread(blocks: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """One number for each block of `dim`, [..., blocks, 1, ...], to all of its elements."""
    return blocks.repeat_interleave(block, dim).flatten(dim - 1, dim)
