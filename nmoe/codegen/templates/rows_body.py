"""What a row kernel computes for eight columns of a row: loads first, so that many are under way, then FP32.

Every result is rounded to BF16, as the op stores it, before anything further is computed from it.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Boolean, Float8E4M3FN, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from nmoe.codegen.problem import VECTOR
from nmoe.codegen.rows import RowProblem
from nmoe.codegen.templates import activation, quantize
from nmoe.codegen.templates.fixed import Fixed


def vector(tensor: cute.Tensor, row: Int32, column: Int32, size: int = VECTOR) -> cute.Tensor:
    """`size` neighbours of a row-major tensor [rows, width] or, with row 0, of a vector."""
    width = tensor.shape[-1] if cute.rank(tensor) > 1 else 0
    offset = cute.assume(Int64(row) * width + column, divby=size)
    return cute.make_tensor(tensor.iterator + offset, cute.make_layout(size))


def line(tensor: cute.Tensor, spot: Spot, i: int, shift: int = 0) -> cute.Tensor:
    """The thread's vector of its row i, `shift` columns on. All rows are offsets from one address."""
    first = vector(tensor, spot.row, spot.column + shift)
    return cute.make_tensor(first.iterator + i * tensor.shape[-1], first.layout)


def lines(tensor: cute.Tensor, spot: Spot, shift: int = 0) -> list[cute.Tensor]:
    return [line(tensor, spot, i, shift) for i in range(spot.vectors)]


class Spot(Fixed):
    """Where a thread works: `vectors` rows from `row` on, and 8 columns from `column` on. Of a tensor of `exists` rows
    the first `live` are read, the others are zero. `source` and `column` never lie past the end, so that what belongs
    to a row or a column can be read without a branch."""

    def __init__(
        self, problem: RowProblem, vectors: int, row: Int32, column: Int32, live: Int32, exists: Int32
    ) -> None:
        self.vectors, self.row, self.column = vectors, row, cutlass.min(column, problem.width - VECTOR)
        inside = column < problem.width
        last = cutlass.max(live - 1, 0)
        self.inside = inside
        self.source = [cutlass.min(row + i, last) for i in range(vectors)]
        self.alive = [inside & (row + i < live) for i in range(vectors)]
        self.full = inside & (row + vectors <= live)
        self.exists = [inside & (row + i < exists) for i in range(vectors)]


@cute.jit
def gather(held: cute.Tensor, sources: list[cute.Tensor], spot: Spot, wanted=None) -> None:  # type: ignore[no-untyped-def]
    """Reads a vector a row; zeros where there is nothing. A result may lie where x does, so nothing else is touched."""
    full, alive = spot.full, spot.alive
    if cutlass.const_expr(wanted is not None):
        alive = [a & w for a, w in zip(alive, wanted, strict=True)]
        for w in wanted:
            full &= w
    if full:
        for i in cutlass.range_constexpr(spot.vectors):
            cute.autovec_copy(sources[i], held[None, i])
    else:
        held.fill(held.element_type(0))
        for i in cutlass.range_constexpr(spot.vectors):
            if alive[i]:
                cute.autovec_copy(sources[i], held[None, i])


@cute.jit
def fetch(held: cute.Tensor, sources: list[cute.Tensor], spot: Spot) -> None:
    """`gather` into shared memory, under way until the thread waits for it."""
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=16 * VECTOR
    )
    for i in cutlass.range_constexpr(spot.vectors):
        if spot.alive[i]:
            cute.copy(atom, sources[i], held[None, i])
        else:
            held[None, i].fill(0.0)


