"""Run launches on the core: its structures filled in, parts of a grid side by side, what came of it."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.library import (
    BufferStruct,
    FaultStruct,
    LaunchStruct,
    ProgramStruct,
    RunStruct,
    library,
)
from nmoe.codegen.emulator.program import Program
from nmoe.errors import UserError

MAX_LAUNCHES = 64  # of one run: the bits that a clock has for those that are over
MULTIPROCESSORS = 148
REGISTERS, MAX_REGISTERS = 65_536, 256  # of a multiprocessor, of a thread
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
    up in no fixed order. implicit_order: tensor memory needs no tcgen05.fence where barriers release and acquire, and
    using what tcgen05.ld has loaded waits for the load, as NVIDIA's examples assume.
    """

    seed: int = 0
    races: bool = True
    limit: int = 1 << 32
    threads: int = 1
    implicit_order: bool = False


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


@dataclass(frozen=True)
class Launch:
    """A launch that waits to run; `report` is filled in when it has."""

    device: int
    report: Report
    block: Triple
    params: bytes
    dynamic_shared: int

    @property
    def clusters(self) -> int:
        return math.prod(self.report.grid) // math.prod(self.report.cluster)


class _Run:
    """One call of the core: every `parts`-th cluster of each launch from `part` on, and what it wrote."""

    def __init__(
        self,
        launches: Sequence[Launch],
        buffers: ctypes.Array[BufferStruct],
        options: Options,
        part: int,
        parts: int,
    ):
        self.fault, self.buffers = FaultStruct(), buffers
        self.cells = (ctypes.c_void_p * len(buffers))()
        self.executed = [np.zeros(len(x.report.program.code), np.uint64) for x in launches]
        self.roles = [np.zeros(-(-math.prod(x.block) // 32), np.uint64) for x in launches]
        self.launches = (LaunchStruct * len(launches))()
        self._kept: list[object] = []  # what the structures point to
        for at, launch in enumerate(launches):
            report, clusters = launch.report, launch.clusters
            params = np.frombuffer(launch.params or b"\0", np.uint8).copy()
            program = program_struct(report.program)
            self._kept += [params, program]
            self.launches[at] = LaunchStruct(
                ctypes.pointer(program),
                report.grid,
                launch.block,
                report.cluster,
                launch.dynamic_shared,
                len(launch.params),
                registers_at_start(report.program, math.prod(launch.block)),
                params.ctypes.data,
                launch.device,
                max(1, min(-(-clusters // parts), MULTIPROCESSORS // math.prod(report.cluster))),
                *(part, clusters, parts),  # in turn, since the first clusters have one tile more
                self.executed[at].ctypes.data,
                self.roles[at].ctypes.data,
            )
        self.run = RunStruct(
            len(launches),
            len(buffers),
            self.launches,
            buffers,
            self.cells,
            options.seed,
            options.limit,
            int(options.races),
            int(options.implicit_order),
            int(parts > 1),
        )

    def execute(self) -> bool:
        """Whether the core gave up; `fault` then says why."""
        return bool(library().run(self.run, self.fault))

    def free(self) -> None:
        for cells in self.cells:
            library().free(cells)


def execute(launches: Sequence[Launch], buffers: Sequence[BufferStruct], options: Options) -> None:
    """Run to completion: launches of one device in order, devices side by side. Raises EmulationError."""
    if len(launches) > MAX_LAUNCHES:
        raise EmulationError(f"{len(launches)} launches run together; expected up to {MAX_LAUNCHES}")
    constants = {id(x.report.program): x.report.program.buffers for x in launches}
    fixed = [BufferStruct(b.ctypes.data, b.size, None) for group in constants.values() for b in group]
    array = (BufferStruct * (len(buffers) + len(fixed)))(*buffers, *fixed)
    parts = min(options.threads, launches[0].clusters) if len(launches) == 1 else 1
    runs = [_Run(launches, array, options, part, parts) for part in range(parts)]
    try:
        if parts == 1:
            failed = [runs[0].execute()]
        else:
            with ThreadPoolExecutor(parts) as pool:
                failed = list(pool.map(_Run.execute, runs))
        for run, bad in zip(runs, failed, strict=True):
            if bad:
                raise _error(launches, run.fault)
        for one, other in combinations(runs, 2):
            _compare(one, other, launches[0].report.kernel)
    finally:
        for run in runs:
            run.free()
    for at, launch in enumerate(launches):
        report = launch.report
        np.maximum.at(report.executed, report.program.lines, np.sum([r.executed[at] for r in runs], axis=0))
        report.roles += np.sum([r.roles[at] for r in runs], axis=0)
        for name in report.counters:
            report.counters[name] = sum(int(getattr(r.launches[at].counters, name)) for r in runs)


def registers_at_start(program: Program, threads: int) -> int:
    """Registers a thread has before any setmaxnreg: .maxnreg, else what the assembler can give a block of this size."""
    directives = program.entry.directives
    blocks = max(1, *directives.get("minnctapersm", (1,)))
    shared = min(MAX_REGISTERS, REGISTERS // (threads * blocks)) // 8 * 8
    return directives.get("maxnreg", (shared,))[0]


def _compare(one: _Run, other: _Run, kernel: str) -> None:
    buffer, place = ctypes.c_uint32(), ctypes.c_uint64()
    if library().conflict(one.cells, other.cells, one.buffers, len(one.buffers), buffer, place):
        raise EmulationError(
            f"race on global memory, {place.value} bytes into buffer {buffer.value}: clusters of {kernel} that "
            "nothing orders access it, and one of them writes; run it with Options(threads=1) to see where",
            kernel,
        )


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


def _error(launches: Sequence[Launch], fault: FaultStruct) -> EmulationError:
    program, grid = launches[fault.launch].report.program, launches[fault.launch].report.grid
    text = fault.text.decode(errors="replace")
    parts = text.split("@")
    for i in range(1, len(parts), 2):  # @launch:pc@ in the core's text stands for a place in its program
        at, pc = map(int, parts[i].split(":"))
        parts[i] = launches[at].report.program.where(pc)
    place = ""
    if fault.pc >= 0:
        x, y = fault.cta % grid[0], fault.cta // grid[0] % grid[1]
        pc = min(fault.pc, len(program.code) - 1)
        place = f" [CTA ({x},{y},{fault.cta // (grid[0] * grid[1])}) warp {fault.warp}, {program.where(pc)}]"
    return EmulationError("".join(parts) + place, program.entry.name, fault.cta, fault.warp, fault.pc)
