"""The plan against counts made by hand, and what it refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe import devices, plan, predict
from nmoe.codegen.transfers import transfers_of
from nmoe.config import Config, Moe, Target, layers, load
from nmoe.devices import TABLE, Device
from nmoe.errors import UserError
from nmoe.graph import Op, Spec
from nmoe.ops import row_parts
from nmoe.plan import PlanError, format_plan, memory_plan, micro_batch
from nmoe.predict import Wire, dispatch_wire, return_wire, spread, sync_wire, timeline
from nmoe.schedule import Call, lower
from nmoe.schedule.overlap import COMM, MAIN, SIDE

CONFIGS = Path(__file__).parents[1] / "configs"
NATURAL = {"quickstart": 1, "moonlet": 1, "moonlight": 8, "dsv2": 80, "dsv3": 512}
CPU = Device(
    name="some CPU", target="cpu", peak=dict.fromkeys(("fp32", "bf16", "mxfp8", "nvfp4"), 1e11),
    attained=dict.fromkeys(("fp32", "bf16", "mxfp8", "nvfp4", "attention", "memory", "nvlink", "network"), 1.0),
    memory=8e9, bandwidth=1e10, nvlink=math.inf, network=math.inf, node=1 << 30, sms=0, usable=0.5, sources=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> dict[str, plan.Plan]:
    """The plan of every shipped config at its natural number of ranks."""
    return {
        name: plan.plan(config, world, CPU if config.target.device == "cpu" else None)
        for name, world in NATURAL.items()
        for config in [load(CONFIGS / f"{name}.toml")]
    }


# ---- counts by hand -----------------------------------------------------------------------------------------


def attention_weights(config: Config) -> int:
    a, d = config.model.attention, config.model.hidden_size
    query = a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    q = a.q_lora_rank * (d + query) if a.q_lora_rank else d * query
    kv = d * (a.kv_lora_rank + a.qk_rope_head_dim)
    kv += a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
    return q + kv + a.heads * a.v_head_dim * d


def norms(config: Config) -> int:
    a = config.model.attention
    return 2 * config.model.hidden_size + a.q_lora_rank + a.kv_lora_rank


def ffn_weights(config: Config, layer) -> tuple[int, int, int]:
    """(dense and shared, router, one expert) of a layer."""
    d, moe = config.model.hidden_size, config.moe
    if layer.ffn == "dense":
        return 3 * d * layer.intermediate_size, 0, 0
    expert = 3 * d * moe.intermediate_size
    return moe.shared_experts * expert, moe.experts * d, expert


def hand_counts(config: Config) -> dict[str, int]:
    """Elements by how they are kept: "narrow" matrices, "wide" (norms, routers: FP32), "expert" (all ranks')."""
    d, vocab = config.model.hidden_size, config.model.vocab_size
    counts = {"narrow": 2 * vocab * d, "wide": d, "expert": 0}
    every = layers(config)
    modules = list(every) + [every[-1]] * config.model.mtp_depth
    for layer in modules:
        dense, router, expert = ffn_weights(config, layer)
        counts["narrow"] += attention_weights(config) + dense
        counts["wide"] += norms(config) + router
        counts["expert"] += expert * (config.moe.experts if expert else 0)
    counts["narrow"] += config.model.mtp_depth * 2 * d * d
    counts["wide"] += config.model.mtp_depth * 3 * d  # of the embedding, of the trunk, before the head
    return counts


def hand_flops_per_token(config: Config) -> float:
    """6 for each weight that a token meets in a product, and three times attention's forward products."""
    d, vocab, a = config.model.hidden_size, config.model.vocab_size, config.model.attention
    every = layers(config)
    weights = vocab * d * (1 + config.model.mtp_depth) + 2 * d * d * config.model.mtp_depth
    for layer in [*every, *[every[-1]] * config.model.mtp_depth]:
        dense, router, expert = ffn_weights(config, layer)
        weights += attention_weights(config) + dense + router + (config.moe.topk * expert if expert else 0)
    keys = (config.train.seq_len + 1) / 2
    scores = 2 * a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim) * keys
    return 6 * weights + 3 * scores * (len(every) + config.model.mtp_depth)


