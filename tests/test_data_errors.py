"""Broken data: for each mistake or damage, the exact line a user sees."""

import errno
import fcntl
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import make_data, make_source, make_texts

from nmoe.config import Source
from nmoe.data import prep
from nmoe.data.documents import Documents
from nmoe.data.loader import Loader
from nmoe.data.shards import Manifest
from nmoe.errors import DataError

AGAIN = "delete {dir}/a and run `nmoe prep-mixture`"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def overwrite(path, position, value):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(value)


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


def swap_document_starts(folder):
    """An index whose checksum agrees with the manifest's, but whose offsets do not with the tokens."""
    path = folder / "shard_00000.idx"
    starts = np.fromfile(path, dtype="<i8")
    starts[1] += 1
    starts.tofile(path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder / "manifest.json", lambda m: m["shards"][0].update(sha256_idx=sha))


# What is done to the shards in {dir}/a, the settings of the loader that differ, the message.
DAMAGED = {
    "no shards": (
        lambda a: [path.unlink() for path in a.iterdir()],
        {},
        "{dir}/a/manifest.json: missing; run `nmoe prep-mixture` with this config first",
    ),
    "unfinished": (
        lambda a: edit(a / "manifest.json", lambda m: m.update(complete=False)),
        {},
        "{dir}/a: preparation stopped after 120 tokens; run `nmoe prep-mixture` again, it goes on from there",
    ),
    "manifest cut": (
        lambda a: (a / "manifest.json").write_text('{"format": 1, "shards": ['),
        {},
        "{dir}/a/manifest.json: not JSON (Expecting value: line 1 column 26 (char 25)); " + AGAIN,
    ),
    "manifest empty": (
        lambda a: (a / "manifest.json").write_text(""),
        {},
        "{dir}/a/manifest.json: not JSON (Expecting value: line 1 column 1 (char 0)); " + AGAIN,
    ),
    "another manifest": (
        lambda a: (a / "manifest.json").write_text('{"plan_hash": "0"}'),
        {},
        "{dir}/a/manifest.json: not a manifest of token shards; " + AGAIN,
    ),
    "another format": (
        lambda a: edit(a / "manifest.json", lambda m: m.update(format=2)),
        {},
        "{dir}/a/manifest.json: format 2, this nmoe reads 1; " + AGAIN,
    ),
    "manifest lacks a key": (
        lambda a: edit(a / "manifest.json", lambda m: m.pop("tokenizer")),
        {},
        "{dir}/a/manifest.json: damaged ('tokenizer'); " + AGAIN,
    ),
    "manifest miscounts": (
        lambda a: edit(a / "manifest.json", lambda m: m.update(tokens=121)),
        {},
        "{dir}/a/manifest.json: damaged (totals (121, 6), shards hold (120, 6)); " + AGAIN,
    ),
    "shard missing": (
        lambda a: (a / "shard_00001.bin").unlink(),
        {},
        "{dir}/a/shard_00001.bin: missing; restore it or " + AGAIN,
    ),
    "shard truncated": (
        lambda a: truncate(a / "shard_00001.bin"),
        {},
        "{dir}/a/shard_00001.bin: 118 bytes, expected 120; restore it or " + AGAIN,
    ),
    "shard empty": (
        lambda a: (a / "shard_00000.bin").write_bytes(b""),
        {},
        "{dir}/a/shard_00000.bin: 0 bytes, expected 120; restore it or " + AGAIN,
    ),
    "index missing": (
        lambda a: (a / "shard_00000.idx").unlink(),
        {},
        "{dir}/a/shard_00000.idx: missing; restore it or " + AGAIN,
    ),
    "index truncated": (
        lambda a: truncate(a / "shard_00000.idx"),
        {},
        "{dir}/a/shard_00000.idx: 22 bytes, expected 24; restore it or " + AGAIN,
    ),
    "foreign shard": (
        lambda a: (a / "shard_00002.bin").write_bytes(b"\0\0"),
        {},
        "{dir}/a/shard_00002.bin: not in {dir}/a/manifest.json; remove it or " + AGAIN,
    ),
    "last token is not EOS": (
        lambda a: overwrite(a / "shard_00000.bin", 118, b"\5\0"),
        {},
        "{dir}/a/shard_00000.bin: does not end with EOS 0; " + AGAIN,
    ),
    "index of another shard": (
        lambda a: overwrite(a / "shard_00000.idx", 16, b"\xff"),
        {},
        "{dir}/a/shard_00000.idx: offsets outside the shard; " + AGAIN,
    ),
    "changed token, verified": (
        lambda a: overwrite(a / "shard_00001.bin", 10, b"\5\0"),
        {"verify": True},
        "{dir}/a/shard_00001.bin: sha256 differs from the manifest's; restore it or " + AGAIN,
    ),
    "changed index, verified": (
        lambda a: overwrite(a / "shard_00001.idx", 8, b"\x15"),
        {"verify": True},
        "{dir}/a/shard_00001.idx: sha256 differs from the manifest's; restore it or " + AGAIN,
    ),
    "index and tokens disagree, verified": (
        swap_document_starts,
        {"verify": True},
        "{dir}/a/shard_00000.idx: document starts and EOS tokens disagree; " + AGAIN,
    ),
    "token beyond the tokenizer": (
        lambda a: [overwrite(a / f"shard_0000{i}.bin", 2, b"\xe8\3" * 18) for i in (0, 1)],
        {},
        "{dir}/a: token id 1000 after position {position}, its tokenizer has 1000 tokens; "
        "the shards are damaged: " + AGAIN,
    ),
    "vocabulary of the model too small": (
        lambda a: None,
        {"vocab_size": 999},
        "{dir}/a: token ids go up to 999, [model] vocab_size is 999; set it to at least 1000",
    ),
    "sequence longer than the data": (
        lambda a: None,
        {"seq_len": 119, "depth": 1},
        '[[data.sources]] "a": 120 tokens, one sequence takes 121 (seq_len 119 and 2 to predict); '
        "add text or lower [train] seq_len",
    ),
    "batch does not divide": (
        lambda a: None,
        {"batch_size": 6, "world": 4},
        "[train] batch_size = 6 is not a multiple of the 4 ranks",
    ),
    "batch does not divide into turns": (
        lambda a: None,
        {"batch_size": 8, "world": 4, "micro_batch_size": 4},
        "[train] batch_size = 8 is not a multiple of the 4 ranks x micro_batch_size = 4",
    ),
    "another text field": (
        lambda a: edit(a / "manifest.json", lambda m: m["source"].update(text_field="body")),
        {},
        '{dir}/a: prepared with text_field = "body", the config says "text"; set it back, or ' + AGAIN,
    ),
    "another tokenizer": (
        lambda a: edit(a / "manifest.json", lambda m: m["tokenizer"].update(spec="tiktoken:gpt2")),
        {},
        '{dir}/a: made with tokenizer "tiktoken:gpt2", [data] tokenizer is "bpe:1000"; set it back or '
        "prepare into another [data] dir",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_shards(case, tmp_path):
    damage, settings, message = DAMAGED[case]
    document = list(range(1, 20))
    make_source(tmp_path / "a", [[document] * 3, [document] * 3])
    usual = {"seed": 0, "seq_len": 20, "batch_size": 4, "vocab_size": 1000}
    Loader(make_data(tmp_path), **usual, verify=True).batch(0)
    damage(tmp_path / "a")
    with pytest.raises(DataError) as error:
        Loader(make_data(tmp_path), **usual | settings).batch(0)
    found = str(error.value)
    if "{position}" in message:
        message = message.replace("{position}", found.split("position ")[1].split(",")[0])
    assert found == message.replace("{dir}", str(tmp_path))
    assert error.value.exit_code == 2


def test_sources_of_two_versions_of_a_tokenizer(tmp_path):
    for name in ("a", "b"):
        make_source(tmp_path / name, [[[1] * 50]])
    edit(tmp_path / "b/manifest.json", lambda m: m["tokenizer"].update(fingerprint="0" * 64))
    with pytest.raises(DataError) as error:
        Loader(make_data(tmp_path, ("a", "b")), seed=0, seq_len=8, batch_size=2, vocab_size=1000)
    assert str(error.value) == (
        f"{tmp_path}/a and {tmp_path}/b were made with different versions of tokenizer "
        '"bpe:1000"; delete one and run `nmoe prep-mixture`'
    )


@pytest.fixture
def corpus(tmp_path):
    for number, text in enumerate(make_texts(12)):
        (tmp_path / f"{number}.txt").write_text(text)
    rows = [
        {"id": i, "title": "t", "body": text, "words": text.split()} for i, text in enumerate(make_texts(12))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.jsonl").write_text(json.dumps(rows[0]) + '\n{"id": \n')
    (tmp_path / "torn.jsonl").write_text(json.dumps(rows[0]) + '\n{"id": \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "not.parquet").write_bytes(b"PAR2" * 10)
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "nothing.txt").write_text("")
    return tmp_path


def words(corpus, **settings):
    source = Source(**{"name": "words", "files": (f"{corpus}/[0-9]*.txt",)} | settings)
    return make_data(corpus / "out", sources=(source,), tokenizer="bpe:280", shard_tokens=200)


# The source that differs, the message.
UNREADABLE = {
    "no such file": (
        {"files": ("{dir}/*.md",)},
        '[[data.sources]] "words": no file matches "{dir}/*.md"; check files',
    ),
    "one glob of two matches nothing": (
        {"files": ("{dir}/*.txt", "{dir}/*.md")},
        '[[data.sources]] "words": no file matches "{dir}/*.md"; check files',
    ),
    "missing column": (
        {"dataset": "json", "files": ("{dir}/rows.jsonl",)},
        '[[data.sources]] "words": no column "text"; set text_field to one of id, title, body, words',
    ),
    "column of numbers": (
        {"dataset": "json", "files": ("{dir}/rows.jsonl",), "text_field": "id"},
        '[[data.sources]] "words": column "id" holds int, expected text; set text_field',
    ),
    "column of lists": (
        {"dataset": "json", "files": ("{dir}/rows.jsonl",), "text_field": "words"},
        '[[data.sources]] "words": column "words" holds list, expected text; set text_field',
    ),
    "broken jsonl": (
        {"dataset": "json", "files": ("{dir}/broken.jsonl",), "text_field": "body"},
        '[[data.sources]] "words": json data cannot be read (ArrowInvalid: JSON parse error: Invalid value. '
        "in row 1); check dataset, files, subset and split",
    ),
    "broken second file": (
        {"dataset": "json", "files": ("{dir}/rows.jsonl", "{dir}/torn.jsonl"), "text_field": "body"},
        '[[data.sources]] "words": json data cannot be read (ArrowInvalid: JSON parse error: Invalid value. '
        "in row 1); check dataset, files, subset and split",
    ),
    "empty jsonl": (
        {"dataset": "json", "files": ("{dir}/empty.jsonl",)},
        '[[data.sources]] "words": no documents; check files, subset and split',
    ),
    "not parquet": (
        {"dataset": "parquet", "files": ("{dir}/not.parquet",)},
        '[[data.sources]] "words": parquet data cannot be read (ArrowInvalid: Parquet magic bytes not found in '
        "footer. Either the file is corrupted or this is not a parquet file.); "
        "check dataset, files, subset and split",
    ),
    "no such split": (
        {"dataset": "{dir}/hub", "files": (), "split": "test"},
        '[[data.sources]] "words": {dir}/hub data cannot be read (ValueError: Bad split: test. Available '
        "splits: ['train']); check dataset, files, subset and split",
    ),
    "only blank documents": (
        {"files": ("{dir}/blank.txt", "{dir}/nothing.txt")},
        '[[data.sources]] "words": all documents are empty; check files and text_field',
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_sources(case, corpus):
    settings, message = UNREADABLE[case]
    prep.prepare(words(corpus), workers=1)  # trains the tokenizer
    (corpus / "hub").mkdir()
    (corpus / "hub/train.jsonl").write_text((corpus / "rows.jsonl").read_text())
    settings = {
        key: tuple(item.replace("{dir}", str(corpus)) for item in value)
        if isinstance(value, tuple)
        else value.replace("{dir}", str(corpus))
        for key, value in settings.items()
    }
    data = words(corpus, **settings)
    data = replace(data, sources=(replace(data.sources[0], name="words"),))
    for path in (corpus / "out/words").iterdir():
        path.unlink()
    with pytest.raises(DataError) as error:
        prep.prepare(data, workers=1)
    assert str(error.value) == message.replace("{dir}", str(corpus))


CHANGED = {
    "files": ("{dir}/*.txt",),
    "dataset": "json",
    "subset": "en",
    "split": "test",
    "text_field": "body",
    "max_tokens": 10,
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_specification_is_refused(key, corpus):
    data = words(corpus)
    prep.prepare(data, workers=1)
    old, new = getattr(data.sources[0], key), CHANGED[key]
    with pytest.raises(DataError) as error:
        prep.prepare(replace(data, sources=(replace(data.sources[0], **{key: new}),)), workers=1)
    assert str(error.value) == (
        f"{corpus}/out/words: prepared with {key} = {json.dumps(old)}, the config says {json.dumps(new)}; "
        f"set it back, or delete {corpus}/out/words and run `nmoe prep-mixture`"
    )


def test_a_changed_tokenizer_is_refused(corpus):
    data = words(corpus)
    prep.prepare(data, workers=1)
    tokenizer = corpus / "out/tokenizer.json"
    tokenizer.rename(corpus / "out/tokenizer_config.json.old")
    again = f"delete {corpus}/out/words and run `nmoe prep-mixture`"
    with pytest.raises(DataError) as error:
        prep.prepare(replace(data, tokenizer="bpe:270"), workers=1)
    assert str(error.value) == (
        f'{corpus}/out/words: made with tokenizer "bpe:280", not "bpe:270"; restore it, or {again}'
    )
    content = json.loads((corpus / "out/tokenizer_config.json.old").read_text())
    tokenizer.write_text(json.dumps(content | {"version": "1.0"}))  # the same, in other bytes
    with pytest.raises(DataError) as error:
        prep.prepare(data, workers=1)
    assert str(error.value) == (
        f'{corpus}/out/words: made with another version of tokenizer "bpe:280"; restore it, or {again}'
    )


def test_data_that_change_under_an_unfinished_preparation_are_refused(corpus):
    data = words(corpus)
    prep.prepare(data, workers=1)
    folder = corpus / "out/words"
    before = Documents(data.sources[0])
    manifest = replace(
        Manifest.load(folder),
        complete=False,
        cursor={"identity": before.identity, "state": None, "skip": 3},
    )
    manifest.save(folder)
    (corpus / "3.txt").write_text("other text")
    after = Documents(data.sources[0])
    with pytest.raises(DataError) as error:
        prep.prepare(data, workers=1)
    old, new = before.identity["names and sizes"], after.identity["names and sizes"]
    assert str(error.value) == (
        f"{folder}: changed since its preparation began: names and sizes {old} → {new}; restore that, or "
        f"delete {folder} and run `nmoe prep-mixture`"
    )


def test_two_preparations_of_one_directory(corpus):
    (corpus / "out").mkdir()
    with open(corpus / "out/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError) as error:
            prep.prepare(words(corpus), workers=1)
    assert str(error.value) == (
        f"{corpus}/out: another `nmoe prep-mixture` is writing here; wait for it"
    )  # fmt: skip
    prep.prepare(words(corpus), workers=1)


def test_a_tokenizer_whose_end_of_document_is_a_word(corpus):
    prep.prepare(words(corpus), workers=1)
    (corpus / "out/tokenizer.json").rename(corpus / "tokenizer.json")
    (corpus / "tokenizer_config.json").write_text('{"eos_token": "e"}')
    data = replace(words(corpus), dir=str(corpus / "other"), tokenizer=f"hf:{corpus}")
    with pytest.raises(DataError) as error:
        prep.prepare(data, workers=1)
    eos = json.loads((corpus / "tokenizer.json").read_text())["model"]["vocab"]["e"]
    assert str(error.value) == (
        f'tokenizer "hf:{corpus}" turns plain text into its end-of-document token {eos}; '
        "give it an eos_token that is a special token"
    )


def test_a_full_disk_loses_nothing(corpus, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data, mend = words(corpus), "mend that and run `nmoe prep-mixture` again, it goes on where it stopped"
    with monkeypatch.context() as patch, pytest.raises(DataError) as error:
        patch.setattr(os, "fsync", full)
        prep.prepare(data, workers=1)
    assert str(error.value) == f"{corpus}/out: No space left on device; {mend}"
    assert prep.prepare(data, workers=1)[0].documents == 11


def test_an_output_folder_that_is_a_file(corpus):
    (corpus / "out").write_text("")
    with pytest.raises(DataError) as error:
        prep.prepare(words(corpus), workers=1)
    assert str(error.value) == (
        f"{corpus}/out: File exists; mend that and run `nmoe prep-mixture` again, it goes on where it stopped"
    )


def test_a_tokenizing_process_that_dies(corpus, monkeypatch):
    """A pool whose processes exit at once, as the out-of-memory killer makes them."""
    prep.prepare(words(corpus), workers=1)
    (Path(words(corpus).dir) / "words/manifest.json").unlink()
    monkeypatch.setattr(prep, "_start_worker", os._exit)
    with pytest.raises(DataError) as error:
        prep.prepare(words(corpus), workers=2)
    assert str(error.value) == (
        "a tokenizing process died, perhaps for lack of memory; run `nmoe prep-mixture` again with fewer "
        "--workers, it goes on where it stopped"
    )
