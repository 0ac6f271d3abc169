"""From a spec and a config to an artifact: a shared object that launches the kernel, its PTX and its report.

Needs nvidia-cutlass-dsl, triton and gcc, and no GPU. The object needs only CuTeDSL's runtime library and TVM-FFI
(launch.py). cute.compile is not thread-safe: one call at a time in a process; build.py uses several.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from nmoe.codegen import triton
from nmoe.codegen.cache import FORMAT, FUNCTION, Cache, Entry
from nmoe.codegen.problem import Config, Operand, Problem
from nmoe.codegen.rails import linked
from nmoe.codegen.report import resources, stated
from nmoe.errors import UserError

# Exactly the versions that the templates were verified with; part of every key.
TOOLCHAIN = {"nvidia-cutlass-dsl": "4.8.1", "apache-tvm-ffi": "0.1.15.post2"}
COMPILER = "dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir*.so"  # what a machine that only runs may lack
TRITON = {"triton": "3.6.0"}  # that of templates in Triton
PACKAGE = Path(__file__).parents[1]
IMPORT = re.compile(r"^\s*from (nmoe[.\w]*) import (?:\(([^)]*)\)|([^\n#]*))", re.MULTILINE)


class CompilerError(UserError):
    """Kernels cannot be compiled here, or one failed to compile."""


@cache
def sources(template: str, *others: str) -> str:
    """SHA-256 of the sources that a template module generates code from: its own, those of the modules `others`, and
    what they import, at any remove, of nmoe.codegen and nmoe.storage."""
    found: dict[str, str] = {}
    wanted = [f"nmoe.codegen.templates.{template}", *others]
    while wanted:
        module = wanted.pop()
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        generates = module.startswith("nmoe.codegen.") or module == "nmoe.storage"
        if generates and module not in found and path.exists():
            found[module] = path.read_text()
            for parent, several, one in IMPORT.findall(found[module]):
                names = (name.strip() for name in (several or one).split(","))
                wanted += [parent, *(f"{parent}.{name}" for name in names)]
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(f"{module}\0{found[module]}\0".encode())
    return digest.hexdigest()


def problem_key(problem: Problem, config: Config | None, target: str) -> str:
    """Names an artifact: the SHA-256 of all that its content depends on, token counts not among it. Without a config
    it names what is known of them all (autotune/records.py)."""
    modules = [problem.template(target).split(".")[0]]
    modules += ["nmoe.codegen.triton"] if problem.language == "triton" else []
    parts: dict[str, Any] = {
        "family": problem.family, "problem": asdict(problem), "config": config and config.json(), "target": target,
        "sources": sources(*modules), "toolchain": TOOLCHAIN, "host": "x86_64-linux",
        "format": FORMAT,
    }  # fmt: skip
    if problem.language == "triton":
        parts["toolchain"] = TRITON
        parts["launches"] = config and [
            (x.function, x.arguments, dict(x.constants), x.warps, x.stages) for x in problem.launches(config)
        ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_toolchain() -> None:
    """Raises CompilerError when the compiler, in its pinned version, or gcc is missing."""
    for package, wanted in (TOOLCHAIN | TRITON).items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found != wanted:
            raise CompilerError(
                f"kernels are compiled with {package} {wanted}, found {found}: pip install {package}=={wanted}"
            )
    if not any(next(root.glob(COMPILER), None) for root in map(Path, _package_folders())):
        raise CompilerError(
            "kernels are compiled with nvidia-cutlass-dsl, found its runtime library alone (no "
            f"{Path(COMPILER).name}): pip install --force-reinstall nvidia-cutlass-dsl, in the same version"
        )
    if shutil.which("gcc") is None:
        raise CompilerError("kernels are linked with gcc, found none: apt-get install gcc")


def _package_folders() -> list[str]:
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    return list(found.submodule_search_locations or ()) if found else []


def compile_problem(problem: Problem, config: Config, target: str, cache: Cache) -> Entry:
    """The problem's artifact from the cache, built if it is not there."""
    (found,) = compile_problems([(problem, config)], target, cache)
    if isinstance(found, Exception):
        raise found
    return found


def compile_problems(
    work: Sequence[tuple[Problem, Config]], target: str, cache: Cache
) -> list[Entry | Exception]:
    """Each problem's artifact from the cache, built if it is not there, or why it could not be. What is built is
    disassembled in one go, since the disassembler takes a third of a second to start."""
    keys = [problem_key(problem, config, target) for problem, config in work]
    found: list[Entry | Exception | None] = [cache.get(key, target) for key in keys]
    if None in found:
        check_toolchain()
    made: dict[int, tuple[dict[str, bytes], dict[str, Any]]] = {}
    for i, (problem, config) in enumerate(work):
        if found[i] is None:
            try:
                made[i] = _make(problem, config, target)
            except Exception as error:
                found[i] = error
    used = resources([_cubins(files) for files, _ in made.values()], target)
    for (i, (files, report)), more in zip(made.items(), used, strict=True):
        found[i] = cache.put(keys[i], target, files, report | more)
    return [entry for entry in found if entry is not None]


