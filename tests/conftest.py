"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, on tensors of a few kilobytes

from collections.abc import Callable

import pytest
from tiny import tiny_config

from nmoe.config import Config


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    return tiny_config
