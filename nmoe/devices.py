"""What the devices can do: peaks and sizes as data, each with its source.

The peaks serve `nmoe plan` and the MFU of a run alike. Nothing is known about an arbitrary CPU, so the cpu target's
numbers are measured: a short GEMM and a short copy, once a process.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from nmoe.errors import UserError


@dataclass(frozen=True)
class Device:
    """One device of a host. `peak`: dense FLOP/s by the precision of the operands; "fp32" is plain arithmetic, not the
    tensor cores'. Bandwidths are bytes/s, links in one direction of one device. `attained` is the share of each that
    long kernels reach, by precision and by "attention", "memory", "nvlink" and "network"; `usable` the share of the
    memory left for tensors."""

    name: str
    target: str
    peak: Mapping[str, float]
    attained: Mapping[str, float]
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    node: int  # devices that NVLink joins
    sms: int
    usable: float
    sources: tuple[str, ...]


# Not measured by us on the device in question; replaced as measurements arrive.
_ASSUMED = {
    "nvfp4": 0.5,  # cuBLAS reaches 6787 of 10 000 TFLOP/s on a GB200 (NVIDIA blog) with no quantization beside it
    "fp32": 0.7,  # routers and elementwise work
    "attention": 0.55,  # of the BF16 peak; forward kernels report 0.7, backward ones 0.5
    "memory": 0.85,  # the goal that nmoe's own kernels are held to
    "network": 0.8,
}
_USABLE = 0.95  # assumed: the rest goes to the CUDA context, NCCL and library workspaces

_HOPPER_PEAK = {"fp32": 67e12, "bf16": 989e12, "mxfp8": 989e12, "nvfp4": 989e12}
_HOPPER_ATTAINED = _ASSUMED | {"bf16": 0.75, "mxfp8": 0.75, "nvfp4": 0.75, "nvlink": 0.86}
_HOPPER_SOURCES = (
    "NVIDIA H100/H200 SXM data sheets: 67 TFLOP/s FP32, 989 TFLOP/s dense BF16, NVLink 4 of 900 GB/s both ways",
    "sm_90a multiplies MXFP8 and NVFP4 operands as BF16, so their peak is that of BF16",
    "0.75: cuBLAS, 8192^3 BF16 on one H100, 738-776 TFLOP/s (measured)",
    "0.86: peer copy on an H100 pair, 387 of 450 GB/s (measured)",
    "memory as PyTorch (H100) and nvidia-smi (H200) report it, above the nominal 80 and 141 GB",
    "network: one 400 Gb/s adapter a GPU",
)

TABLE: dict[str, Device] = {
    "B200": Device(
        name="B200",
        target="sm_100a",
        peak={"fp32": 75e12, "bf16": 2.25e15, "mxfp8": 4.5e15, "nvfp4": 9e15},
        attained=_ASSUMED | {"bf16": 0.7, "mxfp8": 0.5, "nvlink": 0.78},
        memory=180e9,
        bandwidth=7.7e12,
        nvlink=900e9,
        network=50e9,
        node=8,
        sms=148,
        usable=_USABLE,
        sources=(
            "NVIDIA HGX B200 data sheet: 75 TFLOP/s FP32, 2.25/4.5/9 PFLOP/s dense BF16/FP8/FP4, 180 GB, NVLink 5 of "
            "1.8 TB/s both ways; 7.7 TB/s is the lower of two published bandwidths",
            "mxfp8 0.5: torchao's MXFP8 grouped GEMM at DeepSeek-V3 shapes, 2287-2303 TFLOP/s (its README)",
            "bf16 0.7: assumed, between cuBLAS on Hopper and grouped GEMMs on B200",
            "nvlink 0.78: 700 GB/s, within DeepEP V2's 643-740 GB/s on B200 EP8 (its README)",
            "network: one 400 Gb/s adapter a GPU",
        ),
    ),
    "H100": Device(
        name="H100",
        target="sm_90a",
        peak=_HOPPER_PEAK,
        attained=_HOPPER_ATTAINED,
        memory=85.0e9,
        bandwidth=3.35e12,
        nvlink=450e9,
        network=50e9,
        node=8,
        sms=132,
        usable=_USABLE,
        sources=_HOPPER_SOURCES,
    ),
    "H200": Device(
        name="H200",
        target="sm_90a",
        peak=_HOPPER_PEAK,
        attained=_HOPPER_ATTAINED,
        memory=150.7e9,
        bandwidth=4.8e12,
        nvlink=450e9,
        network=50e9,
        node=8,
        sms=132,
        usable=_USABLE,
        sources=_HOPPER_SOURCES,
    ),
}
_OF_TARGET = {"sm_100a": "B200", "sm_90a": "H100"}

# What the reference math multiplies in: MXFP8 dequantizes exactly to BF16, NVFP4 needs FP32.
_CPU_FORMAT = {"fp32": "fp32", "bf16": "bf16", "mxfp8": "bf16", "nvfp4": "fp32"}


def of_target(target: str) -> Device:
    """The device that a config's target stands for; for "cpu" this machine, measured at the first call."""
    return TABLE[_OF_TARGET[target]] if target in _OF_TARGET else _this_cpu(torch.get_num_threads())


def of_name(name: str) -> Device:
    """The table's entry for a device by the name that its driver reports ("NVIDIA H100 80GB HBM3").

    Raises UserError for a device that is not in the table.
    """
    for key, device in TABLE.items():
        if key in name:
            return device
    raise UserError(
        f"device {name!r} is not in nmoe/devices.py, which has {', '.join(TABLE)}; add its data sheet"
    )


def peak_flops(target: str, precision: str) -> float:
    """Dense FLOP/s of one device of the target: what MFU divides by. Measured for "cpu", over the threads in use."""
    if target == "cpu":
        return _gemm_flops(_CPU_FORMAT[precision], torch.get_num_threads())
    return of_target(target).peak[precision]


def cpu_name() -> str:
    """The processor's model, as the system reports it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _this_cpu(threads: int) -> Device:
    return Device(
        name=f"{cpu_name()}, {threads} thread(s)",
        target="cpu",
        peak={precision: _gemm_flops(format, threads) for precision, format in _CPU_FORMAT.items()},
        attained=dict.fromkeys((*_CPU_FORMAT, "attention", "memory", "nvlink", "network"), 1.0),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=_copy_bandwidth(threads),
        nvlink=float("inf"),  # processes of one machine share its memory
        network=float("inf"),
        node=1 << 30,
        sms=0,
        usable=0.9,  # assumed: the rest is the interpreter's, the loader's and the system's
        sources=("a 768^3 GEMM in each format and a 64 MiB copy, the best of five, timed at the first use",),
    )


@cache
def _gemm_flops(format: str, threads: int) -> float:
    n, dtype = 768, {"fp32": torch.float32, "bf16": torch.bfloat16}[format]
    a, b, c = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    return 2.0 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=c))


@cache
def _copy_bandwidth(threads: int) -> float:
    source, copy = (torch.ones(8 << 20, dtype=torch.float64) for _ in range(2))
    return 2.0 * source.nbytes / _best_seconds(lambda: copy.copy_(source))


def _best_seconds(work: Callable[[], object]) -> float:
    """Of five runs, after one to warm up."""
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
