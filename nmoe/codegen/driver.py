"""Launches by the CUDA driver: of the functions that Triton compiled, and of kernels that are linked with NVSHMEM.

Nothing of Triton is needed: a cubin is loaded as it is, and a launch is one call with an array of arguments, made once.
Triton's functions take two more than they declare, for scratch memory that ours do not use. The device code of NVSHMEM
has a state, which its host library fills in where it is told of the module.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from nmoe.codegen.cache import Entry
from nmoe.codegen.problem import Launch
from nmoe.codegen.rails import PACKAGE, VERSION
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
        self._loaded = {
            name: (_load(entry, name, name, needs["shared"])[1], needs["threads"], needs["shared"])
            for name, needs in entry.report["functions"].items()
        }

    def bind(self, launches: Sequence[Launch], values: Mapping[str, Any]) -> Callable[[], None]:
        """A call that launches them in order on the stream that is then current. `values` are their arguments by name;
        tensors must outlive it."""
        calls = [self._bound(launch, values) for launch in launches]

        def run() -> None:
            for call in calls:
                call()

        return run

    def _bound(self, launch: Launch, values: Mapping[str, Any]) -> Callable[[], None]:
        function, threads, shared = self._loaded[launch.function]
        held = [_argument(values[name]) for name in launch.arguments]
        held += [ctypes.c_void_p()] * SCRATCH_ARGUMENTS
        return _prepared(function, (*launch.grid(values), threads, 1, 1), shared, held)


class Linked:
    """The kernel of an artifact that is linked with NVSHMEM, loaded on the current device, on which NVSHMEM runs."""

    def __init__(self, entry: Entry) -> None:
        from nvshmem import bindings

        self._entry = entry
        module, self._function = _load(entry, "kernel", entry.report["symbol"], entry.report["shared_bytes"])
        status = bindings.cumodule_init(module.value)
        if status:
            raise DriverError(
                f"NVSHMEM refuses a kernel's module (status {status}): its host library must be that of "
                f"{PACKAGE} {VERSION}, which the kernel is linked with"
            )

    def bind(self, arguments: Sequence[torch.Tensor | float | int], blocks: int) -> Callable[[], None]:
        """A launch on the stream that is then current; tensors must outlive it."""
        report = self._entry.report
        held = [_argument(argument) for argument in arguments]
        return _prepared(
            self._function, (blocks, 1, 1, report["threads"], 1, 1), report["shared_bytes"], held
        )


def _load(entry: Entry, name: str, symbol: str, shared: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The module of a cubin, on the current device, and its function `symbol`."""
    import torch

    torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), (entry.folder / f"{name}.cubin").read_bytes())
    _call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
    return module, function


def _prepared(
    function: ctypes.c_void_p, shape: tuple[int, ...], shared: int, held: Sequence[Any]
) -> Callable[[], None]:
    """A launch of blocks and threads `shape` with the arguments `held`."""
    import torch

    packed = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))

    def launch(held: Sequence[Any] = held) -> None:  # which must live as long
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call("cuLaunchKernel", function, *shape, shared, stream, packed, None)

    return launch


def _argument(value: torch.Tensor | float | int) -> Any:
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_void_p(value.data_ptr())
