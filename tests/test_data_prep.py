"""Preparation: what is written, that every way to read it agrees, and that no kill leaves a trace."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import digest, make_data, make_texts

from nmoe.config import Source
from nmoe.data import documents, prep, tokenizer
from nmoe.data.documents import Documents
from nmoe.data.shards import Manifest, ShardWriter, TokenStream

TEXTS = make_texts(90)
KEPT = [text for text in TEXTS if text.strip()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same documents as text, jsonl and parquet files, and as a dataset folder."""
    root = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(TEXTS):
        (root / f"{number:03}.txt").write_text(text)
    (root / "hub").mkdir()
    for part in range(3):
        rows = [{"id": i, "body": text} for i, text in enumerate(TEXTS[part * 30 : part * 30 + 30])]
        (root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in (f"{part}.parquet", f"hub/{part}.parquet"):
            pq.write_table(pa.Table.from_pylist(rows), root / name, row_group_size=7)
    return root


@pytest.fixture(scope="module", autouse=True)
def small_and_fast():
    """Several batches a file, so that cursors point into the middle of everything, and no waiting for the disk,
    which a killed process does not need (a subprocess keeps its fsync)."""
    patch = pytest.MonkeyPatch()
    patch.setattr(documents, "BATCH_DOCUMENTS", 8)
    patch.setattr(os, "fsync", lambda descriptor: None)
    yield
    patch.undo()


def text_data(corpus, directory):
    source = Source(name="words", files=(f"{corpus}/*.txt",))
    return make_data(directory, sources=(source,), tokenizer="bpe:400", shard_tokens=700)


def read_back(data, name="words"):
    tokens = tokenizer.load(data.tokenizer, data.dir)
    stream = TokenStream(Path(data.dir) / name, verify=True)
    rows = [stream.document(number) for number in range(stream.documents)]
    assert all(row[-1] == tokens.eos for row in rows)
    return [tokens.decode(row[:-1]) for row in rows]


def test_documents_come_back_in_order_without_the_empty_ones(corpus, tmp_path):
    data = text_data(corpus, tmp_path)
    (result,) = prep.prepare(data, workers=1)
    assert read_back(data) == KEPT
    assert (result.name, result.documents) == ("words", len(KEPT))
    manifest = Manifest.load(tmp_path / "words")
    assert manifest.complete and manifest.cursor is None and manifest.dtype == np.dtype("<u2")
    assert result.shards == len(manifest.shards) > 3
    assert all(shard.tokens >= 700 for shard in manifest.shards[:-1])
    assert result.tokens == sum((tmp_path / "words").joinpath(f"{s.name}.bin").stat().st_size // 2
                                for s in manifest.shards)  # fmt: skip


def test_text_json_parquet_and_a_dataset_folder_give_the_same_shards(corpus, tmp_path):
    sources = (
        Source(name="text", files=(f"{corpus}/*.txt",)),
        Source(name="json", dataset="json", files=(f"{corpus}/*.jsonl",), text_field="body"),
        Source(name="parquet", dataset="parquet", files=(f"{corpus}/[0-9].parquet",), text_field="body"),
        Source(name="hub", dataset=f"{corpus}/hub", text_field="body"),
    )
    prep.prepare(make_data(tmp_path, sources=sources, tokenizer="bpe:400", shard_tokens=700), workers=1)
    shards = [
        {name: sha for name, sha in digest(tmp_path / source.name).items() if name != "manifest.json"}
        for source in sources
    ]
    assert shards[0] and shards[1:] == [shards[0]] * 3


def test_processes_write_what_one_process_writes(corpus, tmp_path):
    for workers in (1, 2):
        prep.prepare(text_data(corpus, tmp_path / str(workers)), workers=workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_max_tokens_ends_a_source_with_the_document_that_reaches_it(corpus, tmp_path):
    data = text_data(corpus, tmp_path)
    data = replace(data, sources=(replace(data.sources[0], max_tokens=1500),))
    (result,) = prep.prepare(data, workers=1)
    last = TokenStream(tmp_path / "words").document(result.documents - 1)
    assert result.tokens - len(last) < 1500 <= result.tokens
    assert read_back(data) == KEPT[: result.documents]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("naïve café ".encode("latin-1") * 60)
    source = Source(name="words", files=(str(tmp_path / "*.txt"),))
    data = make_data(tmp_path / "out", sources=(source,), tokenizer="bpe:262")
    prep.prepare(data, workers=1)
    assert read_back(data) == ["na�ve caf� " * 60]


def test_special_markup_in_a_document_is_text(tmp_path):
    text = "before <|endoftext|> after " * 20
    (tmp_path / "a.txt").write_text(text)
    source = Source(name="words", files=(str(tmp_path / "*.txt"),))
    data = make_data(tmp_path / "out", sources=(source,), tokenizer="bpe:270")
    (result,) = prep.prepare(data, workers=1)
    assert result.documents == 1 and read_back(data) == [text]


def test_a_second_run_says_so_and_touches_nothing(corpus, tmp_path):
    data, log = text_data(corpus, tmp_path), io.StringIO()
    first = prep.prepare(data, workers=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "words").iterdir()}
    assert prep.prepare(data, workers=1, progress=log) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "words").iterdir()} == before
    assert log.getvalue() == f"words  already complete: {first[0].tokens:,} tokens, {len(KEPT)} documents\n"


