"""y[t] = Σ_k returned[t, k] in FP32, k from 0 up: the same bits for any number of ranks.

Every block waits for all peers' returns (rdep_link.py), then a thread sums 16 bytes' width of a token at a time.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.rdep import THREADS
from nmoe.codegen.templates.rdep_link import Kernel


class Combine(Kernel):
    @cute.kernel
    def kernel(self, named):  # type: ignore[no-untyped-def]
        problem, y, link = self.problem, named["y"], self.link(named)
        link.wait("returns.full", link.epoch("returns"))
        pieces = problem.width // VECTOR
        returned = link.at(link.rank, "returned", BFloat16, 16)
        first = Int32(cute.arch.block_idx()[0]) * THREADS + Int32(cute.arch.thread_idx()[0])
        for i in cutlass.range(first, y.shape[0] * pieces, Int32(cute.arch.grid_dim()[0]) * THREADS):
            token, piece = i // pieces, i % pieces
            total = cute.make_rmem_tensor(VECTOR, Float32)
            total.fill(0.0)
            rows = [cute.make_rmem_tensor(VECTOR, BFloat16) for _ in range(problem.topk)]
            for k in cutlass.range_constexpr(problem.topk):
                at = Int64(token * problem.topk + k) * problem.width + piece * VECTOR
                cute.autovec_copy(self._vector(returned + at), rows[k])
            for k in cutlass.range_constexpr(problem.topk):
                for j in cutlass.range_constexpr(VECTOR):
                    total[j] += rows[k][j].to(Float32)
            out = cute.make_rmem_tensor(VECTOR, BFloat16)
            out.store(total.load().to(BFloat16))
            cute.autovec_copy(out, self._vector(y.iterator + (Int64(token) * problem.width + piece * VECTOR)))

    @staticmethod
    def _vector(pointer: cute.Pointer) -> cute.Tensor:
        return cute.make_tensor(pointer.align(16), cute.make_layout(VECTOR))
