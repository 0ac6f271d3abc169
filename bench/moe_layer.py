"""One MoE layer, router to combine, forward and backward, as the executor runs it on a GPU: right? how fast?

    python bench/moe_layer.py build DIR     compile the kernels of the layers below into DIR; needs no GPU
    python bench/moe_layer.py run DIR       on the GPU: the odd layers against float64, then the large ones, timed;
                                            --json FILE keeps the numbers, --only NAME takes one of the large ones

The layer's schedule comes from the same builder, passes and planner as a model's. Its results are compared with the
ops' reference math in float64, and held to 1.5 times the error of that math in BF16, which rounds at the same places,
and to what few tokens leave to chance. Memory starts as NaN. Times are medians of CUDA graph replays; the table of
kernels is from one eager run with events.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import median

from nmoe import binding, model
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import format_build
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.spec import specs
from nmoe.config import Config, layers, load
from nmoe.differentiate import differentiate
from nmoe.executor import Executor, allocate
from nmoe.graph import Graph, Spec
from nmoe.ops import OPS
from nmoe.ops.base import OpDef
from nmoe.schedule import Kernels, Schedule, no_kernel, passes, place

TARGET, DEVICE = "sm_90a", "cuda"
MOONLET = Path(__file__).parents[1] / "configs" / "moonlet.toml"
ROUTING = ("uniform", "skewed", "one")


@dataclass(frozen=True)
class Shape:
    """A layer of `experts` on one rank. `routing`: as the router's random weights have it, with a preference that falls
    from expert to expert, or the same experts for all tokens."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    topk: int
    routing: str = "uniform"

    def __str__(self) -> str:
        return f"T={self.tokens} H={self.hidden} I={self.inter} E={self.experts} K={self.topk} {self.routing}"


LARGE = {
    "moonlet": Shape(32768, 2048, 1408, 64, 6),
    "moonlight-ep8": Shape(8192, 2048, 1408, 8, 6),
    "dsv3-ep8": Shape(8192, 7168, 2048, 32, 8),
}
# hidden, intermediate, experts, topk of which few tiles are full; each with several token counts and routings
ODD = [(64, 32, 4, 2), (136, 72, 3, 1), (520, 264, 8, 3), (272, 1032, 5, 5)]
ODD_TOKENS = (1, 127, 128, 385, 1000)


def odd_shapes() -> list[Shape]:
    pairs = [(size, tokens) for size in ODD for tokens in ODD_TOKENS]
    return [Shape(tokens, *size, ROUTING[i % 3]) for i, (size, tokens) in enumerate(pairs)]


# ---- the layer as a graph -----------------------------------------------------------------------------------


class Enter(OpDef):
    """The layer's input, which lies where its buffer does. Its gradient leaves the graph."""

    kind, outputs = "layer.enter", ("x",)

    def infer(self, attrs: Any) -> dict[str, Spec]:
        return {"x": Spec(("T", attrs["hidden"]), attrs["format"])}

    def gradient(self, g: Graph, op: Any, douts: Any) -> tuple:
        g.add("dx.left", (1,), "f32", "output")
        g.emit("layer.leave", "dx", [douts[0]], into={"left": "dx.left"})
        return ()

    def reference(self, attrs: Any, ins: Any, outs: Any, scratch: Any) -> None:
        pass


class Leave(OpDef):
    """Takes the layer's output; the output's gradient is the input "dy"."""

    kind, outputs = "layer.leave", ("left",)

    def infer(self, attrs: Any, x: Spec) -> dict[str, Spec]:
        return {"left": Spec((1,), "f32")}

    def gradient(self, g: Graph, op: Any, douts: Any) -> tuple:
        return ("dy",)

    def reference(self, attrs: Any, ins: Any, outs: Any, scratch: Any) -> None:
        pass


for _definition in (Enter(), Leave()):
    OPS[_definition.kind] = _definition


