"""Kernel specs: one kernel for equal work, another for other work, and nothing that only varies in data."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from nmoe.codegen.spec import ATTRIBUTES, KernelSpec, format_specs, specs
from nmoe.config import Config, Target, load
from nmoe.ops import OPS
from nmoe.schedule import lower

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def gpu(tiny) -> Config:
    sizes = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "q_lora_rank": 32}
    config = tiny(
        attention=sizes, schedule={"precision": "mxfp8", "recompute": "full"}, moe={"balance_loss": 0.1}
    )
    return replace(config, target=Target("sm_100a"))


def keys(config: Config) -> set[str]:
    return {spec.key for spec in specs(lower(config))}


def change(config: Config, key: str, value: object) -> Config:
    *path, name = key.split(".")
    node: Any = config
    parents = []
    for part in path:
        parents.append((node, part))
        node = getattr(node, part)
    node = replace(node, **{name: value})
    for parent, part in reversed(parents):
        node = replace(parent, **{part: node})
    return node


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 7),
        ("run.name", "other"),
        ("train.batch_size", 8),
        ("train.seq_len", 64),
        ("rdep.capacity", 4096),
        ("model.norm_eps", 1e-3),
        ("model.attention.rope_theta", 5.0),
        ("model.mtp_loss_weight", 0.1),
        ("moe.route_scale", 3.0),
        ("moe.balance_loss", 0.2),
        ("optim.lr", 1.0),
    ],
)
def test_what_only_varies_in_data_shares_the_kernels(gpu: Config, key: str, value: object) -> None:
    assert keys(change(gpu, key, value)) == keys(gpu)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target.device", "sm_90a"),
        ("model.hidden_size", 128),
        ("model.attention.heads", 4),
        ("moe.topk", 3),
        ("moe.experts", 8),
        ("moe.score", "softmax"),
        ("moe.normalize_topk", False),
        ("moe.balance_loss", 0.0),
        ("moe.z_loss", 0.1),
        ("moe.bias_rate", 0.0),
        ("moe.intermediate_size", 64),
        ("schedule.precision", "nvfp4"),
        ("schedule.wgrad", "bf16"),
    ],
)
def test_what_changes_code_changes_kernels(gpu: Config, key: str, value: object) -> None:
    assert keys(change(gpu, key, value)) != keys(gpu)


def test_equal_layers_share_kernels_and_every_launch_is_named_once(gpu: Config) -> None:
    schedule = lower(gpu)
    uses = specs(schedule)
    named = [name for calls in uses.values() for name in calls]
    assert sorted(named) == sorted(call.name for call in schedule.calls if call.phase != "init")
    for op in ("gemm1", "gemm2"):
        (shared,) = [calls for calls in uses.values() if f"layers.1.moe.{op}" in calls]
        assert f"layers.2.moe.{op}" in shared


def test_one_more_layer_needs_no_new_kernel(gpu: Config) -> None:
    dense, moe = gpu.model.layers
    deeper = change(gpu, "model.layers", (dense, replace(moe, repeat=5)))
    assert keys(deeper) == keys(gpu)


def test_the_expert_gemm_with_its_epilogues(gpu: Config) -> None:
    (spec,) = [s for s, calls in specs(lower(gpu)).items() if "layers.1.moe.gemm1" in calls]
    assert spec.name == "grouped_gemm.fprop"
    assert [part.kind for part in spec.parts] == ["grouped_gemm", "swiglu", "quantize"]
    rows, weights, offsets, router_weight = spec.inputs
    assert (str(rows), rows.segments, rows.scales) == ("mxfp8/row[Rx64]", 4, "blocked")
    assert (str(weights), weights.segments) == ("mxfp8/row[4x64x64]", 0)
    assert (str(offsets), str(router_weight)) == ("i32[5]", "f32[R]")
    assert [str(value) for value in spec.outputs] == ["mxfp8/row[Rx32]"]
    assert dict(spec.parts[2].attrs) == {"hadamard": False, "rounding": "nearest", "square": False}
    # the pre-activation is computed again for backward, so forward keeps it and the activation in registers
    assert [str(value) for value in spec.values if not value.stored] == ["bf16[Rx64]", "bf16[Rx32]"]


def test_sm_90a_dequantizes_from_plain_rows(gpu: Config) -> None:
    layouts = {v.scales for spec in specs(lower(change(gpu, "target.device", "sm_90a"))) for v in spec.values}
    assert layouts == {"", "rows"}


def test_json_round_trip_and_key_in_another_process(gpu: Config) -> None:
    every = list(specs(lower(gpu)))
    assert [KernelSpec.from_json(spec.json()) for spec in every] == every
    assert len({spec.key for spec in every}) == len(every)
    program = "import sys; from nmoe.codegen.spec import KernelSpec; print(KernelSpec.from_json(sys.stdin.read()).key)"
    spec = next(s for s in every if s.name == "router")
    done = subprocess.run(
        [sys.executable, "-c", program], input=spec.json(), text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == spec.key
    assert len(spec.key) == 16


def test_no_token_count_in_any_spec() -> None:
    """41 sequences of 7 · 32 tokens: numbers that no other size of the model has."""
    config = load(CONFIGS / "moonlet.toml", env={"NMOE_TRAIN__SEQ_LEN": "224", "NMOE_TRAIN__BATCH_SIZE": "41",
                                                 "NMOE_TRAIN__MICRO_BATCH_SIZE": "41", "NMOE_OPTIM__WARMUP_TOKENS": "0",
                                                 "NMOE_OPTIM__DECAY_TOKENS": "0"})  # fmt: skip
    schedule = lower(config)
    counts = {224, 41, 41 * 224, schedule.dims["R"]}
    for spec in specs(schedule):
        numbers = {d for value in spec.values for d in value.shape if isinstance(d, int)}
        numbers |= {value for part in spec.parts for _, value in part.attrs if type(value) is int}
        assert not numbers & counts, spec.name


def test_every_attribute_of_every_op_has_a_meaning() -> None:
    """A new attribute must be classified, or specs() would not know whether it changes code."""
    ours = {kind for kind in OPS if not kind.startswith("test.")}  # tests/harness.py registers a few
    assert set(ATTRIBUTES) == ours - {"rope_table"}
    assert {meaning for table in ATTRIBUTES.values() for meaning in table.values()} == {
        "code", "flag", "launch", "shape"}  # fmt: skip


@pytest.mark.parametrize("name", ["moonlet", "moonlight", "dsv2", "dsv3"])
def test_shipped_configs_need_about_a_hundred_kernels(name: str) -> None:
    config = load(CONFIGS / f"{name}.toml")
    uses = specs(lower(config))
    assert 40 < len(uses) <= 110  # a few shapes, whatever the depth: compiled in minutes
    lines = format_specs(config, uses).splitlines()
    assert lines[0].startswith(f"{name} for sm_100a: {len(uses)} kernels, ")
    assert [line.split()[0] for line in lines[1:]] == [spec.key for spec in uses]


def test_the_cpu_target_has_none() -> None:
    config = load(CONFIGS / "quickstart.toml")
    uses = specs(lower(config))
    assert uses == {}
    assert format_specs(config, uses) == (
        "quickstart for cpu: no kernels to build; this target runs each op's reference math"
    )


def test_a_spec_is_data(gpu: Config) -> None:
    spec = next(iter(specs(lower(gpu))))
    assert [field.name for field in fields(spec)] == ["target", "values", "parts"]
    assert set(json.loads(spec.json())) == {"target", "values", "parts"}
