"""One MoE layer in BF16 against SonicMoE and torch._grouped_mm on one GPU, in turn, in the regime of training.

    python bench/moe_layer.py build DIR                    nmoe's kernels; needs no GPU
    python bench/moe_peers.py build DIR                    SonicMoE's GEMMs (bench/sonic.py), into DIR/quack; neither;
                                                           with sonic-moe 0.1.2.post1 and quack-kernels 0.6.5
    python bench/moe_peers.py prepare DIR NAME             on the GPU: what Triton and torch compile there, into their
                                                           caches, so that `run` takes less long
    python bench/moe_peers.py run DIR NAME [--json FILE]   on the GPU; NAME: moonlet, dsv3-ep8; adds it to FILE

A GPU that multiplies without a pause is at its power limit, and slower than in a burst. So every candidate runs back to
back for a while, of which the last two thirds count, and they take turns for several rounds; cuBLAS's 8192³, with which
each round begins, says what the tensor cores reach in the same regime. Medians over the rounds.

What is compared: router, experts, combine. Ours accumulates weight gradients in FP32 and its forward stores what the
backward needs; SonicMoE's gradients are BF16, its router is BF16, its forward alone stores nothing unless it is
training's, its results are first compared with torch's. torch's routing is given, its gradients are BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sonic
import torch
from moe_layer import DEVICE, LARGE, TARGET, Runner, Shape, call_times, schedule_of, torch_layer
from timing import provenance

from nmoe import binding
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher

Call = Callable[[], Any]


def steady(call: Call, seconds: float) -> float:
    """Mean milliseconds of a call among calls without a pause for so long, the first third left out."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(3, int(seconds / (time.perf_counter() - start)))
    for i in range(count):
        if i == count // 3:
            begin.record()
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / (count - count // 3)


def cublas() -> Call:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def loaded(folder: Path, shape: Shape) -> Runner:
    schedule = schedule_of(shape, "bf16", binding.kernels(TARGET, folder))
    runner = Runner(shape, schedule, CudaLauncher(Cache(folder)))
    runner.fill(1)
    runner.step()
    return runner


class Rounds:
    """Times of the candidates `calls`, ours among them, and of each call of ours."""

    def __init__(self, shape: Shape, runner: Runner, seconds: float) -> None:
        self.shape, self.runner, self.seconds = shape, runner, seconds
        self.calls: dict[str, Call] = {"cuBLAS": cublas(), "ours": lambda: runner.executor.run("micro")}
        self.stages = {op.name: op.stage for op in runner.schedule.graph.ops}

    def add(self, name: str, make: Callable[[], tuple[Call, ...]]) -> None:
        """A peer's forward, forward + backward and, where it is another, the forward of training, called once; or why
        there is none."""
        begin = time.perf_counter()
        try:
            forward, *others = make()
            for call in (*others, forward):
                call()
            torch.cuda.synchronize()
            named = zip((name, f"{name}, training's forward"), others, strict=False)
            self.calls |= dict(named) | {f"{name}, forward": forward}
            print(f"{name} compiled and tuned in {time.perf_counter() - begin:.0f} s", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:600]}", flush=True)

    def run(self, count: int) -> dict[str, Any]:
        taken: dict[str, list[float]] = {}
        each: dict[str, list[float]] = {}
        for _ in range(count):
            for name, call in self.calls.items():
                taken.setdefault(name, []).append(steady(call, self.seconds))
            times = call_times(self.runner, lambda: steady(self.calls["ours"], self.seconds))
            found: dict[str, list[float]] = {}
            for name, ms in times[len(times) // 3 :]:
                found.setdefault(name, []).append(ms)
            for name, some in found.items():
                each.setdefault(name, []).append(statistics.mean(some))
            forward = sum(e[-1] for name, e in each.items() if self.stages[name] == "forward")
            taken.setdefault("ours, forward", []).append(forward)
        return {"ms": taken, "calls": each}

    def report(self, found: dict[str, Any]) -> None:
        shape, taken = self.shape, found["ms"]
        peak = 2 * 8192**3 / statistics.median(taken["cuBLAS"]) / 1e9
        print(f"cuBLAS 8192³: {peak:.0f} TFLOP/s ({' '.join(f'{t:.2f}' for t in taken['cuBLAS'])} ms)")
        for name, times in taken.items():
            if name != "cuBLAS":
                products = 6.0 if name.endswith("forward") else 18.0
                ms = statistics.median(times)
                rate = products * shape.tokens * shape.topk * shape.hidden * shape.inter / ms / 1e9
                print(f"{name:24} {ms:7.3f} ms, {rate:4.0f} TFLOP/s, {100 * rate / peak:.1f} % of cuBLAS "
                      f"({' '.join(f'{t:.2f}' for t in times)})")  # fmt: skip
        for name, times in sorted(found["calls"].items(), key=lambda item: -statistics.median(item[1])):
            print(f"    {statistics.median(times):7.3f} ms {name}")
        print(flush=True)


def prepare(folder: Path, shape: Shape) -> None:
    jobs = sonic.prepare(
        shape.tokens, shape.hidden, shape.topk, max(1, len(os.sched_getaffinity(0)) // 2 - 1)
    )
    for call in torch_layer(shape, loaded(folder, shape), compiled=True):
        call()
    torch.cuda.synchronize()
    for job in jobs:
        job.join()
    print(f"prepared {shape}: exit codes {[job.exitcode for job in jobs]}", flush=True)


def run(folder: Path, shape: Shape, count: int, seconds: float) -> dict[str, Any]:
    runner = loaded(folder, shape)
    rounds = Rounds(shape, runner, seconds)

    def peer() -> tuple[Call, ...]:
        layer = sonic.Layer(
            folder / "quack", shape.tokens, shape.hidden, shape.inter, shape.experts, shape.topk
        )
        apart = layer.check()
        print(f"SonicMoE is {', '.join(f'{n} {e:.1e}' for n, e in apart.items())} from torch", flush=True)
        return layer.forward, layer.both, layer.training_forward

    rounds.add("SonicMoE", peer)
    rounds.add("torch", lambda: torch_layer(shape, runner))
    rounds.add("torch compiled", lambda: torch_layer(shape, runner, compiled=True))
    found = rounds.run(count)
    rounds.report(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=tuple(LARGE), nargs="?", default="moonlet")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.35)
    args = parser.parse_args()
    shape = LARGE[args.name]
    if args.action == "build":
        sonic.build(args.folder / "quack")
        return
    if args.action == "prepare":
        prepare(args.folder, shape)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.name} {shape}", flush=True)
    found = provenance() | {args.name: run(args.folder, shape, args.rounds, args.seconds)}
    if args.json:
        others = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(others | found, indent=1))


if __name__ == "__main__":
    main()
