"""One MoE layer, router to combine, forward and backward, as the executor runs it on a GPU: right? how fast?

    python bench/moe_layer.py build DIR     compile the kernels of the layers below into DIR; needs no GPU
    python bench/moe_layer.py run DIR       on the GPU: the odd layers against float64, then the large ones, timed;
                                            --json FILE keeps the numbers, --only odd, large or the name of one
    python bench/moe_layer.py saved         bytes that the backward reads of what the forward wrote, from the schedules

The layer's schedule comes from the same builder, passes and planner as a model's. Its results are compared with the
ops' reference math in float64, without quantization, and held to 1.5 times the error of that math in the layer's
precision, which rounds where the kernels do or more often, and to what few tokens leave to chance. From that math
itself they may be half as far.

Whether two nearly equal experts come in this order or that is decided by the last bits of an FP32 sum, and a token that
goes elsewhere has other gradients. Both references are therefore given the kernels' choices, and those are checked by
themselves: logits against float64, choices against the kernels' own logits.

Memory starts as NaN. Times are medians of CUDA graph replays; the table of kernels is from one eager run with events.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from timing import median, provenance

from nmoe import binding, model
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import format_build
from nmoe.codegen.cache import Cache
from nmoe.codegen.launch import CudaLauncher
from nmoe.codegen.spec import specs
from nmoe.config import Config, layers, load
from nmoe.differentiate import differentiate
from nmoe.executor import Executor, allocate, empty
from nmoe.graph import Graph, Op, Spec
from nmoe.ops import OPS, nbytes
from nmoe.ops.base import OpDef
from nmoe.schedule import Kernels, Schedule, no_kernel, passes, place
from nmoe.schedule.lower import GATHERS

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
# hidden, intermediate, experts, topk of which few tiles are full, each with several token counts and routings; "any":
# blocks of scale factors divide them
ODD = {
    "bf16": [(136, 72, 4, 1), (520, 264, 8, 3)],
    "any": [(64, 32, 4, 2), (96, 160, 12, 3), (544, 288, 8, 8), (288, 1056, 20, 5)],
}
ODD_TOKENS = (1, 127, 128, 385, 1000)


def odd_shapes(precision: str) -> list[Shape]:
    sizes = ODD["any"] + ODD.get(precision, [])
    pairs = [(size, tokens) for size in sizes for tokens in ODD_TOKENS]
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
    """Takes the layer's output, whose gradient enters as "dy.x"."""

    kind, outputs = "layer.leave", ("left",)

    def infer(self, attrs: Any, x: Spec) -> dict[str, Spec]:
        return {"left": Spec((1,), "f32")}

    def gradient(self, g: Graph, op: Any, douts: Any) -> tuple:
        y = g.tensors[op.inputs[0]]
        return g.emit("layer.enter", "dy", [], {"hidden": y.shape[1], "format": y.format})

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


def schedule_of(shape: Shape, precision: str, kernels: Kernels, activation: str | None = None,
                recompute: passes.Recompute = "none", target: str = TARGET) -> Schedule:  # fmt: skip
    config = config_of(shape, precision)
    builder = model.Builder(config, "train", activation)
    g, layer = builder.g, next(x for x in layers(config) if x.ffn == "moe")
    builder.state(model.COUNTER, 1, format="i64")
    (x,) = g.emit("layer.enter", "x", [], {"hidden": shape.hidden, "format": builder.act})
    (y,) = builder.moe(x, "moe", layer)
    g.add("loss.left", (1,), "f32", "output")
    g.emit("layer.leave", "y", [y], into={"left": "loss.left"})
    g = passes.recompute(passes.quantize_operands(differentiate(g)), recompute)
    g = passes.gather_rows(g) if target in GATHERS else g
    (dx,) = (op.inputs[0] for op in g.ops if op.name == "dx")
    # They stay in memory until the end, for the bench to fill and to read.
    for name in (x, y, dx, "moe.route.logits", "moe.route.indices"):
        g.tensors[name] = replace(g.tensors[name], kind="output")

    def found(graph: Graph, ops: Any, fused: Any) -> Any:
        return None if ops[0].kind.startswith("layer.") else kernels(graph, ops, fused)

    return place(passes.drop_unused(g), target, model.bind_dims(config, 1), kernels=found)


