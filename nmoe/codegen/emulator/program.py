"""Assemble decoded instructions into the arrays that the core runs: registers, constants, control flow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.library import GUARD_NEGATED, INSN, SHARED_BASE, Library


@dataclass
class Line:
    """One core instruction before assembly; `source` is the index of the PTX instruction that it came from."""

    op: int
    operands: tuple[int, ...]
    source: int
    flags: int = 0
    mods: tuple[int, int, int, int] = (0, 0, 0, 0)
    imm: int = 0
    guard: int = -1
    target: str | None = None


@dataclass
class Program:
    """An entry ready to run, with the arrays that the C structure points into.

    `lines` maps core instructions to PTX instructions; `params` gives (offset, size) of each kernel parameter.
    """

    entry: ptx.Entry
    code: np.ndarray
    operands: np.ndarray
    join: np.ndarray
    registers: np.ndarray
    specials: np.ndarray
    lines: np.ndarray
    params: list[tuple[int, int]]
    param_bytes: int
    static_shared: int
    local_bytes: int
    buffers: list[np.ndarray] = field(default_factory=list)

    def instruction(self, pc: int) -> ptx.Instr:
        """The PTX instruction that core instruction `pc` came from."""
        return self.entry.instructions[self.lines[pc]]

    def where(self, pc: int) -> str:
        """`PTX line N: text (file.py:M)` for a core instruction."""
        instruction = self.instruction(pc)
        place = f" ({instruction.source[0]}:{instruction.source[1]})" if instruction.source else ""
        text = instruction.text if len(instruction.text) <= 110 else instruction.text[:107] + "..."
        return f"PTX line {instruction.line}: {text}{place}"


class Assembler:
    """Gives registers, constants and symbols their places, and collects lines. Raises ptx.PtxError."""

    def __init__(self, module: ptx.Module, entry: ptx.Entry, library: Library):
        self.entry, self.library = entry, library
        self.lines: list[Line] = []
        self.current = 0
        self._size = 0
        self._constants: dict[tuple[int, int], int] = {}
        self._specials: dict[int, int] = {}
        self.slots = {name: self._slot(width) for name, width in entry.registers.items()}
        self.sinks = {width: self._slot(width) for width in (1, 32, 64)}
        self.symbols: dict[str, tuple[str, int]] = {}
        self.buffers: list[np.ndarray] = []
        self._place_variables(module.variables + entry.variables)
        self.params, self.param_bytes = self._place_params()

    def _slot(self, width: int) -> int:
        """A place in the register file, in bytes: 32 lanes of 4 or 8 bytes, or one word of predicate bits."""
        size = {1: 4, 64: 256, 128: 512}.get(width, 128)  # the wgmma register check counts in 128 bytes
        alignment = min(size, 128)
        place = (self._size + alignment - 1) // alignment * alignment
        self._size = place + size
        return place

    def _place_variables(self, variables: list[ptx.Variable]) -> None:
        shared, local = SHARED_BASE, 0
        for variable in sorted(variables, key=lambda v: v.size is None):
            size = variable.size or 0
            if variable.space == "shared":
                shared = -(-shared // variable.align) * variable.align
                self.symbols[variable.name] = ("shared", shared)
                shared += size
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.symbols[variable.name] = ("local", local)
                local += size
            else:
                data = np.zeros(size + 256, np.uint8)
                start = -data.ctypes.data % 256
                data[start : start + len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                view = data[start : start + size]
                self.buffers.append(view)
                self.symbols[variable.name] = ("global", view.ctypes.data)
        self.static_shared, self.local_bytes = shared - SHARED_BASE, local

    def _place_params(self) -> tuple[list[tuple[int, int]], int]:
        at, places = 0, []
        for param in self.entry.params:
            at = -(-at // param.align) * param.align
            places.append((at, param.size))
            self.symbols[param.name] = ("param", at)
            at += param.size
        return places, at

    def error(self, message: str) -> ptx.PtxError:
        instruction = self.entry.instructions[self.current]
        place = f" ({instruction.source[0]}:{instruction.source[1]})" if instruction.source else ""
        return ptx.PtxError(f"PTX line {instruction.line}: {message}: {instruction.text}{place}")

    def width(self, operand: ptx.Operand) -> int:
        """1, 32, 64 or 128: how a register operand is kept (immediates and sinks count as 32); 128 is two of 64."""
        if isinstance(operand, ptx.Reg) and operand.name in self.entry.registers:
            declared = self.entry.registers[operand.name]
            return declared if declared in (1, 64, 128) else 32
        return 32

    def constant(self, value: int, width: int) -> int:
        key = (value % (1 << (64 if width == 64 else 32)), width)
        if key not in self._constants:
            self._constants[key] = self._slot(width)
        return self._constants[key]

    def source(self, operand: ptx.Operand, width: int, kind: str = "") -> int:
        """Slot of a value operand of `width` (1, 32, 64); `kind` is the PTX type, for immediates."""
        if isinstance(operand, ptx.Imm):
            return self.constant(-(operand.bits & 1) if width == 1 else immediate(operand, kind), width)
        if isinstance(operand, ptx.Sym):
            return self.symbol(operand, width)
        if not isinstance(operand, ptx.Reg):
            raise self.error(f"a register or immediate is expected, not {operand}")
        if operand.name not in self.slots:
            return self.special(operand.name)
        if self.width(operand) != width:
            raise self.error(f"register {operand.name} does not have the type of this operand ({width} bits)")
        return self.slots[operand.name]

    def halves(self, operand: ptx.Operand) -> tuple[int, int]:
        """Slots of the low and the high 64 bits of a 128-bit register."""
        slot = self.source(operand, 128)
        return slot, slot + 256

    def destination(self, operand: ptx.Operand, width: int) -> int:
        if isinstance(operand, ptx.Sink):
            return self.sinks[width]
        if not isinstance(operand, ptx.Reg) or operand.name not in self.slots:
            raise self.error(f"a register is expected as destination, not {operand}")
        return self.source(operand, width)

    def special(self, name: str) -> int:
        """Slot of a special register; its value is filled in when a warp starts."""
        index = self.library.specials.get(name.removeprefix("%"))
        if index is None:
            raise self.error(f"register {name} is not declared and no known special register")
        return self._special(index)

    def _special(self, kind: int) -> int:
        if kind not in self._specials:
            self._specials[kind] = self._slot(32)
        return self._specials[kind]

    def symbol(self, symbol: ptx.Sym, width: int) -> int:
        if symbol.name not in self.symbols:
            raise self.error(f"unknown symbol {symbol.name}")
        space, address = self.symbols[symbol.name]
        address += symbol.offset
        if space != "shared":
            return self.constant(address, width)
        slot = self._special(-address)
        if width == 64:
            wide = self.temporary(64)
            self.emit("cvt_u64_u32", wide, slot)
            return wide
        return slot

    def temporary(self, width: int) -> int:
        return self._slot(width)

    def address(self, operand: ptx.Operand) -> tuple[int, bool, int]:
        """Slot, whether it is 64 bits wide, and offset of a memory operand."""
        if not isinstance(operand, ptx.Mem):
            raise self.error(f"an address in brackets is expected, not {operand}")
        base = operand.base
        if isinstance(base, ptx.Sym):
            wide = self.symbols.get(base.name, ("", 0))[0] == "global"
            return self.symbol(base, 64 if wide else 32), wide, operand.offset
        wide = self.width(base) == 64
        return self.source(base, 64 if wide else 32), wide, operand.offset

    def narrow_address(self, operand: ptx.Operand) -> tuple[int, int]:
        """Slot of the low 32 bits of a shared address, and offset."""
        slot, wide, offset = self.address(operand)
        if wide:
            narrow = self.temporary(32)
            self.emit("cvt_u32_u64", narrow, slot)
            return narrow, offset
        return slot, offset

    def wide_address(self, operand: ptx.Operand) -> int:
        """Slot of a 64-bit address with the offset already added."""
        slot, wide, offset = self.address(operand)
        if not wide:
            raise self.error("a 64-bit address is expected")
        if offset == 0:
            return slot
        total = self.temporary(64)
        self.emit("add_b64", total, slot, self.constant(offset, 64))
        return total

    def emit(
        self,
        name: str,
        *operands: int,
        flags: int = 0,
        mods: tuple[int, ...] = (),
        imm: int = 0,
        target: str | None = None,
    ) -> None:
        """Append a core instruction under the guard of the current PTX instruction."""
        op = self.library.opcodes.get(name)
        if op is None:
            raise self.error(f"the core has no operation {name}")
        instruction = self.entry.instructions[self.current]
        guard = -1
        if instruction.guard is not None:
            guard = self.source(instruction.guard, 1)
            flags |= GUARD_NEGATED if instruction.guard_negated else 0
        padded = tuple(mods) + (0,) * (4 - len(mods))
        self.lines.append(Line(op, operands, self.current, flags, padded, imm, guard, target))  # type: ignore[arg-type]

    def finish(self) -> Program:
        """Resolve labels, compute reconvergence points, lay out the arrays."""
        first = np.searchsorted(
            [line.source for line in self.lines], np.arange(len(self.entry.instructions) + 1)
        )
        labels = {name: int(first[index]) for name, index in self.entry.labels.items()}
        exit_op, branch, indexed = (self.library.opcodes[name] for name in ("exit", "bra", "brx"))
        successors: list[list[int]] = []
        constants = {slot: value for (value, _), slot in self._constants.items()}
        for at, line in enumerate(self.lines):
            following = [at + 1] if at + 1 < len(self.lines) else []
            if line.op == branch:
                if line.target not in labels:
                    self.current = line.source
                    raise self.error(f"unknown label {line.target}")
                line.imm = labels[line.target]
                following = [line.imm, *(following if line.guard >= 0 else [])]
            elif line.op == exit_op:
                following = following if line.guard >= 0 else []
            elif line.op == indexed:
                following = [constants[slot] for slot in line.operands[1:]]
            successors.append(following)
        code = np.zeros(len(self.lines), INSN)
        pool: list[int] = []
        for at, line in enumerate(self.lines):
            code[at] = (line.op, line.flags, len(line.operands), line.guard, len(pool), *line.mods, line.imm)
            pool += line.operands
        self._size = -(-self._size // 64) * 64
        registers = np.zeros(self._size, np.uint8)
        for (value, width), slot in self._constants.items():
            if width == 1:
                registers[slot : slot + 4].view(np.uint32)[:] = value
            elif width == 64:
                registers[slot : slot + 256].view(np.uint64)[:] = value
            else:
                registers[slot : slot + 128].view(np.uint32)[:] = value
        specials = np.array(list(self._specials.items()) or np.zeros((0, 2)), np.int32).reshape(-1, 2)
        return Program(
            self.entry,
            code,
            np.array([*pool, 0, 0, 0, 0], np.uint32),
            post_dominators(successors).astype(np.int32),
            registers,
            np.ascontiguousarray(specials),
            np.array([line.source for line in self.lines], np.int32),
            self.params,
            self.param_bytes,
            self.static_shared,
            self.local_bytes,
            self.buffers,
        )


def immediate(operand: ptx.Imm, kind: str) -> int:
    """Bits of an immediate as an operand of a PTX type: floats are converted to the width of the type."""
    if operand.is_float and operand.width == 64 and kind in ("f32", "f32x2"):
        return int(np.float64(np.uint64(operand.bits).view(np.float64)).astype(np.float32).view(np.uint32))
    if operand.is_float and operand.width == 32 and kind == "f64":
        return int(np.uint32(operand.bits).view(np.float32).astype(np.float64).view(np.uint64))
    if kind in ("u16", "s16", "b16"):
        return operand.bits % (1 << 16)
    return operand.bits


def post_dominators(successors: list[list[int]]) -> np.ndarray:
    """Immediate post-dominator of every instruction, -1 where paths meet only at the exit.

    Iterative data flow on the reversed graph in post-order (Cooper, Harvey, Kennedy: "A Simple, Fast Dominance
    Algorithm", 2001); the virtual exit node follows every instruction that has no successor.
    """
    count = len(successors)
    leave = count
    predecessors: list[list[int]] = [[] for _ in range(count + 1)]
    for at, following in enumerate(successors):
        for to in following or [leave]:
            predecessors[to].append(at)
    order, seen, stack = [], {leave}, [(leave, iter(predecessors[leave]))]
    while stack:
        node, rest = stack[-1]
        for previous in rest:
            if previous not in seen:
                seen.add(previous)
                stack.append((previous, iter(predecessors[previous])))
                break
        else:
            order.append(node)
            stack.pop()
    rank = {node: i for i, node in enumerate(order)}
    immediate_of = {leave: leave}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] < rank[b]:
                a = immediate_of[a]
            while rank[b] < rank[a]:
                b = immediate_of[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [to for to in successors[node] or [leave] if to in immediate_of]
            best = known[0]
            for other in known[1:]:
                best = meet(best, other)
            if immediate_of.get(node) != best:
                immediate_of[node] = best
                changed = True
    result = np.full(count, -1)
    for node, dominator in immediate_of.items():
        if node != leave and dominator != leave:
            result[node] = dominator
    return result
