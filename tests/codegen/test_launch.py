"""Loading a kernel: refused on a device that it was not built for, and without the runtime library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nmoe.codegen import launch
from nmoe.codegen.cache import Entry

BLACKWELLS = Entry(Path("ab" * 32), "sm_100a", {})


def device(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return torch.device("cuda")


def test_a_kernel_is_not_loaded_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(launch.LaunchError) as error:
        launch.Kernel(BLACKWELLS, device(monkeypatch, "NVIDIA H100", (9, 0)))
    assert str(error.value) == (
        "abababababababab is built for sm_100a (B200), the device is NVIDIA H100 of compute capability 9.0: "
        "set [target] device"
    )


def test_the_runtime_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    launch._runtime.cache_clear()
    with pytest.raises(
        launch.LaunchError, match=r"libcute_dsl_runtime\.so is not installed: pip install 'nmoe\[cuda\]'"
    ):
        launch.Kernel(BLACKWELLS, device(monkeypatch, "NVIDIA B200", (10, 0)))
