"""The grouped GEMMs of an MoE layer on one GPU: right, repeatable, and how fast, next to torch._grouped_mm and cuBLAS.

    python bench/moe_kernels.py build DIR     compile every candidate config of the shapes below into DIR; no GPU needed
    python bench/moe_kernels.py run DIR       on the GPU: check against float64, then time; --json FILE keeps numbers

Times are medians of events around single launches, each on operands larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import median, provenance

from nmoe import autotune
from nmoe.codegen import compiler
from nmoe.codegen.cache import Cache
from nmoe.codegen.gemm import GemmConfig, GemmProblem

TARGET = "sm_90a"
SHAPES = {  # tokens, hidden, intermediate, experts of the rank, topk
    "moonlet": (32768, 2048, 1408, 64, 6),
    "dsv3-ep8": (8192, 7168, 2048, 32, 8),
}
ODD = [  # experts (0: dense), n, k: sizes that fill no tile
    (3, 272, 136), (5, 1040, 264), (1, 144, 520), (8, 400, 1032), (0, 272, 264),
]  # fmt: skip
QUANTIZED = [(3, 288, 160), (8, 416, 1056), (0, 544, 288)]  # the same, in MXFP8 and NVFP4
COUNTS = [  # rows of each expert, repeated to the number of experts
    [1], [0, 1], [128], [129, 0], [0, 0, 1000], [7, 500, 3], [255, 256, 257], [0],
]  # fmt: skip


def layer(hidden: int, inter: int, experts: int) -> dict[str, GemmProblem]:
    """The GEMMs of one layer's forward and backward."""
    return {
        "gemm1+swiglu": GemmProblem("fprop", experts, 2 * inter, hidden, "swiglu"),
        "gemm2": GemmProblem("fprop", experts, hidden, inter, "store"),
        "dgrad2+dswiglu": GemmProblem("dgrad", experts, hidden, inter, "dswiglu"),
        "wgrad2": GemmProblem("wgrad", experts, hidden, inter, "accumulate"),
        "dgrad1": GemmProblem("dgrad", experts, 2 * inter, hidden, "store"),
        "wgrad1": GemmProblem("wgrad", experts, 2 * inter, hidden, "accumulate"),
    }


def odd_problems() -> list[GemmProblem]:
    found = [
        GemmProblem("fprop", 0, 272, 264, "store", addends=1),
        GemmProblem("dgrad", 0, 272, 264, "store", addends=2),
    ]
    shapes = [(shape, "bf16", "") for shape in ODD]
    shapes += [(shape, precision, "rows") for precision in ("mxfp8", "nvfp4") for shape in QUANTIZED]
    kinds = (
        ("fprop", "swiglu"),
        ("fprop", "store"),
        ("dgrad", "dswiglu"),
        ("dgrad", "store"),
        ("wgrad", "accumulate"),
    )
    for shape, *how in shapes:
        found += [GemmProblem(role, *shape, epilogue, *how) for role, epilogue in kinds]
    return found


def work(only_check: bool) -> list[tuple[GemmProblem, GemmConfig]]:
    """Every candidate of the layers' GEMMs, unless they are only checked, and one of each odd GEMM's."""
    pairs = []
    for shape in () if only_check else SHAPES.values():
        for problem in layer(*shape[1:4]).values():
            pairs += [(problem, config) for config in problem.configs(TARGET)]
    for i, problem in enumerate(odd_problems()):
        configs = problem.configs(TARGET)
        pairs.append((problem, configs[i % len(configs)]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="only the odd shapes, without timing")
    args = parser.parse_args()
    if args.action == "build":
        build(args.folder, args.workers, args.check)
    else:
        run(args.folder, args.json, args.check)


def build(folder: Path, workers: int, only_check: bool) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_build_one, problem, config, folder) for problem, config in work(only_check)]
        for i, job in enumerate(jobs):
            print(f"[{i + 1}/{len(jobs)}] {job.result()}", flush=True)


def _build_one(problem: GemmProblem, config: GemmConfig, folder: Path) -> str:
    entry = compiler.compile_problem(problem, config, TARGET, Cache(folder))
    return f"{problem.role} {problem.epilogue} {problem.n}x{problem.k} {config} {entry.report['seconds']} s"


