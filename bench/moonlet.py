"""Training steps of moonlet on one GPU in BF16, as many of its layers as fit: speed, profile, repeatability.

    python bench/moonlet.py build DIR     compile the kernels into DIR; needs no GPU
    python bench/moonlet.py run DIR       on the GPU
    python bench/moonlet.py text DIR      on the GPU: the loss on the quickstart's text, its shards in DIR/data/stdlib
    python bench/moonlet.py peer DIR      on the GPU: transformers' DeepSeek-V3 of the same config

Width, vocabulary, sequence length and micro-batch are configs/moonlet.toml's; the layers are one dense and LAYERS of
its eleven MoE layers, a step is two micro-batches of random tokens. MFU is by the FLOPs that the model needs
(nmoe/predict.py) and the data sheet's 989 TFLOP/s. The peer runs forward and backward in BF16 with torch's grouped
GEMMs and SDPA, eager and without an optimizer, on as many sequences at once as fit, and compares with a micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from timing import median
from torch.profiler import ProfilerActivity, profile

from nmoe import binding, devices, hf
from nmoe.bench import synthetic
from nmoe.codegen.build import build as build_kernels
from nmoe.codegen.build import format_build
from nmoe.config import Config, load
from nmoe.data.loader import Loader
from nmoe.executor import executor_bytes
from nmoe.predict import model_flops
from nmoe.step import Step

CONFIG = Path(__file__).parents[1] / "configs" / "moonlet.toml"
TARGET, PRECISION, LAYERS, STEPS, TEXT_STEPS = "sm_90a", "bf16", 4, 8, 40


def config() -> Config:
    found = load(CONFIG)
    dense, moe = found.model.layers
    return replace(
        found,
        target=replace(found.target, device=TARGET),
        model=replace(found.model, layers=(dense, replace(moe, repeat=LAYERS))),
        schedule=replace(found.schedule, precision=PRECISION),
        train=replace(found.train, batch_size=2 * found.train.micro_batch_size),
        optim=replace(found.optim, warmup_tokens=0, decay_tokens=0),
    )


def steps(step: Step, count: int) -> tuple[list[float], list[float]]:
    """Losses and milliseconds."""
    batches = synthetic(step.config)
    losses, taken = [], []
    for index in range(count):
        begin = time.perf_counter()
        losses.append(step.run(index, batches(index % 2)).losses["main"])
        taken.append(1e3 * (time.perf_counter() - begin))
    return losses, taken


def fingerprint(step: Step) -> str:
    """Of the masters' bits."""
    words = [shard.master.view(torch.int32) for shard in step.parameters.shards]
    return " ".join(f"{int(part.sum()):x}" for flat in words for part in flat.split(1 << 28))


def started(found: Config) -> Step:
    step = Step(found, say=lambda line: print(line, flush=True))
    step.parameters.initialise(found.run.seed, found.model.init_std)
    return step


def micro_batch_milliseconds(step: Step) -> float:
    """Of a replayed micro-batch. A host sync in it is an error."""
    executor = step.executors[0]
    torch.cuda.set_sync_debug_mode("error")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(5):
        executor.run("micro")
    end.record()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 5


SHORT = (
    (
        r"kernel_cutlass_(\w+?)_nmoe.*?(Sm90\w+|Gemm\w*|CrossEntropy|Rows|Router\w*|Dispatch|Combine|Plan)?.*",
        r"\1 \2",
    ),
    (r"void at::native::(?:\(anonymous namespace\)::)?(\w+).*", r"torch \1"),
    (r"void (\w+).*", r"\1"),
)


def table(step: Step) -> None:
    """Milliseconds by kernel and by op in one step, without graphs so that ops have names."""
    executor, batches = step.executors[0], synthetic(step.config)
    kinds: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
    kind_of = {op.name: f"{op.kind}.{op.attrs['role']}" if "role" in op.attrs else op.kind
               for op in executor.schedule.graph.ops}  # fmt: skip

    class Timed:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()

        def __exit__(self, *_: object) -> None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            head = "head." if self.name.startswith("loss.") else ""
            kinds[head + kind_of[self.name]].append((self.begin, end))

    executor.observe = Timed
    executor.run("micro")
    kinds.clear()
    executor.run("micro")
    executor.observe = None
    torch.cuda.synchronize()
    summed = {kind: (sum(a.elapsed_time(b) for a, b in pairs), len(pairs)) for kind, pairs in kinds.items()}
    total = sum(ms for ms, _ in summed.values())
    print(f"one micro-batch call by call, {total:.1f} ms by op:")
    for kind, (ms, count) in sorted(summed.items(), key=lambda item: -item[1][0]):
        print(f"  {kind:<28}{count:>4}x {ms:8.2f} ms {100 * ms / total:5.1f} %")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step.run(STEPS, batches(0))
        torch.cuda.synchronize()
    rows = [(event.key, event.self_device_time_total / 1e3, event.count) for event in recorded.key_averages()]
    rows = [row for row in rows if row[1] > 0]
    total = sum(ms for _, ms, _ in rows)
    print(f"one step, {total:.1f} ms of kernels:")
    for name, ms, count in sorted(rows, key=lambda row: -row[1])[:32]:
        for pattern, short in SHORT:
            name = re.sub(pattern, short, name)
        print(f"  {name[:70]:<72}{count:>5}x {ms:8.2f} ms {100 * ms / total:5.1f} %")


