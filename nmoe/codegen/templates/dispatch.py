"""Tokens' rows into the slots of their experts: each is read once and written topk times.

    warp ─▶ token: 16-byte pieces of x ─▶ registers ─▶ topk rows
    warp ─▶ 32 rows of row_source: those that are padding ─▶ zeros

Then the warp's next token, or rows, a grid of warps further.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, cute

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.routing import DispatchProblem, RoutingConfig
from nmoe.codegen.templates import vectors
from nmoe.codegen.templates.fixed import Fixed


class Dispatch(Fixed):
    def __init__(self, problem: DispatchProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.spans = vectors.spans(problem.hidden // VECTOR)

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of DispatchProblem.operands, the number of thread blocks, the stream."""
        *tensors, blocks, stream = args
        named = {o.name: t for o, t in zip(self.problem.operands(self.config), tensors, strict=True)}
        self.dispatch(
            named.get("x"), named.get("weights"), named["slots"], named["row_source"], named["offsets"],
            named.get("rows"), named.get("row_weight"),
        ).launch(grid=[blocks, 1, 1], block=[32 * self.config.warps, 1, 1], stream=stream)  # fmt: skip

    @cute.kernel
    def dispatch(self, x, weights, slots, row_source, offsets, rows, row_weight):  # type: ignore[no-untyped-def]
        lane = cute.arch.lane_idx()
        warp = cute.arch.block_idx()[0] * self.config.warps + cute.arch.make_warp_uniform(
            cute.arch.warp_idx()
        )
        warps = cute.arch.grid_dim()[0] * self.config.warps
        for token in cutlass.range(warp, slots.shape[0], warps, unroll=1):
            places = [slots[token, j] for j in range(self.problem.topk)]
            for part in cutlass.range_constexpr(len(self.spans)):
                values = vectors.load(vectors.row_of(x, token), self.spans[part], lane)
                for j in cutlass.range_constexpr(self.problem.topk):
                    if places[j] >= 0:
                        vectors.store(values, vectors.row_of(rows, places[j]), self.spans[part], lane)
            if cutlass.const_expr(weights is not None):
                if lane < self.problem.topk:
                    if slots[token, lane] >= 0:
                        row_weight[slots[token, lane]] = weights[token, lane]
        total = offsets[self.problem.experts]
        for first in cutlass.range(32 * warp, total, 32 * warps, unroll=1):
            self._clear(first, total, lane, row_source, rows, row_weight)

    @cute.jit
    def _clear(self, first, total, lane, row_source, rows, row_weight) -> None:  # type: ignore[no-untyped-def]
        """Zeros in the padding rows among the 32 from `first`."""
        padding = False
        if first + lane < total:
            padding = row_source[first + lane] < 0
        if cutlass.const_expr(row_weight is not None):
            if padding:
                row_weight[first + lane] = Float32(0.0)
        left = cute.arch.vote_ballot_sync(padding)
        zeros = []
        for _ in cutlass.range_constexpr(vectors.IN_FLIGHT):
            piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
            piece.fill(0.0)
            zeros.append(piece)
        while left != 0:
            row = first + cute.arch.popc((left & -left) - 1)
            for part in cutlass.range_constexpr(len(self.spans)):
                vectors.store(zeros, vectors.row_of(rows, row), self.spans[part], lane)
            left &= left - 1
