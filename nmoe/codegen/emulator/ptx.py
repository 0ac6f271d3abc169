"""Parse PTX text into entries of instructions; nothing here knows what an instruction means.

The grammar is the subset that NVVM emits for CuTeDSL kernels and that hand-written tests use: module
directives, `.entry` functions, nested `{}` scopes (inline assembly) with their own registers and labels,
`.loc` line information, and instructions of the form `[@[!]p] opcode operand, ...;`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from nmoe.errors import UserError


class PtxError(UserError):
    """The PTX text is malformed or uses something that the emulator does not know; names the line."""


@dataclass(frozen=True)
class Reg:
    """A register by its declared name, unique inside the entry (scoped names carry a suffix)."""

    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate as raw bits; `is_float` tells that the bits are an IEEE pattern of `width` bits."""

    bits: int
    is_float: bool = False
    width: int = 64


@dataclass(frozen=True)
class Sym:
    """A named address (shared or global variable, parameter, function) plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    """A `[base+offset]` operand; coordinates of a tensor copy are kept as the second bracket item."""

    base: Operand
    offset: int = 0
    coords: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vec:
    """A `{a, b, ...}` operand."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """A `d|p` operand: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """The `_` operand: a destination that is thrown away."""


Operand = Reg | Imm | Sym | Mem | Vec | Pair | Sink


