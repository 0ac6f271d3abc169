"""Training on two GPUs of one host through RDEP: right, repeatable, how fast, and loud when a rank stops or dies.

    python bench/rdep_train.py build DIR             compile the kernels into DIR; needs no GPU
    python bench/rdep_train.py run DIR --json FILE   on the GPUs

Parts, each in fresh processes, one a GPU:
    layer       an MoE layer of moonlet's sizes, forward and backward on two ranks: the bits of one rank that has the
                tokens of both; then the models of the parts below train on one GPU
    replay      1,000 replays of a captured micro-batch over 8 batches with skewed routing: every loss and gradient has
                the bits that it had at first
    train again replicas    a small model on two GPUs that share the experts, twice, and that hold them all: losses
    hosts       only when named: train, and `hosts replay`, as if each GPU were a host of its own, between which rows
                go by NVSHMEM's puts, from the version that the kernels are linked with
    moonlet     layers of moonlet: ms a step, memory against the plan, transfers hidden behind the shared expert
    command     `torchrun -m nmoe train`: to its end, resumed on one GPU, with a rank stopped and with a rank killed
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import median

from nmoe import binding
from nmoe.bench import synthetic
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import build_transfers
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.spec import specs
from nmoe.codegen.transfers import transfers_of
from nmoe.config import Config, load
from nmoe.data.loader import Batch
from nmoe.executor import Executor, allocate
from nmoe.graph import Graph, Op
from nmoe.parameters import Parameters
from nmoe.plan import plan
from nmoe.ranks import Ranks
from nmoe.schedule import Schedule, Workspace, lower
from nmoe.schedule.lower import MAIN
from nmoe.step import Step
from nmoe.torchrun import launched

CONFIGS = Path(__file__).parents[1] / "configs"
TARGET, RANKS, STEPS = "sm_90a", 2, 20
PARTS = ("layer", "replay", "train", "again", "replicas", "hosts", "hosts replay", "moonlet", "command")
LIMIT = 60.0  # seconds that a part may take


def small(ranks: int, sequences: int = 2) -> Config:
    """The quickstart's model on short sequences; `sequences` at once."""
    config = load(CONFIGS / "quickstart.toml")
    return replace(
        config,
        target=replace(config.target, device=TARGET),
        rdep=replace(config.rdep, ranks=ranks, timeout=60.0),
        schedule=replace(config.schedule, precision="bf16"),
        train=replace(config.train, batch_size=8, micro_batch_size=sequences, seq_len=128, steps=STEPS),
        optim=replace(config.optim, lr=3e-4, warmup_tokens=0, decay_tokens=0),
    )


def moonlet(ranks: int, sequences: int = 16) -> Config:
    """A dense and an MoE layer of moonlet, a smaller vocabulary, sequences short enough that attention is little."""
    config = load(CONFIGS / "moonlet.toml")
    dense, moe = config.model.layers
    return replace(
        config,
        target=replace(config.target, device=TARGET),
        rdep=replace(config.rdep, ranks=ranks, timeout=60.0),
        model=replace(config.model, vocab_size=32768, layers=(dense, replace(moe, repeat=1))),
        schedule=replace(config.schedule, precision="bf16"),
        train=replace(config.train, batch_size=64, micro_batch_size=sequences, seq_len=512, steps=STEPS),
    )


def configs() -> list[Config]:
    return [make(ranks) for make in (small, moonlet) for ranks in (1, RANKS)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[p for p in PARTS if "hosts" not in p])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--config", type=Path, help="of the part `command`: for [rdep] ranks = 2, prepared data"
    )
    args = parser.parse_args()
    os.environ["NMOE_HOME"] = str(args.folder.resolve())  # where the trainer looks for kernels
    if args.action == "build":
        build(args.folder / "kernels", any("hosts" in part for part in args.parts))
        return
    results: dict[str, Any] = {"torch": torch.__version__}
    for name in args.parts:
        begin = time.monotonic()
        lines, numbers = command(args.config) if name == "command" else part(name)
        print(f"{name} ({time.monotonic() - begin:.1f} s)\n  " + "\n  ".join(lines), flush=True)
        results[name] = {"lines": lines, **numbers}
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print("\n".join(compared(results)))


