"""The schedule: graph passes keep the IR's rules, the memory plan is tight and nothing races on it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import configs
from tiny import tiny_config

from nmoe.config import Config, LayerGroup, load
from nmoe.ops import OPS
from nmoe.schedule import Call, Schedule, lower, memory
from nmoe.schedule.explain import explain, scaled
from nmoe.schedule.memory import ALIGNMENT, Lifetime
from nmoe.schedule.overlap import COMM, MAIN, SIDE

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
RECOMPUTE = ("none", "selective", "full")


def with_recompute(config: Config, policy: str) -> Config:
    return replace(config, schedule=replace(config.schedule, recompute=policy))


def lowered(config: Config, **options) -> Schedule:
    return lower(config, sequences=config.train.micro_batch_size or 1, **options)


# ---- races ----


def ended_before(schedule: Schedule) -> list[int]:
    """The calls that surely ended before each call, as a bit set. Only the order of a stream and `waits` order calls; a
    phase ends when all streams have. Independent of the planner's clock."""
    before: list[int] = []
    latest: dict[int, int] = {}
    for i, call in enumerate(schedule.calls):
        known = 0
        for earlier in (*call.waits, *([latest[call.stream]] if call.stream in latest else [])):
            known |= before[earlier] | 1 << earlier
        before.append(known)
        latest[call.stream] = i
    phases = of_phases(schedule)
    for i, call in enumerate(schedule.calls):
        if call.phase == "micro":
            before[i] |= phases["init"] | phases["step"]
    return before


def of_phases(schedule: Schedule) -> dict[str, int]:
    """The calls of each phase, as a bit set."""
    phases: dict[str, int] = defaultdict(int)
    for i, call in enumerate(schedule.calls):
        phases[call.phase] |= 1 << i
    return phases


def races(schedule: Schedule) -> list[str]:
    """Whatever two calls do in an undefined order that matters."""
    before, phases = ended_before(schedule), of_phases(schedule)
    found = []
    writers: dict[str, list[int]] = defaultdict(list)
    users: dict[str, int] = defaultdict(int)  # of each tensor, as a bit set
    for i, call in enumerate(schedule.calls):
        for op in call.ops:
            for name in op.inputs:
                if name is not None:
                    users[name] |= 1 << i
                    found += [f"{call.name} reads {name} while {schedule.calls[w].name} may write it"
                              for w in writers[name] if w != i and not before[i] >> w & 1]  # fmt: skip
            for name in op.outputs:
                if name is not None:
                    found += [f"{call.name} and {schedule.calls[w].name} both write {name}"
                              for w in writers[name] if w != i and not before[i] >> w & 1]  # fmt: skip
                    users[name] |= 1 << i
                    writers[name].append(i)

    sharing: dict[str, int] = defaultdict(int)
    for name, calls in users.items():
        sharing[schedule.aliases.get(name, name)] |= calls
    for i, call in enumerate(schedule.calls):
        for op in call.ops:
            for name in schedule.scratch_names.get(op.name, ()):
                sharing[name] |= 1 << i
            for label, operand in OPS[op.kind].inplace.items():
                out, source = op.outputs[OPS[op.kind].outputs.index(label)], op.inputs[operand]
                if out in schedule.aliases:
                    late = users[source] & ~(1 << i) & ~before[i]
                    if late:
                        found.append(
                            f"{op.name} overwrites {source}, which {_names(schedule, late)} may still use"
                        )

    placed = []
    for name, life in schedule.lifetimes.items():
        common = -1  # what has ended before any use of this buffer
        for i in _bits(sharing[name]):
            common &= before[i]
        lasting = bool(sharing[name] & (phases["step"] | phases["init"])) and not name.count("#")
        output = name in schedule.graph.tensors and schedule.graph.tensors[name].kind == "output"
        placed.append((schedule.offsets[name], life.bytes, name, sharing[name], common, lasting, output))
    placed.sort()
    open_: list[tuple] = []
    for item in placed:
        offset, size, name, calls, common, lasting, output = item
        open_ = [other for other in open_ if other[0] + other[1] > offset]
        for _, _, other, other_calls, other_common, other_lasting, other_output in open_:
            first, then = not calls & ~other_common, not other_calls & ~common
            held = (lasting and other_calls & phases["micro"]) or (other_lasting and calls & phases["micro"])
            held = held or (output and first) or (other_output and then)
            if held or not (first or then):
                found.append(f"{name} and {other} share bytes at once")
        if size:
            open_.append(item)
    return found


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _names(schedule: Schedule, mask: int) -> str:
    return ", ".join(schedule.calls[i].name for i in _bits(mask))