def test_a_complete_source_stays_when_another_is_added(corpus, tmp_path):
    data = text_data(corpus, tmp_path)
    prep.prepare(data, workers=1)
    before = digest(tmp_path)
    more = Source(name="more", dataset="json", files=(f"{corpus}/*.jsonl",), text_field="body")
    prep.prepare(replace(data, sources=(*data.sources, more)), workers=1)
    after = digest(tmp_path)
    assert {path: after[path] for path in before} == before and "more/manifest.json" in after


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_redraws_its_line_on_a_terminal(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.bar.TERMINAL_INTERVAL", 0.0)
    screen = Terminal()
    prep.prepare(text_data(corpus, tmp_path), workers=1, progress=screen)
    lines = screen.getvalue().split("\r")
    assert any("tokens/s" in line and "ETA 0:00:" in line and "%" in line for line in lines)
    assert lines[-1].rstrip().endswith(" documents") and screen.getvalue().count("\n") == 2


class Killer:
    """Kills the process before its n-th step: reading a batch, beginning a shard, a sync, a rename."""

    def __init__(self, countdown):
        self.countdown = countdown

    def guard(self, function):
        def guarded(*arguments):
            self.countdown -= 1
            if self.countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return guarded


def prepare_in_child(data, countdown):
    """Prepare in a fork that dies at step `countdown`; whether it finished before."""
    if (child := os.fork()) == 0:
        killer = Killer(countdown)
        os.fsync, os.replace = killer.guard(os.fsync), killer.guard(os.replace)
        ShardWriter.__init__ = killer.guard(ShardWriter.__init__)
        Documents._batch = killer.guard(Documents._batch)
        try:
            prep.prepare(data, workers=1)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


def test_killed_before_any_step_it_resumes_to_the_same_bytes(corpus, tmp_path):
    files = (f"{corpus}/[0-9].parquet",)
    source = Source(name="words", dataset="parquet", files=files, text_field="body")
    whole = make_data(tmp_path / "whole", sources=(source,), tokenizer="bpe:400", shard_tokens=2600)
    prep.prepare(whole, workers=1)
    expected = digest(tmp_path / "whole")
    finished, step, rng = False, 0, random.Random(0)
    while not finished:
        step += rng.randint(1, 4)
        data = replace(whole, dir=str(tmp_path / str(step)))
        finished = prepare_in_child(data, step)
        prep.prepare(data, workers=1)
        assert digest(Path(data.dir)) == expected, f"killed before step {step}"
    assert step > 40


def test_killed_again_and_again_it_still_ends_with_the_same_bytes(corpus, tmp_path):
    prep.prepare(text_data(corpus, tmp_path / "whole"), workers=1)
    data, kills = text_data(corpus, tmp_path / "killed"), 0
    while not prepare_in_child(data, 20):
        kills += 1
        assert kills < 50
    assert kills > 2 and digest(tmp_path / "killed") == digest(tmp_path / "whole")


PROGRAM = """
    import sys, time
    from nmoe.config import Data, Source
    from nmoe.data import prep

    class SlowWriter(prep.ShardWriter):
        def close(self):
            time.sleep(0.05)  # so that it cannot finish before it is killed
            return super().close()

    prep.ShardWriter = SlowWriter
    if __name__ == "__main__":
        source = Source(name="words", dataset="json", files=(sys.argv[1],))
        prep.prepare(Data(sys.argv[2], "bpe:400", (source,), shard_tokens=20_000), workers=2)
"""


def test_sigkill_at_random_instants_with_worker_processes(tmp_path):
    """No loss, no duplicates, and the pool dies with its parent."""
    rows = make_texts(4000, seed=5)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    source = Source(name="words", dataset="json", files=(f"{tmp_path}/a.jsonl",))
    whole, killed = (
        make_data(tmp_path / name, sources=(source,), tokenizer="bpe:400", shard_tokens=20_000)
        for name in ("whole", "killed")
    )
    prep.prepare(whole, workers=1)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "a.jsonl", killed.dir]
    rng, outputs = random.Random(1), []
    for _ in range(2):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
        shards = len(outputs)
        while process.poll() is None and len(outputs) == shards:
            time.sleep(0.01)
            outputs = sorted((tmp_path / "killed").glob("words/*.bin"))
        time.sleep(rng.uniform(0, 0.1))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.01)
    assert not Manifest.load(tmp_path / "killed" / "words").complete
    prep.prepare(killed, workers=2)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