def build(root: Path, hosts: bool) -> None:
    """`hosts`: also what is linked with NVSHMEM, which must be installed."""
    schedules = [*(binding.lowered(config) for config in configs()), alone_schedule()]
    wanted = list(dict.fromkeys(spec for schedule in schedules for spec in specs(schedule)))
    made = build_kernels(wanted, root, workers=2, progress=sys.stderr)
    print(f"{len(made.warm)} kernels cached, {len(made.built)} built, failed: {made.failed}")
    moved = [
        p for s in schedules for gpus in ((RANKS, 1) if hosts else (RANKS,)) for p in transfers_of(s, gpus)
    ]
    print(build_transfers(moved, TARGET, root, 2))


# ---- processes ----------------------------------------------------------------------------------------------


def part(name: str) -> tuple[list[str], dict[str, Any]]:
    """Runs a part in two processes; what they say, in the order of the ranks, and numbers."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(name, rank, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    lines: list[tuple[int, str]] = []
    numbers: dict[str, Any] = {}
    end = time.monotonic() + LIMIT
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
        while not queue.empty():
            rank, what = queue.get()
            lines.append((rank, what)) if isinstance(what, str) else numbers.update(what)
    for rank, process in enumerate(processes):
        if process.is_alive():
            lines.append((rank, f"FAILED: rank {rank} ran past {LIMIT:g} s"))
            process.kill()
        elif process.exitcode:
            lines.append((rank, f"FAILED: rank {rank} exited with {process.exitcode}"))
        process.join()
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])], numbers


def worker(name: str, rank: int, queue: Any) -> None:
    def say(what: Any) -> None:
        queue.put((rank, what))

    number, local = str(rank), "1" if name.startswith("hosts") else str(RANKS)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": local,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + PARTS.index(name))}  # fmt: skip
    parts: dict[str, Callable[..., None]] = {
        "layer": layer,
        "replay": replay,
        "train": train,
        "again": train,
        "replicas": train,
        "hosts": train,
        "moonlet": timed,
    }
    try:
        parts[name.removeprefix("hosts ")](name, rank, say)
    except BaseException:
        say("FAILED: " + traceback.format_exc(limit=-6).replace("\n", "\n    "))
        time.sleep(0.5)  # the queue's thread sends
        os._exit(1)
    time.sleep(0.5)
    os._exit(0)


def begun(config: Config, ranks: Ranks, say: Callable[[str], None] = lambda text: None) -> Step:
    step = Step(config, say=say, ranks=ranks)
    step.parameters.initialise(config.run.seed, config.model.init_std)
    return step


def share(batch: Batch, step: Step) -> Batch:
    """The sequences of a batch that are this rank's turns."""
    turns = len(batch.tokens) // step.sequences
    mine = np.arange(step.ranks.rank, turns, step.ranks.world)
    rows = (mine[:, None] * step.sequences + np.arange(step.sequences)).reshape(-1)
    return replace(
        batch, tokens=batch.tokens[rows], positions=batch.positions[rows], targets=batch.targets[:, rows]
    )


# ---- right --------------------------------------------------------------------------------------------------


def layer(name: str, rank: int, say: Callable[[Any], None]) -> None:
    """One rank is given what the layer was given on two: tokens, routing and output gradients. The router's weights
    are drawn large, so that its choices are uneven."""
    config, path = moonlet(RANKS), "layers.1.moe"
    with launched(config) as ranks:
        step = begun(config, ranks)
        skew(step.parameters)
        executor = step.executors[0]
        step._sums.begin()
        step._feed(share(synthetic(config)(0), step), slice(0, step.sequences))
        step.tensors["scale"].fill_(1e-4)
        executor.run("step")
        kept = observed(executor, path, {}) | experts(step.parameters, path)
        both = {name: gathered(tensor) for name, tensor in kept.items()}
        if rank == 0:
            compare(path, both, say)
        dist.barrier()
    del step, executor
    if rank == 0:
        torch.cuda.empty_cache()
        say({"one": losses(small(1), Ranks(), STEPS)[:3]})
        say({"one moonlet": losses(moonlet(1), Ranks(), 6)[:3]})


def experts(parameters: Parameters, path: str) -> dict[str, torch.Tensor]:
    """Their gradients, on the host."""
    return {n: g.cpu() for n, g in parameters.grads.items() if n.startswith(f"{path}.experts")}


