"""The config that most tests start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
)

TINY = Config(
    run=Run("tiny"),
    target=Target("cpu"),
    model=Model(
        vocab_size=96,
        hidden_size=64,
        attention=Attention(2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=32),
        layers=(LayerGroup("dense", intermediate_size=64), LayerGroup("moe", repeat=2)),
    ),
    moe=Moe(experts=4, topk=2, intermediate_size=32, shared_experts=1),
    optim=Optim(lr=1e-3),
    schedule=Schedule(precision="fp32", recompute="none"),
    train=Train(steps=4, batch_size=2, seq_len=32),
    data=Data("data", "bpe:257", (Source("text"),)),
    checkpoint=Checkpoint("checkpoints"),
    metrics=Metrics("metrics", "experiments.db"),
)


def tiny_config(**sections: Any) -> Config:
    """The smallest DeepSeek-shaped config, whose sizes fit every precision, with keys of its sections replaced:
    `tiny(moe={"topk": 3}, attention={"q_lora_rank": 32})`; a section that is None goes."""
    config = TINY
    for name, keys in sections.items():
        if name == "attention":
            config = replace(
                config, model=replace(config.model, attention=replace(config.model.attention, **keys))
            )
        else:
            config = replace(config, **{name: keys and replace(getattr(config, name), **keys)})
    return config
