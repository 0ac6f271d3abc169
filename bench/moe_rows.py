"""The MoE layer's kernels around its GEMMs on one GPU: router, plan, dispatch, combine. Right, repeatable, how fast.

    python bench/moe_rows.py build DIR     compile the kernels of the shapes below into DIR; no GPU needed
    python bench/moe_rows.py run DIR       on the GPU: time, check against float64; --json FILE keeps numbers

Times are medians of replayed CUDA graphs of several launches, divided. Traffic is the least that a kernel needs, every
operand once and padding left out; its rate is given as a share of what a torch copy of 1 GiB reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmoe.codegen import compiler
from nmoe.codegen.cache import Cache
from nmoe.codegen.routing import (
    CombineProblem,
    DispatchProblem,
    PlanProblem,
    RouterBwdProblem,
    RouterProblem,
    RoutingConfig,
    RoutingProblem,
)  # fmt: skip

TARGET = "sm_90a"
LAUNCHES = 10  # in a graph
SHAPES = {  # tokens, hidden, experts, topk, groups, groups kept
    "moonlet": (32768, 2048, 64, 6, 1, 1),
    "dsv3": (8192, 7168, 256, 8, 8, 4),
}
TOKENS = (1, 3, 64, 131, 1000)  # of the odd problems


def layer(hidden: int, experts: int, topk: int, groups: int, kept: int) -> dict[str, RoutingProblem]:
    scored = {"experts": experts, "topk": topk, "hidden": hidden, "score": "sigmoid", "normalize": True}
    return {
        "dispatch": DispatchProblem(experts, topk, hidden, True),
        "dispatch backward": DispatchProblem(experts, topk, hidden, False),
        "combine": CombineProblem(experts, topk, hidden, False),
        "combine backward": CombineProblem(experts, topk, hidden, True),
        "plan": PlanProblem(experts, topk, 128),
        "router": RouterProblem(
            **scored, balance=True, z=False, groups=groups, topk_groups=kept, biased=True
        ),
        "router backward": RouterBwdProblem(**scored, balance=True, z=False, addends=1),
    }


def odd() -> list[RoutingProblem]:
    softmax = {"score": "softmax", "normalize": False, "balance": True, "z": True}
    plain = {"score": "sigmoid", "normalize": True, "balance": False, "z": False}
    return [
        PlanProblem(1, 1, 128), PlanProblem(7, 3, 128), PlanProblem(300, 8, 128), PlanProblem(64, 6, 1),
        DispatchProblem(7, 3, 8, True), DispatchProblem(300, 8, 1032, True), DispatchProblem(5, 1, 520, False),
        CombineProblem(7, 3, 8, True), CombineProblem(300, 8, 1032, True), CombineProblem(5, 1, 520, False),
        RouterProblem(160, 6, 200, **softmax, groups=8, topk_groups=3, biased=False),
        RouterProblem(8, 2, 72, **plain, groups=1, topk_groups=1, biased=False),
        RouterProblem(36, 5, 136, **{**plain, "z": True}, groups=4, topk_groups=2, biased=True),
        RouterBwdProblem(160, 6, 200, **softmax), RouterBwdProblem(8, 2, 72, **plain),
        RouterBwdProblem(36, 5, 136, **{**plain, "balance": True}, addends=1),
    ]  # fmt: skip


def work() -> list[tuple[RoutingProblem, RoutingConfig]]:
    large = [problem for shape in SHAPES.values() for problem in layer(*shape[1:]).values()]
    pairs = [(problem, config) for problem in large for config in problem.configs(TARGET)]
    return pairs + [(problem, problem.configs(TARGET)[0]) for problem in odd()]


def build(folder: Path) -> None:
    for i, (problem, config) in enumerate(work()):
        entry = compiler.compile_problem(problem, config, TARGET, Cache(folder))
        print(f"[{i + 1}/{len(work())}] {problem.family} {config} {entry.report['seconds']} s", flush=True)


class Bench:
    def __init__(self, folder: Path) -> None:
        import torch
        from timing import provenance

        from nmoe.codegen.launch import CudaLauncher

        self.torch, self.device = torch, torch.device("cuda")
        self.launcher = CudaLauncher(Cache(folder))
        name = torch.cuda.get_device_name()
        self.results: dict[str, Any] = provenance()
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        print(f"{name}, {sms} SMs, torch {torch.__version__}")

    def launch(
        self, problem: RoutingProblem, config: RoutingConfig, tensors: dict[str, Any]
    ) -> Callable[[], None]:
        operands = [tensors[o.name] for o in problem.operands(config)]
        return self.launcher.bind(problem, config, TARGET, operands)

    def microseconds(self, call: Callable[[], Any]) -> float:
        torch = self.torch
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                call()
        times = []
        for _ in range(9):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times.append(1e3 * a.elapsed_time(b) / LAUNCHES)
        return statistics.median(times)

    def copy(self) -> float:
        """Bytes/s, read and written."""
        a, b = (self.torch.empty(1 << 30, dtype=self.torch.uint8, device=self.device) for _ in range(2))
        return 2 * a.numel() / (1e-6 * self.microseconds(lambda: b.copy_(a)))

    def checked(
        self, problem: RoutingProblem, config: RoutingConfig, tokens: int, repeats: int, skew: float = 0.0
    ) -> float:
        """Worst share of a bound of one launch on poisoned results, whose bits `repeats` more launches repeat."""
        from nmoe.codegen.verify import routing as oracle

        torch = self.torch
        before = oracle.case(problem, config, 1, tokens, skew, device="cuda")
        first: dict[str, Any] = {}
        for i in range(repeats):
            after = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in before.items()}
            self.launch(problem, config, after)()
            torch.cuda.synchronize()
            for name, t in after.items():
                if isinstance(t, torch.Tensor) and name not in oracle.WORKSPACE:
                    bits = t.view(torch.uint8)
                    if i and not torch.equal(bits, first[name]):
                        raise oracle.Mismatch(f"{name} differs between two runs")
                    first[name] = bits
        return max(oracle.check(problem, before, after).values())

    def shape(self, label: str, tokens: int, *sizes: int) -> None:
        from nmoe.codegen.verify import routing as oracle

        torch = self.torch
        for name, problem in layer(*sizes).items():
            for config in problem.configs(TARGET):
                key = f"{label}/{name}/{config}"
                try:
                    tensors = oracle.case(problem, config, 1, tokens, device="cuda")
                    if "seq_len" in tensors:
                        tensors["seq_len"] = min(4096, tokens)
                    us = self.microseconds(self.launch(problem, config, tensors))
                    rate = problem.bytes(tokens) / (1e-6 * us)
                    flops = problem.flops(tokens) / us / 1e6
                    del tensors
                    worst = self.checked(problem, config, tokens, 2)
                    torch.cuda.empty_cache()
                    more = f"{flops:5.1f} TFLOP/s, " if flops else ""
                    print(f"{label:8} {name:17} {config!s:36} {us:8.1f} us {rate / 1e9:6.0f} GB/s "
                          f"{100 * rate / self.peak:5.1f} % of copy, {more}error {worst:.3f} of its bound",
                          flush=True)  # fmt: skip
                    self.results[key] = {"us": us, "of_copy": rate / self.peak, "worst": worst}
                except Exception as error:
                    print(
                        f"{label:8} {name:18} {config!s:36} FAILED: {type(error).__name__}: {error}",
                        flush=True,
                    )
                    self.results[key] = {"error": str(error)}

    def torch_router(self, label: str, tokens: int, hidden: int, experts: int) -> None:
        """cuBLAS FP32 (no TF32) for the router's three products, operands converted beforehand."""
        torch = self.torch
        torch.backends.cuda.matmul.allow_tf32 = False
        x, w = (torch.randn(n, hidden, device=self.device) for n in (tokens, experts))
        d = torch.randn(tokens, experts, device=self.device)
        forward = self.microseconds(lambda: x @ w.T)
        backward = self.microseconds(lambda: (d @ w, d.T @ x))
        print(f"{label:8} cuBLAS FP32: logits {forward:.1f} us, dx and dw {backward:.1f} us", flush=True)
        self.results[f"{label}/cublas"] = {"forward": forward, "backward": backward}

    def odd(self) -> None:
        worst, count = 0.0, 0
        for problem in odd():
            for tokens in TOKENS:
                for skew in (0.0, 5.0):
                    config = problem.configs(TARGET)[0]
                    try:
                        worst = max(
                            worst, self.checked(problem, config, tokens, 100 if tokens == 131 else 3, skew)
                        )
                        count += 1
                    except Exception as error:
                        print(
                            f"{problem} {tokens} tokens, skew {skew}: {type(error).__name__}: {error}",
                            flush=True,
                        )
                        self.results[f"{problem} {tokens} {skew}"] = {"error": str(error)}
        print(f"odd problems: {count} right and repeatable, largest error {worst:.3f} of its bound")
        self.results["odd"] = {"right": count, "worst": worst}

    def run(self) -> None:
        self.peak = self.copy()
        self.results["copy"] = self.peak
        print(f"copy: {self.peak / 1e9:.0f} GB/s")
        for label, shape in SHAPES.items():
            self.shape(label, *shape)
            self.torch_router(label, *shape[:3])
        self.odd()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.action == "build":
        build(args.folder)
        return
    bench = Bench(args.folder)
    try:
        bench.run()
    finally:
        if args.json:
            args.json.write_text(json.dumps(bench.results, indent=1))


if __name__ == "__main__":
    main()
