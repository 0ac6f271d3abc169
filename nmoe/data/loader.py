"""Batches of token windows from prepared shards: the global batch of step n is a pure function of
(data, mixture, seed, n), whatever the world size. There is no state to checkpoint but the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmoe.config import Data, Source
from nmoe.data import mixture
from nmoe.data.shards import TokenStream
from nmoe.errors import DataError

SPEC_KEYS = (
    "dataset",
    "subset",
    "split",
    "text_field",
    "max_tokens",
)  # `files` need not exist where one trains
PLAN_SEQUENCES = 1 << 13  # located at once


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step; the arrays belong to the loader and change with its next `batch` call."""

    tokens: np.ndarray  # int32 [b, S]
    positions: np.ndarray  # int32 [b, S]: place in the document, from 0 where it or the window starts
    targets: np.ndarray  # int32 [1 + depth, b, S]: token t + 1 + j, -1 where that is another document's
    valid: int  # targets[0] ≥ 0 over the global batch, all ranks


class Loader:
    """Random access to the batches of a run.

    `batch_size` sequences of `seq_len` tokens a step, over `world` ranks, which take turns of `micro_batch_size`
    sequences (0: of their whole share); `depth` further targets a token, for multi-token prediction. `verify` reads
    all shards and compares their checksums. Raises DataError when the shards are missing, damaged, made for another
    tokenizer or source, too few, or beyond `vocab_size`.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        seq_len: int,
        batch_size: int,
        vocab_size: int,
        depth: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batch_size: int = 0,
        verify: bool = False,
    ):
        if batch_size % (world * max(micro_batch_size, 1)):
            each = f" x micro_batch_size = {micro_batch_size}" if micro_batch_size else ""
            raise DataError(f"[train] batch_size = {batch_size} is not a multiple of the {world} ranks{each}")
        self._streams = [_open(data, source, verify) for source in data.sources]
        _check_tokenizers(data, self._streams, vocab_size)
        window = seq_len + 1 + depth
        for source, stream in zip(data.sources, self._streams, strict=True):
            if stream.tokens < window:
                raise DataError(
                    f'[[data.sources]] "{source.name}": {stream.tokens} tokens, one sequence takes {window} '
                    f"(seq_len {seq_len} and {1 + depth} to predict); add text or lower [train] seq_len"
                )
        names = [source.name for source in data.sources]
        self.shares = mixture.shares([source.weight for source in data.sources], data.temperature)
        self._interleaving = mixture.Interleaving(names, self.shares)
        self._windows = [
            mixture.ShuffledWindows(name, stream.tokens, seq_len, seed)
            for name, stream in zip(names, self._streams, strict=True)
        ]
        self._mask, self._eos = data.document_mask, self._streams[0].eos
        self._vocab_size = self._streams[0].manifest.tokenizer["vocab_size"]
        self._seq_len, self._batch_size = seq_len, batch_size
        self._plan_steps, self._plan_block = max(1, PLAN_SEQUENCES // batch_size), -1
        rows = batch_size // world
        turns = np.arange(batch_size).reshape(-1, world, micro_batch_size or rows)
        self._rows = turns[:, rank].reshape(-1)
        self._raw = np.empty((rows, window), dtype=np.int32)
        self._ends = np.empty((rows, window), dtype=np.bool_)
        self._columns = np.arange(seq_len, dtype=np.int32)
        self._tokens = np.empty((rows, seq_len), dtype=np.int32)
        self._positions = np.empty_like(self._tokens)
        self._positions[:] = self._columns
        self._targets = np.empty((1 + depth, rows, seq_len), dtype=np.int32)

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`: its n-th turn is turn n · world + rank of all."""
        source, start, valid = self._planned(step)
        rows = zip(source[self._rows].tolist(), start[self._rows].tolist(), strict=True)
        for row, (which, position) in enumerate(rows):
            self._streams[which].read(position, self._raw[row])
        if self._raw.view(np.uint32).max() >= self._vocab_size:
            self._refuse(source[self._rows], start[self._rows])
        np.copyto(self._tokens, self._raw[:, : self._seq_len])
        for distance in range(len(self._targets)):
            np.copyto(self._targets[distance], self._raw[:, 1 + distance : 1 + distance + self._seq_len])
        if self._mask:
            self._mask_documents()
        return Batch(self._tokens, self._positions, self._targets, valid)

    def _planned(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Source and start of each row of the global batch, int64 `[batch_size]`, and its valid targets."""
        block, place = divmod(step, self._plan_steps)
        if block != self._plan_block:
            self._plan, self._plan_block = self._make_plan(block), block
        source, start, valid = self._plan
        return source[place], start[place], int(valid[place])

    def _make_plan(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_planned` returns, for `_plan_steps` steps at once: a few rows would be mostly overhead."""
        shape = (self._plan_steps, self._batch_size)
        sequence = np.arange(block * self._plan_steps * self._batch_size, (block + 1) * shape[0] * shape[1])
        source, nth = self._interleaving(sequence)
        start = np.empty_like(nth)
        ended = np.zeros_like(nth)
        for which, (stream, windows) in enumerate(zip(self._streams, self._windows, strict=True)):
            here = source == which
            start[here] = windows.starts(nth[here])
            if self._mask:  # the last token of a document has no target
                ended[here] = stream.documents_within(start[here], self._seq_len)
        valid = shape[1] * self._seq_len - ended.reshape(shape).sum(axis=1)
        return source.reshape(shape), start.reshape(shape), valid

    def _mask_documents(self) -> None:
        """Restart positions after each EOS; drop targets with an EOS between them and their token."""
        width = self._seq_len
        ends, positions = self._ends, self._positions
        np.equal(self._raw, self._eos, out=ends)
        positions[:, 0] = 0
        np.multiply(ends[:, : width - 1], self._columns[1:], out=positions[:, 1:])
        np.maximum.accumulate(positions, axis=1, out=positions)  # where the current document starts
        np.subtract(self._columns, positions, out=positions)
        crossed = ends[:, :width].copy()
        for distance, targets in enumerate(self._targets):
            if distance:
                crossed |= ends[:, distance : distance + width]
            np.copyto(targets, -1, where=crossed)

    def _refuse(self, source: np.ndarray, start: np.ndarray) -> None:
        row = int(self._raw.view(np.uint32).max(axis=1).argmax())
        folder = self._streams[source[row]].folder
        raise DataError(
            f"{folder}: token id {int(self._raw.view(np.uint32)[row].max())} after position "
            f"{int(start[row])}, its tokenizer has {self._vocab_size} tokens; the shards are damaged: "
            f"delete {folder} and run `nmoe prep-mixture`"
        )


def _open(data: Data, source: Source, verify: bool) -> TokenStream:
    stream = TokenStream(Path(data.dir) / source.name, verify=verify)
    stream.manifest.check_source(stream.folder, {key: getattr(source, key) for key in SPEC_KEYS})
    return stream


def _check_tokenizers(data: Data, streams: list[TokenStream], vocab_size: int) -> None:
    first = streams[0]
    for stream in streams:
        tokenizer = stream.manifest.tokenizer
        if tokenizer["spec"] != data.tokenizer:
            raise DataError(
                f'{stream.folder}: made with tokenizer "{tokenizer["spec"]}", [data] tokenizer is '
                f'"{data.tokenizer}"; set it back or prepare into another [data] dir'
            )
        if tokenizer["fingerprint"] != first.manifest.tokenizer["fingerprint"]:
            raise DataError(
                f"{first.folder} and {stream.folder} were made with different versions of tokenizer "
                f'"{data.tokenizer}"; delete one and run `nmoe prep-mixture`'
            )
        if tokenizer["vocab_size"] > vocab_size:
            raise DataError(
                f"{stream.folder}: token ids go up to {tokenizer['vocab_size'] - 1}, [model] vocab_size is "
                f"{vocab_size}; set it to at least {tokenizer['vocab_size']}"
            )
