"""Metrics in DuckDB and experiments in SQLite: complete, readable at any moment, loud on failure."""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmoe.metrics
from nmoe.errors import UserError
from nmoe.experiments import Experiments, git_state
from nmoe.metrics import Metrics

ROOT = Path(__file__).parents[1]
NEVER = 3600.0  # flush_seconds of a test that flushes itself


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process with the plain clients at hand, speaking through its stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read(path: Path, sql: str = "SELECT step, tag, value FROM metrics ORDER BY rowid") -> list[tuple]:
    """Only for files that no writer of this process has open."""
    with duckdb.connect(str(path), read_only=True) as db:
        return db.execute(sql).fetchall()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics" / "run" / "rank_0.duckdb"


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reader is around, so the spare need not rest."""
    monkeypatch.setattr(nmoe.metrics, "_REST_SECONDS", 0.0)


# Metrics: what is written


def test_table_is_as_documented(path: Path) -> None:
    before = datetime.now(UTC).replace(tzinfo=None)
    with Metrics(path) as metrics:
        metrics.log(3, {"loss": 2.5, "router/layers.1/load_max": 1})
        metrics.log(3, {"lr": np.float32(0.5)})
        metrics.log(4, {})
        metrics.log(5, {"loss": float("nan"), "lr": float("inf")})
    after = datetime.now(UTC).replace(tzinfo=None)

    assert read(path, "SELECT column_name, column_type FROM (DESCRIBE metrics)") == [
        ("step", "BIGINT"),
        ("tag", "VARCHAR"),
        ("value", "DOUBLE"),
        ("ts", "TIMESTAMP"),
    ]
    assert read(path)[:3] == [(3, "loss", 2.5), (3, "router/layers.1/load_max", 1.0), (3, "lr", 0.5)]
    assert str(read(path)[3:]) == "[(5, 'loss', nan), (5, 'lr', inf)]"
    [(first, last)] = read(path, "SELECT min(ts), max(ts) FROM metrics")
    assert before <= first <= last <= after
    assert os.listdir(path.parent) == ["rank_0.duckdb"], "nothing else stays behind"


@pytest.mark.usefixtures("restless")
@settings(max_examples=15, deadline=None)
@given(
    calls=st.lists(
        st.one_of(
            st.just("flush"),
            st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=4),
        ),
        max_size=12,
    )
)
def test_every_row_once_and_in_order_however_flushes_fall(
    calls: list, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "rank_0.duckdb"
    expected = []
    with Metrics(path, flush_seconds=NEVER) as metrics:
        for step, call in enumerate(calls):
            if call == "flush":
                metrics.flush()
            else:
                metrics.log(step, call)
                expected += [(step, tag, value) for tag, value in call.items()]
    assert read(path) == expected


def test_rows_appear_without_being_asked_for(path: Path) -> None:
    with Metrics(path, flush_seconds=0.01) as metrics:
        metrics.log(1, {"loss": 1.0})
        counter = """
        import sys, duckdb
        rows = []
        while not rows:
            rows = duckdb.connect(sys.argv[1], read_only=True).execute("FROM metrics").fetchall()
        """
        assert start_python(counter, path).wait(timeout=30) == 0


@pytest.mark.usefixtures("restless")
def test_a_flush_copies_no_old_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *args: copies.append(args) or copy(*args))
    with Metrics(path, flush_seconds=NEVER) as metrics:
        for step in range(8):
            metrics.log(step, {"loss": step})
            metrics.flush()
    assert len(copies) == 1, "the spare is made once"
    assert len(read(path)) == 8


# Metrics: readers


def test_another_process_reads_at_any_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read succeeds and sees whole steps, none missing, never fewer than before."""
    monkeypatch.setattr(nmoe.metrics, "_REST_SECONDS", 0.1)
    reader = start_python(
        """
        import sys, threading, duckdb
        stop = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set())).start()
        reads = newest = 0
        while not stop.is_set():
            with duckdb.connect(sys.argv[1], read_only=True) as db:
                rows, last = db.execute("SELECT count(*), coalesce(max(step), -1) FROM metrics").fetchone()
            assert rows == (last + 1) * 7 and rows >= newest, (rows, last, newest)
            reads, newest = reads + 1, rows
        print(reads, newest)
        """,
        path,
    )
    tags = [f"tag{i}" for i in range(7)]
    with Metrics(path, flush_seconds=0.01) as metrics:
        for step in range(1000):
            metrics.log(step, dict.fromkeys(tags, step))
            time.sleep(0.002)
        output, _ = reader.communicate()
    assert reader.returncode == 0
    reads, newest = map(int, output.split())
    assert reads > 5
    assert newest > 0, "rows were visible before the end"
    assert len(read(path)) == 7000


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("mode", ["read_only=True", "read_only=False"])
def test_readers_that_stay_hinder_nobody(path: Path, mode: str) -> None:
    keeper = f"""
    import sys, duckdb
    db = duckdb.connect(sys.argv[1], {mode})
    for line in sys.stdin:
        print(db.execute("SELECT count(*) FROM metrics").fetchone()[0], flush=True)
    """

    def count(reader: subprocess.Popen[str]) -> int:
        reader.stdin.write("\n")
        reader.stdin.flush()
        return int(reader.stdout.readline())

    readers, seen = [], []
    with Metrics(path, flush_seconds=NEVER) as metrics:
        for step in range(5):
            metrics.log(step, {"loss": step, "lr": step})
            metrics.flush()
            readers.append(start_python(keeper, path))
            seen.append(count(readers[-1]))
        assert seen == [2, 4, 6, 8, 10], "a new reader sees what has been flushed"
        assert [count(reader) for reader in readers] == seen, "an old one keeps its view"
    for reader in readers:
        reader.communicate()
        assert reader.returncode == 0
    assert [row[0] for row in read(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


# Metrics: kill and resume


def test_killed_at_any_instant_and_resumed_every_row_is_there_once(path: Path) -> None:
    """The writer names each step that it has flushed; a killed run resumes after the last that was named."""
    writer = """
    import sys
    import nmoe.metrics
    from nmoe.metrics import Metrics
    nmoe.metrics._REST_SECONDS = 0.0
    resume = int(sys.argv[2])
    metrics = Metrics(sys.argv[1], resume_step=resume, flush_seconds=0.005)
    for step in range(resume + 1, 100_000):
        metrics.log(step, {"loss": step, "lr": -step})
        if step % 50 == 0:
            metrics.flush()
            print(step, flush=True)
    """
    rng = random.Random(0)
    flushed = 0
    for _ in range(10):
        process = start_python(writer, path, flushed)
        lines = [process.stdout.readline() for _ in range(rng.randint(1, 4))]
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        flushed = int([line for line in lines if line.endswith("\n")][-1])
        steps = [step for (step,) in read(path, "SELECT step FROM metrics WHERE tag = 'loss' ORDER BY rowid")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= flushed
    with Metrics(path, resume_step=flushed):
        pass
    assert read(path) == [(s, *row) for s in range(1, flushed + 1) for row in (("loss", s), ("lr", -s))]
    assert os.listdir(path.parent) == ["rank_0.duckdb"]


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_killed_between_the_renames(path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Death after so many of the three calls that exchange the copies."""
    metrics = Metrics(path, flush_seconds=NEVER)
    for step in range(3):
        metrics.log(step, {"loss": step})
        metrics.flush()
    metrics.log(3, {"loss": 3})
    allowed = iter(range(calls))

    def mortal(call: Callable[..., None]) -> Callable[..., None]:
        return lambda *paths: sys.exit() if next(allowed, None) is None else call(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", mortal(os.link))
        patch.setattr(os, "replace", mortal(os.replace))
        with pytest.raises(SystemExit):
            metrics.flush()
    assert len(read(path)) == (3 if calls < 2 else 4)
    Metrics(path, resume_step=2).close()
    assert [row[0] for row in read(path)] == [0, 1, 2]
    assert os.listdir(path.parent) == ["rank_0.duckdb"]


def test_resume_removes_the_steps_that_run_again(path: Path) -> None:
    with Metrics(path) as metrics:
        for step in range(1, 6):
            metrics.log(step, {"loss": step})
    with Metrics(path, resume_step=3) as metrics:
        metrics.log(4, {"loss": 40})
    assert read(path) == [(1, "loss", 1), (2, "loss", 2), (3, "loss", 3), (4, "loss", 40)]


def test_resume_without_a_file_starts_one(path: Path) -> None:
    with Metrics(path, resume_step=3) as metrics:
        metrics.log(4, {"loss": 1})
    assert read(path) == [(4, "loss", 1)]


# Metrics: bad input


def test_a_new_run_does_not_append_to_an_old_file(path: Path) -> None:
    Metrics(path).close()
    with pytest.raises(UserError) as error:
        Metrics(path)
    assert str(error.value) == (
        f"{path}: this run already has metrics; resume it or start it under a new run id"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text", "not a valid DuckDB database file!"),
        ("empty", "not a valid DuckDB database file!"),
        ("table", "Table with name metrics does not exist!"),
    ],
)
def test_resume_from_a_file_that_is_no_metrics_database(path: Path, content: str, reason: str) -> None:
    path.parent.mkdir(parents=True)
    if content == "table":
        with duckdb.connect(str(path)) as db:
            db.execute("CREATE TABLE losses(step BIGINT)")
    else:
        path.write_text("text" * 5000 if content == "text" else "")
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        Metrics(path, resume_step=1)
    start, middle, end = str(error.value).partition(reason)
    assert start.startswith(f"{path}: cannot go on writing to this file: ")
    assert (middle, end) == (reason, "; move it aside to resume without its rows")
    assert path.read_bytes() == before, "the file is left as it was"
    assert os.listdir(path.parent) == ["rank_0.duckdb"]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "rank_0.duckdb"
    with pytest.raises(UserError) as error:
        Metrics(path)
    assert str(error.value) == (
        f"{path}: metrics cannot be written: [Errno 17] File exists: '{path.parent}'; "
        "mend [metrics] dir and resume"
    )


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("call", ["log", "flush", "close"])
def test_a_failure_in_the_background_is_raised_by_the_next_call(path: Path, call: str) -> None:
    metrics = Metrics(path, flush_seconds=0.01)
    shutil.rmtree(path.parent)
    metrics.log(1, {"loss": 1.0})
    metrics._thread.join(timeout=30)  # it ends when it fails
    calls = {"log": lambda: metrics.log(2, {"loss": 1.0}), "flush": metrics.flush, "close": metrics.close}
    with pytest.raises(UserError) as error:
        calls[call]()
    missing = f"[Errno 2] No such file or directory: '{path}'"
    assert str(error.value) == f"{path}: metrics cannot be written: {missing}; mend [metrics] dir and resume"


@pytest.mark.parametrize("tags", [100_000, 500], ids=["in one flush", "after some flushes"])
def test_disk_full(path: Path, tags: int) -> None:
    """A limit on the file size stands in for the disk's end: the write fails in the kernel all the same."""
    code = """
    import resource, signal, sys
    import nmoe.metrics
    from nmoe.errors import UserError
    nmoe.metrics._REST_SECONDS = 0.0
    path, tags = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))
    metrics = nmoe.metrics.Metrics(path, flush_seconds=3600)
    try:
        for step in range(1000):
            print(step * tags)
            metrics.log(step, {f"tag{i}": (step + i) * 0.7137 for i in range(tags)})
            metrics.flush()
    except UserError as e:
        print(e)
    """
    *_, flushed, message = start_python(code, path, tags).communicate()[0].splitlines()
    assert message.startswith(f"{path}: metrics cannot be written: ")
    assert message.endswith("; mend [metrics] dir and resume")
    assert read(path, "SELECT count(*) FROM metrics") == [(int(flushed),)], "what was flushed stays readable"


def test_steps_must_not_decrease(path: Path) -> None:
    with Metrics(path, resume_step=7) as metrics:
        metrics.log(8, {"loss": 1.0})
        with pytest.raises(
            ValueError, match=r"^metrics of step 6 after those of step 8: steps must not decrease$"
        ):
            metrics.log(6, {"loss": 1.0})


@pytest.mark.parametrize("value", ["1.0", None, 1j, [1.0]])
def test_values_are_numbers(path: Path, value: object) -> None:
    with Metrics(path) as metrics:
        with pytest.raises(
            TypeError, match=r"^metrics of tags loss, lr: a value is not a number: must be real"
        ):
            metrics.log(1, {"loss": 1.0, "lr": value})
        metrics.log(1, {"loss": 1.0})
    assert read(path) == [(1, "loss", 1.0)], "a refused call leaves no trace"


# Experiments


def rows(db: Path) -> list[dict]:
    with sqlite3.connect(db) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM runs ORDER BY run_id")]


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_a_run_from_start_to_end(tmp_path: Path, status: str) -> None:
    db = tmp_path / "new" / "experiments.db"
    experiments = Experiments(db)
    experiments.start("a", '{"run": {}}', "f1", "c1-dirty")
    [row] = rows(db)
    started = row.pop("started")
    assert datetime.fromisoformat(started).tzinfo is not None
    assert row == {
        "run_id": "a",
        "status": "running",
        "config": '{"run": {}}',
        "fingerprint": "f1",
        "git": "c1-dirty",
        "ended": None,
        "summary": None,
    }
    experiments.finish("a", status, {"loss": 2.5})
    [row] = rows(db)
    assert (row["status"], row["started"], json.loads(row["summary"])) == (status, started, {"loss": 2.5})
    assert row["ended"] >= started


@pytest.mark.parametrize("end", ["interrupted", "failed", None])
def test_resuming_keeps_when_the_run_started(tmp_path: Path, end: str | None) -> None:
    """`end` None: the run was killed, so its row still says running."""
    db = tmp_path / "experiments.db"
    Experiments(db).start("a", "{}", "f1", "c1")
    Experiments(db).start("b", "{}", "f1", "c1")
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE runs SET started = '2024-01-01T00:00:00+00:00'")
    if end:
        Experiments(db).finish("a", end, {"loss": 3.0})
    Experiments(db).start("a", '{"steps": 9}', "f2", "c2")
    resumed, other = rows(db)
    assert list(resumed.values()) == [
        "a", "running", '{"steps": 9}', "f2", "c2", "2024-01-01T00:00:00+00:00", None, None
    ]  # fmt: skip
    assert other["fingerprint"] == "f1", "other runs are not touched"


def test_processes_share_the_file(tmp_path: Path) -> None:
    db = tmp_path / "experiments.db"
    runner = """
    import sys
    from nmoe.experiments import Experiments
    for i in range(20):
        Experiments(sys.argv[1]).start(f"{sys.argv[2]}-{i}", "{}", "f", "c")
        Experiments(sys.argv[1]).finish(f"{sys.argv[2]}-{i}", "finished", {"i": i})
    """
    processes = [start_python(runner, db, process) for process in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    found = rows(db)
    assert len(found) == 80
    assert {row["status"] for row in found} == {"finished"}


def test_readers_and_writers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    db = tmp_path / "experiments.db"
    experiments = Experiments(db)
    experiments.start("a", "{}", "f", "c")
    reader = sqlite3.connect(db, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT status FROM runs").fetchall() == [("running",)]
    experiments.finish("a", "finished", {})
    assert reader.execute("SELECT status FROM runs").fetchall() == [("running",)], "its view does not change"
    assert [row["status"] for row in rows(db)] == ["finished"]

    writer = sqlite3.connect(db, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert [row["status"] for row in rows(db)] == ["finished"]


def test_finish_of_an_unknown_run(tmp_path: Path) -> None:
    db = tmp_path / "experiments.db"
    with pytest.raises(UserError) as error:
        Experiments(db).finish("ghost", "finished", {})
    assert str(error.value) == f"{db}: run 'ghost' is not in table runs, so it cannot end as finished"


def test_finish_with_an_unknown_status(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^status 'done': expected one of finished, interrupted, failed$"):
        Experiments(tmp_path / "experiments.db").finish("a", "done", {})


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("text", "file is not a database"),
        ("folder", "unable to open database file"),
        ("text/experiments.db", "[Errno 17] File exists: '{tmp}/text'"),
        ("other.db", "table runs has no column named fingerprint"),
    ],
)
def test_experiments_file_that_cannot_be_used(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "text").write_text("not a database" * 100)
    (tmp_path / "folder").mkdir()
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE runs(run_id TEXT PRIMARY KEY, status TEXT, config TEXT)")
    db = tmp_path / place
    with pytest.raises(UserError) as error:
        Experiments(db).start("a", "{}", "f", "c")
    assert str(error.value) == (
        f"{db}: cannot record the run: {reason.format(tmp=tmp_path)}; "
        "point [metrics] experiments at a writable SQLite file or at a new one"
    )


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == "", "outside a repository"
    git("init")
    assert git_state(tmp_path) == "", "before the first commit"
    (tmp_path / "tracked").write_text("1")
    git("add", "tracked")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == commit
    (tmp_path / "tracked").write_text("2")
    assert git_state(tmp_path) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert git_state(tmp_path) == "", "where git is not installed"


# The documents


def documented(section: str) -> list[str]:
    """The SQL statements of a section of docs/records.md, the table's definition first."""
    text = (ROOT / "docs" / "records.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sql\n(.*?)```", text, flags=re.DOTALL)
    return [statement for block in blocks for statement in block.split(";") if statement.strip()]


def test_documented_queries_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run, offset in (("a", 0.0), ("b", -0.5)):
        with Metrics(Path("metrics", run, "rank_0.duckdb")) as metrics:
            for step in range(3):
                router = {
                    f"router/layers.{i}/{name}": i for i in (1, 2) for name in ("max_over_mean", "dead")
                }
                metrics.log(step, {"loss": 4.0 - step + offset, "grad_norm": 1, **router})
    table, curve, attach_a, attach_b, compare, router_load, wide = documented("Metrics")
    with duckdb.connect("metrics/a/rank_0.duckdb", read_only=True) as db:
        written = db.execute("DESCRIBE metrics").fetchall()
        assert db.execute(curve).fetchall() == [(0, 4.0), (1, 3.5), (2, 3.0)]
        assert db.execute(router_load).fetchall() == [
            (2, "router/layers.2/max_over_mean", 2.0),
            (2, "router/layers.1/max_over_mean", 1.0),
        ]
        assert db.execute(wide).fetchall() == [(0, 1.0, 4.0), (1, 1.0, 3.0), (2, 1.0, 2.0)]
    with duckdb.connect() as db:
        db.execute(table)
        assert db.execute("DESCRIBE metrics").fetchall() == written
        db.execute(attach_a)
        db.execute(attach_b)
        assert db.execute(compare).fetchall() == [
            (0, 4.0, 3.5, -0.5),
            (1, 3.0, 2.5, -0.5),
            (2, 2.0, 1.5, -0.5),
        ]


def test_documented_queries_of_experiments(tmp_path: Path) -> None:
    db = tmp_path / "experiments.db"
    Experiments(db).start("a", '{"optim": {"lr": 3e-4}}', "f", "c")
    Experiments(db).finish("a", "finished", {"loss": 2.5})
    table, latest, by_config = documented("Experiments")
    with sqlite3.connect(":memory:") as fresh, sqlite3.connect(db) as connection:
        fresh.execute(table)
        columns = "PRAGMA table_info(runs)"
        assert fresh.execute(columns).fetchall() == connection.execute(columns).fetchall()
        [(run_id, status, _, loss)] = connection.execute(latest).fetchall()
        assert (run_id, status, loss) == ("a", "finished", 2.5)
        assert connection.execute(by_config).fetchall() == [("a",)]
