"""nmoe's own kernels on the emulator: which broken synchronisation is noticed, coverage, work and speed.

    python bench/emulator_kernels.py --mutate [PATTERN]  # one instruction broken at a time: the survivors
    python bench/emulator_kernels.py --numbers [PATTERN]  # a JSON object a launch: what it executed
    python bench/emulator_kernels.py --speed [PATTERN]   # warp instructions a CPU second, races checked and not
    python bench/emulator_kernels.py --workers [PATTERN] # one worker against two

PATTERN is a regular expression for names such as sm_100a/swiglu/2. Needs the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from nmoe.codegen import compiler, verify
from nmoe.codegen.emulator import Device, HostFunction, Options, bind, execution, ptx
from nmoe.codegen.emulator.mutate import mutants, survey
from nmoe.codegen.gemm import GemmProblem
from nmoe.codegen.problem import Config, Problem
from nmoe.codegen.verify.base import Mismatch, Tensors

PROBLEMS = {
    "store": GemmProblem("fprop", 3, 256, 136, "store"),
    "swiglu": GemmProblem("fprop", 3, 400, 192, "swiglu"),
    "dswiglu": GemmProblem("dgrad", 3, 200, 264, "dswiglu"),
    "accumulate": GemmProblem("wgrad", 3, 192, 328, "accumulate"),
    "gather-swiglu": GemmProblem("fprop", 3, 400, 136, "swiglu", gathered="a", topk=6),
    "gather-dswiglu": GemmProblem("dgrad", 3, 200, 264, "dswiglu", gathered="a", topk=1),
    "gather-a": GemmProblem("wgrad", 3, 200, 328, "accumulate", gathered="a", topk=3),
    "gather-b": GemmProblem("wgrad", 3, 192, 328, "accumulate", gathered="b", topk=8),
    "mxfp8-add": GemmProblem("fprop", 3, 400, 192, "store", "mxfp8", "blocked", addends=1),
    "mxfp8-swiglu": GemmProblem("fprop", 3, 512, 192, "swiglu", "mxfp8", "blocked", copies=("row", "col")),
    "mxfp8-dswiglu": GemmProblem("dgrad", 3, 192, 320, "dswiglu", "mxfp8", "blocked", copies=("col", "row")),
    "mxfp8-accumulate": GemmProblem("wgrad", 3, 192, 336, "accumulate", "mxfp8", "blocked"),
    "nvfp4-store": GemmProblem("fprop", 3, 400, 192, "store", "nvfp4", "blocked"),
    "nvfp4-accumulate": GemmProblem("wgrad", 3, 192, 336, "accumulate", "nvfp4", "blocked"),
}
LARGE = {
    "store": GemmProblem("fprop", 3, 512, 2048, "store"),
    "accumulate": GemmProblem("wgrad", 3, 512, 512, "accumulate"),
}
COUNTS = [300, 0, 200]  # rows of each expert
CLUSTERS = (1, 9)  # of a launch: one works on several tiles, of nine some start beyond the first expert
LIMIT = 2_000_000
SCHEDULES = [Options(seed=seed, limit=LIMIT) for seed in range(4)]


class Kernel:
    """A compiled kernel, a case for it, and its oracle."""

    def __init__(self, problem: Problem, config: Config, target: str, seed: int = 1):
        self.problem, self.config = problem, config
        self.host: HostFunction = bind(compiler.trace(problem, config, target, "--generate-line-info"))
        self.oracle = verify.ORACLES[problem.family]
        self.tensors: Tensors = self.oracle.case(problem, config, seed, COUNTS)

    def launch(
        self, module: ptx.Module, options: Options, clusters: int = 1
    ) -> tuple[Device, Tensors, float]:
        """The device afterwards, results, and CPU seconds. Raises EmulationError."""
        device = Device(options)
        held = {
            n: device.tensor(t.clone()) if isinstance(t, torch.Tensor) else t for n, t in self.tensors.items()
        }
        original, self.host.module = self.host.module, module
        operands = [held[o.name] for o in self.problem.operands(self.config)]
        start = time.process_time()
        try:
            self.host(device, *operands, clusters, 0)
        finally:
            self.host.module = original
        seconds = time.process_time() - start
        after = {n: t.torch if isinstance(self.tensors[n], torch.Tensor) else t for n, t in held.items()}
        return device, after, seconds

    def right(self, results: Tensors) -> bool:
        try:
            self.oracle.check(self.problem, self.tensors, results)
        except Mismatch:
            return False
        return True

    def survives(self, module: ptx.Module, options: Options) -> bool:
        return self.right(self.launch(module, options)[1])


def kernels(pattern: str, problems: dict[str, GemmProblem]) -> Iterator[tuple[str, Kernel]]:
    for target in ("sm_90a", "sm_100a"):
        for name, problem in problems.items():
            for cluster in (1, 2) if problem.scales != "blocked" or target == "sm_100a" else ():
                label = f"{target}/{name}/{cluster}"
                config = next((c for c in problem.configs(target) if c.cluster == cluster), None)
                if config is not None and re.search(pattern, label):
                    yield label, Kernel(problem, config, target)


def mutate(pattern: str) -> int:
    """The exit code is 1 if an unbroken kernel is not right."""
    for label, kernel in kernels(pattern, PROBLEMS):
        module, reports = kernel.host.module, []
        for options in SCHEDULES:
            device, results, _ = kernel.launch(module, options)
            if not kernel.right(results):
                print(f"{label}: wrong without a mutation")
                return 1
            reports = device.reports
        start = time.process_time()
        verdicts = survey(mutants(module, reports), kernel.survives, SCHEDULES)
        survivors = [v.mutant for v in verdicts if v.noticed is None]
        late = Counter(v.options.seed for v in verdicts if v.options and v.options.seed)
        print(
            f"{label}: {len(verdicts)} mutants, {len(verdicts) - len(survivors)} noticed"
            f" ({sum(late.values())} not by the eager schedule), {time.process_time() - start:.0f} s",
            flush=True,
        )
        for mutant in survivors:
            entry = mutant.module.entries[mutant.kernel]
            where = entry.instructions[mutant.index].source
            print(f"  {mutant.action:7s}{mutant.instruction.text.split(';')[0][:90]}  {where}", flush=True)
    return 0


def numbers(pattern: str) -> None:
    for label, kernel in kernels(pattern, PROBLEMS):
        executed: Counter[tuple[str, int]] = Counter()
        for clusters in CLUSTERS:
            device, results, _ = kernel.launch(kernel.host.module, Options(), clusters)
            for report in device.reports:
                record: dict[str, Any] = {
                    "kernel": label,
                    "entry": report.kernel,
                    "right": kernel.right(results),
                }
                record |= {"grid": report.grid, "cluster": report.cluster, "counters": report.counters}
                record |= {"opcodes": dict(report.by_opcode().most_common()), "roles": report.roles.tolist()}
                print(json.dumps(record), flush=True)
                executed.update({(report.kernel, i): int(n) for i, n in enumerate(report.executed)})
        missed = [key for key, n in executed.items() if n == 0]
        lines = [kernel.host.module.entries[name].instructions[i] for name, i in missed]
        print(json.dumps({
            "kernel": label, "instructions": len(executed), "covered": len(executed) - len(missed),
            "uncovered": [f"{i.line}: {i.text}" for i in lines],
        }), flush=True)  # fmt: skip


def speed(pattern: str) -> None:
    for label, kernel in kernels(pattern, LARGE):
        for options in (Options(), Options(races=False)):
            device, _, seconds = kernel.launch(kernel.host.module, options)
            count = sum(r.counters["instructions"] for r in device.reports)
            print(
                f"{label}: {count} warp instructions, races {'checked' if options.races else 'not checked'}:"
                f" {count / seconds / 1e3:.0f} k a CPU second",
                flush=True,
            )


def workers(pattern: str) -> None:
    """Eight clusters by one thread and by two. The longer worker's own CPU time is what the wall time would be on cores
    that nobody else uses."""
    original = execution._Run.execute
    for label, kernel in kernels(pattern, LARGE):
        for count in (1, 2, 1, 2):
            spent: list[float] = []

            def timed(run: execution._Run, spent: list[float] = spent) -> bool:
                start = time.thread_time()
                failed = original(run)
                spent.append(time.thread_time() - start)
                return failed

            execution._Run.execute = timed  # type: ignore[method-assign]
            start = time.perf_counter()
            _, _, seconds = kernel.launch(kernel.host.module, Options(threads=count), 8)
            wall = time.perf_counter() - start
            execution._Run.execute = original  # type: ignore[method-assign]
            print(
                f"{label}: {count} workers, {wall:.2f} s, {seconds:.2f} s of CPU, longest worker {max(spent):.2f} s"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--mutate", "--numbers", "--speed", "--workers"):
        parser.add_argument(name, metavar="PATTERN", nargs="?", const="")
    arguments = parser.parse_args()
    if arguments.speed is not None:
        speed(arguments.speed)
    if arguments.workers is not None:
        workers(arguments.workers)
    if arguments.numbers is not None:
        numbers(arguments.numbers)
    return mutate(arguments.mutate) if arguments.mutate is not None else 0


if __name__ == "__main__":
    sys.exit(main())
