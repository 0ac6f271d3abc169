"""Compiled kernels at run time: loaded once, checked against the device, called with torch tensors.

Needs CuTeDSL's runtime library and TVM-FFI, or for kernels in Triton the driver alone, between hosts NVSHMEM, and no
compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmoe.codegen.cache import FUNCTION, Cache, Entry
from nmoe.codegen.compiler import problem_key
from nmoe.codegen.driver import Functions, Linked
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import Problem
from nmoe.codegen.rails import linked
from nmoe.codegen.triton import counts
from nmoe.errors import UserError

if TYPE_CHECKING:
    import torch


class LaunchError(UserError):
    """A kernel cannot be loaded on this machine."""


@cache
def _runtime() -> ctypes.CDLL:
    """The library that compiled kernels call the driver through; its symbols become visible to them."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True):
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    raise LaunchError("libcute_dsl_runtime.so is not installed: pip install 'nmoe[cuda]'")


def device_of(target: str) -> torch.device:
    """The current CUDA device, if it is the target's."""
    import torch

    wanted = HARDWARE[target]
    if not torch.cuda.is_available():
        raise LaunchError(
            f'[target] device = "{target}" runs on {wanted.name}, and torch finds no CUDA device here: '
            'set [target] device = "cpu" for the reference implementation'
        )
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_capability(device)
    if found != wanted.capability:
        raise LaunchError(
            f'[target] device = "{target}" runs on {wanted.name}, the device is {torch.cuda.get_device_name(device)} '
            f"of compute capability {found[0]}.{found[1]}: set [target] device"
        )
    return device


class Kernel:
    """A loaded kernel. Call it with its operands in the order of its problem, then the number of clusters and the
    stream's handle; nothing is allocated and nothing waits for the device."""

    def __init__(self, entry: Entry) -> None:
        device_of(entry.target)
        _runtime()
        import tvm_ffi

        self.entry = entry
        self._module = tvm_ffi.load_module(str(entry.library))
        self._call = self._module[FUNCTION]

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)


class CudaLauncher:
    """Launches the kernels of a cache on the current device; each is loaded once."""

    def __init__(self, cache: Cache) -> None:
        self.root: Path | None = cache.root
        self._cache = cache
        self._kernels: dict[str, Kernel | Functions | Linked] = {}

    def bind(
        self, problem: Problem, config: Any, target: str, arguments: Sequence[torch.Tensor | float | int]
    ) -> Callable[[], None]:
        """A launch on the stream that is then current. Raises LaunchError when the cache lacks the kernel."""
        kernel = self._kernel(problem, config, target)
        if isinstance(kernel, Functions):
            named = {o.name: a for o, a in zip(problem.operands(config), arguments, strict=True)}
            return kernel.bind(problem.launches(config), named | counts(problem, config, named))
        if isinstance(kernel, Linked):
            return kernel.bind(arguments, problem.clusters(config, 0))
        import torch
        import tvm_ffi

        device = device_of(target)
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        clusters = problem.clusters(config, sms)
        views = [
            tvm_ffi.from_dlpack(a.view(torch.float8_e4m3fn) if o.format == "e4m3" else torch.atleast_1d(a))
            if isinstance(a, torch.Tensor)
            else a
            for o, a in zip(problem.operands(config), arguments, strict=True)
        ]

        def launch() -> None:
            kernel(*views, clusters, torch.cuda.current_stream(device).cuda_stream)

        return launch

    def _kernel(self, problem: Problem, config: Any, target: str) -> Kernel | Functions | Linked:
        key = problem_key(problem, config, target)
        if key not in self._kernels:
            entry = self._cache.get(key, target)
            if entry is None:
                raise LaunchError(
                    f"the kernel of {problem.family} {problem} for {target} ({config}) is not in {self.root}: "
                    "build it with nmoe compile, on a machine with nvidia-cutlass-dsl, and bring the cache here"
                )
            kind = Functions if problem.language == "triton" else Linked if linked(problem) else Kernel
            self._kernels[key] = kind(entry)
        return self._kernels[key]
