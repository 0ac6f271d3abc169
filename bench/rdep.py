"""RDEP between two GPUs of one host: right, repeatable, loud when a rank stops, and how fast.

    python bench/rdep.py build DIR                   compile every kernel into DIR; no GPU needed
    python bench/rdep.py run DIR --json FILE         on the GPUs; each part in fresh processes, one a GPU

Parts: `right` and `quantized` (integers, rows and sums equal to nmoe.rdep.plan and one rank, bit for bit; BF16 rows,
and bytes with scales), `replay` (1,000 replays of a captured step with skewed routing and random delays), `stopped` (a
rank is stopped; the other must say so), a shape's name (bandwidth against a peer copy and against NCCL's all-to-all
with the permutes that it needs, of BF16 rows; `32k` with four times the tokens, `mxfp8` with rows of such elements and
scales out, BF16 back). Only when named: `hosts …`, as if each GPU were a
host of its own, between which rows go by NVSHMEM's puts, from the version that the kernels are linked with.
On one GPU both ranks share it and take turns: everything is as right or wrong as on two, and times mean nothing.
Times are medians over replays of a captured graph, of the slower rank.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import provenance

from nmoe.codegen import compiler
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.rdep import RdepConfig, RdepProblem
from nmoe.rdep import plan as slots
from nmoe.rdep.device import Exchange, Group, Routing
from nmoe.rdep.sizes import worst_case

TARGET = "sm_90a"
RANKS, ALIGN = 2, 128
PARTS = (
    "right",
    "quantized",
    "replay",
    "stopped",
    "hosts",
    "hosts replay",
    "hosts stopped",
    "hosts moonlight",
    "moonlight",
    "moonlight 32k",
    "moonlight mxfp8",
    "dsv3",
    "dsv3 mxfp8",
)
LIMIT = 90.0  # seconds that a part may take


def group(experts: int, tokens: int, topk: int, width: int, quantized: bool, gpus: int = RANKS) -> Group:
    """Rows of BF16, or of one byte an element with a scale a block of 32; `gpus` a host."""
    capacity = worst_case(RANKS, tokens, topk, experts, ALIGN)
    parts = (width, width // 32) if quantized else (2 * width,)
    return Group(RANKS, gpus, experts, tokens, topk, capacity, ALIGN, parts, width)


SMALL = {"right": group(16, 1000, 3, 512, False), "quantized": group(64, 700, 6, 1024, True),
         "hosts": group(16, 1024, 3, 512, False, 1)}  # fmt: skip
SHAPES = {
    "moonlight": group(64, 8192, 6, 2048, False),
    "moonlight 32k": group(64, 32768, 6, 2048, False),
    "moonlight mxfp8": group(64, 8192, 6, 2048, True),
    "dsv3": group(256, 8192, 8, 7168, False),
    "dsv3 mxfp8": group(256, 8192, 8, 7168, True),
    "hosts moonlight": group(64, 8192, 6, 2048, False, 1),
}


def work(parts: Sequence[str]) -> list[tuple[RdepProblem, RdepConfig]]:
    found: dict[tuple[RdepProblem, RdepConfig], None] = {}
    hosts = any("hosts" in part for part in parts)
    for name, small in SMALL.items():
        if hosts or "hosts" not in name:
            found |= dict.fromkeys(
                (problem, problem.configs(TARGET)[0]) for problem in small.problems().values()
            )
    for name, shape in SHAPES.items():
        if "hosts" in name and not hosts:
            continue
        for step, problem in shape.problems().items():
            timed = step in ("send_rows", "send_returns")
            configs = problem.configs(TARGET) if timed else problem.configs(TARGET)[:1]
            found |= dict.fromkeys((problem, config) for config in configs)
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[p for p in PARTS if "hosts" not in p])
    args = parser.parse_args()
    if args.action == "build":
        for i, (problem, config) in enumerate(pairs := work(args.parts), 1):
            entry = compiler.compile_problem(problem, config, TARGET, Cache(args.folder))
            print(f"[{i}/{len(pairs)}] {problem} {config}: {entry.report['seconds']} s", flush=True)
        return
    results: dict[str, Any] = provenance()
    for name in args.parts:
        begin = time.monotonic()
        results[name] = part(name, args.folder)
        results[name]["seconds"] = round(time.monotonic() - begin, 1)
        print(f"{name} ({results[name]['seconds']} s)", flush=True)
        for line in results[name]["lines"]:
            print("  " + line, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


def part(name: str, folder: Path) -> dict[str, Any]:
    """Runs a part in two processes; what they say, in the order of the ranks."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = 29500 + PARTS.index(name)
    processes = [
        context.Process(target=worker, args=(name, rank, port, folder, queue)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    ends = name.endswith("stopped")
    if ends:
        stop(processes[1], queue)
    lines: list[tuple[int, str]] = []
    numbers: dict[str, Any] = {}
    end = time.monotonic() + LIMIT
    awaited = processes[:1] if ends else processes
    while any(process.is_alive() for process in awaited) and time.monotonic() < end:
        time.sleep(0.1)
        drain(queue, lines, numbers)
    drain(queue, lines, numbers)
    for rank, process in enumerate(processes):
        if process.is_alive():
            if not ends:
                lines.append((rank, f"FAILED: rank {rank} ran past {LIMIT:g} s"))
            process.kill()
        elif process.exitcode and not ends:
            lines.append((rank, f"FAILED: rank {rank} exited with {process.exitcode}"))
        process.join()
    return {"lines": [line for _, line in sorted(lines, key=lambda pair: pair[0])], **numbers}


def drain(queue: Any, lines: list[tuple[int, str]], numbers: dict[str, Any]) -> None:
    while not queue.empty():
        rank, what = queue.get()
        if isinstance(what, str):
            lines.append((rank, what))
        else:
            numbers |= what


def stop(process: Any, queue: Any) -> None:
    """Stops a rank once it says that steps are running."""
    end = time.monotonic() + LIMIT / 2
    while time.monotonic() < end and process.is_alive():
        if not queue.empty():
            queue.get()
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGSTOP)
            return
        time.sleep(0.05)


def worker(name: str, rank: int, port: int, folder: Path, queue: Any) -> None:
    def say(what: Any) -> None:
        queue.put((rank, what))

    try:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=RANKS)
        parts: dict[str, Callable[..., None]] = {
            "right": right,
            "quantized": right,
            "replay": replay,
            "stopped": stopped,
            "hosts": right,
        }
        parts.get(name.split()[-1], speed)(name, rank, folder, say)
    except BaseException:
        say("FAILED: " + traceback.format_exc(limit=-6).replace("\n", "\n    "))
        time.sleep(0.5)  # the queue's thread sends
        os._exit(1)
    time.sleep(0.5)
    os._exit(0)  # without NVSHMEM's and NCCL's collective ends


