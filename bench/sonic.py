"""SonicMoE's MoE layer for moe_peers.py, with its GEMMs compiled ahead of time, where there is no GPU.

SonicMoE 0.1.2.post1 multiplies by QuACK 0.6.5, which compiles each GEMM in each config that its tuner tries: minutes on
a machine with a GPU. QuACK keeps them as objects, whose names are hashes of what they were made from. `build` calls
SonicMoE's GEMMs with empty CPU tensors and leaves the launches out, so that all objects are in a folder; on the GPU
`layer` finds them there. Names must not depend on where packages lie or on Python's version, hence `_stable`.

What is left to compile on the GPU's machine is one kernel of CuTeDSL and Triton's candidates, which `prepare` compiles
in parallel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
TIMED = 20  # launches of which QuACK's tuner takes the mean; its default is 200


def _stable(key: tuple) -> str:
    """A hash of what a kernel is made from, without digests of sources and addresses: one version of each is there."""
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+|[0-9a-f]{16,}", "#", repr(key)).encode()).hexdigest()


@contextlib.contextmanager
def _no_pool() -> Iterator[None]:
    yield None


def _quack(folder: Path) -> None:
    """Imports QuACK with its objects and its tuner's choices in `folder`."""
    os.environ |= {
        "QUACK_CACHE_DIR": str(folder),
        "QUACK_CACHE_AUTOTUNING": "1",
        "TRITON_CACHE_AUTOTUNING": "1",
    }
    import quack.autotuner as tuner
    import quack.cache.async_compile as pool
    import quack.cache.jit as jit
    import quack.gemm_runtime.identity as identity

    exact = identity.semantic_value_key

    def tolerant(value: Any, seen: Any) -> Any:  # QuACK 0.6.5 does not know a ContextVar of CuTeDSL 4.8
        try:
            return exact(value, seen)
        except TypeError:
            return ("opaque", type(value).__name__)

    identity.semantic_value_key = tolerant
    jit._key_to_hash, jit._compute_source_fingerprint = _stable, lambda: "objects"
    pool.pool_scope = pool.suppress_pool = _no_pool
    tuner._bench_cuda_graph_l2_rotate = functools.partial(
        tuner._bench_cuda_graph_l2_rotate, warmup_target_ms=20.0, n_timed_calls=TIMED
    )


# ---- without a GPU --------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Every GEMM that SonicMoE's forward and backward launch on Hopper, in every config of QuACK's tuner."""
    os.environ |= {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    _quack(folder)
    import quack.autotuner as tuner
    import quack.cache.async_compile as pool
    import sonicmoe.functional.backward as backward
    import sonicmoe.functional.forward as forward

    pool._pin_dsl_arch("sm_90a")
    pool._install_gpu_blind_device_attrs()
    absent = {
        "get_max_active_clusters": 1,
        "launch_gemm": None,
        "_gpu_warmup": None,
        "_pick_l2_rotate_count": 1,
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("quack")]:
        for name, value in absent.items():
            if hasattr(module, name):
                setattr(module, name, lambda *args, value=value, **kwargs: value)
    tuner._clone_l2_rotate_inputs = lambda args, kwargs, count: ([args], [kwargs])
    tuner.Autotuner.check_disk_cache = lambda self, key, configs, run: run()

    def built(self: Any, *args: Any, config: Any, **kwargs: Any) -> list[float]:
        print(f"{self.fn.__name__[:24]} {config}", flush=True)
        self.fn(*args, **kwargs, **config.all_kwargs())
        return [1.0]

    tuner.Autotuner._bench = built
    tokens, hidden, inter, experts, topk = 128, 256, 128, 8, 2  # kernels do not depend on sizes
    rows = tokens * topk

    def bf16(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16)

    x, dout, y, dx = bf16(tokens, hidden), bf16(tokens, hidden), bf16(rows, hidden), bf16(rows, hidden)
    h, dh, a = bf16(rows, 2 * inter), bf16(rows, 2 * inter), bf16(rows, inter)
    w1, w2 = bf16(experts, 2 * inter, hidden).permute(1, 2, 0), bf16(experts, hidden, inter).permute(1, 2, 0)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    scores, ds = torch.zeros(rows), torch.zeros(rows)
    ends, index = torch.zeros(experts + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for inference in (True, False):
        kept = None if inference else h
        forward._up_projection_forward(x, w1, kept, a, None, ends, index, "swiglu", inference)
    forward._down_projection_forward(w2, a, y, None, ends)
    backward._down_projection_backward_act(
        dout, h, w2, dh, ds, None, None, a, scores, ends, index, index, "swiglu"
    )
    backward._down_projection_backward_weight(dout, a, dw2, ends, index)
    backward._up_projection_backward_act(w1, dx, dh, None, ends, True)
    backward._up_projection_backward_weight(x, dw1, dh, ends, index, True)


# ---- on the GPU -----------------------------------------------------------------------------------------------


def prepare(tokens: int, hidden: int, topk: int, workers: int) -> list[Any]:
    """Starts processes that compile the candidates of SonicMoE's sum over a token's rows."""
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_compile_sums, args=(tokens, hidden, topk, i, workers)) for i in range(workers)
    ]
    for job in jobs:
        job.start()
    return jobs


