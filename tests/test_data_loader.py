"""Batches against a slow oracle, and as a pure function of the step whatever the world size."""

import dataclasses

import numpy as np
import pytest
from data_fixtures import EOS, make_data, make_source
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.config import Source
from nmoe.data.loader import Loader
from nmoe.data.mixture import Interleaving, ShuffledWindows, shares

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), min_size=1, max_size=8)
sources = st.lists(st.lists(documents, min_size=1, max_size=3), min_size=1, max_size=3)


def snapshot(batch):
    return batch.tokens.copy(), batch.positions.copy(), batch.targets.copy(), batch.valid


def oracle(shards, start, seq_len, depth, mask):
    """One row, token by token: tokens, positions, targets `[1 + depth][seq_len]`."""
    ring = [(t, d) for d, doc in enumerate(doc for shard in shards for doc in shard) for t in [*doc, EOS]]
    row = [(*ring[(start + i) % len(ring)], start + i >= len(ring)) for i in range(seq_len + 1 + depth)]
    tokens = [token for token, _, _ in row[:seq_len]]
    positions, targets = [], [[] for _ in range(1 + depth)]
    for t in range(seq_len):
        same_as_before = t > 0 and row[t - 1][0] != EOS
        positions.append((positions[-1] + 1 if same_as_before else 0) if mask else t)
        for j in range(1 + depth):
            token, *owner = row[t + 1 + j]
            targets[j].append(token if not mask or owner == list(row[t][1:]) else -1)
    return tokens, positions, targets


