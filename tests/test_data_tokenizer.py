"""Tokenizers: round trips, stable fingerprints, and the exact message for each that cannot be had."""

import json

import numpy as np
import pytest
import tiktoken
from data_fixtures import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data import tokenizer
from nmoe.errors import DataError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    tokenizer.train_bpe(make_texts(60), 500, directory / "tokenizer.json")
    return directory


@pytest.fixture
def tiny_tiktoken(monkeypatch):
    """A tiktoken encoding made here, under a name of the registry; real ones need a download."""
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\w+|\W+",
        mergeable_ranks={bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257},
        special_tokens={"<|endoftext|>": 258},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_bpe_round_trip_of_any_text(directory, texts):
    tokens = tokenizer.load("bpe:500", directory)
    for text, ids in zip(texts, tokens.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32 and (ids < tokens.vocab_size).all() and tokens.eos not in ids
        assert tokens.decode(ids) == text


def test_bpe_has_the_size_asked_for_and_is_reproducible(directory, tmp_path):
    tokenizer.train_bpe(make_texts(60), 500, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    tokens = tokenizer.load("bpe:500", directory)
    assert tokens.vocab_size == 500 and tokens.spec == "bpe:500"
    text = make_texts(60)[0]
    assert len(tokens.encode_batch([text])[0]) < len(text.encode()) / 2  # it did learn merges


def test_fingerprint_changes_with_the_vocabulary(directory, tmp_path):
    tokenizer.train_bpe(make_texts(60, seed=1), 500, tmp_path / "tokenizer.json")
    assert tokenizer.load("bpe:500", tmp_path).fingerprint != tokenizer.load("bpe:500", directory).fingerprint
    assert (
        tokenizer.load("bpe:500", directory).fingerprint == tokenizer.load("bpe:500", directory).fingerprint
    )


def test_hf_reads_a_file_or_its_folder_and_the_eos_of_its_config(directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    by_file = tokenizer.load(f"hf:{tmp_path}/tokenizer.json", "unused")
    by_folder = tokenizer.load(f"hf:{tmp_path}", "unused")
    assert by_file.fingerprint == by_folder.fingerprint and by_file.eos == 0
    for eos in ("a", {"content": "a"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        other = tokenizer.load(f"hf:{tmp_path}", "unused")
        assert other.decode([other.eos]) == "a" and other.fingerprint != by_file.fingerprint


def test_special_markup_is_plain_text(directory, tiny_tiktoken):
    text = "the end <|endoftext|> or not"
    for spec in ("bpe:500", "tiktoken:gpt2"):
        tokens = tokenizer.load(spec, directory)
        (ids,) = tokens.encode_batch([text])
        assert tokens.eos not in ids and tokens.decode(ids) == text
        assert tokens.decode([*ids, tokens.eos]) == text


def test_tiktoken(tiny_tiktoken, tmp_path):
    tokens = tokenizer.load("tiktoken:gpt2", tmp_path)
    assert (tokens.vocab_size, tokens.eos) == (259, 258)
    ids = tokens.encode_batch(["the ü", ""])
    assert ids[0].tolist() == [257, 32, 195, 188] and ids[0].dtype == np.uint32 and len(ids[1]) == 0
    assert tokens.decode(ids[0]) == "the ü"
    before = tokens.fingerprint
    tiny_tiktoken._mergeable_ranks[b"an"] = 259
    assert tokenizer.load("tiktoken:gpt2", tmp_path).fingerprint != before


def no_network(name):
    raise ConnectionError("Name or service not known")


def test_tiktoken_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(DataError) as error:
        tokenizer.load("tiktoken:o200k_base", tmp_path)
    assert str(error.value) == (
        '[data] tokenizer = "tiktoken:o200k_base": its vocabulary cannot be downloaded (ConnectionError); '
        "set TIKTOKEN_CACHE_DIR to a folder filled on a connected machine, "
        'or use "hf:PATH" or "bpe:N", which need no network'
    )


FORMS = 'expected "bpe:N", "tiktoken:NAME" or "hf:PATH"'
BAD = [
    ("words", f'[data] tokenizer: found "words", {FORMS}'),
    ("hf:", f'[data] tokenizer: found "hf:", {FORMS}'),
    ("bpe:many", '[data] tokenizer: found "bpe:many", expected "bpe:N" with N ≥ 257 (256 bytes and EOS)'),
    ("bpe:256", '[data] tokenizer: found "bpe:256", expected "bpe:N" with N ≥ 257 (256 bytes and EOS)'),
    ("bpe:300", "{dir}/tokenizer.json: missing; run `nmoe prep-mixture`, which trains it"),
    (
        "hf:{dir}/none.json",
        '[data] tokenizer = "hf:{dir}/none.json": {dir}/none.json is missing, '
        "expected a HuggingFace tokenizer.json",
    ),
    (
        "hf:{dir}/broken.json",
        "{dir}/broken.json: not a HuggingFace tokenizer.json (EOF while parsing a value at line 1 column 9); "
        "restore the file",
    ),
    (
        "hf:{dir}/named",
        '{dir}/named/tokenizer.json: no token "</s>" to end documents; name one by "eos_token" in '
        "{dir}/named/tokenizer_config.json",
    ),
    (
        "tiktoken:o200k_bas",
        '[data] tokenizer = "tiktoken:o200k_bas": expected one of {known}; '
        'did you mean "tiktoken:o200k_base"?',
    ),
]


@pytest.mark.parametrize("spec, message", BAD, ids=[spec for spec, _ in BAD])
def test_what_cannot_be_loaded(spec, message, directory, tmp_path):
    (tmp_path / "broken.json").write_text('{"model":')
    (tmp_path / "named").mkdir()
    (tmp_path / "named/tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "named/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    names = {"{dir}": str(tmp_path), "{known}": ", ".join(tiktoken.list_encoding_names())}
    for name, value in names.items():
        spec, message = spec.replace(name, value), message.replace(name, value)
    with pytest.raises(DataError) as error:
        tokenizer.load(spec, tmp_path)
    assert str(error.value) == message


def test_a_trained_tokenizer_of_another_size(directory):
    with pytest.raises(DataError) as error:
        tokenizer.load("bpe:4096", directory)
    assert str(error.value) == (
        f'{directory}/tokenizer.json: 500 tokens, [data] tokenizer = "bpe:4096" expects 4096; '
        f"prepare into another [data] dir or delete {directory} and run `nmoe prep-mixture`"
    )


def test_too_little_text_for_the_vocabulary(tmp_path):
    with pytest.raises(DataError) as error:
        tokenizer.train_bpe(["aaaa bbbb"], 4096, tmp_path / "tokenizer.json")
    found = str(error.value).split("only ")[1].split(" ")[0]
    assert 257 < int(found) < 270 and not list(tmp_path.iterdir())
    assert str(error.value) == (
        f"[data] tokenizer: the text yields only {found} distinct tokens, expected 4096; "
        f'add text or set tokenizer = "bpe:{found}"'
    )
