"""What is installed and what this machine can do with it: `nmoe doctor`.

Looks and reports; a missing or broken part is a finding, never an exception.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "problem"]

CAPABILITY = {"sm_100a": "10.0", "sm_90a": "9.0"}  # what nvidia-smi calls the targets
DISK_GB = 20.0  # free space below which checkpoints of small runs already run out
GPU_EXTRA = "pip install 'nmoe[cuda]'"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when nothing is to be done."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi reports it; `capability` is "9.0" for Hopper's H100."""

    name: str
    capability: str
    driver: str


def report() -> list[Finding]:
    """Every check, in the order of the printout. Does not raise, whatever is missing."""
    gpus = _safely(nvidia_gpus, [])
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", lambda: [Finding("python", "ok", platform.python_version())]),
        ("torch", lambda: [_torch(bool(gpus))]),
        ("duckdb", lambda: [_package("duckdb", "metrics cannot be written")]),
        ("datasets", lambda: [_package("datasets", "nmoe prep-mixture cannot read sources")]),
        ("gpu", lambda: [_gpu(gpus)]),
        ("CuTeDSL", lambda: [_package("nvidia-cutlass-dsl", "kernels cannot be compiled", GPU_EXTRA)]),
        (
            "triton",
            lambda: [_package("triton", "attention, loss and optimizer cannot be compiled", GPU_EXTRA)],
        ),
        ("nvshmem", lambda: [_nvshmem()]),
        ("gcc", lambda: [_gcc()]),
        ("disk", lambda: [_disk(Path.cwd())]),
        ("targets", lambda: _targets(gpus)),
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:
            found.append(Finding(name, "problem", f"the check failed: {type(error).__name__}: {error}",
                                 "report it with this line"))  # fmt: skip
    return found


def format_findings(findings: list[Finding]) -> str:
    """One line a finding, its remedy below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<20} {finding.state:<8} {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<20} {'->':<8} {finding.remedy}")
    return "\n".join(lines)


def nvidia_gpus() -> list[Gpu]:
    """The GPUs that the driver sees; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [Gpu(*row) for row in rows if len(row) == 3]


def _safely(work: Callable[[], list[Gpu]], otherwise: list[Gpu]) -> list[Gpu]:
    try:
        return work()
    except Exception:
        return otherwise


def _version(package: str) -> str | None:
    """Without importing it: CuTeDSL alone takes seconds to import."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(package: str, consequence: str, remedy: str = "") -> Finding:
    version = _version(package)
    if version:
        return Finding(package, "ok", version)
    return Finding(package, "missing", consequence, remedy or f"pip install {package}")


def _torch(gpu: bool) -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("torch", "missing", f"cannot be imported: {error}", "pip install torch==2.13.0")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return Finding(
            "torch", "problem", f"{torch.__version__}, expected 2.11 or newer", "pip install torch==2.13.0"
        )
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__}, built for {built}, {torch.get_num_threads()} thread(s)"
    if gpu and not torch.cuda.is_available():
        return Finding("torch", "problem", f"{found}; it cannot use the GPU", "install torch's CUDA build")
    return Finding("torch", "ok", found)


def _gpu(gpus: list[Gpu]) -> Finding:
    if not gpus:
        remedy = "none for the cpu target; for the others a GPU and NVIDIA's driver"
        return Finding("gpu", "missing", "nvidia-smi shows no GPU", remedy)
    counts = {gpu: gpus.count(gpu) for gpu in dict.fromkeys(gpus)}
    shown = ", ".join(f"{n} x {gpu.name} (compute {gpu.capability})" for gpu, n in counts.items())
    return Finding("gpu", "ok", f"{shown}, driver {gpus[0].driver}")


def _nvshmem() -> Finding:
    """The host library of the wheel that nvshmem4py depends on."""
    for package in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        version = _version(package)
        if version:
            files = importlib.metadata.files(package) or []
            library = next((f for f in files if f.name.startswith("libnvshmem_host.so")), None)
            if library is None:
                return Finding("nvshmem", "problem", f"{package} {version} has no libnvshmem_host", GPU_EXTRA)
            return Finding("nvshmem", "ok", f"{version}, {library.name}")
    return Finding("nvshmem", "missing", "expert parallelism on GPUs needs its host library", GPU_EXTRA)


def _gcc() -> Finding:
    path = shutil.which("gcc")
    if path is None:
        return Finding("gcc", "missing", "kernels cannot be linked", "apt-get install gcc")
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=30)
    return Finding("gcc", "ok", done.stdout.strip() or path)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    found = f"{free:,.0f} GB free at {folder}"
    if free < DISK_GB:
        return Finding("disk", "problem", found, "free space, or set NMOE_HOME to a larger disk")
    return Finding("disk", "ok", found)


def _targets(gpus: list[Gpu]) -> list[Finding]:
    """For each target: runs here, compiles here, or why not."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return [Finding("targets", "missing", "nothing runs without torch", "pip install torch==2.13.0")]
    found = [Finding("target cpu", "ok", "runs here")]
    compiler = _version("nvidia-cutlass-dsl") is not None
    for target, capability in CAPABILITY.items():
        name = f"target {target}"
        matching = any(gpu.capability == capability for gpu in gpus)
        if not compiler:
            found.append(Finding(name, "missing", "can be planned; no compiler for its kernels", GPU_EXTRA))
        elif matching:
            found.append(Finding(name, "ok", "runs here"))
        else:
            remedy = f"run on a GPU of compute capability {capability}"
            found.append(Finding(name, "ok", "compiles here, no such GPU to run it", remedy))
    return found
