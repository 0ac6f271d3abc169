"""The training loop: it learns, it stops cleanly, and a resumed run is the uninterrupted run bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from nmoe.checkpoint_parts import local
from nmoe.config import Checkpoint, Config, Data, Metrics, Run, Source
from nmoe.data.prep import prepare
from nmoe.errors import CheckpointError, UserError
from nmoe.step import NonFinite, Step
from nmoe.train import train

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "how",
    "many",
    "rows",
    "one",
    "expert",
    "may",
    "hold",
    "full",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Data:
    """Token shards of a few hundred short documents that a bigram model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    for number in range(300):
        start, length = chooser.randrange(len(WORDS)), chooser.randrange(5, 120)
        text = " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))
        (folder / f"{number:03d}.txt").write_text(text)
    data = Data(str(folder / "shards"), "bpe:288", (Source("text", files=(str(folder / "*.txt"),)),))
    prepare(data, workers=1)
    return data


@pytest.fixture
def config(tiny, corpus, tmp_path):
    """A config of 12 steps in two micro-batches, with MTP and all losses."""

    def make(**sections) -> Config:
        base = tiny(
            model={"vocab_size": 288, "mtp_depth": 1},
            moe={"balance_loss": 1e-3, "z_loss": 1e-3},
            schedule={"precision": "bf16", "recompute": "selective"},
            train={"steps": 12, "batch_size": 4, "micro_batch_size": 2, "log_every": 8},
            optim={"lr": 3e-3, "warmup_tokens": 256, "decay_tokens": 1024},
        )
        base = replace(
            base,
            run=Run("run", seed=3),
            data=corpus,
            checkpoint=Checkpoint(str(tmp_path / "checkpoints"), every=4, keep=2),
            metrics=Metrics(str(tmp_path / "metrics"), str(tmp_path / "experiments.db")),
        )
        for name, keys in sections.items():
            base = replace(base, **{name: replace(getattr(base, name), **keys)})
        return base

    return make


def elsewhere(config: Config, tmp_path: Path, name: str) -> Config:
    """The same run with its files in a folder of their own."""
    folder = tmp_path / name
    return replace(
        config,
        checkpoint=replace(config.checkpoint, dir=str(folder / "checkpoints")),
        metrics=Metrics(str(folder / "metrics"), str(folder / "experiments.db")),
    )


def quiet(text: str) -> None:
    pass


def rows(config: Config, *tags: str) -> dict[tuple[int, str], float]:
    """(step, tag) → value over the finished run's metrics; fails when one is there twice.

    A process that is killed before its first checkpoint leaves a run behind that never finishes."""
    with sqlite3.connect(config.metrics.experiments) as db:
        ((run_id,),) = db.execute("SELECT run_id FROM runs WHERE status = 'finished'").fetchall()
    path = Path(config.metrics.dir) / run_id / "rank_0.duckdb"
    with duckdb.connect(str(path), read_only=True) as db:
        found = db.execute("SELECT step, tag, value FROM metrics").fetchall()
    values = {(step, tag): value for step, tag, value in found if tag in tags or tag.startswith(tags)}
    assert len({(step, tag) for step, tag, _ in found}) == len(found), "a step was recorded twice"
    return values


TRAJECTORY = ("loss", "grad_norm", "lr", "router/")