class Runner:
    """An executor of one layer with its data. `choices`: the experts that its router, run by torch, is to choose."""

    def __init__(self, shape: Shape, schedule: Schedule, launcher: CudaLauncher | None = None,
                 choices: torch.Tensor | None = None) -> None:  # fmt: skip
        self.shape, self.schedule = shape, schedule
        self.tensors = allocate(schedule, device=DEVICE)
        self.tensors["dy.x"] = empty(
            schedule.spec("dy.x"), DEVICE
        )  # outside of the arena: it is there from the start
        arena = torch.full((schedule.arena_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
        given = None if choices is None else {"router": partial(self.route, choices)}
        self.executor = Executor(schedule, self.tensors, arena, launcher, given)
        (self.dx,) = (op.inputs[0] for op in schedule.graph.ops if op.name == "dx")
        self.y = next(op.inputs[0] for op in schedule.graph.ops if op.name == "y")

    def route(self, choices: torch.Tensor, op: Op, ins: list[Any], outs: list[Any]) -> Callable[[], None]:
        """The router's reference math with the experts given."""
        scratch = [empty(spec, DEVICE) for spec in self.schedule.scratch_specs(op)]
        indices, weights, logits = outs[:3]

        def run() -> None:
            OPS["router"].reference(op.attrs, ins, outs, scratch)
            indices.copy_(choices)
            weights.copy_(scores(op.attrs, logits).gather(1, choices.long()))
            if op.attrs["normalize"]:
                weights.div_(weights.sum(-1, keepdim=True))
            weights.mul_(op.attrs["route_scale"])

        return run

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
        self.tensors["dy.x"].copy_(normal((self.shape.tokens, self.shape.hidden), 1.0).bfloat16())

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


def scores(attrs: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid() if attrs["score"] == "sigmoid" else logits.softmax(-1)


@dataclass
class Found:
    """What the kernels made of a layer."""

    results: dict[str, torch.Tensor]
    logits: torch.Tensor
    choices: torch.Tensor


def observe(runner: Runner, seed: int, repeats: int) -> Found:
    """One eager step, then `repeats` replays of the graph. AssertionError unless all give the same bits."""
    runner.fill(seed)
    runner.step()
    found = Found({n: t.clone() for n, t in runner.results().items()},
                  *(runner.executor.operand(f"moe.route.{n}").clone() for n in ("logits", "indices")))  # fmt: skip
    differing = 0
    for _ in range(repeats):
        runner.step()
        differing += sum(not same_bits(t, found.results[n]) for n, t in runner.results().items())
    assert not differing, (
        f"{runner.shape}: {differing} results of {repeats} repeats differ from the first run"
    )
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_choices(found: Found, exact: Runner) -> int:
    """The tokens whose experts float64 would choose otherwise. AssertionError when a logit is further from float64 than
    a chain of H FP32 multiply-adds may be, H·2⁻²⁴ Σ|x·w|, or a token's experts are not the best by the kernel's logits,
    but for the FP32 error of the scores."""
    x, w = exact.executor.operand("x.x").double(), exact.tensors["moe.router"].double()
    wanted = x @ w.t()
    allowed = exact.shape.hidden * 2.0**-24 * (x.abs() @ w.abs().t())
    worst = float(((found.logits.double() - wanted).abs() / allowed).max())
    assert worst <= 1, f"{exact.shape}: a logit's error is {worst:.2e} of its bound"
    attrs = next(op.attrs for op in exact.schedule.graph.ops if op.kind == "router")
    bias, topk = exact.tensors["moe.router_bias"].double(), found.choices.shape[1]
    preference = scores(attrs, found.logits.double()) + bias
    best = preference.topk(topk).values.amin(1)
    lost = best - preference.gather(1, found.choices.long()).amin(1)
    assert bool((lost <= 2.0**-20 + 2.0**-23 * bias.abs().amax()).all()), (
        f"{exact.shape}: a token's experts are not the best by the kernel's logits"
    )
    assert found.choices.sort(1).values.diff().ne(0).all(), f"{exact.shape}: an expert was chosen twice"
    others = (scores(attrs, wanted) + bias).topk(topk).indices.sort(1).values
    return int((others != found.choices.long().sort(1).values).any(1).sum())


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor],
             norm: dict[str, torch.Tensor]) -> dict[str, float]:  # fmt: skip
    """Of each result, relative to a norm; in pieces, because a copy in float64 of the largest would not fit."""

    def square(x: torch.Tensor, y: torch.Tensor | None = None) -> float:
        xs = x.flatten().split(1 << 26)
        ys = [None] * len(xs) if y is None else y.flatten().split(1 << 26)
        return sum(float((p.double() - (0 if q is None else q.double())).square().sum())
                   for p, q in zip(xs, ys, strict=True))  # fmt: skip

    return {n: (square(one[n], other[n]) / max(square(x), 1e-300)) ** 0.5 for n, x in norm.items()}


def check(shape: Shape, precision: str, found: Found, seed: int) -> dict[str, Any]:
    """Compares with the references. Raises AssertionError when a result is wrong."""

    def by_reference(precision: str, activation: str | None) -> Runner:
        plain = Runner(shape, schedule_of(shape, precision, no_kernel, activation), choices=found.choices)
        plain.fill(seed)
        plain.step()
        return plain

    reference = by_reference(precision, None).results()
    reference = {n: t.clone() for n, t in reference.items()}
    torch.cuda.empty_cache()
    exact = by_reference("fp32", "f64")
    others = check_choices(found, exact)
    wanted = exact.results()
    ours, theirs = (distance(x, wanted, wanted) for x in (found.results, reference))
    apart = distance(found.results, reference, wanted)
    # The same roundings fall on other values, 2⁻⁹ at most on each side. The errors of many tokens average to the same
    # norm; those of few, in a gradient that sums over them, differ by chance: of one token, by two roundings.
    chance = 2.0**-8 / shape.tokens**0.5
    for name, error in ours.items():
        assert error <= 1.5 * theirs[name] + chance, (
            f"{shape}: {name} is {error:.2e} from float64, the reference in {precision} {theirs[name]:.2e}"
        )
        # A value whose BF16 rounding differs may be quantized to the next code, or its block by the next scale.
        assert apart[name] <= 0.5 * theirs[name] + 2.0**-8 + chance, (
            f"{shape}: {name} is {apart[name]:.2e} from the reference in {precision}, which is {theirs[name]:.2e} off"
        )
    return {"ours": ours, "reference": theirs, "apart": apart, "others": others}


# ---- what is saved for backward -----------------------------------------------------------------------------


def saved(schedule: Schedule) -> dict[str, int]:
    """Bytes of each activation that a forward call wrote and a backward call reads, padding of experts included."""
    written, read = (
        {schedule.aliases.get(name, name) for call in schedule.calls
         if call.phase == "micro" and call.ops[0].stage == stage for name in getattr(call, side)}
        for stage, side in (("forward", "outputs"), ("backward", "inputs"))
    )  # fmt: skip
    return {
        name: nbytes(schedule.spec(name)) for name in sorted(written & read) if name in schedule.lifetimes
    }


def print_saved() -> None:
    for name, shape in LARGE.items():
        least = 2 * shape.tokens * (shape.hidden + 2 * shape.topk * shape.inter)
        print(f"{name} {shape}: 2Td + 4TKn bytes are {least / 2**20:.0f} MiB")
        cases = [(TARGET, "bf16"), ("sm_100a", "bf16"), (TARGET, "mxfp8"), (TARGET, "nvfp4")]
        for (target, precision), recompute in product(cases, get_args(passes.Recompute)[:2]):
            kernels = binding.kernels(target)
            found = saved(schedule_of(shape, precision, kernels, recompute=recompute, target=target))
            largest = ", ".join(f"{n} {size / 2**20:.0f}" for n, size in found.items() if size > least / 100)
            total = sum(found.values()) / 2**20
            print(f"    {target:7} {precision:6} {recompute:9} {total:6.0f} MiB: {largest}")


# ---- time ---------------------------------------------------------------------------------------------------


def call_times(runner: Runner, run: Callable[[], Any]) -> list[tuple[str, float]]:
    """The calls that `run` makes of the runner's executor, eagerly and in order: name and milliseconds."""
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def observe(name: str) -> Any:
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        yield
        b.record()
        events.append((name, a, b))

    runner.executor.observe = observe
    run()
    torch.cuda.synchronize()
    runner.executor.observe = None
    return [(name, a.elapsed_time(b)) for name, a, b in events]


def profile(runner: Runner) -> dict[str, float]:
    """Milliseconds of each call of one eager micro-batch, by its name."""
    runner.executor.run("micro")
    return dict(call_times(runner, lambda: runner.executor.run("micro")))


def torch_layer(
    shape: Shape, runner: Runner, compiled: bool = False
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same layer of torch._grouped_mm with autograd, eager or compiled, its routing given: forward, forward +
    backward."""
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

    def layer(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        h = torch._grouped_mm(x[token], w1.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, dim=-1)
        act = (torch.nn.functional.silu(gate) * up * weight).bfloat16()
        rows = torch._grouped_mm(act, w2.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, token, rows)

    run = torch.compile(layer) if compiled else layer

    def forward() -> None:
        with torch.no_grad():
            run(x, w1, w2)

    def both() -> None:
        run(x, w1, w2).backward(dy)
        x.grad = w1.grad = w2.grad = None

    return forward, both


def time_layer(name: str, shape: Shape, precision: str, runner: Runner) -> dict[str, Any]:
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
    if precision != "bf16":
        return result
    try:
        result["torch"] = dict(zip(("forward", "both"), map(median, torch_layer(shape, runner)), strict=True))
        print(f"    torch._grouped_mm, eager: forward {result['torch']['forward']:.2f} ms, "
              f"forward + backward {result['torch']['both']:.2f} ms")  # fmt: skip
    except Exception as error:
        print(f"    torch._grouped_mm: {type(error).__name__}: {error}")
    return result


# ---- the command --------------------------------------------------------------------------------------------


def build(folder: Path, precision: str, only: str, workers: int) -> None:
    found = {}
    for shape in shapes(precision, only).values():
        found |= specs(schedule_of(shape, precision, binding.kernels(TARGET, folder)))
    made = build_kernels(list(found), folder, workers=workers, progress=sys.stdout)
    print(format_build(f"moe_layer, {precision}", made))


def shapes(precision: str, only: str) -> dict[str, Shape]:
    named = {f"odd {i}": shape for i, shape in enumerate(odd_shapes(precision))} | LARGE
    wanted = {"all": named.keys(), "odd": named.keys() - LARGE.keys(), "large": LARGE.keys()}.get(
        only, {only}
    )
    return {name: shape for name, shape in named.items() if name in wanted}


def run(folder: Path, precision: str, only: str, repeats: int, save: Path | None) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {precision}, {repeats} replays each")
    launcher = CudaLauncher(Cache(folder))
    kernels = binding.kernels(TARGET, folder)
    results: dict[str, Any] = provenance()
    print(binding.by_torch(schedule_of(LARGE["moonlet"], precision, kernels)))
    right = wrong = 0
    for seed, (name, shape) in enumerate(shapes(precision, only).items()):
        begin = time.monotonic()
        try:
            results[name] = found = one(name, shape, precision, kernels, launcher, seed, repeats)
            right += 1
            ratio, n = max((e / found["reference"][n], n) for n, e in found["ours"].items())
            far = max(found["ours"].values())
            print(
                f"{name:14} {shape}: right: at most {far:.1e} from float64; {n} {ratio:.3f} times the reference's; "
                f"{max(found['apart'].values()):.1e} from that; {found['others']} tokens' experts are not float64's; "
                f"{time.monotonic() - begin:.1f} s",
                flush=True,
            )
        except Exception as error:
            wrong += 1
            print(f"{name}: {shape}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        torch.cuda.empty_cache()
        if save:
            save.write_text(json.dumps(results, indent=1))
    print(
        f"{precision}: {right} layers right, each the same bits in an eager run and {repeats} replays; {wrong} wrong"
    )


def one(name: str, shape: Shape, precision: str, kernels: Kernels, launcher: CudaLauncher, seed: int,
        repeats: int) -> dict[str, Any]:  # fmt: skip
    runner = Runner(shape, schedule_of(shape, precision, kernels), launcher)
    found = observe(runner, seed, repeats)
    times = time_layer(name, shape, precision, runner) if name in LARGE else {}
    del runner  # the references need its memory
    torch.cuda.empty_cache()
    return times | check(shape, precision, found, seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run", "saved"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "mxfp8", "nvfp4"))
    parser.add_argument("--only", choices=("all", "odd", "large", *LARGE), default="all")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.action == "saved":
        print_saved()
    elif args.action == "build":
        build(args.folder, args.precision, args.only, args.workers)
    else:
        run(args.folder, args.precision, args.only, args.repeats, args.json)


if __name__ == "__main__":
    main()
