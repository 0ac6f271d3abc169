"""SwiGLU and its gradient on registers, as ops/activation.py defines them, in FP32 with approximate exp2 and 1/x."""

from __future__ import annotations

from cutlass import Float32, cute

LOG2_E = 1.4426950408889634


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(−x)); within 2^-21 relative: ex2.approx and rcp.approx are within 2 ulp and 1 ulp."""
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(-LOG2_E * x, fastmath=True))


@cute.jit
def swiglu(gate: Float32, up: Float32, weight: Float32) -> Float32:
    """weight · silu(gate) · up."""
    return gate * sigmoid(gate) * up * weight


@cute.jit
def swiglu_backward(grad: Float32, gate: Float32, up: Float32, weight: Float32):  # type: ignore[no-untyped-def]
    """(d gate, d up, this element's part of d weight) for grad = d (weight · silu(gate) · up)."""
    s = sigmoid(gate)
    silu = gate * s
    scaled = grad * weight
    return scaled * up * (s + silu * (1.0 - s)), scaled * silu, grad * silu * up
