"""The limits of the target devices that a kernel's config must respect, and the rates that predictions start from.

Limits: CUDA programming guide, compute capabilities 9.0 and 10.0. Rates of the H100: cuBLAS 8192³ on random BF16
(bench/moe_kernels.py, 2026-11-22) and the data sheet's memory; of the B200, which nobody has measured here, the data
sheet's, its BF16 rate scaled by what the H100 reaches of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """`shared`: bytes a thread block may use. `tensor_columns`: of tensor memory, 0 without. `bf16`: sustained
    dense FLOP/s. `memory`: bytes/s. `l2`: bytes. `clock`: Hz under load."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared: int
    tensor_columns: int
    bf16: float
    memory: float
    l2: int
    clock: float


HARDWARE = {
    "sm_90a": Hardware("H100 SXM", (9, 0), 132, 232_448, 0, 764e12, 3.35e12, 50 << 20, 1.7e9),
    "sm_100a": Hardware("B200", (10, 0), 148, 232_448, 512, 764 / 989 * 2250e12, 8.0e12, 126 << 20, 1.85e9),
}
