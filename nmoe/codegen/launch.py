"""Compiled kernels at run time: loaded once, checked against the device, called with torch tensors.

Needs CuTeDSL's runtime library and TVM-FFI, not the compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmoe.codegen.cache import FUNCTION, Entry
from nmoe.codegen.hardware import HARDWARE
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


class Kernel:
    """A loaded kernel. Call it with its operands in the order of its problem, then the number of clusters and the
    stream's handle; nothing is allocated and nothing waits for the device."""

    def __init__(self, entry: Entry, device: torch.device) -> None:
        import torch

        wanted, found = HARDWARE[entry.target], torch.cuda.get_device_capability(device)
        if found != wanted.capability:
            raise LaunchError(
                f"{entry.folder.name[:16]} is built for {entry.target} ({wanted.name}), the device is "
                f"{torch.cuda.get_device_name(device)} of compute capability {found[0]}.{found[1]}: set [target] device"
            )
        _runtime()
        import tvm_ffi

        self.entry = entry
        self._module = tvm_ffi.load_module(str(entry.library))
        self._call = self._module[FUNCTION]

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)
