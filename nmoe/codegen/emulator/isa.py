"""Decode arithmetic and control flow: one small function an opcode family.

A handler takes the assembler, the instruction and its modifiers, and emits core instructions (core/ops.def). Every
modifier must be taken by the handler or be a known performance hint; what is left over is an error, so an
unknown semantic is never skipped silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.library import FTZ, NAN_OUT, RELU, SAT, WIDE_DST, Library
from nmoe.codegen.emulator.program import Assembler, Program

Handler = Callable[[Assembler, ptx.Instr, "Modifiers"], None]
HANDLERS: dict[str, Handler] = {}
# Order of enum Type in core/emu.h.
TYPES = [
    "u8",
    "s8",
    "u16",
    "s16",
    "u32",
    "s32",
    "u64",
    "s64",
    "f16",
    "bf16",
    "f32",
    "f64",
    "tf32",
    "e4m3",
    "e5m2",
    "e2m3",
    "e3m2",
    "e2m1",
    "ue8m0",
    "ue4m3",
]
TYPE = {name: i for i, name in enumerate(TYPES)}
ROUNDING = {
    name: i for i, name in enumerate(["rn", "rz", "rm", "rp", "rna", "rs", "rni", "rzi", "rmi", "rpi"])
}
SPACES = {
    "global": 1,
    "const": 1,
    "shared": 2,
    "shared::cta": 2,
    "shared::cluster": 2,
    "param": 3,
    "local": 4,
}
SCOPES = ("cta", "cluster", "gpu", "gl", "sys")
WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "bsuf" for bits in (8, 16, 32, 64)} | {"bf16": 16}
HINTS = re.compile(
    r"(L1|L2)::.*|nc|ca|cg|cs|lu|cv|wb|wt|noftz|uni|aligned|sync|volatile|level::.*|unified|collector::.*"
)
OPERATIONS = {
    n: i for i, n in enumerate(["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])
}


def scope_number(name: str) -> int:
    """SCOPE_* of core/emu.h; `membar` calls gpu gl."""
    return {"cta": 1, "cluster": 2, "gpu": 3, "gl": 3, "sys": 4}[name]


class Modifiers:
    """The dot-separated modifiers of an opcode, consumed one by one."""

    def __init__(self, asm: Assembler, names: list[str]):
        self.asm, self.names = asm, names

    def flag(self, *names: str) -> bool:
        return self.take(*names) is not None

    def take(self, *names: str) -> str | None:
        """Remove and return the first of `names` that is present."""
        for name in self.names:
            if name in names:
                self.names.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise self.asm.error(f"a modifier .{' or .'.join(names)} is expected")
        return found

    def match(self, pattern: str) -> str | None:
        """Remove and return the first modifier that matches a whole regular expression."""
        return self.take(*[name for name in self.names if re.fullmatch(pattern, name)])

    def type(self) -> str:
        """The last modifier: the instruction type."""
        if not self.names:
            raise self.asm.error("a type is expected")
        return self.names.pop()

    def finish(self) -> None:
        left = [name for name in self.names if not HINTS.fullmatch(name)]
        if left:
            raise self.asm.error(f"modifier .{left[0]} is not supported")


def opcode(*heads: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for head in heads:
            HANDLERS[head] = handler
        return handler

    return register


def decode(module: ptx.Module, entry: ptx.Entry, library: Library) -> Program:
    """Translate an entry to a Program. Raises ptx.PtxError naming PTX line and source line."""
    asm = Assembler(module, entry, library)
    for index, instruction in enumerate(entry.instructions):
        asm.current = index
        head, *names = instruction.opcode.split(".")
        handler = None
        for length in range(min(len(names), 4), -1, -1):  # the longest registered prefix wins
            handler = HANDLERS.get(".".join([head, *names[:length]]))
            if handler is not None:
                modifiers = Modifiers(asm, names[length:])
                break
        if handler is None:
            raise asm.error(f"instruction {head} is not supported by the emulator")
        try:
            handler(asm, instruction, modifiers)
        except (IndexError, KeyError, ValueError) as error:
            raise asm.error(f"this form is not supported ({type(error).__name__}: {error})") from None
        modifiers.finish()
    return asm.finish()


def lane_width(kind: str) -> int:
    """1, 32 or 64: how a register of a PTX type is kept."""
    return 1 if kind == "pred" else 64 if kind in ("f32x2",) or WIDTHS.get(kind) == 64 else 32


def raw(kind: str) -> str:
    """The sign-agnostic name of an integer type."""
    return f"b{WIDTHS[kind]}" if kind[0] in "bsu" and kind != "bf16" else kind


def emit_typed(
    asm: Assembler, name: str, ins: ptx.Instr, widths: list[str], flags: int = 0, mods: tuple[int, ...] = ()
) -> None:
    """Emit with the first operand as destination; `widths` are the PTX types of the operands."""
    slots = [asm.destination(ins.operands[0], lane_width(widths[0]))]
    slots += [asm.source(o, lane_width(k), k) for o, k in zip(ins.operands[1:], widths[1:], strict=True)]
    asm.emit(name, *slots, flags=flags, mods=mods)


def float_flags(mods: Modifiers) -> int:
    flags = (FTZ if mods.flag("ftz") else 0) | (SAT if mods.flag("sat") else 0)
    return flags | (NAN_OUT if mods.flag("NaN") else 0) | (RELU if mods.flag("relu") else 0)


PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
CODES = {
    "add": 0,
    "sub": 1,
    "mul": 2,
    "div": 3,
    "fma": 4,
    "mad": 4,
    "min": 5,
    "max": 6,
    "neg": 7,
    "abs": 8,
    "ex2": 9,
    "tanh": 10,
}


def float_operation(asm: Assembler, ins: ptx.Instr, mods: Modifiers, head: str, kind: str) -> None:
    """Floating arithmetic of one to three sources, scalar or packed."""
    flags, count = float_flags(mods), len(ins.operands)
    rounding = ROUNDING[mods.take("rn", "rz", "rm", "rp") or "rn"]
    mods.flag("approx", "full")
    code = CODES.get(head, 0)
    if kind in PAIRS:
        name = ("unary_x2", "binary_x2", "ternary_x2")[count - 2]
        emit_typed(asm, name, ins, ["b32"] * count, flags, (TYPE[PAIRS[kind]], code))
    elif kind == "f32x2":
        emit_typed(
            asm, f"{'fma' if head == 'mad' else head}_f32x2", ins, ["f32x2"] * count, flags, (rounding,)
        )
    elif kind in ("f16", "bf16") and head == "fma":
        emit_typed(asm, "fma_16", ins, ["b16"] * count, flags, (TYPE[kind], 4))
    elif kind == "f32" and rounding != 0:
        code = {"sqrt": 5, "rcp": 6}.get(head, code)
        slots = [asm.source(o, 32, kind) for o in ins.operands[1:]]
        slots += [slots[0]] * (3 - len(slots))
        asm.emit(
            "round_f32", asm.destination(ins.operands[0], 32), *slots, flags=flags, mods=(rounding, code)
        )
    elif kind == "f64" and rounding != 0:
        raise asm.error("directed rounding of f64 is not supported")
    else:
        name = "fma" if head == "mad" else f"{head}3" if head in ("min", "max") and count == 4 else head
        emit_typed(asm, f"{name}_{kind}", ins, [kind] * count, flags)


def mixed_operation(asm: Assembler, ins: ptx.Instr, mods: Modifiers, head: str, narrow: str) -> None:
    """add, sub and fma of sm_100: f32 but for the first source, of fma the first two, which are 16 bits wide."""
    flags = float_flags(mods)
    mods.need("rn")
    slots = []
    for i, operand in enumerate(ins.operands[1:]):
        if i < (2 if head == "fma" else 1):
            slots.append(asm.temporary(32))
            mode = (TYPE["f32"], TYPE[narrow], ROUNDING["rn"], 0)
            asm.emit("cvt", slots[-1], asm.source(operand, 32, narrow), mods=mode)
        else:
            slots.append(asm.source(operand, 32, "f32"))
    asm.emit(f"{head}_f32", asm.destination(ins.operands[0], 32), *slots, flags=flags)


@opcode("add", "sub", "min", "max", "neg", "abs", "div", "rem", "fma")
def arithmetic(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    if kind in ("f16", "bf16") and mods.flag("f32"):
        mixed_operation(asm, ins, mods, head, kind)
        return
    if kind[0] in "fb" and kind not in ("b16", "b32", "b64"):
        float_operation(asm, ins, mods, head, kind)
        return
    if mods.flag("sat"):
        head += "_sat"
    kinds = [kind] * len(ins.operands)
    emit_typed(asm, f"{head}_{raw(kind) if head in ('add', 'sub') else kind}", ins, kinds)


@opcode("mul", "mad", "mul24", "mad24")
def multiply(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    if kind[0] == "f" or kind in ("bf16", "bf16x2"):
        float_operation(asm, ins, mods, head, kind)
        return
    half = mods.need("lo", "hi", "wide")
    wide = (
        {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}.get(kind, kind) if half == "wide" else kind
    )
    kinds = [wide, kind, kind] + ([wide] if head == "mad" else [])
    emit_typed(asm, f"{head}_{half}_{raw(kind) if half == 'lo' else kind}", ins, kinds)


@opcode("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def special_function(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    float_operation(asm, ins, mods, ins.opcode.split(".")[0], mods.type())


@opcode("copysign")
def copysign(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    emit_typed(asm, f"copysign_{mods.type()}", ins, ["b32"] * 3)


@opcode("and", "or", "xor", "not", "cnot", "popc", "clz", "brev")
def logic(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    first = "b32" if head in ("popc", "clz") else kind
    emit_typed(asm, f"{head}_{kind}", ins, [first] + [kind] * (len(ins.operands) - 1))


@opcode("shl", "shr")
def shift(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    name = raw(kind) if head == "shl" else kind.replace("b", "u")
    emit_typed(asm, f"{head}_{name}", ins, [kind, kind, "u32"])


@opcode("shf")
def funnel(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    side, mode = mods.need("l", "r"), mods.need("wrap", "clamp")
    emit_typed(asm, f"shf_{side}_{mode}_{mods.type()}", ins, ["b32"] * 4)


@opcode("prmt", "bfind")
def bytes_and_bits(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    emit_typed(asm, f"{ins.opcode.split('.')[0]}_{mods.type()}", ins, ["b32"] * len(ins.operands))


@opcode("lop3")
def logic3(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    *operands, table = ins.operands
    if not isinstance(table, ptx.Imm):
        raise asm.error("the lookup table must be an immediate")
    mods.type()
    slots = [asm.destination(operands[0], 32), *(asm.source(o, 32) for o in operands[1:])]
    asm.emit("lop3_b32", *slots, mods=(table.bits & 255,))


@opcode("bfe", "bfi")
def bit_field(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    head, kind = ins.opcode.split(".")[0], mods.type()
    kinds = [kind] * (len(ins.operands) - 2) + ["u32", "u32"]
    name = "bfe_64" if head == "bfe" and WIDTHS[kind] == 64 else f"{head}_{kind}"
    emit_typed(asm, name, ins, kinds, mods=(int(kind[0] == "s"),))


@opcode("setp")
def compare(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    kind = mods.type()
    comparison = mods.need(
        *[
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "lo",
            "ls",
            "hi",
            "hs",
            "equ",
            "neu",
            "ltu",
            "leu",
            "gtu",
            "geu",
            "num",
            "nan",
        ]
    )
    comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
    boolean = {None: 0, "and": 1, "or": 2, "xor": 3}[mods.take("and", "or", "xor")]
    name = (
        raw(kind)
        if comparison in ("eq", "ne")
        else kind.replace("b", "u")
        if kind in ("b16", "b32", "b64")
        else kind
    )
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, ptx.Pair) else (target, ptx.Sink())
    slots = [asm.destination(first, 1), asm.destination(second, 1)]
    slots += [asm.source(o, lane_width(kind), kind) for o in ins.operands[1:3]]
    if boolean:
        slots.append(asm.source(ins.operands[3], 1))
    asm.emit(f"setp_{comparison}_{name}", *slots, flags=float_flags(mods), mods=(boolean,))


@opcode("selp")
def select(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    kind = mods.type()
    emit_typed(asm, f"selp_b{lane_width(kind)}", ins, [kind, kind, kind, "pred"])


@opcode("mov")
def move(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    kind = mods.type()
    target, value = ins.operands
    if kind == "b128":
        to = (
            [asm.destination(t, 64) for t in target.items]
            if isinstance(target, ptx.Vec)
            else asm.halves(target)
        )
        parts = [asm.source(v, 64) for v in value.items] if isinstance(value, ptx.Vec) else asm.halves(value)
        for slot, part in zip(to, parts, strict=True):
            asm.emit("mov_b64", slot, part)
        return
    width = lane_width(kind)
    if isinstance(target, ptx.Vec):
        name = unpack_name(asm, kind, len(target.items), "unpack")
        asm.emit(name, *(asm.destination(t, 32) for t in target.items), asm.source(value, width, kind))
    elif isinstance(value, ptx.Vec):
        name = unpack_name(asm, kind, len(value.items), "pack")
        asm.emit(name, asm.destination(target, width), *(asm.source(v, 32, "b32") for v in value.items))
    elif isinstance(value, ptx.Reg) and re.fullmatch(
        r"%(clock|clock_hi|clock64|globaltimer|globaltimer_lo)", value.name
    ):
        asm.emit("clock", asm.destination(target, width), mods=(int(width == 64),))
    elif isinstance(value, ptx.Reg) and value.name not in asm.slots and width == 64:
        asm.emit("cvt_u64_u32", asm.destination(target, 64), asm.special(value.name))
    else:
        name = "pred" if width == 1 else f"b{width}"
        asm.emit(f"mov_{name}", asm.destination(target, width), asm.source(value, width, kind))


def unpack_name(asm: Assembler, kind: str, parts: int, head: str) -> str:
    form = {(64, 2): "64", (64, 4): "64x4", (32, 2): "32", (32, 4): "32x4"}.get((WIDTHS[kind], parts))
    if form is None:
        raise asm.error(f"mov.{kind} with {parts} parts is not supported")
    return f"{head}_{form}"


@opcode("cvt")
def convert(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    source, target = mods.type(), mods.type()
    rounding = ROUNDING[mods.take(*ROUNDING) or "rn"]
    saturates = mods.flag("satfinite")
    flags = float_flags(mods) | (NAN_OUT if saturates else 0)
    packed = re.fullmatch(r"(\w+?)x([24])", target)
    if packed and source == "f32":
        values = (
            ins.operands[1].items
            if isinstance(ins.operands[1], ptx.Vec)
            else ins.operands[1 : 1 + int(packed.group(2))]
        )
        randoms = ins.operands[-1:] if rounding == ROUNDING["rs"] else ()
        slots = [asm.source(v, 32, "f32") for v in (*values, *randoms)]
        mode = (TYPE[packed.group(1)], TYPE["f32"], rounding, len(values))
        flags = flags & ~NAN_OUT | (SAT if saturates else 0)
        asm.emit("cvt_pack", asm.destination(ins.operands[0], 32), *slots, flags=flags, mods=mode)
    elif packed and source in PAIRS:
        mode = (TYPE[packed.group(1)], TYPE[PAIRS[source]], rounding, 2)
        flags = flags & ~NAN_OUT | (SAT if saturates else 0)
        emit_typed(asm, "cvt_pack", ins, ["b32", "b32"], flags, mode)
    elif packed and (narrow := re.fullmatch(r"(\w+?)x2", source)):
        emit_typed(
            asm, "cvt_unpack", ins, ["b32", "b32"], flags, (TYPE[packed.group(1)], TYPE[narrow.group(1)])
        )
    else:
        convert_scalar(asm, ins, target, source, flags, rounding)


def convert_scalar(
    asm: Assembler, ins: ptx.Instr, target: str, source: str, flags: int, rounding: int
) -> None:
    """Registers may be wider than the types; what matters is how their lanes are kept."""
    to, value = ins.operands
    target_width = asm.width(to) if isinstance(to, ptx.Reg) else lane_width(target)
    slot = asm.source(value, asm.width(value) if isinstance(value, ptx.Reg) else lane_width(source), source)
    wide_source = isinstance(value, ptx.Reg) and asm.width(value) == 64
    name = f"cvt_{target}_{source}"
    if (
        target[0] in "us" and source[0] in "us"
    ):  # widening depends on the sign of the source, narrowing on none
        sign = source[0] if WIDTHS[target] > WIDTHS[source] else "u"
        name = f"cvt_{sign}{WIDTHS[target]}_{sign}{WIDTHS[source]}"
    exact = (target_width == 64) == (WIDTHS.get(target) == 64) and wide_source == (WIDTHS.get(source) == 64)
    if name in asm.library.opcodes and not flags and exact:
        asm.emit(name, asm.destination(to, target_width), slot)
        return
    flags |= WIDE_DST if target_width == 64 else 0
    asm.emit(
        "cvt",
        asm.destination(to, target_width),
        slot,
        flags=flags,
        mods=(TYPE[target], TYPE[source], rounding, int(wide_source)),
    )


@opcode("bra")
def branch(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    target = ins.operands[0]
    if not isinstance(target, ptx.Sym):
        raise asm.error("a label is expected")
    asm.emit("bra", target=target.name)


@opcode("ret", "exit")
def leave(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit("exit")


@opcode("trap")
def trap(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    asm.emit("trap")


@opcode(
    "nanosleep",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "pmevent",
    "griddepcontrol",
    "cp.async.bulk.prefetch",
)
def no_effect(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    """Hints. Launches run one after another, so griddepcontrol.wait always finds its grids complete."""
    mods.names.clear()
    asm.emit("nop")


@opcode("createpolicy")
def create_policy(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    """Cache policies are hints; the register gets a value so that it is defined."""
    mods.names.clear()
    asm.emit("mov_b64", asm.destination(ins.operands[0], 64), asm.constant(0, 64))


@opcode("setmaxnreg")
def registers(asm: Assembler, ins: ptx.Instr, mods: Modifiers) -> None:
    """The registers that a kernel starts with are known to the assembler only where the block's size is."""
    increases, count = mods.need("inc", "dec") == "inc", ins.operands[0]
    mods.type()
    if not isinstance(count, ptx.Imm) or not 24 <= count.bits <= 256 or count.bits % 8:
        raise asm.error("a multiple of 8 from 24 to 256 is expected")
    if not asm.entry.directives.keys() & {"maxnreg", "reqntid", "maxntid"}:
        raise asm.error("the assembler ignores it without .maxnreg, .reqntid or .maxntid")
    asm.emit("setmaxnreg", mods=(count.bits, int(increases)))
