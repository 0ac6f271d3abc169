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
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
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

TOGETHER = 4  # kernels that a worker compiles before it disassembles them


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
    before = Counter(cache.quarantined())
    result = Build(specs[0].target if specs else "cpu")
    work: dict[str, list[KernelSpec]] = {}  # by the artifact's key: specs that state one problem share it
    for spec in specs:
        problem = families.match(spec)
        if isinstance(problem, str):
            result.missing[spec] = problem
            continue
        config, record = autotune.choose(problem, spec.target, root)
        result.chosen[spec] = problem, config, record
        key = compiler.problem_key(problem, config, spec.target)
        if entry := cache.get(key, spec.target):
            result.warm[spec] = entry
        else:
            work.setdefault(key, []).append(spec)
    result.repaired = sorted((Counter(cache.quarantined()) - before).elements())
    if work:
        _require_compiler([spec.name for same in work.values() for spec in same], result.repaired, root)
        kernels = {key: result.chosen[same[0]][:2] for key, same in work.items()}
        for key, made in _compile(kernels, result.target, root, workers, progress).items():
            for spec in work[key]:
                if isinstance(made, Entry):
                    result.built[spec] = made
                else:
                    result.failed[spec] = made
    result.seconds = time.monotonic() - begin
    return result


def build_transfers(problems: Sequence[RdepProblem], target: str, root: Path, workers: int = 0) -> str:
    """RDEP's kernels, which no spec states: as `build` does. Returns a line that says what was done; raises
    CompilerError when one of them cannot be built."""
    begin, cache = time.monotonic(), Cache(root)
    keys = {compiler.problem_key(p, p.untuned(target), target): (p, p.untuned(target)) for p in problems}
    work = {key: pair for key, pair in keys.items() if not cache.get(key, target)}
    if work:
        _require_compiler([str(problem) for problem, _ in work.values()], [], root)
        for key, made in _compile(work, target, root, workers, None).items():
            if isinstance(made, str):
                raise compiler.CompilerError(f"{work[key][0]} was not built: {made}")
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
    work: Mapping[str, tuple[Problem, Config]],
    target: str,
    root: Path,
    workers: int,
    progress: TextIO | None,
) -> dict[str, Entry | str]:
    """By key the artifact, or why there is none."""
    count = workers or len(os.sched_getaffinity(0))
    size = min(TOGETHER, -(-len(work) // count))
    keys = sorted(work, key=lambda key: work[key][0].language != "triton")  # those take longest
    groups = [keys[i : i + size] for i in range(0, len(keys), size)]
    count = min(count, len(groups))
    bar = Bar(progress, "compiling")
    done: dict[str, Entry | str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start) as pool:
        futures = {
            pool.submit(_several, [work[key] for key in group], target, root): group for group in groups
        }
        for future in as_completed(futures):
            group = futures[future]
            try:
                done |= dict(zip(group, future.result(), strict=True))
            except Exception as error:
                done |= dict.fromkeys(group, _why(error))
            bar.update(len(done) / len(work), f"{len(done)} of {len(work)} kernels", str(work[group[-1]][0]))
    built = sum(isinstance(made, Entry) for made in done.values())
    bar.finish(f"{built} kernels in {bar.seconds:.1f} s on {count} cores")
    return done


def _start() -> None:
    """A worker hears of Ctrl-C from its parent, sees no GPU, imports no torch and prints nothing of its own."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM-FFI would import it, in a second and a half
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _several(work: list[tuple[Problem, Config]], target: str, root: Path) -> list[Entry | str]:
    made = compiler.compile_problems(work, target, Cache(root))
    return [_why(entry) if isinstance(entry, Exception) else entry for entry in made]


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
