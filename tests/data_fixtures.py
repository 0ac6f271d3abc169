"""Small corpora and hand-made shards for the tests of nmoe.data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nmoe.config import Data, Source
from nmoe.data.shards import Manifest, ShardWriter

EOS = 0


def make_source(
    folder: Path, shards: Sequence[Sequence[Sequence[int]]], vocab_size: int = 1000, **spec: object
) -> None:
    """Write documents (ids without EOS) as the shards of a prepared source."""
    source = {"dataset": "text", "subset": "", "split": "train", "text_field": "text", "max_tokens": 0} | spec
    tokenizer = {"spec": "bpe:1000", "fingerprint": "f" * 64, "vocab_size": vocab_size, "eos": EOS}
    manifest = Manifest(source, tokenizer)
    folder.mkdir(parents=True)
    for documents in shards:
        writer = ShardWriter(folder, len(manifest.shards), manifest.dtype)
        for document in documents:
            writer.append(np.array([*document, EOS]))
        manifest = manifest.with_shard(writer.close(), {})
    manifest.completed().save(folder)


def make_data(directory: Path, names: Sequence[str] = ("a",), **settings: object) -> Data:
    sources = tuple(Source(name=name, files=("unused",)) for name in names)
    return Data(**{"dir": str(directory), "tokenizer": "bpe:1000", "sources": sources} | settings)  # type: ignore[arg-type]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 invented words, every ninth empty or blank."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzäß🙂 ", k=rng.randint(2, 9))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]
    for row in range(4, count, 9):
        texts[row] = rng.choice(["", "  \n"])
    return texts


def digest(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory`, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
