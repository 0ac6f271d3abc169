"""Row kernels on one GPU: right, and at which share of the bandwidth of a plain copy of as many bytes.

    python bench/row_kernels.py build DIR     compile the kernels below into DIR; no GPU needed
    python bench/row_kernels.py run DIR       on the GPU: check, then time; --json FILE keeps numbers

Times are medians of several rounds of launches that take turns on operands larger than the L2 cache. The bytes are
the least that the kernel must move: every operand once, NVFP4's twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmoe.autotune import cost
from nmoe.codegen import compiler
from nmoe.codegen.cache import Cache
from nmoe.codegen.problem import ROWS, TOKENS
from nmoe.codegen.report import cells
from nmoe.codegen.rows import Copy, RowConfig, RowProblem

TARGET = "sm_90a"
ROW, COL = (Copy("mxfp8", axis, "rows") for axis in (1, 0))
FP4_ROW, FP4_COL = Copy("nvfp4", 1, "rows"), Copy("nvfp4", 0, "rows", hadamard=True)
T, R = 32768, 98304
N = 65536  # rows of dsv3's experts on one of eight ranks

CASES: list[tuple[RowProblem, int]] = [  # moonlet's and dsv3's, and rows of the dynamic extent
    (RowProblem("load", 2816, 2048, 64, keeps_body=False, copies=(ROW, COL)), 0),
    (RowProblem("load", 22528, 2048, keeps_body=False, copies=(ROW, COL)), 0),
    (RowProblem("load", TOKENS, 4096, keeps_body=False, copies=(COL, ROW)), T),
    (RowProblem("load", TOKENS, 2048, addends=2, keeps_body=False, keeps_sum=True), T),
    (RowProblem("rms_norm", TOKENS, 2048), T),
    (RowProblem("rms_norm", TOKENS, 7168), T // 2),
    (RowProblem("rms_norm", TOKENS, 512), 4 * T),
    (RowProblem("rms_norm", TOKENS, 2048, keeps_body=False, copies=(ROW,)), T),
    (RowProblem("rms_norm", TOKENS, 2048, copies=(ROW,)), T),
    (RowProblem("rms_norm", TOKENS, 2048, keeps_body=False, copies=(COL,)), T),
    (RowProblem("rms_norm", TOKENS, 2048, copies=(COL,)), T),
    (RowProblem("rms_norm_bwd", TOKENS, 2048), T),
    (RowProblem("rms_norm_bwd", TOKENS, 2048, addends=1, keeps_body=False, keeps_sum=True), T),
    (RowProblem("rms_norm_bwd", TOKENS, 2048, addends=1, keeps_body=False, keeps_sum=True, copies=(COL, ROW)), T),
    (RowProblem("rms_norm", TOKENS, 7168, keeps_body=False, copies=(COL, ROW)), T // 2),
    (RowProblem("rms_norm_bwd", TOKENS, 7168, addends=1, keeps_body=False, keeps_sum=True, copies=(COL, ROW)), T // 2),
    (RowProblem("load", ROWS, 7168, keeps_body=False, copies=(COL,), segments=32, source="mxfp8"), N),
    (RowProblem("swiglu", ROWS, 2048, weighted=True, keeps_body=False, copies=(COL, ROW), segments=32), N),
    (RowProblem("dispatch", ROWS, 2048, keeps_body=False, weighted=True, copies=(ROW, COL), segments=64, topk=6), R),
    (RowProblem("dispatch", ROWS, 2048, weighted=True, source="mxfp8", copies=(COL,), segments=64, topk=6), R),
    (RowProblem("dispatch", ROWS, 7168, weighted=True, source="mxfp8", copies=(COL,), segments=32, topk=8), N),
    (RowProblem("swiglu", ROWS, 1408, weighted=True), R),
    (RowProblem("swiglu", ROWS, 1408, weighted=True, keeps_body=False, copies=(COL,), segments=64), R),
    (RowProblem("swiglu", TOKENS, 2816, keeps_body=False, copies=(COL,)), T),
    (RowProblem("rope", TOKENS, 3072, heads=16, rotary=64), T),
    (RowProblem("rope", TOKENS, 3072, heads=16, rotary=64, inverse=True, keeps_body=False, copies=(COL, ROW)), T),
    (RowProblem("split", TOKENS, 576, keeps_body=False, at=512), 4 * T),
    (RowProblem("concat", TOKENS, 576, keeps_body=False, at=512, copies=(COL, ROW)), 4 * T),
    (RowProblem("embedding", TOKENS, 2048, vocabulary=201088), T),
    (RowProblem("load", TOKENS, 4096, keeps_body=False, copies=(FP4_ROW, FP4_COL)), T),
    (RowProblem("rms_norm", TOKENS, 7168, keeps_body=False, copies=(FP4_ROW,)), T // 2),
]  # fmt: skip


def configs(problem: RowProblem, every: bool) -> list[RowConfig]:
    """The chosen one, then the others that tuning would try."""
    return problem.configs(TARGET) if every else [cost.choose(problem, TARGET)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--every", action="store_true", help="other configs than the chosen ones, too")
    args = parser.parse_args()
    cases = [(p, rows) for p, rows in CASES if args.only in str(p)]
    if args.action == "build":
        for problem, _ in cases:
            for config in configs(problem, args.every):
                entry = compiler.compile_problem(problem, config, TARGET, Cache(args.folder))
                print(f"{problem}: {'; '.join(cells(entry.report))}", flush=True)
    else:
        run(cases, args.folder, args.json, args.every)


def run(cases: list[tuple[RowProblem, int]], folder: Path, save: Path | None, every: bool) -> None:
    import torch
    from timing import provenance

    from nmoe.codegen.launch import CudaLauncher
    from nmoe.codegen.verify import rows as verify

    device, launcher = torch.device("cuda"), CudaLauncher(Cache(folder))
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}")
    results: dict[str, Any] = provenance()

    def milliseconds(calls: list[Callable[[], Any]]) -> float:
        """Of one call; the calls take turns."""
        times = []
        for _ in range(8):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(4):
                for call in calls:
                    call()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) / (4 * len(calls)))
        return statistics.median(times[1:])

    def copied(size: float) -> float:
        """ms of a copy that moves so many bytes."""
        pairs = [
            [torch.empty(int(size / 2), dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(2)
        ]
        return milliseconds([lambda x=x, y=y: y.copy_(x) for x, y in pairs])

    def one(problem: RowProblem, rows: int, config: RowConfig, checks: bool) -> None:
        def launch(tensors: dict[str, Any]) -> Callable[[], None]:
            return launcher.bind(problem, config, TARGET, [tensors[o.name] for o in problem.operands(config)])

        share = float("nan")
        if checks and problem.rows < 0:
            before = verify.case(problem, config, 0, 128 * max(3, problem.segments) + 64)
            after = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in before.items()}
            launch(after)()
            after = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in after.items()}
            share = max(verify.check(problem, before, after).values())
        count = rows or problem.rows
        turns = [verify.case(problem, config, 0, count, device="cuda") for _ in range(2)]
        ms = milliseconds([launch(t) for t in turns])
        bits = {o.name: turns[0][o.name].clone() for o in problem._outputs() if o.name != "dw"}
        launch(turns[0])()
        same = all(torch.equal(turns[0][n].view(torch.uint8), x.view(torch.uint8)) for n, x in bits.items())
        size = problem.bytes(count)
        copy = copied(size)
        print(f"{problem!s:42} {config!s:40} {1e3 * ms:8.1f} µs {size / ms / 1e9:6.2f} TB/s {100 * copy / ms:5.1f} % "
              f"of a copy, {share:.3f} of the bound{'' if same else ', NOT REPEATABLE'}", flush=True)  # fmt: skip
        results[f"{problem} | {config}"] = {
            "ms": ms,
            "bytes": size,
            "copy_ms": copy,
            "share": share,
            "same": same,
        }

    for problem, rows in cases:
        for i, config in enumerate(configs(problem, every)):
            try:
                one(problem, rows, config, checks=i == 0)
            except Exception as error:
                print(f"{problem} {config}: {type(error).__name__}: {error}")
                traceback.print_exc(limit=3)
            torch.cuda.empty_cache()
            if save:
                save.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
