"""Time training steps by range and compare with a stored baseline: `nmoe bench`.

The steps are those of the trainer (nmoe/step.py) on random tokens. Every range is also an NVTX range where CUDA
exists, so that a profiler's timeline carries the same names. The ops of a replayed CUDA graph have none: their kinds
are timed in further steps, call by call.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nmoe
from nmoe import devices
from nmoe.config import Config, fingerprint
from nmoe.data.loader import Batch
from nmoe.errors import UserError
from nmoe.experiments import git_state
from nmoe.step import Step

WARMUP = 3  # steps that are not timed: first touches of memory, clocks, caches
OBSERVED = 20  # further steps at most
STEP = "step"


class Ranges:
    """Milliseconds by range and step. `range(name)` surrounds work; ranges may nest and repeat within a step.

    On CUDA a range lasts from its first to its last kernel, by events that are read once a step; otherwise it is the
    host's time.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._cuda = torch.cuda.is_available()
        self._now: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._add(name, 1e3 * (time.perf_counter() - start))
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.nvtx.range_push(name)
        begin.record()
        try:
            yield
        finally:
            end.record()
            torch.cuda.nvtx.range_pop()
        self._pending.append((name, begin, end))

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, itself the range "step"; what is inside belongs to it."""
        with self.range(STEP):
            yield
        if self._pending:
            torch.cuda.synchronize()
        for name, begin, end in self._pending:
            self._add(name, begin.elapsed_time(end))
        self.steps.append(self._now)
        self._now, self._pending = {}, []

    def _add(self, name: str, milliseconds: float) -> None:
        self._now[name] = self._now.get(name, 0.0) + milliseconds

    def statistics(self) -> dict[str, Statistics]:
        """By range, in the order of first use; a step in which a range did not occur counts as zero."""
        names = dict.fromkeys(name for step in self.steps for name in step)
        return {name: statistics([step.get(name, 0.0) for step in self.steps]) for name in names}


@dataclass(frozen=True)
class Statistics:
    """Milliseconds a step."""

    mean: float
    p50: float
    p95: float


def statistics(samples: list[float]) -> Statistics:
    """Percentiles are samples themselves: the smallest that so many percent do not exceed."""
    ranked = sorted(samples)
    p50, p95 = (ranked[-(-len(ranked) * percent // 100) - 1] for percent in (50, 95))
    return Statistics(sum(ranked) / len(ranked), p50, p95)


@dataclass(frozen=True)
class Result:
    """What a baseline file holds. `ranges` are the trainer's own, `kinds` those of the ops inside them."""

    config: str
    fingerprint: str
    device: str
    threads: int
    date: str
    git: str
    versions: Mapping[str, str]
    steps: int
    tokens_per_step: int
    ranges: Mapping[str, Statistics]
    kinds: Mapping[str, Statistics]

    @property
    def tokens_per_second(self) -> float:
        """At the median step."""
        return 1e3 * self.tokens_per_step / self.ranges[STEP].p50


def bench(
    config: Config, steps: int = 200, baseline: Path | None = None, save: Path | None = None
) -> tuple[Result, Result | None]:
    """Times `steps` steps after a warm-up; returns the result and the baseline that it may be compared with.

    Raises UserError before anything runs when the baseline cannot be read or is of another config, device or number
    of threads.
    """
    if steps < 1:
        raise UserError(f"nmoe bench: found --steps {steps}, expected at least 1")
    before = comparable(read(baseline), config, baseline) if baseline else None
    ranges, kinds = Ranges(), Ranges()
    step = Step(config, ranges.range)
    step.parameters.initialise(config.run.seed, config.model.init_std)
    kind_of = {op.name: _kind(op) for s in step.schedules for op in s.graph.ops}
    batches = synthetic(config)

    def observe() -> None:
        for executor in step.executors:
            executor.observe = lambda name: kinds.range(kind_of[name])

    replayed = any(executor.captured for executor in step.executors)
    if not replayed:
        observe()
    for index in range(WARMUP + steps):
        if index == WARMUP:
            ranges.steps.clear()
            kinds.steps.clear()
        with kinds.step(), ranges.step():
            step.run(index, batches(index))
    if replayed:
        kinds.steps.clear()
        observe()
        for index in range(min(steps, OBSERVED)):
            with kinds.step():
                step.run(WARMUP + steps + index, batches(index))
    found = result(config, step.config.train.batch_size * config.train.seq_len, ranges, kinds)
    if save:
        write(found, save)
    return found, before


def _kind(op: Any) -> str:
    role = op.attrs.get("role")
    return f"{op.kind}.{role}" if role else op.kind


