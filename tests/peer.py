"""nmoe next to transformers' DeepSeek models: the same weights, tokens and loss; logits and gradients compared.

Shared by tests/test_hf.py and bench/parity.py. Every comparison goes through `nmoe.hf.export` and `from_pretrained`,
so the peer holds what the exporter wrote.
"""

from __future__ import annotations

import dataclasses
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import modeling_layers, modeling_rope_utils
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from nmoe import hf
from nmoe.config import (
    Attention,
    Checkpoint,
    Config,
    Data,
    LayerGroup,
    Metrics,
    Model,
    Moe,
    Optim,
    Run,
    Schedule,
    Source,
    Target,
    Train,
    Yarn,
    layers,
)
from nmoe.executor import Executor, allocate
from nmoe.parameters import Parameters
from nmoe.schedule import lower

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

BATCH, VOCAB, HIDDEN = 2, 61, 40


def make_config(
    *,
    moe: Moe | None,
    dense: int = 1,
    sparse: int = 1,
    heads: int = 2,
    q_lora_rank: int = 0,
    yarn: Yarn | None = None,
    seq_len: int = 24,
    **model: Any,
) -> Config:
    """A tiny model on the CPU in FP32; `model` replaces keys of [model]."""
    groups = [LayerGroup("dense", dense, intermediate_size=56)] if dense else []
    groups += [LayerGroup("moe", sparse)] if sparse else []
    attention = Attention(
        heads=heads,
        kv_lora_rank=12,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=14,
        q_lora_rank=q_lora_rank,
        yarn=yarn or Yarn(),
    )
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "init_std": 0.15} | model
    return Config(
        run=Run("tiny"),
        target=Target("cpu"),
        model=Model(attention=attention, layers=tuple(groups), **shape),
        moe=moe if sparse else None,
        optim=Optim(lr=1e-3),
        schedule=Schedule(precision="fp32"),
        train=Train(steps=1, batch_size=BATCH, seq_len=seq_len),
        data=Data(dir="data", tokenizer="hf:none", sources=(Source("none"),)),
        checkpoint=Checkpoint("checkpoints"),
        metrics=Metrics("metrics", "experiments.db"),
    )


def random_config(seed: int) -> Config:
    """Seeds walk through the combinations that matter; the sizes are drawn."""
    draw = random.Random(seed)
    softmax = seed % 4 == 3
    groups = draw.choice((1, 2, 4))
    yarn = (
        Yarn(
            factor=draw.choice((2.0, 4.0, 40.0)),
            original_seq_len=draw.choice((16, 32)),
            beta_fast=draw.choice((4.0, 32.0)),
            mscale=draw.choice((0.7, 1.0)),
            mscale_all_dim=draw.choice((0.0, 0.5, 1.0)),
        )
        if seed % 2
        else None
    )
    moe = Moe(
        experts=8,
        topk=draw.choice((2, 3, 4)),
        intermediate_size=draw.choice((12, 20)),
        shared_experts=seed % 3,
        groups=groups,
        topk_groups={1: 1, 2: 1, 4: draw.choice((2, 3))}[groups],
        score="softmax" if softmax else "sigmoid",
        normalize_topk=not softmax and seed % 8 != 0,
        route_scale=draw.choice((1.0, 2.5)),
        bias_rate=0.0 if softmax else 0.001,
    )
    return make_config(
        moe=moe,
        dense=seed % 3,
        sparse=draw.choice((1, 2)),
        heads=draw.choice((2, 4)),
        q_lora_rank=draw.choice((0, 16)),
        yarn=yarn,
        seq_len=draw.choice((16, 24, 144)),  # the last crosses attention's query blocks
        tie_embeddings=seed % 5 == 0,
        norm_eps=draw.choice((1e-6, 1e-5)),
        mtp_depth=int(seed % 6 == 4 and not softmax),
    )


