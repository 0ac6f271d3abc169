"""The limits of the target devices that a kernel's config must respect. Source: CUDA programming guide, compute
capabilities 9.0 and 10.0; clocks and rates: NVIDIA's data sheets, dense."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """`shared`: bytes a thread block may use. `tensor_columns`: of tensor memory, 0 without. `bf16`: FLOP/s."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared: int
    tensor_columns: int
    bf16: float
    memory: float  # bytes/s
    l2: int


HARDWARE = {
    "sm_90a": Hardware("H100 SXM", (9, 0), 132, 232_448, 0, 989e12, 3.35e12, 50 << 20),
    "sm_100a": Hardware("B200", (10, 0), 148, 232_448, 512, 2250e12, 8.0e12, 126 << 20),
}
