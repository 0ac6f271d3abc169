"""Run generated PTX on the CPU: the Blackwell that is not at hand. See docs/emulator.md.

`Device` holds memory and launches, `together` runs several devices side by side; `bind` takes a function from
`cute.compile`, `HostFunction` an exported object; errors are `EmulationError` (a kernel is wrong), `PtxError` (an
instruction is unknown), `CompilerError` (no C compiler).
"""

from nmoe.codegen.emulator.device import Device, DeviceTensor, together
from nmoe.codegen.emulator.execution import EmulationError, Options, Report
from nmoe.codegen.emulator.host import HostFunction, bind
from nmoe.codegen.emulator.library import CompilerError
from nmoe.codegen.emulator.ptx import PtxError

__all__ = [
    "CompilerError",
    "Device",
    "DeviceTensor",
    "EmulationError",
    "HostFunction",
    "Options",
    "PtxError",
    "Report",
    "bind",
    "together",
]
