"""`nmoe train` on several ranks: the bits of one rank, whatever the ranks, and what happens when one stops or dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import duckdb
import pytest
import torch
from processes import CONTEXT, Group

from nmoe.checkpoint import Checkpointer
from nmoe.checkpoint_parts import local
from nmoe.config import Checkpoint, Data, Metrics, Rdep, Run, Source
from nmoe.data.prep import prepare
from nmoe.errors import UserError
from nmoe.plan import PlanError
from nmoe.rdep.exchange import Exchange
from nmoe.rdep.plan import CapacityError
from nmoe.rdep.shm import Shm
from nmoe.rdep.transport import Missing
from nmoe.step import Step
from nmoe.train import train

STEPS = 6
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "how", "many", "rows")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    for number in range(40):
        words = [chooser.choice(WORDS) for _ in range(150)]
        (folder / f"{number:02d}.txt").write_text(" ".join(words))
    data = Data(str(folder / "shards"), "bpe:280", (Source("text", files=(str(folder / "*.txt"),)),))
    prepare(data, workers=1)
    return data


@pytest.fixture(scope="module")
def config(tiny, corpus, tmp_path_factory):
    """A run with its files in a folder of its own; `ranks` share a set of experts."""

    def make(ranks=1, timeout=60.0, **sections):
        folder = tmp_path_factory.mktemp("run")
        base = tiny(
            model={"vocab_size": 280, "mtp_depth": 1},
            moe={"balance_loss": 1e-3, "z_loss": 1e-3, "bias_rate": 0.02},
            schedule={"recompute": "full"},
            train={"steps": STEPS, "batch_size": 8, "micro_batch_size": 1, "log_every": 1},
            optim={"lr": 3e-3},
        )
        base = replace(
            base,
            run=Run("run", seed=3),
            data=corpus,
            rdep=Rdep(ranks, timeout=timeout),
            checkpoint=Checkpoint(str(folder / "checkpoints"), every=10**6),
            metrics=Metrics(str(folder / "metrics"), str(folder / "experiments.db")),
        )
        for name, keys in sections.items():
            base = replace(base, **{name: replace(getattr(base, name), **keys)})
        return base

    return make


# ---- the ranks of a run -------------------------------------------------------------------------------------


def _rank(key, rank, world, config, port, begun=None, delays=False):
    """What torchrun and the command do. Returns the lines that the rank prints."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    if begun:
        run = Step.run

        def report(self, index, batch):
            result = run(self, index, batch)
            begun[rank].set()
            return result

        Step.run = report
    if delays:
        raise_flag = Shm.raise_flag

        def late(self, *args, **keys):
            if random.random() < 0.02:
                time.sleep(random.random() * 2e-3)
            raise_flag(self, *args, **keys)

        Shm.raise_flag = late
    lines: list[str] = []
    train(config, resume=True, out=lines.append)
    return lines


def start(config, world, work=_rank, **keys) -> Group:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Group(world, partial(work, config=config, port=port, **keys))


def finish(group, world):
    """The lines of each rank; raises what a rank raised."""
    found = group.join(world)
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[rank] for rank in range(world)]


def begun(config, world, **keys) -> Group:
    """The group once all ranks have done a step."""
    events = [CONTEXT.Event() for _ in range(world)]
    group = start(config, world, begun=events, **keys)
    for event in events:
        assert event.wait(30)
    return group


def trajectory(config, rank=0):
    """(step, tag) → value of what must not depend on the ranks; and the newest checkpoint's tensors."""
    with sqlite3.connect(config.metrics.experiments) as db:
        ((run_id,),) = db.execute("SELECT run_id FROM runs WHERE status = 'finished'").fetchall()
    path = Path(config.metrics.dir) / run_id / f"rank_{rank}.duckdb"
    with duckdb.connect(str(path), read_only=True) as db:
        rows = db.execute("SELECT step, tag, value FROM metrics").fetchall()
    values = {
        (step, tag): value for step, tag, value in rows if tag.startswith(("loss", "grad_norm", "router/"))
    }
    assert len({step for step, _ in values}) == config.train.steps
    tensors = Step(replace(config, rdep=Rdep())).state()
    with Checkpointer(Path(config.checkpoint.dir) / "run", 1) as checkpoints:
        assert checkpoints.load(tensors) is not None
    return values, {name: local(tensor) for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    different = [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])]
    assert not different


@pytest.fixture(scope="module")
def alone(config):
    """The trajectory of one rank."""
    run = config()
    finish(start(run, 1), 1)
    return trajectory(run)


# ---- the bits of one rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "ranks"), [(2, 1), (4, 4)])
def test_losses_and_weights_are_the_bits_of_one_rank(config, alone, world, ranks):
    run = config(ranks)
    lines = finish(start(run, world), world)
    assert f"{world} ranks, {ranks} to a set of experts" in "\n".join(lines[0])
    assert not any(lines[1:]), "only rank 0 speaks"
    assert_same(trajectory(run), alone)
    assert trajectory(run, world - 1)[0] == alone[0], "each rank has metrics of its own"


