"""What a compiled kernel uses, read from what was compiled: registers, spills, tensor memory, instructions that matter.

The disassembler is NVIDIA's, as triton's wheel carries it or as it lies on PATH; without one the report has only what
the compiler says.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
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


def resources(cubin: bytes) -> dict[str, Any]:
    """{"kernels": {name: {registers, stack, local}}, "sass": {kind: {opcode: count}}}; empty without the tools."""
    cuobjdump, sass = tool("cuobjdump"), disassemble(cubin)
    if cuobjdump is None or sass is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([str(cuobjdump), "-res-usage", file.name])
    kernels: dict[str, dict[str, int]] = {}
    for name, *numbers in USAGE.findall(usage):
        registers, stack, _, local = map(int, numbers)
        found = {"registers": registers, "stack": stack, "local": local}
        before = kernels.get(_short(name), found)  # one function for other operands: the most of each
        kernels[_short(name)] = {key: max(before[key], found[key]) for key in found}
    return {"kernels": kernels, "sass": count(sass)}


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
    if nvdisasm is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output([str(nvdisasm), "-c", file.name])


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


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