def skew(parameters: Parameters) -> None:
    for name, master in parameters.masters.items():
        if name.endswith(".router"):
            master.mul_(4)
    parameters.refresh()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Of all ranks, one after the other."""
    whole = [torch.empty_like(tensor, device="cpu") for _ in range(RANKS)]
    dist.all_gather(whole, tensor.cpu())
    return torch.cat(whole)


def alone_schedule() -> Schedule:
    """Of one rank with the tokens of both, `combine` by itself, so that its result exists."""
    every = binding.kernels(TARGET, binding.default_root())

    def kernels(graph: Graph, ops: tuple[Op, ...], fused: frozenset[str]) -> Workspace | None:
        return every(graph, ops, fused) if ops[0].kind != "combine" or len(ops) == 1 else None

    return lower(moonlet(1), sequences=RANKS * 16, kernels=kernels)


def compare(path: str, both: dict[str, torch.Tensor], say: Callable[[Any], None]) -> None:
    config, schedule = moonlet(1), alone_schedule()
    parameters = Parameters(schedule.graph, "cuda")
    parameters.initialise(config.run.seed, config.model.init_std)
    skew(parameters)
    tensors = allocate(schedule, "state", "input", device="cuda") | parameters.tensors()
    arena = torch.empty(schedule.arena_bytes, dtype=torch.uint8, device="cuda")
    alone = Executor(schedule, tensors, arena, CudaLauncher(Cache(binding.default_root())))
    batch = synthetic(config)(0)
    for name, array in (
        ("tokens", batch.tokens),
        ("positions", batch.positions),
        ("targets", batch.targets[0]),
    ):
        tensors[name].copy_(torch.from_numpy(array[: RANKS * 16].reshape(-1)))
    tensors["scale"].fill_(1e-4)
    alone.run("step")
    found = observed(alone, path, both) | experts(parameters, path)
    differing = {}
    for name, tensor in found.items():
        if tensor.dtype != torch.int32:
            differing[name] = int((tensor.view(torch.uint8) != both[name].view(torch.uint8)).sum())
    load = torch.bincount(both[f"{path}.route.indices"].view(-1).long(), minlength=config.moe.experts)
    tokens = schedule.dims["T"]
    say(f"{config.run.name}, {tokens} tokens on 2 ranks, loads of experts {int(load.min())} to {int(load.max())}: "
        f"bytes that differ from one rank: {differing}{' FAILED' if any(differing.values()) else ''}")  # fmt: skip


def observed(executor: Executor, path: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch; what an MoE layer was given, replaced by `given`, and what it made, by name, on the host."""
    ops = {op.name: op for op in executor.schedule.graph.ops}
    route, combine, back = (ops[f"{path}.{n}"] for n in ("route", "combine.bwd", "dispatch.bwd"))
    before = {f"{path}.plan": route.outputs[:2], f"{path}.combine.bwd": combine.inputs[:1]}
    before[f"{path}.plan"] += route.inputs[:1]
    after = {f"{path}.combine": ops[f"{path}.combine"].outputs[:1], f"{path}.dispatch.bwd": back.outputs}
    kept: dict[str, torch.Tensor] = {}

    @contextmanager
    def observe(name: str) -> Iterator[None]:
        torch.cuda.synchronize()  # whatever stream made what is read here
        for tensor in before.get(name, ()):
            if given:
                executor.operand(tensor).copy_(given[tensor])
            kept[tensor] = executor.operand(tensor).cpu()
        yield
        torch.cuda.synchronize()
        for tensor in after.get(name, ()):
            kept[tensor] = executor.operand(tensor).cpu()

    executor.observe = observe
    executor.run("micro")
    executor.observe = None
    return kept


