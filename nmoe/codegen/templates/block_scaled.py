"""Scale factors of block-scaled products: TMA → shared memory → tensor memory, where tcgen05.mma reads them.

They lie in memory in atoms of 512 bytes, 128 rows × 4 scales (formats.to_blocked), and travel as they are. A slice of A
has `scale_atoms` atoms of its 128 rows, one of B that many for every 128 of its rows. tcgen05.cp.32x128b.warpx4 spreads
an atom over 4 columns: row r at lane r % 32 of every warp's lanes, column r / 32, its 4 scales the bytes of the word.

    tensor memory:  | accumulators … | A: atoms × 4 columns | B: atoms × blocks of 128 rows × 4 columns |
    MXFP8:  k32 and one scale a product: product k of an atom takes byte k % 4 of the words
    NVFP4:  k64 and four scales a product: whole words, product k takes atom k

In a pair each thread block loads the scales of its own rows of A and all of B's, and one tcgen05.cp copies in both. The
tensor pipe runs copies and products in the order in which they were issued, so the columns are written anew for each
slice without a barrier.
"""

from __future__ import annotations

import cutlass
from cutlass import Float8E4M3FN, Float8E8M0FNU, Int32, Int64, cute
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05

from nmoe.codegen.templates.fixed import Fixed
from nmoe.codegen.templates.layouts import major
from nmoe.storage import ATOM_BYTES, ATOM_ROWS

WORDS = ATOM_BYTES // 4  # TMA's boxes are at most 256 elements wide: atoms are 128 words
COLUMNS = 4  # of tensor memory, an atom
# Shared memory descriptor (PTX ISA, tcgen05): version 1, no swizzle; 8 rows of 16 bytes every 128.
DESCRIPTOR = 1 << 46 | (128 >> 4) << 32 | 1 << 16


def mma(problem, tile: tuple[int, int], group: tcgen05.CtaGroup):  # type: ignore[no-untyped-def]
    """The tiled product of `tile` rows and columns and the depth of one instruction."""
    source = tcgen05.OperandSource.SMEM
    if problem.multiplied == "nvfp4":
        return cute.make_tiled_mma(tcgen05.MmaMXF4NVF4Op(Float8E4M3FN, (*tile, 64), group, source))
    return cute.make_tiled_mma(
        tcgen05.MmaMXF8F6F4Op(
            cutlass.Float8E4M3FN, cutlass.Float8E4M3FN, (*tile, 32), group, source,
            major(problem.a_mn_major), major(problem.b_mn_major),
        )
    )  # fmt: skip


def copies(gemm, named, operation):  # type: ignore[no-untyped-def]
    """TMA copies of both operands' scales: (word, atom along the depth, atom along the rows[, half, expert])."""
    atoms = gemm.problem.scale_atoms
    box = cute.make_layout((WORDS, atoms, 1))

    def copy(name: str, lead: tuple[int, ...]):  # type: ignore[no-untyped-def]
        tensor = named[f"{name}_scale"]
        *_, rows, depth, _ = tensor.shape
        strides, sizes = [WORDS * depth], [rows]
        if lead:
            halves, experts = lead
            sizes = [rows // halves, halves, experts]
            strides = [WORDS * depth, WORDS * depth * (rows // halves), WORDS * depth * rows]
        layout = cute.make_layout((WORDS, depth, *sizes), stride=(1, WORDS, *strides))
        view = cute.make_tensor(cute.recast_ptr(tensor.iterator, dtype=Int32), layout)
        return cpasync.make_tiled_tma_atom(operation, view, box, (WORDS, atoms, 1))

    experts = gemm.problem.groups if gemm.problem.ragged == "rows" else 1
    return copy("a", ()), copy("b", (2 if gemm.paired else 1, experts))


class Scales(Fixed):
    """A ring's scale factors. `columns`: where in tensor memory they go."""

    def __init__(self, gemm, copies, smem, columns: Int32) -> None:  # type: ignore[no-untyped-def]
        self.gemm, self.columns = gemm, columns
        self.atoms = gemm.problem.scale_atoms
        self.blocks = gemm.config.tile_n // ATOM_ROWS
        self.batched = gemm.problem.ragged == "rows"
        stages, one = gemm.config.stages, cute.make_layout(1)
        self.stages, self.atom, self.landing, self.origin = [], [], [], []
        for (atom, tensor), blocks in zip(copies, (1, self.blocks), strict=True):
            layout = cute.make_layout((WORDS, self.atoms, 1, blocks, stages))
            held = smem.allocate_tensor(Int32, layout, 128)
            tiled = cute.local_tile(tensor, (WORDS, self.atoms, 1), (None,) * cute.rank(tensor))
            landing, origin = cpasync.tma_partition(
                atom, 0, one, cute.group_modes(held, 0, 3), cute.group_modes(tiled, 0, 3)
            )
            self.stages.append(held)
            self.atom.append(atom)
            self.landing.append(landing)
            self.origin.append(origin)

    @cute.jit
    def load(self, place, k: Int32, stage: Int32, full) -> None:  # type: ignore[no-untyped-def]
        """The scales of slice k of a tile into a stage, whose barrier counts their bytes."""
        a, b = self.origin
        cute.copy(self.atom[0], a[None, 0, k, place.row], self.landing[0][None, 0, stage], tma_bar_ptr=full)
        expert = place.expert if cutlass.const_expr(self.batched) else 0
        for i in cutlass.range_constexpr(self.blocks):
            if cutlass.const_expr(self.gemm.paired):
                box = b[None, 0, k, place.column, i, expert]
            else:
                box = b[None, 0, k, self.blocks * place.column + i, 0, expert]
            cute.copy(self.atom[1], box, self.landing[1][None, i, stage], tma_bar_ptr=full)

    @cute.jit
    def copy(self, stage: Int32) -> None:
        """A stage's scales into tensor memory, by one thread, ordered before the products that it issues next."""
        pair = self.gemm.cluster == 2
        for operand, blocks in enumerate((1, self.blocks)):
            for block in cutlass.range_constexpr(blocks):
                for atom in cutlass.range_constexpr(self.atoms):
                    source = self.stages[operand][None, atom, 0, block, stage].iterator.toint()
                    descriptor = Int64(source >> 4) | Int64(DESCRIPTOR)
                    column = self._column(operand, atom, block).ir_value()
                    nvvm.tcgen05_cp(
                        nvvm.Tcgen05CpShape.SHAPE_32x128b,
                        llvm.inttoptr(llvm.PointerType.get(cute.AddressSpace.tmem.value), column),
                        descriptor.ir_value(),
                        group=nvvm.CTAGroupKind.CTA_2 if pair else nvvm.CTAGroupKind.CTA_1,
                        multicast=nvvm.Tcgen05CpMulticast.WARPX4,
                    )

    def point(self, mma, k: int) -> None:  # type: ignore[no-untyped-def]
        """Tells the product the scales of its k-th step within a slice."""
        whole = self.gemm.problem.multiplied == "nvfp4"
        atom, byte = (k, 0) if whole else (k // 4, k % 4)
        kind = Float8E4M3FN if whole else Float8E8M0FNU
        for field, operand in ((tcgen05.Field.SFA, 0), (tcgen05.Field.SFB, 1)):
            address = self._column(operand, atom, 0) | byte << 30
            mma.set(field, cute.make_ptr(kind, address, cute.AddressSpace.tmem))

    def _column(self, operand: int, atom: int, block: int) -> Int32:
        """Of an atom's first column; the blocks of B that a product reads lie side by side."""
        first = COLUMNS * (self.atoms + atom * self.blocks + block) if operand else COLUMNS * atom
        return self.columns + first