class Rank:
    """One rank of a group with its heap and kernels."""

    def __init__(self, shape: Group, rank: int, folder: Path, timeout: float = 10.0) -> None:
        from nmoe.rdep.symmetric import Heap

        self.shape, self.rank = shape, rank
        self.heap = Heap(shape.mailboxes() | shape.slots(), range(RANKS), shape.gpus, timeout=timeout)
        self.launcher = CudaLauncher(Cache(folder))
        self.exchange = self.with_configs({})

    def with_configs(self, configs: dict[str, RdepConfig]) -> Exchange:
        """An exchange whose steps use other configs than the first."""
        chosen = {
            problem: configs[step] for step, problem in self.shape.problems().items() if step in configs
        }

        def launch(problem: RdepProblem, *arguments: Any) -> None:
            config = chosen.get(problem, problem.untuned(TARGET))
            self.launcher.bind(problem, config, TARGET, arguments)()

        return Exchange(self.shape, self.rank, self.heap.addresses, self.heap.state, self.heap, launch)

    def routing(self, tokens: int) -> Routing:
        buffers = self.shape.routing(tokens)
        return Routing(
            **{n: torch.full(b.shape, -7, dtype=b.dtype, device="cuda") for n, b in buffers.items()}
        )

    def sync(self) -> None:
        """Waits for the device; raises what a kernel reported rather than that the launch failed."""
        try:
            torch.cuda.synchronize()
        finally:
            self.heap.check()