@pytest.mark.parametrize("name", NATURAL)
def test_model_flops_are_those_of_weights_and_attention(shipped, name: str) -> None:
    config = load(CONFIGS / f"{name}.toml")
    tokens = config.train.batch_size * config.train.seq_len / NATURAL[name]
    assert shipped[name].model_flops == pytest.approx(tokens * hand_flops_per_token(config), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "executed"),
    [("quickstart", 1.0), ("moonlet", 1.0), ("moonlight", 1.0), ("dsv2", 4 / 3), ("dsv3", 4 / 3)],
)
def test_executed_flops_add_vectors_padding_and_recomputation(shipped, name: str, executed: float) -> None:
    """recompute = "full" runs the forward pass again: a third more."""
    assert executed * 0.95 < shipped[name].flops / shipped[name].model_flops < executed * 1.06


@pytest.mark.parametrize("name", NATURAL)
def test_memory_of_weights_and_optimizer_by_hand(shipped, name: str) -> None:
    found, config, world = shipped[name], load(CONFIGS / f"{name}.toml"), NATURAL[name]
    counts, ranks = hand_counts(config), config.rdep.ranks
    expert = counts["expert"] // ranks
    groups = world // ranks
    narrow = 4 if config.schedule.precision == "fp32" else 2
    moment = {"fp32": 4, "bf16": 2}[config.optim.state_precision]
    sharded = (counts["narrow"] + counts["wide"]) / world + expert / groups
    masters = 0 if narrow == 4 else 4 * (counts["narrow"] / world + expert / groups)
    expected = {
        "working weights": narrow * (counts["narrow"] + expert) + 4 * counts["wide"],
        "FP32 masters": masters,
        "FP32 gradients": 4 * (counts["narrow"] + counts["wide"] + expert),
        "moments": 2 * moment * sharded,
    }
    for label, size in expected.items():
        slack = 5000 * 4 if label in ("FP32 masters", "moments") else 0  # parameters and shares are aligned
        assert size <= found.memory[label] <= size + slack, label
    total = sum(counts.values())
    assert found.parameters.total + found.parameters.mtp == total
    biases = 4 * config.moe.experts * sum(layer.ffn == "moe" for layer in layers(config))
    biases += 4 * config.moe.experts * config.model.mtp_depth
    assert found.checkpoint_bytes == total * (4 + 2 * moment) + (biases if config.moe.bias_rate else 0)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("moonlight", 15.96e9, 2.91e9), ("dsv2", 235.7e9, 21.4e9), ("dsv3", 671.0e9, 37.6e9)],
)
def test_published_sizes(shipped, name: str, total: float, active: float) -> None:
    assert shipped[name].parameters.total == pytest.approx(total, rel=1e-3)
    assert shipped[name].parameters.active == pytest.approx(active, rel=3e-3)


def test_quantized_weights_are_two_copies_of_every_layer_matrix(shipped) -> None:
    config = load(CONFIGS / "moonlet.toml")
    counts = hand_counts(config)
    matrices = counts["narrow"] - 2 * config.model.vocab_size * config.model.hidden_size + counts["expert"]
    size = 2 * matrices * 33 / 32  # E4M3 and a scale for each 32
    assert size <= shipped["moonlet"].memory["quantized weights"] <= size + 256 * 2 * 200


