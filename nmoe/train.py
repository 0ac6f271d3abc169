"""The training loop, from a config to a finished, interrupted or failed run."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import nmoe
from nmoe import config as configuration
from nmoe import report
from nmoe.checkpoint import Checkpointer
from nmoe.config import Config
from nmoe.data import tokenizer
from nmoe.data.loader import Loader
from nmoe.errors import CheckpointError, UserError
from nmoe.experiments import Ended, Experiments, git_state
from nmoe.metrics import Metrics
from nmoe.model import group_of, row_align
from nmoe.progress import Progress, banner
from nmoe.ranks import Ranks
from nmoe.sample import Sampler
from nmoe.step import NonFinite, Step
from nmoe.torchrun import launched

Print = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    run_id: str
    status: Ended
    step: int
    loss: float
    checkpoint: Path
    metrics: Path


def train(config: Config, *, resume: bool = False, out: Print = print) -> Outcome:
    """Trains to [train] steps, from the newest intact checkpoint with `resume`.

    Raises UserError for anything the user can mend, NonFinite when the run diverges: then nothing was updated and
    the run is recorded as failed.
    """
    with launched(config) as ranks:
        try:
            return _train(config, ranks, resume, out if ranks.rank == 0 else lambda text: None)
        except Exception as error:
            cause = ranks.explain(error)
            if cause is error:
                raise
            raise cause from error


def _train(config: Config, ranks: Ranks, resume: bool, out: Print) -> Outcome:
    torch.set_num_threads(
        torch.get_num_threads()
    )  # fixes MKL's thread count, and with it the order of its sums
    folder = Path(config.checkpoint.dir) / config.run.name
    with Checkpointer(
        folder,
        config.checkpoint.keep,
        rank=ranks.rank,
        world=ranks.world,
        on_warning=lambda text: out(f"warning: {text}"),
        on_collective=ranks.arrive,
    ) as checkpoints:
        if checkpoints.steps() and not resume:
            raise UserError(
                f"{folder} holds checkpoints up to step {checkpoints.steps()[-1]} of a run named {config.run.name!r}: "
                "continue it with --resume, choose another [run] name, or delete the folder"
            )
        data = Loader(
            config.data, seed=config.run.seed, seq_len=config.train.seq_len, batch_size=config.train.batch_size,
            vocab_size=config.model.vocab_size, depth=config.model.mtp_depth, rank=ranks.rank, world=ranks.world,
            micro_batch_size=config.train.micro_batch_size,
        )  # fmt: skip
        step = Step(config, say=out, ranks=ranks)
        begin, meta = _start(config, step, checkpoints, out)
        run_id = meta["run_id"]
        path = Path(config.metrics.dir) / run_id / f"rank_{ranks.rank}.duckdb"
        if begin >= config.train.steps:
            out(f"{run_id} has done its {begin} steps; to train longer, raise [train] steps")
            if ranks.rank == 0:
                Experiments(Path(config.metrics.experiments)).complete(run_id, {"step": begin})
            return Outcome(run_id, "finished", begin, float("nan"), folder / f"step_{begin:08d}", path)
        if begin and ranks.rank == 0:
            _forget(path.parent, ranks.world, begin)
        record = _record(config, meta) if ranks.rank == 0 else lambda status, summary: None
        out(banner(config, step, run_id, begin))
        progress = Progress(config, step)
        loss, done = float("nan"), begin
        try:
            with (
                _interruptible() as interrupted,
                Metrics(path, resume_step=begin - 1 if begin else None) as metrics,
            ):
                for index in range(begin, config.train.steps):
                    started = time.perf_counter()
                    batch = data.batch(index)
                    waited = time.perf_counter() - started
                    result = step.run(index, batch)
                    done, loss = index + 1, result.losses["main"]
                    seconds = time.perf_counter() - started
                    metrics.log(index, progress.values(result, batch.valid, seconds, waited))
                    if done % config.train.log_every == 0 or done == config.train.steps:
                        out(progress.line(done, result))
                    stop = ranks.any(bool(interrupted))
                    if done % config.checkpoint.every == 0 or stop or done == config.train.steps:
                        metrics.flush()  # a resumed run does not repeat these steps: their rows must be on disk
                        checkpoints.save(
                            done, step.state(), {**meta, "tokens": done * progress.tokens_per_step}
                        )
                    if stop:
                        break
            checkpoints.close()
        except BaseException as error:
            status: Ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            record(status, {"step": done, "loss": _number(loss), "error": str(ranks.explain(error))})
            if isinstance(error, NonFinite):
                kept = checkpoints.steps()
                raise NonFinite(
                    f"{error}. Last checkpoint: {f'step {kept[-1]}' if kept else 'none'} in {folder}"
                ) from None
            raise
        status = "finished" if done >= config.train.steps else "interrupted"
        record(status, {"step": done, "loss": _number(loss), **progress.summary()})
        _farewell(config, step, run_id, status, path, folder, out)
        return Outcome(run_id, status, done, loss, folder / f"step_{done:08d}", path)


def _record(config: Config, meta: dict[str, Any]) -> Callable[[Ended, dict[str, Any]], None]:
    """Records that the run has started; call what it returns when the run has ended."""
    experiments = Experiments(Path(config.metrics.experiments))
    experiments.start(meta["run_id"], json.dumps(config.to_dict()), meta["fingerprint"], meta["git"])
    return lambda status, summary: experiments.finish(meta["run_id"], status, summary)


def _forget(folder: Path, world: int, begin: int) -> None:
    """Removes the metrics of steps that run again from the files of ranks that do not."""
    for path in folder.glob("rank_*.duckdb"):
        if int(path.stem.removeprefix("rank_")) >= world:
            Metrics(path, resume_step=begin - 1).close()


def _number(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _start(config: Config, step: Step, checkpoints: Checkpointer, out: Print) -> tuple[int, dict[str, Any]]:
    """Restores the newest intact checkpoint or initialises the parameters: the first step to run, the run's meta."""
    meta: dict[str, Any] = {
        "run_id": f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}",
        "config": config.to_dict(),
        "fingerprint": configuration.fingerprint(config),
        "git": git_state(Path(__file__).parent),
        "threads": torch.get_num_threads(),
        "sums": _order(config, step),
        "versions": {
            "nmoe": nmoe.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    meta = step.ranks.from_first(meta)

    def check(saved: dict[str, Any]) -> None:
        changed = configuration.differences(saved["config"], config)
        if changed:
            raise CheckpointError(
                f"the run in {config.checkpoint.dir}/{config.run.name} was made with another config; these keys "
                "change its trajectory:\n  "
                + "\n  ".join(changed)
                + "\nrestore them, or start a run of another [run] name"
            )
        for key in ("threads", "sums", "versions"):
            if saved[key] != meta[key]:
                out(
                    f"warning: {key} were {saved[key]}, are {meta[key]}: the losses may differ in their last bits"
                )

    found = checkpoints.load(step.state(), check=check)
    if found is None:
        step.parameters.initialise(config.run.seed, config.model.init_std)
        if config.checkpoint.init_from:
            _load_pretrained(config, step)
        return 0, meta
    begin, saved = found
    step.restore(begin)
    out(f"resumed from step {begin}")
    return begin, {**meta, "run_id": saved["run_id"]}


def _order(config: Config, step: Step) -> dict[str, int]:
    """What the order of a step's sums depends on. Not on the ranks when they are 2^n and expert rows are not padded."""
    order, world = {"sequences at once": step.sequences}, step.ranks.world
    if world & (world - 1) or row_align(config) > 1:
        order |= {"ranks": world, "ranks of a group": config.rdep.ranks}
    return order


def _load_pretrained(config: Config, step: Step) -> None:
    from nmoe import hf

    params, biases = hf.load(config, Path(config.checkpoint.init_from))
    for name, value in params.items():
        if group_of(name) == "expert":
            held = len(step.parameters.weights[name])
            value = value[step.ranks.share * held :][:held]
        step.parameters.assign(name, value)
    for name, value in biases.items():
        step.tensors[name].copy_(value)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM lets the step finish: it is appended to the list. The second ends the process as
    usual."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        for known, previous in before.items():
            signal.signal(known, previous)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _farewell(
    config: Config, step: Step, run_id: str, status: str, metrics: Path, folder: Path, out: Print
) -> None:
    if step.ranks.rank > 0:
        return
    picture = metrics.with_name("loss.png")
    drawn = report.plot_loss(metrics, picture, run_id)
    if status == "finished" and step.ranks.group == 1:  # one rank does not hold all experts
        text = tokenizer.load(config.data.tokenizer, config.data.dir)
        tokens = Loader(
            config.data, seed=config.run.seed, seq_len=min(32, config.train.seq_len), batch_size=1,
            vocab_size=config.model.vocab_size,
        ).batch(0).tokens[0]  # fmt: skip
        prompt = tokens[: min(16, len(tokens))].tolist()
        written = Sampler(config, step.tensors).generate(
            prompt, min(120, config.train.seq_len - 16), seed=config.run.seed
        )
        out("\nsample (prompt | continuation):")
        out(f"{text.decode(prompt)}|{text.decode(written[len(prompt) :])}")
    out(f"\n{status}: {run_id}")
    out(f"  checkpoints  {folder}")
    out(f"  metrics      {metrics} (DuckDB, table metrics)")
    out(f"  experiments  {config.metrics.experiments} (SQLite, table runs)")
    out(f"  loss curve   {picture}" if drawn else "  loss curve   install nmoe[plot] to have it drawn")
    if status == "interrupted":
        out("continue with: nmoe train <config> --resume")