def test_rounded_weights_of_other_ranks_are_the_bits_of_ones_own(config):
    """Working copies in BF16, dense ones gathered among all ranks and experts among two."""
    found = []
    for world, ranks in ((1, 1), (4, 2)):
        run = config(
            ranks, schedule={"precision": "bf16"}, model={"mtp_depth": 0}, train={"steps": 3, "batch_size": 4}
        )
        finish(start(run, world), world)
        found.append(trajectory(run))
    assert_same(*found)


def test_resumed_on_other_numbers_of_ranks(config, alone):
    run = config(checkpoint={"every": 2})
    for world, steps in ((2, 3), (1, 4), (4, STEPS)):
        part = replace(run, rdep=Rdep(world), train=replace(run.train, steps=steps))
        first = finish(start(part, world), world)[0]
        assert not any("warning" in line for line in first)
        if steps == 3:  # the last checkpoint is lost, and step 2 runs again, on one rank
            (Path(run.checkpoint.dir) / "run" / "step_00000003").rename(Path(run.checkpoint.dir) / "lost")
        if steps == 4:
            (path,) = Path(run.metrics.dir).glob("*/rank_1.duckdb")
            with duckdb.connect(str(path), read_only=True) as db:
                assert db.execute("SELECT max(step) FROM metrics").fetchone() == (1,)
    assert_same(trajectory(run), alone)


def test_delays_do_not_change_a_bit(config, alone):
    run = config(2)
    finish(start(run, 4, delays=True), 4)
    assert_same(trajectory(run), alone)


@pytest.mark.slow
def test_100_runs_with_delays(config, alone):
    for repeat in range(100):
        run = config((1, 2, 4)[repeat % 3])
        finish(start(run, 4, delays=True), 4)
        assert_same(trajectory(run), alone)


@pytest.mark.parametrize("hidden", [64, 512], ids=["BF16 rows", "MXFP8 rows"])
def test_quantized_experts_differ_by_the_blocks_of_their_rows_alone(config, hidden):
    """Those of a column copy run over the rows of all ranks of the group: only weight gradients of experts differ."""
    found = []
    for ranks in (1, 2):
        run = config(
            ranks, schedule={"precision": "mxfp8", "recompute": "none"}, train={"steps": 1, "batch_size": 2},
            model={"vocab_size": 280, "mtp_depth": 1, "hidden_size": hidden},
        )  # fmt: skip
        rows = Step(replace(run, rdep=Rdep())).schedule.graph.tensors["layers.1.moe.dispatch.rows"]
        assert rows.format == ("mxfp8" if hidden == 512 else "bf16")
        finish(start(run, 2), 2)
        found.append(trajectory(run))
    (first, second), (values, others) = zip(*found, strict=True)
    assert {tag for tag in first if first[tag] != second[tag]} <= {(0, "grad_norm")}
    norm = (0, "grad_norm")
    assert first[norm] == pytest.approx(second[norm], rel=0.05)
    for name, moment in values.items():
        if name.startswith("m.") and ".experts." not in name:
            assert torch.allclose(moment * first[norm], others[name] * second[norm], rtol=1e-5), (
                name
            )  # unclipped


# ---- ranks that stop, die or overflow -----------------------------------------------------------------------


def test_survivors_of_a_killed_rank_name_it_and_the_run_goes_on(config, alone):
    run = config(2, train={"steps": 10**6}, checkpoint={"every": 2, "keep": 10**6})
    group = begun(run, 2)
    time.sleep(random.random())  # wherever it is
    group.processes[1].kill()
    error = group.join(1)[0]
    assert isinstance(error, Missing) and error.exit_code == 4
    assert "rank 1 of 2 has died" in str(error)
    with sqlite3.connect(run.metrics.experiments) as db:
        ((status, summary),) = db.execute("SELECT status, summary FROM runs").fetchall()
    assert status == "failed" and "rank 1 of 2 has died" in summary
    for process in group.processes:
        process.join(10)
    for path in sorted((Path(run.checkpoint.dir) / "run").glob("step_????????"))[2:]:
        path.rename(path.with_name(f"{path.name}.tmp-0"))  # go on from step 4 at the latest
    again = replace(run, train=replace(run.train, steps=STEPS))
    finish(start(again, 2), 2)
    assert_same(trajectory(again), alone)


def _dies(key, rank, world, config, port):
    """Rank 1 dies when its fifth dispatch begins: the layers' first ones of the step, and what backward sends."""
    if rank == 1:
        dispatch, calls = Exchange.dispatch, []

        def fatal(self, *args):
            calls.append(None)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return dispatch(self, *args)

        Exchange.dispatch = fatal
    return _rank(key, rank, world, config, port)


