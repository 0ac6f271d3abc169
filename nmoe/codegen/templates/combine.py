"""Expert rows back to their tokens: y[t] = Σ_j rows[slots[t, j]] in FP32, in the order of the choices.

    warp ─▶ token: a 16-byte piece of each of its topk rows ─▶ FP32 sum ─▶ BF16 ─▶ + addends ─▶ y

Then the warp's next token, a grid of warps further.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, cute

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.routing import CombineProblem, RoutingConfig
from nmoe.codegen.templates import vectors
from nmoe.codegen.templates.fixed import Fixed


class Combine(Fixed):
    def __init__(self, problem: CombineProblem, config: RoutingConfig) -> None:
        self.problem, self.config = problem, config
        self.pieces = problem.hidden // VECTOR

    @cute.jit
    def __call__(self, *args):  # type: ignore[no-untyped-def]
        """Arguments: the operands in the order of CombineProblem.operands, the number of thread blocks, the stream."""
        *tensors, blocks, stream = args
        named = {o.name: t for o, t in zip(self.problem.operands(self.config), tensors, strict=True)}
        addends = [named[name] for name in self.problem.addend_names]
        self.combine(
            named["rows"], named.get("row_values"), named["slots"], addends, named["y"], named.get("values")
        ).launch(grid=[blocks, 1, 1], block=[32 * self.config.warps, 1, 1], stream=stream)

    @cute.kernel
    def combine(self, rows, row_values, slots, addends, y, values):  # type: ignore[no-untyped-def]
        topk = self.problem.topk
        lane = cute.arch.lane_idx()
        warp = cute.arch.block_idx()[0] * self.config.warps + cute.arch.make_warp_uniform(
            cute.arch.warp_idx()
        )
        warps = cute.arch.grid_dim()[0] * self.config.warps
        for token in cutlass.range(warp, y.shape[0], warps, unroll=1):
            places = [slots[token, j] for j in range(topk)]
            lost = places[0] < 0
            for j in cutlass.range_constexpr(1, topk):
                lost |= places[j] < 0
            start = Float32(float("nan")) if lost else Float32(0.0)
            sources = [vectors.pieces(vectors.row_of(rows, cutlass.max(p, 0))) for p in places]
            more = [vectors.pieces(vectors.row_of(addend, token)) for addend in addends]
            target = vectors.pieces(vectors.row_of(y, token))
            for i in cutlass.range_constexpr(-(-self.pieces // 32)):
                at = 32 * i + lane
                if cutlass.const_expr(32 * (i + 1) <= self.pieces):
                    self._sum(sources, more, target, at, start)
                else:
                    if at < self.pieces:
                        self._sum(sources, more, target, at, start)
            if cutlass.const_expr(values is not None):
                if lane < topk:
                    values[token, lane] = row_values[cutlass.max(slots[token, lane], 0)]

    @cute.jit
    def _sum(self, sources, addends, target, at, start) -> None:  # type: ignore[no-untyped-def]
        found = []
        for source in sources + addends:
            piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
            cute.autovec_copy(source[None, at], piece)
            found.append(piece)
        total = cute.make_rmem_tensor((VECTOR,), Float32)
        total.fill(start)
        for piece in found[: len(sources)]:
            total.store(total.load() + piece.load().to(Float32))
        for piece in found[len(sources) :]:
            total.store(total.load().to(BFloat16).to(Float32) + piece.load().to(Float32))
        piece = cute.make_rmem_tensor((VECTOR,), BFloat16)
        piece.store(total.load().to(BFloat16))
        cute.autovec_copy(piece, target[None, at])
