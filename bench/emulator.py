"""Calibrate the emulator against a Hopper GPU, and measure its speed.

    python bench/emulator.py --on emulator --out DIR     # results of every case, DIR/emulator.npz
    python bench/emulator.py --on device --out DIR       # the same PTX through the CUDA driver, DIR/device.npz
    python bench/emulator.py --on device --out DIR --case NAME    # one case, in this process, nothing else recorded
    python bench/emulator.py --compare DIR               # bit for bit where the result is defined, else the distance
    python bench/emulator.py --speed                     # warp instructions a second

Cases are hand-written sm_90a PTX: conversions over all 16-bit inputs, arithmetic on edge values, lane exchange, an
mbarrier ping-pong, TMA reductions, and a clustered GEMM with TMA, 128-byte swizzle, multicast and wgmma. On the device
tensor maps come from the driver, and their bytes are compared with the layout that the emulator assumes.
"""

from __future__ import annotations

import argparse
import ctypes
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from emulator_cases import MAP_KINDS, Case, Map, all_cases, entry, gemm_case


def assumed_map(spec: Map, address: int) -> bytes:
    """The 128 bytes of a tensor map as the emulator reads them."""
    words = [0] * 32
    words[0], words[1] = address & 0xFFFFFFFF, address >> 32
    words[2] = 1 << 4 | MAP_KINDS[spec.kind][0] << 7 | spec.swizzle << 13
    words[3] = spec.pitch // 16
    words[8], words[9] = spec.sizes[0] - 1, spec.sizes[1] - 1
    words[13], words[14] = spec.box[0] - 1 << 24, spec.box[1] - 1
    return struct.pack("<32I", *words)


def run_emulator(case: Case) -> list[np.ndarray]:
    import torch

    from nmoe.codegen.emulator import Device, ptx

    device = Device()
    tensors = [device.tensor(torch.from_numpy(b.view(np.uint8).copy())) for b in case.buffers]
    params = b"".join(struct.pack("<Q", t.pointer) for t in tensors)
    params += b"\0" * (-len(params) % 64 if case.maps else 0)
    params += b"".join(assumed_map(m, tensors[m.buffer].pointer) for m in case.maps)
    program = device.program(ptx.parse(case.text), "k")
    device.launch(program, (case.grid, 1, 1), (case.block, 1, 1), params, (case.cluster, 1, 1))
    return [tensors[i].torch.numpy().ravel().copy() for i in case.results]