@settings(max_examples=60, deadline=None)
@given(
    sources, st.integers(1, 24), st.integers(0, 2), st.integers(1, 5), st.booleans(), st.integers(0, 10**6)
)
def test_batches_match_the_oracle(tmp_path_factory, corpora, seq_len, depth, rows, mask, step):
    directory = tmp_path_factory.mktemp("data")
    shortest = min(sum(len(doc) + 1 for shard in shards for doc in shard) for shards in corpora)
    seq_len = max(1, min(seq_len, shortest - 1 - depth))
    depth = min(depth, shortest - 1 - seq_len)
    names = [f"s{i}" for i in range(len(corpora))]
    for name, shards in zip(names, corpora, strict=True):
        make_source(directory / name, shards)
    weights = [1.0 + i for i in range(len(names))]
    data = make_data(
        directory,
        sources=tuple(Source(name=n, weight=w, files=("x",)) for n, w in zip(names, weights, strict=True)),
        document_mask=mask,
    )
    loader = Loader(data, seed=7, seq_len=seq_len, batch_size=rows, depth=depth, vocab_size=1000, verify=True)
    batch = loader.batch(step)
    source, nth = Interleaving(names, shares(weights, 1.0))(np.arange(step * rows, (step + 1) * rows))
    for row in range(rows):
        shards = corpora[source[row]]
        total = sum(len(doc) + 1 for shard in shards for doc in shard)
        start = int(ShuffledWindows(names[source[row]], total, seq_len, 7).starts(nth[row : row + 1])[0])
        tokens, positions, targets = oracle(shards, start, seq_len, depth, mask)
        assert batch.tokens[row].tolist() == tokens
        assert batch.positions[row].tolist() == positions
        assert batch.targets[:, row].tolist() == targets
    assert batch.valid == (batch.targets[0] >= 0).sum()
    assert batch.tokens.dtype == batch.positions.dtype == batch.targets.dtype == np.int32


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources, three shards each, documents of 1 to 60 tokens."""
    directory = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        shards = [[rng.integers(1, 999, rng.integers(1, 60)) for _ in range(100)] for _ in range(3)]
        make_source(directory / name, shards)
    return make_data(
        directory,
        sources=(Source(name="a", weight=9.0, files=("x",)), Source(name="b", weight=1.0, files=("x",))),
        temperature=2.0,
    )


def make_loader(data, **settings):
    return Loader(
        data, **{"seed": 3, "seq_len": 32, "batch_size": 16, "depth": 1, "vocab_size": 1000} | settings
    )


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("step", [0, 5, 1_000_000])
def test_the_global_batch_does_not_depend_on_the_world_size(mixed, world, step):
    tokens, positions, targets, valid = snapshot(make_loader(mixed).batch(step))
    parts = [snapshot(make_loader(mixed, rank=r, world=world).batch(step)) for r in range(world)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), tokens)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), positions)
    np.testing.assert_array_equal(np.concatenate([p[2] for p in parts], axis=1), targets)
    assert [p[3] for p in parts] == [valid] * world
    assert valid == (targets[0] >= 0).sum()


def test_ranks_take_turns_of_a_micro_batch(mixed):
    tokens, *_ = snapshot(make_loader(mixed).batch(7))
    turns = {"world": 4, "micro_batch_size": 2}
    parts = [snapshot(make_loader(mixed, rank=r, **turns).batch(7))[0] for r in range(4)]
    expected = [tokens[[2 * rank, 2 * rank + 1, 8 + 2 * rank, 9 + 2 * rank]] for rank in range(4)]
    np.testing.assert_array_equal(parts, expected)


def test_a_resumed_run_reads_what_the_uninterrupted_one_does(mixed):
    loader = make_loader(mixed)
    run = [snapshot(loader.batch(step)) for step in range(600)]  # crosses epochs and plans
    for step in (0, 1, 299, 511, 512, 599):
        for found, expected in zip(snapshot(make_loader(mixed).batch(step)), run[step], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_seeds_and_steps_give_other_batches(mixed):
    first = make_loader(mixed).batch(0).tokens.copy()
    assert (make_loader(mixed, seed=4).batch(0).tokens != first).any()
    assert (make_loader(mixed).batch(1).tokens != first).any()


def test_weights_and_temperature_decide_the_share_of_sequences(tmp_path):
    """Weights 9 : 1 at temperature 2 are shares 3 : 1; after any n sequences to within one."""
    make_source(tmp_path / "a", [[[1] * 99]])
    make_source(tmp_path / "b", [[[2] * 99]])
    data = make_data(
        tmp_path,
        sources=(Source(name="a", weight=9.0, files=("x",)), Source(name="b", weight=1.0, files=("x",))),
        temperature=2.0,
        document_mask=False,
    )
    loader = make_loader(data, batch_size=1)
    from_a = np.array([(loader.batch(step).tokens == 1).any() for step in range(400)])
    assert np.abs(np.cumsum(from_a) - 0.75 * np.arange(1, 401)).max() < 1
    assert from_a.sum() == 300


def test_an_epoch_covers_every_window_exactly_once(tmp_path):
    """Every position holds its own token, so a count of tokens is a count of positions."""
    total, seq_len = 640, 16
    make_source(tmp_path / "a", [[list(range(1, 320))], [list(range(321, 640))]], vocab_size=1000)
    data = make_data(tmp_path, document_mask=False)
    loader = make_loader(data, seq_len=seq_len, batch_size=8, depth=0)
    steps = total // seq_len // 8
    for epoch in range(3):
        seen = np.concatenate([loader.batch(epoch * steps + s).tokens.ravel().copy() for s in range(steps)])
        counts = np.bincount(seen, minlength=640)
        assert counts[EOS] == 2 and (np.delete(counts[1:], 319) == 1).all()


def test_a_batch_mixes_distant_documents(tmp_path):
    make_source(tmp_path / "a", [[[1 + i] * 15 for i in range(512)]])
    loader = make_loader(make_data(tmp_path), seq_len=16, batch_size=32, depth=0)
    documents = np.sort(loader.batch(0).tokens.max(axis=1))
    assert documents[-1] - documents[0] > 256 and np.median(np.diff(documents)) > 3


def test_without_mask_all_targets_are_the_next_tokens(mixed):
    batch = make_loader(dataclasses.replace(mixed, document_mask=False)).batch(2)
    assert batch.valid == batch.tokens.size and (batch.targets >= 0).all()
    np.testing.assert_array_equal(batch.targets[0, :, :-1], batch.tokens[:, 1:])
    np.testing.assert_array_equal(batch.targets[1, :, :-1], batch.targets[0, :, 1:])
    assert (batch.positions == np.arange(32)).all()


def test_buffers_are_reused(mixed):
    loader = make_loader(mixed)
    first, second = loader.batch(0), loader.batch(1)
    assert first.tokens is second.tokens and first.targets is second.targets


def test_wide_tokens(tmp_path):
    """A vocabulary beyond 65,536 is stored as uint32."""
    make_source(tmp_path / "a", [[[70_000, 199_999] * 20]], vocab_size=200_000)
    batch = make_loader(make_data(tmp_path), vocab_size=200_000, seq_len=8).batch(0)
    assert batch.tokens.max() == 199_999
    assert (tmp_path / "a" / "shard_00000.bin").stat().st_size == 41 * 4