class Loaded(Fixed):
    """BF16 [8, vectors] of each tensor that a body reads, in registers or shared memory; and its FP32 columns."""

    def __init__(self, spot: Spot) -> None:
        self.spot = spot
        self.rows: dict[str, cute.Tensor] = {}
        self.columns: dict[str, cute.Tensor] = {}
        self.weights: list[Float32] = []  # swiglu: each row's router weight
        self.choices: list[
            Int32
        ] = []  # dispatch: which choice of which token each row is, negative for padding
        self.scales: list[
            Int32
        ] = []  # each row's code of the block of an MXFP8 x, 0 where the row is padding
        self.rstd: list[Float32] = []  # rms_norm_bwd: each row's
        self.rotates = False  # rope: are these rotary columns?

    def row(self, name: str, tensor: cute.Tensor, shift: int = 0) -> None:
        self.put(name, lines(tensor, self.spot, shift))

    def take(
        self, rows: list[Int32], tensor: cute.Tensor, scale: cute.Tensor, wanted: list[Boolean] | None
    ) -> None:
        """x of rows in MXFP8, exactly in BF16; the elements stay at hand as "codes"."""
        column = self.spot.column
        self.put("codes", [vector(tensor, row, column) for row in rows], wanted)
        x = cute.make_rmem_tensor((VECTOR, len(rows)), BFloat16)
        for i, row in enumerate(rows):
            code = Int32(scale[row, column // quantize.MXFP8_BLOCK])
            if wanted is not None:
                code = code * Int32(wanted[i])
            elements = cute.recast_tensor(self.rows["codes"][None, i], Float8E4M3FN).load().to(Float32)
            x[None, i].store((elements * quantize.scale(code)).to(BFloat16))
            self.scales.append(code)
        self.rows["x"] = x

    def put(self, name: str, sources: list[cute.Tensor], wanted: list[Boolean] | None = None) -> None:
        """`wanted`: which rows are not zero, of those that there are."""
        held = cute.make_rmem_tensor((VECTOR, len(sources)), sources[0].element_type)
        gather(held, sources, self.spot, wanted)
        self.rows[name] = held

    def column(self, name: str, tensor: cute.Tensor) -> None:
        held = cute.make_rmem_tensor(VECTOR, Float32)
        cute.autovec_copy(vector(tensor, 0, self.spot.column), held)
        self.columns[name] = held

    def floats(self, name: str, i: int):  # type: ignore[no-untyped-def]
        """Row i in FP32."""
        row = cute.make_rmem_tensor(VECTOR, BFloat16)
        cute.autovec_copy(self.rows[name][None, i], row)
        return row.load().to(Float32)


class RowBody(Fixed):
    """`value(i)` is the result of the thread's row i, eight FP32 numbers, as a vector."""

    def __init__(self, problem: RowProblem, named) -> None:  # type: ignore[no-untyped-def]
        self.problem, self.named = problem, named

    def fetch(self, spot: Spot, held: cute.Tensor) -> None:
        """Begins to copy a norm's rows, x, dy and addends, to shared memory [8, vectors, tensors]."""
        for i, name in enumerate(self.problem.held_names):
            fetch(held[None, None, i], lines(self.named[name], spot), spot)

    def load(self, spot: Spot, held: cute.Tensor | None = None) -> Loaded:
        """Everything that `value` and `term` need, a norm's rows from where `fetch` has put them."""
        found = Loaded(spot)
        kind, named = self.problem.body, self.named
        if held is not None:
            found.rows = {name: held[None, None, i] for i, name in enumerate(self.problem.held_names)}
            found.column("w", named["w"])
            if kind == "rms_norm_bwd":
                found.rstd = [named["rstd"][row] for row in spot.source]
            return found
        if kind == "embedding":
            tokens = [cutlass.max(named["tokens"][row], 0) for row in spot.source]
            found.put("x", [vector(named["table"], token, spot.column) for token in tokens])
        elif kind == "dispatch":
            found.choices = [named["row_source"][row] for row in spot.source]
            tokens = [cutlass.max(c, 0) // self.problem.topk for c in found.choices]
            self._rows(found, tokens, [c >= 0 for c in found.choices])
        elif self.problem.source == "mxfp8":
            self._rows(found, spot.source, None)
        elif kind == "concat":
            self._either(found)
        else:
            found.row("x", named["x"])
        if kind == "swiglu":
            found.row("up", named["x"], self.problem.width)
            found.weights = [
                named["s"][row] if self.problem.weighted else Float32(1.0) for row in spot.source
            ]
        if kind == "rope":
            self._table(found)
        return found

    def _rows(self, found: Loaded, rows: list[Int32], wanted: list[Boolean] | None) -> None:
        """Rows of x in either format."""
        x = self.named["x"]
        if self.problem.source == "mxfp8":
            found.take(rows, x, self.named["x_scale"], wanted)
        else:
            found.put("x", [vector(x, row, found.spot.column) for row in rows], wanted)

    @cute.jit
    def _either(self, found) -> None:  # type: ignore[no-untyped-def]
        """Concat: columns of a, or of b."""
        spot, at = found.spot, self.problem.at
        held = cute.make_rmem_tensor((VECTOR, spot.vectors), BFloat16)
        if spot.column < at:
            gather(held, [line(self.named["a"], spot, i) for i in range(spot.vectors)], spot)
        else:
            gather(held, [line(self.named["b"], spot, i, -at) for i in range(spot.vectors)], spot)
        found.rows["x"] = held

    def _table(self, found: Loaded) -> None:
        """The four pairs' rotations at each row's position; the identity outside the rotary columns."""
        problem, spot = self.problem, found.spot
        head = problem.width // problem.heads
        first = spot.column % head - (head - problem.rotary)
        found.rotates = first >= 0
        at = cutlass.max(first, 0) // 2
        positions = [self.named["positions"][row] for row in spot.source]
        for name in ("cos", "sin"):
            held = cute.make_rmem_tensor((VECTOR // 2, spot.vectors), Float32)
            for i in range(spot.vectors):
                cute.autovec_copy(vector(self.named[name], positions[i], at, VECTOR // 2), held[None, i])
            found.rows[name] = held

    def term(self, found: Loaded, i: int) -> Float32:
        """This thread's part of the sum over row i."""
        if self.problem.body == "rms_norm":
            x = found.floats("x", i)
            product = x * x
        else:
            x, dy = found.floats("x", i), found.floats("dy", i)
            product = dy * found.columns["w"].load() * (x * found.rstd[i])
        return product.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)

    def statistic(self, total: Float32, eps: Float32 | None) -> Float32:
        """Of a row's sum: rstd, or mean(w · dy · x̂)."""
        mean = total * (1.0 / self.problem.width)
        return cute.math.rsqrt(mean + eps) if self.problem.body == "rms_norm" else mean

    def value(self, found: Loaded, i: int, statistic: Float32 | None):  # type: ignore[no-untyped-def]
        kind = self.problem.body
        x = found.floats("x", i)
        if kind == "rms_norm":
            return x * statistic * found.columns["w"].load()
        if kind == "rms_norm_bwd":
            grad = found.floats("dy", i) * found.columns["w"].load()
            return (grad - x * found.rstd[i] * statistic) * found.rstd[i]
        if kind == "swiglu":
            return self._swiglu(found, i)
        if kind == "rope":
            return self._rotated(found, i)
        return x

    def _swiglu(self, found: Loaded, i: int):  # type: ignore[no-untyped-def]
        gate, up = found.floats("x", i), found.floats("up", i)
        out = cute.make_rmem_tensor(VECTOR, Float32)
        for j in range(VECTOR):
            out[j] = activation.swiglu(gate[j], up[j], found.weights[i])
        return out.load()

    @cute.jit
    def _rotated(self, found: Loaded, i: int):  # type: ignore[no-untyped-def]
        x, out = found.floats("x", i), cute.make_rmem_tensor(VECTOR, Float32)
        for pair in cutlass.range_constexpr(VECTOR // 2):
            even, odd = x[2 * pair], x[2 * pair + 1]
            c, s = found.rows["cos"][pair, i], found.rows["sin"][pair, i]
            if cutlass.const_expr(self.problem.inverse):
                s = -s
            out[2 * pair] = even * c - odd * s if found.rotates else even
            out[2 * pair + 1] = even * s + odd * c if found.rotates else odd
        return out.load()

    def gradient(self, found: Loaded, i: int):  # type: ignore[no-untyped-def]
        """Row i's part of the norm weight's gradient: dy · x̂."""
        return found.floats("dy", i) * (found.floats("x", i) * found.rstd[i])
