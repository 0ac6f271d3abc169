"""One MoE layer in BF16 against SonicMoE on one GPU, in turn, in the regime of training.

    python bench/moe_layer.py build DIR                    the kernels; needs no GPU
    python bench/moe_peers.py DIR NAME [--json FILE]       on the GPU, with sonic-moe 0.1.2.post1, quack-kernels 0.6.5
                                                           and what compiles them; NAME: moonlet, dsv3-ep8;
                                                           --alone leaves SonicMoE out

A GPU that multiplies without a pause is at its power limit, and slower than in a burst. So every candidate runs back to
back for a while, of which the last two thirds count, and they take turns for several rounds; cuBLAS's 8192³, with which
each round begins, says what the tensor cores reach in the same regime. Medians over the rounds.

What is compared: router, experts, combine. Ours accumulates weight gradients in FP32 and its forward stores what the
backward needs; SonicMoE's gradients are BF16, its router is BF16, its forward alone stores nothing. QuACK tunes its
GEMMs among TILES; one, its default, takes 100 s to compile on 16 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_layer import DEVICE, LARGE, TARGET, Runner, Shape, call_times, schedule_of

from nmoe import binding
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher

TILES = {(128, 192, True)}  # m, n, ping-pong
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


def sonic(shape: Shape) -> tuple[Call, Call]:
    """SonicMoE's layer: forward, forward + backward."""
    import quack.gemm_config as configs
    import quack.gemm_runtime.identity as identity

    exact, every = identity.semantic_value_key, configs._get_sm90_configs

    def tolerant(value: Any, seen: Any) -> Any:  # QuACK 0.6.5 does not know a ContextVar of CuTeDSL 4.8
        try:
            return exact(value, seen)
        except TypeError:
            return ("opaque", type(value).__name__)

    def some(*args: Any, **kwargs: Any) -> list[Any]:
        found = every(*args, **kwargs)
        return [
            c
            for c in found
            if (c.tile_m, c.tile_n, c.pingpong) in TILES and c.cluster_m == 2 and not c.swap_ab
        ]

    identity.semantic_value_key, configs._get_sm90_configs = tolerant, some
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer as layer

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device=DEVICE) * scale).bfloat16()

    x = normal(shape.tokens, shape.hidden)
    router = normal(shape.experts, shape.hidden, scale=shape.hidden**-0.5)
    w1 = normal(shape.experts, 2 * shape.inter, shape.hidden, scale=shape.hidden**-0.5)
    w2 = normal(shape.experts, shape.hidden, shape.inter, scale=shape.inter**-0.5)
    dy = normal(shape.tokens, shape.hidden)
    leaves = [t.requires_grad_() for t in (x, router, w1, w2)]
    stream = torch.cuda.current_stream().cuda_stream

    def run(inference: bool) -> torch.Tensor:
        return layer(x, router, w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, shape.topk, stream,
                     ActivationType.SWIGLU, inference)[0]  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            run(True)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run(False).backward(dy)

    return forward, both


class Rounds:
    """Times of the candidates `calls`, ours among them, and of each call of ours."""

    def __init__(self, shape: Shape, runner: Runner, seconds: float) -> None:
        self.shape, self.runner, self.seconds = shape, runner, seconds
        self.calls: dict[str, Call] = {"cuBLAS": cublas(), "ours": lambda: runner.executor.run("micro")}
        self.stages = {op.name: op.stage for op in runner.schedule.graph.ops}

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
                print(f"{name:18} {ms:7.3f} ms, {rate:4.0f} TFLOP/s, {100 * rate / peak:.1f} % of cuBLAS "
                      f"({' '.join(f'{t:.2f}' for t in times)})")  # fmt: skip
        for name, times in sorted(found["calls"].items(), key=lambda item: -statistics.median(item[1])):
            print(f"    {statistics.median(times):7.3f} ms {name}")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=tuple(LARGE))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    shape = LARGE[args.name]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.name} {shape}", flush=True)
    schedule = schedule_of(shape, "bf16", binding.kernels(TARGET, args.folder))
    runner = Runner(shape, schedule, CudaLauncher(Cache(args.folder)))
    runner.fill(1)
    runner.step()
    rounds = Rounds(shape, runner, args.seconds)
    if not args.alone:
        begin = time.perf_counter()
        forward, both = sonic(shape)
        both()
        forward()
        torch.cuda.synchronize()
        print(f"SonicMoE compiled and tuned in {time.perf_counter() - begin:.0f} s", flush=True)
        rounds.calls |= {"SonicMoE": both, "SonicMoE, forward": forward}
    found = rounds.run(args.rounds)
    rounds.report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
