"""Launches of the functions that Triton compiled, by the CUDA driver.

Nothing of Triton is needed: a cubin is loaded as it is, and a launch is one call with an array of arguments, made once.
Triton's functions take two more than they declare, for scratch memory that ours do not use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from nmoe.codegen.cache import Entry
from nmoe.codegen.problem import Launch
from nmoe.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SCRATCH_ARGUMENTS = 2


class DriverError(UserError):
    """The CUDA driver refused a cubin or a launch."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"the CUDA driver cannot be loaded: {error}") from None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: CUDA error {status}, {(text.value or b'unknown').decode()}")


class Functions:
    """The functions of an artifact, loaded on the current device."""

    def __init__(self, entry: Entry) -> None:
        import torch

        torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
        self._loaded: dict[str, tuple[ctypes.c_void_p, int, int]] = {}
        for name, needs in entry.report["functions"].items():
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _call("cuModuleLoadData", ctypes.byref(module), (entry.folder / f"{name}.cubin").read_bytes())
            _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, needs["shared"])
            self._loaded[name] = function, needs["threads"], needs["shared"]

    def bind(self, launches: Sequence[Launch], values: Mapping[str, Any]) -> Callable[[], None]:
        """A call that launches them in order on the stream that is then current. `values` are their arguments by name;
        tensors must outlive it."""
        import torch

        calls = [self._bound(launch, values) for launch in launches]

        def run() -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for function, shape, shared, packed, _ in calls:
                _call("cuLaunchKernel", function, *shape, shared, stream, packed, None)

        return run

    def _bound(self, launch: Launch, values: Mapping[str, Any]) -> tuple[Any, ...]:
        function, threads, shared = self._loaded[launch.function]
        held = [_argument(values[name]) for name in launch.arguments]
        held += [ctypes.c_void_p()] * SCRATCH_ARGUMENTS
        packed = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
        return function, (*launch.grid(values), threads, 1, 1), shared, packed, held


def _argument(value: torch.Tensor | float | int) -> Any:
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_void_p(value.data_ptr())