def test_survivors_name_the_layer(config):
    error = start(config(2, model={"mtp_depth": 0}), 2, work=_dies).join(1)[0]
    # forward layers 1 and 2; backward layer 2: gradient out, x again; backward layer 1
    waited = r"layers\.1\.moe\.combine\.bwd: rank 0 waited \d\.\d s for rows\.full 7 \(seen 6\) of rank 1"
    assert re.match(f"{waited}: rank 1 of 2 has died", str(error)), error


def test_a_stopped_rank_is_survived_or_named(config, alone):
    run = config(2)
    group = begun(run, 2)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    time.sleep(1)
    assert group.results.empty()
    os.kill(group.processes[1].pid, signal.SIGCONT)
    finish(group, 2)
    assert_same(trajectory(run), alone)

    group = begun(config(2, timeout=1.0, train={"steps": 10**6}), 2)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    error = group.join(1)[0]
    group.processes[1].kill()
    assert isinstance(error, Missing) and "of rank 1: rank 1 of 2 is stuck" in str(error), error


def test_an_interrupted_rank_ends_the_step_of_all(config, alone):
    run = config(2, train={"steps": 10**6})
    group = begun(run, 2)
    os.kill(group.processes[1].pid, signal.SIGINT)
    finish(group, 2)
    with sqlite3.connect(run.metrics.experiments) as db:
        ((status, summary),) = db.execute("SELECT status, summary FROM runs").fetchall()
    assert status == "interrupted"
    (folder,) = (Path(run.checkpoint.dir) / "run").glob("step_*")
    assert folder.name == f"step_{json.loads(summary)['step']:08d}"


def _overflow(key, rank, world, config, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    states: list[dict] = []
    run = Step.run

    def watched(self, index, batch):
        state = {name: local(tensor) for name, tensor in self.state().items()}
        states[:] = [{name: tensor.clone() for name, tensor in state.items()}, state]
        return run(self, index, batch)

    Step.run = watched
    try:
        train(config, out=lambda text: None)
    except CapacityError as error:
        before, after = states
        return str(error), error.exit_code, all(torch.equal(before[name], after[name]) for name in before)


def test_overflow_is_one_error_on_all_ranks_and_changes_nothing(config):
    """All tokens choose experts 0 and 1 first: their rank would take the rows of everyone."""
    run = config(2, moe={"balance_loss": 0.0, "z_loss": 0.0})
    run = replace(run, rdep=replace(run.rdep, capacity=70))
    found = start(run, 2, work=_overflow).join(2)
    for message, code, untouched in found.values():
        assert re.fullmatch(
            r"layers\.[12]\.moe\.plan: rank [01] of 2 would receive \d+ expert rows, the capacity is 70: raise "
            r"\[rdep\] capacity to at least \d+, or set it to 0 for the worst case", message
        ), message  # fmt: skip
        assert code == 2 and untouched
    assert found[0] == found[1]


# ---- the command --------------------------------------------------------------------------------------------


def test_wrong_numbers_of_ranks_are_refused(config, monkeypatch):
    with pytest.raises(PlanError, match=r"\[rdep\] ranks = 2, expected a divisor of the number of ranks"):
        train(config(2), out=lambda text: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        PlanError, match=r"batch_size = 8 sequences, expected a multiple of the number of ranks"
    ):
        train(config(), out=lambda text: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        Missing, match=r"the 2 processes did not find each other .*torchrun --nproc-per-node 2"
    ):
        train(config(timeout=1.0), out=lambda text: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match=r"2 processes .* one a GPU: this host has 1; start `torchrun --nproc"
    ):
        train(config(target={"device": "sm_90a"}), out=lambda text: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match="on several hosts"):
        train(config(), out=lambda text: None)


def test_torchrun(config, alone, tmp_path):
    run = config(2)
    path = tmp_path / "config.toml"
    path.write_text(toml(asdict(run)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "nmoe",
        "train",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"step {STEPS}/{STEPS}") == 1
    assert_same(trajectory(run), alone)


def toml(sections: dict) -> str:
    """TOML of what `asdict` makes of a config; absent keys are None."""

    def value(x):
        return str(x).lower() if isinstance(x, bool) else f"[{', '.join(map(value, x))}]" if isinstance(x, tuple) else (
            f'"{x}"' if isinstance(x, str) else repr(x))  # fmt: skip

    lines: list[str] = []

    def section(name, keys):
        tables = {
            k: v
            for k, v in keys.items()
            if isinstance(v, dict) or (isinstance(v, tuple) and v and isinstance(v[0], dict))
        }
        lines.extend([f"{k} = {value(v)}" for k, v in keys.items() if k not in tables and v is not None])
        for key, table in tables.items():
            for one in table if isinstance(table, tuple) else [table]:
                full = f"{name}.{key}" if name else key
                lines.append(f"[[{full}]]" if isinstance(table, tuple) else f"[{full}]")
                section(full, one)

    section("", sections)
    return "\n".join(lines) + "\n"
