"""Documents → token shards, in parallel, resumable at any instant with the bytes of an uninterrupted run.

One process reads the documents in order and writes; the others tokenize. What is written depends on the order
of documents alone, so a shard that a kill left unfinished is simply made again: the manifest remembers, with
each finished shard, where in the stream the next one starts.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nmoe.config import Data, Source
from nmoe.data import mixture, tokenizer
from nmoe.data.documents import Batch, Documents
from nmoe.data.progress import Progress
from nmoe.data.shards import MANIFEST, Manifest, ShardWriter, token_dtype
from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import DataError

SAMPLE_CHARACTERS = 1 << 24  # of text that a "bpe:N" tokenizer is trained on, over all sources

# The ids of all documents of a batch, each ended by EOS, back to back; the length of each, 0 if it is empty.
Encoded = tuple[np.ndarray, np.ndarray]
Encode = Callable[[Iterable[Batch]], Generator[tuple[Batch, Encoded], None, None]]


@dataclass(frozen=True)
class Prepared:
    """A source as it lies on disk."""

    name: str
    tokens: int
    documents: int
    shards: int


def prepare(
    data: Data, *, workers: int | None = None, progress: TextIO | None = None
) -> tuple[Prepared, ...]:
    """Write the shards of every source of `data`, as far as they are missing, and its trained tokenizer.

    `workers` processes tokenize (default: one a usable core; 1: this process does it). `progress` takes the
    progress line. Raises DataError for sources that cannot be read and for shards of another specification.
    """
    workers = workers or len(os.sched_getaffinity(0))
    directory = Path(data.dir)
    with _exclusive(directory):
        manifests = {source.name: _existing(directory, data, source) for source in data.sources}
        opened = {
            source.name: Documents(source)
            for source in data.sources
            if _needs_tokenizer(data) or not _complete(manifests[source.name])
        }
        if _needs_tokenizer(data):
            Progress(progress, "tokenizer").finish(f"training {data.tokenizer}")
            tokenizer.train_bpe(_sample(data, opened), tokenizer.bpe_size(data.tokenizer), _bpe_path(data))
        tokens = tokenizer.load(data.tokenizer, directory)
        for source in data.sources:
            _check_tokenizer(directory / source.name, manifests[source.name], tokens)
        finished = []
        with _encoder(workers if opened else 1, tokens, directory) as encode:
            for source in data.sources:
                manifest = manifests[source.name] or _new(data, source, tokens)
                line = Progress(progress, source.name, manifest.tokens)
                state = "already complete"
                if not manifest.complete:
                    state = "complete"
                    manifest = _write(directory / source.name, manifest, opened[source.name], encode, line)
                result = Prepared(source.name, manifest.tokens, manifest.documents, len(manifest.shards))
                line.finish(f"{state}: {result.tokens:,} tokens, {result.documents:,} documents")
                finished.append(result)
    return tuple(finished)


def _bpe_path(data: Data) -> Path:
    return Path(data.dir) / tokenizer.BPE_FILE


def _needs_tokenizer(data: Data) -> bool:
    return data.tokenizer.startswith("bpe:") and not _bpe_path(data).exists()


def _complete(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.complete


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """The right to write into `directory`, which the system takes back from a process that dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise DataError(f"{directory}: another `nmoe prep-mixture` is writing here; wait for it") from None
    except OSError as error:  # a full disk, above all
        raise DataError(
            f"{error.filename or directory}: {error.strerror}; mend that and run `nmoe prep-mixture` again, "
            "it goes on where it stopped"
        ) from error


def _specification(data: Data, source: Source) -> dict[str, Any]:
    """All of the config, beside the tokenizer, on which a source's shards depend."""
    return {
        "dataset": source.dataset,
        "files": list(source.files),
        "subset": source.subset,
        "split": source.split,
        "text_field": source.text_field,
        "max_tokens": source.max_tokens,
        "shard_tokens": data.shard_tokens,
    }


def _existing(directory: Path, data: Data, source: Source) -> Manifest | None:
    folder = directory / source.name
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.load(folder)
    manifest.check_source(folder, _specification(data, source))
    return manifest


def _check_tokenizer(folder: Path, manifest: Manifest | None, tokens: Tokenizer) -> None:
    if manifest is None or manifest.tokenizer["fingerprint"] == tokens.fingerprint:
        return
    made = manifest.tokenizer["spec"]
    difference = (
        f'another version of tokenizer "{made}"'
        if made == tokens.spec
        else f'tokenizer "{made}", not "{tokens.spec}"'
    )
    raise DataError(
        f"{folder}: made with {difference}; restore it, or delete {folder} and run `nmoe prep-mixture`"
    )


def _new(data: Data, source: Source, tokens: Tokenizer) -> Manifest:
    return Manifest(
        source=_specification(data, source),
        tokenizer={
            "spec": tokens.spec,
            "fingerprint": tokens.fingerprint,
            "vocab_size": tokens.vocab_size,
            "eos": tokens.eos,
        },
    )


