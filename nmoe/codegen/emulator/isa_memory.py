"""Decode loads, stores, atomics, address conversions and exchange between lanes."""

from __future__ import annotations

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.isa import (
    OPERATIONS,
    PAIRS,
    SCOPES,
    SPACES,
    TYPE,
    WIDTHS,
    Modifiers,
    float_flags,
    lane_width,
    opcode,
    scope_number,
)
from nmoe.codegen.emulator.library import ADDRESS_64, SIGNED, WIDE_DST
from nmoe.codegen.emulator.program import Assembler

SEMANTICS = {"relaxed": 1, "volatile": 1, "mmio": 1, "acquire": 2, "release": 4, "acq_rel": 6}


def memory_order(mods: Modifiers, default: str | None = None) -> int:
    """SEM_* bits and scope of core/emu.h, 0 for a weak access. A volatile access is relaxed at system scope."""
    mods.flag("weak")
    found = mods.take(*SEMANTICS) or default
    mods.flag("relaxed")  # of mmio.relaxed
    scope = mods.take(*SCOPES) or ("sys" if found in ("volatile", "mmio") else "gpu")
    return SEMANTICS[found] | scope_number(scope) << 4 if found else 0


@opcode("ld", "st")
def load_store(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    order = memory_order(mods)
    space = SPACES[mods.take(*SPACES) or ""] if any(n in SPACES for n in mods.names) else 0
    vector = mods.take("v2", "v4", "v8")
    memory, value = (ins.operands[1], ins.operands[0]) if head == "ld" else ins.operands[:2]
    items = value.items if isinstance(value, ptx.Vec) else (value,)
    if len(items) != int(vector[1:] if vector else 1):
        raise asm.error(f"{len(items)} registers for a vector of {vector or 1}")
    widths = {asm.width(i) for i in items if isinstance(i, ptx.Reg)}
    width = widths.pop() if widths else lane_width(kind)
    slot, wide, offset = asm.address(memory)
    flags = (WIDE_DST if width == 64 else 0) | (SIGNED if kind[0] == "s" else 0) | (ADDRESS_64 if wide else 0)
    place = asm.destination if head == "ld" else lambda o, w: asm.source(o, w, kind)
    slots = [place(i, width) for i in items]
    slots = [*slots, slot] if head == "ld" else [slot, *slots]
    asm.emit(head, *slots, flags=flags, mods=(WIDTHS[kind] // 8, len(items), space, order), imm=offset)


@opcode("ldu")
def load_uniform(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    load_store(
        asm,
        ptx.Instr(
            "ld" + ins.opcode[3:],
            *[getattr(ins, f) for f in ("operands", "guard", "guard_negated", "line", "source", "text")],
        ),
        mods,
    )


@opcode("atom", "red")
def atomic(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    order = memory_order(mods, default="relaxed")
    space = SPACES[mods.take(*SPACES) or ""] if any(n in SPACES for n in mods.names) else 0
    operation = mods.need(*OPERATIONS)
    vector = int((mods.take("v2", "v4", "v8") or "v1")[1:])
    element = PAIRS.get(kind, kind.replace("b", "u") if kind in ("b16", "b32", "b64") else kind)
    width = lane_width(kind)
    operands = ins.operands if head == "atom" else (ptx.Vec((ptx.Sink(),) * vector), *ins.operands)
    items = operands[0].items if isinstance(operands[0], ptx.Vec) else operands[:1]
    values = operands[2].items if isinstance(operands[2], ptx.Vec) else operands[2:3]
    slot, wide, offset = asm.address(operands[1])
    slots = [*(asm.destination(i, width) for i in items), slot, *(asm.source(v, width, kind) for v in values)]
    if operation == "cas":
        slots.append(asm.source(operands[3], width, kind))
    mode = (
        OPERATIONS[operation],
        TYPE[element],
        space,
        vector | (256 if kind in PAIRS else 0) | order << 16,
    )
    asm.emit("atom", *slots, flags=ADDRESS_64 if wide else 0, mods=mode, imm=offset)


@opcode("cvta")
def convert_address(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    towards, width = mods.flag("to"), lane_width(mods.type())
    space = mods.need("global", "const", "shared", "shared::cta", "shared::cluster", "param", "local")
    window = {"global": 0, "const": 0, "param": 2, "local": 3}.get(space, 1)
    flags = (WIDE_DST | ADDRESS_64) if width == 64 else 0
    asm.emit(
        "cvta",
        asm.destination(ins.operands[0], width),
        asm.source(ins.operands[1], width),
        flags=flags,
        mods=(window, int(towards)),
    )


@opcode("isspacep")
def is_space(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    space = mods.need("global", "const", "shared", "shared::cta", "shared::cluster", "param", "local")
    window = {"global": 0, "const": 0, "param": 2, "local": 3}.get(space, 1)
    asm.emit(
        "isspacep",
        asm.destination(ins.operands[0], 1),
        asm.source(ins.operands[1], 64),
        mods=(window, 0, int(space == "shared::cta")),
    )


@opcode("mapa", "getctarank")
def cluster_address(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, width = ins.opcode.split(".")[0], lane_width(mods.type())
    mods.flag("shared::cluster")
    target, value, *rank = ins.operands
    slots = [asm.source(value, width), *(asm.source(r, 32) for r in rank)]
    flags = ADDRESS_64 if width == 64 else 0
    if head == "mapa":
        asm.emit(head, asm.destination(target, width), *slots, flags=flags | (WIDE_DST if width == 64 else 0))
    else:
        asm.emit(head, asm.destination(target, 32), *slots, flags=flags)


@opcode("ldmatrix", "stmatrix")
def matrix(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head = ins.opcode.split(".")[0]
    mods.need("m8n8")
    if mods.type() != "b16":
        raise asm.error("only b16 matrices are supported")
    mods.take("shared", "shared::cta")
    count, transposed = int(mods.need("x1", "x2", "x4")[1:]), mods.flag("trans")
    memory, value = (ins.operands[1], ins.operands[0]) if head == "ldmatrix" else ins.operands
    items = value.items if isinstance(value, ptx.Vec) else (value,)
    slot, offset = asm.narrow_address(memory)
    registers = [asm.source(i, 32) for i in items]
    slots = [*registers, slot] if head == "ldmatrix" else [slot, *registers]
    asm.emit(head, *slots, mods=(count, int(transposed)), imm=offset)


@opcode("mma.sync")
def mma(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    for name in ("aligned", "m16n8k16", "row", "col"):
        mods.need(name)
    d_type, a_type, b_type, c_type = (mods.type() for _ in range(4))
    if a_type not in ("bf16", "f16") or b_type != a_type or d_type != "f32" or c_type != "f32":
        raise asm.error("only mma.sync of bf16 or f16 that adds in f32 is supported")
    vectors = [v.items if isinstance(v, ptx.Vec) else (v,) for v in ins.operands]
    if [len(items) for items in vectors] != [4, 4, 2, 4]:
        raise asm.error("the number of registers does not fit m16n8k16")
    slots = [asm.destination(i, 32) for i in vectors[0]]
    slots += [asm.source(i, 32) for items in vectors[1:] for i in items]
    asm.emit("mma", *slots, mods=(TYPE[a_type],))


@opcode("shfl.sync")
def shuffle(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mode = {"idx": 0, "up": 1, "down": 2, "bfly": 3}[mods.need("idx", "up", "down", "bfly")]
    mods.type()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, ptx.Pair) else (target, ptx.Sink())
    asm.emit(
        "shfl",
        asm.destination(first, 32),
        asm.destination(second, 1),
        *(asm.source(o, 32) for o in ins.operands[1:]),
        mods=(mode,),
    )


@opcode("vote.sync")
def vote(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mode = ["any", "all", "uni", "ballot"].index(mods.need("any", "all", "uni", "ballot"))
    mods.type()
    width = 32 if mode == 3 else 1
    target, predicate, members = ins.operands
    asm.emit(
        "vote",
        asm.destination(target, width),
        asm.source(predicate, 1),
        asm.source(members, 32),
        mods=(mode,),
    )


@opcode("match.any.sync", "match.all.sync")
def match(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    width = lane_width(mods.type())
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, ptx.Pair) else (target, ptx.Sink())
    asm.emit(
        "match",
        asm.destination(first, 32),
        asm.destination(second, 1),
        asm.source(ins.operands[1], width),
        asm.source(ins.operands[2], 32),
        mods=(int(".all." in ins.opcode), int(width == 64)),
    )


@opcode("redux.sync")
def reduce(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    kind, operation = mods.type(), mods.need("add", "min", "max", "and", "or", "xor")
    flags, absolute = float_flags(mods), mods.flag("abs")
    target, value, members = ins.operands
    asm.emit(
        "redux",
        asm.destination(target, 32),
        asm.source(value, 32, kind),
        asm.source(members, 32),
        flags=flags,
        mods=(OPERATIONS[operation], TYPE[kind.replace("b", "u")], int(absolute)),
    )


@opcode("elect.sync")
def elect(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    target = ins.operands[0]
    if not isinstance(target, ptx.Pair):
        raise asm.error("elect.sync needs d|p")
    asm.emit(
        "elect",
        asm.destination(target.first, 32),
        asm.destination(target.second, 1),
        asm.source(ins.operands[1], 32),
    )


@opcode("activemask")
def active_mask(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    mods.type()
    asm.emit("activemask", asm.destination(ins.operands[0], 32))
