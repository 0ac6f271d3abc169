"""A first cost model of grouped GEMMs: enough to order configs, not to promise times.

A tile's time is the longest of what its thread block does at once: products at the tensor cores' rate, operands from
L2, and what no product hides, the epilogue. The whole takes full waves of tiles, and at least the time that memory
needs for every operand once.
"""

from __future__ import annotations

from itertools import product
from typing import TypedDict

from nmoe.codegen.gemm import (
    ROW_TILE,
    SLICE,
    GemmConfig,
    GemmProblem,
    pieces,
    shared_bytes,
    violations,
)  # fmt: skip
from nmoe.codegen.hardware import HARDWARE

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


def candidates(problem: GemmProblem, target: str) -> list[GemmConfig]:
    """Every legal config worth timing: of each tile, cluster and number of buffers the most stages that fit."""
    found = []
    # 128 wide and alone is left out: it reads the most from L2 and was never within 20 % of the best on the H100.
    for (tile_n, cluster), buffers in product(((256, 2), (256, 1), (128, 2)), (2, 3, 4)):
        for stages in range(8, 1, -1):
            config = GemmConfig(tile_n, stages, cluster, buffers)
            if not violations(problem, config, target):
                found.append(config)
                break
    return found


def predict(problem: GemmProblem, config: GemmConfig, target: str, rows: int = 0) -> Prediction:
    """µs of one launch on `rows` packed rows (default: ROWS_PER_EXPERT each) and its share of the roofline."""
    hardware = HARDWARE[target]
    rows = rows or problem.groups * ROWS_PER_EXPERT
    clock = hardware.clock
    rate = hardware.bf16 / (hardware.sms * clock)
    wide = config.tile_n // 2 if problem.epilogue == "swiglu" else config.tile_n
    columns = -(-problem.columns // wide)
    if problem.ragged == "rows":
        blocks = problem.groups * -(-rows // problem.groups // (ROW_TILE * config.cluster))
        tiles, slices = blocks * columns, -(-problem.depth // SLICE)
    else:
        tiles = problem.groups * -(-problem.n // (ROW_TILE * config.cluster)) * columns
        slices = max(1, rows // problem.groups // SLICE)
    multiply = 2.0 * ROW_TILE * config.tile_n * SLICE / rate
    load = 2.0 * SLICE * (ROW_TILE + config.tile_n / config.cluster) / L2_BYTES_PER_CLOCK
    epilogue = pieces(problem, config) * PIECE_CLOCKS * 2 / config.buffers
    if problem.epilogue == "dswiglu":
        epilogue *= 4  # each piece is read, computed and stored twice over
    if hardware.tensor_columns:  # two accumulators: hidden behind the next tile's products
        multiply, epilogue = max(multiply, epilogue / slices), 0.0
    multiply *= 1 + STALL / (config.stages - 1) ** 2
    waves = -(-tiles // (hardware.sms // config.cluster))
    seconds = (waves * (slices * max(multiply, load) + epilogue) + SETUP_CLOCKS) / clock
    floor = max(problem.flops(rows) / hardware.bf16, problem.bytes(rows) / hardware.memory)
    seconds = max(seconds, floor)
    return {"microseconds": 1e6 * seconds, "roofline": floor / seconds}


def choose(problem: GemmProblem, target: str) -> GemmConfig:
    """The fastest candidate by prediction; of equals the one with the least shared memory."""
    return min(
        candidates(problem, target),
        key=lambda c: (predict(problem, c, target)["microseconds"], shared_bytes(problem, c, target)),
    )
