"""Cross-entropy and its gradient, from logits to logits' gradient in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import TOKENS, VECTOR, Config, Operand, Problem, per
from nmoe.codegen.spec import KernelSpec

IN_FLIGHT = 4  # vectors that a thread loads before it uses the first: a portion of a row
MOST_THREADS, LEAST_THREADS = 1024, 128


@dataclass(frozen=True)
class LossConfig(Config):
    """A thread block takes one row in portions of threads · IN_FLIGHT vectors; `held` of them stay in shared memory
    from the first pass to the second."""

    threads: int
    held: int

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.held} portions held"

    @property
    def columns(self) -> int:
        """Of a portion."""
        return self.threads * IN_FLIGHT * VECTOR


@dataclass(frozen=True)
class CrossEntropyProblem(Problem):
    """loss[1] += scale · Σ −log softmax(logits)[target] and the gradient of weight · that, over the rows whose target
    is not negative. The gradient may take the logits' place."""

    vocabulary: int

    family: ClassVar[str] = "cross_entropy"

    def __str__(self) -> str:
        return f"cross_entropy {self.vocabulary}"

    def operands(self, config: LossConfig) -> tuple[Operand, ...]:
        logits = Operand("logits", "bf16", (TOKENS, self.vocabulary))
        return (
            logits,
            Operand("targets", "i32", (TOKENS,)),
            Operand("scale", "f32", (1,)),
            Operand("loss", "f32", (1,)),
            replace(logits, name="dlogits"),
            Operand("row_loss", "f32", (TOKENS,)),
            Operand("weight", "f32", ()),
        )

    def configs(self, target: str) -> list[LossConfig]:
        """As many threads as have a portion each; as much of a row held as there is room for."""
        threads = LEAST_THREADS
        while threads < min(MOST_THREADS, per(self.vocabulary, IN_FLIGHT * VECTOR)):
            threads *= 2
        config = LossConfig(threads, 0)
        portions = per(self.vocabulary, config.columns)
        room = (HARDWARE[target].shared - self.shared_bytes(config, target)) // (2 * config.columns)
        return [replace(config, held=min(portions, room))]

    def violations(self, config: LossConfig, target: str) -> list[str]:
        found, hardware = [], HARDWARE[target]
        used = self.shared_bytes(config, target)
        if used > hardware.shared:
            found.append(
                f"{used} bytes of shared memory: {hardware.name} gives a thread block {hardware.shared}"
            )
        if config.held < 1:
            found.append("nothing of a row is held: at least one portion")
        if not 32 <= config.threads <= 1024 or config.threads % 32:
            found.append(f"{config.threads} threads: whole warps, at most 1024")
        return found

    def shared_bytes(self, config: LossConfig, target: str) -> int:
        """What is held of a row, and each warp's maximum and sum."""
        return 2 * config.columns * config.held + 8 * config.threads // 32 + 128

    def template(self, target: str) -> str:
        return "cross_entropy.CrossEntropy"

    def clusters(self, config: LossConfig, sms: int) -> int:
        """A thread block a row; the template counts them."""
        return 1

    def flops(self, rows: int) -> float:
        return 0.0

    def bytes(self, rows: int) -> float:
        """Logits once, their gradient once."""
        return 4.0 * rows * self.vocabulary

    def small(self) -> CrossEntropyProblem:
        """Itself: which part of a row is held depends on its length. Problems have few rows instead."""
        return self


def match(spec: KernelSpec) -> CrossEntropyProblem | str:
    """The problem that a spec states, or why no template builds it."""
    anchor, *rest = spec.parts
    if rest:
        return "nothing is fused into cross-entropy"
    logits: Any = spec.values[anchor.inputs[0] or 0]
    problem = CrossEntropyProblem(int(logits.shape[1]))
    found = [value.format for value in (*spec.inputs, *spec.outputs)]
    expected = [o.format for o in problem.operands(LossConfig(0, 0))[: len(found)]]
    if found != expected:
        return f"its operands are {', '.join(found)}, the kernel's {', '.join(expected)}"
    if problem.vocabulary % VECTOR:
        return f"a vocabulary of {problem.vocabulary}: threads load whole 16 bytes, which are {VECTOR}"
    return problem
