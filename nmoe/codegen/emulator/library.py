"""The C core: built with the machine's compiler at first use, cached by content, described to Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nmoe.errors import UserError

SHARED_BASE = 1024
GUARD_NEGATED, FTZ, SAT, NAN_OUT, RELU, WIDE_DST, SIGNED, ADDRESS_64 = (1 << i for i in range(8))
CORE = Path(__file__).parent / "core"
FLAGS = [
    "-std=gnu11",
    "-O2",
    "-ftree-vectorize",
    "-funswitch-loops",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
]

INSN = np.dtype(
    [
        ("op", "u2"),
        ("flags", "u1"),
        ("n", "u1"),
        ("guard", "i4"),
        ("first", "u4"),
        ("a", "i4"),
        ("b", "i4"),
        ("c", "i4"),
        ("d", "i4"),
        ("imm", "i8"),
    ],
    align=True,
)


class CompilerError(UserError):
    """No C compiler, or it failed on the core."""


class ProgramStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "operands", "join", "registers", "specials")),
        *((name, ctypes.c_uint32) for name in ("n_code", "register_bytes", "n_specials", "local_bytes")),
        ("static_shared", ctypes.c_uint32),
    ]


class BufferStruct(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("written", ctypes.c_void_p)]


class CountersStruct(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "instructions",
            "tma_load_bytes",
            "tma_store_bytes",
            "tma_ops",
            "mma_flops",
            "mma_ops",
            "barrier_waits",
            "barrier_stalls",
            "race_checks",
            "duplicate_bulk",
        )
    ]


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("program", ctypes.POINTER(ProgramStruct)),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_uint32) for name in ("dynamic_shared", "param_bytes", "registers")),
        ("params", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("device", "resident", "first_cluster", "n_clusters", "step")),
        *((name, ctypes.c_void_p) for name in ("executed", "roles")),
        ("counters", CountersStruct),
    ]


class RunStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_launches", "n_buffers")),
        ("launches", ctypes.POINTER(LaunchStruct)),
        ("buffers", ctypes.POINTER(BufferStruct)),
        ("cells", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_uint64) for name in ("seed", "limit")),
        *((name, ctypes.c_uint32) for name in ("races", "implicit_order", "partial")),
    ]


class FaultStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("launch", "pc", "cta", "warp", "lane_mask")),
        ("text", ctypes.c_char * 4000),
    ]


class Library:
    """The loaded core: its entry point, operation numbers and special-register numbers by name."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = ctypes.CDLL(str(path))
        self.opcodes = self._names("emu_opcode_name")
        self.specials = self._names("emu_special_name")
        self.handle.emu_struct_size.restype = ctypes.c_size_t
        expected = [
            INSN.itemsize,
            *(ctypes.sizeof(s) for s in (ProgramStruct, LaunchStruct, BufferStruct, RunStruct, FaultStruct)),
        ]
        found = [self.handle.emu_struct_size(i) for i in range(len(expected))]
        if found != expected:
            raise CompilerError(
                f"emulator core {path}: structure sizes {found}, expected {expected}; library.py and "
                "core/emu.h disagree"
            )
        cells, integers = ctypes.POINTER(ctypes.c_void_p), (ctypes.c_uint32, ctypes.c_uint64)
        self.run = self.handle.emu_run
        self.run.argtypes = [ctypes.POINTER(RunStruct), ctypes.POINTER(FaultStruct)]
        self.run.restype = ctypes.c_int
        self.conflict = self.handle.emu_conflict
        self.conflict.argtypes = [
            cells,
            cells,
            ctypes.POINTER(BufferStruct),
            ctypes.c_uint32,
            *(ctypes.POINTER(i) for i in integers),
        ]
        self.conflict.restype = ctypes.c_bool
        self.free = self.handle.emu_free
        self.free.argtypes = [ctypes.c_void_p]

    def _names(self, function: str) -> dict[str, int]:
        name_of = getattr(self.handle, function)
        name_of.restype = ctypes.c_char_p
        names: dict[str, int] = {}
        while (name := name_of(len(names))) is not None:
            names[name.decode()] = len(names)
        return names


def cache_directory() -> Path:
    """Where built cores live: $XDG_CACHE_HOME or ~/.cache, then nmoe/emulator."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nmoe" / "emulator"


def _compiler() -> str:
    name = os.environ.get("CC", "cc")
    found = shutil.which(name)
    if found is None:
        raise CompilerError(
            f"no C compiler: {name!r} is not on PATH; the emulator compiles its core with it. "
            "Install gcc or clang, or set CC"
        )
    return found


@functools.cache
def library() -> Library:
    """Build the core if this source, compiler and CPU have not been seen, and load it. Raises CompilerError."""
    compiler = _compiler()
    sources = sorted(CORE.iterdir())
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    )
    digest.update(repr((version, platform.machine(), cpu, FLAGS)).encode())
    target = cache_directory() / f"core-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / "core.so"

            def build(arguments: list[str]) -> None:
                result = subprocess.run(
                    [compiler, *FLAGS, *arguments], capture_output=True, text=True, check=False
                )
                if result.returncode != 0:
                    raise CompilerError(
                        f"the C compiler failed on the emulator core:\n{result.stderr[-2000:]}"
                    )

            units = [s for s in sources if s.suffix == ".c"]
            objects = [str(Path(scratch) / f"{s.stem}.o") for s in units]
            with ThreadPoolExecutor() as pool:
                list(pool.map(build, [["-c", str(s), "-o", o] for s, o in zip(units, objects, strict=True)]))
            build(["-shared", "-o", str(built), *objects, "-lm"])
            os.replace(built, target)
    return Library(target)