def _make(problem: Problem, config: Config, target: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """An artifact's files and its report, but for what the machine code tells."""
    problem.require_legal(config, target)
    begin = time.monotonic()
    if problem.language == "triton":
        files, known = triton.generate(problem, config, target)
    else:
        files = generate(problem, config, target)
        text = files["kernel.ptx"].decode()
        known = entry(text) if linked(problem) else stated(text)
    return files, {
        "family": problem.family, "problem": asdict(problem), "target": target, "config": str(config),
        "stages": getattr(config, "stages", 0), "shared_bytes": problem.shared_bytes(config, target), **known,
        "seconds": round(time.monotonic() - begin, 2),
    }  # fmt: skip


def _cubins(files: Mapping[str, bytes]) -> list[bytes]:
    return [data for name, data in files.items() if name.endswith(".cubin")]


def generate(problem: Problem, config: Config, target: str) -> dict[str, bytes]:
    """kernel.so, kernel.ptx and kernel.cubin of a CuTeDSL template; no kernel.so of what the driver launches."""
    compiled = trace(problem, config, target)
    check_ptx(compiled.__ptx__)
    files = {"kernel.ptx": compiled.__ptx__.encode(), "kernel.cubin": compiled.__cubin__}
    if linked(problem):
        return files
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled.export_to_c(str(folder / "kernel.o"), FUNCTION)
        library = folder / "kernel.so"
        done = subprocess.run(
            ["gcc", "-shared", "-o", str(library), str(folder / "kernel.o")], capture_output=True, text=True
        )
        if done.returncode:
            raise CompilerError(f"gcc could not link a kernel: {done.stderr.strip()}")
        return files | {"kernel.so": library.read_bytes()}


def entry(text: str) -> dict[str, Any]:
    """The symbol of a PTX text's kernel, and the threads that a block of it has."""
    found = re.search(r"\.entry\s+(\w+).*?\.reqntid\s+(\d+)", text, re.DOTALL)
    assert found, "a kernel states its threads"
    return {"symbol": found[1], "threads": int(found[2])}


def check_ptx(text: str) -> None:
    """Raises CompilerError where ptxas would miscompile: of a register that is twice the same pair of FP8 codes, 12.8
    and later make one F2FP.PACK_AB_MERGE_C, half of which is undefined."""
    pairs = set(re.findall(r"cvt\.rn\.satfinite\.e\dm\dx2\.f32\s+(%rs\d+)", text))
    if lost := pairs & set(re.findall(r"mov\.b32\s+%r\d+, \{\s*(%rs\d+), \1\s*\}", text)):
        raise CompilerError(
            f"a kernel's PTX makes a register of twice the pair of codes {min(lost)}, of which ptxas loses one: "
            "convert each value once (templates/nvfp4.py, square_scales)"
        )


def trace(problem: Problem, config: Config, target: str, options: str = "") -> Any:
    """CuTeDSL's compiled function, its PTX and machine code. Arguments: the problem's operands, clusters, stream. It is
    exported or emulated, never called, and so not loaded here."""
    os.environ.pop("CUTE_DSL_ARCH", None)  # read at import; the option must stand alone
    from cutlass import Int32, cute
    from cutlass.cute.runtime import make_fake_stream

    module, name = problem.template(target).split(".")
    template = getattr(importlib.import_module(f"nmoe.codegen.templates.{module}"), name)(problem, config)
    if hasattr(template, "ptxas"):
        options += f" --ptxas-options={template.ptxas}"
    extents: dict[int, Any] = {}
    arguments = [_fake(operand, extents) for operand in problem.operands(config)]
    with tempfile.TemporaryDirectory() as folder:  # the compiler writes what it keeps there as well
        return cute.compile(
            template, *arguments, Int32(1), make_fake_stream(), no_jit_engine=True,
            options=f"--enable-tvm-ffi --gpu-arch={target} --keep-ptx --keep-cubin --dump-dir={folder} {options}",
        )  # fmt: skip


def _fake(operand: Operand, extents: dict[int, Any]) -> Any:
    """A row-major tensor of the operand's type, or a scalar. Each dynamic extent is one symbol in all operands."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_tensor

    kind = {"bf16": cutlass.BFloat16, "f32": cutlass.Float32, "i32": cutlass.Int32, "i64": cutlass.Int64,
            "u8": cutlass.Uint8, "e4m3": cutlass.Float8E4M3FN, "bool": cutlass.Boolean}[operand.format]  # fmt: skip
    if not operand.shape:
        return kind(1)
    shape = []
    for extent in operand.shape:
        if extent < 0 and extent not in extents:
            extents[extent] = cute.sym_int()
        shape.append(extents[extent] if extent < 0 else extent)
    strides: list[Any] = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent if strides[0] != 1 else extent)
    return make_fake_tensor(kind, tuple(shape), tuple(strides), assumed_align=16)
