"""One optimizer step: micro-batches through the schedule, then the update. The unit that `train` repeats and `bench`
measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from nmoe import binding, model, norm
from nmoe.accumulate import Accumulator
from nmoe.checkpoint_parts import Part
from nmoe.codegen.launch import device_of
from nmoe.config import Config
from nmoe.data.loader import Batch
from nmoe.errors import UserError
from nmoe.executor import Executor, allocate
from nmoe.optim import AdamW, lr_factor
from nmoe.parameters import Parameters
from nmoe.plan import micro_batch
from nmoe.ranks import Ranks
from nmoe.rdep.sums import ROW

Range = Callable[[str], AbstractContextManager]
ALIGNED = 4  # FP32 numbers of 16 bytes, on which a kernel's operands begin


class NonFinite(UserError):
    """The loss or a gradient is NaN or infinite; nothing was updated."""

    exit_code = 3


@dataclass(frozen=True)
class Result:
    """What one step measured. `losses` by state name without "loss.": main, mtp, balance, z; `load` is the tokens of
    each expert by MoE layer, `bias` its routing bias; both change with the next step."""

    losses: dict[str, float]
    grad_norm: float
    lr_factor: float
    load: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor]


def high_precision(config: Config) -> Config:
    """The config of the run's last `bf16_last_tokens`: every layer and pass in BF16."""
    groups = tuple(replace(group, precision=None) for group in config.model.layers)
    schedule = replace(config.schedule, precision="bf16", fprop=None, dgrad=None, wgrad=None)
    return replace(config, model=replace(config.model, layers=groups), schedule=schedule)


def checkpoint_state(
    parameters: Parameters, optimizer: AdamW, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor | Part]:
    """Everything that the next step depends on beside the step's number: masters, moments and routing biases. Each
    expert has tensors of its own, and masters and moments are flat, so that any number of ranks may share them out."""
    shares = [shard.master for shard in parameters.shards]
    masters = {f"master.{name}": part for name, part in parameters.parts(shares).items()}
    return masters | optimizer.state() | {n: t for n, t in state.items() if n.endswith(".router_bias")}


