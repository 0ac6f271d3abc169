"""What it would do to the loss to dispatch rows as their MXFP8 copy: the quickstart on text, on the CPU.

    make quickstart                                 once, for the text
    python bench/payload.py bf16 --json FILE        rows travel in BF16 and each copy is rounded once
    python bench/payload.py mxfp8 --json FILE       rows and output gradients are rounded in blocks of 32 of a row
                                                    before they travel: row copies are the same bits, column copies
                                                    are rounded twice (docs/rdep.md, "What travels")
    python bench/payload.py copies                  how far column copies of MXFP8 rows are from those of BF16 rows, and
                                                    from the rows NVFP4 copies of what travelled in each format

Both train with the numerics of MXFP8, the same data and initial weights. The quickstart's rows are too short (256) to
travel in MXFP8 by themselves.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe import formats
from nmoe.config import load
from nmoe.data.loader import Loader
from nmoe.ops import OPS
from nmoe.step import Step

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.toml"


def round_what_travels() -> None:
    """One rank dispatches by the op's reference math."""
    dispatch = OPS["dispatch"]
    exact = dispatch.reference

    def rounded(attrs: Any, ins: list[Any], outs: list[Any], scratch: list[Any]) -> None:
        x = (
            ins[0]
            if ins[0] is None
            else formats.dequantize(formats.quantize(ins[0], "mxfp8", 1), ins[0].dtype)
        )
        exact(attrs, [x, *ins[1:]], outs, scratch)

    dispatch.reference = rounded  # type: ignore[method-assign]


def copies() -> None:
    """How far the column copy of an MXFP8 payload is from that of BF16 rows."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x = normal(4096, 2048)
    for name, scale in (
        ("normal", normal(1, 1) * 0),
        ("rows of sizes e^(2 normal)", 2 * normal(4096, 1)),
        ("elements of sizes e^(1.5 normal)", 1.5 * normal(4096, 2048)),
    ):
        rows = (x * scale.exp()).bfloat16()
        payload = formats.dequantize(formats.quantize(rows, "mxfp8", 1), torch.bfloat16)
        once, twice = (formats.dequantize(formats.quantize(r, "mxfp8", 0)) for r in (rows, payload))
        apart, first, second = (
            float((a - b.float()).norm() / rows.float().norm())
            for a, b in ((twice, once), (once, rows), (twice, rows))
        )
        differ = float((once != twice).float().mean())
        print(f"{name}: {differ:.1e} of the elements differ, the copies by {apart:.1e} of their norm; they are "
              f"{first:.5f} and {second:.5f} from the rows")  # fmt: skip

    rows = normal(4096, 2048).bfloat16()
    for axis, name in ((1, "along the rows"), (0, "down the columns, transformed")):
        hadamard = axis == 0
        exact = formats.hadamard_transform(rows.float(), 0) if hadamard else rows.float()
        apart = []
        for sent in ("bf16", "mxfp8", "nvfp4"):
            came = (
                rows
                if sent == "bf16"
                else formats.dequantize(formats.quantize(rows, sent, 1), torch.bfloat16)
            )
            copied = sent == "nvfp4" and axis == 1  # what came is the copy
            quantized = formats.quantize(came, "nvfp4", axis, hadamard=hadamard)
            made = came if copied else formats.dequantize(quantized)
            apart.append(f"{sent} {float((made.float() - exact).norm() / exact.norm()):.4f}")
        print(
            f"NVFP4 copies {name} of normal rows that travelled in {', '.join(apart)} of their norm from the rows"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("payload", choices=("bf16", "mxfp8", "copies"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.payload == "copies":
        copies()
        return
    if args.payload == "mxfp8":
        round_what_travels()
    config = load(CONFIG)
    config = replace(
        config,
        schedule=replace(config.schedule, precision="mxfp8"),
        run=replace(config.run, seed=config.run.seed + args.seed),
    )
    step = Step(config, say=print)
    step.parameters.initialise(config.run.seed, config.model.init_std)
    loader = Loader(
        config.data, seed=config.run.seed, seq_len=config.train.seq_len, batch_size=config.train.batch_size,
        vocab_size=config.model.vocab_size,
    )  # fmt: skip
    losses: list[float] = []
    begin = time.monotonic()
    for index in range(args.steps):
        losses.append(step.run(index, loader.batch(index)).losses["main"])
        if index % 20 == 19:
            last = losses[-20:]
            print(f"{index + 1}: {sum(last) / len(last):.4f}, {time.monotonic() - begin:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"payload": args.payload, "seed": args.seed, "losses": losses}))


if __name__ == "__main__":
    main()
