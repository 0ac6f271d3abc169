"""Decode synchronisation, asynchronous copies and tensor-core instructions."""

from __future__ import annotations

import re

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.isa import OPERATIONS, PAIRS, SCOPES, TYPE, Modifiers, opcode, scope_number
from nmoe.codegen.emulator.library import ADDRESS_64, WIDE_DST
from nmoe.codegen.emulator.program import Assembler

SHARED = ("shared", "shared::cta", "shared::cluster")
PROXY_SHARED, PROXY_GLOBAL = 1, 2
PAIR, A_IN_TMEM, LANE_MASK = 1, 2, 4  # tcgen05.mma flags
MULTICAST, CTA_PAIR, GATHER = 1, 2, 4  # copy flags


def relaxed(mods: Modifiers) -> int:
    """1 for .relaxed; takes the scope too."""
    weak = mods.take("relaxed", "acquire", "release", "acq_rel", "sc") == "relaxed"
    mods.take(*SCOPES)
    return int(weak)


@opcode("mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx", "mbarrier.complete_tx")
def mbarrier(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    name = ins.opcode.split(".")[1]
    mods.take(*SHARED)
    relaxed(mods)
    mods.flag("b64")
    slot, offset = asm.narrow_address(ins.operands[0])
    asm.emit(f"mbarrier_{name}", slot, *(asm.source(o, 32) for o in ins.operands[1:]), imm=offset)


@opcode("mbarrier.arrive", "mbarrier.arrive_drop")
def mbarrier_arrive(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    drop, expect = "arrive_drop" in ins.opcode, mods.flag("expect_tx")
    weak = relaxed(mods)
    mods.take(*SHARED)
    mods.flag("noComplete")
    mods.flag("b64")
    operands = ins.operands if not isinstance(ins.operands[0], ptx.Mem) else (ptx.Sink(), *ins.operands)
    slot, offset = asm.narrow_address(operands[1])
    count = asm.source(operands[2], 32) if len(operands) > 2 else asm.constant(1, 32)
    asm.emit(
        "mbarrier_arrive",
        asm.destination(operands[0], 64),
        slot,
        count,
        imm=offset,
        mods=(int(expect) | 2 * int(drop), 0, 0, weak),
    )


@opcode("mbarrier.test_wait", "mbarrier.try_wait")
def mbarrier_wait(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    parity = mods.flag("parity")
    weak = relaxed(mods)
    mods.take(*SHARED)
    mods.flag("b64")
    slot, offset = asm.narrow_address(ins.operands[1])
    phase = asm.source(ins.operands[2], 32 if parity else 64)
    asm.emit(
        "mbarrier_wait",
        asm.destination(ins.operands[0], 1),
        slot,
        phase,
        imm=offset,
        mods=(int(parity), int("try_wait" in ins.opcode), 0, weak),
    )


@opcode("mbarrier.pending_count")
def pending_count(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.flag("b64")
    asm.emit("mbarrier_pending_count", asm.destination(ins.operands[0], 32), asm.source(ins.operands[1], 64))


@opcode(
    "bar.sync",
    "bar.arrive",
    "barrier.sync",
    "barrier.arrive",
    "barrier.cta.sync",
    "barrier.cta.arrive",
    "bar.cta.sync",
    "bar.cta.arrive",
)
def named_barrier(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    identifier, *threads = ins.operands
    count = asm.source(threads[0], 32) if threads else asm.constant(0, 32)
    asm.emit("bar", asm.sinks[32], asm.source(identifier, 32), count, mods=(int("arrive" in ins.opcode),))


@opcode("bar.red", "barrier.red", "barrier.cta.red", "bar.cta.red")
def reducing_barrier(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mode = ["popc", "and", "or"].index(mods.need("popc", "and", "or"))
    mods.flag("u32", "pred")
    target, identifier, *threads, predicate = ins.operands
    count = asm.source(threads[0], 32) if threads else asm.constant(0, 32)
    asm.emit(
        "bar",
        asm.destination(target, 1 if mode else 32),
        asm.source(identifier, 32),
        count,
        asm.source(predicate, 1),
        mods=(2 + mode,),
    )


@opcode("bar.warp.sync")
def warp_barrier(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit("bar_warp", asm.source(ins.operands[0], 32))


@opcode("barrier.cluster.arrive", "barrier.cluster.wait")
def cluster_barrier(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit(f"cluster_{ins.opcode.split('.')[2]}", mods=(0, 0, 0, relaxed(mods)))


@opcode("fence", "membar")
def fence(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    if "proxy" in mods.names:
        asynchronous, memory = mods.flag("async"), mods.take("global", *SHARED)
        mods.names.clear()
        memories = {None: PROXY_SHARED | PROXY_GLOBAL, "global": PROXY_GLOBAL}.get(memory, PROXY_SHARED)
        asm.emit("proxy_fence" if asynchronous else "nop", mods=(memories,))
        return
    initialises = mods.flag("mbarrier_init")
    scope = mods.need(*SCOPES)
    mods.names.clear()
    asm.emit("fence", mods=(int(initialises), scope_number(scope)))


@opcode("cp.async.ca", "cp.async.cg")
def copy_async(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.need(*SHARED)
    mods.need("global")
    destination, source, size, *ignored = ins.operands
    if not isinstance(size, ptx.Imm):
        raise asm.error("the copy size must be an immediate")
    slot, offset = asm.narrow_address(destination)
    policy = "L2::cache_hint" in mods.names
    explicit = ignored[:-1] if policy else ignored
    count = asm.source(explicit[0], 32) if explicit else asm.constant(size.bits, 32)
    asm.emit(
        "cp_async", slot, asm.wide_address(source), count, flags=ADDRESS_64, mods=(size.bits, 0, 0, offset)
    )


@opcode("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all")
def copy_async_groups(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    if "commit" in ins.opcode:
        asm.emit("cp_async_commit")
        return
    every = "wait_all" in ins.opcode
    count = 0 if every else immediate_count(asm, ins)
    asm.emit("cp_async_wait", mods=(count, int(every)))


def immediate_count(asm: Assembler, ins: ptx.Instr) -> int:
    """Groups that a wait lets be under way."""
    count = ins.operands[0]
    if not isinstance(count, ptx.Imm):
        raise asm.error("the group count must be an immediate")
    return count.bits


@opcode("cp.async.mbarrier.arrive")
def copy_async_arrive(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    no_increment = mods.flag("noinc")
    mods.take(*SHARED)
    mods.flag("b64")
    slot, offset = asm.narrow_address(ins.operands[0])
    asm.emit("cp_async_mbarrier", slot, imm=offset, mods=(int(no_increment),))


@opcode("cp.async.bulk.commit_group", "cp.async.bulk.wait_group")
def bulk_groups(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    if "commit" in ins.opcode:
        asm.emit("bulk_commit")
        return
    read = mods.flag("read")
    asm.emit("bulk_wait", mods=(immediate_count(asm, ins), int(read)))


def copy_flags(mods: Modifiers) -> int:
    pair = mods.take("cta_group::1", "cta_group::2") == "cta_group::2"
    return (MULTICAST if mods.flag("multicast::cluster") else 0) | (CTA_PAIR if pair else 0)


@opcode("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def tensor_copy(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    reduces = "reduce" in ins.opcode.split(".")
    rank = int(mods.need("1d", "2d", "3d", "4d", "5d")[0])
    operation = mods.take(*OPERATIONS) if reduces else None
    mode = mods.take("tile", "tile::gather4", "tile::scatter4") or "tile"
    gather = mode != "tile"
    flags = copy_flags(mods) | (GATHER if gather else 0)
    coordinates = rank + 3 if gather else rank
    to, source = mods.need("global", *SHARED), mods.need("global", *SHARED)
    if to == "global":
        mods.need("bulk_group")
        memory, shared = ins.operands[:2]
        slots, (place, offset) = tensor_map(asm, memory, coordinates), asm.narrow_address(shared)
        code = OPERATIONS[operation] + 1 if operation else 0
        asm.emit(
            "tma_reduce" if reduces else "tma_store",
            *slots,
            place,
            imm=offset,
            mods=(coordinates, flags, code),
        )
        return
    if source != "global":
        raise asm.error("a tensor copy is between global and shared memory")
    mods.need("mbarrier::complete_tx::bytes")
    shared, memory, barrier, *rest = ins.operands
    place, offset = asm.narrow_address(shared)
    map_slot, *coords = tensor_map(asm, memory, coordinates)
    barrier_slot, barrier_offset = asm.narrow_address(barrier)
    mask = [asm.source(rest[0], 32)] if flags & MULTICAST else []
    asm.emit(
        "tma_load",
        place,
        map_slot,
        barrier_slot,
        *coords,
        *mask,
        imm=offset,
        mods=(coordinates, flags, 0, barrier_offset),
    )


def tensor_map(asm: Assembler, memory: ptx.Operand, coordinates: int) -> list[int]:
    if not isinstance(memory, ptx.Mem) or len(memory.coords) != coordinates:
        raise asm.error(f"[tensorMap, {{{coordinates} coordinates}}] is expected")
    return [
        asm.wide_address(ptx.Mem(memory.base, memory.offset)),
        *(asm.source(c, 32) for c in memory.coords),
    ]


@opcode("cp.async.bulk", "cp.reduce.async.bulk")
def bulk_copy(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    reduces = "reduce" in ins.opcode.split(".")
    kind = mods.type() if reduces else "b8"
    element = PAIRS.get(kind, kind.replace("b", "u") if kind in ("b32", "b64") else kind)
    operation = OPERATIONS[mods.need(*OPERATIONS)] + 1 if reduces else 0
    flags = copy_flags(mods)
    to, source = mods.need("global", *SHARED), mods.need("global", *SHARED)
    mode = (TYPE[element] if reduces else 0, flags, operation)
    size = asm.source(ins.operands[2], 32)
    if to == "global":
        mods.need("bulk_group")
        place, _ = shared_place(asm, ins.operands[1])
        asm.emit(
            "bulk_reduce" if reduces else "bulk_store",
            asm.wide_address(ins.operands[0]),
            place,
            size,
            mods=mode,
        )
        return
    mods.need("mbarrier::complete_tx::bytes")
    place, offset = asm.narrow_address(ins.operands[0])
    barrier, barrier_offset = asm.narrow_address(ins.operands[3])
    mask = [asm.source(ins.operands[4], 32)] if flags & MULTICAST else []
    if source == "global":
        origin = asm.wide_address(ins.operands[1])
    else:
        origin, _ = shared_place(asm, ins.operands[1])
    asm.emit(
        "bulk_load" if source == "global" else "bulk_shared",
        place,
        origin,
        size,
        barrier,
        *mask,
        imm=offset,
        mods=(*mode, barrier_offset),
    )


def shared_place(asm: Assembler, operand: ptx.Operand) -> tuple[int, int]:
    """A shared address with its offset added."""
    slot, offset = asm.narrow_address(operand)
    if offset:
        total = asm.temporary(32)
        asm.emit("add_b32", total, slot, asm.constant(offset, 32))
        slot = total
    return slot, 0


@opcode("st.async")
def store_async(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    kind = mods.type()
    relaxed(mods)
    mods.need(*SHARED)
    mods.need("mbarrier::complete_tx::bytes")
    vector = int((mods.take("v2", "v4") or "v1")[1:])
    memory, value, barrier = ins.operands
    items = vector_items(value)
    if len(items) != vector:
        raise asm.error(f"{len(items)} registers for a vector of {vector}")
    width = 64 if kind.endswith("64") else 32
    place, offset = asm.narrow_address(memory)
    barrier_slot, barrier_offset = asm.narrow_address(barrier)
    asm.emit(
        "st_async",
        place,
        barrier_slot,
        *(asm.source(i, width, kind) for i in items),
        imm=offset,
        flags=WIDE_DST if width == 64 else 0,
        mods=(width // 8, vector, 0, barrier_offset),
    )


@opcode("clusterlaunchcontrol.try_cancel")
def try_cancel(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.flag("async")
    mods.take(*SHARED)
    mods.need("mbarrier::complete_tx::bytes")
    everywhere = mods.flag("multicast::cluster::all")
    mods.flag("b128")
    place, offset = asm.narrow_address(ins.operands[0])
    barrier, barrier_offset = asm.narrow_address(ins.operands[1])
    asm.emit("try_cancel", place, barrier, imm=offset, mods=(0, int(everywhere), 0, barrier_offset))


@opcode("clusterlaunchcontrol.query_cancel")
def query_cancel(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    """The response is {taken, x, y, z} in 32-bit words (core/tma.c)."""
    asked = mods.match(r"is_canceled|get_first_ctaid(::[xyz])?") or ""
    mods.names.clear()
    target, response = ins.operands
    low, high = asm.halves(response)

    def word(index: int, slot: int) -> None:
        half = (low, high)[index // 2]
        if index % 2:
            shifted = asm.temporary(64)
            asm.emit("shr_u64", shifted, half, asm.constant(32, 32))
            half = shifted
        asm.emit("cvt_u32_u64", slot, half)

    if asked == "is_canceled":
        taken = asm.temporary(32)
        word(0, taken)
        asm.emit("setp_ne_b32", asm.destination(target, 1), asm.sinks[1], taken, asm.constant(0, 32))
    elif asked.endswith(("x", "y", "z")):
        word(1 + "xyz".index(asked[-1]), asm.destination(target, 32))
    elif isinstance(target, ptx.Vec):
        for index, item in enumerate(target.items[:3]):
            word(1 + index, asm.destination(item, 32))
    else:
        raise asm.error("four destinations are expected")


TENSORMAP_FIELDS = (
    "global_address",
    "rank",
    "box_dim",
    "global_dim",
    "global_stride",
    "element_stride",
    "elemtype",
    "interleave_layout",
    "swizzle_mode",
    "fill_mode",
)


@opcode("tensormap.replace")
def tensormap_replace(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.flag("tile")
    name = mods.need(*TENSORMAP_FIELDS)
    space = mods.take("global", "shared::cta")
    mods.flag("b1024")
    width = 64 if mods.type() == "b64" else 32
    memory, *ordinal, value = ins.operands
    slot, wide, offset = asm.address(memory)
    if offset:
        raise asm.error("tensormap.replace with an address offset is not supported")
    index = ordinal[0].bits if ordinal and isinstance(ordinal[0], ptx.Imm) else 0
    flags = (ADDRESS_64 if wide else 0) | (WIDE_DST if width == 64 else 0)
    asm.emit(
        "tensormap_replace",
        slot,
        asm.source(value, width),
        flags=flags,
        mods=(TENSORMAP_FIELDS.index(name), index, {"global": 1, "shared::cta": 2, None: 0}[space]),
    )


@opcode("tensormap.cp_fenceproxy")
def tensormap_copy(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.names.clear()
    asm.emit("tensormap_copy", asm.wide_address(ins.operands[0]), shared_place(asm, ins.operands[1])[0])


def cta_pair(mods: Modifiers) -> int:
    return int(mods.need("cta_group::1", "cta_group::2") == "cta_group::2")


@opcode("tcgen05.alloc", "tcgen05.dealloc", "tcgen05.relinquish_alloc_permit")
def tcgen05_allocation(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    pair = cta_pair(mods)
    mods.take(*SHARED)
    mods.flag("b32")
    if "relinquish" in ins.opcode:
        asm.emit("tcgen05_relinquish")
    elif "dealloc" in ins.opcode:
        asm.emit("tcgen05_dealloc", *(asm.source(o, 32) for o in ins.operands), mods=(pair,))
    else:
        slot, offset = asm.narrow_address(ins.operands[0])
        asm.emit("tcgen05_alloc", slot, asm.source(ins.operands[1], 32), imm=offset, mods=(pair,))


LOAD_SHAPES = {"32x32b": (0, 1), "16x64b": (1, 1), "16x128b": (2, 2), "16x256b": (3, 4), "16x32bx2": (4, 1)}


@opcode("tcgen05.ld", "tcgen05.st")
def tcgen05_move(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head = ins.opcode.split(".")[1]
    shape, registers = LOAD_SHAPES[mods.need(*LOAD_SHAPES)]
    repeat = mods.match(r"x\d+")
    packed = mods.flag("pack::16b", "unpack::16b")
    mods.flag("b32")
    half = 0
    operands = list(ins.operands)
    if shape == 4:
        immediate = operands.pop() if head == "ld" else operands.pop(1)
        half = immediate.bits if isinstance(immediate, ptx.Imm) else 0
    memory, value = (operands[1], operands[0]) if head == "ld" else operands
    items = vector_items(value)
    if repeat is None or len(items) * (2 if packed and shape == 0 else 1) not in (
        registers * int(repeat[1:]),
        2 * registers * int(repeat[1:]),
    ):
        raise asm.error(f"{len(items)} registers do not fit the shape")
    slot, _, offset = asm.address(memory)
    slots = [asm.source(i, 32) for i in items]
    slots = [*slots, slot] if head == "ld" else [slot, *slots]
    asm.emit(f"tcgen05_{head}", *slots, mods=(shape, len(items), int(packed), half), imm=offset)


COPY_SHAPES = {
    ("128x256b", None): 0,
    ("4x256b", None): 1,
    ("128x128b", None): 2,
    ("64x128b", "warpx2::02_13"): 3,
    ("64x128b", "warpx2::01_23"): 4,
    ("32x128b", "warpx4"): 5,
}


@opcode("tcgen05.cp")
def tcgen05_copy(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    pair = cta_pair(mods)
    shape = mods.match(r"\d+x\d+b") or ""
    key = (shape, mods.match(r"warpx.*"))
    if key not in COPY_SHAPES:
        raise asm.error("this copy shape is not supported")
    address = tensor_address(asm, ins.operands[0])
    asm.emit("tcgen05_cp", address, asm.source(ins.operands[1], 64), mods=(COPY_SHAPES[key], pair))


def tensor_address(asm: Assembler, operand: ptx.Operand) -> int:
    """Slot of a tensor-memory address with its offset added."""
    return shared_place(asm, operand)[0]


def vector_items(operand: ptx.Operand) -> tuple[ptx.Operand, ...]:
    return operand.items if isinstance(operand, ptx.Vec) else (operand,)


KINDS = ["f16", "tf32", "f8f6f4", "i8", "mxf8f6f4", "mxf4", "mxf4nvf4"]


@opcode("tcgen05.mma")
def tcgen05_mma(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    flags = PAIR * cta_pair(mods)
    kind = KINDS.index((mods.match(r"kind::.*") or "kind::?").removeprefix("kind::"))
    scaled = mods.flag("block_scale")
    vector = mods.take("block16", "block32", "scale_vec::1X", "scale_vec::2X", "scale_vec::4X")
    block = 16 if vector in ("block16", "scale_vec::4X") else 32
    mods.match(r"collector::.*")
    for hint in [n for n in mods.names if n in ("discard", "lastuse", "fill", "use")]:
        mods.take(hint)
    d, a, b, description, *rest = ins.operands
    scales = [asm.constant(0, 32)] * 2
    masks: list[int] = []
    if scaled:
        scales = [tensor_address(asm, rest.pop(0)), tensor_address(asm, rest.pop(0))]
    elif isinstance(rest[0], ptx.Vec):
        items = vector_items(rest.pop(0))
        zero = all(isinstance(i, ptx.Imm) and i.bits == 0 for i in items)
        masks = [] if zero else [asm.source(i, 32) for i in items]
    enable = asm.source(rest.pop(0), 1)
    scale_d = rest[0].bits if rest and isinstance(rest[0], ptx.Imm) else 0
    if isinstance(a, ptx.Mem):
        flags |= A_IN_TMEM
        a_slot = tensor_address(asm, a)
    else:
        a_slot = asm.source(a, 64)
    flags |= LANE_MASK if masks else 0
    asm.emit(
        "tcgen05_mma",
        tensor_address(asm, d),
        a_slot,
        asm.source(b, 64),
        asm.source(description, 32),
        enable,
        *scales,
        *masks,
        mods=(kind, flags, block, scale_d),
    )


@opcode("tcgen05.commit")
def tcgen05_commit(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    pair = cta_pair(mods)
    mods.need("mbarrier::arrive::one")
    mods.take(*SHARED)
    multicast = mods.flag("multicast::cluster")
    mods.flag("b64")
    slot, offset = asm.narrow_address(ins.operands[0])
    mask = [asm.source(ins.operands[1], 32)] if multicast else []
    asm.emit("tcgen05_commit", slot, *mask, mods=(pair, int(multicast)), imm=offset)


@opcode("tcgen05.wait::ld", "tcgen05.wait::st")
def tcgen05_wait(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit("tcgen05_wait", mods=(int("::st" in ins.opcode),))


@opcode("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def tcgen05_fence(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit("tcgen05_fence", mods=(int("after" in ins.opcode),))


A_REGISTERS, A_MN, B_MN, NEGATE_A, NEGATE_B = 1, 2, 4, 8, 16


@opcode("wgmma.mma_async")
def wgmma(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", mods.match(r"m64n\d+k\d+") or "")
    b_type, a_type, d_type = mods.type(), mods.type(), mods.type()
    if shape is None or d_type not in ("f32", "f16") or int(shape.group(2)) * bits_of(a_type) != 256:
        raise asm.error("this wgmma shape or type is not supported")
    target, a, b, accumulate, *rest = ins.operands
    columns = int(shape.group(1))
    if not isinstance(target, ptx.Vec) or len(target.items) != columns // (2 if d_type == "f32" else 4):
        raise asm.error("the number of accumulator registers does not fit the shape")
    flags = 0
    immediates = [r.bits if isinstance(r, ptx.Imm) else 0 for r in rest]
    flags |= NEGATE_A if immediates[0] == -1 else 0
    flags |= NEGATE_B if immediates[1] == -1 else 0
    transposes = immediates[2:]
    if isinstance(a, ptx.Vec):
        flags |= A_REGISTERS | (B_MN if transposes and transposes[0] else 0)
        a_slots = [asm.source(i, 32) for i in a.items]
    else:
        flags |= (A_MN if transposes and transposes[0] else 0) | (
            B_MN if len(transposes) > 1 and transposes[1] else 0
        )
        a_slots = [asm.source(a, 64)]
    types = TYPE[d_type] | TYPE[a_type] << 8 | TYPE[b_type] << 16
    slots = [asm.source(i, 32) for i in target.items]
    asm.emit(
        "wgmma",
        *slots,
        *a_slots,
        asm.source(b, 64),
        asm.source(accumulate, 1),
        mods=(columns, types, flags, len(slots)),
    )


def bits_of(kind: str) -> int:
    return {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}.get(kind, 0)


@opcode("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")
def wgmma_order(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    name = {"fence": "wgmma_fence", "commit_group": "wgmma_commit", "wait_group": "wgmma_wait"}[
        ins.opcode.split(".")[1]
    ]
    count = ins.operands[0].bits if ins.operands and isinstance(ins.operands[0], ptx.Imm) else 0
    asm.emit(name, mods=(count,))
