"""Text ↔ token ids behind one small object, whoever made the vocabulary."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmoe.errors import DataError
from nmoe.files import write_atomic

EOS = "<|endoftext|>"
BPE_FILE = "tokenizer.json"  # of a "bpe:N" tokenizer, in [data] dir
MIN_BPE = 257  # the bytes and EOS


@dataclass(frozen=True)
class Tokenizer:
    """A loaded vocabulary.

    Text never yields `eos` or any other special token: markup such as "<|endoftext|>" inside a document is
    encoded as the characters it consists of.
    """

    spec: str  # as in [data] tokenizer
    vocab_size: int  # every id is below it
    eos: int  # ends a document
    fingerprint: str  # sha256 of what determines the ids
    _encode: Callable[[list[str]], list[np.ndarray]]
    _decode: Callable[[list[int]], str]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, uint32 `[length]`, without `eos`."""
        return self._encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are dropped, bytes that are not UTF-8 become U+FFFD."""
        return self._decode([int(i) for i in ids])


def load(spec: str, directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `[data] tokenizer` names.

    `bpe:N` reads `{directory}/tokenizer.json`, `hf:PATH` a tokenizer.json or its folder, `tiktoken:NAME` the
    registry of tiktoken (which downloads a vocabulary once). Raises DataError.
    """
    kind, _, name = spec.partition(":")
    if kind == "bpe":
        return _load_bpe(spec, bpe_size(spec), Path(directory) / BPE_FILE)
    if kind == "hf" and name:
        path = Path(name)
        return _load_hf(spec, path / "tokenizer.json" if path.is_dir() else path)
    if kind == "tiktoken" and name:
        return _load_tiktoken(spec, name)
    raise DataError(f'[data] tokenizer: found "{spec}", expected "bpe:N", "tiktoken:NAME" or "hf:PATH"')


def bpe_size(spec: str) -> int:
    """N of "bpe:N"; raises DataError unless it is a number that holds at least the bytes and EOS."""
    name = spec.partition(":")[2]
    if not name.isdecimal() or int(name) < MIN_BPE:
        raise DataError(
            f'[data] tokenizer: found "{spec}", expected "bpe:N" with N ≥ {MIN_BPE} (256 bytes and EOS)'
        )
    return int(name)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of exactly `vocab_size` tokens on `texts` and write it to `path`, atomically.

    The merges depend on the texts alone: equally frequent pairs are merged in order of their ids.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise DataError(
            f"[data] tokenizer: the text yields only {found} distinct tokens, expected {vocab_size}; "
            f'add text or set tokenizer = "bpe:{found}"'
        )
    write_atomic(path, tokenizer.to_str().encode())


def _load_bpe(spec: str, size: int, path: Path) -> Tokenizer:
    if not path.is_file():
        raise DataError(f"{path}: missing; run `nmoe prep-mixture`, which trains it")
    tokenizer = _load_hf(spec, path)
    if tokenizer.vocab_size != size:
        raise DataError(
            f'{path}: {tokenizer.vocab_size} tokens, [data] tokenizer = "{spec}" expects {size}; '
            f"prepare into another [data] dir or delete {path.parent} and run `nmoe prep-mixture`"
        )
    return tokenizer


def _load_hf(spec: str, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as HFTokenizer

    if not path.is_file():
        raise DataError(
            f'[data] tokenizer = "{spec}": {path} is missing, expected a HuggingFace tokenizer.json'
        )
    content = path.read_bytes()
    try:
        tokenizer = HFTokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a HuggingFace tokenizer.json ({error}); restore the file") from error
    tokenizer.encode_special_tokens = True  # in a document they are plain text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    name = _eos_name(path)
    eos = tokenizer.token_to_id(name)
    if eos is None:
        raise DataError(
            f'{path}: no token "{name}" to end documents; name one by "eos_token" in '
            f"{path.with_name('tokenizer_config.json')}"
        )

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return Tokenizer(
        spec=spec,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos=eos,
        fingerprint=hashlib.sha256(content + f"\0{eos}".encode()).hexdigest(),
        _encode=encode,
        _decode=tokenizer.decode,
    )


def _eos_name(path: Path) -> str:
    """`eos_token` of the tokenizer_config.json beside `path`, else the usual name."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return EOS
    token = json.loads(beside.read_text(encoding="utf-8")).get("eos_token", EOS)
    return token["content"] if isinstance(token, dict) else token


def _load_tiktoken(spec: str, name: str) -> Tokenizer:
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean "tiktoken:{near[0]}"?' if near else ""
        raise DataError(f'[data] tokenizer = "{spec}": expected one of {", ".join(known)}{hint}')
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # whatever the download raises
        raise DataError(
            f'[data] tokenizer = "{spec}": its vocabulary cannot be downloaded ({type(error).__name__}); '
            "set TIKTOKEN_CACHE_DIR to a folder filled on a connected machine, "
            'or use "hf:PATH" or "bpe:N", which need no network'
        ) from error
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:" % (rank, len(token)) + token)
    digest.update(json.dumps(encoding._special_tokens, sort_keys=True).encode())

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32) for text in texts]

    def decode(ids: list[int]) -> str:
        special = set(encoding._special_tokens.values())
        return encoding.decode([i for i in ids if i not in special])

    return Tokenizer(
        spec=spec,
        vocab_size=encoding.n_vocab,
        eos=encoding.eot_token,
        fingerprint=digest.hexdigest(),
        _encode=encode,
        _decode=decode,
    )