def synthetic(config: Config) -> Callable[[int], Batch]:
    """Batches of random tokens by step, the same in every run: one document a sequence."""
    train, depth = config.train, config.model.mtp_depth

    def batch(step: int) -> Batch:
        random = np.random.default_rng((config.run.seed, step))
        shape = (train.batch_size, train.seq_len + 1 + depth)
        tokens = random.integers(0, config.model.vocab_size, shape, dtype=np.int32)
        targets = np.stack([tokens[:, 1 + d : 1 + d + train.seq_len] for d in range(1 + depth)])
        positions = np.tile(np.arange(train.seq_len, dtype=np.int32), (train.batch_size, 1))
        return Batch(
            tokens=tokens[:, : train.seq_len], positions=positions, targets=targets, valid=targets[0].size
        )

    return batch


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else devices.cpu_name()


def result(config: Config, tokens: int, ranges: Ranges, kinds: Ranges) -> Result:
    """What was recorded, and where."""
    inside = kinds.statistics()
    inside.pop(STEP, None)
    return Result(
        config=config.run.name,
        fingerprint=fingerprint(config),
        device=device_name(),
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        git=git_state(Path(nmoe.__file__).parent),
        versions={"nmoe": nmoe.__version__, "torch": torch.__version__, "python": platform.python_version()},
        steps=len(ranges.steps),
        tokens_per_step=tokens,
        ranges=ranges.statistics(),
        kinds=dict(sorted(inside.items(), key=lambda item: -item[1].mean)),
    )


# ---- baselines ----------------------------------------------------------------------------------------------


def write(result: Result, path: Path) -> None:
    """As JSON, by way of a temporary name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(asdict(result), indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the baseline {path}: {error.strerror}; choose another --save"
        ) from None


def read(path: Path) -> Result:
    """Raises UserError when the file is missing or is no baseline."""
    try:
        raw = json.loads(path.read_text())
        for group in ("ranges", "kinds"):
            raw[group] = {name: Statistics(**values) for name, values in raw[group].items()}
        return Result(**raw)
    except OSError as error:
        raise UserError(
            f"cannot read the baseline {path}: {error.strerror}; make one with --save {path}"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is no baseline of this version; make one with --save {path}") from None


def comparable(baseline: Result, config: Config, path: Path | None) -> Result:
    """The baseline, if times of this config on this machine can be compared with it; else UserError."""
    here = (
        ("config", config.run.name, baseline.config),
        ("config", fingerprint(config)[:16], baseline.fingerprint[:16]),
        ("device", device_name(), baseline.device),
        ("number of threads", torch.get_num_threads(), baseline.threads),
    )
    for what, now, then in here:
        if now != then:
            raise UserError(
                f"the baseline {path} was measured with {what} {then}, this is {now}: times of another {what} are "
                "not comparable; make a baseline here with --save"
            )
    return baseline


# ---- the screen ---------------------------------------------------------------------------------------------


def format_bench(found: tuple[Result, Result | None]) -> str:
    """A table of ranges and one of op kinds, with the change of the mean against the baseline."""
    now, before = found
    versions = ", ".join(f"{name} {version}" for name, version in now.versions.items())
    lines = [
        f"{now.config}: {now.steps} steps of {now.tokens_per_step:,} tokens on {now.device}, {now.threads} thread(s); "
        f"{versions}",
        f"{now.tokens_per_second:,.0f} tokens/s at the median step"
        + (f", {100 * (now.tokens_per_second / before.tokens_per_second - 1):+.1f}%" if before else ""),
    ]
    if before:
        lines.append(f"against {before.date}, git {before.git or 'unknown'}")
    for title, rows, old in (
        ("range", now.ranges, before.ranges if before else {}),
        ("op", now.kinds, before.kinds if before else {}),
    ):
        lines.append(
            f"\n{title:<34}{'mean ms':>10}{'p50':>10}{'p95':>10}" + ("  change of the mean" if before else "")
        )
        for name in dict.fromkeys((*rows, *old)):
            lines.append(_row(name, rows.get(name), old.get(name), before is not None))
    return "\n".join(lines)


def _row(name: str, now: Statistics | None, old: Statistics | None, compared: bool) -> str:
    if now is None:
        return f"{name:<34}{'gone':>30}"
    text = f"{name:<34}{now.mean:>10.2f}{now.p50:>10.2f}{now.p95:>10.2f}"
    if not compared:
        return text
    if old is None or not old.mean:
        return text + "  new"
    return text + f"  {now.mean - old.mean:+.2f} ms  {100 * (now.mean / old.mean - 1):+.1f}%"
