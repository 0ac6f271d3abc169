"""A first cost model: enough to order configs, not to promise times.

A kernel takes at least as long as memory needs for every operand once, or the tensor cores for its products. What
reads and writes rows is taken to reach that. Of a GEMM, a tile takes the longest of what its thread block does at
once: products at the tensor cores' rate, operands from L2, and what no product hides, the epilogue; the whole takes
full waves of tiles.
"""

from __future__ import annotations

from functools import cache
from typing import TypedDict

from nmoe.codegen.gemm import BITS, ROW_TILE, GemmConfig, GemmProblem
from nmoe.codegen.hardware import HARDWARE, Hardware
from nmoe.codegen.problem import Config, Problem

ROWS_PER_EXPERT = 2048  # a training step's typical load, for ordering only
# Fitted to the H100's times in bench/moe_kernels.py; for the B200 they are guesses.
L2_BYTES_PER_CLOCK = 28.0  # a thread block's share when all of them read
PIECE_CLOCKS = 700.0  # writing 64 × 128 B to shared memory and waiting for one of two buffers
STALL = (
    0.6  # share of a slice that loads arrive too late by with one stage of lookahead; falls with its square
)
SETUP_CLOCKS = 1000.0  # filling the pipeline of the first tile, draining that of the last


class Prediction(TypedDict):
    microseconds: float
    roofline: float


def predict(problem: Problem, config: Config, target: str, rows: int = 0) -> Prediction:
    """µs of one launch on `rows` rows or tokens (default: ROWS_PER_EXPERT for each expert) and its share of the
    roofline."""
    hardware = HARDWARE[target]
    rows = rows or ROWS_PER_EXPERT * (problem.groups if isinstance(problem, GemmProblem) else 1)
    floor = max(problem.flops(rows) / _rate(problem, hardware), problem.bytes(rows) / hardware.memory)
    seconds = floor
    if isinstance(problem, GemmProblem) and isinstance(config, GemmConfig):
        seconds = max(floor, _gemm_seconds(problem, config, target, rows))
    return {"microseconds": 1e6 * seconds, "roofline": floor / seconds}


def _rate(problem: Problem, hardware: Hardware) -> float:
    """FLOP/s of the tensor cores, which take narrower operands as much faster (B200's data sheet)."""
    return (
        hardware.bf16 * 16 / BITS[problem.multiplied] if isinstance(problem, GemmProblem) else hardware.bf16
    )


def _gemm_seconds(problem: GemmProblem, config: GemmConfig, target: str, rows: int) -> float:
    hardware = HARDWARE[target]
    clock = hardware.clock
    rate = _rate(problem, hardware) / (hardware.sms * clock)
    tiles = problem.groups * problem.tiles(config, target, -(-rows // problem.groups))
    if problem.ragged == "rows":
        slices = -(-problem.depth // problem.slice)
    else:
        slices = max(1, rows // problem.groups // problem.slice)
    multiply = 2.0 * ROW_TILE * config.tile_n * problem.slice / rate
    load = problem.stage_bytes(config, config.tile_n // config.cluster) / L2_BYTES_PER_CLOCK
    epilogue = problem.pieces(config) * PIECE_CLOCKS * 2 / config.buffers
    if problem.epilogue == "dswiglu":
        epilogue *= 4  # each piece is read, computed and stored twice over
    # Hidden behind the next tile's products, but for what Hopper's registers cannot hold.
    shown = epilogue / 2 if problem.epilogue == "accumulate" and not hardware.tensor_columns else 0.0
    multiply, epilogue = max(multiply, (epilogue - shown) / slices), shown
    multiply *= 1 + STALL / (config.stages - 1) ** 2
    waves = -(-tiles // (hardware.sms // config.cluster))
    return (waves * (slices * max(multiply, load) + epilogue) + SETUP_CLOCKS) / clock


@cache  # a schedule asks for a kernel's config at each of its calls
def choose(problem: Problem, target: str) -> Config:
    """The fastest legal config by prediction; of equals, GEMMs' with the least shared memory, others' first."""

    def order(config: Config) -> tuple[float, int]:
        shared = problem.shared_bytes(config, target) if isinstance(config, GemmConfig) else 0
        return predict(problem, config, target)["microseconds"], shared

    return min(problem.configs(target), key=order)
