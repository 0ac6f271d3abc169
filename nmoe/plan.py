"""What a config needs and how fast it should be, before anything runs: `nmoe plan`.

Memory is exact where the schedule fixes it (weights, gradients, optimizer, arena); times are the predictions of
nmoe/predict.py. Experts are timed at the rows that balanced routing sends, while their buffers hold the worst case or
[rdep] capacity.

With more than one rank: groups of [rdep] ranks share one set of experts; masters and moments of dense parameters are
sharded over all ranks, those of experts over the groups (ZeRO-1, arXiv 1910.02054).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nmoe import devices, predict
from nmoe.codegen.rails import RailProblem
from nmoe.codegen.transfers import transfers_of
from nmoe.config import Config
from nmoe.devices import Device
from nmoe.errors import UserError
from nmoe.graph import Spec
from nmoe.model import group_of
from nmoe.ops import nbytes, numel
from nmoe.predict import Wire
from nmoe.rdep.sizes import depth
from nmoe.schedule import Schedule, lower, memory
from nmoe.shards import layout

GRADIENT_BYTES = MASTER_BYTES = 4
MOMENT_BYTES = {"fp32": 4, "bf16": 2}
ROW_META_BYTES = 12  # beside a row: its token, expert choice and source, and its router weight

WIRES = {
    ("dispatch", "forward"): "dispatch",
    ("combine", "forward"): "return",
    ("dispatch", "backward"): "dispatch, backward",
    ("combine", "backward"): "return, backward",
}
SYNC = "gradients and weights"


class PlanError(UserError):
    """The config does not fit the device or the number of ranks."""


@dataclass(frozen=True)
class Parameters:
    """Counts over all ranks. `active`: those that a token uses. Both are without the multi-token prediction module,
    as published counts are; `mtp` is that module's own."""

    total: int
    active: int
    mtp: int


@dataclass(frozen=True)
class Plan:
    """Per rank unless said otherwise; FLOPs, bytes and seconds are of one optimizer step."""

    config: Config
    device: Device
    world: int
    sequences: int  # of a micro-batch
    micro_batches: int
    parameters: Parameters
    memory: Mapping[str, int]  # bytes by class
    largest: tuple[tuple[str, int], ...]  # families of tensors and their bytes
    flops: float
    model_flops: float
    bytes: float
    wires: Mapping[str, Wire]
    seconds: Mapping[str, float]
    checkpoint_bytes: int  # over all ranks

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """The bound that the prediction sets: model FLOPs over the step's time, by the peak of [schedule] precision."""
        return self.model_flops / self.step_seconds / self.device.peak[self.config.schedule.precision]


def plan(config: Config, world: int = 1, device: Device | None = None) -> Plan:
    """For `world` ranks, one a device; `device` defaults to that of the config's target.

    Raises PlanError when the ranks do not divide the work, or when a rank does not fit its device: then with the
    largest tensors and the keys that would make it fit.
    """
    device = device or devices.of_target(config.target.device)
    sequences = micro_batch(config, world)
    schedule = lower(config, sequences=sequences)
    sizes = memory_plan(config, world, schedule, device.node)
    if sum(sizes.values()) > device.memory * device.usable:
        raise PlanError(_refusal(config, world, device, schedule, sizes))

    calls, rows = schedule.calls, predict.expected_rows(config, schedule)
    sent = predict.wires(config, schedule, device.node)
    times = [
        max(predict.call_seconds(schedule, call, rows, device), wire.seconds(device))
        for call, wire in zip(calls, sent, strict=True)
    ]
    micro_batches = config.train.batch_size // world // sequences
    repeats = {"init": 0, "step": 1, "micro": micro_batches}
    flops = traffic = 0.0
    by_label = dict.fromkeys(WIRES.values(), Wire())
    for call, wire in zip(calls, sent, strict=True):
        cost = predict.call_cost(schedule, call, rows)
        flops += cost.flops * repeats[call.phase]
        traffic += cost.bytes * repeats[call.phase]
        if op := predict.carrier(call):
            by_label[WIRES[op.kind, op.stage]] += wire.times(micro_batches)
    whole, computing = predict.timeline(calls, times)
    sync = _sync(config, world, device.node, schedule)
    touched = _optimizer_bytes(config, world, schedule)
    return Plan(
        config=config,
        device=device,
        world=world,
        sequences=sequences,
        micro_batches=micro_batches,
        parameters=parameter_counts(config, schedule),
        memory=sizes,
        largest=tuple(_families(schedule)),
        flops=flops,
        model_flops=predict.model_flops(config, schedule) * micro_batches,
        bytes=traffic + touched,
        wires=by_label | {SYNC: sync},
        seconds={
            "computing": computing * micro_batches,
            "waiting for expert rows": (whole - computing) * micro_batches,
            "quantizing weights": sum(t for t, c in zip(times, calls, strict=True) if c.phase == "step"),
            SYNC: sync.seconds(device),
            "optimizer": touched / (device.bandwidth * device.attained["memory"]),
        },
        checkpoint_bytes=_checkpoint_bytes(config, schedule),
    )