def run(folder: Path, save: Path | None, only_check: bool) -> None:
    import torch

    from nmoe.codegen.launch import CudaLauncher
    from nmoe.codegen.verify import gemm as verify

    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results: dict[str, Any] = provenance()
    launcher = CudaLauncher(Cache(folder))

    def bound(problem: GemmProblem, config: GemmConfig, tensors: dict[str, Any]) -> Callable[[], None]:
        held = tensors | verify.workspace(problem, config, len(tensors["s"]), "cuda")
        return launcher.bind(problem, config, TARGET, [held[o.name] for o in problem.operands(config)])

    def cublas() -> float:
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * 8192**3 / median(lambda: a @ b) / 1e9

    # right, with poisoned results, spare rows and skewed counts; the same bits every time
    worst, checked = 0.0, 0
    for i, problem in enumerate(odd_problems()):
        configs = problem.configs(TARGET)
        config = configs[i % len(configs)]
        for seed, counts in enumerate(COUNTS):
            rows = [max(c, problem.dense) for c in (counts * problem.groups)[: problem.groups]]
            before = verify.inputs(problem, rows, seed, spare=192, device="cuda")
            first = None
            for _ in range(3):
                after = {name: t.clone() for name, t in before.items()}
                bound(problem, config, after)()
                torch.cuda.synchronize()
                bits = [
                    after[name].view(torch.uint8).clone() for name in (*problem.stored, "ds") if name in after
                ]
                assert first is None or all(torch.equal(x, y) for x, y in zip(bits, first, strict=True)), (
                    "not repeatable"
                )
                first = bits
            captured = {name: t.clone() for name, t in before.items()}
            launch = bound(problem, config, captured)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
            graph.replay()
            torch.cuda.synchronize()
            replayed = [captured[n].view(torch.uint8) for n in (*problem.stored, "ds") if n in captured]
            assert all(torch.equal(x, y) for x, y in zip(replayed, first, strict=True)), "a replay differs"
            worst = max([worst, *verify.check(problem, before, after).values()])
            checked += 1
    print(f"odd shapes: {checked} problems right, largest error {worst:.3f} of its bound; 3 runs and a graph's replay "
          "equal bit for bit")  # fmt: skip
    results["odd"] = {"checked": checked, "worst": worst}

    if only_check:
        return

    peak = cublas()
    print(f"cuBLAS 8192^3 BF16: {peak:.0f} TFLOP/s")
    results["cublas"] = peak
    for shape, (tokens, hidden, inter, experts, topk) in SHAPES.items():
        generator = torch.Generator().manual_seed(1)
        counts = torch.multinomial(torch.ones(experts), tokens * topk, True, generator=generator).bincount(
            minlength=experts
        )
        total: dict[str, float] = {"ours": 0.0, "torch": 0.0}
        flops = 0.0
        for label, problem in layer(hidden, inter, experts).items():
            before = verify.inputs(problem, counts.tolist(), 0, device="cuda")
            work_flops = problem.flops(tokens * topk)
            times = {}
            for i, config in enumerate(problem.configs(TARGET)):
                tensors = {name: t.clone() for name, t in before.items()}
                launch = bound(problem, config, tensors)
                launch()
                torch.cuda.synchronize()
                if i == 0:
                    share = max(verify.check(problem, before, tensors).values())
                bits = [tensors[name].view(torch.uint8).clone() for name in problem.stored]
                if problem.epilogue != "accumulate":
                    for _ in range(20):
                        launch()
                    assert all(torch.equal(tensors[n].view(torch.uint8), x)
                               for n, x in zip(problem.stored, bits, strict=True)), "not repeatable"  # fmt: skip
                del bits
                times[config] = median(launch)
                del tensors, launch
            best = min(times, key=times.__getitem__)
            chosen, _ = autotune.choose(problem, TARGET)
            reference = _torch_time(problem, before)
            total["ours"] += times[best]
            total["torch"] += reference
            flops += work_flops
            del before
            torch.cuda.empty_cache()

            def line(
                what: str, ms: float, rest: str, work: float = work_flops, head: str = f"{shape:9} {label:15}"
            ) -> None:
                rate = work / ms / 1e9
                print(f"{head} {what:39} {ms:7.3f} ms {rate:5.0f} TFLOP/s {100 * rate / peak:5.1f} % "
                      f"of cuBLAS, {rest}", flush=True)  # fmt: skip

            for config, ms in times.items():
                predicted = autotune.predict(problem, config, TARGET, tokens * topk)["microseconds"] / 1e3
                mark = ("*" if config == best else " ") + ("c" if config == chosen else " ")
                line(f"{mark} {config}", ms, f"predicted {predicted:.3f} ms")
                results[f"{shape}/{label}/{config}"] = ms
            line(
                "   torch._grouped_mm, no epilogue", reference, f"our largest error {share:.3f} of its bound"
            )
            results[f"{shape}/{label}/torch"] = reference
        print(f"{shape:9} six GEMMs: {total['ours']:.2f} ms, {flops / total['ours'] / 1e9:.0f} TFLOP/s, "
              f"{flops / total['ours'] / 1e9 / peak * 100:.1f} % of cuBLAS; torch._grouped_mm without epilogues "
              f"{total['torch']:.2f} ms")  # fmt: skip
    print(f"cuBLAS again: {cublas():.0f} TFLOP/s; * fastest, c chosen by the cost model")
    if save:
        save.write_text(json.dumps(results, indent=1))


def _torch_time(problem: GemmProblem, tensors: dict[str, Any]) -> float:
    """The same products by torch._grouped_mm, BF16 results, no epilogue."""
    import torch

    ends = tensors["offsets"][1:].contiguous()
    a, b = tensors["a"], tensors["b"]
    if problem.role == "wgrad":
        return median(lambda: torch._grouped_mm(a.t(), b, offs=ends))
    other = b.transpose(1, 2) if problem.role == "fprop" else b
    return median(lambda: torch._grouped_mm(a, other, offs=ends))


if __name__ == "__main__":
    main()
