"""Tokens a second that one core takes from warm shards, next to torch's DataLoader over the same memory map.

    python bench/loader.py [--tokens 64000000] [--seconds 3]

The shards are made up: documents of lognormal lengths, a vocabulary of 50,000. The peer is what one writes
without nmoe: a map-style Dataset of windows, shuffled by RandomSampler, that finds documents by their EOS, and
DataLoader in the same process; it too yields tokens, targets, positions within the document and their mask.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).parents[1]))

from nmoe.config import Data, Source
from nmoe.data.loader import Loader
from nmoe.data.shards import Manifest, ShardWriter

VOCAB, EOS, SHARDS = 50_000, 0, 4


def make_shards(directory: Path, tokens: int) -> Data:
    """`tokens` random tokens in documents of about 600."""
    rng = np.random.default_rng(0)
    source = Source(name="noise", files=("none",))
    spec = {key: getattr(source, key) for key in ("dataset", "subset", "split", "text_field", "max_tokens")}
    name = f"bpe:{VOCAB}"
    tokenizer = {"spec": name, "fingerprint": "0" * 64, "vocab_size": VOCAB, "eos": EOS}
    manifest, folder = Manifest(spec, tokenizer), directory / source.name
    folder.mkdir()
    for number in range(SHARDS):
        writer = ShardWriter(folder, number, manifest.dtype)
        while writer.tokens < tokens // SHARDS:
            document = rng.integers(1, VOCAB, int(rng.lognormal(6, 0.9)) + 1)
            document[-1] = EOS
            writer.append(document)
        manifest = manifest.with_shard(writer.close(), {})
    manifest.completed().save(folder)
    return Data(dir=str(directory), tokenizer=name, sources=(source,))


class Windows(Dataset):
    """The peer's view of one shard after the other."""

    def __init__(self, folder: Path, seq_len: int):
        self._shards = [np.memmap(path, "<u2", "r") for path in sorted(folder.glob("*.bin"))]
        self._each = [(len(shard) - 1) // seq_len for shard in self._shards]
        self._seq_len = seq_len

    def __len__(self) -> int:
        return sum(self._each)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        shard = 0
        while index >= self._each[shard]:
            index -= self._each[shard]
            shard += 1
        start = index * self._seq_len
        window = self._shards[shard][start : start + self._seq_len + 1].astype(np.int64)
        tokens, targets = window[:-1], window[1:].copy()
        ends, columns = tokens == EOS, np.arange(self._seq_len)
        begins = np.zeros_like(columns)
        begins[1:] = np.where(ends[:-1], columns[1:], 0)
        targets[ends] = -1
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": columns - np.maximum.accumulate(begins),
        }


def tokens_per_second(batches: Iterator[object], tokens: int, seconds: float) -> float:
    """Draw batches of `tokens` for `seconds`, after one that warms up; by the processor's clock, for the
    machine may be shared."""
    next(batches)
    started, drawn = time.process_time(), 0
    while time.process_time() - started < seconds:
        next(batches)
        drawn += tokens
    return drawn / (time.process_time() - started)


def peer(folder: Path, seq_len: int, batch_size: int) -> Iterator[object]:
    windows = Windows(folder, seq_len)
    while True:
        yield from DataLoader(windows, batch_size, sampler=RandomSampler(windows), drop_last=True)


def ours(data: Data, seq_len: int, batch_size: int) -> Iterator[object]:
    loader = Loader(data, seed=0, seq_len=seq_len, batch_size=batch_size, vocab_size=VOCAB)
    return map(loader.batch, count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in processors if line.startswith("model name")), ":").split(":")[1]
    print(f"{date.today()}  one core of {model.strip()}, {platform.system()}, torch {torch.__version__}")
    print(f"{'batch':>12}  {'nmoe':>14}  {'DataLoader':>14}  {'ratio':>5}   (million tokens/s)")
    with tempfile.TemporaryDirectory() as directory:
        data = make_shards(Path(directory), args.tokens)
        makers: list[Callable[[int, int], Iterator[object]]] = [
            lambda s, b: ours(data, s, b),
            lambda s, b: peer(Path(directory) / "noise", s, b),
        ]
        for seq_len, batch_size in ((256, 8), (4096, 8), (4096, 128)):
            tokens = seq_len * batch_size
            rates = [tokens_per_second(make(seq_len, batch_size), tokens, args.seconds) for make in makers]
            mine, theirs = (rate / 1e6 for rate in rates)
            name = f"{batch_size} × {seq_len}"
            print(f"{name:>12}  {mine:>14.1f}  {theirs:>14.1f}  {mine / theirs:>5.1f}")


if __name__ == "__main__":
    main()