def micro_batch(config: Config, world: int) -> int:
    """Sequences that a rank runs at once. Raises PlanError when the ranks do not divide experts or sequences."""
    at, ranks, batch = f"{config.run.name} on {world} rank(s)", config.rdep.ranks, config.train.batch_size
    if world % ranks:
        raise PlanError(
            f"{at}: [rdep] ranks = {ranks}, expected a divisor of the number of ranks; use "
            f"{-(-world // ranks) * ranks} ranks or [rdep] ranks = {math.gcd(world, ranks)}"
        )
    if batch % world:
        raise PlanError(
            f"{at}: [train] batch_size = {batch} sequences, expected a multiple of the number of ranks; use "
            f"batch_size = {-(-batch // world) * world}"
        )
    share = batch // world
    sequences = config.train.micro_batch_size or share
    if share % sequences:
        raise PlanError(
            f"{at}: [train] micro_batch_size = {sequences}, expected a divisor of the {share} sequences of a rank; "
            f"use micro_batch_size = {math.gcd(share, sequences)}"
        )
    return sequences


# ---- parameters and what is kept for them -------------------------------------------------------------------


def _local(schedule: Schedule) -> Iterator[tuple[str, bool, int, int]]:
    """(name, expert?, elements, working bytes) of each parameter that a rank holds."""
    for tensor in schedule.graph.of_kind("param"):
        yield tensor.name, group_of(tensor.name) == "expert", numel(tensor.shape), nbytes(tensor.spec)


def parameter_counts(config: Config, schedule: Schedule) -> Parameters:
    """Of the model, whatever the number of ranks."""
    total = active = mtp = 0.0
    share = config.moe.topk / config.moe.experts if config.moe else 1.0
    for name, expert, count, _ in _local(schedule):
        everywhere = count * config.rdep.ranks if expert else count
        if name.startswith("mtp."):
            mtp += everywhere
        else:
            total += everywhere
            active += everywhere * share if expert else everywhere
    return Parameters(round(total), round(active), round(mtp))


def _owners(config: Config, world: int, expert: bool) -> int:
    """Ranks that hold the same parameter, and share its master and moments."""
    return world // config.rdep.ranks if expert else world


