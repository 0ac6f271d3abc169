"""TOML + NMOE_* overrides → a validated Config, and what makes two configs the same training run.

The keys are in nmoe/schema.py, what they must satisfy together in nmoe/rules.py, how TOML becomes
dataclasses in nmoe/toml.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmoe.rules import rules
from nmoe.schema import (
    Attention,
    Checkpoint,
    Config,
    Data,
    Layer,
    LayerGroup,
    Metrics,
    Model,
    Moe,
    Optim,
    Precision,
    Precisions,
    Rdep,
    Run,
    Schedule,
    Source,
    Target,
    Train,
    Yarn,
    layers,
)
from nmoe.toml import Key, TomlFile

__all__ = [
    "TRAJECTORY_FREE", "Attention", "Checkpoint", "Config", "Data", "Layer", "LayerGroup", "Metrics", "Model",
    "Moe", "Optim", "Precision", "Precisions", "Rdep", "Run", "Schedule", "Source", "Target", "Train", "Yarn",
    "differences", "fingerprint", "layers", "load",
]  # fmt: skip


def load(path: str | Path, env: Mapping[str, str] = os.environ) -> Config:
    """Read `path`, apply the NMOE_SECTION__KEY variables of `env`, check everything.

    Strings may hold ${NMOE_NAME} and ${NMOE_NAME:-default}; NMOE_STDLIB, the folder of the running
    Python's standard library, is always set. Raises ConfigError with one line for each mistake.
    """
    env = {"NMOE_STDLIB": sysconfig.get_path("stdlib"), **env}
    source = TomlFile(path, env, Config)
    config = source.build()
    for broken, keys, text in rules(config):
        if broken:
            source.report([_key(name) for name in keys.split()], text)
    source.finish()
    return config


def _key(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


# ---- identity of a run's trajectory -----------------------------------------------------------------

# Keys that leave losses and weights bit for bit as they are. `train.steps` is free as well while nothing
# counts from the end of the run. `rdep.capacity` bounds buffers: exceeding it stops the run. `rdep.ranks` is as free as
# the number of processes; a run that is resumed says what either does to the bits.
TRAJECTORY_FREE = (
    "run.name",
    "rdep.ranks",
    "rdep.capacity",
    "rdep.timeout",
    "schedule.recompute",
    "train.log_every",
    "data.dir",
    "checkpoint.dir",
    "checkpoint.every",
    "checkpoint.keep",
    "metrics.dir",
    "metrics.experiments",
)


def fingerprint(config: Config) -> str:
    """SHA-256 (hex) of the canonical JSON of the keys that affect the trajectory, target included."""
    kept = _flatten(config.to_dict())
    free = _free(kept)
    text = json.dumps({key: kept[key] for key in sorted(kept) if key not in free}, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Config) -> list[str]:
    """The trajectory keys in which `old`, an earlier `to_dict()`, and `new` differ, with both values."""
    before, after = _flatten(old), _flatten(new.to_dict())
    free = _free(before) & _free(after)
    return [
        f"{key}: was {_value(before, key)}, is {_value(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in free and _value(before, key) != _value(after, key)
    ]


def _free(flat: Mapping[str, Any]) -> set[str]:
    endless = not flat.get("optim.decay_tokens") and not flat.get("schedule.bf16_last_tokens")
    return {*TRAJECTORY_FREE, *(["train.steps"] if endless else [])}


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.layers[0].ffn": "dense", …}; lists of scalars stay whole."""
    if isinstance(node, Mapping):
        items = [(f"{prefix}.{key}" if prefix else key, value) for key, value in node.items()]
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(node)]
    else:
        return {prefix: node}
    return {key: value for name, item in items for key, value in _flatten(item, name).items()}


def _value(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "absent"
