"""Which config a kernel is built with: the fastest that a device measured or, untuned, the cost model's."""

from __future__ import annotations

from pathlib import Path

from nmoe.autotune import cost, records
from nmoe.autotune.cost import predict
from nmoe.autotune.records import Record
from nmoe.codegen.problem import Config, Problem

__all__ = ["Record", "choose", "predict"]


def choose(problem: Problem, target: str, root: Path | None = None) -> tuple[Config, Record | None]:
    """The config to build `problem` with, and the evidence kept beside the cache `root`: None is untuned."""
    record = records.load(root, problem, target) if root else None
    measured = records.choice(record, problem, target) if record else None
    return (measured, record) if measured else (cost.choose(problem, target), None)
