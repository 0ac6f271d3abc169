"""`torchrun -m nmoe train` on two GPUs of one host: its losses against one GPU's, and its ends.

    python bench/rdep_command.py build HOME            compile the quickstart's kernels into HOME; needs no GPU
    python bench/rdep_command.py run HOME --json FILE  on the GPUs; HOME holds the quickstart's prepared data, too

Losses: the quickstart as it is shipped, in BF16, 300 steps. One GPU with 1, 2 and 4 sequences a micro-batch, which are
the same sums in other orders, says how far losses part for that reason alone. Two GPUs share the experts or hold all of
them, are stopped and continued on the way, and are resumed on one and on two.
Ends: a rank is killed, or stopped for good; the other must say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timing import provenance

from nmoe import binding
from nmoe.codegen import optimizer
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import build_transfers
from nmoe.codegen.spec import specs
from nmoe.codegen.transfers import transfers_of
from nmoe.config import load

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.toml"
TARGET, RANKS, STEPS = "sm_90a", 2, 300
KEYS = {"NMOE_TARGET__DEVICE": TARGET, "NMOE_SCHEDULE__PRECISION": "bf16", "NMOE_TRAIN__LOG_EVERY": "1",
        "NMOE_CHECKPOINT__KEEP": "9"}  # fmt: skip
LIMIT = 100.0  # seconds that a run may take

Series = list[tuple[float, float]]  # loss and gradient norm by step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("home", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    home = args.home.resolve()
    os.environ["NMOE_HOME"] = str(home)
    if args.action == "build":
        build(home / "kernels")
        return
    results = provenance()
    for part, run in {"losses": partial(losses, home), "ends": partial(together, stopped, killed)}.items():
        results[part] = run()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


def build(root: Path) -> None:
    config = load(CONFIG)
    config = replace(
        config,
        target=replace(config.target, device=TARGET),
        schedule=replace(config.schedule, precision="bf16"),
    )
    both = [replace(config, rdep=replace(config.rdep, ranks=ranks)) for ranks in (1, RANKS)]
    schedules = [binding.lowered(c) for c in both]
    wanted = dict.fromkeys([*(s for x in schedules for s in specs(x)), *optimizer.specs(config)])
    made = build_kernels(list(wanted), root, workers=2, progress=sys.stderr)
    print(f"{len(made.warm)} kernels cached, {len(made.built)} built, failed: {made.failed}")
    print(build_transfers([p for s in schedules for p in transfers_of(s, 2)], TARGET, root, 2))


# ---- runs ---------------------------------------------------------------------------------------------------


def start(name: str, processes: int, *flags: str, group: int = 1, sequences: int = 2, **keys: str) -> Any:
    """`nmoe train` on `processes` GPUs, of which `group` share experts, `sequences` a micro-batch."""
    environment = os.environ | KEYS | {"NMOE_RUN__NAME": name, "NMOE_RDEP__RANKS": str(group)} | keys
    environment["NMOE_TRAIN__MICRO_BATCH_SIZE"] = str(sequences)
    port = 29700 + sum(map(ord, name))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    nmoe = ["-m", "nmoe", "train", str(CONFIG), *flags]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else ()), *nmoe],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def said(process: Any, wanted: str = "", lines: int = 1) -> str:
    """Its exit code and the last lines that hold `wanted`."""
    try:
        out, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    found = [line for line in out.splitlines() if wanted in line]
    shown = found[-lines:] if found else out.splitlines()[-30:]
    return f"exit code {process.returncode}; " + " | ".join(shown)


def together(*runs: Callable[[], str]) -> list[str]:
    """All at once; says what each says."""

    def told(run: Callable[[], str]) -> str:
        begin = time.monotonic()
        name = getattr(run, "__name__", "")
        try:
            line = run()
        except Exception as error:
            line = f"FAILED: {type(error).__name__}: {error}"
        line = f"{name}: {line} ({time.monotonic() - begin:.1f} s)"
        print(line, flush=True)
        return line

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(told, runs))


def workers(process: Any) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranked = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranked |= {int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")}
    return [ranked[rank] for rank in sorted(ranked)]


def reached(process: Any, step: int) -> None:
    for line in process.stdout:
        if line.lstrip().startswith(f"step {step}/"):
            return


# ---- losses -------------------------------------------------------------------------------------------------


def losses(home: Path) -> dict[str, Any]:
    """Each run's series, and how far it is from one GPU's at 2 sequences a micro-batch."""
    found: dict[str, Series] = {}

    def ended(name: str, process: Any, of: str = "") -> str:
        line = said(process, "step ")
        if process.returncode == 0:
            found[name] = series(home, of or name)
        return line

    def one() -> str:
        return ended("one", start("one", 1))

    def small() -> str:
        return ended("small", start("small", 1, sequences=1))

    def large() -> str:
        return ended("large", start("large", 1, sequences=4))

    def shared() -> str:
        return ended("shared", start("shared", RANKS, group=RANKS))

    def replicas() -> str:
        return ended("replicas", start("replicas", RANKS))

    def continued() -> str:
        process = start("continued", RANKS, group=RANKS)
        reached(process, 50)
        victim = workers(process)[1]
        os.kill(victim, signal.SIGSTOP)
        time.sleep(3)
        os.kill(victim, signal.SIGCONT)
        return ended("continued", process)

    def resume(of: str, processes: int, name: str, **how: Any) -> str:
        shutil.rmtree(home / "checkpoints" / of / f"step_{STEPS:08d}")
        return ended(name, start(of, processes, "--resume", **how), of)

    def one_resumed() -> str:
        return resume("one", 1, "one resumed")

    def shared_resumed() -> str:
        on_one = resume("shared", 1, "shared resumed on one")
        return f"{on_one}; {resume('shared', RANKS, 'shared resumed', group=RANKS)}"

    told = [
        *together(one, small, large, shared),
        *together(replicas, continued, one_resumed, shared_resumed),
    ]
    apart = {
        f"{name} from {base}": distance(values, found[base])
        for name, values in found.items()
        for base in ("one", "shared")
        if base in found and name != base
    }
    for name, line in apart.items():
        print(f"  {name}: {line}", flush=True)
    return {"lines": told, "apart": apart, "series": found}


def series(home: Path, name: str) -> Series:
    import duckdb

    path = max(home.glob(f"metrics/{name}-*/rank_0.duckdb"), key=lambda p: p.stat().st_mtime)
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute(
            "SELECT max(value) FILTER (tag = 'loss'), max(value) FILTER (tag = 'grad_norm') FROM metrics "
            "GROUP BY step ORDER BY step"
        ).fetchall()
    return [(float(loss), float(norm)) for loss, norm in rows]


def distance(values: Series, wanted: Series) -> str:
    """Where they first part, the largest distances up to some steps, and the means of the last 20."""
    apart = [abs(a[0] - b[0]) for a, b in zip(values, wanted, strict=True)]
    if values == wanted:
        return "the same bits"
    first = next(i for i, (a, b) in enumerate(zip(values, wanted, strict=True)) if a != b)
    shown = ", ".join(f"{step}: {max(apart[:step]):.1e}" for step in (first + 1, 10, 30, 100, STEPS))
    norm = abs(values[first][1] / wanted[first][1] - 1)
    ends = [sum(loss for loss, _ in x[-20:]) / 20 for x in (values, wanted)]
    return (
        f"other bits from step {first + 1} on; loss at most apart to step {shown}; that step's norm {norm:.1e}; "
        f"last 20 {ends[0]:.4f} and {ends[1]:.4f}"
    )


# ---- ends ---------------------------------------------------------------------------------------------------


def disturbed(name: str, number: int) -> str:
    process = start(name, RANKS, group=RANKS, NMOE_TRAIN__STEPS="1000000", NMOE_RDEP__TIMEOUT="5")
    reached(process, 20)
    victim, survivor = workers(process)[1], workers(process)[0]
    begin = time.monotonic()
    os.kill(victim, number)
    while Path(f"/proc/{survivor}").exists() and time.monotonic() - begin < 30:
        time.sleep(0.05)
    took = time.monotonic() - begin
    if number == signal.SIGSTOP:
        os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=LIMIT)
    ends = [line.strip() for line in out.splitlines() if "nmoe: " in line or "exitcode" in line]
    return f"rank 0 ended after {took:.1f} s; {' | '.join(ends) or out[-2000:]}"


def stopped() -> str:
    return disturbed("stopped", signal.SIGSTOP)


def killed() -> str:
    return disturbed("killed", signal.SIGKILL)


if __name__ == "__main__":
    main()
