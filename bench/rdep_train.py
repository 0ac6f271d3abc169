"""Training on two GPUs of one host through RDEP: right, repeatable, how fast, what of its transfers is hidden.

    python bench/rdep_train.py build DIR             compile the kernels into DIR; needs no GPU
    python bench/rdep_train.py run DIR --json FILE   on the GPUs

Parts, each in fresh processes, one a GPU:
    bf16 mxfp8 nvfp4   an MoE layer of moonlet's sizes, forward and backward on two ranks, against one rank that has
                       the tokens of both: how many bytes differ
    replay             1,000 replays of a captured micro-batch over 8 batches with skewed routing: every loss and
                       gradient has the bits that it had at first
    moonlet            layers of moonlet: ms a step, memory against the plan, transfers hidden behind other work
    hosts bf16, hosts replay    only when named: the same as if each GPU were a host of its own, between which rows go
                       by NVSHMEM's puts, from the version that the kernels are linked with

On one GPU both ranks share it and take turns (`moonlet` needs two): everything is as right or wrong as on two.
bench/rdep_command.py has the command `nmoe train` and its losses.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import median, provenance

from nmoe import binding, torchrun
from nmoe.bench import synthetic
from nmoe.codegen import optimizer
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import build_transfers
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.spec import specs
from nmoe.codegen.transfers import transfers_of
from nmoe.config import Config, load
from nmoe.data.loader import Batch
from nmoe.executor import Executor, allocate
from nmoe.formats import buffers
from nmoe.graph import Graph, Op
from nmoe.model import group_of
from nmoe.parameters import Parameters
from nmoe.plan import plan
from nmoe.ranks import Ranks
from nmoe.schedule import Schedule, Workspace, lower
from nmoe.schedule.overlap import MAIN
from nmoe.step import Step
from nmoe.torchrun import launched

CONFIGS = Path(__file__).parents[1] / "configs"
TARGET, RANKS, STEPS = "sm_90a", 2, 6
PRECISIONS = ("bf16", "mxfp8", "nvfp4")
PARTS = (*PRECISIONS, "replay", "moonlet", "moonlet mxfp8", "hosts bf16", "hosts replay")
LIMIT = 120.0  # seconds that a part may take


def small(ranks: int) -> Config:
    """The quickstart's model, 2 sequences at once."""
    config = load(CONFIGS / "quickstart.toml")
    return replace(
        config,
        target=replace(config.target, device=TARGET),
        rdep=replace(config.rdep, ranks=ranks, timeout=60.0),
        schedule=replace(config.schedule, precision="bf16"),
        train=replace(config.train, micro_batch_size=2),
    )


def moonlet(ranks: int, precision: str = "bf16", sequences: int = 16) -> Config:
    """A dense and an MoE layer of moonlet, a smaller vocabulary, sequences short enough that attention is little."""
    config = load(CONFIGS / "moonlet.toml")
    dense, moe = config.model.layers
    return replace(
        config,
        target=replace(config.target, device=TARGET),
        rdep=replace(config.rdep, ranks=ranks, timeout=60.0),
        model=replace(config.model, vocab_size=32768, layers=(dense, replace(moe, repeat=1))),
        schedule=replace(config.schedule, precision=precision),
        train=replace(config.train, batch_size=64, micro_batch_size=sequences, seq_len=512, steps=STEPS),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[p for p in PARTS if "hosts" not in p])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["NMOE_HOME"] = str(args.folder.resolve())  # where the trainer looks for kernels
    if args.action == "build":
        build(args.folder / "kernels", any("hosts" in part for part in args.parts))
        return
    results: dict[str, Any] = provenance()
    for name in args.parts:
        lines, numbers = part(name)
        print(f"{name}\n  " + "\n  ".join(lines), flush=True)
        results[name] = {"lines": lines, **numbers}
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


