"""From a spec and a config to an artifact: a shared object that launches the kernel, its PTX and its report.

Needs nvidia-cutlass-dsl and gcc, and no GPU. The object needs only CuTeDSL's runtime library and TVM-FFI (launch.py).
cute.compile is not thread-safe: one call at a time in a process; build.py uses several.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from nmoe import autotune
from nmoe.codegen import gemm
from nmoe.codegen.cache import FUNCTION, Cache, Entry
from nmoe.codegen.gemm import GemmConfig, GemmProblem, Operand
from nmoe.codegen.report import resources
from nmoe.codegen.spec import KernelSpec
from nmoe.errors import UserError

# Exactly the versions that the templates were verified with; part of every key.
TOOLCHAIN = {"nvidia-cutlass-dsl": "4.8.1", "apache-tvm-ffi": "0.1.15.post2"}
TEMPLATES = {"sm_90a": "sm90_gemm", "sm_100a": "sm100_gemm"}
FOLDER = Path(__file__).parent


class CompilerError(UserError):
    """Kernels cannot be compiled here, or one failed to compile."""


def unsupported(spec: KernelSpec) -> str | None:
    """Why no template builds a spec, or None when one does."""
    found = gemm.match(spec)
    if isinstance(found, str):
        return found
    if spec.target not in TEMPLATES:
        return f"no template for {spec.target} yet"
    return None


@cache
def sources(target: str) -> str:
    """SHA-256 of the sources that the target's kernels are generated from."""
    others = {f"{name}.py" for arch, name in TEMPLATES.items() if arch != target}
    files = [FOLDER / "gemm.py", FOLDER / "compiler.py"]
    files += [path for path in sorted((FOLDER / "templates").glob("*.py")) if path.name not in others]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def problem_key(problem: GemmProblem, config: GemmConfig, target: str) -> str:
    """Names an artifact: the SHA-256 of all that its content depends on, token counts not among it."""
    parts = {
        "problem": asdict(problem), "config": config.json(), "target": target,
        "sources": sources(target), "toolchain": TOOLCHAIN, "host": "x86_64-linux",
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_toolchain() -> None:
    """Raises when the compiler, in its pinned version, or gcc is missing."""
    for package, wanted in TOOLCHAIN.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found != wanted:
            raise CompilerError(
                f"kernels are compiled with {package} {wanted}, found {found}: pip install {package}=={wanted}"
            )
    if shutil.which("gcc") is None:
        raise CompilerError("kernels are linked with gcc, found none: apt-get install gcc")


def compile_kernel(spec: KernelSpec, config: GemmConfig, cache: Cache) -> Entry:
    """The spec's artifact from the cache, built if it is not there. Specs that state one problem share it."""
    if reason := unsupported(spec):
        raise CompilerError(f"{spec.name} {spec.key}: {reason}")
    problem = gemm.match(spec)
    assert isinstance(problem, GemmProblem)
    return compile_problem(problem, config, spec.target, cache)


def compile_problem(problem: GemmProblem, config: GemmConfig, target: str, cache: Cache) -> Entry:
    key = problem_key(problem, config, target)
    if found := cache.get(key, target):
        return found
    gemm.require_legal(problem, config, target)
    check_toolchain()
    begin = time.monotonic()
    files = generate(problem, config, target)
    cubin = files.pop("kernel.cubin")
    report = {
        "problem": asdict(problem), "target": target, "config": str(config), "tuning": "untuned",
        "shared_bytes": gemm.shared_bytes(problem, config, target),
        "predicted": autotune.predict(problem, config, target), **resources(cubin),
        "seconds": round(time.monotonic() - begin, 2),
    }  # fmt: skip
    return cache.put(key, target, files, report)


def generate(problem: GemmProblem, config: GemmConfig, target: str) -> dict[str, bytes]:
    """kernel.so, kernel.ptx and kernel.cubin."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = trace(problem, config, target, f"--keep-ptx --keep-cubin --dump-dir={folder}")
        compiled.export_to_c(str(folder / "kernel.o"), FUNCTION)
        library = folder / "kernel.so"
        done = subprocess.run(
            ["gcc", "-shared", "-o", str(library), str(folder / "kernel.o")], capture_output=True, text=True
        )
        if done.returncode:
            raise CompilerError(f"gcc could not link a kernel: {done.stderr.strip()}")
        return {"kernel.so": library.read_bytes(), "kernel.ptx": compiled.__ptx__.encode(),
                "kernel.cubin": compiled.__cubin__}  # fmt: skip


def trace(problem: GemmProblem, config: GemmConfig, target: str, options: str) -> Any:
    """CuTeDSL's compiled function; arguments: the problem's operands, clusters, stream."""
    os.environ.pop("CUTE_DSL_ARCH", None)  # read at import; the option must stand alone
    from cutlass import Int32, cute
    from cutlass.cute.runtime import make_fake_stream

    operands = problem.operands(config.tile_n)
    rows = cute.sym_int()
    arguments = [_fake(operand, rows) for operand in operands]
    return cute.compile(
        _template(target)(problem, config), *arguments, Int32(1), make_fake_stream(),
        options=f"--enable-tvm-ffi --gpu-arch={target} {options}",
    )  # fmt: skip


def _template(target: str) -> Any:
    if target == "sm_90a":
        from nmoe.codegen.templates.sm90_gemm import Sm90GroupedGemm

        return Sm90GroupedGemm
    from nmoe.codegen.templates.sm100_gemm import Sm100GroupedGemm

    return Sm100GroupedGemm


def _fake(operand: Operand, rows: Any) -> Any:
    """A row-major tensor of the operand's type, its dynamic extent a symbol."""
    import cutlass
    from cutlass.cute.runtime import make_fake_tensor

    kinds = {"bf16": cutlass.BFloat16, "f32": cutlass.Float32, "i32": cutlass.Int32}
    shape = tuple(rows if extent == gemm.ROWS else extent for extent in operand.shape)
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent if strides[0] != 1 else extent)
    return make_fake_tensor(kinds[operand.format], shape, tuple(strides), assumed_align=16)