def summary(config: Config) -> str:
    """One line of what distinguishes a random config."""
    model, moe, yarn = config.model, config.moe, config.model.attention.yarn
    kinds = [layer.ffn for layer in layers(config)]
    words = [
        f"{kinds.count('dense')} dense + {kinds.count('moe')} moe",
        f"q_lora {model.attention.q_lora_rank}",
    ]
    if moe:
        words += [f"{moe.score} top {moe.topk} of {moe.experts} in {moe.topk_groups}/{moe.groups} groups"]
        words += [f"{moe.shared_experts} shared", f"scale {moe.route_scale}"] + ["norm"] * moe.normalize_topk
    if yarn.factor > 1:
        words.append(f"yarn ×{yarn.factor:g} m{yarn.mscale:g}/{yarn.mscale_all_dim:g}")
    words += ["tied"] * model.tie_embeddings + ["mtp"] * model.mtp_depth
    return ", ".join([*words, f"eps {model.norm_eps:g}", f"{config.train.seq_len} tokens"])


def random_weights(config: Config, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FP32 parameters, norms away from one, and router biases away from zero."""
    graph = lower(config, sequences=BATCH).graph
    parameters = Parameters(graph)
    parameters.initialise(seed, config.model.init_std)
    generator = torch.Generator().manual_seed(seed)
    masters = parameters.masters()
    for weight in masters.values():
        if weight.dim() == 1:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    biases = [t for t in graph.of_kind("state") if t.name.endswith("router_bias")]
    return masters, {
        t.name: torch.randn([int(d) for d in t.shape], generator=generator) * 0.1 for t in biases
    }


def random_tokens(config: Config, seed: int = 0) -> Tensor:
    """int64[BATCH, seq_len + 2]: inputs, next tokens and the tokens after those."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (BATCH, config.train.seq_len + 2)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


# ---- nmoe -------------------------------------------------------------------------------------------


def _executor(config: Config, mode: Any, params: dict[str, Tensor], biases: dict[str, Tensor], tokens: Tensor,
              activation: str) -> Executor:  # fmt: skip
    schedule = lower(config, mode=mode, sequences=BATCH, activation=activation, debug=True)
    tensors = allocate(schedule)
    for name, value in {**params, **biases}.items():
        if name in tensors:
            tensors[name].copy_(value)
    seq = config.train.seq_len
    inputs = {"tokens": tokens[:, :seq], "targets": tokens[:, 1 : seq + 1], "mtp_targets": tokens[:, 2:],
              "positions": torch.arange(seq).expand(BATCH, seq)}  # fmt: skip
    for name, value in inputs.items():
        if name in tensors:
            tensors[name].copy_(value.reshape(-1))
    if "scale" in tensors:
        tensors["scale"].fill_(1 / (BATCH * seq))
    return Executor(schedule, tensors)


def nmoe_logits(config: Config, params: dict[str, Tensor], biases: dict[str, Tensor], tokens: Tensor,
                activation: str = "f32") -> Tensor:  # fmt: skip
    executor = _executor(config, "logits", params, biases, tokens, activation)
    executor.run("step")
    executor.run("micro")
    return executor.operand("logits").view(BATCH, config.train.seq_len, -1).clone()


def nmoe_gradients(config: Config, params: dict[str, Tensor], biases: dict[str, Tensor], tokens: Tensor,
                   activation: str = "f32") -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """The mean cross-entropy (plus the weighted multi-token prediction loss) and its gradient by published name."""
    executor = _executor(config, "train", params, biases, tokens, activation)
    executor.run("step")
    executor.run("micro")
    loss = executor.tensors["loss.main"].item()
    if config.model.mtp_depth:
        loss += config.model.mtp_loss_weight * executor.tensors["loss.mtp"].item()
    depth = len(layers(config))
    gradients = [hf.pieces(name, executor.tensors[f"{name}.grad"], depth) for name in params]
    return loss, {name: view for pairs in gradients for name, view in pairs}


# ---- transformers -----------------------------------------------------------------------------------

_HARD_CODED = (modeling_deepseek_v2, modeling_deepseek_v3, modeling_rope_utils)


@contextmanager
def in_float64() -> Iterator[None]:
    """Lets the peer compute in float64.

    It fixes float32 for RMSNorm, the router, the attention softmax and the rotary frequencies, by `torch.float32`
    and `torch.float` in its modules: there, these names mean float64 inside the context. DeepSeek-V2's rotation calls
    `Tensor.float`, so the function is replaced by the same complex product in float64.
    """

    class Wide(types.ModuleType):
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def rotate(xq: Tensor, xk: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
        pairs = (torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) for x in (xq, xk))
        return tuple(torch.view_as_real(pair * turns.unsqueeze(1)).flatten(3) for pair in pairs)

    patches = [mock.patch.object(module, "torch", Wide("torch")) for module in _HARD_CODED]
    patches.append(mock.patch.object(modeling_deepseek_v2, "apply_rotary_emb", rotate))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def load_peer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The exported model; fails when transformers misses a tensor, finds one too many or of another shape."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    module = f"model.layers.{model.config.num_hidden_layers}."  # of multi-token prediction, loaded apart
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(module)}
    assert not any((info["missing_keys"], unexpected, info["mismatched_keys"], info["error_msgs"])), info
    return model


