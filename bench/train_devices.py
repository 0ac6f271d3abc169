"""The same training steps on a GPU and on the CPU target: how far apart their losses are.

    python bench/train_devices.py build DIR     compile the kernels into DIR; needs no GPU
    python bench/train_devices.py run DIR       on the GPU; --json FILE keeps the losses

A small model in BF16 takes steps on random tokens on both, and in FP32 on the CPU. The GPU's losses must be as near to
FP32's as 1.5 times those of the CPU in BF16, which rounds at the same places in another order, but for the logits: the
GPU's are BF16. bench/moonlet.py times a model of size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nmoe import binding
from nmoe.bench import synthetic
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import format_build
from nmoe.config import Config, load
from nmoe.step import Step

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS, LEARNING_RATE = 20, 3e-4


def small(target: str, precision: str) -> Config:
    config = load(CONFIGS / "quickstart.toml")
    return replace(
        config,
        target=replace(config.target, device=target),
        schedule=replace(config.schedule, precision=precision),
        train=replace(config.train, batch_size=4, micro_batch_size=2, seq_len=128, steps=STEPS),
        # At the config's own rate, without warmup, steps are chaotic: weights that differ by 1e-6 give losses that
        # differ by 0.02 within STEPS, and which rounding is nearer to FP32's is left to chance.
        optim=replace(config.optim, lr=LEARNING_RATE, warmup_tokens=0, decay_tokens=0),
    )


def losses(config: Config, steps: int) -> tuple[list[float], list[float]]:
    """The loss and the seconds of each step."""
    step = Step(config, say=print)
    step.parameters.initialise(config.run.seed, config.model.init_std)
    batches = synthetic(config)
    found, seconds = [], []
    for index in range(steps):
        begin = time.perf_counter()
        found.append(
            step.run(index, batches(index % 2)).losses["main"]
        )  # two batches, so that it learns them
        seconds.append(time.perf_counter() - begin)
    captured = step.executors[0].captured
    name = f"{config.run.name} {config.target.device} {config.schedule.precision}"
    print(f"{name}: loss {found[0]:.5f} … {found[-1]:.5f}, "
          f"{1e3 * min(seconds):.1f} ms a step at best{', micro-batches replayed as a CUDA graph' if captured else ''}",
          flush=True)  # fmt: skip
    return found, seconds


def run(save: Path | None) -> None:
    results: dict[str, Any] = {}
    for name, config, steps in (
        ("gpu", small("sm_90a", "bf16"), STEPS),
        ("again", small("sm_90a", "bf16"), STEPS),
        ("cpu", small("cpu", "bf16"), STEPS),
        ("exact", small("cpu", "fp32"), STEPS),
    ):
        try:
            results[name] = losses(config, steps)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        if save:
            save.write_text(json.dumps(results))
    print(f"two runs on the GPU give the same losses bit for bit: {results['gpu'][0] == results['again'][0]}")
    exact = results["exact"][0]
    gpu, cpu = (
        sum(abs(a - b) for a, b in zip(results[name][0], exact, strict=True)) / STEPS
        for name in ("gpu", "cpu")
    )
    print(f"mean distance from FP32's losses over {STEPS} steps: GPU {gpu:.2e}, CPU in BF16 {cpu:.2e}")
    assert gpu <= 1.5 * cpu, "the GPU's losses are further from FP32's than the CPU's in BF16"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["NMOE_HOME"] = str(args.folder)  # where the trainer looks for kernels
    if args.action == "run":
        run(args.json)
        return
    config = small("sm_90a", "bf16")
    found = binding.needed(config, [binding.lowered(config)])
    made = build_kernels(
        list(found),
        args.folder / "kernels",
        workers=args.workers,
        progress=sys.stdout,
    )
    print(format_build("train_devices", made))


if __name__ == "__main__":
    main()
