"""A small mixture-of-experts layer with its gradients, on any number of ranks: what the tests run and compare."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nmoe.rdep import sums
from nmoe.rdep.exchange import Exchange, buffers
from nmoe.rdep.sizes import worst_case
from nmoe.rdep.transport import Buffer


@dataclass(frozen=True)
class Problem:
    """`tokens` over all ranks, in consecutive shares that may differ by one and be empty. `skew` > 0 gathers choices
    on few experts."""

    tokens: int = 24
    topk: int = 2
    experts: int = 8
    width: int = 16
    align: int = 4
    skew: int = 0
    seed: int = 0

    def indices(self, step: int) -> Tensor:
        chooser = random.Random(f"{self.seed} {step}")
        pool = range(max(self.topk, self.experts - self.skew))
        rows = [chooser.sample(pool, self.topk) for _ in range(self.tokens)]
        return torch.tensor(rows, dtype=torch.int32)

    def randn(self, name: str, *shape: int) -> Tensor:
        seed = random.Random(f"{self.seed} {name}").getrandbits(60)
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def buffers(self, ranks: int, capacity: int = 0) -> dict[str, Buffer]:
        own = -(-self.tokens // ranks)
        rows = capacity or worst_case(ranks, own, self.topk, self.experts, self.align)
        layer = buffers(ranks, self.experts, own, self.topk, self.width, rows, torch.float32)
        return layer | sums.buffers(ranks, slice=1)


def run(problem: Problem, exchange: Exchange, steps: int = 1) -> list[dict[str, Any]]:
    """This rank's part of each step: outputs and input gradients of its tokens, weight gradients of its experts."""
    return [_step(problem, exchange, step) for step in range(steps)]


def _step(p: Problem, exchange: Exchange, step: int) -> dict[str, Any]:
    rank, ranks = exchange.transport.rank, exchange.transport.ranks
    local = p.experts // ranks
    mine = slice(p.tokens * rank // ranks, p.tokens * (rank + 1) // ranks)
    w1, w2 = (
        p.randn(n, p.experts, p.width, p.width)[rank * local : (rank + 1) * local] for n in ("w1", "w2")
    )
    x, dy = (p.randn(f"{n} {step}", p.tokens, p.width)[mine] for n in ("x", "dy"))
    weights = p.randn(f"weights {step}", p.tokens, p.topk)[mine]

    plan, routing = exchange.plan(p.indices(step)[mine], p.experts, p.align)
    (rows,), scale = exchange.dispatch(routing, [x], weights)
    assert scale is not None
    segments = list(pairwise(plan.offsets[rank].tolist()))
    h, a, out = (torch.zeros_like(rows) for _ in range(3))
    for e, (start, end) in enumerate(segments):
        h[start:end] = rows[start:end] @ w1[e]
        a[start:end] = torch.tanh(h[start:end]) * scale[start:end, None]
        out[start:end] = a[start:end] @ w2[e]
    y, _ = exchange.combine(routing, out)

    (again,), _ = exchange.dispatch(routing, [x])  # as recomputation does
    (dout,), _ = exchange.dispatch(routing, [dy])
    dw1, dw2, drows = torch.zeros_like(w1), torch.zeros_like(w2), torch.zeros_like(rows)
    dscale = torch.zeros_like(scale)
    for e, (start, end) in enumerate(segments):
        da = dout[start:end] @ w2[e].T
        t = torch.tanh(h[start:end])
        dscale[start:end] = (da * t).sum(1)
        dh = da * scale[start:end, None] * (1 - t * t)
        dw1[e], dw2[e] = again[start:end].T @ dh, a[start:end].T @ dout[start:end]
        drows[start:end] = dh @ w1[e].T
    dx, dweights = exchange.combine(routing, drows, dscale)
    _check_sums(p, exchange, step)
    return {"y": y, "dx": dx, "dweights": dweights, "dw1": dw1, "dw2": dw2, "pads": rows[routing.source < 0]}


def _check_sums(p: Problem, exchange: Exchange, step: int) -> None:
    """Sums over all ranks, then, where that halves them, over every second one, then over all again; and each rank's
    slice of such sums, gathered in BF16."""
    t = exchange.transport
    terms = [p.randn(f"term {step} {rank}", 3 * sums.ROW) for rank in range(t.ranks)]
    every = sums.Sums(exchange.transfers, slice=1)
    add = every.add
    groups = 1 + (t.ranks % 2 == 0)
    everyone, others = range(t.ranks), range(t.rank % groups, t.ranks, groups)
    for members in (everyone, others, everyone):
        found = terms[t.rank].clone()
        add(found, members)
        if not torch.equal(found, sums.tree_sum([terms[rank] for rank in members])):
            raise AssertionError(f"rank {t.rank} has another sum over ranks {list(members)}")
    for members in (everyone, others):
        size, at = 2 * sums.ROW, members.index(t.rank)
        terms = [p.randn(f"slices {step} {rank}", size * len(members)) for rank in range(t.ranks)]
        whole = sums.tree_sum([terms[rank] for rank in members])
        found, own = terms[t.rank].clone(), slice(at * size, (at + 1) * size)
        every.reduce_scatter(found, members)
        rounded = torch.full_like(found, torch.nan, dtype=torch.bfloat16)
        rounded[own] = found[own]
        every.all_gather(rounded, members)
        if not (torch.equal(found[own], whole[own]) and torch.equal(rounded, whole.bfloat16())):
            raise AssertionError(f"rank {t.rank} has other slices of ranks {list(members)}")


def joined(results: list[list[dict[str, Any]]]) -> list[dict[str, Tensor]]:
    """The ranks' parts put together, step by step: what one rank would hold. Raises what a rank raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [{name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "pads"}
            for parts in zip(*results, strict=True)]  # fmt: skip


def equal(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x.keys() | y.keys()
    )
