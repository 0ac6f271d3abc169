"""Every kernel family of the shipped MoE configs on a GPU, in all precisions: right, and the same bits every time?

    python bench/families.py build DIR     compile a small member of each family into DIR; needs no GPU
    python bench/families.py run DIR       on the GPU: each against its oracle (codegen/verify), several cases
                                           --repeats N graph replays; 0: one launch a case, for compute-sanitizer
                                           --cases N of each member
                                           --share I/N every Nth member, from the Ith; --only FAMILY

What `nmoe compile --verify` does on the emulator, on hardware: results start poisoned; cases have empty
experts, experts of one row, and sizes that fill no tile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nmoe import autotune, binding
from nmoe.codegen import compiler, families
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.problem import Config, Problem
from nmoe.codegen.spec import specs
from nmoe.codegen.verify import ORACLES
from nmoe.config import load

TARGET = "sm_90a"
CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED, PRECISIONS = ("moonlet", "dsv2", "dsv3"), ("bf16", "mxfp8", "nvfp4")


def members() -> Iterator[tuple[Problem, Config]]:
    """Each family's small member, in the config that the family's kernels are built in."""
    found: dict[tuple[Problem, Config], None] = {}
    for name, precision, ranks in product(SHIPPED, PRECISIONS, (1, 2)):
        config = load(CONFIGS / f"{name}.toml")
        one = replace(config, target=replace(config.target, device=TARGET), rdep=replace(config.rdep, ranks=ranks),
                      schedule=replace(config.schedule, precision=precision))  # fmt: skip
        for spec in specs(binding.lowered(one, sequences=1)):
            problem = families.match(spec)
            if isinstance(problem, Problem):
                found[problem.small(), autotune.choose(problem, TARGET)[0]] = None
    yield from found


def build(folder: Path) -> None:
    every = list(members())
    for i, (problem, config) in enumerate(every):
        key = compiler.problem_key(problem, config, TARGET)
        if Cache(folder).get(key, TARGET) is None:
            compiler.compile_problem(problem, config, TARGET, Cache(folder))
        print(f"[{i + 1}/{len(every)}] {problem.family} {problem}", flush=True)


def launched(launcher: CudaLauncher, problem: Problem, config: Config, before: dict[str, Any],
             repeats: int) -> dict[str, Any]:  # fmt: skip
    """The operands after a launch. AssertionError when a replay of it gives other bits."""
    held = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in before.items()}
    tensors = [n for n, t in held.items() if isinstance(t, torch.Tensor)]
    kernel = launcher.bind(problem, config, TARGET, [held[o.name] for o in problem.operands(config)])

    def step() -> None:
        for name in tensors:
            held[name].copy_(before[name])
        kernel()

    step()
    after = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in held.items()}
    if repeats:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        differ = torch.zeros(len(tensors), dtype=torch.bool, device="cuda")
        for _ in range(repeats):
            graph.replay()
            differ |= torch.stack([(_bits(held[n]) != _bits(after[n])).any() for n in tensors])
        names = [n for n, wrong in zip(tensors, differ.tolist(), strict=True) if wrong]
        assert not names, f"{', '.join(names)} differ between {repeats} replays"
    return after


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.atleast_1d(tensor).view(torch.uint8)


def run(folder: Path, only: str, share: str, cases: int, repeats: int) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    launcher = CudaLauncher(Cache(folder))
    shares: dict[str, list[float]] = {}
    wrong = 0
    index, count = map(int, share.split("/"))
    wanted = [(p, c) for p, c in members() if p.family == only or not only]
    for problem, config in wanted[index::count]:
        oracle = ORACLES[problem.family]
        worst = 0.0
        for seed in range(cases):
            try:
                before = oracle.case(problem, config, seed)
                on_device = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in before.items()}
                after = launched(launcher, problem, config, on_device, repeats)
                after = {n: t.cpu() if isinstance(t, torch.Tensor) else t for n, t in after.items()}
                worst = max(worst, *oracle.check(problem, before, after).values())
                shares.setdefault(problem.family, []).append(worst)
            except Exception as error:
                wrong += 1
                print(
                    f"{problem.family} {problem} {config}, case {seed}: {type(error).__name__}: {str(error)[:300]}"
                )
        print(f"{problem.family} {problem}: {worst:.3f} of the bound", flush=True)
    for family, found in shares.items():
        print(f"{family:12} {len(found):4} cases right, largest error {max(found):.3f} of its bound; {repeats} replays "
              "equal bit for bit")  # fmt: skip
    print(f"{wrong} wrong")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--only", default="", choices=("", *ORACLES))
    args = parser.parse_args()
    if args.action == "build":
        build(args.folder)
    else:
        run(args.folder, args.only, args.share, args.cases, args.repeats)


if __name__ == "__main__":
    main()