class Driver:
    """The few CUDA driver calls that running PTX takes."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.check("cuInit", 0)
        self.check("cuDeviceGet", ctypes.byref(device), 0)
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.check("cuCtxSetCurrent", self.context)

    def check(self, name: str, *arguments: object) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            raise SystemExit(f"{name}: {(text.value or b'?').decode()} ({status})")

    def tensor_map(self, spec: Map, address: int) -> bytes:
        raw = ctypes.create_string_buffer(128 + 64)
        place = ctypes.addressof(raw) + -ctypes.addressof(raw) % 64
        sizes, strides = (ctypes.c_uint64 * 2)(*spec.sizes), (ctypes.c_uint64 * 1)(spec.pitch)
        box, steps = (ctypes.c_uint32 * 2)(*spec.box), (ctypes.c_uint32 * 2)(1, 1)
        self.check(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(place),
            MAP_KINDS[spec.kind][1],
            2,
            ctypes.c_void_p(address),
            sizes,
            strides,
            box,
            steps,
            0,
            spec.swizzle,
            0,
            0,
        )
        return ctypes.string_at(place, 128)

    def run(self, case: Case) -> tuple[list[np.ndarray], list[tuple[bytes, bytes]]]:
        """Result buffers, and for each map what the driver encodes beside what the emulator assumes."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check("cuModuleLoadData", ctypes.byref(module), case.text.encode() + b"\0")
        self.check("cuModuleGetFunction", ctypes.byref(function), module, b"k")
        memory = []
        for buffer in case.buffers:
            pointer = ctypes.c_uint64()
            self.check("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(buffer.nbytes))
            self.check(
                "cuMemcpyHtoD_v2",
                pointer,
                ctypes.c_void_p(np.ascontiguousarray(buffer).ctypes.data),
                ctypes.c_size_t(buffer.nbytes),
            )
            memory.append(pointer)
        encoded = [self.tensor_map(m, memory[m.buffer].value) for m in case.maps]
        values: list[ctypes.Array | ctypes.c_uint64] = [
            *memory,
            *(ctypes.create_string_buffer(e, 128) for e in encoded),
        ]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attribute = struct.pack("<II3I52x", 4, 0, case.cluster, 1, 1)  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attributes = ctypes.create_string_buffer(attribute, 72)
        config = struct.pack(
            "<7I4xQQI4x", case.grid, 1, 1, case.block, 1, 1, 0, 0, ctypes.addressof(attributes), 1
        )
        self.check(
            "cuLaunchKernelEx", ctypes.create_string_buffer(config, len(config)), function, arguments, None
        )
        self.check("cuCtxSynchronize")
        results = []
        for i in case.results:
            host = np.zeros(case.buffers[i].nbytes, np.uint8)
            self.check(
                "cuMemcpyDtoH_v2", ctypes.c_void_p(host.ctypes.data), memory[i], ctypes.c_size_t(host.nbytes)
            )
            results.append(host)
        for pointer in memory:
            self.check("cuMemFree_v2", pointer)
        self.check("cuModuleUnload", module)
        return results, [
            (e, assumed_map(m, memory[m.buffer].value)) for e, m in zip(encoded, case.maps, strict=True)
        ]


def device_arrays(case: Case) -> dict[str, np.ndarray]:
    results, maps = Driver().run(case)
    arrays = {f"{case.name}/{i}": result for i, result in enumerate(results)}
    for i, (found, assumed) in enumerate(maps):
        arrays[f"{case.name}/map{i}"] = np.frombuffer(found + assumed, np.uint8)
    return arrays


def emulator_arrays(case: Case) -> dict[str, np.ndarray]:
    return {f"{case.name}/{i}": result for i, result in enumerate(run_emulator(case))}


def isolated(case: Case) -> dict[str, np.ndarray]:
    """The case on the device, in a process of its own: a launch that fails leaves its CUDA context unusable."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--on", "device", "--out", folder, "--case", case.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            print(f"FAILED\t{case.name}\tno end after 60 s", flush=True)
            return {}
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"FAILED\t{case.name}\t{reason}", flush=True)
            return {}
        with np.load(Path(folder, "device.npz")) as arrays:
            return dict(arrays)


def record(on: str, out: Path, name: str | None) -> int:
    """Write DIR/<on>.npz; cases that fail on the device are named and left out, and the exit code is then 1."""
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in all_cases() if name in (None, case.name)]
    if not cases:
        raise SystemExit(f"no case is called {name!r}")
    run = emulator_arrays if on == "emulator" else isolated if name is None else device_arrays
    arrays = [run(case) for case in cases]
    np.savez_compressed(out / f"{on}.npz", **{key: value for each in arrays for key, value in each.items()})
    return int(not all(arrays))


def compare(folder: Path) -> int:
    """Print one line a case; the exit code is 1 when a case that must be exact is not."""
    found, expected = np.load(folder / "emulator.npz"), np.load(folder / "device.npz")
    failed = 0
    for case in all_cases():
        if f"{case.name}/0" not in expected:
            failed = 1
            print(f"MISSING\t{case.name}\tthe device has no result")
            continue
        for i in range(len(case.results)):
            a, b = (f[f"{case.name}/{i}"].view(np.uint32) for f in (found, expected))
            differing = int(np.count_nonzero(a != b))
            detail = f"{differing} of {a.size} words differ"
            if differing and not case.exact:
                x, y = a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64)
                distance = np.abs(x - y)
                relative = distance / np.maximum(np.abs(y), 1e-30)
                detail += f", largest difference {distance.max():.2e}, relative {relative.max():.2e}"
            if differing and case.exact:
                at = int(np.flatnonzero(a != b)[0])
                detail += f", first at {at}: emulator {a[at]:#010x}, device {b[at]:#010x}"
            bad = differing > 0 and case.exact
            failed |= bad
            print(f"{'DIFFERS' if bad else 'equal' if not differing else 'close'}\t{case.name}\t{detail}")
        for i in range(len(case.maps)):
            driver_bytes, assumed = expected[f"{case.name}/map{i}"].reshape(2, 128).view(np.uint32)
            where = [
                f"word {w}: driver {driver_bytes[w]:#x}, assumed {assumed[w]:#x}"
                for w in range(16)
                if driver_bytes[w] != assumed[w]
            ]
            print(f"map\t{case.name}\t{'; '.join(where) or 'the layout is as assumed'}")
    return failed


def speed() -> None:
    from nmoe.codegen.emulator import Device, library, ptx

    library.library()
    loop = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    L: add.u32 %r2, %r2, %r1;
    xor.b32 %r3, %r2, %r0;
    mad.lo.u32 %r2, %r3, 3, %r2;
    shl.b32 %r4, %r2, 3;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, 50000;
    @%p1 bra L;
    """
    device = Device()
    program = device.program(ptx.parse(entry(loop, 0)), "k")
    start = time.process_time()
    report = device.launch(program, (1, 1, 1), (128, 1, 1), b"")
    seconds = time.process_time() - start
    print(
        f"arithmetic loop: {report.counters['instructions'] / seconds / 1e6:.1f} M warp instructions a CPU second"
    )
    case = gemm_case(False)
    start, count = time.process_time(), 0
    while time.process_time() - start < 2:
        run_emulator(case)
        count += 1
    print(
        f"GEMM 128 x 64 x 256 in bf16, races checked: {(time.process_time() - start) / count * 1e3:.1f} ms of CPU"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on", choices=("emulator", "device"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", metavar="NAME")
    parser.add_argument("--compare", type=Path, metavar="DIR")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    failed = 0
    if arguments.on:
        if arguments.out is None:
            parser.error("--on needs --out")
        failed = record(arguments.on, arguments.out, arguments.case)
    if arguments.speed:
        speed()
    return compare(arguments.compare) if arguments.compare else failed


if __name__ == "__main__":
    sys.exit(main())
