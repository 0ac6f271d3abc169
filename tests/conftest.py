"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, on tensors of a few kilobytes

from collections.abc import Callable

import pytest
from hypothesis import settings
from tiny import tiny_config

from nmoe.config import Config

settings.register_profile("nmoe", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("nmoe")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    return tiny_config
