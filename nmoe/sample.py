"""Text from the model, to see what it has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nmoe import model
from nmoe.config import Config
from nmoe.executor import Executor, allocate
from nmoe.schedule import lower, no_kernel


class Sampler:
    """Computes logits with the given parameters and state (by graph name) over a window of [train] seq_len tokens, by
    reference math on the tensors' device."""

    def __init__(self, config: Config, tensors: dict[str, torch.Tensor]) -> None:
        schedule = lower(
            replace(config, schedule=replace(config.schedule, recompute="none")),
            mode="logits", sequences=1, kernels=no_kernel,
        )  # fmt: skip
        device = next(iter(tensors.values())).device
        self.window = config.train.seq_len
        scratch = allocate(schedule, "state", "input", device=device)
        shared = {n: t for n, t in tensors.items() if n in schedule.graph.tensors and not n.endswith(".load")}
        self.tensors = scratch | {n: t for n, t in shared.items() if n not in (model.TOKENS, model.POSITIONS)}
        arena = torch.empty(schedule.arena_bytes, dtype=torch.uint8, device=device)
        self.executor = Executor(schedule, self.tensors, arena)
        self.executor.run("step")
        self.tensors[model.POSITIONS].copy_(torch.arange(self.window))

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """FP32 [len(tokens), vocab]; at most a window of tokens, which form one document."""
        self.tensors[model.TOKENS].zero_()[: len(tokens)].copy_(torch.tensor(tokens, dtype=torch.int32))
        self.executor.run("micro")
        return self.executor.operand(model.LOGITS)[: len(tokens)].float().cpu()

    def generate(
        self, prompt: Sequence[int], count: int, *, temperature: float = 0.7, seed: int = 0, eos: int = -1
    ) -> list[int]:
        """`prompt` and up to `count` further tokens, drawn with a generator of `seed`; stops after `eos`."""
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(count):
            last = self.logits(tokens[-self.window :])[-1]
            probabilities = torch.softmax(last / temperature, dim=-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            if tokens[-1] == eos:
                break
        return tokens
