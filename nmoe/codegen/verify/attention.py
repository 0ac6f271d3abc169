"""Attention against float64.

With u = 2^-24 and exact products of BF16: a score is a sum of nope + rope products, scaled, within (nope + rope + 4) ·
2u of the sum of magnitudes (tensor cores may truncate), which is `slack` at most over a query's keys; a probability is
then within a factor exp(slack + 2^-18), and rounded to BF16 where it is multiplied (2^-8). Sums over keys or queries
add (their number) · 2u of the magnitudes, stores 2^-8. Gradients take o and lse as they are given.
"""

from __future__ import annotations

import torch

from nmoe.codegen.attention import AttentionConfig, AttentionProblem
from nmoe.codegen.problem import TOKENS, resolve
from nmoe.codegen.verify.base import Mismatch, Tensors
from nmoe.codegen.verify.gemm import STORE, TINY, U
from nmoe.codegen.verify.rows import DTYPES

ROUND = 2.0**-8  # to BF16
EXP = 2.0**-18  # of exp2, and of its argument's rounding where the maximum is subtracted
DOCUMENT = 0.02  # chance that a token begins a document


def case(
    problem: AttentionProblem,
    config: AttentionConfig,
    seed: int,
    seq_len: int = 0,
    sequences: int = 2,
    device: str = "cpu",
) -> Tensors:
    """Random operands, documents that end anywhere, a window for every second seed; results poisoned. Of backward, o
    and lse are those of the operands."""
    gen = torch.Generator(device).manual_seed(seed)
    seq_len = seq_len or config.queries.m + 37 + seed
    made: Tensors = {}
    for operand in problem.operands(config):
        if not operand.shape:
            continue
        shape = tuple(resolve(n, {TOKENS: seq_len * sequences}) for n in operand.shape)
        if operand.name in ("do", "q", "kv", "k_rope"):
            made[operand.name] = torch.randn(shape, generator=gen, device=device).bfloat16()
        else:
            made[operand.name] = torch.full(shape, -1 if operand.format == "i32" else float("nan"),
                                            dtype=DTYPES[operand.format], device=device)  # fmt: skip
    begins = torch.rand(sequences, seq_len, generator=gen, device=device) < DOCUMENT
    begins[:, 0] = True
    index = torch.arange(seq_len, device=device)
    made["positions"] = (index - torch.where(begins, index, 0).cummax(1).values).flatten().int()
    made |= {
        "seq_len": seq_len,
        "window": 48 if seed % 2 else 0,
        "scale": (problem.nope + problem.rope) ** -0.5,
    }
    if problem.kind == "backward":
        for sequence in range(sequences):
            x = _Sequence(problem, made, sequence)
            x.put(made["o"], x.p @ x.v)
            made["lse"][:, x.rows] = x.lse.float()
    return made


class _Sequence:
    """One sequence's operands by head, [heads, rows, columns] in float64: scores, probabilities and their slack."""

    def __init__(self, problem: AttentionProblem, t: Tensors, sequence: int) -> None:
        self.seq_len, self.heads = t["seq_len"], problem.heads
        self.rows = slice(sequence * self.seq_len, (sequence + 1) * self.seq_len)
        q, kv = self.split(t["q"]), self.split(t["kv"])
        k_rope = t["k_rope"][self.rows].double().expand(self.heads, -1, -1)
        self.q, self.k, self.v = q, torch.cat([kv[..., : problem.nope], k_rope], -1), kv[..., problem.nope :]
        index = torch.arange(self.seq_len, device=q.device)
        low = index - t["positions"][self.rows]
        if t["window"]:
            low = torch.maximum(low, index - t["window"] + 1)
        self.hidden = (index > index[:, None]) | (index < low[:, None])
        scores = (t["scale"] * self.q @ self.k.mT).masked_fill(self.hidden, -float("inf"))
        sizes = (t["scale"] * self.q.abs() @ self.k.abs().mT).masked_fill(self.hidden, 0)
        self.slack = (q.shape[-1] + 4) * 2 * U * sizes.amax(-1, keepdim=True) + EXP
        self.lse = scores.logsumexp(-1)
        self.scores, self.p = scores, (scores - self.lse[..., None]).exp()

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.rows].double().unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def put(self, into: torch.Tensor, value: torch.Tensor) -> None:
        into[self.rows] = value.transpose(0, 1).flatten(1).to(into.dtype)


def check(problem: AttentionProblem, before: Tensors, after: Tensors) -> dict[str, float]:
    """The largest error of each result as a share of its bound."""
    worst: dict[str, float] = {}

    def compare(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
        error = (got - want).abs()
        if lost := int(error.isnan().sum()):
            raise Mismatch(f"{name}: {lost} elements are NaN or were not written")
        share = float((error / (bound + STORE * want.abs() + TINY)).max())
        worst[name] = max(worst.get(name, 0.0), share)
        if share > 1:
            raise Mismatch(f"{name}: {share:.3g} of the bound")

    for sequence in range(len(before["positions"]) // before["seq_len"]):
        x = _Sequence(problem, before, sequence)
        sums = 2 * U * x.seq_len
        if problem.kind == "forward":
            factor = 2 * x.slack + ROUND + sums
            compare("o", x.split(after["o"]), x.p @ x.v, factor * (x.p @ x.v.abs()))
            compare(
                "lse", after["lse"][:, x.rows].double(), x.lse, x.slack[..., 0] + sums + EXP * x.lse.abs()
            )
            continue
        do, o = x.split(before["do"]), x.split(before["o"])
        p = (x.scores - before["lse"][:, x.rows, None].double()).exp()
        dp, delta = do @ x.v.mT, (do * o).sum(-1, keepdim=True)
        ds, short = p * (dp - delta), 2 * U * (problem.value + 2)
        vague = short * (do.abs() @ x.v.abs().mT + (do * o).abs().sum(-1, keepdim=True))
        wrong = p * vague + (2 * x.slack + ROUND) * p * (dp.abs() + delta.abs()) + ROUND * ds.abs()
        wrong += sums * ds.abs()
        scale, nope = before["scale"], problem.nope
        compare("dq", x.split(after["dq"]), scale * ds @ x.k, scale * wrong @ x.k.abs())
        dk, dk_bound = scale * ds.mT @ x.q, scale * wrong.mT @ x.q.abs()
        dv, dv_bound = p.mT @ do, ((2 * x.slack + ROUND + sums) * p).mT @ do.abs()
        compare("dkv", x.split(after["dkv"]), torch.cat([dk[..., :nope], dv], -1),
                torch.cat([dk_bound[..., :nope], dv_bound], -1))  # fmt: skip
        compare(
            "dk_rope", after["dk_rope"][x.rows].double(), dk[..., nope:].sum(0), dk_bound[..., nope:].sum(0)
        )
    return worst