def build(root: Path, hosts: bool) -> None:
    """`hosts`: also what is linked with NVSHMEM, which must be installed."""
    both = [make(ranks) for make in (small, moonlet) for ranks in (1, RANKS)]
    schedules = [binding.lowered(config) for config in [*both, *(moonlet(RANKS, p) for p in PRECISIONS[1:])]]
    schedules += [alone_schedule(precision) for precision in PRECISIONS]
    wanted = list(dict.fromkeys(spec for schedule in schedules for spec in specs(schedule)))
    wanted = list(dict.fromkeys([*wanted, *(spec for config in both for spec in optimizer.specs(config))]))
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
    if torch.cuda.device_count() < RANKS:  # the command would refuse it
        torchrun.prepare = lambda target: torch.cuda.set_device(0)
    parts: dict[str, Callable[..., None]] = {"replay": replay, "moonlet": timed, "moonlet mxfp8": timed}
    try:
        name = name.removeprefix("hosts ")
        parts.get(name, layer)(name, rank, say)
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
    config, path = moonlet(RANKS, name), "layers.1.moe"
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
            compare(config, path, both, say)
        dist.barrier()


def experts(parameters: Parameters, path: str) -> dict[str, torch.Tensor]:
    """Their gradients, on the host."""
    return {n: g.cpu() for n, g in parameters.grads.items() if n.startswith(f"{path}.experts")}


def skew(parameters: Parameters) -> None:
    for name, weight in parameters.weights.items():
        if name.endswith(".router"):
            weight.mul_(4)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Of all ranks, one after the other."""
    whole = [torch.empty_like(tensor, device="cpu") for _ in range(RANKS)]
    dist.all_gather(whole, tensor.cpu())
    return torch.cat(whole)


def alone_schedule(precision: str) -> Schedule:
    """Of one rank with the tokens of both, `combine` by itself, so that its result exists."""
    every = binding.kernels(TARGET, binding.default_root())

    def kernels(graph: Graph, ops: tuple[Op, ...], fused: frozenset[str]) -> Workspace | None:
        return every(graph, ops, fused) if ops[0].kind != "combine" or len(ops) == 1 else None

    return lower(moonlet(1, precision), sequences=RANKS * 16, kernels=kernels)


def compare(config: Config, path: str, both: dict[str, torch.Tensor], say: Callable[[Any], None]) -> None:
    schedule = alone_schedule(config.schedule.precision)
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
    differing: dict[str, str] = {}
    for name, tensor in found.items():
        if tensor.dtype != torch.int32:
            a, b = tensor.double(), both[name].double()
            count = int((tensor.view(torch.uint8) != both[name].view(torch.uint8)).sum())
            differing[name] = f"{count} ({float((a - b).norm() / a.norm()):.1e})" if count else "0"
    load = torch.bincount(both[f"{path}.route.indices"].view(-1).long(), minlength=config.moe.experts)
    tokens = schedule.dims["T"]
    shown = ", ".join(f"{name} {count}" for name, count in differing.items())
    say(f"{tokens} tokens on 2 ranks, loads of experts {int(load.min())} to {int(load.max())}: bytes that differ from "
        f"one rank (and the difference's norm): {shown}")  # fmt: skip


def observed(executor: Executor, path: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch; what an MoE layer was given, replaced by `given`, and what it made, by name, on the host. The
    scale factors of rows in MXFP8 are "name scale"."""
    ops = {op.name: op for op in executor.schedule.graph.ops}
    route, sent, combine, back = (
        ops[f"{path}.{n}"] for n in ("route", "dispatch", "combine.bwd", "dispatch.bwd")
    )
    before = {f"{path}.plan": (*route.outputs[:2], route.inputs[0], sent.inputs[0]),
              f"{path}.combine.bwd": combine.inputs[:1]}  # fmt: skip
    after = {f"{path}.combine": ops[f"{path}.combine"].outputs[:1], f"{path}.dispatch.bwd": back.outputs}
    kept: dict[str, torch.Tensor] = {}

    def parts(names: Sequence[str | None]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in dict.fromkeys(names):
            for index, buffer in enumerate(buffers(executor.operand(name))):
                yield f"{name} scale" if index else str(name), buffer

    @contextmanager
    def observe(name: str) -> Iterator[None]:
        torch.cuda.synchronize()  # whatever stream made what is read here
        for part, tensor in parts(before.get(name, ())):
            if given:
                tensor.copy_(given[part])
            kept[part] = tensor.cpu()
        yield
        torch.cuda.synchronize()
        kept.update({part: tensor.cpu() for part, tensor in parts(after.get(name, ()))})

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
        grads, sums = step.parameters.grad, step._counted
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


# ---- how fast -----------------------------------------------------------------------------------------------


def timed(name: str, rank: int, say: Callable[[Any], None]) -> None:
    config = moonlet(RANKS, name.split()[-1] if " " in name else "bf16")
    with launched(config) as ranks:
        free = torch.cuda.mem_get_info()[0]
        step = begun(config, ranks)
        seconds = []
        for index in range(STEPS):
            batch = share(synthetic(config)(index), step)
            begin = time.perf_counter()
            step.run(index, batch)
            seconds.append(time.perf_counter() - begin)
        say(f"rank {rank}: {digest(step)} of replicated weights and biases after {STEPS} steps")
        taken = free - torch.cuda.mem_get_info()[0]
        planned = plan(config, world=RANKS).memory
        if rank == 0:
            tokens = config.train.batch_size * config.train.seq_len
            say(f"{1e3 * statistics.median(seconds[2:]):.1f} ms a step of {tokens} tokens")
            listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items())
            say(f"memory of a rank: {taken / 1e9:.2f} GB of the device taken, torch's tensors at most "
                f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, arena {step.schedule.arena_bytes / 1e9:.2f} GB; "
                f"planned {sum(planned.values()) / 1e9:.2f} GB: {listed}")  # fmt: skip
        overlap(step, rank, say)


