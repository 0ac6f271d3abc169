"""What tests of generated kernels need: the compiler, and the emulator that runs what it made. Neither needs a GPU."""

from __future__ import annotations

import importlib.util
import shutil

import pytest


def missing() -> list[str]:
    found = [name for name in ("nvidia_cutlass_dsl", "tvm_ffi") if importlib.util.find_spec(name) is None]
    return found + [name for name in ("gcc",) if shutil.which(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = missing()
    emulator = importlib.util.find_spec("nmoe.codegen.emulator") is not None
    for item in items:
        needs = set(getattr(item, "fixturenames", ()))
        if {"compiler", "emulator"} & needs and absent:
            item.add_marker(
                pytest.mark.skip(reason=f"kernels cannot be compiled here, missing: {', '.join(absent)}")
            )
        elif "emulator" in needs and not emulator:
            item.add_marker(pytest.mark.skip(reason="nmoe.codegen.emulator is not in this build"))


@pytest.fixture
def compiler() -> None:
    """The test compiles kernels."""


@pytest.fixture
def emulator() -> None:
    """The test compiles kernels and runs them on the emulator."""


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes NVSHMEM's place."""
    import emulated_nvshmem

    from nmoe.codegen.templates import rdep_rail

    monkeypatch.setattr(rdep_rail, "Nvshmem", emulated_nvshmem.Nvshmem)
