"""Training on a GPU: the same steps as on the CPU target. Needs the GPU, and a compiler or a filled cache."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from nmoe.bench import synthetic
from nmoe.step import Step

CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a"}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() not in CAPABILITY,
        reason="no GPU of a target",
    ),
]


def losses(target: str, precision: str) -> list[float]:
    config = tiny_config(target={"device": target}, schedule={"precision": precision})
    step, batches = Step(config), synthetic(config)
    step.parameters.initialise(0, 0.1)
    return [step.run(i, batches(0)).losses["main"] for i in range(8)]


def test_a_gpu_trains_as_the_cpu_does() -> None:
    """As near to FP32's losses as the CPU in BF16, and the same bits every time, eager or from a CUDA graph."""
    target = CAPABILITY[torch.cuda.get_device_capability()]
    exact, reference, found = losses("cpu", "fp32"), losses("cpu", "bf16"), losses(target, "bf16")
    assert found == losses(target, "bf16")

    def distance(other: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(other, exact, strict=True))

    assert distance(found) <= 2 * distance(reference)
