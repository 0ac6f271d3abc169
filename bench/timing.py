"""Times on a GPU, and what they were taken on, for the benches beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from datetime import date
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """What a result says of its origin."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def median(call: Callable[[], Any], repeats: int = 11, before: Callable[[], Any] = lambda: None) -> float:
    """Milliseconds of one call, between events around each; `before` each, what is not timed."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        before()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)