def test_a_rank_allocates_what_is_planned(tiny) -> None:
    """All that the trainer's step holds, less the padding between parameters in its flat buffers."""
    from nmoe.rdep.sums import ROW
    from nmoe.shards import ALIGNMENT
    from nmoe.step import Step

    for schedule in ({"precision": "fp32"}, {"precision": "mxfp8", "recompute": "full"}):
        sizes = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
        turns = {"batch_size": 6, "micro_batch_size": 2}
        config = tiny(schedule=schedule, attention=sizes, optim={"state_precision": "bf16"}, train=turns)
        step = Step(config)
        masters = [shard.master for shard in step.parameters.shards]
        partial = [tensor for tensors in step._sums._partial for tensor in tensors]
        tensors = [*step.tensors.values(), *step.executors[0].tensors.values(), step.executors[0].arena,
                   step.optimizer.m, step.optimizer.v, *masters, *partial]  # fmt: skip
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        padded = {n: -t.numel() % ALIGNMENT for n, t in step.parameters.weights.items()}
        narrow = {n for n in padded if step.schedule.graph.tensors[n].format == "bf16"}
        slack = sum(pad * (4 + (2 if n in narrow else 4)) for n, pad in padded.items())
        counted = sum(
            t.numel() for n, t in step.tensors.items() if n.startswith("loss.") or n.endswith(".load")
        )
        slack += -counted % ROW * 4 + 2 * -(-counted // ROW) * ROW * 4
        assert sum(held.values()) - slack == sum(memory_plan(config, 1, step.schedule, 8).values())


# ---- more ranks ---------------------------------------------------------------------------------------------


def test_more_groups_share_the_optimizer_and_nothing_else() -> None:
    config = load(CONFIGS / "moonlight.toml")
    one, four = plan.plan(config, 8), plan.plan(config, 32)
    for label in one.memory:
        if label in ("FP32 masters", "moments"):
            assert one.memory[label] / 4 <= four.memory[label] <= one.memory[label] / 4 + 5000 * 4
        else:
            assert one.memory[label] == four.memory[label]
    assert four.micro_batches * 4 == one.micro_batches
    for label in ("computing", "waiting for expert rows"):
        assert four.seconds[label] * 4 == pytest.approx(one.seconds[label])
    assert four.wires["gradients and weights"].network > 0 == one.wires["gradients and weights"].network


def test_recomputing_trades_activations_for_work() -> None:
    config = load(CONFIGS / "moonlet.toml")
    plans = [
        plan.plan(replace(config, schedule=replace(config.schedule, recompute=policy)))
        for policy in ("none", "selective", "full")
    ]
    sizes = [found.memory["activations"] for found in plans]
    assert sizes[0] > sizes[1] > 3 * sizes[2]
    assert plans[0].flops < plans[1].flops < plans[2].flops
    assert len({found.model_flops for found in plans}) == 1


def test_full_recomputation_keeps_what_crosses_layers_and_what_the_router_decided(tiny) -> None:
    config = replace(
        tiny(schedule={"precision": "mxfp8", "recompute": "full"},
             attention={"qk_nope_head_dim": 32, "qk_rope_head_dim": 32}), target=Target("sm_100a"))  # fmt: skip
    schedule = lower(config)
    turn = next(i for i, call in enumerate(schedule.calls) if call.ops[0].stage == "backward")
    step_made = {out for op in schedule.graph.ops if op.phase == "step" for out in op.outputs}
    kept = {life.name for life in schedule.lifetimes.values() if life.start < turn <= life.end} - step_made
    crossing = {
        "embed.apply.x",
        "layers.*.attn.residual.y",
        "layers.*.residual.*.y",
    }  # the adds share buffers
    decided = {f"layers.*.moe.route.{x}" for x in ("indices", "weights", "logits")}
    decided |= {f"layers.*.moe.plan.{x}" for x in ("slots", "row_source", "offsets")}
    ends = {"final_norm.apply.rstd", "loss.main.apply.bwd.dh"}
    assert {re.sub(r"\d", "*", name) for name in kept} == crossing | decided | ends


# ---- wires: the numbers of rdep.md, section 4 (i) -----------------------------------------------------------

MOONLIGHT = Moe(experts=64, topk=6, intermediate_size=1408)
DSV3 = Moe(experts=256, topk=8, intermediate_size=2048)
ROW_BYTES = {
    "bf16": lambda width: sum(row_parts(Spec(("R", width), "bf16"))),
    "mxfp8": lambda width: sum(row_parts(Spec(("R", width), "mxfp8", 1))),
    "nvfp4": lambda width: width // 2 + width // 16,  # as it would be; such rows travel in BF16
}


@pytest.mark.parametrize(
    ("moe", "width", "ranks", "bandwidth", "expected"),
    [
        (MOONLIGHT, 2048, 2, 387e9, (260, 134, 73)),
        (MOONLIGHT, 2048, 8, 387e9, (455, 235, 128)),
        (MOONLIGHT, 2048, 8, 700e9, (252, 130, 71)),
        (DSV3, 7168, 8, 700e9, (1174, 606, 330)),
        (DSV3, 7168, 2, 387e9, (1214, 626, 341)),
    ],
)
def test_dispatch_inside_a_node(moe: Moe, width: int, ranks: int, bandwidth: float, expected) -> None:
    for format, microseconds in zip(("bf16", "mxfp8", "nvfp4"), expected, strict=True):
        wire = dispatch_wire(moe, 8192, ROW_BYTES[format](width), ranks, 8)
        assert 1e6 * wire.nvlink / bandwidth == pytest.approx(microseconds, rel=6e-3)
        assert wire.network == 0
    assert return_wire(moe, 8192, 2 * width, ranks, 8) == dispatch_wire(moe, 8192, 2 * width, ranks, 8)


@pytest.mark.parametrize(
    ("moe", "width", "nodes", "dispatch", "back"),
    [(MOONLIGHT, 2048, 3.35, (1.68, 0.87, 0.47), 3.02), (DSV3, 7168, 3.61, (6.37, 3.28, 1.79), 14.1)],
)
def test_between_four_nodes(moe: Moe, width: int, nodes: float, dispatch, back: float) -> None:
    assert spread(moe, 4) == pytest.approx(nodes, abs=0.006)
    for format, milliseconds in zip(("bf16", "mxfp8", "nvfp4"), dispatch, strict=True):
        wire = dispatch_wire(moe, 8192, ROW_BYTES[format](width), 32, 8)
        assert 1e3 * wire.network / 50e9 == pytest.approx(milliseconds, rel=0.01)
    assert 1e3 * return_wire(moe, 8192, 2 * width, 32, 8).network / 50e9 == pytest.approx(back, rel=0.01)


def test_group_limited_routing_reaches_fewer_nodes() -> None:
    limited = replace(DSV3, groups=8, topk_groups=4)
    assert spread(limited, 8) == pytest.approx(4 * (1 - math.comb(96, 8) / math.comb(128, 8)))
    assert spread(limited, 8) < 4 < spread(DSV3, 8)
    assert spread(limited, 4) == spread(DSV3, 4)  # two groups a node: no promise


def test_wires_of_a_step(shipped) -> None:
    """Moonlight, 8 ranks, selective recomputation: T k f rows, of H + H / 32 bytes in MXFP8 to the experts and 2H back,
    in backward with 4 more."""
    found = shipped["moonlight"]
    rows = 26 * 8 * 4 * 4096 * 6 * 7 / 8  # layers, micro-batches, sequences, tokens, choices, remote share
    assert found.wires["dispatch"] == Wire(pytest.approx(rows * (2048 + 64)), 0)
    assert found.wires["dispatch, backward"] == Wire(pytest.approx(rows * (2048 + 64)), 0)
    assert found.wires["return"] == Wire(pytest.approx(rows * 4096), 0)
    assert found.wires["return, backward"] == Wire(pytest.approx(rows * 4100), 0)


def test_rdep_buffers_by_hand(shipped) -> None:
    tokens = 4 * 4096
    assert shipped["moonlight"].memory["RDEP buffers"] == tokens * 6 * (4100 + 26 * 4) + 8 * 64 * 4, (
        "rows arrive in the arena; 26 layers keep the order of their choices"
    )
    assert shipped["moonlet"].memory["RDEP buffers"] == 0


def test_rails_by_hand(shipped) -> None:
    """dsv2, groups of 80 ranks on hosts of 8: from and to 9 other hosts, rows of 5120 in MXFP8 with an origin and 6
    places and weights each; what the host's tokens chose, once, in BF16 with a place and a gradient each, from a
    multiple of 8 rows of each host on; and how many these are."""
    rows, returns = 4096 * (5120 + 160 + 4 + 6 * 8), (8 * 4096 * 6 + 8 * 9) * (2 * 5120 + 8)
    assert shipped["dsv2"].memory["rails between hosts"] == 2 * 9 * (rows + 2 * 4) + returns
    assert shipped["moonlight"].memory["rails between hosts"] == 0, "one host"
    assert "2.41 GB  rails between hosts" in format_plan(shipped["dsv2"])


@pytest.mark.parametrize("name", ["moonlight", "dsv2", "dsv3"])
def test_rows_of_the_shipped_configs_have_kernels(name: str) -> None:
    """On hosts of 8 GPUs, in groups of 8, 80 and 256 ranks."""
    config = load(CONFIGS / f"{name}.toml")
    schedule = lower(config, sequences=micro_batch(config, NATURAL[name]))
    transfers = transfers_of(schedule, 8)
    assert len(transfers) == (9 if name == "moonlight" else 20)
    for problem in transfers:
        problem.require_legal(problem.untuned(config.target.device), config.target.device)


@pytest.mark.parametrize(
    ("members", "near", "expected"),
    [
        (1, 8, Wire(0, 0)),
        (8, 8, Wire(875, 0)),
        (2, 8, Wire(500, 0)),
        (16, 8, Wire(875, 62.5)),
        (4, 1, Wire(0, 750)),
    ],
)
def test_reduce_scatter_and_all_gather(members: int, near: int, expected: Wire) -> None:
    assert sync_wire(members, near, 600, 400) == expected


def test_the_slower_kind_of_link_decides() -> None:
    b200 = TABLE["B200"]
    assert Wire(702e9, 0).seconds(b200) == pytest.approx(1.0)
    assert Wire(702e9, 80e9).seconds(b200) == pytest.approx(2.0)


# ---- work and time ------------------------------------------------------------------------------------------


def test_a_fused_kernel_moves_only_what_is_stored(shipped) -> None:
    """gemm1 with SwiGLU and both quantized copies: reads rows, weights and router weights, writes the pre-activation
    for backward and the two copies of the activation."""
    config = load(CONFIGS / "moonlet.toml")
    schedule = lower(replace(config, schedule=replace(config.schedule, recompute="none")))
    (call,) = [c for c in schedule.calls if c.name == "layers.1.moe.gemm1"]
    assert [op.kind for op in call.ops] == ["grouped_gemm", "swiglu", "quantize", "quantize"]
    rows = 1280
    cost = predict.call_cost(schedule, call, {"R": rows})
    k, n, experts = 2048, 1408, 64
    fp8 = 33 / 32
    traffic = fp8 * (rows * k + experts * 2 * n * k + 2 * rows * n) + 2 * rows * 2 * n + 4 * rows
    assert cost.bytes == pytest.approx(traffic)
    assert cost.flops == pytest.approx(2 * rows * k * 2 * n + 6 * rows * n + 2 * 4 * rows * n)


def test_expected_rows_are_balanced_padded_and_never_more_than_the_buffers() -> None:
    config = load(CONFIGS / "moonlight.toml")
    schedule = lower(config)
    balanced = 4 * 4096 * 6
    rows = predict.expected_rows(config, schedule)["R"]
    assert balanced < rows <= balanced + 8 * 128 and rows % 128 == 0
    tight = replace(config, rdep=replace(config.rdep, capacity=balanced))
    assert predict.expected_rows(tight, lower(tight)) == {"R": balanced}


def call(stream: int, *waits: int) -> Call:
    return Call((Op("op", "add", (), ()),), stream, waits)


def test_timeline_runs_the_shared_expert_while_rows_travel() -> None:
    #        norm        dispatch       shared        gemm          combine       residual
    calls = (call(MAIN), call(COMM, 0), call(SIDE, 0), call(MAIN, 1), call(COMM, 3), call(MAIN, 4, 2))
    assert timeline(calls, [1, 5, 3, 2, 4, 1]) == (13, 7)  # the shared expert hides in the dispatch
    assert timeline(calls, [1, 5, 9, 2, 4, 1]) == (
        17,
        13,
    )  # it outlasts the dispatch, and the GEMM waits its turn
    assert timeline(calls, [1, 0, 3, 2, 0, 1]) == (7, 7)


@given(
    st.lists(
        st.tuples(st.sampled_from([MAIN, COMM, SIDE]), st.integers(0, 9), st.sets(st.integers(0, 30))),
        min_size=1,
        max_size=30,
    )
)
def test_timeline_is_bounded_by_the_units_and_by_running_one_at_a_time(rows) -> None:
    calls = tuple(call(s, *sorted(w for w in waits if w < i)) for i, (s, _, waits) in enumerate(rows))
    seconds = [float(t) for _, t, _ in rows]
    whole, computing = timeline(calls, seconds)
    wires = sum(t for (s, _, _), t in zip(rows, seconds, strict=True) if s == COMM)
    assert computing == sum(seconds) - wires
    assert max(computing, wires) <= whole <= sum(seconds)


@pytest.mark.parametrize("name", NATURAL)
def test_predictions_respect_the_device(shipped, name: str) -> None:
    found = shipped[name]
    device = found.device
    assert found.step_seconds > found.model_flops / max(device.peak.values())
    assert found.step_seconds > found.bytes / device.bandwidth / 3  # kernels on several streams share it
    assert 0 < found.mfu < 1
    assert found.tokens_per_second == pytest.approx(found.tokens / found.step_seconds)
    assert all(value >= 0 for value in found.seconds.values())


def test_precision_decides_the_peak() -> None:
    """The same model in BF16, MXFP8 and NVFP4: each is faster than the one before, by less than its peak is."""
    config = load(CONFIGS / "moonlet.toml")
    bf16, mxfp8, nvfp4 = (
        plan.plan(replace(config, schedule=replace(config.schedule, precision=p))).seconds["computing"]
        for p in ("bf16", "mxfp8", "nvfp4")
    )
    assert bf16 / 2 < mxfp8 < bf16 and mxfp8 / 2 < nvfp4 < mxfp8


# ---- shipped configs and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATURAL)
def test_shipped_configs_fit(shipped, name: str) -> None:
    found = shipped[name]
    assert found.memory_bytes <= found.device.memory * found.device.usable
    text = format_plan(found)
    assert text.splitlines()[0].startswith(
        f"{name} on {NATURAL[name]} x {found.device.name} ({found.device.target})"
    )
    assert f"memory of a rank: {plan.amount(found.memory_bytes, 'B')} of" in text
    assert "predicted" in text and max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize("name", [name for name in NATURAL if name != "quickstart"])
def test_the_documented_predictions_are_those_of_this_build(shipped, name: str) -> None:
    found = shipped[name]
    waiting = found.seconds["waiting for expert rows"] / found.step_seconds
    row = (
        f"| {name} | {found.world} x B200 | {found.memory_bytes / 1e9:.0f} GB | {found.step_seconds:.2f} s | "
        f"{found.tokens_per_second / found.world:,.0f} | {100 * found.mfu:.0f}% of {found.config.schedule.precision} | "
        f"{100 * waiting:.0f}% |"
    )
    assert row in (CONFIGS.parent / "docs/plan.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (171e9, "171 GB"), (2.5e15, "2.5 PB")],
)
def test_amounts_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert plan.amount(value, "B") == text


def refusal(config: Config, world: int, device: Device | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        plan.plan(config, world, device)
    return str(caught.value)


@pytest.mark.parametrize(
    ("env", "world", "message"),
    [
        ({}, 1, "[rdep] ranks = 8, expected a divisor of the number of ranks; use 8 ranks or [rdep] ranks = 1"),
        ({}, 12, "[rdep] ranks = 8, expected a divisor of the number of ranks; use 16 ranks or [rdep] ranks = 4"),
        ({"NMOE_TRAIN__BATCH_SIZE": "252"}, 8, "[train] batch_size = 252 sequences, expected a multiple of the number "
                                               "of ranks; use batch_size = 256"),
        ({"NMOE_TRAIN__BATCH_SIZE": "240"}, 8, "[train] micro_batch_size = 4, expected a divisor of the 30 sequences "
                                               "of a rank; use micro_batch_size = 2"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_divide(env: dict[str, str], world: int, message: str) -> None:
    config = load(CONFIGS / "moonlight.toml", env=env)
    assert refusal(config, world) == f"moonlight on {world} rank(s): {message}"


def test_ranks_default_to_a_rank_running_its_whole_share() -> None:
    config = load(CONFIGS / "moonlight.toml", env={"NMOE_TRAIN__MICRO_BATCH_SIZE": "0"})
    assert micro_batch(config, 32) == 8


def test_what_does_not_fit_names_the_largest_and_every_key_that_helps() -> None:
    config = load(CONFIGS / "moonlet.toml", env={"NMOE_TRAIN__MICRO_BATCH_SIZE": "16"})
    lines = refusal(config, 1).splitlines()
    assert re.fullmatch(
        r"moonlet on 1 rank\(s\) needs [\d.]+ GB a rank, of which activations [\d.]+ GB, FP32 gradients 29\.4 GB, "
        r"moments 29\.4 GB; B200 has 171\.0 GB usable of 180\.0 GB",
        lines[0],
    )
    assert re.fullmatch(r" +[\d.]+ GB  loss\.main\.apply\.logits\.y", lines[1])
    assert lines[-1] == '  remedy: [train] micro_batch_size = 8 or [schedule] recompute = "full"'
    for change in ({"train": {"micro_batch_size": 8}}, {"schedule": {"recompute": "full"}}):
        ((section, keys),) = change.items()  # the remedies hold
        plan.plan(replace(config, **{section: replace(getattr(config, section), **keys)}))


@pytest.fixture
def heavy(tiny) -> Config:
    """A config whose activations dwarf its parameters, to be planned on devices of any size."""
    return tiny(train={"batch_size": 64, "seq_len": 2048, "micro_batch_size": 8})


def sized(bytes_: float) -> Device:
    return replace(CPU, memory=bytes_, usable=1.0)


def needs(config: Config) -> int:
    return sum(memory_plan(config, 1, lower(config), 8).values())


def remedy(config: Config, bytes_: float) -> str:
    return refusal(config, 1, sized(bytes_)).splitlines()[-1]


def test_remedies_are_the_mildest_values_that_fit(heavy: Config) -> None:
    smaller = replace(heavy, train=replace(heavy.train, micro_batch_size=4))
    assert "[train] micro_batch_size = 4" in remedy(heavy, needs(smaller))
    assert "[train] micro_batch_size = 2" in remedy(heavy, needs(smaller) - 1)


def test_remedies_together_when_none_is_enough_alone(heavy: Config) -> None:
    least = replace(heavy, train=replace(heavy.train, micro_batch_size=1))
    policy = {p: replace(least, schedule=replace(least.schedule, recompute=p)) for p in ("selective", "full")}
    assert needs(policy["full"]) < needs(policy["selective"]) < needs(least)
    for name, config in policy.items():
        expected = f'  remedy: [train] micro_batch_size = 1 with [schedule] recompute = "{name}"'
        assert remedy(heavy, needs(config)) == expected


def test_no_remedy_is_said_to_be_none(heavy: Config) -> None:
    assert remedy(heavy, 1000) == (
        "  remedy: none of micro_batch_size, recompute, state_precision, ranks, capacity, seq_len and precision is "
        "enough: use more ranks (--world), a smaller model or a device with more memory"
    )


def test_more_ranks_are_a_remedy() -> None:
    """Moonlight with moments in BF16 and everything recomputed, on a device that its masters alone overfill."""
    config = load(CONFIGS / "moonlight.toml", env={"NMOE_SCHEDULE__RECOMPUTE": "full",
                                                   "NMOE_OPTIM__STATE_PRECISION": "bf16",
                                                   "NMOE_TRAIN__MICRO_BATCH_SIZE": "1",
                                                   "NMOE_RDEP__CAPACITY": "49152"})  # fmt: skip
    enough = sum(memory_plan(config, 16, lower(config), 8).values())
    assert refusal(config, 8, replace(TABLE["B200"], memory=enough, usable=1.0)).endswith(
        "remedy: --world 16"
    )


def test_last_resorts_change_the_experiment() -> None:
    """DeepSeek-V3 in MXFP8 fits no B200 at any number of ranks: the weights' second copies are too much."""
    config = load(CONFIGS / "dsv3.toml", env={"NMOE_SCHEDULE__PRECISION": "mxfp8"})
    assert refusal(config, 512).endswith('remedy: [schedule] precision = "nvfp4"')


# ---- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", TABLE.values(), ids=TABLE)
def test_every_device_is_complete(device: Device) -> None:
    precisions = {"fp32", "bf16", "mxfp8", "nvfp4"}
    assert set(device.peak) == precisions
    assert set(device.attained) == precisions | {"attention", "memory", "nvlink", "network"}
    assert all(0 < share <= 1 for share in (*device.attained.values(), device.usable))
    assert device.sources


def test_devices_by_target_and_by_name() -> None:
    assert devices.of_target("sm_100a").name == "B200" and devices.of_target("sm_90a").name == "H100"
    assert devices.of_name("NVIDIA H100 80GB HBM3").name == "H100"
    assert devices.peak_flops("sm_100a", "nvfp4") == 9e15
    assert devices.peak_flops("sm_90a", "mxfp8") == devices.peak_flops("sm_90a", "bf16") == 989e12
    with pytest.raises(UserError) as caught:
        devices.of_name("NVIDIA A100")
    assert str(caught.value) == (
        "device 'NVIDIA A100' is not in nmoe/devices.py, which has B200, H100, H200; add its data sheet"
    )


def test_a_cpu_is_measured_once_a_process() -> None:
    first = devices.of_target("cpu")
    assert devices.of_target("cpu") is first
    assert first.peak["mxfp8"] == first.peak["bf16"] == devices.peak_flops("cpu", "mxfp8")
    assert first.peak["fp32"] == devices.peak_flops("cpu", "nvfp4") > 0
    assert first.name.endswith(f", {torch.get_num_threads()} thread(s)") and first.bandwidth > 0
