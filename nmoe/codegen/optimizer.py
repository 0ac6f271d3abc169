"""The optimizer's update as a kernel. It is no call of a schedule, so its specs come from the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmoe import config as configuration
from nmoe.codegen.problem import PARAMETERS, Config, Format, Launch, Operand, Problem, per
from nmoe.codegen.spec import KernelSpec, Part, Value

KIND = "adamw"
# What a step's rates are, in memory: the gradient's clipping, 1 − lr · decay, lr / the first moment's bias correction,
# the root of the second's, β1, β2, ε; then nothing, so that each segment's begin on 16 bytes.
RATES = ("scale", "keep", "step", "root", "beta1", "beta2", "epsilon", "")


@dataclass(frozen=True)
class AdamWConfig(Config):
    """Elements and warps of a program."""

    block: int
    warps: int

    def __str__(self) -> str:
        return f"{self.block} elements, {self.warps} warps"


@dataclass(frozen=True)
class AdamWProblem(Problem):
    """One step of a segment of parameters: masters and moments in place, and with `rounded` the copy that the GEMMs
    read. `narrow`: moments are BF16."""

    narrow: bool
    rounded: bool

    family: ClassVar[str] = KIND
    language: ClassVar = "triton"

    def __str__(self) -> str:
        return f"adamw, moments {'bf16' if self.narrow else 'f32'}{', rounded' if self.rounded else ''}"

    def operands(self, config: AdamWConfig) -> tuple[Operand, ...]:
        flat = (PARAMETERS,)
        moment: Format = "bf16" if self.narrow else "f32"
        rounded = (Operand("rounded", "bf16", flat),) if self.rounded else ()
        return (
            Operand("master", "f32", flat),
            Operand("grad", "f32", flat),
            Operand("m", moment, flat),
            Operand("v", moment, flat),
            Operand("rates", "f32", (len(RATES),)),
            *rounded,
        )

    def launches(self, config: AdamWConfig) -> tuple[Launch, ...]:
        names = [o.name for o in self.operands(config)]
        rounded = "rounded" if self.rounded else "master"  # not touched
        constants = {"ROUNDED": self.rounded, "BLOCK": config.block}
        arguments = (*names[:5], rounded, "parameters")
        return (Launch("update", arguments, constants, config.warps, 1,
                       lambda x: (per(x["parameters"], config.block), 1, 1)),)  # fmt: skip

    def configs(self, target: str) -> list[AdamWConfig]:
        return [AdamWConfig(2048, 8)]

    def violations(self, config: AdamWConfig, target: str) -> list[str]:
        return []

    def shared_bytes(self, config: AdamWConfig, target: str) -> int:
        return 0

    def template(self, target: str) -> str:
        return "adamw.launches"

    def clusters(self, config: AdamWConfig, sms: int) -> int:
        return 1

    def flops(self, rows: int) -> float:
        return 0.0

    def bytes(self, rows: int) -> float:
        """Masters and moments are read and written."""
        return float(rows * (12 + (8 if self.narrow else 16) + 2 * self.rounded))

    def small(self) -> AdamWProblem:
        return self


def specs(config: configuration.Config) -> dict[KernelSpec, list[str]]:
    """The optimizer's kernels and what uses them: for parameters with a rounded copy, and without (norms, routers)."""
    moment = config.optim.state_precision
    formats = ("f32", "f32", *[{"fp32": "f32", "bf16": "bf16"}[moment]] * 2, "f32", "bf16")
    shapes: list[tuple[int | str, ...]] = [*[("P",)] * 4, (len(RATES),), ("P",)]
    values = tuple(Value(shape, format) for shape, format in zip(shapes, formats, strict=True))
    part = Part(KIND, (), (0, 1, 2, 3, 4), (0, 2, 3, 5))
    without = Part(KIND, (), (0, 1, 2, 3, 4), (0, 2, 3))
    target = config.target.device
    return {
        KernelSpec(target, values, (part,)): ["optimizer"],
        KernelSpec(target, values[:5], (without,)): ["optimizer, parameters in FP32"],
    }


def match(spec: KernelSpec) -> AdamWProblem | str:
    """The problem that one of `specs` states."""
    return AdamWProblem(spec.values[2].format == "bf16", len(spec.values) > 5)
