"""Times on a GPU, for the benches beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median(call: Callable[[], Any], repeats: int = 11) -> float:
    """Milliseconds of one call, between events around each."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)
