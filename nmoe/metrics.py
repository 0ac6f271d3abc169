"""The metrics of one rank: a DuckDB file that other processes can read at any moment of the run.

DuckDB locks a file for as long as a writer has it open, so nobody may ever open the file that is being
written. There are therefore two copies of the database. Readers see the published one, `path`, which is never
modified. A background thread appends to the other, the spare, and renames it over `path`; the copy that was
published until then becomes the spare. A flush costs in proportion to the rows it adds, however long the run.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import duckdb
import numpy as np

from nmoe.errors import UserError

# A reader opens the published file and then locks it, two system calls. The copy that was replaced rests for
# so long before it is written: a reader caught between the two has its lock before the writer asks for one.
_REST_SECONDS = 0.5

_CREATE = "CREATE TABLE metrics(step BIGINT, tag VARCHAR, value DOUBLE, ts TIMESTAMP)"
# Moves rows from the write-ahead log, which is not published, to the file. Closing would do so too, but silently
# leave them in the log when that fails.
_SEAL = "CHECKPOINT"
# DuckDB takes a NaN in a numpy column for a missing value; a diverged loss must stay one.
_INSERT = """
INSERT INTO metrics
SELECT step, tag, coalesce(value, 'nan'), make_timestamp(ts)
FROM batch JOIN (SELECT unnest($tags) AS tag, unnest(range(len($tags))) AS tag_id) USING (tag_id)
"""


@dataclass
class _Rows:
    """Rows in columns; `tag_id` indexes the tags in the order in which they first appeared."""

    step: array[int] = field(default_factory=lambda: array("q"))
    tag_id: array[int] = field(default_factory=lambda: array("q"))
    value: array[float] = field(default_factory=lambda: array("d"))
    ts: array[int] = field(default_factory=lambda: array("q"))  # µs since 1970, UTC

    def columns(self) -> dict[str, np.ndarray]:
        return {name: np.frombuffer(column, column.typecode) for name, column in vars(self).items()}


class Metrics:
    """Writer of table `metrics(step BIGINT, tag VARCHAR, value DOUBLE, ts TIMESTAMP)` in DuckDB file `path`.

    `ts` is UTC. Rows reach readers within about `flush_seconds`, whole `log` calls at a time; a SIGKILL can
    lose as much. Other processes open `path` with `read_only=True`; a connection shows the moment at which it
    was opened. The process that writes may read after `close`.

    `resume_step` continues an existing file: rows of later steps are removed, for those steps will run again.

    Raises UserError when `path` exists but `resume_step` is not given, when it is not a metrics database, or
    when it cannot be written. The next `log`, `flush` or `close` raises an error of the background thread.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None, flush_seconds: float = 5.0) -> None:
        self._path = Path(path)
        self._spare = self._path.with_name(f".{self._path.name}.spare")
        self._aside = self._path.with_name(
            f".{self._path.name}.aside"
        )  # the published copy as the two change places
        self._flush_seconds = flush_seconds
        self._last_step = resume_step
        self._tags: dict[str, int] = {}
        self._rows = _Rows()
        self._rows_lock = threading.Lock()  # held for microseconds: `log` takes it
        self._missing: _Rows | None = None  # rows that the spare lacks; None: there is no spare to append to
        self._unpublished_at = 0.0  # when the spare stopped being published, by the monotonic clock
        self._publishing = threading.Lock()
        self._error: UserError | None = None
        self._stop = threading.Event()

        if self._path.exists() and resume_step is None:
            raise UserError(
                f"{self._path}: this run already has metrics; resume it or start it under a new run id"
            )
        try:
            self._start(resume_step)
        except (OSError, duckdb.Error) as e:
            raise self._failure(e) from e
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record one value a tag at `step`. Costs microseconds; the rows are written in the background.

        ValueError when `step` is smaller than before; TypeError for a value that is not a number.
        """
        if self._error:
            raise self._error
        if self._last_step is not None and step < self._last_step:
            raise ValueError(
                f"metrics of step {step} after those of step {self._last_step}: steps must not decrease"
            )
        ids, numbers = self._encode(values)
        steps = array("q", [step]) * len(ids)
        times = array("q", [time.time_ns() // 1000]) * len(ids)
        with self._rows_lock:
            rows = self._rows
            rows.step += steps
            rows.tag_id += ids
            rows.value += numbers
            rows.ts += times
        self._last_step = step

    def flush(self) -> None:
        """Return when readers can see every row logged so far: tens of ms, half a second right after a flush.

        Call it before a checkpoint is saved, so that a run resumed from there has the metrics of every step.
        """
        with self._publishing:
            if self._error:
                raise self._error
            with self._rows_lock:
                rows, self._rows = self._rows, _Rows()
                tags = list(self._tags)
            if not rows.step:
                return
            try:
                self._append(rows, tags)
                self._publish(rows)
            except Exception as e:  # whatever it is, the owner must hear of it
                self._error = self._failure(e)
                raise self._error from e

    def close(self) -> None:
        """Flush and stop; `path` alone remains. Closing again does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self.flush()
        self._spare.unlink(missing_ok=True)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self._flush_seconds):
            try:
                self.flush()
            except UserError:
                return  # kept in self._error, which the next call of the owner raises

    def _encode(self, values: Mapping[str, float]) -> tuple[array[int], array[float]]:
        try:
            ids = array("q", map(self._tags.__getitem__, values))
        except KeyError:
            for tag in values:
                self._tags.setdefault(tag, len(self._tags))
            ids = array("q", map(self._tags.__getitem__, values))
        try:
            return ids, array("d", values.values())
        except TypeError as e:
            raise TypeError(f"metrics of tags {', '.join(values)}: a value is not a number: {e}") from None

    def _start(self, resume_step: int | None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._discard_spare()  # of a killed run: it may be half written, and nobody was promised its rows
        self._aside.unlink(missing_ok=True)
        if self._path.exists():
            shutil.copyfile(self._path, self._spare)
            try:
                with self._open_spare() as db:
                    db.execute("DELETE FROM metrics WHERE step > ?", [resume_step])
                    db.execute(_SEAL)
            except duckdb.Error as e:
                self._discard_spare()
                raise UserError(
                    f"{self._path}: cannot go on writing to this file: {_first_line(e)}; "
                    "move it aside to resume without its rows"
                ) from e
        else:
            with self._open_spare() as db:
                db.execute(_CREATE)
                db.execute(_SEAL)
        os.replace(self._spare, self._path)

    def _append(self, rows: _Rows, tags: list[str]) -> None:
        """Bring the spare up to date, `rows` included. A reader who still has it open gets to keep it."""
        if self._missing is not None:
            time.sleep(max(0.0, self._unpublished_at + _REST_SECONDS - time.monotonic()))
            try:
                db = self._open_spare()
            except duckdb.IOException:
                self._missing = None
        if self._missing is None:
            self._discard_spare()
            shutil.copyfile(self._path, self._spare)
            db = self._open_spare()
        with db:
            for batch in (self._missing, rows):
                if batch is not None:
                    db.register("batch", batch.columns())
                    db.execute(_INSERT, {"tags": tags})
                    db.unregister("batch")
            db.execute(_SEAL)

    def _publish(self, rows: _Rows) -> None:
        """Exchange the two copies. A crash at any point leaves a complete database at `path`."""
        os.link(self._path, self._aside)
        os.replace(self._spare, self._path)
        os.replace(self._aside, self._spare)
        self._missing = rows
        self._unpublished_at = time.monotonic()

    def _open_spare(self) -> duckdb.DuckDBPyConnection:
        return duckdb.connect(str(self._spare), config={"threads": 1})  # leave the other cores to training

    def _discard_spare(self) -> None:
        self._spare.unlink(missing_ok=True)
        self._spare.with_name(f"{self._spare.name}.wal").unlink(missing_ok=True)

    def _failure(self, cause: Exception) -> UserError:
        return UserError(
            f"{self._path}: metrics cannot be written: {_first_line(cause)}; mend [metrics] dir and resume"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
