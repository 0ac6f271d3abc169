"""The schedule as a table, one line a kernel, to read and to diff."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from nmoe.ops import Cost, nbytes
from nmoe.schedule import memory
from nmoe.schedule.lower import Call, Schedule
from nmoe.schedule.overlap import COMM, MAIN, SIDE

STREAMS = {MAIN: "main", COMM: "comm", SIDE: "side"}
HEADER = ("#", "stream", "kernel", "ops", "FLOPs", "bytes", "live", "largest output")


def explain(schedule: Schedule, *, time: Callable[[Call], float] | None = None) -> str:
    """A line for each kernel in order: stream, first op, op kinds, floating-point operations, bytes moved, arena bytes
    alive while it runs, and where its largest output lies; `time` adds a column of its seconds in µs.

    Expert rows count as many as their buffers hold.
    """
    lines: list[tuple[str, ...]] = [HEADER if time is None else (*HEADER[:-1], "µs", HEADER[-1])]
    for index, (call, live) in enumerate(zip(schedule.calls, _live(schedule), strict=True)):
        cost = sum((cost for _, cost in schedule.costs(call)), Cost())
        cells = [str(index), STREAMS[call.stream], call.name, "+".join(op.kind for op in call.ops)]
        if call.waits:
            cells[1] += " after " + ",".join(map(str, call.waits))
        cells += [scaled(cost.flops), scaled(cost.bytes), scaled(live)]
        lines.append(
            (*cells, *([f"{1e6 * time(call):.1f}"] if time else []), _largest_output(schedule, call))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if title in ("stream", "kernel", "ops", HEADER[-1]) else cell.rjust(width)
            for cell, width, title in zip(line, widths, lines[0], strict=True)
        ).rstrip()
        for line in lines
    ]
    peak, at = memory.peak(schedule.lifetimes.values())
    lasting = ", ".join(
        f"{kind} {scaled(size)}B" for kind, size in sorted(schedule.persistent_bytes().items())
    )
    dims = ", ".join(f"{symbol} = {size}" for symbol, size in schedule.dims.items())
    return "\n".join([
        f"{schedule.target}: {len(schedule.graph.ops)} ops in {len(schedule.calls)} kernels; {dims}",
        f"arena {scaled(schedule.arena_bytes)}B, of which {scaled(peak)}B alive at kernel {at}; beside it {lasting}",
        *table,
    ])  # fmt: skip


def _live(schedule: Schedule) -> list[int]:
    """Arena bytes that are in use while each kernel runs."""
    change = [0] * (len(schedule.calls) + 2)
    for life in schedule.lifetimes.values():
        change[life.start] += life.room
        change[life.end + 1] -= life.room
    return list(accumulate(change))[: len(schedule.calls)]


def _largest_output(schedule: Schedule, call: Call) -> str:
    """Its name, bytes and place: an offset in the arena, the tensor whose buffer it took, or its kind."""
    stored = [name for name in call.outputs if name not in schedule.fused]
    if not stored:
        return ""
    sizes = {name: nbytes(schedule.spec(name)) for name in stored}
    name = max(stored, key=lambda name: sizes[name])
    if name in schedule.aliases:
        place = f"in {schedule.aliases[name]}"
    elif name in schedule.offsets:
        place = f"at {schedule.offsets[name]}"
    else:
        place = schedule.graph.tensors[name].kind
    return f"{name} {scaled(sizes[name])}B {place}"


def scaled(value: float) -> str:
    """Three digits and a decimal prefix: 1234567 → "1.23M"."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{prefix}" if value < 999.5 * scale else f"{value / scale:.0f}{prefix}"
    return f"{value:.0f}"