def _sample(data: Data, opened: dict[str, Documents]) -> Iterator[str]:
    """The first documents of each source, as much text as its share of the mixture."""
    share = mixture.shares([source.weight for source in data.sources], data.temperature)
    for source, part in zip(data.sources, share, strict=True):
        left = int(SAMPLE_CHARACTERS * part)
        for text in (text for batch in opened[source.name].batches() for text in batch.texts):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _write(
    folder: Path, manifest: Manifest, documents: Documents, encode: Encode, line: Progress
) -> Manifest:
    """Write the shards that `manifest` lacks; returns the complete manifest."""
    cursor = manifest.cursor
    if cursor is not None and (began := cursor["identity"]) != documents.identity:
        changes = [
            f"{key} {began[key]} → {now}" for key, now in documents.identity.items() if began[key] != now
        ]
        raise DataError(
            f"{folder}: changed since its preparation began: {', '.join(changes)}; restore that, or "
            f"delete {folder} and run `nmoe prep-mixture`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shard_tokens, limit = manifest.source["shard_tokens"], manifest.source["max_tokens"] or float("inf")
    total, count = manifest.tokens, manifest.documents
    writer: ShardWriter | None = None
    with closing(encode(documents.batches(cursor))) as encoded:
        for batch, row, ids in _each(encoded):
            writer = writer or ShardWriter(folder, len(manifest.shards), manifest.dtype)
            writer.append(ids)
            total, count = total + len(ids), count + 1
            line.count(total, count, min(1.0, max(batch.fraction, total / limit)) or None)
            if total >= limit:
                break
            if writer.tokens >= shard_tokens:
                cursor = {"identity": documents.identity, **batch.cursor(row + 1)}
                manifest = manifest.with_shard(writer.close(), cursor)
                manifest.save(folder)
                writer = None
    if writer is not None:
        manifest = manifest.with_shard(writer.close(), {})
    if not manifest.shards:
        raise DataError(
            f'[[data.sources]] "{folder.name}": all documents are empty; check files and text_field'
        )
    manifest = manifest.completed()
    manifest.save(folder)
    return manifest


def _each(encoded: Iterable[tuple[Batch, Encoded]]) -> Iterator[tuple[Batch, int, np.ndarray]]:
    """Every document that is not empty: its batch, its row there, its ids with EOS."""
    for batch, (ids, lengths) in encoded:
        end = 0
        for row, length in enumerate(lengths.tolist()):
            start, end = end, end + length
            if length:
                yield batch, row, ids[start:end]


def _encode(tokens: Tokenizer, texts: list[str]) -> Encoded:
    """Ids of all documents, each ended by EOS, in the dtype of the shards, and their lengths.

    A document of nothing but white space is empty and has length 0.
    """
    lengths = np.zeros(len(texts), dtype=np.int64)
    rows = [row for row, text in enumerate(texts) if text and not text.isspace()]
    parts: list[np.ndarray] = []
    eos = np.array([tokens.eos], dtype=np.uint32)
    for row, ids in zip(rows, tokens.encode_batch([texts[row] for row in rows]), strict=True):
        if len(ids):
            lengths[row] = len(ids) + 1
            parts += [ids, eos]
    ids = np.concatenate(parts) if parts else eos[:0]
    if np.count_nonzero(ids == tokens.eos) != len(parts) // 2:
        raise DataError(
            f'tokenizer "{tokens.spec}" turns plain text into its end-of-document token {tokens.eos}; '
            "give it an eos_token that is a special token"
        )
    return ids.astype(token_dtype(tokens.vocab_size)), lengths


@contextmanager
def _encoder(workers: int, tokens: Tokenizer, directory: Path) -> Iterator[Encode]:
    """Something that encodes batches in order, here or in a pool of processes."""
    if workers == 1:
        yield lambda batches: ((batch, _encode(tokens, batch.texts)) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fork would inherit the locks of the threads that pyarrow and tokenizers keep.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokens.spec, str(directory)),
    )
    try:
        yield lambda batches: _in_order(pool, batches, ahead=2 * workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died, perhaps for lack of memory; run `nmoe prep-mixture` again with fewer "
            "--workers, it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[Batch], ahead: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """`pool.map` that reads at most `ahead` batches in front of the one it yields."""
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(_encode_in_worker, batch.texts)))
        if len(pending) > ahead:
            batch, future = pending.popleft()
            yield batch, future.result()
    for batch, future in pending:
        yield batch, future.result()


_worker_tokenizer: Tokenizer


def _start_worker(spec: str, directory: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizer.load(spec, directory)


def _die_with_parent() -> None:
    """A killed parent cannot stop its pool, and a pool whose queue nobody fills waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode(_worker_tokenizer, texts)
