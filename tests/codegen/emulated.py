"""The emulator in the place of a CUDA device: what launches kernels, and memory that both torch and they can reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nmoe.binding import Argument, Bound
from nmoe.codegen import compiler, triton
from nmoe.codegen.emulator import Device, DeviceTensor, HostFunction, Options, bind
from nmoe.codegen.problem import Problem
from nmoe.executor import DTYPES
from nmoe.graph import Spec
from nmoe.ops import nbytes
from nmoe.schedule import Schedule


class EmulatedLauncher:
    """`launches` counts those of each problem. Tensors of kernels must come from `memory`."""

    root = None

    def __init__(self, seed: int = 1) -> None:
        self.device = Device(Options(seed=seed, races=True))
        self.launches: dict[Problem, int] = {}
        self._functions: dict[tuple[Problem, Any, str], HostFunction] = {}

    def memory(self, spec: Spec, byte: int) -> torch.Tensor:
        """A tensor every byte of which is `byte`."""
        raw = self.device.empty((nbytes(spec),), torch.uint8)
        raw.torch.fill_(byte)
        raw.written[:] = 1  # poison is for the results to show, torch's writes are not seen
        return raw.torch.view(DTYPES[spec.format]).view(spec.shape)

    def tensors(self, schedule: Schedule, *kinds: Any) -> dict[str, torch.Tensor]:
        """What outlives a step, zeroed."""
        return {t.name: self.memory(schedule.spec(t.name), 0) for t in schedule.graph.of_kind(*kinds)}

    def bind(self, problem: Problem, config: Any, target: str, arguments: Sequence[Argument]) -> Bound:
        if problem.language == "triton":
            named = {o.name: a for o, a in zip(problem.operands(config), arguments, strict=True)}

            def interpret() -> None:
                self.launches[problem] = self.launches.get(problem, 0) + 1
                triton.interpret(problem, config, target, named)

            return interpret
        key = (problem, config, target)
        if key not in self._functions:
            self._functions[key] = bind(compiler.trace(problem, config, target))
        function = self._functions[key]
        operands = [_view(a) if isinstance(a, torch.Tensor) else a for a in arguments]

        def launch() -> None:
            self.launches[problem] = self.launches.get(problem, 0) + 1
            function(self.device, *operands, problem.clusters(config, 2), 0)

        return launch


def _view(tensor: torch.Tensor) -> DeviceTensor:
    memory = tensor.view(torch.uint8) if tensor.dim() else tensor
    return DeviceTensor(tensor, memory.numpy(), memory.numpy())
