"""Token shards on disk: the one format between preparation and training.

A source is a folder. `shard_00000.bin` holds token ids, little-endian, uint16 if the vocabulary fits and
uint32 if not; documents lie back to back, each ended by EOS, and none crosses a shard. `shard_00000.idx`
holds the offset, in tokens, at which each document of that shard starts, little-endian int64. `manifest.json`
names the tokenizer, the specification of the source and every shard with its counts and checksums; a shard
exists when the manifest lists it. Every file is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.errors import DataError
from nmoe.files import write_atomic

FORMAT = 1
MANIFEST = "manifest.json"
_INDEX = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """What one token takes on disk."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    name: str
    tokens: int
    documents: int
    sha256_bin: str
    sha256_idx: str


@dataclass(frozen=True)
class Manifest:
    """What a source's folder holds. `cursor` is where an unfinished preparation goes on."""

    source: dict[str, Any]
    tokenizer: dict[str, Any]  # spec, fingerprint, vocab_size, eos
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    cursor: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer["vocab_size"])

    def save(self, folder: Path) -> None:
        content = {"format": FORMAT, "tokens": self.tokens, "documents": self.documents, **asdict(self)}
        write_atomic(folder / MANIFEST, json.dumps(content, indent=1).encode())

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read `{folder}/manifest.json`; DataError if it is missing, damaged or of another format."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: missing; run `nmoe prep-mixture` with this config first") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); {_again(folder)}") from error
        if not isinstance(content, dict) or "format" not in content:
            raise DataError(f"{path}: not a manifest of token shards; {_again(folder)}")
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']}, this nmoe reads {FORMAT}; {_again(folder)}")
        try:
            shards = tuple(Shard(**shard) for shard in content["shards"])
            manifest = Manifest(
                source=dict(content["source"]),
                tokenizer={
                    key: content["tokenizer"][key] for key in ("spec", "fingerprint", "vocab_size", "eos")
                },
                shards=shards,
                complete=content["complete"],
                cursor=content["cursor"],
            )
            totals = (content["tokens"], content["documents"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); {_again(folder)}") from error
        if totals != (manifest.tokens, manifest.documents):
            raise DataError(
                f"{path}: damaged (totals {totals}, shards hold {(manifest.tokens, manifest.documents)}); "
                f"{_again(folder)}"
            )
        return manifest

    def check_source(self, folder: Path, asked: dict[str, Any]) -> None:
        """DataError at the first key of `asked` of which the source was prepared with another value."""
        for key, value in asked.items():
            if (made := self.source.get(key)) != value:
                raise DataError(
                    f"{folder}: prepared with {key} = {json.dumps(made)}, the config says "
                    f"{json.dumps(value)}; set it back, or {_again(folder)}"
                )

    def with_shard(self, shard: Shard, cursor: dict[str, Any]) -> Manifest:
        return replace(self, shards=(*self.shards, shard), cursor=cursor)

    def completed(self) -> Manifest:
        return replace(self, complete=True, cursor=None)


def _again(folder: Path) -> str:
    return f"delete {folder} and run `nmoe prep-mixture`"


class ShardWriter:
    """Writes shard number `index` of `folder`; nothing of it has its final name before `close`."""

    def __init__(self, folder: Path, index: int, dtype: np.dtype):
        self._stem = folder / f"shard_{index:05d}"
        self._dtype = dtype
        self._file = open(self._temporary(), "wb", buffering=1 << 20)  # noqa: SIM115 (closed by `close`)
        self._sha256 = hashlib.sha256()
        self._starts: list[int] = []
        self.tokens = 0

    def _temporary(self) -> Path:
        return self._stem.with_suffix(".bin.tmp")

    def append(self, document: np.ndarray) -> None:
        """Add one document, `[length]` ids with EOS at its end."""
        content = document.astype(self._dtype, copy=False).tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._starts.append(self.tokens)
        self.tokens += len(document)

    def close(self) -> Shard:
        """Make the shard durable under its name; the manifest has yet to list it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary(), self._stem.with_suffix(".bin"))
        starts = np.asarray(self._starts, dtype=_INDEX).tobytes()
        write_atomic(self._stem.with_suffix(".idx"), starts)
        return Shard(
            name=self._stem.name,
            tokens=self.tokens,
            documents=len(self._starts),
            sha256_bin=self._sha256.hexdigest(),
            sha256_idx=hashlib.sha256(starts).hexdigest(),
        )


class TokenStream:
    """A prepared source as one memory-mapped array of `tokens` ids: its documents, shard after shard.

    Opening compares every file with the manifest by presence and size, and the ends of each index; `verify`
    also reads everything and compares checksums and document ends. Raises DataError.
    """

    def __init__(self, folder: Path, *, verify: bool = False):
        self.manifest = manifest = Manifest.load(folder)
        if not manifest.complete:
            raise DataError(
                f"{folder}: preparation stopped after {manifest.tokens:,} tokens; "
                "run `nmoe prep-mixture` again, it goes on from there"
            )
        self.folder = folder
        self.tokens, self.documents = manifest.tokens, manifest.documents
        self.eos: int = manifest.tokenizer["eos"]
        listed = {shard.name for shard in manifest.shards}
        for path in sorted(folder.glob("shard_*.bin")):
            if path.stem not in listed:
                raise DataError(f"{path}: not in {folder / MANIFEST}; remove it or {_again(folder)}")
        self._bins = [self._map(shard, "bin", manifest.dtype, shard.tokens) for shard in manifest.shards]
        self._indexes = [self._map(shard, "idx", _INDEX, shard.documents) for shard in manifest.shards]
        self._starts = np.cumsum([0] + [shard.tokens for shard in manifest.shards])
        self._bisectable = self._starts.tolist()
        self._documents = np.cumsum([0] + [shard.documents for shard in manifest.shards])
        for shard, tokens, index in zip(manifest.shards, self._bins, self._indexes, strict=True):
            if tokens[-1] != self.eos:
                raise DataError(
                    f"{folder / shard.name}.bin: does not end with EOS {self.eos}; {_again(folder)}"
                )
            if index[0] != 0 or index[-1] >= shard.tokens:
                raise DataError(f"{folder / shard.name}.idx: offsets outside the shard; {_again(folder)}")
            if verify:
                self._verify(shard, tokens, index)

    def _map(self, shard: Shard, suffix: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.folder / f"{shard.name}.{suffix}"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path}: missing; restore it or {_again(self.folder)}") from None
        if size != count * dtype.itemsize:
            raise DataError(
                f"{path}: {size} bytes, expected {count * dtype.itemsize}; "
                f"restore it or {_again(self.folder)}"
            )
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

    def _verify(self, shard: Shard, tokens: np.ndarray, index: np.ndarray) -> None:
        for suffix, array, expected in (("bin", tokens, shard.sha256_bin), ("idx", index, shard.sha256_idx)):
            if hashlib.sha256(array.data).hexdigest() != expected:
                raise DataError(
                    f"{self.folder / shard.name}.{suffix}: sha256 differs from the manifest's; "
                    f"restore it or {_again(self.folder)}"
                )
        ends = np.flatnonzero(tokens == self.eos) + 1
        if not np.array_equal(ends, np.append(index[1:], shard.tokens)):
            raise DataError(
                f"{self.folder / shard.name}.idx: document starts and EOS tokens disagree; "
                f"{_again(self.folder)}"
            )

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy `len(out)` tokens from position `start` on, going on at the beginning after the end."""
        shard = bisect_right(self._bisectable, start) - 1
        offset = start - self._bisectable[shard]
        filled = 0
        while filled < len(out):
            part = self._bins[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard, offset = (shard + 1) % len(self._bins), 0

    def documents_within(self, start: np.ndarray, length: int) -> np.ndarray:
        """How many documents end in the `length ≤ tokens` positions from each `start` on, as `read` goes.

        A binary search in the index, so that no token is read.
        """
        end = start + length
        wrapped = np.maximum(end - self.tokens, 0)
        return self._ended(end - wrapped) - self._ended(start) + self._ended(wrapped)

    def _ended(self, positions: np.ndarray) -> np.ndarray:
        """How many documents end at or before each position in `[0, tokens]`."""
        shards = np.maximum(np.searchsorted(self._starts, positions, side="left") - 1, 0)
        ended = np.empty_like(positions)
        for shard in np.unique(shards):
            here = shards == shard
            local = positions[here] - self._starts[shard]
            found = np.searchsorted(self._indexes[shard], local, side="right") - 1
            found += local == self.manifest.shards[shard].tokens
            ended[here] = self._documents[shard] + found
        return ended

    def document(self, number: int) -> np.ndarray:
        """Document `number` of the source, EOS included."""
        shard = int(np.searchsorted(self._documents, number, side="right")) - 1
        local, index = number - int(self._documents[shard]), self._indexes[shard]
        end = index[local + 1] if local + 1 < len(index) else self.manifest.shards[shard].tokens
        return self._bins[shard][index[local] : end]