def _compile_sums(tokens: int, hidden: int, topk: int, index: int, count: int) -> None:
    from sonicmoe.functional.reduction_over_k_gather import token_gather_sum_kernel as kernel

    kernel.configs = kernel.configs[index::count]
    rows = torch.empty(1, hidden, dtype=torch.bfloat16, device="cuda")
    order = torch.empty(1, dtype=torch.int32, device="cuda")
    for weights in (None, torch.empty(1, device="cuda")):
        kernel.warmup(rows, weights, order, None, rows, T=tokens, H=hidden, MAX_K=topk, stride_xM=hidden, stride_xH=1,
                      stride_outT=hidden, stride_outH=1, w_is_None=weights is None, is_varlen_K=False,
                      grid=(tokens,))  # fmt: skip


class Layer:
    """SonicMoE's layer on random data. `folder` holds what `build` made."""

    def __init__(self, folder: Path, tokens: int, hidden: int, inter: int, experts: int, topk: int) -> None:
        _quack(folder)
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_TC_softmax_topk_layer

        self.layer, self.swiglu, self.topk = moe_TC_softmax_topk_layer, ActivationType.SWIGLU, topk

        def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device="cuda") * scale).bfloat16()

        self.x = normal(tokens, hidden)
        self.router = normal(experts, hidden, scale=hidden**-0.5)
        self.w1 = normal(experts, 2 * inter, hidden, scale=hidden**-0.5)  # gate and up alternate
        self.w2 = normal(experts, hidden, inter, scale=inter**-0.5)
        self.dy = normal(tokens, hidden)
        self.leaves = [t.requires_grad_() for t in (self.x, self.router, self.w1, self.w2)]
        self.stream = torch.cuda.current_stream().cuda_stream

    def run(self, inference: bool) -> torch.Tensor:
        return self.layer(self.x, self.router, self.w1.permute(1, 2, 0), None, self.w2.permute(1, 2, 0), None,
                          self.topk, self.stream, self.swiglu, inference)[0]  # fmt: skip

    def forward(self) -> None:
        with torch.no_grad():
            self.run(True)

    def training_forward(self) -> None:
        """Stores what backward reads."""
        self.run(False)

    def both(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.run(False).backward(self.dy)

    def check(self) -> dict[str, float]:
        """How far its results are from torch's with the same routing, relative to their norms. AssertionError when
        further than BF16 explains."""
        self.both()
        with torch.no_grad():
            found = {"y": self.run(True)} | {n: getattr(self, n).grad for n in ("x", "w1", "w2")}
            logits, chosen = (self.x @ self.router.t()).float().topk(self.topk)
        x, w1, w2 = (t.detach().clone().requires_grad_() for t in (self.x, self.w1, self.w2))
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=len(w1)).cumsum(0).int()
        weight = logits.softmax(-1).flatten()[order].unsqueeze(1)
        h = torch._grouped_mm(x[order // self.topk], w1.transpose(1, 2), offs=ends)
        act = (torch.nn.functional.silu(h[:, 0::2].float()) * h[:, 1::2]).bfloat16()
        rows = torch._grouped_mm(act, w2.transpose(1, 2), offs=ends) * weight
        y = torch.zeros_like(x, dtype=torch.float32).index_add(0, order // self.topk, rows)
        y.backward(self.dy.float())
        wanted = {
            "y": y.detach(),
            "w1": w1.grad,
            "w2": w2.grad,
        }  # x's gradient through the router is not in it
        apart = {
            n: float((found[n].float() - t.float()).norm() / t.float().norm()) for n, t in wanted.items()
        }
        assert all(error < 2e-2 for error in apart.values()), f"SonicMoE differs from torch: {apart}"
        return apart