def digest(step: Step) -> str:
    shared = [t for name, t in step.parameters.weights.items() if group_of(name) != "expert"]
    flat = torch.cat([t.float().cpu().view(-1) for t in (*shared, *step._biases.values())])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def overlap(step: Step, rank: int, say: Callable[[Any], None]) -> None:
    """A micro-batch as it is, in one stream, and without its rows' transfers (which costs the last two their sense,
    not their time)."""
    executor, schedule = step.executors[0], step.schedule
    calls = tuple(replace(call, stream=MAIN, waits=()) for call in schedule.calls)
    launcher = CudaLauncher(Cache(binding.default_root()))
    moved = executor._implementations
    still = dict(moved) | dict.fromkeys(("dispatch", "combine"), lambda op, ins, outs: lambda: None)
    serial, none = (
        Executor(replace(schedule, calls=calls), step.tensors, executor.arena, launcher, given)
        for given in (moved, still)
    )
    every = {"on three streams": executor, "on one": serial, "without rows": none}
    times = {name: milliseconds(lambda e=found: e.run("micro")) for name, found in every.items()}
    hidden = (times["on one"] - times["on three streams"]) / (times["on one"] - times["without rows"])
    milliseconds(lambda: executor.run("micro"), 1)  # real rows again
    busy, covered = profile(executor)
    if rank == 0:
        say(f"a micro-batch: {', '.join(f'{name} {ms:.3f} ms' for name, ms in times.items())}: {100 * hidden:.0f} % of "
            f"the transfers hidden; beside {100 * covered / busy:.0f} % of their {busy / 1e3:.2f} ms other kernels "
            "ran")  # fmt: skip
        say({"micro-batch ms": times, "transfers us": busy, "covered us": covered})


def profile(executor: Executor) -> tuple[float, float]:
    """µs in which kernels of transfers ran during a replay, and in which others did beside them."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU]) as recorded:
        torch.cuda.synchronize()
        dist.barrier()
        executor.run("micro")
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, "rdep_" in event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    edges = sorted({edge for begin, end, _ in spans for edge in (begin, end)})
    busy = covered = 0.0
    for begin, end in itertools.pairwise(edges):
        running = {transfer for first, last, transfer in spans if first <= begin and end <= last}
        busy += (end - begin) * (True in running)
        covered += (end - begin) * (len(running) == 2)
    return busy, covered


def milliseconds(call: Callable[[], None], repeats: int = 7) -> float:
    """Of one call, on the slower rank: both start together."""

    def together() -> None:
        torch.cuda.synchronize()
        dist.barrier()

    slowest = torch.tensor([median(call, repeats, before=together)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


if __name__ == "__main__":
    main()
