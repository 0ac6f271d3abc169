"""Run unmodified CuTeDSL host code on an emulated device: in-process functions and ahead-of-time objects."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.device import Device, DeviceTensor
from nmoe.codegen.emulator.execution import EmulationError, Triple
from nmoe.codegen.emulator.library import CompilerError

SHIM = Path(__file__).parent / "shim.c"
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *[ctypes.POINTER(ctypes.c_uint32)] * 3,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
# DLPack type codes; a 4-bit pair has two lanes.
DLPACK_TYPES = {
    torch.float32: (2, 32, 1),
    torch.float64: (2, 64, 1),
    torch.float16: (2, 16, 1),
    torch.bfloat16: (4, 16, 1),
    torch.int8: (0, 8, 1),
    torch.int16: (0, 16, 1),
    torch.int32: (0, 32, 1),
    torch.int64: (0, 64, 1),
    torch.uint8: (1, 8, 1),
    torch.uint16: (1, 16, 1),
    torch.uint32: (1, 32, 1),
    torch.uint64: (1, 64, 1),
    torch.bool: (6, 8, 1),
    torch.float8_e4m3fn: (10, 8, 1),
    torch.float8_e5m2: (12, 8, 1),
    torch.float8_e8m0fnu: (14, 8, 1),
    torch.float4_e2m1fn_x2: (17, 4, 2),
}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class CudaView:
    """A DeviceTensor as DLPack consumers see it: on CUDA device 0. Keeps what the capsule points at alive."""

    def __init__(self, tensor: DeviceTensor):
        self.owner = tensor
        view = tensor.torch
        kind = DLPACK_TYPES[view.dtype]
        rank = view.dim()
        self.shape = (ctypes.c_int64 * rank)(*view.shape)
        self.strides = (ctypes.c_int64 * rank)(*view.stride())
        inner = DLTensor(tensor.pointer, 2, 0, rank, *kind, self.shape, self.strides, 0)
        self.managed = DLManagedTensor(inner, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.managed), b"dltensor", None)


class _Current(threading.local):
    device: Device
    module: ptx.Module
    error: BaseException | None = None


_current = _Current()


def _on_launch(name: bytes, grid: Any, block: Any, cluster: Any, dynamic_shared: int, arguments: Any) -> int:
    """Called by the shim inside the host function; an exception waits in `_current` until that function returns."""
    try:
        program = _current.device.program(_current.module, name.decode())
        params = np.zeros(program.param_bytes, np.uint8)
        for i, (offset, size) in enumerate(program.params):
            params[offset : offset + size] = np.frombuffer(ctypes.string_at(arguments[i], size), np.uint8)
        triples: list[Triple] = [(t[0], t[1], t[2]) for t in (grid, block, cluster)]
        _current.device.launch(program, triples[0], triples[1], params.tobytes(), triples[2], dynamic_shared)
    except BaseException as error:
        _current.error = error
        return 1
    return 0


_callback = CALLBACK(_on_launch)


class HostFunction:
    """Host code of an object file that CuTeDSL exported, linked against the emulator, with the PTX of its kernels."""

    def __init__(self, path: Path, name: str, text: str):
        """Link and load `name` of the object at `path`; `text` is its PTX. Raises CompilerError, PtxError."""
        import tvm_ffi  # type: ignore[import-not-found]

        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise CompilerError("no C compiler to link the object with; install gcc or clang, or set CC")
        self.module = ptx.parse(text)
        self._folder = tempfile.TemporaryDirectory(prefix="nmoe-emulator-")
        target = Path(self._folder.name) / f"{path.stem}.so"
        # -Bsymbolic: a CUDA runtime that the process has loaded must not take the place of the shim.
        command = [
            compiler,
            "-O1",
            "-fPIC",
            "-shared",
            "-Wl,-Bsymbolic",
            "-o",
            str(target),
            str(path),
            str(SHIM),
            tvm_ffi.libinfo.find_libtvm_ffi(),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompilerError(f"linking {path} failed:\n{result.stderr[-2000:]}")
        ctypes.CDLL(str(target)).emu_set_launch_callback(_callback)
        self._library = tvm_ffi.load_module(str(target))
        self._function = self._library.get_function(name)

    def __call__(self, device: Device, *arguments: Any) -> None:
        """Call the host function on `device`; its launches run before it returns.

        DeviceTensors are passed as CUDA tensors, None stays None, other values pass through (a `cute.Pointer` and a
        stream take an int). Raises EmulationError for what a kernel does wrong, and what the host wrapper raises
        for arguments that do not fit.
        """
        import tvm_ffi

        views = [CudaView(a) if isinstance(a, DeviceTensor) else a for a in arguments]
        _current.device, _current.module, _current.error = device, self.module, None
        try:
            self._function(*[tvm_ffi.from_dlpack(v) if isinstance(v, CudaView) else v for v in views])
        except Exception:
            if _current.error is None:
                raise
        if _current.error is not None:
            raise _current.error


def bind(compiled: Any) -> HostFunction:
    """A function that `cute.compile` made with options `--enable-tvm-ffi --keep-ptx`, for any `--gpu-arch`.

    It is exported to an object first, so the path is the one that ahead-of-time kernels take. Raises EmulationError
    when the PTX was not kept.
    """
    text = getattr(compiled, "__ptx__", None)
    if not text:
        raise EmulationError(
            "the function carries no PTX; compile it with options='--enable-tvm-ffi --keep-ptx'"
        )
    with tempfile.TemporaryDirectory(prefix="nmoe-emulator-") as folder:
        path = Path(folder) / "kernel.o"
        compiled.export_to_c(str(path), "nmoe_emulated")
        return HostFunction(path, "nmoe_emulated", text)