@dataclass(frozen=True)
class Instr:
    """One instruction; `line` counts from 1 in the PTX text, `source` is (file, line) of the Python code."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Reg | None
    guard_negated: bool
    line: int
    source: tuple[str, int] | None
    text: str


@dataclass
class Variable:
    """A shared, global, constant or local variable; `size` is None for the dynamic shared-memory symbol."""

    name: str
    space: str
    align: int
    size: int | None
    data: bytes = b""


@dataclass
class Param:
    name: str
    align: int
    size: int


@dataclass
class Entry:
    """One `.entry`: registers as name → width in bits (1 for predicates), labels as name → instruction index."""

    name: str
    params: list[Param]
    registers: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Module:
    target: str
    entries: dict[str, Entry]
    variables: list[Variable]
    files: dict[int, str]


_WIDTHS = {"pred": 1, "b8": 8, "s8": 8, "u8": 8, "b16": 16, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
_WIDTHS |= {
    "b32": 32,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "f16x2": 32,
    "b64": 64,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
_WIDTHS |= {"b128": 128}
_NAME = r"[%$A-Za-z_][\w$.%:]*"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_GUARD = re.compile(r"@(!?)\s*(%?[\w$]+)\s+")
_REG_DECL = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(?:v([24])\s+)?\.?(\w+)\s+([\w$]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)\s*(?:\[(\d+)\])?"
)
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{]*)\{", re.DOTALL)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')


def parse(text: str) -> Module:
    """Parse a whole PTX file. Raises PtxError naming the line."""
    clean = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
    target = re.search(r"\.target\s+(\w+)", clean)
    if target is None:
        raise PtxError(
            "PTX line 1: no .target directive; expected the text that cute.compile keeps with --keep-ptx"
        )
    files = {int(n): path for n, path in _FILE.findall(clean)}
    module = Module(target.group(1), {}, [], files)
    position = 0
    while (found := _ENTRY.search(clean, position)) is not None:
        module.variables += _module_variables(clean[position : found.start()])
        end = _matching_brace(clean, found.end() - 1)
        entry = _Body(clean, found, files).parse(end)
        module.entries[entry.name] = entry
        position = end + 1
    return module


def _module_variables(text: str) -> list[Variable]:
    found = []
    for statement in text.split(";"):
        start = re.search(r"(?:\.extern\s+|\.visible\s+)?\.(?:shared|global|const)\b", statement)
        if start:
            found.append(_variable(statement[start.start() :].strip()))
    return found


def _variable(statement: str) -> Variable:
    match = _VARIABLE.match(statement)
    if match is None:
        raise PtxError(f"unknown variable declaration: {statement!r}")
    space, align, vector, kind, name, dims, init = match.groups()
    element = _WIDTHS[kind] // 8 * int(vector or 1)
    sizes = re.findall(r"\[\s*(\d*)\s*\]", dims)
    size: int | None = element
    for dim in sizes:
        size = None if dim == "" or size is None else size * int(dim)
    data = b""
    if init:
        values = [int(v, 0) for v in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", init)]
        data = b"".join((v % (1 << 8 * element)).to_bytes(element, "little") for v in values)
    return Variable(name, space, int(align or element), size, data)


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    raise PtxError(f"PTX line {text.count(chr(10), 0, start) + 1}: unbalanced braces")


class _Body:
    """Walks one entry's text statement by statement, keeping scopes, lines and the current `.loc`."""

    def __init__(self, text: str, head: re.Match[str], files: dict[int, str]):
        self.text, self.at, self.files = text, head.end(), files
        params = [
            Param(name, int(align or _WIDTHS[kind] // 8), _WIDTHS[kind] // 8 * int(count or 1))
            for align, kind, name, count in _PARAM.findall(head.group(2) or "")
        ]
        self.entry = Entry(head.group(1), params)
        for name, values in re.findall(r"\.(\w+)((?:\s*,?\s*\d+)*)", head.group(3)):
            self.entry.directives[name] = tuple(int(v) for v in re.findall(r"\d+", values))
        self.line = text.count("\n", 0, self.at) + 1
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.source: tuple[str, int] | None = None

    def parse(self, end: int) -> Entry:
        labels = self._collect_labels(end)
        while (item := self._next(end)) is not None:
            kind, value, line = item
            if kind == "open":
                self.scope_count += 1
                self.scopes.append(labels.get(self.scope_count, {}))
            elif kind == "close":
                self.scopes.pop()
            elif kind == "label":
                self.entry.labels[self._resolve(value)] = len(self.entry.instructions)
            elif value.startswith("."):
                self._directive(value, line)
            else:
                self.entry.instructions.append(self._instruction(value, line))
        return self.entry

    def _collect_labels(self, end: int) -> dict[int, dict[str, str]]:
        """Labels may be used before they are defined, so a first pass finds the labels of every scope."""
        saved = self.at, self.line
        found: dict[int, dict[str, str]] = {}
        stack, count = [0], 0
        while (item := self._next(end)) is not None:
            kind, value, _ = item
            if kind == "open":
                count += 1
                stack.append(count)
            elif kind == "close":
                stack.pop()
            elif kind == "label" and stack[-1]:
                found.setdefault(stack[-1], {})[value] = f"{value}@{stack[-1]}"
        self.at, self.line = saved
        return found

    def _next(self, end: int) -> tuple[str, str, int] | None:
        """The next scope brace, label or statement (to `;`, or to the line's end for `.loc`) with its line."""
        text = self.text
        while self.at < end and text[self.at].isspace():
            self.line += text[self.at] == "\n"
            self.at += 1
        if self.at >= end:
            return None
        line = self.line
        if text[self.at] in "{}":
            self.at += 1
            return ("open" if text[self.at - 1] == "{" else "close"), "", line
        label = re.compile(r"([$A-Za-z_][\w$]*)\s*:(?!:)").match(text, self.at)
        if label:
            self.at = label.end()
            return "label", label.group(1), line
        stop = text.find("\n" if re.compile(r"\.(loc|pragma)\b").match(text, self.at) else ";", self.at, end)
        if stop < 0:
            raise PtxError(f"PTX line {line}: statement without an end: {text[self.at : self.at + 60]!r}")
        statement = text[self.at : stop]
        self.line += statement.count("\n")
        self.at = stop + (text[stop] == ";")
        return "statement", " ".join(statement.split()), line

    def _directive(self, statement: str, line: int) -> None:
        if statement.split()[0] == ".loc":
            number, source_line = statement.split()[1:3]
            self.source = (self.files.get(int(number), f"file {number}"), int(source_line))
        elif match := _REG_DECL.match(statement):
            width = _WIDTHS.get(match.group(1))
            if width is None:
                raise PtxError(f"PTX line {line}: unknown register type .{match.group(1)}")
            for name in match.group(2).split(","):
                self._declare(name.strip(), width)
        elif re.match(r"\.(shared|local|const|global)\b", statement):
            self.entry.variables.append(_variable(statement))
        elif not statement.startswith((".pragma", ".branchtargets")):
            raise PtxError(f"PTX line {line}: unknown directive {statement.split()[0]!r}")

    def _declare(self, name: str, width: int) -> None:
        if many := re.match(r"(.*)<(\d+)>$", name):
            for i in range(int(many.group(2))):
                self.entry.registers[f"{many.group(1)}{i}"] = width
            return
        unique = name if len(self.scopes) == 1 else f"{name}@{self.scope_count}"
        self.scopes[-1][name] = unique
        self.entry.registers[unique] = width

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self, statement: str, line: int) -> Instr:
        guard = _GUARD.match(statement)
        body = statement[guard.end() :] if guard else statement
        opcode, _, rest = body.partition(" ")
        try:
            operands = tuple(self._operand(part) for part in split_operands(rest))
        except ValueError as error:
            raise PtxError(f"PTX line {line}: {error} in {statement!r}") from None
        return Instr(
            opcode,
            operands,
            Reg(self._resolve(guard.group(2))) if guard else None,
            bool(guard and guard.group(1)),
            line,
            self.source,
            statement,
        )

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vec(tuple(self._operand(p) for p in split_operands(text[1:-1])))
        if text.startswith("["):
            first, *more = split_operands(text[1:-1])
            base, offset = self._address(first)
            coords: tuple[Operand, ...] = ()
            if more:
                vector = self._operand(more[0])
                coords = vector.items if isinstance(vector, Vec) else (vector,)
                coords += tuple(self._operand(p) for p in more[1:])
            return Mem(base, offset, coords)
        if "|" in text:
            left, right = text.split("|")
            return Pair(self._operand(left), self._operand(right))
        if text.startswith("!"):
            raise ValueError(f"negated operand {text!r} is not supported")
        if (number := _number(text)) is not None:
            return number
        base, offset = self._address(text)
        return Sym(base.name, offset) if isinstance(base, Sym) else base

    def _address(self, text: str) -> tuple[Operand, int]:
        match = re.match(rf"({_NAME})\s*(?:\+\s*(-?\w+))?$", text.strip())
        if match is None:
            if (number := _number(text.strip())) is not None:
                return number, 0
            raise ValueError(f"unknown operand {text!r}")
        name, offset = self._resolve(match.group(1)), int(match.group(2) or "0", 0)
        known = name in self.entry.registers or name.startswith("%")
        return (Reg(name) if known else Sym(name)), offset


def split_operands(text: str) -> list[str]:
    """Split at top-level commas; brackets and braces nest."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if text.strip():
        parts.append(text[start:])
    return parts


def _number(text: str) -> Imm | None:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Imm(int(match.group(1), 16), True, 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Imm(int(match.group(1), 16), True, 64)
    if match := re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|0[0-7]*|[1-9]\d*)U?", text):
        digits = match.group(2)
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return Imm(-value if match.group(1) else value)
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], True, 64)
    return None
