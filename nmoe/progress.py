"""What a run says about itself: the opening lines, the progress line, the router line, and the metrics of a step."""

from __future__ import annotations

import math
import resource
import time

import torch

from nmoe import devices
from nmoe.config import Config
from nmoe.plan import amount, parameter_counts
from nmoe.predict import model_flops
from nmoe.step import Result, Step


def duration(seconds: float) -> str:
    """75 → "1m15s"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def banner(config: Config, step: Step, run_id: str, begin: int) -> str:
    schedule, target = step.schedule, config.target.device
    counts = parameter_counts(config, schedule)
    note = (
        " (off target: the reference implementation; the product's target is sm_100a)"
        if target == "cpu"
        else ""
    )
    flops = step.micro_batches * model_flops(config, schedule)
    ranks = step.ranks
    together = f", {ranks.world} ranks, {ranks.group} to a set of experts" if ranks.world > 1 else ""
    return "\n".join(
        [
            f"run {run_id}",
            f"target {target}{note}, {torch.get_num_threads()} threads{together}",
            f"model {amount(counts.total)} parameters, {amount(counts.active)} active; "
            f"precision {config.schedule.precision}, recompute {config.schedule.recompute}",
            f"step {config.train.batch_size} x {config.train.seq_len} tokens in {step.micro_batches} micro-batch(es), "
            f"{len(schedule.calls)} kernels, {amount(flops, 'FLOP')}, "
            f"arena {amount(schedule.arena_bytes, 'B')}",
            f"steps {begin} to {config.train.steps}, {amount(config.total_tokens)} tokens",
        ]
    )


def router_values(load: dict[str, torch.Tensor], biases: dict[str, torch.Tensor]) -> dict[str, float]:
    """Per MoE layer: the fullest expert over the mean, the entropy of the load over its maximum, experts without
    tokens, and the range of the routing bias."""
    values: dict[str, float] = {}
    for layer, counts in load.items():
        share = (counts / counts.sum()).double()
        entropy = float(torch.special.entr(share).sum()) / math.log(len(share)) if len(share) > 1 else 1.0
        values[f"router/{layer}/max_over_mean"] = float(share.max()) * len(share)
        values[f"router/{layer}/entropy"] = entropy
        values[f"router/{layer}/dead"] = float((counts == 0).sum())
        if layer in biases:
            values[f"router/{layer}/bias_range"] = float(biases[layer].max() - biases[layer].min())
    return values


class Progress:
    """Turns results into metrics and lines."""

    def __init__(self, config: Config, step: Step) -> None:
        self.config = config
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self._flops = step.micro_batches * model_flops(config, step.schedule)
        self._peak = devices.peak_flops(config.target.device, config.schedule.precision)
        self._recent: list[float] = []
        self._started = time.perf_counter()
        self._steps = 0
        self._last: dict[str, float] = {}

    def values(self, result: Result, valid: int, seconds: float, waited: float) -> dict[str, float]:
        """The metrics of a step. Tags are documented in docs/records.md."""
        self._steps += 1
        self._recent = [*self._recent[-19:], seconds]
        extra = {f"loss/{name}": value for name, value in result.losses.items() if name != "main"}
        self._last = {
            "loss": result.losses["main"],
            **extra,
            "grad_norm": result.grad_norm,
            "lr": self.config.optim.lr * result.lr_factor,
            "valid_tokens": float(valid),
            "time/step": seconds,
            "time/data": waited,
            "tokens_per_second": self.tokens_per_step / seconds,
            "mfu": self._flops / seconds / self._peak,
            **router_values(result.load, result.bias),
        }
        return self._last

    def line(self, done: int, result: Result) -> str:
        """The progress line, and the router line below it when the model has experts."""
        seconds = sum(self._recent) / len(self._recent)
        steps = self.config.train.steps
        rate = self._flops / seconds
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        parts = [
            f"step {done}/{steps} ({100 * done // steps}%)",
            *(f"{'loss' if name == 'main' else name} {value:.4f}" for name, value in result.losses.items()),
            f"grad {result.grad_norm:.3f}",
            f"{self.tokens_per_step / seconds:,.0f} tok/s",
            f"{amount(rate, 'FLOP/s')} ({100 * rate / self._peak:.0f}% of {self.config.schedule.precision} peak)",
            f"mem {amount(memory, 'B')}",
            f"eta {duration(seconds * (steps - done))}",
        ]
        return " | ".join(parts) + self._router_line()

    def _router_line(self) -> str:
        by_metric: dict[str, dict[str, float]] = {}
        for tag, value in self._last.items():
            if tag.startswith("router/"):
                _, layer, metric = tag.split("/")
                by_metric.setdefault(metric, {})[layer] = value
        if not by_metric:
            return ""
        fullest = max(by_metric["max_over_mean"], key=by_metric["max_over_mean"].__getitem__)
        bias = max(by_metric.get("bias_range", {"": 0.0}).values())
        return (
            f"\n  router | max/mean {by_metric['max_over_mean'][fullest]:.2f} ({fullest.removesuffix('.moe')})"
            f" | entropy {min(by_metric['entropy'].values()):.3f} | dead {sum(by_metric['dead'].values()):.0f}"
            f" | bias range {bias:.3f}"
        )

    def summary(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        return {"seconds": round(seconds, 3), "steps": self._steps,
                "tokens_per_second": round(self._steps * self.tokens_per_step / seconds, 1)}  # fmt: skip