def replay(name: str, rank: int, say: Callable[[Any], None]) -> None:
    """Biases of the router make its choices uniform, skewed, fall on few experts and on those of one rank."""
    count, config = 1000, small(RANKS)
    with launched(config) as ranks:
        step = begun(config, ranks)
        executor, experts = step.executors[0], config.moe.experts
        biases = [t for n, t in step.tensors.items() if n.endswith("router_bias")]
        pool: list[tuple[Batch, torch.Tensor]] = []
        for seed in range(8):
            bias = torch.zeros(experts)
            bias += (seed % 4 == 1) * torch.linspace(0, 1, experts)
            bias[: config.moe.topk] += seed % 4 == 2
            bias[: experts // RANKS] += seed % 4 == 3
            pool.append((share(synthetic(config)(seed), step), bias.cuda()))
        executor.run("step")
        grads, sums = step.parameters.grad, step._replicated[1]
        step.tensors["scale"].fill_(1e-3)

        def once(batch: Batch, bias: torch.Tensor) -> None:
            step._sums.begin()
            for tensor in biases:
                tensor.copy_(bias)
            step._feed(batch, slice(0, step.sequences))
            executor.run("micro")

        first = []
        for batch, bias in [pool[0], *pool]:  # the first runs call by call and is captured
            once(batch, bias)
            first.append((grads.clone(), sums.clone()))
        torch.cuda.synchronize()
        assert executor.captured
        bad = torch.zeros((), dtype=torch.int64, device="cuda")
        delays = random.Random(rank)
        begin = time.monotonic()
        for i in range(count):
            torch.cuda._sleep(delays.randrange(300_000) if i % 3 == 0 else 1)
            once(*pool[i % 8])
            for got, kept in zip((grads, sums), first[1 + i % 8], strict=True):
                bad += (got.view(torch.int32) != kept.view(torch.int32)).sum()
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
        same = all(torch.equal(a, b) for a, b in zip(first[0], first[1], strict=True))
        say(f"rank {rank}: {count} replays, 8 batches, {int(bad)} of {grads.numel() + sums.numel()} words differ; run "
            f"call by call {'the same' if same else 'OTHER'} bits; {1e6 * seconds / count:.0f} us each with delays"
            f"{' FAILED' if int(bad) or not same else ''}")  # fmt: skip


def losses(config: Config, ranks: Ranks, steps: int) -> tuple[list[float], list[float], list[float], Step]:
    """Losses, gradient norms and seconds of each step, over two batches so that it learns them."""
    step = begun(config, ranks)
    found, norms, seconds = [], [], []
    batches = [share(synthetic(config)(i), step) for i in range(2)]
    for index in range(steps):
        begin = time.perf_counter()
        result = step.run(index, batches[index % 2])
        seconds.append(time.perf_counter() - begin)
        found.append(result.losses["main"])
        norms.append(result.grad_norm)
    return found, norms, seconds, step


def train(name: str, rank: int, say: Callable[[Any], None]) -> None:
    config = small(1 if name == "replicas" else RANKS)
    with launched(config) as ranks:
        found = losses(config, ranks, STEPS)[:3]
        if rank == 0:
            say({"run": found})


def compared(results: dict[str, Any]) -> Iterator[str]:
    """The trainings on two GPUs against those on one."""
    for name, one in (("train", "one"), ("again", "one"), ("replicas", "one"), ("moonlet", "one moonlet")):
        run, alone = results.get(name, {}).get("run"), results.get("layer", {}).get(one)
        if run and alone:
            far = max(abs(a - b) for a, b in zip(run[0], alone[0], strict=True))
            norms = max(abs(a / b - 1) for a, b in zip(run[1], alone[1], strict=True))
            ms = [1e3 * statistics.median(seconds[2:]) for seconds in (run[2], alone[2])]
            yield (
                f"{name}: loss {run[0][0]:.6f} … {run[0][-1]:.6f}, at most {far:.1e} from one GPU's; gradient norms "
                f"within {norms:.1e}; {ms[0]:.1f} ms a step, one GPU {ms[1]:.1f}"
            )
    if "run" in results.get("train", {}) and "run" in results.get("again", {}):
        yield f"twice the same bits: {results['train']['run'][:2] == results['again']['run'][:2]}"
    if "run" in results.get("train", {}) and "run" in results.get("hosts", {}):
        yield f"two hosts, the bits of one: {results['train']['run'][:2] == results['hosts']['run'][:2]}"


# ---- how fast -----------------------------------------------------------------------------------------------


def timed(name: str, rank: int, say: Callable[[Any], None]) -> None:
    config = moonlet(RANKS)
    with launched(config) as ranks:
        free = torch.cuda.mem_get_info()[0]
        *found, step = losses(config, ranks, 6)
        taken = free - torch.cuda.mem_get_info()[0]
        planned = plan(config, world=RANKS).memory
        if rank == 0:
            say({"run": found})
            listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items())
            say(f"memory of a rank: {taken / 1e9:.2f} GB of the device taken, torch's tensors at most "
                f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, arena {step.schedule.arena_bytes / 1e9:.2f} GB; "
                f"planned {sum(planned.values()) / 1e9:.2f} GB: {listed}")  # fmt: skip
        overlap(step, rank, say)