def routings(shape: Group, seed: int) -> list[torch.Tensor]:
    """indices int32[T, k] of every rank, CPU. By seed: uniform, skewed, all on few experts, all on one rank's; the
    second four of eight with fewer tokens than there is room for, as many on no two ranks."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rank in range(RANKS):
        tokens = shape.tokens if seed // 4 % 2 == 0 else shape.tokens // (rank + 2) - 5
        weight = torch.ones(shape.experts)
        if seed % 4 == 1:
            weight = torch.arange(1.0, shape.experts + 1) ** 4
        if seed % 4 == 2:
            weight[shape.topk :] = 1e-9
        if seed % 4 == 3:
            weight[: shape.experts // 2] = 1e-9
        drawn = torch.multinomial(weight.expand(tokens, -1), shape.topk, generator=generator)
        found.append(drawn.int())
    return found


def step(rank: Rank, indices: Any, rows: Any, values: Any, routing: Routing, y: Any, layer: int = 0) -> None:
    """Forward of a layer whose experts return half of a row, and that of each row's first elements."""
    e, heap, shape = rank.exchange, rank.heap, rank.shape
    e.send_counts(indices, routing, layer)
    e.receive_counts(indices, routing, layer)
    e.send_rows(rows, values, routing, layer)
    e.receive_rows(layer)
    e.send_returns(expert(heap, shape), None, heap["origin"].view(-1, 1), routing, layer)
    e.release_rows(layer)
    e.receive_returns(y, layer)


def expert(heap: Any, shape: Group) -> torch.Tensor:
    """Row-wise, so that it is the same on one rank: u8[capacity, 2 · width]."""
    if len(shape.parts) == 1:
        return (heap["data"].view(torch.bfloat16) * heap["value"].unsqueeze(1)).bfloat16().view(torch.uint8)
    wide = heap["data"].float() + heap["scale"].float().repeat_interleave(32, 1)
    return (wide * heap["value"].unsqueeze(1)).bfloat16().view(torch.uint8)


def right(name: str, rank: int, folder: Path, say: Callable[[Any], None]) -> None:
    me = Rank(SMALL[name], rank, folder)
    seeds = 8 if me.shape.gpus == RANKS else 4  # between hosts all ranks have as many tokens
    for seed in range(seeds):
        check_case(me, seed)
    say(
        f"rank {rank}: {seeds} routings: slots, offsets, rows, weights, origins, padding, sums, returned values equal"
    )
    me.heap.close()


