"""Times a problem's configs on the device and keeps the evidence.

The cost model leaves about a dozen candidates. All are timed in turn, again and again, so that the chip's temperature
and clock are the same for each; every launch works on other operands than the last, together more than twice the L2
cache. Rows are routed to the experts evenly at random, and skewed: expert e's share is proportional to 1 / (e + 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmoe.autotune.cost import ROWS_PER_EXPERT, predict
from nmoe.autotune.records import Record, Timing, save
from nmoe.codegen import compiler, families
from nmoe.codegen.cache import Cache
from nmoe.codegen.gemm import GemmConfig, GemmProblem
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.launch import CudaLauncher, LaunchError, device_of
from nmoe.codegen.problem import ROWS
from nmoe.codegen.spec import KernelSpec
from nmoe.errors import UserError

if TYPE_CHECKING:
    import torch

CANDIDATES = 12
WARM_UP, REPEATS = 2, 11  # rounds
ROUTINGS = ("uniform", "zipf")


def candidates(problem: GemmProblem, target: str) -> list[GemmConfig]:
    """The configs that the cost model does not rule out, best first."""
    configs = problem.configs(target)
    return sorted(configs, key=lambda c: predict(problem, c, target)["microseconds"])[:CANDIDATES]


def counts(experts: int, rows: int, routing: str, seed: int) -> list[int]:
    """How many of `rows` each expert gets."""
    import torch

    share = torch.ones(experts) if routing == "uniform" else 1.0 / torch.arange(1, experts + 1)
    drawn = torch.multinomial(share, rows, True, generator=torch.Generator().manual_seed(seed))
    return drawn.bincount(minlength=experts).tolist()


def tune_all(specs: Sequence[KernelSpec], root: Path, report: Callable[[str], None]) -> None:
    """Times every GEMM of the specs once, telling `report` of each. Other kernels have nothing to choose."""
    problems = {spec: families.match(spec) for spec in specs}
    gemms = {problem: spec for spec, problem in problems.items() if isinstance(problem, GemmProblem)}
    for problem, spec in gemms.items():
        report(f"{problem} {problem.epilogue} {tune(problem, spec.target, Cache(root))}")


def tune(problem: GemmProblem, target: str, cache: Cache, rows: int = 0) -> Record:
    """Times `problem`'s candidates with `rows` rows (default: the cost model's), saves and returns the evidence.
    Candidates that the cache lacks are compiled."""
    import torch

    where = _device(target)
    rows = rows or ROWS_PER_EXPERT * problem.groups
    configs = candidates(problem, target)
    for config in configs:
        compiler.compile_problem(problem, config, target, cache)
    launcher = CudaLauncher(cache)
    times: dict[str, list[float]] = {}
    for routing in ROUTINGS if problem.experts > 1 else ROUTINGS[:1]:
        sets = _operands(problem, target, routing, rows, where)
        calls = [
            [launcher.bind(problem, c, target, _arguments(problem, c, s)) for s in sets] for c in configs
        ]
        times[routing] = _medians(calls)
        del sets, calls
        torch.cuda.empty_cache()
    timings = [
        Timing(config.json(), str(config), {r: times[r][i] for r in times},
               predict(problem, config, target, rows)["microseconds"])
        for i, config in enumerate(configs)
    ]  # fmt: skip
    ranked = tuple(sorted(timings, key=lambda t: t.score))
    record = Record(torch.cuda.get_device_name(where), date.today().isoformat(), rows, ranked)
    save(cache.root, problem, target, record)
    return record


def _device(target: str) -> torch.device:
    """The CUDA device that is timed; raises UserError when there is none or another one."""
    try:
        return device_of(target)
    except LaunchError as error:
        raise UserError(
            f"--tune times kernels on the target's device: {error}; or leave out --tune"
        ) from None


def _operands(problem: GemmProblem, target: str, routing: str, rows: int, where: Any) -> list[dict[str, Any]]:
    """As many sets as exceed twice the L2 cache together, at least 2."""
    from nmoe.codegen.verify.gemm import inputs

    each = sum(o.bytes({ROWS: rows}) for o in problem.operands(candidates(problem, target)[0]))
    number = max(2, math.ceil(2 * HARDWARE[target].l2 / each))
    return [
        inputs(problem, counts(problem.groups, rows, routing, i), i, device=str(where)) for i in range(number)
    ]


def _arguments(problem: GemmProblem, config: GemmConfig, tensors: dict[str, Any]) -> list[Any]:
    from nmoe.codegen.verify.gemm import workspace

    held = tensors | workspace(problem, config, len(tensors["s"]), str(tensors["a"].device))
    return [held[operand.name] for operand in problem.operands(config)]


def _medians(calls: list[list[Callable[[], None]]]) -> list[float]:
    """Median µs of each config's launches."""
    import torch

    events = []
    for turn in range(WARM_UP + REPEATS):
        for launches in calls:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            launches[turn % len(launches)]()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    return medians([1e3 * begin.elapsed_time(end) for begin, end in events], len(calls))


def medians(taken: list[float], kernels: int) -> list[float]:
    """Of rounds of `kernels` times each, the first WARM_UP left out: each kernel's median."""
    return [statistics.median(taken[WARM_UP * kernels + i :: kernels]) for i in range(kernels)]
