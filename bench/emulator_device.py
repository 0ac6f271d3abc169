"""nmoe's own kernels on the emulator and on a Hopper GPU: the same inputs, compared bit for bit.

    python bench/emulator_device.py record DIR    compile, run on the emulator, keep all in DIR; needs no GPU
    python bench/emulator_device.py compare DIR   on the GPU: run the same kernels, print what differs

Small members of the shipped configs' families (bench/families.py), compiled for sm_90a: grouped GEMMs with TMA,
multicast, wgmma and every epilogue, in BF16 and dequantized; row kernels; routing. `integers` are GEMMs whose sums are
exact in any order. Other sums, and functions that hardware approximates, may differ in the last place of FP32.
"""

from __future__ import annotations

import argparse
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CLUSTERS = 2  # of a launch: sums over thread blocks then have one order
TARGET = "sm_90a"
CASES = [  # a family, and what the problem's description ends in; the first member that fits
    "gemm bf16 fprop store integers", "gemm bf16 wgrad accumulate integers", "gemm bf16 fprop store",
    "gemm bf16 fprop swiglu", "gemm bf16 dgrad dswiglu", "gemm bf16 dgrad store", "gemm bf16 wgrad accumulate",
    "gemm mxfp8 fprop store", "gemm mxfp8 wgrad accumulate", "gemm nvfp4 fprop store",
    "rows embedding", "rows split", "rows concat", "rows add + add", "rows rope", "rows rms_norm", "rows rms_norm_bwd",
    "rows swiglu", "rows mxfp8/row + mxfp8/col", "rows rms_norm + mxfp8/row", "rows swiglu + mxfp8/col",
    "rows rms_norm_bwd + mxfp8/col + mxfp8/row", "rows nvfp4/row + nvfp4/col", "rows rms_norm + nvfp4/row",
    "router sigmoid", "router softmax", "router_bwd sigmoid", "router_bwd softmax", "moe_plan", "dispatch", "combine",
]  # fmt: skip


def label(problem: Any) -> str:
    if problem.family == "gemm":
        return f"gemm {problem.precision} {problem.role} {problem.epilogue}"
    if problem.family == "rows":
        return f"rows {str(problem).rsplit(' ', 1)[0]}"
    return f"{problem.family} {getattr(problem, 'score', '')}".strip()


def members() -> Iterator[tuple[str, Any, Any]]:
    import families

    found: dict[str, tuple[Any, Any]] = {}
    for problem, config in families.members():
        if problem.family != "gemm" or not problem.dense:
            found.setdefault(label(problem), (problem, config))
    for name in CASES:
        yield name, *found[name.removesuffix(" integers")]


def record(folder: Path) -> None:
    from nmoe.codegen import compiler
    from nmoe.codegen.emulator import Device, Options, bind
    from nmoe.codegen.verify import ORACLES

    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, problem, config) in enumerate(members()):
        stem = folder / f"{index:02}"
        if stem.with_suffix(".pt").exists():
            continue
        compiled = compiler.trace(problem, config, TARGET)
        compiled.export_to_c(str(stem.with_suffix(".o")), compiler.FUNCTION)
        subprocess.run(
            ["gcc", "-s", "-shared", "-o", stem.with_suffix(".so"), stem.with_suffix(".o")], check=True
        )
        stem.with_suffix(".o").unlink()
        before = ORACLES[problem.family].case(problem, config, 2)
        if name.endswith("integers"):
            before |= {"a": before["a"].round(), "b": (before["b"].float() * 8).round().bfloat16()}
            before |= {"dw": before["dw"].round()} if "dw" in before else {}
        operands = [(o.name, o.format) for o in problem.operands(config)]
        device = Device(Options())
        held = {
            n: device.tensor(before[n]) if isinstance(before[n], torch.Tensor) else before[n]
            for n, _ in operands
        }
        bind(compiled)(device, *held.values(), CLUSTERS, 0)
        after = {n: t.torch.clone() for n, t in held.items() if isinstance(before[n], torch.Tensor)}
        torch.save({"name": name, "operands": operands, "before": {n: before[n] for n, _ in operands}, "after": after},
                   stem.with_suffix(".pt"))  # fmt: skip
        count = sum(r.counters["instructions"] for r in device.reports)
        print(f"{index:02} {name}: {count} warp instructions", flush=True)


def run(case: dict[str, Any], library: Path) -> dict[str, torch.Tensor]:
    """The operands after a launch on the device."""
    import tvm_ffi

    from nmoe.codegen.cache import FUNCTION
    from nmoe.codegen.launch import _runtime

    _runtime()
    held = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in case["before"].items()}
    views = []
    for name, kind in case["operands"]:
        value = held[name]
        if isinstance(value, torch.Tensor):
            value = tvm_ffi.from_dlpack(
                value.view(torch.float8_e4m3fn) if kind == "e4m3" else torch.atleast_1d(value)
            )
        views.append(value)
    module = tvm_ffi.load_module(str(library))
    module[FUNCTION](*views, CLUSTERS, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return {n: t.cpu() for n, t in held.items() if isinstance(t, torch.Tensor)}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return torch.atleast_1d(tensor).contiguous().view(torch.uint8).reshape(-1, tensor.dtype.itemsize)


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How many elements differ and, of numbers, by how much at most as a share of the largest."""
    differ = (raw(found) != raw(expected)).any(dim=1)
    count = int(differ.sum())
    if count == 0:
        return f"{differ.numel()} equal"
    text = f"{count} of {differ.numel()} differ"
    if found.dtype in (torch.float32, torch.bfloat16):
        x, y = found.flatten().double(), expected.flatten().double()
        most = (x - y).abs().nan_to_num(float("inf"))[differ].max() / y[y.isfinite()].abs().max()
        text += f", by {float(most):.1e} of the largest"
    return text


def compare(folder: Path) -> None:
    """A line a case, of the tensors that the kernel changes."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for path in sorted(folder.glob("*.pt")):
        case = torch.load(path)
        before, after = case["before"], case["after"]
        try:
            found = run(case, path.with_suffix(".so"))
        except Exception:
            print(f"FAILED {case['name']}: {traceback.format_exc(limit=1)[-300:]}", flush=True)
            continue
        written = [n for n, t in after.items() if not torch.equal(raw(t), raw(before[n]))]
        kept = all(torch.equal(raw(found[n]), raw(before[n])) for n in after if n not in written)
        results = "; ".join(f"{n} {difference(found[n], after[n])}" for n in written)
        print(f"{case['name']}: {results}{'' if kept else '; WROTE OTHER TENSORS'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    (record if arguments.action == "record" else compare)(arguments.folder)


if __name__ == "__main__":
    main()