def memory_plan(config: Config, world: int, schedule: Schedule, node: int) -> dict[str, int]:
    """Bytes a rank by class, with `node` ranks on a host; their sum is what a rank allocates. A parameter that the
    GEMMs read in FP32 has no other master."""
    fixed = schedule.persistent_bytes()
    segments, _ = layout(schedule.graph, world=world, group=config.rdep.ranks)
    held = sum(s.share for s in segments)
    partial = 0
    if config.target.device == "cpu":  # micro-batches are added in a tree's order: nmoe/accumulate.py
        turns = config.train.batch_size * config.train.seq_len // world // schedule.dims["T"]
        partial = (depth(turns) - 1) * held * GRADIENT_BYTES
    step_made = {
        out for op in schedule.graph.ops if op.phase == "step" for out in op.outputs if out is not None
    }
    quantized = sum(
        -(-life.bytes // memory.ALIGNMENT) * memory.ALIGNMENT
        for name, life in schedule.lifetimes.items()
        if name in step_made
    )
    return {
        "working weights": fixed["param"],
        "FP32 masters": sum(s.share for s in segments if s.narrow) * MASTER_BYTES,
        "FP32 gradients": fixed["grad"] + partial,
        "moments": 2 * held * MOMENT_BYTES[config.optim.state_precision],
        "state, inputs, tables": fixed.get("state", 0) + fixed["input"] + fixed.get("const", 0),
        "quantized weights": quantized,
        "activations": schedule.arena_bytes - quantized,
        "RDEP buffers": _rdep_bytes(config, schedule),
        "rails between hosts": _rail_bytes(config, schedule, node),
    }


def _rdep_bytes(config: Config, schedule: Schedule) -> int:
    """What peers write to beside the arena, shared by all layers: returned rows of either direction with a gradient of
    the router weight; counts of every rank; on a CPU received rows and received output gradients, which must be
    distinct, with metadata. On a GPU they arrive in the arena, and each layer keeps the order of its choices."""
    moe, ranks, dims = config.moe, config.rdep.ranks, schedule.dims
    if moe is None or ranks == 1:
        return 0
    received = {"forward": 0.0, "backward": 0.0}
    returned = 0.0
    payload = predict.payload_bytes(schedule)
    for op in schedule.graph.ops:
        if op.kind == "dispatch" and not op.name.endswith(".again") and schedule.target == "cpu":
            received[op.stage] = max(received[op.stage], payload[op.name])
        elif op.kind == "combine":
            returned = max(returned, payload[op.name])
    row = sum(received.values())
    arrived = dims["R"] * (row + ROW_META_BYTES) if row else 0.0
    ordered = 4 * sum(op.kind == "moe_plan" for op in schedule.graph.ops) if schedule.target != "cpu" else 0
    return round(arrived + dims["T"] * moe.topk * (returned + ordered) + ranks * moe.experts * 4)


def _rail_bytes(config: Config, schedule: Schedule, node: int) -> int:
    """What rows pass through between hosts of `node` GPUs, shared by all layers: room for all rows of either channel,
    of which those that describe themselves need the most (codegen/rails.py)."""
    if config.rdep.ranks <= node:
        return 0
    boxes: dict[str, int] = {}  # where layers' rows differ in bytes, they share the largest
    for rail in transfers_of(schedule, node):
        if isinstance(rail, RailProblem) and rail.describes:
            for box in (*rail.mailboxes("staged"), *rail.mailboxes("landed")):
                name, size = f"{rail.channel} {box.name}", nbytes(Spec(box.shape, box.format))
                boxes[name] = max(boxes.get(name, 0), size)
    return sum(boxes.values())


def _sync(config: Config, world: int, node: int, schedule: Schedule) -> Wire:
    """Once a step: FP32 gradients reduce-scattered and working weights all-gathered among the ranks that hold them."""
    sizes = {False: [0, 0], True: [0, 0]}
    for _, expert, count, working in _local(schedule):
        sizes[expert][0] += count * GRADIENT_BYTES
        sizes[expert][1] += working
    dense = predict.sync_wire(world, node, *sizes[False])
    experts = predict.sync_wire(_owners(config, world, True), max(1, node // config.rdep.ranks), *sizes[True])
    return dense + experts


def _optimizer_bytes(config: Config, world: int, schedule: Schedule) -> int:
    """Traffic of clearing the gradients and of the update of a rank's shard: the gradient twice (norm, update), master
    and moments read and written, the working copy written."""
    moment = MOMENT_BYTES[config.optim.state_precision]
    total = 0
    for _, expert, count, working in _local(schedule):
        shard = -(-count // _owners(config, world, expert))
        copy = working // count if working < count * MASTER_BYTES else 0
        total += count * GRADIENT_BYTES + shard * (2 * GRADIENT_BYTES + 2 * MASTER_BYTES + 4 * moment + copy)
    return total


def _checkpoint_bytes(config: Config, schedule: Schedule) -> int:
    """Masters, both moments and routing biases, of all ranks."""
    kept = MASTER_BYTES + 2 * MOMENT_BYTES[config.optim.state_precision]
    counts = parameter_counts(config, schedule)
    biases = sum(nbytes(t.spec) for t in schedule.graph.of_kind("state") if t.name.endswith(".router_bias"))
    return (counts.total + counts.mtp) * kept + biases


# ---- what to do when it does not fit ------------------------------------------------------------------------


def _families(schedule: Schedule, count: int = 5) -> list[tuple[str, int]]:
    """The largest tensors that exist when the arena is fullest, alike ones of all layers together."""
    _, at = memory.peak(schedule.lifetimes.values())
    alive = [(life.name, life.bytes) for life in schedule.lifetimes.values() if life.start <= at <= life.end]
    alive += [(t.name, nbytes(schedule.spec(t.name))) for t in schedule.graph.of_kind("param", "grad")]
    members: dict[str, list[int]] = {}
    for name, size in alive:
        members.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(size)
    ranked = sorted(members.items(), key=lambda item: -sum(item[1]))[:count]
    return [(f"{name} x {len(sizes)}" if len(sizes) > 1 else name, sum(sizes)) for name, sizes in ranked]


def _with(config: Config, key: str, value: int | str) -> Config:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _options(config: Config, world: int) -> Iterator[tuple[str, list[int | str]]]:
    """(key, values that need less memory, mildest first), the least harmful key first."""
    moe, ranks, train = config.moe, config.rdep.ranks, config.train
    share = train.batch_size // world
    sequences = train.micro_batch_size or share
    yield "train.micro_batch_size", [n for n in range(sequences - 1, 0, -1) if share % n == 0]
    policies: list[int | str] = ["none", "selective", "full"]
    yield "schedule.recompute", policies[policies.index(config.schedule.recompute) + 1 :]
    yield "optim.state_precision", ["bf16"] if config.optim.state_precision == "fp32" else []
    if moe:
        more = range(ranks + 1, min(world, moe.experts) + 1)
        yield "rdep.ranks", [n for n in more if world % n == 0 and moe.experts % n == 0]
        twice = 2 * sequences * train.seq_len * moe.topk  # a balanced load, doubled
        yield "rdep.capacity", [twice] if ranks > 1 and not 0 < config.rdep.capacity <= twice else []


def _last_resorts(config: Config) -> Iterator[tuple[str, list[int | str]]]:
    """Keys that make it another experiment: less context, or weights and activations of fewer bits."""
    seq_len = config.train.seq_len
    yield "train.seq_len", [seq_len >> shift for shift in (1, 2, 3) if seq_len >> shift >= 512]
    yield "schedule.precision", ["nvfp4"] if config.schedule.precision == "mxfp8" else []


def _refusal(config: Config, world: int, device: Device, schedule: Schedule, sizes: Mapping[str, int]) -> str:
    limit = device.memory * device.usable
    classes = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    lines = [
        f"{config.run.name} on {world} rank(s) needs {gigabytes(sum(sizes.values()))} a rank, of which "
        f"{', '.join(f'{name} {gigabytes(size)}' for name, size in classes)}; {device.name} has "
        f"{gigabytes(limit)} usable of {gigabytes(device.memory)}",
        *(f"  {gigabytes(size):>10}  {name}" for name, size in _families(schedule)),
    ]
    lines.append(f"  remedy: {_remedy(config, world, device)}")
    return "\n".join(lines)


def _remedy(config: Config, world: int, device: Device) -> str:
    """Every single key that makes the config fit; else the shortest run of keys that does together; else the number
    of ranks; else a key that makes it another experiment."""
    known: dict[tuple[Config, int], bool] = {}
    limit = device.memory * device.usable

    def fits(config: Config, world: int = world) -> bool:
        if (config, world) not in known:
            schedule = lower(config, sequences=micro_batch(config, world))
            known[config, world] = sum(memory_plan(config, world, schedule, device.node).values()) <= limit
        return known[config, world]

    def alone(options: Iterator[tuple[str, list[int | str]]]) -> list[str]:
        """The mildest value of each key that is enough; its strongest is tried first."""
        return [
            _setting(key, next(value for value in values if fits(_with(config, key, value))))
            for key, values in options
            if values and fits(_with(config, key, values[-1]))
        ]

    if found := alone(_options(config, world)):
        return " or ".join(found)
    keys: list[str] = []
    combined = config
    for key, values in _options(config, world):
        if not values:
            continue
        if fits(_with(combined, key, values[-1])):
            mildest = next(value for value in values if fits(_with(combined, key, value)))
            return " with ".join([*keys, _setting(key, mildest)])
        combined = _with(combined, key, values[-1])
        keys.append(_setting(key, values[-1]))
    for more in (world * 2, world * 4, world * 8):
        if config.train.batch_size % more == 0 and fits(config, more):
            return f"--world {more}"
    return " or ".join(alone(_last_resorts(config))) or (
        "none of micro_batch_size, recompute, state_precision, ranks, capacity, seq_len and precision is enough: "
        "use more ranks (--world), a smaller model or a device with more memory"
    )


def _setting(key: str, value: int | str) -> str:
    section, name = key.split(".")
    return f"[{section}] {name} = " + (f'"{value}"' if isinstance(value, str) else str(value))


# ---- the screen ---------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def amount(value: float, unit: str = "") -> str:
    """1234567 → "1.23 M"."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def format_plan(plan: Plan) -> str:
    """The plan as one screen."""
    config, device, counts = plan.config, plan.device, plan.parameters
    mtp = f", and {amount(counts.mtp)} in the multi-token prediction module" if counts.mtp else ""
    usable = device.memory * device.usable
    groups = f", in groups of {config.rdep.ranks}" if config.rdep.ranks > 1 else ""
    lines = [
        f"{config.run.name} on {plan.world} x {device.name} ({device.target}){groups}",
        f"  parameters  {amount(counts.total)}, {amount(counts.active)} active{mtp}",
        f"  step        {config.train.batch_size:,} x {config.train.seq_len:,} = {plan.tokens:,} tokens; a rank runs "
        f"{plan.micro_batches} x {plan.sequences} sequence(s)",
        f"  precision   {config.schedule.precision}, recompute {config.schedule.recompute}",
        "",
        f"memory of a rank: {amount(plan.memory_bytes, 'B')} of {amount(usable, 'B')} usable",
        *(f"  {amount(size, 'B'):>12}  {name}" for name, size in plan.memory.items() if size),
        "  largest:",
        *(f"  {amount(size, 'B'):>12}  {name}" for name, size in plan.largest),
        "",
        "work of a rank in a step",
        f"  {amount(plan.flops, 'FLOP'):>12}  of which the model needs {amount(plan.model_flops, 'FLOP')}",
        f"  {amount(plan.bytes, 'B'):>12}  read and written",
        *(
            f"  {amount(wire.nvlink + wire.network, 'B'):>12}  sent: {name} (NVLink {amount(wire.nvlink, 'B')}, "
            f"network {amount(wire.network, 'B')})"
            for name, wire in plan.wires.items()
            if wire.nvlink or wire.network
        ),
        "",
        "time of a step, predicted (docs/plan.md)",
        *(f"  {1e3 * value:>9,.1f} ms  {name}" for name, value in plan.seconds.items() if value),
        f"  {1e3 * plan.step_seconds:>9,.1f} ms  in all: {amount(plan.tokens_per_second, 'token/s')}, "
        f"{amount(86400 * plan.tokens_per_second, 'tokens a day')}; MFU {100 * plan.mfu:.0f}% of the "
        f"{config.schedule.precision} peak",
        f"  {config.train.steps * plan.step_seconds / 3600:>9,.1f} h   for the run's {config.train.steps:,} steps",
        "",
        f"a checkpoint holds {amount(plan.checkpoint_bytes, 'B')}",
    ]
    return "\n".join(lines)