def check_case(me: Rank, seed: int) -> None:
    shape, rank, heap = me.shape, me.rank, me.heap
    indices = routings(shape, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    quantized = len(shape.parts) == 2
    rows: list[tuple[torch.Tensor, ...]] = []
    values, grads = [], []
    for found in indices:
        t = len(found)
        wide = torch.randn(t, shape.width, generator=generator).bfloat16().view(torch.uint8)
        narrow = [
            torch.randint(0, 256, (t, size), dtype=torch.uint8, generator=generator) for size in shape.parts
        ]
        rows.append(tuple(narrow) if quantized else (wide,))
        values.append(torch.rand(t, shape.topk, generator=generator))
        grads.append(torch.randint(0, 256, (t, shape.parts[0]), dtype=torch.uint8, generator=generator))
    want = slots.plan(torch.stack([slots.count(i, shape.experts) for i in indices]), ALIGN)
    placed = [slots.place(want, found, s) for s, found in enumerate(indices)]
    total, t = want.totals[rank], len(indices[rank])

    def arrived(sent: list[torch.Tensor], fill: float = 0) -> torch.Tensor:
        """What lies in this rank's slots when each rank sends a row a choice."""
        out = torch.full((total, *sent[0].shape[1:]), fill, dtype=sent[0].dtype)
        for (owner, slot), tensor in zip(placed, sent, strict=True):
            mine = owner.view(-1) == rank
            out[slot.view(-1)[mine]] = tensor[mine]
        return out

    def each(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(shape.topk, 0)

    def same(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(got.cpu(), expected):
            at = (got.cpu() != expected).nonzero()
            raise AssertionError(
                f"seed {seed}, rank {rank}: {what} differs {len(at)} times, first {at[:3].tolist()}"
            )

    for buffer in (shape.mailboxes() | shape.slots()).keys() - {"flags", "counts"}:
        heap[buffer].view(torch.uint8).fill_(0x7F)
    torch.cuda.synchronize()
    dist.barrier()
    routing = me.routing(t)
    mine = tuple(r.cuda() for r in rows[rank])
    y = torch.full((t, shape.width), float("nan"), dtype=torch.bfloat16, device="cuda")
    step(me, indices[rank].cuda(), mine, values[rank].cuda(), routing, y, layer=seed)
    me.sync()
    owner, slot = placed[rank]
    same("slots", routing.slots, (owner * shape.capacity + slot).int())
    same("offsets", routing.offsets, want.offsets[rank].int())
    origins = [s * shape.choices + torch.arange(i.numel()).int() for s, i in enumerate(indices)]
    same("origin", heap["origin"][:total], arrived(origins, -1))
    weight = arrived([v.view(-1) for v in values])
    same("value", heap["value"][:total], weight)
    for i, column in enumerate(("data", "scale")[: len(shape.parts)]):
        same(column, heap[column][:total], arrived([each(r[i]) for r in rows]))
    outputs = []  # of each choice of this rank, computed where one rank would
    for k in range(shape.topk):
        if quantized:
            x = rows[rank][0].float() + rows[rank][1].float().repeat_interleave(32, 1)
        else:
            x = rows[rank][0].view(torch.bfloat16).float()
        outputs.append((x * values[rank][:, k : k + 1]).bfloat16().float())
    expected = torch.zeros(t, shape.width)
    for out in outputs:
        expected += out
    same("sum", y.view(torch.int16), expected.bfloat16().view(torch.int16))

    dist.barrier()  # from now on peers overwrite what was released
    # backward: other rows to the same slots; rows and a value each back
    second = (grads[rank].cuda(), *mine[1:])
    me.exchange.send_rows(second, None, routing, seed)
    me.exchange.receive_rows(seed)
    me.sync()
    same("backward rows", heap["data"][:total], arrived([each(g) for g in grads]))
    same("origin kept", heap["origin"][:total], arrived(origins, -1))
    back = torch.randn(shape.capacity, shape.width, device="cuda", generator=None).bfloat16()
    ds = heap["value"].clone().mul_(3).unsqueeze(1)
    me.exchange.send_returns(back.view(torch.uint8), ds, heap["origin"].view(-1, 1), routing, seed)
    me.exchange.release_rows(seed)
    me.exchange.receive_returns(y, seed)
    me.sync()
    same("returned values", heap["returned value"][: t * shape.topk], values[rank].view(-1) * 3)


def stopped(name: str, rank: int, folder: Path, say: Callable[[Any], None]) -> None:
    shape = SMALL["hosts" if name.startswith("hosts") else "right"]
    me = Rank(shape, rank, folder, timeout=3.0)
    indices = [i.cuda() for i in routings(shape, 0)][rank]
    rows = (torch.randn(shape.tokens, shape.width, device="cuda").bfloat16().view(torch.uint8),)
    values, routing = torch.rand(shape.tokens, shape.topk, device="cuda"), me.routing(shape.tokens)
    y = torch.empty(shape.tokens, shape.width, dtype=torch.bfloat16, device="cuda")
    begin = time.monotonic()
    try:
        for i in range(100_000):
            step(me, indices, rows, values, routing, y, layer=7)
            me.sync()
            if i == 20 and rank == 1:
                say("running")
    except Exception as error:
        say(f"rank {rank} after {time.monotonic() - begin:.1f} s, {i} steps: {type(error).__name__}: {error}")
        return
    say("FAILED: nobody stopped")


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    return graph


def replay(name: str, rank: int, folder: Path, say: Callable[[Any], None]) -> None:
    """Replays over a pool of routings; both passes; every output compared on the device with its first."""
    shape = SMALL["hosts" if name.startswith("hosts") else "right"]
    count, pool = 1000, (0, 1, 2, 3, 8, 9, 10, 11)
    me = Rank(shape, rank, folder)
    e, heap, t = me.exchange, me.heap, shape.tokens
    all_indices = [routings(shape, seed)[rank].cuda() for seed in pool]
    indices = all_indices[0].clone()
    x = (torch.randn(t, shape.width, device="cuda").bfloat16().view(torch.uint8),)
    grad = (torch.randn(t, shape.width, device="cuda").bfloat16().view(torch.uint8),)
    values, routing = torch.rand(t, shape.topk, device="cuda"), me.routing(t)
    y, dx = (torch.empty(t, shape.width, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def both() -> None:
        step(me, indices, x, values, routing, y)
        e.send_rows(grad, None, routing, 0)
        e.receive_rows(0)
        back = expert(heap, shape)
        e.send_returns(back, heap["value"].unsqueeze(1), heap["origin"].view(-1, 1), routing, 0)
        e.release_rows(0)
        e.receive_returns(dx, 0)

    graph = capture(both)
    first: list[tuple[torch.Tensor, ...]] = []
    for chosen in all_indices:
        indices.copy_(chosen)
        graph.replay()
        me.sync()
        first.append((y.clone(), dx.clone(), heap["returned value"].clone(), routing.slots.clone()))
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    delays = torch.randint(0, 300_000, (count,), generator=torch.Generator().manual_seed(rank)).tolist()
    begin = time.monotonic()
    for i in range(count):
        indices.copy_(all_indices[i % len(pool)])
        torch.cuda._sleep(delays[i] if i % 3 == 0 else 1)
        graph.replay()
        for got, kept in zip(
            (y, dx, heap["returned value"], routing.slots), first[i % len(pool)], strict=True
        ):
            bad += (got.view(torch.uint8) != kept.view(torch.uint8)).sum()
    me.sync()
    seconds = time.monotonic() - begin
    say(f"rank {rank}: {count} replays of forward and backward, {len(pool)} routings, {int(bad)} bytes differ, "
        f"{1e6 * seconds / count:.0f} us each with delays{' FAILED' if int(bad) else ''}")  # fmt: skip
    say({f"differing bytes, rank {rank}": int(bad)})


def median_us(run: Callable[[], None], inner: int = 5, repeats: int = 7) -> float:
    """Of one `run`, on the slower rank: both start together, `inner` of them in a graph."""

    def several() -> None:
        for _ in range(inner):
            run()

    graph = capture(several)
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / inner)
    slowest = torch.tensor([statistics.median(times)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def speed(name: str, rank: int, folder: Path, say: Callable[[Any], None]) -> None:
    if torch.cuda.device_count() < RANKS:
        raise SystemExit(f"{name} is timed between {RANKS} GPUs, found {torch.cuda.device_count()}")
    shape = SHAPES[name]
    me = Rank(shape, rank, folder)
    heap, t, width = me.heap, shape.tokens, shape.width
    everyone = routings(shape, 0)
    want = slots.plan(torch.stack([slots.count(i, shape.experts) for i in everyone]), ALIGN)
    indices = everyone[rank].cuda()
    x = torch.randn(t, width, device="cuda").bfloat16()
    values, routing = torch.rand(t, shape.topk, device="cuda"), me.routing(t)
    rows = tuple(torch.randint(0, 256, (t, n), dtype=torch.uint8, device="cuda") for n in shape.parts)
    y = torch.empty(t, width, dtype=torch.bfloat16, device="cuda")
    numbers: dict[str, Any] = {}

    def put(key: str, us: float, extra: str = "", moved: float = 0.0) -> None:
        numbers[key] = {"us": us, "GB/s": moved / us / 1e3 if moved else None, "note": extra}
        if rank == 0:
            rate = f" {moved / us / 1e3:6.0f} GB/s" if moved else ""
            say(f"{key:44} {us:8.1f} us{rate}  {extra}")

    local = shape.local
    counts = want.counts.view(RANKS, RANKS, local).sum(2)
    far = int(max(counts[0, 1], counts[1, 0]))  # rows on the wire, of the busier direction
    wires = {"dispatch": float(far * sum(shape.parts)), "return": far * 2.0 * width}

    from cuda.bindings import runtime

    size = int(wires["return"])
    source, to = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{i}") for i in (rank, 1 - rank))
    to.copy_(source)  # lets the GPUs address each other

    def copy() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        (error,) = runtime.cudaMemcpyAsync(
            to.data_ptr(), source.data_ptr(), size, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream
        )
        assert not int(error), error

    copied = median_us(copy)
    put("peer copy, both directions", copied, f"{size / 1e6:.0f} MB", size)

    e = me.exchange
    e.send_counts(indices, routing, 0)
    e.receive_counts(indices, routing, 0)
    me.sync()

    def plan() -> None:
        e.send_counts(indices, routing, 0)
        e.receive_counts(indices, routing, 0)

    put("plan (counts and slots)", median_us(plan))
    problems = shape.problems()
    best: dict[str, tuple[float, RdepConfig]] = {}
    origins = heap["origin"].view(-1, 1)
    back = torch.ones(shape.capacity, width, dtype=torch.bfloat16, device="cuda").view(torch.uint8)
    for config in problems["send_rows"].configs(TARGET):
        candidate = me.with_configs({"send_rows": config})

        def dispatch(e: Exchange = candidate) -> None:
            e.send_rows(rows, values, routing, 0)
            e.receive_rows(0)
            e.release_rows(0)

        us = median_us(dispatch)
        me.sync()
        wire = wires["dispatch"]
        put(f"dispatch {config}", us, f"{100 * wire / us / (size / copied):.0f} % of copy", wire)
        best["send_rows"] = min(best.get("send_rows", (us, config)), (us, config), key=lambda pair: pair[0])
    for config in problems["send_returns"].configs(TARGET):
        candidate = me.with_configs({"send_returns": config})

        def give_back(e: Exchange = candidate) -> None:
            # A layer's counts keep a rank from returning into rows that are still being summed; here nobody sums.
            e.send_returns(back, None, origins, routing, 0)

        us = median_us(give_back)
        me.sync()
        wire = wires["return"]
        put(f"return {config}", us, f"{100 * wire / us / (size / copied):.0f} % of copy", wire)
        best["send_returns"] = min(best.get("send_returns", (us, config)), (us, config), key=lambda p: p[0])
    put("sum of the returned rows", median_us(lambda: e.receive_returns(y, 0)))

    fast = me.with_configs({step: config for step, (_, config) in best.items()})
    me.exchange = fast

    def ours() -> None:
        fast.send_counts(indices, routing, 0)
        fast.receive_counts(indices, routing, 0)
        fast.send_rows(rows, values, routing, 0)
        fast.receive_rows(0)
        fast.send_returns(back, None, origins, routing, 0)
        fast.release_rows(0)
        fast.receive_returns(y, 0)

    whole = median_us(ours)
    put("ours: plan, dispatch, return, sum", whole)
    theirs = nccl(rank, shape, everyone, want, x, values)
    put(
        "NCCL all-to-all with permutes, same",
        theirs,
        f"{theirs / whole:.2f}x of ours; splits known beforehand",
    )
    say(numbers)


def nccl(
    rank: int, shape: Group, everyone: list[torch.Tensor], want: Any, x: torch.Tensor, values: Any
) -> float:
    """µs of a dispatch and return by all_to_all_single: sort and gather, exchange, reorder by expert, exchange back,
    reorder, sum. Splits and index lists are made beforehand, outside of the time: a lower bound."""
    flat = everyone[rank].view(-1).long()
    order = torch.argsort(flat, stable=True).cuda()
    token = order // shape.topk
    send = want.counts[rank].view(RANKS, -1).sum(1).tolist()
    mine = want.counts[:, rank * shape.local : (rank + 1) * shape.local]
    receive = mine.sum(1).tolist()
    # arrived rows lie by (source, expert); segments want (expert, source), padded
    slot = [want.base[s, rank * shape.local + e] + torch.arange(int(mine[s, e]))
            for s in range(RANKS) for e in range(shape.local)]  # fmt: skip
    target = torch.cat(slot).cuda()
    gathered = x.new_empty(sum(send), shape.width)
    arrived = x.new_empty(sum(receive), shape.width)
    packed = x.new_zeros(want.totals[rank], shape.width)
    home = torch.empty_like(order)
    home[order] = torch.arange(len(order), device="cuda")

    def run() -> None:
        torch.index_select(x, 0, token, out=gathered)
        dist.all_to_all_single(arrived, gathered, receive, send)
        packed.index_copy_(0, target, arrived)
        torch.index_select(packed, 0, target, out=arrived)
        dist.all_to_all_single(gathered, arrived, send, receive)
        gathered[home].view(-1, shape.topk, shape.width).sum(1, dtype=torch.float32).bfloat16()

    return median_us(run)


if __name__ == "__main__":
    main()