def _rows(elements: int) -> torch.Tensor:
    """Zeros that ranks can add up: at least so many."""
    return torch.zeros(-(-elements // ROW) * ROW)


class Step:
    """Owns the parameters, the optimizer and the executor(s) of one rank. `say` hears of the kernels that are compiled
    for it, and of what runs without one."""

    def __init__(
        self,
        config: Config,
        ranges: Range = lambda name: nullcontext(),
        say: Callable[[str], None] = lambda text: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.ranks, self._range = config, ranks or Ranks(), ranges
        self.sequences = micro_batch(config, self.ranks.world)
        self.micro_batches = config.train.batch_size // self.ranks.world // self.sequences
        late = [high_precision(config)] if config.schedule.bf16_last_tokens else []
        self.schedules = [binding.lowered(c, self.sequences) for c in (config, *late)]
        self.schedule = self.schedules[0]
        launcher, device = None, torch.device("cpu")
        if config.target.device != "cpu":
            launcher, device = binding.launcher(config, self.schedules, say), device_of(config.target.device)
        self.parameters = Parameters(
            self.schedule.graph, device, rank=self.ranks.rank, world=self.ranks.world, group=self.ranks.group
        )
        self.optimizer = AdamW(self.parameters, config.optim)
        if launcher is not None:
            self.optimizer.bind(launcher, config.target.device)
        self.tensors = allocate(self.schedule, "state", "input", device=device) | self.parameters.tensors()
        counted = [n for n in self.tensors if n.startswith("loss.") or n.endswith(".load")]
        sizes = [-(-self.tensors[n].numel() // ALIGNED) * ALIGNED for n in counted]
        sums = _rows(sum(sizes)).to(device)
        parts = sums.split([*sizes, len(sums) - sum(sizes)])
        self.tensors |= {n: part[: self.tensors[n].numel()] for n, part in zip(counted, parts, strict=False)}
        self._counted = sums
        # A GPU adds its micro-batches in place, for it has no room for partial sums, and those of all ranks at the end.
        self._in_tree = device.type == "cpu"
        self._sums = Accumulator(
            (*(shard.own_grad for shard in self.parameters.shards), sums),
            self.micro_batches if self._in_tree else 1,
            cleared=(self.parameters.grad, sums),
        )
        arena, moved = self.ranks.place(self.schedules, device, launcher)
        self.executors = [Executor(s, self.tensors, arena, launcher, moved) for s in self.schedules]
        self._losses = {n: t for n, t in self.tensors.items() if n.startswith("loss.")}
        self._loads = {n.removesuffix(".load"): t for n, t in self.tensors.items() if n.endswith(".load")}
        self._biases = {
            n.removesuffix(".router_bias"): t for n, t in self.tensors.items() if n.endswith(".router_bias")
        }
        self._total = config.total_tokens
        self._tokens_per_step = config.train.batch_size * config.train.seq_len

    def executor(self, step: int) -> Executor:
        """The one that runs step `step`: the BF16 schedule for the steps that end in the run's last tokens."""
        done = (step + 1) * self._tokens_per_step
        return self.executors[-1 if done > self._total - self.config.schedule.bf16_last_tokens else 0]

    def run(self, step: int, batch: Batch) -> Result:
        """Raises NonFinite before the optimizer touches anything."""
        executor = self.executor(step)
        with self._range("zero"):
            self._sums.begin()
        with self._range("weights"):
            executor.run("step")
        with self._range("forward_backward"):
            self.tensors[model.SCALE].fill_(1.0 / max(batch.valid, 1))
            for micro in range(self.micro_batches):
                turn = (step * self.micro_batches + micro) * self.ranks.world + self.ranks.rank
                self.tensors[model.COUNTER].fill_(turn)
                self._feed(batch, slice(micro * self.sequences, (micro + 1) * self.sequences))
                executor.run("micro")
                if self._in_tree or micro + 1 == self.micro_batches:
                    self._add_up()
        with self._range("optimizer"):
            losses = {name.removeprefix("loss."): float(t) for name, t in self._losses.items()}
            grad_norm = self._grad_norm()
            if not all(map(math.isfinite, (grad_norm, *losses.values()))):
                raise self._non_finite(step, losses, grad_norm)
            factor = lr_factor(self.config.optim, (step + 1) * self._tokens_per_step, self._total)
            self.optimizer.step(factor, grad_norm)
            self.ranks.gather_weights(self.parameters.shards)
            self._balance_experts()
        loads, biases = ({n: t.cpu() for n, t in x.items()} for x in (self._loads, self._biases))
        return Result(losses, grad_norm, factor, loads, biases)

    def state(self) -> dict[str, torch.Tensor | Part]:
        """What a checkpoint holds, by name."""
        return checkpoint_state(self.parameters, self.optimizer, self.tensors)

    def restore(self, step: int) -> None:
        """Call after the tensors of `state` were overwritten with those of a run that has done `step` steps."""
        self.optimizer.steps = step
        self.parameters.refresh()
        self.ranks.gather_weights(self.parameters.shards)

    def _feed(self, batch: Batch, rows: slice) -> None:
        arrays: dict[str, np.ndarray] = {model.TOKENS: batch.tokens, model.POSITIONS: batch.positions}
        arrays |= dict(zip((model.TARGETS, model.MTP_TARGETS), batch.targets, strict=False))
        for name, array in arrays.items():
            self.tensors[name].copy_(torch.from_numpy(array[rows].reshape(-1)))

    def _add_up(self) -> None:
        """Adds a micro-batch's gradients, losses and loads to those of the other ranks and of the step's others. Each
        gradient is of the loss over the global batch, so that sums need no scale."""
        self.ranks.add_gradients(self.parameters.shards, self._counted)
        self._sums.add()

    def _grad_norm(self) -> float:
        """Over all ranks, the same on each: every element is in one rank's share."""
        bins = torch.zeros(self.ranks.world, norm.BINS, dtype=torch.float64)
        bins[self.ranks.rank] = norm.squares(shard.own_grad for shard in self.parameters.shards)
        self.ranks.gather_everywhere(bins.view(-1))
        return norm.norm(bins)

    def _balance_experts(self) -> None:
        """Auxiliary-loss-free balancing (arXiv 2408.15664 alg. 1): overloaded experts lose, idle ones gain."""
        rate = self.config.moe.bias_rate if self.config.moe else 0.0
        for layer, bias in self._biases.items():
            load = self._loads[layer]
            bias.add_(torch.sign(load.mean() - load), alpha=rate)

    def _non_finite(self, step: int, losses: dict[str, float], grad_norm: float) -> NonFinite:
        parts = self.parameters.parts([shard.own_grad for shard in self.parameters.shards])
        bad = self.ranks.union([name for name, part in parts.items() if not part.tensor.isfinite().all()])
        where = f"; non-finite gradients in {len(bad)} parameters, first {bad[0]}" if bad else ""
        shown = ", ".join(f"{name} {value}" for name, value in losses.items())
        return NonFinite(
            f"step {step + 1}: loss {shown}, gradient norm {grad_norm}{where}. Nothing was updated. Resume from the "
            "last checkpoint with a lower [optim] lr or a higher [schedule] precision"
        )
