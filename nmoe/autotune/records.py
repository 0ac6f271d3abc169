"""What a device measured of a kernel's configs: kept beside the cache, read by later builds, printable.

    <cache root>/tuned/<key>.json    one for each problem and target; tuning again replaces it

The key holds the template's sources and the compiler's version, as an artifact's does: a choice never outlives the
code that was timed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmoe.codegen import compiler
from nmoe.codegen.problem import Config, Problem
from nmoe.files import write_atomic


@dataclass(frozen=True)
class Timing:
    """Of one config: median µs of a launch by routing, and what the cost model says of the uniform one."""

    config: dict[str, Any]
    name: str
    microseconds: dict[str, float]
    predicted: float

    @property
    def score(self) -> float:
        """What the choice minimises: µs, the mean over the routings."""
        return sum(self.microseconds.values()) / len(self.microseconds)


@dataclass(frozen=True)
class Record:
    """`timings`: fastest first. `rows` were shared among the experts of each routing."""

    device: str
    date: str
    rows: int
    timings: tuple[Timing, ...]

    def __str__(self) -> str:
        """A line, then one for each config: µs by routing, against the fastest, the model's prediction."""
        best = self.timings[0]
        model = min(self.timings, key=lambda t: t.predicted)
        lines = [f"on {self.device}, {self.date}, {self.rows} rows: {best.name}; the cost model's choice takes "
                 f"{100 * (model.score / best.score - 1):.1f} % longer"]  # fmt: skip
        for timing in self.timings:
            times = ", ".join(f"{name} {us:.0f}" for name, us in timing.microseconds.items())
            lines.append(f"    {timing.name}: {times} µs, {100 * (timing.score / best.score - 1):+.1f} %, "
                         f"predicted {timing.predicted:.0f} µs")  # fmt: skip
        return "\n".join(lines)


def path(root: Path, problem: Problem, target: str) -> Path:
    return root / "tuned" / f"{compiler.problem_key(problem, None, target)}.json"


def save(root: Path, problem: Problem, target: str, record: Record) -> None:
    place = path(root, problem, target)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, json.dumps(asdict(record), indent=1).encode())


def load(root: Path, problem: Problem, target: str) -> Record | None:
    """The record, or None when no device has measured the problem or the file is not one of ours."""
    try:
        found = json.loads(path(root, problem, target).read_text())
        timings = tuple(Timing(**timing) for timing in found.pop("timings"))
        return Record(timings=timings, **found) if timings else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def choice(record: Record, problem: Problem, target: str) -> Config | None:
    """The measured best as a config of `problem`, or None if that is none of its candidates."""
    wanted = record.timings[0].config
    return next((config for config in problem.configs(target) if config.json() == wanted), None)