def config_of(shape: Shape, precision: str) -> Config:
    config = load(MOONLET)
    assert config.moe is not None
    moe = replace(config.moe, experts=shape.experts, topk=shape.topk, intermediate_size=shape.inter,
                  shared_experts=0, balance_loss=0.0, normalize_topk=shape.topk > 1)  # fmt: skip
    return replace(
        config,
        moe=moe,
        target=replace(config.target, device=TARGET),
        model=replace(config.model, hidden_size=shape.hidden),
        schedule=replace(config.schedule, precision=precision, recompute="none"),
        train=replace(config.train, seq_len=shape.tokens, batch_size=1, micro_batch_size=1),
    )


def schedule_of(shape: Shape, precision: str, kernels: Kernels, activation: str | None = None) -> Schedule:
    config = config_of(shape, precision)
    builder = model.Builder(config, "train", activation)
    g, layer = builder.g, next(x for x in layers(config) if x.ffn == "moe")
    g.add("dy", ("T", shape.hidden), builder.act, "input")
    builder.state(model.COUNTER, 1, format="i64")
    (x,) = g.emit("layer.enter", "x", [], {"hidden": shape.hidden, "format": builder.act})
    (y,) = builder.moe(x, "moe", layer)
    g.add("loss.left", (1,), "f32", "output")
    g.emit("layer.leave", "y", [y], into={"left": "loss.left"})
    g = passes.quantize_operands(differentiate(g))
    (dx,) = (op.inputs[0] for op in g.ops if op.name == "dx")
    # They stay in memory until the end, for the bench to fill and to read.
    for name in (x, y, dx, "moe.route.logits", "moe.route.indices"):
        g.tensors[name] = replace(g.tensors[name], kind="output")

    def found(graph: Graph, ops: Any, fused: Any) -> Any:
        return None if ops[0].kind.startswith("layer.") else kernels(graph, ops, fused)

    return place(passes.drop_unused(g), TARGET, model.bind_dims(config, 1), kernels=found)