def saved(config: Config) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint."""
    from nmoe.checkpoint import Checkpointer

    tensors = Step(config).state()
    with Checkpointer(Path(config.checkpoint.dir) / config.run.name, 2) as checkpoints:
        assert checkpoints.load(tensors) is not None
    return {name: local(tensor) for name, tensor in tensors.items()}


def status(config: Config) -> tuple[str, dict]:
    with sqlite3.connect(config.metrics.experiments) as db:
        ((found, summary),) = db.execute("SELECT status, summary FROM runs").fetchall()
    return found, json.loads(summary) if summary else {}


def test_learns_and_leaves_its_records(config):
    run = config(train={"steps": 60}, schedule={"precision": "bf16"}, optim={"lr": 1e-2})
    lines: list[str] = []
    outcome = train(run, out=lines.append)
    losses = [value for _, value in sorted(rows(run, "loss").items()) if _[1] == "loss"]
    assert len(losses) == 60
    assert np.mean(losses[:3]) > 5.0, "an untrained model knows nothing: ln(288) = 5.66"
    assert np.mean(losses[-5:]) < 3.5, "the text is almost deterministic"
    assert status(run)[0] == outcome.status == "finished"
    text = "\n".join(lines)
    for part in (
        "target cpu",
        "step 60/60 (100%)",
        "tok/s",
        "% of bf16 peak",
        "eta 0s",
        "router | max/mean",
        "sample",
    ):
        assert part in text
    assert outcome.metrics.with_name("loss.png").stat().st_size > 10_000
    assert outcome.checkpoint.is_dir()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mxfp8", "nvfp4"])
def test_same_config_same_bits_whatever_is_recomputed(config, tmp_path, precision):
    curves = []
    for recompute in ("none", "full"):
        run = elsewhere(
            config(schedule={"precision": precision, "recompute": recompute}, train={"steps": 5},
                   optim={"decay_tokens": 0}),
            tmp_path, recompute,
        )  # fmt: skip
        train(run, out=quiet)
        curves.append(rows(run, *TRAJECTORY))
    assert curves[0] == curves[1]


def _run_child(config: Config, threads: int) -> None:
    torch.set_num_threads(threads)
    train(config, resume=True, out=quiet)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nmoe.train", "nmoe.step", "torch", "matplotlib.pyplot"])
    return context


def run_once(processes, config: Config, kill_after: float | None = None) -> int:
    """Exit code of one process that trains; SIGKILLed after so many seconds, wherever it is."""
    child = processes.Process(target=_run_child, args=(config, 1))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def test_killed_at_random_and_resumed_is_uninterrupted_bit_for_bit(config, tmp_path, processes):
    """NVFP4, whose stochastic rounding makes each step depend on its number too."""
    sections = {"schedule": {"precision": "nvfp4"}, "checkpoint": {"every": 2}}
    whole = elsewhere(config(**sections), tmp_path, "whole")
    assert run_once(processes, whole) == 0
    broken = elsewhere(config(**sections), tmp_path, "broken")
    chooser = random.Random(os.environ.get("NMOE_TEST_SEED", "1"))
    kills, patience, finished = 0, 1.0, False
    while kills < 20:
        if finished:  # start over: there is nothing left to kill
            assert rows(broken, *TRAJECTORY) == rows(whole, *TRAJECTORY)
            broken = elsewhere(broken, tmp_path, f"broken-{kills}")
        code = run_once(processes, broken, kill_after=chooser.uniform(0.05, patience))
        kills += code == -signal.SIGKILL
        finished = code == 0
        assert code in (0, -signal.SIGKILL)
        patience = patience * 0.8 if finished else min(patience * 1.3, 20.0)  # some steps must get done
    assert run_once(processes, broken) == 0
    assert rows(broken, *TRAJECTORY) == rows(whole, *TRAJECTORY)
    expected, found = saved(whole), saved(broken)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_killed_after_its_last_checkpoint_a_run_ends_as_finished_when_resumed(config, tmp_path):
    whole = elsewhere(config(), tmp_path, "whole")
    train(whole, out=quiet)
    with sqlite3.connect(whole.metrics.experiments) as db:
        ((summary,),) = db.execute("SELECT summary FROM runs").fetchall()
        db.execute("UPDATE runs SET status = 'running', ended = NULL, summary = NULL")
    lines: list[str] = []
    for _ in range(2):
        assert train(whole, resume=True, out=lines.append).status == "finished"
        assert rows(whole, *TRAJECTORY)
    assert any("has done its" in line for line in lines)
    with sqlite3.connect(whole.metrics.experiments) as db:
        (found,) = db.execute(
            "SELECT json_extract(summary, '$.step'), ended IS NOT NULL FROM runs"
        ).fetchall()
    assert found == (json.loads(summary)["step"], 1)


def test_truncated_newest_checkpoint_falls_back_and_says_so(config, tmp_path):
    whole = elsewhere(config(), tmp_path, "whole")
    train(whole, out=quiet)
    stopped = elsewhere(config(), tmp_path, "stopped")
    _stop_after(stopped, 10)
    folder = Path(stopped.checkpoint.dir) / "run"
    newest = max(folder.glob("step_*"))
    assert newest.name == "step_00000010"
    shard = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    lines: list[str] = []
    train(stopped, resume=True, out=lines.append)
    assert any(line.startswith("warning:") and "step_00000010" in line for line in lines)
    assert "resumed from step 8" in lines
    assert rows(stopped, *TRAJECTORY) == rows(whole, *TRAJECTORY)


def _stop_after(config: Config, steps: int) -> None:
    """Interrupts a run in its step number `steps`, as Ctrl-C does."""
    before = Step.run

    def run(self, index, batch):
        if index + 1 == steps:
            signal.raise_signal(signal.SIGINT)
        return before(self, index, batch)

    Step.run = run
    try:
        assert train(config, out=quiet).status == "interrupted"
    finally:
        Step.run = before


def test_interrupt_finishes_the_step_saves_and_reports(config):
    run = config()
    _stop_after(run, 7)
    recorded, summary = status(run)
    assert (recorded, summary["step"]) == ("interrupted", 7)
    assert sorted(p.name for p in (Path(run.checkpoint.dir) / "run").glob("step_*"))[-1] == "step_00000007"
    train(run, resume=True, out=quiet)
    assert status(run)[0] == "finished"
    lines: list[str] = []
    assert train(run, resume=True, out=lines.append).status == "finished"
    assert "has done its 12 steps" in lines[-1]


def test_nan_stops_before_the_optimizer_and_fails_the_run(config):
    run = config()
    _stop_after(run, 6)
    before = saved(run)
    original = Step._feed

    def poison(self, batch, which):
        original(self, batch, which)
        self.tensors["scale"].fill_(float("nan"))

    Step._feed = poison
    try:
        with pytest.raises(
            NonFinite, match=r"step 7: loss .*nan.*Nothing was updated.*Last checkpoint: step 6"
        ):
            train(run, resume=True, out=quiet)
    finally:
        Step._feed = original
    assert status(run)[0] == "failed"
    after = saved(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert NonFinite.exit_code == 3


def test_refuses_to_mix_runs(config):
    run = config()
    _stop_after(run, 4)
    with pytest.raises(
        UserError, match=r"holds checkpoints up to step 4 of a run named 'run': continue it with --resume"
    ):
        train(run, out=quiet)
    other = replace(run, optim=replace(run.optim, lr=1e-4), train=replace(run.train, log_every=1))
    with pytest.raises(CheckpointError, match=r"optim\.lr: was 0\.003, is 0\.0001") as error:
        train(other, resume=True, out=quiet)
    assert "log_every" not in str(error.value)
    train(replace(run, schedule=replace(run.schedule, recompute="none")), resume=True, out=quiet)


def test_last_tokens_in_bf16_change_only_them(config, tmp_path):
    kind, low = {"steps": 6}, {"precision": "mxfp8"}
    plain = elsewhere(config(train=kind, optim={"decay_tokens": 0}, schedule=low), tmp_path, "plain")
    late = elsewhere(
        config(train=kind, optim={"decay_tokens": 0}, schedule={**low, "bf16_last_tokens": 2 * 4 * 32}),
        tmp_path,
        "late",
    )
    train(plain, out=quiet)
    train(late, out=quiet)
    a, b = rows(plain, "loss"), rows(late, "loss")
    assert [a[s, "loss"] == b[s, "loss"] for s in range(6)] == [True] * 4 + [False] * 2


def test_gradients_do_not_depend_on_the_micro_batch(config, corpus):
    from nmoe.data.loader import Loader

    grads = []
    for sequences in (4, 2, 1):
        run = config(schedule={"precision": "fp32"}, train={"micro_batch_size": sequences})
        step = Step(run)
        step.parameters.initialise(0, 0.05)
        batch = Loader(corpus, seed=0, seq_len=32, batch_size=4, vocab_size=288, depth=1).batch(0)
        step.optimizer.step = lambda *a: None
        step.run(0, batch)
        grads.append(step.parameters.grad.clone())
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-7)


def test_command_line_shows_no_traceback_for_a_users_mistake(tmp_path):
    config = tmp_path / "broken.toml"
    config.write_text("[run]\nname = 'x'\nsede = 3\n")
    result = subprocess.run(
        [sys.executable, "-m", "nmoe", "train", str(config)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "did you mean [run] seed" in result.stderr
    result = subprocess.run(
        [sys.executable, "-m", "nmoe", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0
    assert all(
        name in result.stdout
        for name in ("train", "prep-mixture", "plan", "bench", "compile", "export", "doctor")
    )


def test_an_exported_run_starts_another(config, tmp_path):
    """export → [checkpoint] init_from: the new run's first loss is the trained model's on the same batch."""
    from nmoe.data.loader import Loader
    from nmoe.export import export

    trained = config(schedule={"precision": "fp32"}, train={"steps": 12})
    train(trained, out=quiet)
    assert str(tmp_path / "hf") in export(trained, tmp_path / "hf")
    start = elsewhere(
        replace(trained, checkpoint=replace(trained.checkpoint, init_from=str(tmp_path / "hf"))),
        tmp_path,
        "new",
    )
    train(start, out=quiet)

    step = Step(trained)
    for name, tensor in saved(trained).items():
        local(step.state()[name]).copy_(tensor)
    step.restore(12)
    batch = Loader(trained.data, seed=3, seq_len=32, batch_size=4, vocab_size=288, depth=1).batch(0)
    assert step.run(0, batch).losses["main"] == rows(start, "loss")[0, "loss"]
    with pytest.raises(UserError, match=r"hf exists and is not empty; name a new folder"):
        export(trained, tmp_path / "hf")


def test_export_wants_a_checkpoint_of_this_model(config, tmp_path):
    from nmoe.export import export

    run = config()
    with pytest.raises(CheckpointError, match="no checkpoint to export; train the config first"):
        export(run, tmp_path / "hf")
    _stop_after(run, 2)
    other = replace(run, moe=replace(run.moe, route_scale=2.0))
    with pytest.raises(CheckpointError, match=r"holds another model:\n  moe\.route_scale: was 1\.0, is 2\.0"):
        export(other, tmp_path / "hf")