def run() -> None:
    found = config()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    begin = time.perf_counter()
    step = started(found)
    print(
        f"ready after {time.perf_counter() - begin:.1f} s; executor {executor_bytes(step.executors[0]) / 1e9:.1f} GB"
    )
    losses, taken = steps(step, STEPS)
    bits = fingerprint(step)
    print(f"losses {' '.join(f'{loss:.4f}' for loss in losses)}; ms {' '.join(f'{ms:.0f}' for ms in taken)}")
    middle = statistics.median(taken[2:])
    tokens = found.train.batch_size * found.train.seq_len
    flops = step.micro_batches * model_flops(found, step.schedule)
    peak = devices.of_target(TARGET).peak[PRECISION]
    print(f"step {middle:.1f} ms, {1e3 * tokens / middle:,.0f} tokens/s, MFU {1e5 * flops / middle / peak:.1f} %, "
          f"{flops / 1e12:.0f} TFLOP; graph {step.executors[0].captured}; "
          f"peak memory {torch.cuda.max_memory_reserved() / 1e9:.1f} GB", flush=True)  # fmt: skip
    micro = micro_batch_milliseconds(step)
    print(f"micro-batch {micro:.1f} ms, MFU {1e5 * flops / step.micro_batches / micro / peak:.1f} %, no host sync",
          flush=True)  # fmt: skip
    table(step)
    step.parameters.initialise(found.run.seed, found.model.init_std)
    step.optimizer.m.zero_()
    step.optimizer.v.zero_()
    step.optimizer.steps = 0
    for name, tensor in step.tensors.items():
        if name.endswith(".router_bias"):
            tensor.zero_()
    again, _ = steps(step, STEPS)
    print(f"a second run: losses {'equal' if again == losses else f'DIFFER {again}'}, "
          f"masters {'equal' if fingerprint(step) == bits else 'DIFFER'} bit for bit", flush=True)  # fmt: skip


def text(folder: Path) -> None:
    """A short run on real text; its tokenizer has 4096 tokens, so most of the vocabulary stays unused."""
    found, source = config(), load(CONFIG.with_name("quickstart.toml"))
    found = replace(
        found,
        data=replace(source.data, dir=str(folder / "data" / "stdlib")),
        train=replace(found.train, steps=TEXT_STEPS),
        optim=replace(found.optim, warmup_tokens=10 * found.train.batch_size * found.train.seq_len),
    )
    step = started(found)
    data = Loader(
        found.data, seed=0, seq_len=found.train.seq_len, batch_size=found.train.batch_size,
        vocab_size=found.model.vocab_size, micro_batch_size=found.train.micro_batch_size,
    )  # fmt: skip
    losses = [step.run(index, data.batch(index)).losses["main"] for index in range(TEXT_STEPS)]
    pieces = int((data.batch(0).positions == 0).sum())
    print(f"{found.train.batch_size * found.train.seq_len / pieces:.0f} tokens of a document on average")
    shown = [*range(0, TEXT_STEPS, 5), TEXT_STEPS - 1]
    print("loss on text by step: " + ", ".join(f"{i + 1}: {losses[i]:.3f}" for i in shown))


def peer() -> None:
    import transformers

    found = config()
    described = hf._config_json(found, torch.bfloat16, None)
    described = {k: v for k, v in described.items() if k not in ("architectures", "dtype")}
    described["router_aux_loss_coef"] = 0.0
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**described),
            attn_implementation="sdpa", experts_implementation="grouped_mm",
        ).train()  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    print(f"transformers {transformers.__version__}: {count / 1e9:.2f} B parameters")
    for sequences in (4, 2, 1):
        tokens = torch.randint(found.model.vocab_size, (sequences, found.train.seq_len), device="cuda")

        def both(tokens: torch.Tensor = tokens) -> None:
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

        taken = 0.0
        with contextlib.suppress(torch.OutOfMemoryError):
            taken = median(both, 5)
        if taken:
            rate, memory = 1e3 * tokens.numel() / taken, torch.cuda.max_memory_reserved() / 1e9
            print(
                f"{sequences} sequences, forward and backward: {taken:.1f} ms, {rate:,.0f} tokens/s, {memory:.1f} GB"
            )
            return
        print(f"{sequences} sequences: out of memory", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("build", "run", "text", "peer"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    os.environ["NMOE_HOME"] = str(args.folder)  # where the trainer looks for kernels
    if args.action != "build":
        {"run": run, "text": lambda: text(args.folder), "peer": peer}[args.action]()
        return
    found = list(binding.needed(config(), [binding.lowered(config())]))
    made = build_kernels(found, args.folder / "kernels", progress=sys.stderr)
    print(format_build("moonlet", made))


if __name__ == "__main__":
    main()
