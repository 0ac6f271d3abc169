"""Whole models, forward and backward in float64, against plain PyTorch with autograd: what transformers lacks.

(Parity with transformers' DeepseekV3 is in test_parity.py.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import POISONS, close, poisoned_run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_model import OracleModel
from tiny import tiny_config

from nmoe.config import Config, LayerGroup
from nmoe.executor import Executor, allocate
from nmoe.model import is_norm
from nmoe.schedule import lower


def initialise(tensors, schedule, seed):
    """Weights large enough that every part of the model matters to the loss."""
    g = torch.Generator().manual_seed(seed)
    for name, x in tensors.items():
        kind = schedule.graph.tensors[name].kind
        if kind == "param":
            value = torch.randn(x.shape, generator=g, dtype=torch.float64)
            x.copy_(1 + 0.2 * value if is_norm(name) else value / x.shape[-1] ** 0.5)
        elif name.endswith("router_bias"):
            x.copy_(torch.randn(x.shape, generator=g) * 0.1)


def batches(config: Config, micro: int, seed: int, documents: bool):
    """Micro-batches of tokens, positions and targets; with `documents`, several end in every sequence."""
    g = torch.Generator().manual_seed(seed)
    seq, sequences = config.train.seq_len, config.train.batch_size
    tokens = torch.randint(config.model.vocab_size, (sequences, seq + 2), generator=g)
    ends = torch.rand(sequences, seq + 2, generator=g) < (0.1 if documents else 0.0)
    positions = torch.zeros(sequences, seq, dtype=torch.int64)
    for column in range(1, seq):
        positions[:, column] = (positions[:, column - 1] + 1) * ~ends[:, column - 1]
    targets = tokens[:, 1:-1].masked_fill(ends[:, :-2], -1)
    mtp = tokens[:, 2:].masked_fill(ends[:, :-2] | ends[:, 1:-1], -1)
    for at in range(0, sequences, micro):
        rows = slice(at, at + micro)
        yield {"tokens": tokens[rows, :-2].flatten(), "positions": positions[rows].flatten(),
               "targets": targets[rows].flatten(), "mtp_targets": mtp[rows].flatten()}  # fmt: skip


def compare_with_oracle(config: Config, seed: int = 0, *, documents: bool = True, micro: int = 0) -> None:
    micro = micro or config.train.batch_size
    schedule = lower(config, sequences=micro, activation="f64", debug=True)
    tensors = allocate(schedule)
    initialise(tensors, schedule, seed)
    names = {kind: [t.name for t in schedule.graph.of_kind(kind)] for kind in ("param", "state")}
    params = {name: tensors[name].clone().requires_grad_() for name in names["param"]}
    biases = {name: tensors[name].clone() for name in names["state"] if name.endswith("router_bias")}
    oracle, executor = OracleModel(config, params, biases), Executor(schedule, tensors)
    scale, losses = 0.01, {}
    for batch in batches(config, micro, seed, documents):
        for name, x in batch.items():
            if name in tensors:
                tensors[name].copy_(x)
        tensors["scale"].fill_(scale)
        executor.run("micro")
        for name, value in oracle.loss(**batch, scale=scale).items():
            losses[name] = losses.get(name, 0.0) + value
    sum(losses.values()).backward()
    for name, value in losses.items():
        weight = config.model.mtp_loss_weight if name == "loss.mtp" else 1.0
        if name in tensors:
            close(tensors[name] * weight, value.detach()[None], 1e-11, name)
        else:
            assert value == 0
    for name in names["param"]:
        close(tensors[f"{name}.grad"] * 1e3, params[name].grad * 1e3, 1e-10, f"gradient of {name}")
        assert params[name].grad.abs().sum() > 0, f"{name} does not matter to the loss"


LOCAL = replace(tiny_config().model.layers[1], attention=("local", "global"))
CASES = {
    "plain": {},
    "q_lora": {"attention": {"q_lora_rank": 16}},
    "mtp": {"model": {"mtp_depth": 1}},
    "mtp and tied head": {"model": {"mtp_depth": 1, "tie_embeddings": True}},
    "tied head": {"model": {"tie_embeddings": True}},
    "local windows": {"model": {"layers": (tiny_config().model.layers[0], LOCAL)}, "attention": {"window": 5}},
    "balance loss": {"moe": {"balance_loss": 0.3}},
    "z-loss": {"moe": {"z_loss": 0.2}},
    "both losses, softmax": {"moe": {"balance_loss": 0.3, "z_loss": 0.2, "score": "softmax"}},
    "DeepSeek-V2 routing": {"moe": {"score": "softmax", "groups": 2, "topk_groups": 1, "normalize_topk": False,
                                    "route_scale": 16.0, "bias_rate": 0.0}},
    "DeepSeek-V3 routing": {"moe": {"experts": 8, "groups": 4, "topk_groups": 2, "topk": 3, "route_scale": 2.5}},
    "no shared expert": {"moe": {"shared_experts": 0}},
    "all experts": {"moe": {"topk": 4}},
    "dense": {"model": {"layers": (LayerGroup("dense", 2, intermediate_size=48),)}, "moe": None},
    "beyond a query block": {"train": {"seq_len": 160, "batch_size": 1}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_model(case):
    compare_with_oracle(tiny_config(**CASES[case]))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_model_with_recompute(recompute):
    compare_with_oracle(tiny_config(schedule={"recompute": recompute}, model={"mtp_depth": 1}))


@pytest.mark.parametrize("micro", [1, 2])
def test_gradients_accumulate_over_micro_batches(micro):
    config = tiny_config(
        train={"batch_size": 4}, moe={"balance_loss": 0.3, "z_loss": 0.2}, model={"mtp_depth": 1}
    )
    compare_with_oracle(config, micro=micro)


@st.composite
def configs(draw):
    """Random small models; sizes need not fit the low-precision blocks."""
    groups = draw(st.integers(1, 3))
    experts = groups * draw(st.integers(2, 3))
    topk_groups = draw(st.integers(1, groups))
    window = draw(st.sampled_from([0, 1, 4]))
    pattern = draw(st.sampled_from([("global",), ("local",), ("local", "global")])) if window else ("global",)
    return tiny_config(
        model={
            "hidden_size": draw(st.sampled_from([8, 12])), "vocab_size": draw(st.integers(5, 20)),
            "layers": (LayerGroup("dense", intermediate_size=draw(st.integers(1, 9))),
                       LayerGroup("moe", 2, pattern)),
            "tie_embeddings": draw(st.booleans()), "mtp_depth": draw(st.integers(0, 1)),
            "norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        },
        attention={
            "heads": draw(st.integers(1, 3)), "kv_lora_rank": draw(st.integers(1, 6)), "window": window,
            "q_lora_rank": draw(st.sampled_from([0, 3])), "qk_nope_head_dim": draw(st.integers(1, 5)),
            "qk_rope_head_dim": draw(st.sampled_from([2, 4])), "v_head_dim": draw(st.integers(1, 5)),
        },
        moe={
            "experts": experts, "groups": groups, "topk_groups": topk_groups,
            "topk": draw(st.integers(1, min(3, topk_groups * experts // groups))),
            "intermediate_size": draw(st.integers(1, 6)), "shared_experts": draw(st.integers(0, 2)),
            "score": draw(st.sampled_from(["sigmoid", "softmax"])), "normalize_topk": False,
            "balance_loss": draw(st.sampled_from([0.0, 0.3])), "z_loss": draw(st.sampled_from([0.0, 0.1])),
        },
        schedule={"recompute": draw(st.sampled_from(["none", "selective", "full"]))},
        train={"seq_len": draw(st.integers(2, 10)), "batch_size": 2},
    )  # fmt: skip


@given(configs(), st.integers(0, 99), st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_random_models(config, seed, micro):
    try:
        compare_with_oracle(config, seed, micro=micro)
    except AssertionError as error:
        if "does not matter" not in str(error):  # tiny random models have dead parts
            raise


PRECISIONS = ("fp32", "bf16", "mxfp8", "nvfp4")


def run_steps(config: Config, steps: int = 2, poison: int | None = None) -> dict[str, torch.Tensor]:
    """All persistent tensors after some steps on fixed data, weights following their gradients."""
    schedule = lower(config, debug=True)
    tensors = allocate(schedule)
    initialise(tensors, schedule, 0)
    arena = torch.full((schedule.arena_bytes,), poison or 0, dtype=torch.uint8)
    executor = Executor(schedule, tensors, arena)
    (batch,) = batches(config, config.train.batch_size, 0, True)
    for name, x in batch.items():
        if name in tensors:
            tensors[name].copy_(x)
    tensors["scale"].fill_(0.01)
    for _ in range(steps):
        for phase in ("step", "micro", "micro"):
            executor.run(phase) if poison is None else poisoned_run(executor, phase, poison)
            tensors["counter"] += 1
        for param in schedule.graph.of_kind("param"):
            grad = tensors[f"{param.name}.grad"]
            tensors[param.name].copy_(tensors[param.name].float() - 0.05 * grad)
            grad.zero_()
    executor.run("step")
    executor.run("micro")  # leaves gradients behind
    return tensors


@pytest.mark.parametrize("precision", PRECISIONS)
def test_recompute_changes_no_bit(precision):
    def tensors_of(recompute):
        model = {"mtp_depth": 1, "tie_embeddings": True}
        return run_steps(tiny_config(schedule={"precision": precision, "recompute": recompute}, model=model))

    none = tensors_of("none")
    assert all(bool(x.isfinite().all()) for x in none.values())
    for policy in ("selective", "full"):
        for name, x in tensors_of(policy).items():
            assert same_bits(x, none[name]), (
                f"{name} differs between recompute none and {policy} in {precision}"
            )


@pytest.mark.parametrize(
    "precision, recompute", [*(("fp32", r) for r in ("none", "selective", "full")), ("bf16", "full"), ("mxfp8", "none"),
                             ("mxfp8", "full"), ("nvfp4", "full")])  # fmt: skip
def test_nothing_reads_what_was_not_written_or_is_dead(precision, recompute):
    """Poison in every buffer before its op writes it and after its last reader changes no bit of a run: nothing reads
    unwritten or dead memory, no two live buffers share bytes, no op writes in place what is read again."""
    config = tiny_config(schedule={"precision": precision, "recompute": recompute}, model={"mtp_depth": 1})
    clean = run_steps(config, steps=1)
    for poison in POISONS:
        for name, x in run_steps(config, 1, poison).items():
            assert same_bits(x, clean[name]), f"{name} depends on poison {poison:#x}"
