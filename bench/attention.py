"""Attention and cross-entropy on a GPU: right, the same bits again, and how fast beside torch's kernels.

    python bench/attention.py build DIR     compile every candidate into DIR; needs no GPU
    python bench/attention.py run DIR       on the GPU

Shapes are moonlet's: 4 sequences of 4096 tokens, 16 heads of 128 + 64 columns and values of 128. torch's peers are its
flash attention (values padded to 192 columns, which it needs) and cuDNN's, whose backward is not deterministic; neither
masks documents. TFLOP/s count the products that causal attention needs: 2 of the keys' and values' columns forward, 5
backward, half of the pairs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import median
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention

from nmoe.codegen import compiler
from nmoe.codegen.attention import AttentionConfig, AttentionProblem, Blocks
from nmoe.codegen.cache import Cache
from nmoe.codegen.driver import Functions
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.loss import CrossEntropyProblem
from nmoe.codegen.problem import Problem
from nmoe.codegen.verify import ORACLES
from nmoe.codegen.verify.base import Mismatch

TARGET = "sm_90a"
SEQUENCES, SEQ_LEN, HEADS, NOPE, ROPE, VALUE = 4, 4096, 16, 128, 64, 128
FORWARD = AttentionProblem("forward", HEADS, NOPE, ROPE, VALUE)
BACKWARD = replace(FORWARD, kind="backward")
QUERIES = (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 4), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3))
GRADIENTS = (
    (Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 3)),
    (Blocks(128, 32, 8, 3), Blocks(32, 128, 8, 4)),
    (Blocks(128, 32, 8, 4), Blocks(64, 128, 8, 2)),
    (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 3)),
)
LOSSES = (CrossEntropyProblem(201088), CrossEntropyProblem(32768), CrossEntropyProblem(4096))


def candidates() -> list[tuple[Problem, Any]]:
    found: list[tuple[Problem, Any]] = [(FORWARD, AttentionConfig(b)) for b in QUERIES]
    found += [(BACKWARD, AttentionConfig(*pair)) for pair in GRADIENTS]
    return found + [(problem, problem.configs(TARGET)[0]) for problem in LOSSES]


def bind(launcher: CudaLauncher, problem: Problem, config: Any, tensors: dict[str, Any]) -> Any:
    return launcher.bind(problem, config, TARGET, [tensors[o.name] for o in problem.operands(config)])


def checked(launcher: CudaLauncher, problem: Problem, config: Any, case: dict[str, Any]) -> str:
    """The largest share of a bound, and whether twenty runs give the same bits."""
    results = []
    for _ in range(20):
        after = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in case.items()}
        bind(launcher, problem, config, after)()
        results.append(after)
    torch.cuda.synchronize()
    shares = ORACLES[problem.family].check(problem, case, results[0])
    same = all(r[n].equal(results[0][n]) for r in results[1:] for n in shares)
    return f"{max(shares.values()):.3f} of the bound, {'same bits' if same else 'BITS DIFFER'} in 20 runs"


def check_all(launcher: CudaLauncher) -> None:
    for problem, config in candidates():
        try:
            if isinstance(problem, AttentionProblem):
                oracle = ORACLES["attention"]
                found = [
                    checked(launcher, problem, config, oracle.case(problem, config, seed, seq_len, 2, "cuda"))
                    for seed, seq_len in ((1, 1), (2, 200), (3, 777), (4, 1024))
                ]
            else:
                case = ORACLES[problem.family].case(problem, config, 1, 67, "cuda")
                found = [checked(launcher, problem, config, case)]
            print(f"{problem} {config}: {'; '.join(found)}", flush=True)
        except Mismatch as error:
            print(f"{problem} {config}: WRONG: {error}", flush=True)


def operands(problem: AttentionProblem, documents: int) -> dict[str, Any]:
    """Of the shape that is timed, every sequence of so many documents of one length."""
    config = problem.configs(TARGET)[0]
    made: dict[str, Any] = {"seq_len": SEQ_LEN, "window": 0, "scale": (NOPE + ROPE) ** -0.5}
    for o in problem.operands(config):
        if o.shape:
            shape = tuple(SEQUENCES * SEQ_LEN if n < 0 else n for n in o.shape)
            made[o.name] = torch.randn(shape, device="cuda").to(
                {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32}[o.format]
            )
    made["positions"] = (torch.arange(SEQUENCES * SEQ_LEN, device="cuda") % (SEQ_LEN // documents)).int()
    if problem.kind == "backward":  # consistent ones: random lse would overflow
        first = operands(FORWARD, documents) | {n: made[n] for n in ("q", "kv", "k_rope")}
        bind(LAUNCHER[0], FORWARD, FORWARD.configs(TARGET)[0], first)()
        made |= {n: first[n] for n in ("o", "lse")}
    return made


LAUNCHER: list[CudaLauncher] = []


def time_attention(launcher: CudaLauncher) -> None:
    pairs = 2.0 * SEQUENCES * SEQ_LEN * SEQ_LEN / 2 * HEADS
    work = {"forward": pairs * (NOPE + ROPE + VALUE), "backward": pairs * (3 * (NOPE + ROPE) + 2 * VALUE)}
    for documents in (1, 8):
        for problem, config in candidates():
            if not isinstance(problem, AttentionProblem):
                continue
            tensors = operands(problem, documents)
            milliseconds = median(bind(launcher, problem, config, tensors))
            key = compiler.problem_key(problem, config, TARGET)
            entry = Cache(launcher.root).get(key, TARGET)
            assert entry is not None
            functions = Functions(entry)
            values = tensors | {"tokens": SEQUENCES * SEQ_LEN}
            each = ", ".join(
                f"{x.function} {median(functions.bind([x], values)):.3f}" for x in problem.launches(config)
            )
            rate = f"{work[problem.kind] / milliseconds / 1e9:.0f} TFLOP/s" if documents == 1 else ""
            print(f"{problem.kind}, {documents} documents a sequence, {config}: {milliseconds:.3f} ms {rate} ({each})",
                  flush=True)  # fmt: skip
    q, k, v = (torch.randn(SEQUENCES, SEQ_LEN, HEADS, n, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
               for n in (NOPE + ROPE, NOPE + ROPE, VALUE))  # fmt: skip
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                values = pad(v, (0, NOPE + ROPE - VALUE)) if name == "flash" else v

                def forward(values: torch.Tensor = values) -> torch.Tensor:
                    return scaled_dot_product_attention(q, k, values, is_causal=True)

                out = forward()
                grad = torch.randn_like(out)
                taken = (
                    median(forward),
                    median(
                        lambda out=out, grad=grad: torch.autograd.grad(
                            out, (q, k, v), grad, retain_graph=True
                        )
                    ),
                )
            print(f"torch {name}: forward {taken[0]:.3f} ms, {work['forward'] / taken[0] / 1e9:.0f} TFLOP/s; backward "
                  f"{taken[1]:.3f} ms, {work['backward'] / taken[1] / 1e9:.0f} TFLOP/s", flush=True)  # fmt: skip
        except RuntimeError as error:
            print(f"torch {name}: {str(error).splitlines()[0]}", flush=True)


def copy_rate() -> float:
    """GB/s, read and written."""
    source = torch.randn(1 << 29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(lambda: target.copy_(source)) / 1e6


def time_loss(launcher: CudaLauncher) -> None:
    copied = copy_rate()
    for problem in LOSSES:
        rows = min(16384, (1 << 31) // problem.vocabulary)
        config = problem.configs(TARGET)[0]
        case = ORACLES[problem.family].case(problem, config, 1, rows, "cuda")
        case["dlogits"] = case["logits"].clone()
        case["logits"] = case["dlogits"]
        milliseconds = median(bind(launcher, problem, config, case))
        rate = problem.bytes(rows) / milliseconds / 1e6
        text = (
            f"{problem}, {rows} rows, {config}: {milliseconds:.3f} ms, {100 * rate / copied:.0f} % of a copy"
        )
        part = case["logits"][: rows // 4].float().requires_grad_()
        targets = case["targets"][: rows // 4].long()

        def peer(part: torch.Tensor = part, targets: torch.Tensor = targets) -> None:
            torch.autograd.grad(cross_entropy(part, targets, ignore_index=-1, reduction="sum"), part)

        print(f"{text}; torch in FP32 {4 * median(peer):.3f} ms (a quarter of the rows, times 4)", flush=True)
        del case, part
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    cache = Cache(args.folder)
    if args.action == "build":
        for problem, config in candidates():
            entry = compiler.compile_problem(problem, config, TARGET, cache)
            print(
                f"{problem} {config}: {entry.report['seconds']} s, {entry.report.get('kernels')}", flush=True
            )
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    launcher = CudaLauncher(cache)
    LAUNCHER.append(launcher)
    check_all(launcher)
    time_attention(launcher)
    time_loss(launcher)


if __name__ == "__main__":
    main()
