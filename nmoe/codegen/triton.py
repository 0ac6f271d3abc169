"""Triton templates: compiled ahead of time, a cubin a function; interpreted on the CPU for verification.

Compiling needs triton and no GPU. Launching needs neither triton nor a C compiler (driver.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import COUNTS, Config, Launch, Problem
from nmoe.errors import UserError

TYPES = {"bf16": "bf16", "f32": "fp32", "i32": "i32"}  # Triton's names
ALIGNED = [["tt.divisibility", 16]]  # bytes; of every tensor, since the arena's are aligned to more


def generate(problem: Problem, config: Config, target: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """<function>.cubin and <function>.ptx of each function, and what the report says of them all: "functions" is what a
    launch needs, threads and bytes of dynamic shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    module = importlib.import_module(f"nmoe.codegen.templates.{_module(problem, target)}")
    hardware = HARDWARE[target]
    files: dict[str, bytes] = {}
    report: dict[str, Any] = {"functions": {}, "tensor_columns": 0}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        for launch in problem.launches(config):
            made = triton.compile(
                _source(getattr(module, launch.function), problem, config, launch),
                target=GPUTarget("cuda", 10 * hardware.capability[0] + hardware.capability[1], 32),
                options={"num_warps": launch.warps, "num_stages": launch.stages},
            )
            used = made.metadata
            if (
                used.shared > hardware.shared
                or used.tmem_size > hardware.tensor_columns
                or used.global_scratch_size
            ):
                raise UserError(
                    f"{launch.function} of {problem} takes {used.shared} bytes of shared memory, {used.tmem_size} "
                    f"columns of tensor memory and {used.global_scratch_size} bytes of scratch: {hardware.name} has "
                    f"{hardware.shared}, {hardware.tensor_columns} and 0"
                )
            files |= {
                f"{launch.function}.cubin": made.asm["cubin"],
                f"{launch.function}.ptx": made.asm["ptx"].encode(),
            }
            report["functions"][launch.function] = {"threads": 32 * used.num_warps, "shared": used.shared}
            report["tensor_columns"] = max(report["tensor_columns"], used.tmem_size)
    return files, report


def _module(problem: Problem, target: str) -> str:
    return problem.template(target).split(".")[0]


def _source(function: Any, problem: Problem, config: Config, launch: Launch) -> Any:
    from triton.compiler import ASTSource

    operands = {operand.name: operand for operand in problem.operands(config)}
    signature, attributes = {}, {}
    given = (*launch.arguments, *launch.constants)
    for i, (parameter, name) in enumerate(zip(function.arg_names, given, strict=True)):
        operand = operands.get(name)
        if name in launch.constants:
            signature[parameter] = "constexpr"
        elif operand is None:
            signature[parameter] = "i32"
        else:
            signature[parameter] = ("*" if operand.shape else "") + TYPES[operand.format]
            if operand.shape:
                attributes[i,] = ALIGNED
    return ASTSource(function, signature, dict(launch.constants), attributes)


def interpret(problem: Problem, config: Config, target: str, arguments: dict[str, Any]) -> None:
    """Runs the launches on the CPU, one program after another, in Triton's interpreter. It does not multiply BF16, so
    such tensors become FP32, and their results BF16 again when all launches are done."""
    import torch

    wide = {n: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
            for n, x in arguments.items()}  # fmt: skip
    values = wide | counts(problem, config, arguments)
    with _interpreter():
        module = _interpreted(_module(problem, target))
        for launch in problem.launches(config):
            getattr(module, launch.function)[launch.grid(values)](
                *(values[name] for name in launch.arguments), **launch.constants
            )
    for name, tensor in wide.items():
        if tensor is not arguments[name]:
            arguments[name].copy_(tensor)


def counts(problem: Problem, config: Config, arguments: dict[str, Any]) -> dict[str, int]:
    """The dynamic extents of the operands, by the names that functions have for them."""
    return {
        name: int(arguments[operand.name].shape[operand.shape.index(extent)])
        for name, extent in COUNTS.items()
        for operand in problem.operands(config)
        if extent in operand.shape
    }


@contextmanager
def _interpreter() -> Iterator[None]:
    """Triton as it is where TRITON_INTERPRET is set before its import, its own functions, too, are interpreted; then
    as it was: by itself it would stay patched, by every call of a function from another."""
    import triton
    from triton import language
    from triton.language import standard
    from triton.runtime import JITFunction, interpreter

    patch_language, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    scopes: dict[int, Any] = {}  # of a module's functions, by its globals
    compiled = [
        (m, n, f) for m in (language, standard) for n, f in vars(m).items() if isinstance(f, JITFunction)
    ]

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in scopes:
            scopes[id(function.__globals__)] = patch_language(function)
        return interpreter._LangPatchScope()

    def patch_tensors(tensor: Any, scope: Any) -> None:
        """Bounds of loops are arrays of one element, which NumPy 2.5 no longer takes for numbers."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        interpreter._patch_lang, interpreter._patch_lang_tensor = patch_once, patch_tensors
        for module, name, function in compiled:
            setattr(module, name, interpreter.InterpretedFunction(function.fn))
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()
            interpreter._patch_lang, interpreter._patch_lang_tensor = patch_language, patch_tensor
            for module, name, function in compiled:
                setattr(module, name, function)


@cache
def _interpreted(name: str) -> ModuleType:
    """A template's module of its own, whose functions the interpreter runs."""
    original = importlib.util.find_spec(f"nmoe.codegen.templates.{name}")
    assert original is not None and original.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_interpreted", original.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