class Runner:
    """An executor of one layer with its data."""

    def __init__(self, shape: Shape, schedule: Schedule, launcher: CudaLauncher | None = None) -> None:
        self.shape, self.schedule = shape, schedule
        self.tensors = allocate(schedule, device=DEVICE)
        arena = torch.full((schedule.arena_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.executor = Executor(schedule, self.tensors, arena, launcher)
        (self.dx,) = (op.inputs[0] for op in schedule.graph.ops if op.name == "dx")
        self.y = next(op.inputs[0] for op in schedule.graph.ops if op.name == "y")

    def fill(self, seed: int) -> None:
        """The same BF16 values whatever the format of the tensors."""
        random = torch.Generator(DEVICE).manual_seed(seed)

        def normal(shape: Sequence[int], scale: float) -> torch.Tensor:
            return torch.randn(*shape, generator=random, device=DEVICE) * scale

        experts = self.shape.experts
        for name, width in (("moe.router", 1.0), ("moe.experts.gate_up", 1.0), ("moe.experts.down", 1.0)):
            x = self.tensors[name]
            for part in x if x.dim() == 3 else [x]:
                value = normal(part.shape, width * part.shape[-1] ** -0.5)
                part.copy_(value.bfloat16() if x.dim() == 3 else value)
        bias = torch.zeros(experts, device=DEVICE)
        if self.shape.routing == "skewed":
            bias = -0.3 * torch.log2(torch.arange(1, experts + 1, device=DEVICE).float())
        elif self.shape.routing == "one":
            bias = -10.0 * torch.arange(experts, device=DEVICE).float()
        self.tensors["moe.router_bias"].copy_(bias)
        self.executor.operand("x.x").copy_(normal((self.shape.tokens, self.shape.hidden), 1.0).bfloat16())
        self.tensors["dy"].copy_(normal((self.shape.tokens, self.shape.hidden), 1.0).bfloat16())

    def clear(self) -> None:
        for name, t in self.tensors.items():
            if name.endswith((".grad", ".load")):
                t.zero_()

    def step(self) -> None:
        self.clear()
        self.executor.run("step")
        self.executor.run("micro")

    def results(self) -> dict[str, torch.Tensor]:
        found = {"y": self.executor.operand(self.y), "dx": self.executor.operand(self.dx)}
        return found | {n: t for n, t in self.tensors.items() if n.endswith(".grad")}


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative to the norm."""
    return {n: float((found[n].double() - w).norm() / w.norm().clamp(min=1e-300)) for n, w in exact.items()}


def flips(shape: Shape, runner: Runner, exact: Runner) -> int:
    """The tokens whose experts are others than float64's. AssertionError when a token's are not tied with those: when
    their logits differ by more than the error of FP32 sums in any order, H·2⁻²⁴ Σ|x·w| of either."""
    logits = exact.executor.operand("moe.route.logits")
    x, w = exact.executor.operand("x.x").double(), exact.tensors["moe.router"].double()
    bound = 2 * shape.hidden * 2.0**-24 * (x.abs() @ w.abs().t()).amax(1)
    score = next(op.attrs["score"] for op in runner.schedule.graph.ops if op.kind == "router")
    preference = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)) + exact.tensors[
        "moe.router_bias"
    ]
    mine, best = (r.executor.operand("moe.route.indices").long() for r in (runner, exact))
    lost = preference.gather(1, best).amin(1) - preference.gather(1, mine).amin(1)
    differ = (mine.sort(1).values != best.sort(1).values).any(1)
    assert bool((lost[differ] <= bound[differ]).all()), f"{shape}: a token's experts are not the best"
    return int(differ.sum())


def check(shape: Shape, precision: str, runner: Runner, seed: int, repeats: int) -> dict[str, Any]:
    """Raises AssertionError when a result is wrong or not the same every time."""
    runner.fill(seed)
    runner.step()  # eager
    first = {n: t.clone() for n, t in runner.results().items()}
    differing = 0
    for _ in range(repeats):  # replays
        runner.step()
        differing += sum(not torch.equal(t, first[n]) for n, t in runner.results().items())
    torch.cuda.synchronize()
    assert not differing, f"{shape}: {differing} of {repeats} repeats differ from the first run"

    def by_reference(activation: str | None) -> Runner:
        plain = Runner(shape, schedule_of(shape, precision, no_kernel, activation))
        plain.fill(seed)
        plain.step()
        return plain

    plain = by_reference("f64")
    exact = {n: t.clone() for n, t in plain.results().items()}
    flipped = flips(shape, runner, plain)
    del plain
    ours = errors(first, exact)
    theirs = errors(by_reference(None).results(), exact)
    # The same roundings fall on other values, 2⁻⁹ at most on each side. The errors of many tokens average to the same
    # norm; those of few, in a gradient that sums over them, differ by chance: of one token, by two roundings. A token
    # that went to other experts gives other values, in quadrature with the rest.
    chance = 2.0**-8 / shape.tokens**0.5
    for name, error in ours.items():
        bound = math.hypot(1.5 * theirs[name] + chance, (2 * flipped / shape.tokens) ** 0.5)
        assert error <= bound, (
            f"{shape}: {name} is {error:.2e} from float64, the reference in BF16 {theirs[name]:.2e}, "
            f"{flipped} tokens at other experts"
        )
    return {"ours": ours, "reference": theirs, "flips": flipped}


# ---- time ---------------------------------------------------------------------------------------------------


def profile(runner: Runner) -> dict[str, float]:
    """Milliseconds of each call of one eager micro-batch, by its name."""
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def observe(name: str) -> Any:
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        yield
        b.record()
        events.append((name, a, b))

    runner.executor.observe = observe
    runner.executor.run("micro")
    events.clear()
    runner.executor.run("micro")
    torch.cuda.synchronize()
    runner.executor.observe = None
    return {name: a.elapsed_time(b) for name, a, b in events}


def torch_layer(shape: Shape, runner: Runner) -> dict[str, float]:
    """The same layer of torch._grouped_mm with autograd, eager, its routing given: ms forward, forward + backward."""
    tokens, topk = shape.tokens, shape.topk
    w1 = runner.tensors["moe.experts.gate_up"].detach().clone().requires_grad_()
    w2 = runner.tensors["moe.experts.down"].detach().clone().requires_grad_()
    x = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    scores = torch.rand(tokens, shape.experts, device=DEVICE)
    weights, indices = scores.topk(topk)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=shape.experts).cumsum(0).int()
    token, weight = order // topk, weights.flatten()[order].unsqueeze(1)

    def forward() -> torch.Tensor:
        h = torch._grouped_mm(x[token], w1.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, dim=-1)
        act = (torch.nn.functional.silu(gate) * up * weight).bfloat16()
        rows = torch._grouped_mm(act, w2.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, token, rows)

    def both() -> None:
        forward().backward(dy)
        x.grad = w1.grad = w2.grad = None

    def alone() -> None:
        with torch.no_grad():
            forward()

    return {"forward": median(alone), "both": median(both)}


def time_layer(name: str, shape: Shape, runner: Runner) -> dict[str, Any]:
    flops = 18.0 * shape.tokens * shape.topk * shape.hidden * shape.inter
    parts = profile(runner)
    stages = {op.name: op.stage for op in runner.schedule.graph.ops}
    forward, backward = (
        sum(ms for call, ms in parts.items() if stages[call] == stage) for stage in ("forward", "backward")
    )
    whole = median(lambda: runner.executor.run("micro"))
    print(f"{name:14} {shape}: forward + backward {whole:.2f} ms in one graph, "
          f"{flops / whole / 1e9:.0f} TFLOP/s; eager {forward:.2f} + {backward:.2f} ms")  # fmt: skip
    for call, ms in sorted(parts.items(), key=lambda item: -item[1])[:16]:
        kernel = any(c.name == call and c.workspace is not None for c in runner.schedule.calls)
        print(f"    {ms:8.3f} ms  {call}{'' if kernel else '  (torch)'}")
    result = {"ms": whole, "tflops": flops / whole / 1e9, "calls": parts, "forward": forward}
    try:
        result["torch"] = torch_layer(shape, runner)
        print(f"    torch._grouped_mm, eager: forward {result['torch']['forward']:.2f} ms, "
              f"forward + backward {result['torch']['both']:.2f} ms")  # fmt: skip
    except Exception as error:
        print(f"    torch._grouped_mm: {type(error).__name__}: {error}")
    return result


# ---- the command --------------------------------------------------------------------------------------------


def build(folder: Path, precision: str, workers: int) -> None:
    found = {}
    for shape in [*odd_shapes(), *LARGE.values()]:
        found |= specs(schedule_of(shape, precision, binding.kernels(TARGET, folder)))
    made = build_kernels(list(found), folder, workers=workers, progress=sys.stdout)
    print(format_build("moe_layer", made))


def run(folder: Path, precision: str, only: str | None, repeats: int, save: Path | None) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {precision}")
    launcher = CudaLauncher(Cache(folder))
    kernels = binding.kernels(TARGET, folder)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(binding.by_torch(schedule_of(LARGE["moonlet"], precision, kernels)))
    right, wrong = 0, []
    for seed, shape in enumerate(odd_shapes() if only is None else []):
        try:
            runner = Runner(shape, schedule_of(shape, precision, kernels), launcher)
            results[f"odd/{shape}"] = check(shape, precision, runner, seed, repeats)
            right += 1
        except Exception as error:
            wrong.append(str(shape))
            print(f"{shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"odd layers: {right} right, each {repeats + 1} times the same bits, one eager and {repeats} of the graph; "
          f"{len(wrong)} wrong", flush=True)  # fmt: skip
    for name, shape in LARGE.items():
        if only not in (None, name):
            continue
        try:
            runner = Runner(shape, schedule_of(shape, precision, kernels), launcher)
            runner.fill(1)
            runner.step()
            results[name] = time_layer(name, shape, runner)
            results[name] |= check(shape, precision, runner, 1, repeats)
            worst = max(e / results[name]["reference"][n] for n, e in results[name]["ours"].items())
            print(
                f"    right: at most {worst:.3f} times the reference's error in BF16; {repeats} replays equal; "
                f"{results[name]['flips']} tied tokens at other experts than float64's"
            )
            del runner
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        torch.cuda.empty_cache()
        if save:
            save.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "mxfp8", "nvfp4"))
    parser.add_argument("--only", choices=tuple(LARGE))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.action == "build":
        build(args.folder, args.precision, args.workers)
    else:
        run(args.folder, args.precision, args.only, args.repeats, args.json)


if __name__ == "__main__":
    main()