def load_peer_mtp(model: Any) -> Any:
    """The multi-token prediction module, which transformers keeps apart and knows as layer 61 only."""
    number = model.config.num_hidden_layers
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{number}.*"]
    return modeling_layers.MtpModel.from_pretrained(model)


def peer_gradients(config: Config, model: Any, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The mean cross-entropy as in `nmoe_gradients`, and its gradient by published name."""
    seq = config.train.seq_len
    out = model.model(input_ids=tokens[:, :seq])
    loss = _cross_entropy(model.lm_head(out.last_hidden_state), tokens[:, 1 : seq + 1])
    modules = [("", model)]
    if config.model.mtp_depth:
        mtp = load_peer_mtp(model)
        positions = torch.arange(seq).expand(BATCH, seq)
        h = mtp.forward_layer(0, out.last_hidden_state, positions, None, input_ids=tokens[:, 1 : seq + 1])
        loss = loss + config.model.mtp_loss_weight * _cross_entropy(model.lm_head(h), tokens[:, 2:])
        modules.append((f"model.layers.{model.config.num_hidden_layers}.", mtp.layers[0]))
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for prefix, module in modules:
        for name, parameter in module.named_parameters():
            if parameter.numel():
                own = name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")
                gradients |= published(prefix + own, parameter.grad)
    return loss.item(), gradients


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def published(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Stacked experts one by one, as they are published."""
    path, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        halves = [(e, *weight.chunk(2)) for e, weight in enumerate(tensor)]
        return {f"{path}.{e}.{part}.weight": half for e, gate, up in halves
                for part, half in (("gate_proj", gate), ("up_proj", up))}  # fmt: skip
    if last == "down_proj":
        return {f"{path}.{e}.down_proj.weight": weight for e, weight in enumerate(tensor)}
    return {name: tensor}


# ---- comparison -------------------------------------------------------------------------------------


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖; the difference itself where theirs is zero."""
    difference = torch.linalg.vector_norm((ours - theirs).double())
    return (difference / (torch.linalg.vector_norm(theirs.double()) or 1.0)).item()


@dataclasses.dataclass(frozen=True)
class Parity:
    logits: float
    loss: float
    gradient: float
    worst: str  # the parameter whose gradient differs most


def compare(config: Config, folder: Path, activation: str, seed: int = 0) -> Parity:
    """Relative errors of nmoe against the peer that loads `folder`, which is written here."""
    params, biases = random_weights(config, seed)
    tokens = random_tokens(config, seed)
    hf.export(config, params, biases, folder)
    double = activation == "f64"
    dtype = torch.float64 if double else torch.float32
    context = in_float64() if double else mock.patch.dict({})
    with context:
        model = load_peer(folder, dtype)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, : config.train.seq_len]).logits
        their_loss, theirs = peer_gradients(config, model, tokens)
    loss, ours = nmoe_gradients(config, params, biases, tokens, activation)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    errors = {name: relative_error(gradient, theirs[name]) for name, gradient in ours.items()}
    worst = max(errors, key=errors.__getitem__)
    return Parity(
        relative_error(nmoe_logits(config, params, biases, tokens, activation), logits),
        abs(loss - their_loss) / their_loss,
        errors[worst],
        worst,
    )
