"""`nmoe compile`: every kernel that a schedule names, from the cache or built in worker processes.

Workers are fresh processes: CuTeDSL's compiler is not thread-safe, takes seconds to import and must not see a GPU's
architecture in the environment.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from nmoe import autotune
from nmoe.autotune import Record
from nmoe.bar import Bar
from nmoe.codegen import compiler, families
from nmoe.codegen.cache import Cache, Entry
from nmoe.codegen.problem import Config, Problem
from nmoe.codegen.rdep import RdepProblem
from nmoe.codegen.report import COLUMNS, cells, disassemble, tool
from nmoe.codegen.spec import KernelSpec
from nmoe.errors import UserError


@dataclass
class Build:
    """What a build found and made, by spec in the schedule's order."""

    target: str
    chosen: dict[KernelSpec, tuple[Problem, Config, Record | None]] = field(default_factory=dict)
    warm: dict[KernelSpec, Entry] = field(default_factory=dict)
    built: dict[KernelSpec, Entry] = field(default_factory=dict)
    failed: dict[KernelSpec, str] = field(default_factory=dict)
    missing: dict[KernelSpec, str] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return not self.failed and not self.missing


def build(
    specs: Sequence[KernelSpec],
    root: Path,
    *,
    workers: int = 0,
    progress: TextIO | None = None,
) -> Build:
    """Every spec's artifact. `progress`: where to draw a bar while kernels compile; `workers` 0 means one a core."""
    begin = time.monotonic()
    cache = Cache(root)
    before = set(cache.quarantined())
    result = Build(specs[0].target if specs else "cpu")
    work: list[KernelSpec] = []
    for spec in specs:
        problem = families.match(spec)
        if isinstance(problem, str):
            result.missing[spec] = problem
            continue
        config, record = autotune.choose(problem, spec.target, root)
        result.chosen[spec] = problem, config, record
        if entry := cache.get(compiler.problem_key(problem, config, spec.target), spec.target):
            result.warm[spec] = entry
        else:
            work.append(spec)
    result.repaired = sorted(set(cache.quarantined()) - before)
    if work:
        _require_compiler([spec.name for spec in work], result.repaired, root)
        _compile(work, root, workers, result, progress)
    result.seconds = time.monotonic() - begin
    return result


def build_transfers(problems: Sequence[RdepProblem], target: str, root: Path, workers: int = 0) -> str:
    """RDEP's kernels, which no spec states: as `build` does. Returns a line that says what was done."""
    begin, cache = time.monotonic(), Cache(root)
    keys = {p: compiler.problem_key(p, p.untuned(target), target) for p in problems}
    work = [problem for problem, key in keys.items() if not cache.get(key, target)]
    if work:
        _require_compiler([str(problem) for problem in work], [], root)
        with _processes(min(workers or len(os.sched_getaffinity(0)), len(work))) as pool:
            list(pool.map(partial(_transfer, target=target, root=root), work))
    return (
        f"RDEP: {len(keys)} kernels ready ({len(keys) - len(work)} cached, {len(work)} built), "
        f"{time.monotonic() - begin:.1f} s"
    )


def _require_compiler(work: Sequence[str], damaged: Sequence[str], root: Path) -> None:
    """Raises CompilerError when the kernels that are missing can be neither built here nor kept."""
    names = list(dict.fromkeys(work))
    shown = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    aside = f" (damaged and set aside: {', '.join(damaged)})" if damaged else ""
    missing = f"{len(work)} kernels ({shown}) are not in the cache {root}{aside}"
    try:
        compiler.check_toolchain()
    except compiler.CompilerError as error:
        raise compiler.CompilerError(
            f"{missing}, and cannot be built here: {error}; or bring a cache that nmoe compile has filled elsewhere, "
            "with the same nmoe"
        ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise compiler.CompilerError(
            f"{missing}, which cannot be written ({error.strerror}): choose another by --cache or NMOE_HOME"
        ) from None


def _compile(
    work: Sequence[KernelSpec],
    root: Path,
    workers: int,
    result: Build,
    progress: TextIO | None,
) -> None:
    count = min(workers or len(os.sched_getaffinity(0)), len(work))
    bar = Bar(progress, "compiling")
    with _processes(count) as pool:
        futures = {pool.submit(_one, spec.json(), result.chosen[spec][1], root): spec for spec in work}
        for done, future in enumerate(as_completed(futures), 1):
            spec = futures[future]
            try:
                result.built[spec] = future.result()
            except Exception as error:
                result.failed[spec] = f"{type(error).__name__}: {error}"
            bar.update(done / len(work), f"{done} of {len(work)} kernels", spec.name)
    bar.finish(f"{len(result.built)} kernels in {bar.seconds:.1f} s on {count} cores")


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    """A worker hears of Ctrl-C from its parent, sees no GPU and prints nothing of its own."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _one(spec: str, config: Config, root: Path) -> Entry:
    return compiler.compile_kernel(KernelSpec.from_json(spec), config, Cache(root))


def _transfer(problem: RdepProblem, target: str, root: Path) -> None:
    compiler.compile_problem(problem, problem.untuned(target), target, Cache(root))


def emit(result: Build, folder: Path) -> str:
    """Writes each kernel's PTX, machine code (where nvdisasm is installed) and report to a folder of its own, named
    by what it computes and its key; returns a line that says so."""
    ready = {**result.warm, **result.built}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--emit {folder}: cannot be written ({error.strerror}): name another folder"
        ) from None
    for spec, entry in ready.items():
        place = folder / f"{spec.name}-{spec.key}"
        place.mkdir(parents=True, exist_ok=True)
        for path in (*entry.folder.glob("*.ptx"), entry.folder / "report.json"):
            shutil.copyfile(path, place / path.name)
        for path in entry.folder.glob("*.cubin"):
            if sass := disassemble(path.read_bytes()):
                (place / f"{path.stem}.sass").write_text(sass)
    without = "" if tool("nvdisasm") else "; no SASS: nvdisasm is not installed (pip install triton)"
    return f"PTX, SASS and reports of {len(ready)} kernels are in {folder}{without}"


def format_build(name: str, result: Build) -> str:
    """A table with a line a kernel, in the schedule's order; then what failed or is missing, and the sum."""
    ready = {**result.warm, **result.built}
    rows: list[tuple[str, ...]] = [("key", "kernel", *COLUMNS, "predicted", "of roofline", "")]
    for spec, (problem, config, record) in result.chosen.items():
        if entry := ready.get(spec):
            predicted = autotune.predict(problem, config, spec.target)
            rows.append(
                (spec.key, _name(spec), *cells(entry.report), f"{predicted['microseconds']:.0f} µs",
                 f"{100 * predicted['roofline']:.0f} %",
                 f"tuned on {record.device}, {record.date}" if record else "untuned")
            )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"{spec.key}  {_name(spec)}: FAILED: {why}" for spec, why in result.failed.items()]
    lines += [f"damaged entry set aside and rebuilt: {reason}" for reason in result.repaired]
    if result.missing:
        lines.append(f"not built, for want of a template ({len(result.missing)}):")
        lines += [f"{spec.key}  {_name(spec)}: {why}" for spec, why in result.missing.items()]
    total = len(ready) + len(result.failed) + len(result.missing)
    lines.append(
        f"{name} for {result.target}: {len(ready)} of {total} kernels ready "
        f"({len(result.warm)} cached, {len(result.built)} built), {len(result.failed)} failed, "
        f"{len(result.missing)} without a template, {result.seconds:.1f} s"
    )
    return "\n".join(lines)


def _name(spec: KernelSpec) -> str:
    return " + ".join(map(str, spec.parts))