def distributed(config: Config, device: str = "sm_100a", ranks: int = 2) -> Config:
    return replace(
        config, target=replace(config.target, device=device), rdep=replace(config.rdep, ranks=ranks)
    )


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("precision", ["bf16", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("device", ["sm_100a", "cpu"])
def test_no_races_on_several_streams(device, precision, recompute):
    config = tiny_config(schedule={"precision": precision, "recompute": recompute}, model={"mtp_depth": 1})
    schedule = lowered(distributed(config, device), debug=True)
    assert len({call.stream for call in schedule.calls}) == 3
    assert races(schedule) == []


@given(configs(), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_no_races_in_random_models(config, ranks):
    ranks = ranks if config.moe.experts % ranks == 0 else 1
    schedule = lowered(distributed(config, "cpu", ranks), debug=True)
    assert races(schedule) == []
    assert memory.overlaps(schedule.lifetimes, schedule.offsets) == []


def transfer_before(schedule: Schedule, index: int) -> Call:
    return next(call for call in reversed(schedule.calls[:index]) if call.stream == COMM)


def test_every_wait_is_needed():
    """To order what reads after what writes, or to start the shared expert together with a transfer."""
    schedule = lowered(distributed(tiny_config(), ranks=4))
    waiting = [(i, wait) for i, call in enumerate(schedule.calls) for wait in call.waits]
    together = 0
    for i, wait in waiting:
        calls = list(schedule.calls)
        calls[i] = replace(calls[i], waits=tuple(w for w in calls[i].waits if w != wait))
        found = races(replace(schedule, calls=tuple(calls)))
        if any(f"{calls[i].name} reads" in race and calls[wait].name in race for race in found):
            continue
        assert calls[i].stream == SIDE
        assert set(calls[wait].outputs) & set(transfer_before(schedule, i).inputs)
        together += 1
    assert len(waiting) - together > 20 and together


@pytest.mark.parametrize("precision", ["bf16", "mxfp8"])
def test_work_lies_beside_transfers(precision):
    """Half of the shared expert, and of its gradients, beside rows on their way out, half beside those back."""
    schedule = lowered(distributed(tiny_config(schedule={"precision": precision})))
    before = ended_before(schedule)
    transfers = [i for i, call in enumerate(schedule.calls) if call.stream == COMM]
    beside: dict[str, set[str]] = defaultdict(set)
    for i, call in enumerate(schedule.calls):
        for t in transfers:
            if not before[i] >> t & 1 and not before[t] >> i & 1:
                beside[schedule.calls[t].name].add(call.name)
    layers = [name.removesuffix(".dispatch") for name in beside if name.endswith(".moe.dispatch")]
    assert layers
    for path in layers:
        assert f"{path}.shared.gate_up.gemm" in beside[f"{path}.dispatch"] - beside[f"{path}.plan"]
        assert f"{path}.shared.down.gemm" in beside[f"{path}.combine"]
        assert f"{path}.shared.down.gemm.wgrad" in beside[f"{path}.combine.bwd"]
        assert f"{path}.shared.gate_up.gemm.wgrad" in beside[f"{path}.dispatch.bwd"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_is_read_before_it_is_made(recompute):
    """With recomputation a backward pass has two dispatches, and the multi-token module's gradients begin in it."""
    config = distributed(tiny_config(model={"mtp_depth": 1}, schedule={"recompute": recompute}))
    schedule = lowered(config)
    made_by = {name: i for i, call in enumerate(schedule.calls) for name in call.outputs}
    for i, call in enumerate(schedule.calls):
        assert all(made_by.get(name, -1) < i or name in call.outputs for name in call.inputs), call.name


def test_sharing_bytes_at_once_is_a_race():
    schedule = lowered(distributed(tiny_config()))
    attention = next(op for op in schedule.graph.ops if op.kind == "attention")
    q, kv = (schedule.aliases.get(name, name) for name in attention.inputs[:2])
    moved = replace(schedule, offsets={**schedule.offsets, q: schedule.offsets[kv]})
    assert any("share bytes" in race and q in race and kv in race for race in races(moved))


# ---- shipped configs ----


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config(path):
    """Every pass keeps the rules of the IR; the plan is sound, and close to the least that any plan needs."""
    config = load(path)
    schedule = lowered(config, debug=True)
    assert memory.overlaps(schedule.lifetimes, schedule.offsets) == []
    assert set(schedule.offsets) == set(schedule.lifetimes)
    assert all(offset % ALIGNMENT == 0 for offset in schedule.offsets.values())
    end = max(schedule.offsets[name] + life.bytes for name, life in schedule.lifetimes.items())
    assert schedule.arena_bytes - ALIGNMENT < end <= schedule.arena_bytes
    peak, _ = memory.peak(schedule.lifetimes.values())
    assert peak <= schedule.arena_bytes <= 1.08 * peak
    assert races(schedule) == []
    assert any(call.stream != MAIN for call in schedule.calls) == (config.rdep.ranks > 1)


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if "dsv" not in path.stem], ids=lambda path: path.stem
)
def test_recompute_shrinks_the_arena(path):
    arenas = [lowered(with_recompute(load(path), policy)).arena_bytes for policy in RECOMPUTE]
    assert arenas[0] >= arenas[1] > arenas[2]


def test_what_recompute_runs_again():
    def again(policy):
        ops = lowered(with_recompute(tiny_config(), policy)).graph.ops
        return {op.kind for op in ops if op.name.endswith(".again")}

    assert again("none") == set()
    assert again("selective") == {"rms_norm", "rope", "swiglu", "split"}
    assert {"attention", "gemm", "grouped_gemm", "dispatch"} <= again("full")
    assert not {"router", "moe_plan", "linear_cross_entropy_fwd_bwd"} & again("full")


# ---- memory ----


def test_buffers_are_reused():
    schedule = lowered(tiny_config())
    assert schedule.arena_bytes < 0.5 * sum(life.bytes for life in schedule.lifetimes.values())
    assert schedule.aliases  # some ops work in place


lives = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=40)


@given(lives, st.integers(0, 21))
@settings(max_examples=200, deadline=None)
def test_placement(spans, turn):
    lifetimes = {
        f"b{i}": Lifetime(f"b{i}", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(spans)
    }
    offsets, arena = memory.place(lifetimes.values(), turn)
    assert set(offsets) == set(lifetimes)
    assert memory.overlaps(lifetimes, offsets) == []
    for a in lifetimes.values():
        assert offsets[a.name] >= 0 and offsets[a.name] + a.bytes <= arena
        for b in lifetimes.values():
            if a is not b and a.start <= b.end and b.start <= a.end and a.bytes and b.bytes:
                low, high = sorted([(offsets[a.name], a.bytes), (offsets[b.name], b.bytes)])
                assert sum(low) <= high[0]
    rounded = {life.name: -(-life.bytes // ALIGNMENT) * ALIGNMENT for life in lifetimes.values()}
    alive = [sum(rounded[x.name] for x in lifetimes.values() if x.start <= t <= x.end) for t in range(21)]
    peak, at = memory.peak(lifetimes.values())
    assert peak == max(alive) and (not peak or alive[at] == peak)
    assert peak <= arena <= sum(rounded.values())
    largest = memory.largest(lifetimes.values(), at, 3)
    assert [life.bytes for life in largest] == sorted((life.bytes for life in largest), reverse=True)


def test_overlaps_are_found():
    lifetimes = {"a": Lifetime("a", 100, 0, 3), "b": Lifetime("b", 100, 3, 5), "c": Lifetime("c", 100, 4, 6)}
    assert memory.overlaps(lifetimes, {"a": 0, "b": 99, "c": 0}) == [("a", "b"), ("b", "c")]
    assert memory.overlaps(lifetimes, {"a": 0, "b": 100, "c": 0}) == []


# ---- explain ----


def test_explain():
    schedule = lowered(distributed(tiny_config()))
    head, totals, titles, *lines = explain(schedule).split("\n")
    assert head.startswith(
        f"sm_100a: {len(schedule.graph.ops)} ops in {len(schedule.calls)} kernels; T = 32, R = "
    )
    assert totals.startswith("arena ") and all(kind in totals for kind in ("param", "grad", "state", "input"))
    assert titles.split() == ["#", "stream", "kernel", "ops", "FLOPs", "bytes", "live", "largest", "output"]
    assert len(lines) == len(schedule.calls)
    for i, (call, line) in enumerate(zip(schedule.calls, lines, strict=True)):
        assert line.split()[0] == str(i) and f"  {call.name}  " in line
        assert "+".join(op.kind for op in call.ops) in line
        assert all(str(wait) in line for wait in call.waits)
    assert any(" comm " in line for line in lines) and any(" side after " in line for line in lines)
    timed = explain(schedule, time=lambda call: 2e-6 * len(call.ops)).split("\n")
    assert " µs " in timed[2]
    assert all(
        f" {2.0 * len(call.ops):.1f} " in line for call, line in zip(schedule.calls, timed[3:], strict=True)
    )


def test_live_memory_peaks_where_the_plan_says():
    schedule = lowered(tiny_config())
    peak, at = memory.peak(schedule.lifetimes.values())
    lines = explain(schedule).split("\n")
    assert f"{scaled(peak)}B alive at kernel {at};" in lines[1]
    assert f" {scaled(peak)} " in lines[3 + at]


ONE_LAYER = {"layers": (LayerGroup("moe"),)}


def test_gathered_rows_are_nowhere_in_memory():
    """On one B200 in BF16 four GEMMs load rows of tokens; the dispatch that is left places router weights."""
    hopper, blackwell = (
        lowered(
            tiny_config(target={"device": device}, model=ONE_LAYER, schedule={"precision": "bf16"}),
            debug=True,
        )
        for device in ("sm_90a", "sm_100a")
    )
    moved = [call for call in blackwell.calls if any(op.kind == "dispatch" for op in call.ops)]
    assert [[op.kind for op in call.ops] for call in moved] == [
        ["dispatch"],
        ["dispatch", "grouped_gemm", "swiglu"],
        ["dispatch", "grouped_gemm"],
        ["dispatch", "grouped_gemm", "swiglu_bwd"],
        ["dispatch", "grouped_gemm"],
    ]
    alone, *gathered = moved
    assert not any(name.endswith(".rows") for name in (*blackwell.lifetimes, *alone.outputs))
    assert all(call.ops[0].outputs[0] in blackwell.fused for call in gathered)
    rows = 2 * hopper.dims["R"] * 64  # bytes of a dispatched x or dy
    assert sum(life.bytes for life in hopper.lifetimes.values()) - sum(
        life.bytes for life in blackwell.lifetimes.values()) == 2 * rows  # fmt: skip
    x = 2 * hopper.dims["T"] * 64  # read, and no row written
    assert all(
        cost.bytes == x for call in gathered for op, cost in blackwell.costs(call) if op.kind == "dispatch"
    )
    assert not races(blackwell)


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_quantized_and_travelling_rows_are_not_gathered(precision):
    one = tiny_config(target={"device": "sm_100a"}, schedule={"precision": precision})
    several = distributed(tiny_config(target={"device": "sm_100a"}, schedule={"precision": "bf16"}))
    for config in (one, several):
        kinds = [[op.kind for op in call.ops] for call in lowered(config).calls]
        assert not any("dispatch" in ops and "grouped_gemm" in ops for ops in kinds)


def test_fused_values_cost_no_traffic():
    schedule = lowered(distributed(tiny_config(schedule={"precision": "mxfp8"})))
    call = next(call for call in schedule.calls if call.name.endswith("moe.gemm1") and len(call.ops) > 1)
    alone, together = (sum(cost.bytes for cost in costs) for costs in (
        [schedule.cost(op) for op in call.ops], [cost for _, cost in schedule.costs(call)]))  # fmt: skip
    assert together < alone
    assert sum(cost.flops for _, cost in schedule.costs(call)) == sum(
        schedule.cost(op).flops for op in call.ops
    )


@pytest.mark.parametrize("value, text", [
    (0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_400, "999k"), (999_600, "1000k"),
    (1_234_567, "1.23M"), (5e15, "5P")])  # fmt: skip
def test_scaled(value, text):
    assert scaled(value) == text


@pytest.mark.parametrize(("precision", "rows"), [("bf16", 300), ("mxfp8", 320), ("nvfp4", 304)])
def test_a_capacity_is_rounded_up_to_whole_row_tiles(tiny, precision, rows):
    config = tiny(schedule={"precision": precision}, rdep={"capacity": 300})
    assert lower(config, sequences=2).dims == {"T": 64, "R": rows}
