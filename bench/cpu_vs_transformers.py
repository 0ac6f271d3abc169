"""One training step on the CPU, nmoe against transformers: the same weights, batch, threads and process.

    python bench/cpu_vs_transformers.py [--config configs/quickstart.toml] [--repeats 5] [--threads N]

A step is forward, backward, gradient clipping and AdamW on one batch of random tokens, in FP32. transformers runs with
SDPA, torch's fused AdamW and two of its expert implementations; the sides take turns, and the ratio is against the
faster of them. The losses of the first step are compared, for all must do the same work. On a machine with
other work the CPU seconds of a step say more than the wall clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from nmoe import hf
from nmoe.config import Config, load
from nmoe.data.loader import Batch
from nmoe.step import Step

EXPERTS = ("eager", "grouped_mm")  # those that do not gather a copy of the weights for each token
STEP = 1000  # past the warm-up


def nmoe_side(step: Step, batch: Batch) -> Callable[[], float]:
    return lambda: step.run(STEP, batch).losses["main"]


def transformers_side(config: Config, folder: Path, experts: str, batch: Batch) -> Callable[[], float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", experts_implementation=experts
    ).train()
    optim = config.optim
    decayed = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    tokens, targets = (torch.from_numpy(a).long() for a in (batch.tokens, batch.targets[0]))

    def run() -> float:
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "configs/quickstart.toml"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    config = load(args.config)
    shape = (config.train.batch_size, config.train.seq_len)
    drawn = np.random.default_rng(0).integers(config.model.vocab_size, size=(2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    batch = Batch(drawn[0], positions, drawn[1:], drawn[0].size)

    step = Step(config)
    step.parameters.initialise(config.run.seed, config.model.init_std)
    biases = {name: t for name, t in step.tensors.items() if name.endswith(".router_bias")}
    sides = {"nmoe": nmoe_side(step, batch)}
    with tempfile.TemporaryDirectory() as folder:
        hf.export(config, step.parameters.masters(), biases, Path(folder) / "model")
        for experts in EXPERTS:
            sides[f"transformers {experts}"] = transformers_side(
                config, Path(folder) / "model", experts, batch
            )

    print(
        f"{date.today()}, {_processor()}, {args.threads} threads, load average {os.getloadavg()[0]:.1f} at start"
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.config}: {shape[0]} × {shape[1]}"
    )
    losses = {name: run() for name, run in sides.items()}  # and warm up
    if max(losses.values()) - min(losses.values()) > 1e-3:
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)

    rates = {name: batch.valid / statistics.median(taken) for name, taken in times.items()}
    print(f"{'':24}{'first loss':>12}{'median s':>10}{'min s':>8}{'max s':>8}{'CPU s':>8}{'tokens/s':>10}")
    for name, taken in times.items():
        row = f"{statistics.median(taken):10.2f}{min(taken):8.2f}{max(taken):8.2f}{statistics.median(cpu[name]):8.2f}"
        print(f"{name:24}{losses[name]:12.5f}{row}{rates[name]:10.0f}")
    ours = rates.pop("nmoe")
    best = max(rates, key=rates.__getitem__)
    effort = statistics.median(cpu[best]) / statistics.median(cpu["nmoe"])
    print(f"nmoe is {ours / rates[best]:.2f}× {best}, {effort:.2f}× by CPU time")
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
