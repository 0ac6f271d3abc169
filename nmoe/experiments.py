"""The record of runs: one SQLite file, table `runs`, shared by every run that writes to it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from nmoe.errors import UserError

Ended = Literal["finished", "interrupted", "failed"]

_BUSY_SECONDS = 30.0  # how long to wait for another process's transaction; ours last milliseconds
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs(
    run_id TEXT PRIMARY KEY, status TEXT, config TEXT, fingerprint TEXT, git TEXT,
    started TEXT, ended TEXT, summary TEXT)
"""
_START = """
INSERT INTO runs(run_id, status, config, fingerprint, git, started)
VALUES (:run_id, 'running', :config, :fingerprint, :git, :now)
ON CONFLICT(run_id) DO UPDATE SET
    status = 'running', config = :config, fingerprint = :fingerprint, git = :git, ended = NULL, summary = NULL
"""
_FINISH = "UPDATE runs SET status = :status, ended = :now, summary = :summary WHERE run_id = :run_id"


class Experiments:
    """Table `runs` of the SQLite file `db`, which is created with its folder when missing.

    A connection lives for one call, so any thread may call and no lock is held in between. A run that was
    killed keeps the status "running" until it is resumed under its `run_id`.

    Raises UserError when the file cannot be opened, is not a database or stays locked for 30 s.
    """

    def __init__(self, db: Path) -> None:
        self._db = Path(db)
        try:
            self._db.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise self._error(e) from e
        with self._transaction() as connection:
            _write_ahead(connection)
            connection.execute(_SCHEMA)

    def start(self, run_id: str, config_json: str, fingerprint: str, git: str) -> None:
        """Record that `run_id` is running.

        Resuming means the same `run_id`: its `started` stays, `ended` and `summary` are cleared, and what may
        have changed since (config, fingerprint, git) is replaced.
        """
        row = {"run_id": run_id, "config": config_json, "fingerprint": fingerprint, "git": git, "now": _now()}
        with self._transaction() as connection:
            connection.execute(_START, row)

    def finish(self, run_id: str, status: Ended, summary: Mapping[str, Any]) -> None:
        """Record how `run_id` ended, `summary` as JSON. UserError when the run was never started."""
        if status not in get_args(Ended):
            raise ValueError(f"status {status!r}: expected one of {', '.join(get_args(Ended))}")
        if not self._end(run_id, status, summary):
            raise UserError(f"{self._db}: run {run_id!r} is not in table runs, so it cannot end as {status}")

    def complete(self, run_id: str, summary: Mapping[str, Any]) -> None:
        """Record that `run_id` has finished if it is there as running: it was killed after its last checkpoint."""
        self._end(run_id, "finished", summary, " AND status = 'running'")

    def _end(self, run_id: str, status: Ended, summary: Mapping[str, Any], only: str = "") -> bool:
        """Whether there was such a run, `only` narrowing the condition."""
        row = {
            "run_id": run_id,
            "status": status,
            "summary": json.dumps(summary, sort_keys=True),
            "now": _now(),
        }
        with self._transaction() as connection:
            return connection.execute(_FINISH + only, row).rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._db, timeout=_BUSY_SECONDS)
            try:
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as e:
            raise self._error(e) from e

    def _error(self, cause: Exception) -> UserError:
        return UserError(
            f"{self._db}: cannot record the run: {cause}; "
            "point [metrics] experiments at a writable SQLite file or at a new one"
        )


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers do not wait for writers, nor they for readers. SQLite waits for other processes in statements, but not
    in this switch."""
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def git_state(path: Path) -> str:
    """The commit checked out at `path`, "-dirty" appended when tracked files differ from it.

    Empty outside a repository, before the first commit and where git is not installed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
