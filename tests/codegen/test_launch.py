"""Loading a kernel: refused on a device that it was not built for, and without the runtime library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nmoe.codegen import launch
from nmoe.codegen.cache import Cache, Entry
from nmoe.codegen.gemm import GemmConfig, GemmProblem

BLACKWELLS = Entry(Path("ab" * 32), "sm_100a", {})


def device(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def test_a_kernel_is_not_loaded_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "NVIDIA H100", (9, 0))
    with pytest.raises(launch.LaunchError) as error:
        launch.Kernel(BLACKWELLS)
    assert str(error.value) == (
        '[target] device = "sm_100a" runs on B200, the device is NVIDIA H100 of compute capability 9.0: '
        "set [target] device"
    )


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        launch.LaunchError,
        match=r'^\[target\] device = "sm_90a" runs on H100 SXM, and torch finds no CUDA .* = "cpu"',
    ):
        launch.device_of("sm_90a")


def test_the_runtime_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "NVIDIA B200", (10, 0))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    launch._runtime.cache_clear()
    with pytest.raises(
        launch.LaunchError, match=r"libcute_dsl_runtime\.so is not installed: pip install 'nmoe\[cuda\]'"
    ):
        launch.Kernel(BLACKWELLS)


def test_a_kernel_that_the_cache_lacks(tmp_path: Path) -> None:
    problem, config = GemmProblem("fprop", 3, 256, 136, "store"), GemmConfig(256, 4, 2)
    with pytest.raises(launch.LaunchError) as error:
        launch.CudaLauncher(Cache(tmp_path)).bind(problem, config, "sm_90a", [])
    assert str(error.value) == (
        f"the kernel of gemm bf16 fprop 256x136 for sm_90a ({config}) is not in {tmp_path}: build it with nmoe "
        "compile, on a machine with nvidia-cutlass-dsl, and bring the cache here"
    )
