"""A device to emulate: global memory as aligned host buffers, and launches of PTX entries on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from nmoe.codegen.emulator import isa, isa_async, isa_memory, ptx
from nmoe.codegen.emulator.execution import EmulationError, Launch, Options, Report, Triple, execute
from nmoe.codegen.emulator.library import BufferStruct, CountersStruct, library
from nmoe.codegen.emulator.program import Program

assert isa_memory.opcode is isa_async.opcode is isa.opcode  # importing these registers their instructions
ALIGNMENT = 256  # of cudaMalloc
MAX_SHARED = 232_448  # bytes a CTA may use on sm_90 and sm_100


@dataclass
class DeviceTensor:
    """A torch tensor in emulated global memory. `torch` views the memory; DLPack calls it a CUDA tensor."""

    torch: torch.Tensor
    written: np.ndarray
    memory: np.ndarray = field(repr=False)

    @property
    def pointer(self) -> int:
        return self.memory.ctypes.data


class Device:
    """Emulated global memory and the launches made on it; `reports` has one entry a launch, in order."""

    def __init__(self, options: Options | None = None):
        self.options = options or Options()
        self.tensors: list[DeviceTensor] = []
        self.reports: list[Report] = []
        self._together: _Together | None = None
        self._programs: dict[tuple[int, str], tuple[ptx.Module, Program]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> DeviceTensor:
        """Memory that holds nothing yet: reading it before writing is an error."""
        size = math.prod(shape) * dtype.itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        start = ALIGNMENT - raw.ctypes.data % ALIGNMENT
        memory = raw[start : start + size]
        view = (
            torch.from_numpy(memory).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        )
        tensor = DeviceTensor(view, np.zeros(size, np.uint8), memory)
        self.tensors.append(tensor)
        return tensor

    def tensor(self, source: torch.Tensor) -> DeviceTensor:
        """A copy of `source` in emulated memory, contiguous or with the strides of a dense permuted tensor."""
        order = sorted(range(source.dim()), key=lambda d: (-source.stride()[d], d))
        dense = source.permute(order)
        if not dense.is_contiguous():
            order, dense = list(range(source.dim())), source.contiguous()
        tensor = self.empty(tuple(dense.shape), source.dtype)
        tensor.torch.view(torch.uint8).copy_(dense.view(torch.uint8)) if dense.numel() else None
        tensor.torch = tensor.torch.permute([order.index(d) for d in range(source.dim())])
        tensor.written[:] = 1
        return tensor

    def program(self, module: ptx.Module, kernel: str) -> Program:
        """The decoded entry, cached while this device lives. Raises ptx.PtxError."""
        key = (id(module), kernel)
        if key not in self._programs:
            if kernel not in module.entries:
                raise EmulationError(
                    f"kernel {kernel} is not in the PTX; it has {', '.join(module.entries) or 'no entry'}"
                )
            self._programs[key] = (module, isa.decode(module, module.entries[kernel], library()))
        return self._programs[key][1]

    def launch(
        self,
        program: Program,
        grid: Triple,
        block: Triple,
        params: bytes,
        cluster: Triple = (1, 1, 1),
        dynamic_shared: int = 0,
    ) -> Report:
        """Run a launch to completion, or inside `together` have it run later. Raises EmulationError."""
        _check_geometry(program, grid, block, cluster, dynamic_shared)
        report = Report(
            program.entry.name,
            grid,
            cluster,
            program,
            dict.fromkeys((name for name, *_ in CountersStruct._fields_), 0),
            np.zeros(len(program.entry.instructions), np.uint64),
            np.zeros(-(-math.prod(block) // 32), np.uint64),
        )
        group = self._together or _Together((self,))
        group.launches.append(Launch(group.devices.index(self), report, block, params, dynamic_shared))
        if self._together is None:
            group.run()
        return report


class _Together:
    """Devices whose launches run side by side."""

    def __init__(self, devices: tuple[Device, ...]):
        self.devices = devices
        self.launches: list[Launch] = []

    def run(self) -> None:
        options = {device.options for device in self.devices}
        if len(options) > 1:
            raise EmulationError("devices that run together need the same options")
        tensors = [t for device in self.devices for t in device.tensors if t.memory.size]
        buffers = [BufferStruct(t.pointer, t.memory.size, t.written.ctypes.data) for t in tensors]
        execute(self.launches, buffers, options.pop())
        for launch in self.launches:
            self.devices[launch.device].reports.append(launch.report)


@contextmanager
def together(*devices: Device) -> Iterator[None]:
    """Launches made inside wait until the block ends; then those of one device run in order, devices side by side.

    Every launch reaches the memory of all the devices, as peers that have mapped each other's. Raises EmulationError.
    """
    group = _Together(devices)
    for device in devices:
        device._together = group
    try:
        yield
    finally:
        for device in devices:
            device._together = None
    if group.launches:
        group.run()


def _check_geometry(
    program: Program, grid: Triple, block: Triple, cluster: Triple, dynamic_shared: int
) -> None:
    name, threads = program.entry.name, math.prod(block)
    if any(g % c for g, c in zip(grid, cluster, strict=True)) or min(*grid, *block, *cluster) < 1:
        raise EmulationError(f"{name}: grid {grid} is not made of clusters of {cluster}")
    required = program.entry.directives.get("reqntid")
    if threads > 1024 or (required and math.prod(required) != threads):
        raise EmulationError(f"{name}: launched with {threads} threads a CTA; .reqntid is {required}")
    shared = program.static_shared + dynamic_shared
    if shared > MAX_SHARED:
        raise EmulationError(f"{name}: {shared} bytes of shared memory; a CTA has {MAX_SHARED}")