def overlap(step: Step, rank: int, say: Callable[[Any], None]) -> None:
    executor = step.executors[0]
    calls = tuple(replace(call, stream=MAIN, waits=()) for call in step.schedule.calls)
    launcher = CudaLauncher(Cache(binding.default_root()))
    serial = Executor(replace(step.schedule, calls=calls), step.tensors, executor.arena, launcher,
                      executor._implementations)  # fmt: skip
    both = {"overlapped": executor, "in one stream": serial}
    times = {name: milliseconds(lambda e=found: e.run("micro")) for name, found in both.items()}
    events: dict[str, list[tuple[Any, Any]]] = {}
    kinds = {op.name: op.kind for op in step.schedule.graph.ops}

    @contextmanager
    def observe(name: str) -> Iterator[None]:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        kind = kinds[name]
        moved = kind in ("moe_plan", "dispatch", "combine")
        events.setdefault(kind if moved else "shared expert" if ".shared." in name else "other", []).append(
            pair
        )

    serial.observe = observe
    for _ in range(3):
        events.clear()
        dist.barrier()
        serial.run("micro")
        torch.cuda.synchronize()
    parts = {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}
    moved = sum(parts.get(kind, 0.0) for kind in ("moe_plan", "dispatch", "combine"))
    saved = times["in one stream"] - times["overlapped"]
    if rank == 0:
        say(f"a micro-batch: {', '.join(f'{name} {ms:.2f} ms' for name, ms in times.items())}; in one stream, call by "
            f"call: {', '.join(f'{name} {ms:.2f}' for name, ms in parts.items())}; {saved:.2f} of {moved:.2f} ms of "
            f"transfers hidden ({100 * saved / moved:.0f} %)")  # fmt: skip
        say({"micro-batch ms": times, "parts ms": parts})


def milliseconds(call: Callable[[], None], repeats: int = 7) -> float:
    """Of one call, on the slower rank: both start together."""

    def together() -> None:
        torch.cuda.synchronize()
        dist.barrier()

    slowest = torch.tensor([median(call, repeats, before=together)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


# ---- the command --------------------------------------------------------------------------------------------


def command(config: Path) -> tuple[list[str], dict[str, Any]]:
    """All at once, but a resumed run after the run that it resumes."""

    def tell(*runs: Callable[[Path], str]) -> list[str]:
        lines = []
        for run in runs:
            begin = time.monotonic()
            try:
                lines.append(f"{run.__name__}: {run(config)} ({time.monotonic() - begin:.1f} s)")
            except Exception as error:
                lines.append(f"{run.__name__}: FAILED: {type(error).__name__}: {error}")
        return lines

    with ThreadPoolExecutor(3) as pool:
        told = [pool.submit(tell, *runs) for runs in ((ended, resumed), (stopped,), (killed,))]
        return [line for lines in told for line in lines.result()], {}


def start(config: Path, name: str, processes: int, *flags: str, **keys: str) -> subprocess.Popen[str]:
    environment = os.environ | {"NMOE_RUN__NAME": name} | keys
    port = 29700 + len(name)
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [
        sys.executable,
        *(torchrun if processes > 1 else ()),
        "-m",
        "nmoe",
        "train",
        str(config),
        *flags,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def said(process: subprocess.Popen[str], wanted: str = "", lines: int = 2) -> str:
    """Its exit code and the last lines that hold `wanted`."""
    out, _ = process.communicate(timeout=60)
    found = [line for line in out.splitlines() if wanted in line] or out.splitlines()[-30:]
    return f"exit code {process.returncode}; " + " | ".join(found[-lines if wanted in out else -30 :])


def ended(config: Path) -> str:
    return said(start(config, "ended", RANKS, NMOE_TRAIN__STEPS="10"), "step ")


def resumed(config: Path) -> str:
    keys = {"NMOE_TRAIN__STEPS": "14", "NMOE_RDEP__RANKS": "1"}
    return said(start(config, "ended", 1, "--resume", **keys), "step ")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranked = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranked |= {int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")}
    return [ranked[rank] for rank in sorted(ranked)]


def disturbed(config: Path, name: str, number: int) -> str:
    process = start(config, name, RANKS, NMOE_TRAIN__STEPS="1000000", NMOE_RDEP__TIMEOUT="5")
    assert process.stdout
    for line in process.stdout:
        if line.lstrip().startswith("step 2"):
            break
    victim = workers(process)[1]
    begin = time.monotonic()
    os.kill(victim, number)
    survivor = workers(process)[0]
    while Path(f"/proc/{survivor}").exists() and time.monotonic() - begin < 30:
        time.sleep(0.05)
    took = time.monotonic() - begin
    if number == signal.SIGSTOP:
        os.kill(victim, signal.SIGKILL)
    return f"rank 0 ended after {took:.1f} s; {said(process, 'nmoe: ')}"


def stopped(config: Path) -> str:
    return disturbed(config, "stopped", signal.SIGSTOP)


def killed(config: Path) -> str:
    return disturbed(config, "killed", signal.SIGKILL)


if __name__ == "__main__":
    main()
