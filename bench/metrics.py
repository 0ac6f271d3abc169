"""What `Metrics.log` costs a training step while another process keeps reading, next to the obvious way.

    python bench/metrics.py [--steps 2000] [--tags 60] [--flush-seconds 1]

The obvious way inserts each step's rows with executemany into a DuckDB file that stays open. Throughout, a
second process opens the file, queries and closes it again as fast as it can. A "step" is 2 ms of Python, with
the GIL held, and 3 ms of sleep, without. By how much its Python half overruns is shown as well, for a
background thread could slow that down; "nothing" logs nothing and shows the noise of the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from nmoe.metrics import Metrics

_READER = """
import sys, duckdb
reads = failures = 0
try:
    while True:
        try:
            with duckdb.connect(sys.argv[1], read_only=True) as db:
                db.execute("SELECT count(*), max(step) FROM metrics").fetchone()
            reads += 1
        except duckdb.Error:
            failures += 1
except KeyboardInterrupt:
    print(reads, failures)
"""


def _python_work() -> None:
    end = time.perf_counter() + 0.002
    while time.perf_counter() < end:
        sum(range(100))


def _measure(
    name: str, path: Path, log: Callable[[int, dict[str, float]], None], steps: int, tags: int
) -> None:
    reader = subprocess.Popen([sys.executable, "-c", _READER, str(path)], stdout=subprocess.PIPE, text=True)
    time.sleep(1)  # until it polls
    values = {f"router/layers.{i}/load_max": i / 7 for i in range(tags)}
    logs, works = [], []
    for step in range(steps):
        started = time.perf_counter()
        _python_work()
        worked = time.perf_counter()
        log(step, values)
        logs.append(time.perf_counter() - worked)
        works.append(worked - started)
        time.sleep(0.003)
    reader.send_signal(2)
    reads, failures = map(int, reader.communicate()[0].split())
    p50, p99, worst = np.quantile(logs, [0.5, 0.99, 1]) * 1e6
    _, slow, slowest = (np.quantile(works, [0.5, 0.99, 1]) - 0.002) * 1e6
    cells = f"{p50:10.0f}{p99:10.0f}{worst:10.0f}   {slow:10.0f}{slowest:10.0f}"
    print(f"{name:12}{cells}   {reads:8d}{failures:10d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tags", type=int, default=60)
    parser.add_argument("--flush-seconds", type=float, default=1.0)
    args = parser.parse_args()

    print(f"{args.steps} steps, {args.tags} tags a step, DuckDB {duckdb.__version__}")
    print(f"{'':12}{'log() µs':>30}   {'Python overrun µs':>20}   {'reader':>18}")
    print(f"{'':12}{'p50':>10}{'p99':>10}{'max':>10}   {'p99':>10}{'max':>10}   {'reads':>8}{'failures':>10}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank_0.duckdb"
        with Metrics(path, flush_seconds=args.flush_seconds) as metrics:
            _measure("nmoe", path, metrics.log, args.steps, args.tags)
        with duckdb.connect(str(path), read_only=True) as db:
            (rows,) = db.execute("SELECT count(DISTINCT (step, tag)) FROM metrics").fetchone()
        assert rows == args.steps * args.tags, f"{rows} rows read back"

        _measure("nothing", path, lambda step, values: None, args.steps, args.tags)

        path = Path(folder) / "open.duckdb"
        with closing(duckdb.connect(str(path))) as db:
            db.execute("CREATE TABLE metrics(step BIGINT, tag VARCHAR, value DOUBLE, ts TIMESTAMP)")

            def insert(step: int, values: dict[str, float]) -> None:
                rows = [(step, tag, value, datetime.now()) for tag, value in values.items()]
                db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)

            _measure("executemany", path, insert, args.steps // 10, args.tags)


if __name__ == "__main__":
    main()
