"""What a compiled kernel uses, read from what was compiled: registers, spills, tensor memory, instructions that matter.

The disassembler is NVIDIA's, as triton's wheel carries it or as it lies on PATH; without one the report has only what
the compiler says.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

# Instructions by what they are for: products, tensor copies, local memory (spills).
PATTERNS = {
    "mma": re.compile(r"^(HGMMA|UTC[HQO]MMA)\b"),
    "tma": re.compile(r"^(UTMALDG|UTMASTG|UTMAREDG|UTMACMDFLUSH|UBLKCP)\b"),
    "tensor memory": re.compile(r"^(LDTM|STTM|UTCATOMSWS|UTCBAR|UTCCP)\b"),
    "local": re.compile(r"^(LDL|STL)\b"),
}
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
CONSTANT = re.compile(r"mov\.b32\s+(%r\d+), (\d+);")
EXPECTED = re.compile(r"mbarrier\.arrive\.expect_tx\S* [^;]*, (%?\w+);")
ALLOCATED = re.compile(r"tcgen05\.alloc\S*\s+[^;]*, (%?\w+);")
EXECUTABLE = 4  # an ELF section's flag
INSTRUCTION = 16  # bytes
USAGE = re.compile(r"Function ([^:]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm, if there is one."""
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if carried.exists():
            return carried
    found = shutil.which(name)
    return Path(found) if found else None


def resources(artifacts: Sequence[Sequence[bytes]], target: str) -> list[dict[str, Any]]:
    """Of the cubins of each artifact {"kernels": {name: {registers, stack, local}}, "sass": {kind: {opcode: count}}};
    empty without the tools. `target`: that of all."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None or not artifacts:
        return [{} for _ in artifacts]
    codes = [b"".join(map(_code, cubins)) for cubins in artifacts]
    # One file of instructions, so that nvdisasm starts once: a line each, in their order.
    text = _output([str(nvdisasm), "-b", target.replace("sm_", "SM")], b"".join(codes))
    lines = [line for line in text.splitlines() if line.lstrip().startswith("/*")]
    assert len(lines) * INSTRUCTION == sum(map(len, codes)), "an instruction is a line"
    each = iter(lines)
    return [
        {
            "kernels": _usage(cuobjdump, cubins),
            "sass": count("\n".join(islice(each, len(code) // INSTRUCTION))),
        }
        for cubins, code in zip(artifacts, codes, strict=True)
    ]


def _usage(cuobjdump: Path, cubins: Sequence[bytes]) -> dict[str, dict[str, int]]:
    """Of one function for several operands: the most of each."""
    kernels: dict[str, dict[str, int]] = {}
    for cubin in cubins:
        for name, *numbers in USAGE.findall(_output([str(cuobjdump), "-res-usage"], cubin)):
            registers, stack, _, local = map(int, numbers)
            found = {"registers": registers, "stack": stack, "local": local}
            before = kernels.get(_short(name), found)
            kernels[_short(name)] = {key: max(before[key], found[key]) for key in found}
    return kernels


def _code(cubin: bytes) -> bytes:
    """The executable sections of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = (struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count))
    return b"".join(cubin[at : at + length] for *_, flags, _, at, length in sections if flags & EXECUTABLE)


def stated(ptx: str) -> dict[str, Any]:
    """{"tensor_columns": columns of tensor memory that a thread block takes, "expected_bytes": what barriers are told
    to wait for}, from the PTX, which states both as constants."""
    constants = dict(CONSTANT.findall(ptx))

    def numbers(pattern: re.Pattern[str]) -> set[int]:
        return {int(constants.get(operand, operand)) for operand in pattern.findall(ptx)}

    return {"tensor_columns": sum(numbers(ALLOCATED)), "expected_bytes": sorted(numbers(EXPECTED))}


def disassemble(cubin: bytes) -> str | None:
    """The machine code as text, or None without nvdisasm."""
    nvdisasm = tool("nvdisasm")
    return _output([str(nvdisasm), "-c"], cubin) if nvdisasm else None


def count(sass: str) -> dict[str, dict[str, int]]:
    """Instructions of the kinds in PATTERNS, by opcode with its modifiers."""
    opcodes = Counter(OPCODE.findall(sass))
    return {
        kind: {op: n for op, n in sorted(opcodes.items()) if pattern.match(op)}
        for kind, pattern in PATTERNS.items()
    }


def _short(name: str) -> str:
    """ "kernel_cutlass_sum_partials_nmoe…" → "sum_partials"."""
    found = re.match(r"kernel_cutlass_(\w+?)_nmoe", name)
    return found.group(1) if found else name


def _output(command: list[str], content: bytes) -> str:
    """What a tool prints of a file with this content, whose name is its last argument."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def cells(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a kernel's line: config, registers a thread, bytes spilled, shared memory, columns of tensor memory, stages,
    products in the machine code. What consists of several kernels shows the most that one of them takes."""
    kernels = report.get("kernels", {}).values()
    spilled = max((used["stack"] + used["local"] for used in kernels), default=0)
    products = (f"{n}x {opcode}" for opcode, n in report.get("sass", {}).get("mma", {}).items())
    return (
        report["config"],
        str(max((used["registers"] for used in kernels), default="?")),
        f"{spilled} B" if kernels else "?",
        f"{report['shared_bytes'] / 1024:.1f} KB",
        str(report["tensor_columns"] or "-"),
        str(report["stages"] or "-"),
        " ".join(products) or "-",
    )


COLUMNS = ("config", "registers", "spilled", "shared", "tmem", "stages", "products")
