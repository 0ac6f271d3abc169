"""A device to emulate: global memory as aligned host buffers, and launches of PTX entries on it."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from nmoe.codegen.emulator import isa, isa_async, isa_memory, ptx
from nmoe.codegen.emulator.library import (
    BufferStruct,
    CountersStruct,
    FaultStruct,
    LaunchStruct,
    ProgramStruct,
    library,
)
from nmoe.codegen.emulator.program import Program
from nmoe.errors import UserError

assert isa_memory.opcode is isa_async.opcode is isa.opcode  # importing these registers their instructions
ALIGNMENT = 256  # of cudaMalloc
MAX_SHARED = 232_448  # bytes a CTA may use on sm_90 and sm_100
Triple = tuple[int, int, int]


class EmulationError(UserError):
    """A kernel did something wrong, or something that the emulator does not model; names PTX and source line.

    `kernel`, `cta` (linear), `warp` and `pc` say where; `pc` indexes the program's core instructions.
    """

    def __init__(self, message: str, kernel: str = "", cta: int = -1, warp: int = -1, pc: int = -1):
        super().__init__(message)
        self.kernel, self.cta, self.warp, self.pc = kernel, cta, warp, pc


@dataclass(frozen=True)
class Options:
    """How launches run.

    seed: 0 runs warps round robin and asynchronous work at once; others choose a random, a priority-based or a lazy
    schedule. races: happens-before detection. limit: warp instructions before a launch counts as a livelock.
    threads: how many parts of the grid run side by side; with more than one, floating atomics between clusters add
    up in no fixed order.
    """

    seed: int = 0
    races: bool = True
    limit: int = 1 << 32
    threads: int = 1


@dataclass
class Report:
    """What one launch did: totals, executions per PTX instruction (`executed`) and per warp of the CTA (`roles`)."""

    kernel: str
    grid: Triple
    cluster: Triple
    program: Program
    counters: dict[str, int]
    executed: np.ndarray
    roles: np.ndarray

    def by_opcode(self) -> Counter[str]:
        """Warp executions by opcode head, for instance `tcgen05.mma` or `ld.shared`."""
        total: Counter[str] = Counter()
        for instruction, count in zip(self.program.entry.instructions, self.executed, strict=True):
            total[".".join(instruction.opcode.split(".")[:2])] += int(count)
        return total

    def uncovered(self) -> list[ptx.Instr]:
        """Instructions that no warp executed."""
        return [i for i, n in zip(self.program.entry.instructions, self.executed, strict=True) if n == 0]


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
        """Run a launch to completion. Raises EmulationError."""
        _check_geometry(program, grid, block, cluster, dynamic_shared)
        buffers = [
            BufferStruct(t.pointer, t.memory.size, t.written.ctypes.data)
            for t in self.tensors
            if t.memory.size
        ]
        buffers += [BufferStruct(b.ctypes.data, b.size, None) for b in program.buffers]
        buffer_array = (BufferStruct * max(1, len(buffers)))(*buffers)
        aligned = np.frombuffer(params, np.uint8).copy() if params else np.zeros(1, np.uint8)
        code, options = program_struct(program), self.options

        def run(first: int, last: int) -> tuple[CountersStruct, np.ndarray, np.ndarray, FaultStruct | None]:
            executed = np.zeros(len(program.code), np.uint64)
            roles = np.zeros(-(-math.prod(block) // 32), np.uint64)
            launch = LaunchStruct(
                grid,
                block,
                cluster,
                dynamic_shared,
                len(params),
                len(buffers),
                aligned.ctypes.data,
                buffer_array,
                options.seed,
                options.limit,
                int(options.races),
                min(last - first, 148),
                first,
                last,
                executed.ctypes.data,
                roles.ctypes.data,
            )
            counters, fault = CountersStruct(), FaultStruct()
            addresses = [ctypes.addressof(s) for s in (code, launch, counters, fault)]
            failed = library().run(*addresses)
            return counters, executed, roles, fault if failed else None

        clusters = math.prod(grid) // math.prod(cluster)
        threads = min(options.threads, clusters)
        bounds = [clusters * i // threads for i in range(threads + 1)]
        if threads == 1:
            parts = [run(0, clusters)]
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(run, bounds[:-1], bounds[1:]))
        for *_, fault in parts:
            if fault is not None:
                raise _error(program, grid, fault)
        per_line = np.zeros(len(program.entry.instructions), np.uint64)
        np.maximum.at(per_line, program.lines, np.sum([p[1] for p in parts], axis=0))
        totals = {name: sum(int(getattr(p[0], name)) for p in parts) for name, *_ in CountersStruct._fields_}
        roles = np.sum([p[2] for p in parts], axis=0)
        report = Report(program.entry.name, grid, cluster, program, totals, per_line, roles)
        self.reports.append(report)
        return report


def program_struct(program: Program) -> ProgramStruct:
    arrays = (program.code, program.operands, program.join, program.registers, program.specials)
    return ProgramStruct(
        *(a.ctypes.data for a in arrays),
        len(program.code),
        program.registers.size,
        len(program.specials),
        program.local_bytes,
        program.static_shared,
    )


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


def _error(program: Program, grid: Triple, fault: FaultStruct) -> EmulationError:
    text = fault.text.decode(errors="replace")
    parts = text.split("@")
    for i in range(1, len(parts), 2):  # @pc@ in the core's text stands for a place in the program
        parts[i] = program.where(int(parts[i]))
    place = ""
    if fault.pc >= 0:
        x, y = fault.cta % grid[0], fault.cta // grid[0] % grid[1]
        pc = min(fault.pc, len(program.code) - 1)
        place = f" [CTA ({x},{y},{fault.cta // (grid[0] * grid[1])}) warp {fault.warp}, {program.where(pc)}]"
    return EmulationError("".join(parts) + place, program.entry.name, fault.cta, fault.warp, fault.pc)
