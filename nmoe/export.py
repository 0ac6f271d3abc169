"""`nmoe export`: the newest checkpoint of a config's run as a HuggingFace model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nmoe import config as configuration
from nmoe import hf, model
from nmoe.checkpoint import Checkpointer
from nmoe.config import Config, Rdep
from nmoe.errors import CheckpointError
from nmoe.executor import empty
from nmoe.optim import AdamW
from nmoe.parameters import Parameters
from nmoe.step import checkpoint_state


def export(config: Config, folder: Path) -> str:
    """Writes safetensors, config.json and the tokenizer into `folder`; one line that says what was written.

    Raises CheckpointError when the run has no checkpoint or holds another model.
    """
    graph = model.build(replace(config, rdep=Rdep()))  # with all experts
    biases = {t.name: empty(t.spec) for t in graph.of_kind("state") if t.name.endswith(".router_bias")}
    runs = Path(config.checkpoint.dir) / config.run.name

    def check(meta: dict) -> None:
        changed = [
            c for c in configuration.differences(meta["config"], config) if c.startswith(("model.", "moe."))
        ]
        if changed:
            raise CheckpointError(f"{runs} holds another model:\n  " + "\n  ".join(changed))

    with Checkpointer(runs, config.checkpoint.keep) as checkpoints:
        if not checkpoints.steps():
            raise CheckpointError(f"{runs}: no checkpoint to export; train the config first")
        parameters = Parameters(graph)
        state = checkpoint_state(parameters, AdamW(parameters, config.optim), biases)
        found = checkpoints.load(state, check=check)
    assert found is not None
    tokenizer = Path(config.data.dir) / "tokenizer.json"
    hf.export(
        config, parameters.masters(), biases, folder, tokenizer=tokenizer if tokenizer.exists() else None
    )
    return f"exported step {found[0]} of {runs} to {folder}"
