"""Both architectures' grouped GEMMs on the emulator: within derived bounds, race-free, under several schedules."""

from __future__ import annotations

import pytest

from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen import verify
from nmoe.codegen.gemm import GemmProblem
from nmoe.codegen.verify import gemm as oracle

PROBLEMS = [
    GemmProblem("fprop", 3, 256, 136, "store"),
    GemmProblem("fprop", 4, 400, 192, "swiglu"),
    GemmProblem("dgrad", 3, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 3, 192, 328, "accumulate"),
    GemmProblem("dgrad", 0, 200, 264, "dswiglu"),
    GemmProblem("wgrad", 0, 192, 328, "accumulate"),
]
COUNTS = [[130, 0, 1, 300], [1, 513, 0, 0], [257, 0, 0, 0]]  # rows of each expert
SCHEDULES = [1, 2, 3]


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.epilogue}{p.experts}")
def test_grouped_gemms_are_right_under_every_schedule(problem: GemmProblem, target: str) -> None:
    alone = problem.epilogue == "store"  # the others run as clusters of two
    config = next(c for c in problem.configs(target) if c.cluster == (1 if alone else 2))
    function = kernel_compiler.trace(problem, config, target)
    for counts, schedule in zip(COUNTS, SCHEDULES, strict=True):
        tensors = oracle.case(problem, config, schedule, counts[: problem.groups])
        assert verify.run(function, problem, config, tensors, schedule) <= 1
