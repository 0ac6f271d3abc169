"""The order of a run: exact shares at every prefix, true permutations, random access to any sequence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data.mixture import MAX_PERIOD, Interleaving, ShuffledWindows, permute, shares
from nmoe.errors import DataError


def counts_by_prefix(source: np.ndarray, sources: int) -> np.ndarray:
    """`[n + 1, sources]`: occurrences of each source in the first 0 … n slots."""
    one_hot = source[:, None] == np.arange(sources)
    return np.concatenate([np.zeros((1, sources), dtype=np.int64), one_hot.cumsum(axis=0)])


def same(keys: list[int], count: int) -> list[np.ndarray]:
    """The same round keys for `count` items."""
    return [np.full(count, key, dtype=np.uint64) for key in keys]


def test_shares_follow_the_weights_at_temperature_one():
    np.testing.assert_allclose(shares([3, 1], 1.0), [0.75, 0.25], rtol=1e-15)


def test_temperature_flattens_and_sharpens():
    np.testing.assert_allclose(shares([16, 1], 2.0), [0.8, 0.2], rtol=1e-14)
    np.testing.assert_allclose(shares([4, 1], 0.5), [16 / 17, 1 / 17], rtol=1e-14)
    np.testing.assert_allclose(shares([1e300, 1], 1e9), [0.5, 0.5], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.5, 5))
def test_every_prefix_holds_each_share_to_within_one(weights, temperature):
    share = shares(weights, temperature)
    if share.min() * MAX_PERIOD < 1:
        return
    interleaving = Interleaving([str(i) for i in range(len(weights))], share)
    n = min(2 * interleaving.period, 20_000)
    source, nth = interleaving(np.arange(n))
    counts = counts_by_prefix(source, len(weights))
    exact = np.arange(n + 1)[:, None] * (interleaving.counts / interleaving.period)
    assert np.abs(counts - exact).max() < 1
    assert np.abs(interleaving.counts / interleaving.period - share).max() <= 0.5 / MAX_PERIOD * 1.01
    np.testing.assert_array_equal(nth, counts[np.arange(n), source])


def test_simple_proportions_are_exact_for_ever():
    interleaving = Interleaving(["a", "b", "c"], shares([0.7, 0.2, 0.1], 1.0))
    assert interleaving.counts.tolist() == [7, 2, 1]
    source, nth = interleaving(np.arange(10**15, 10**15 + 10))
    assert np.bincount(source).tolist() == [7, 2, 1]
    assert nth[source == 0].tolist() == list(range(7 * 10**14, 7 * 10**14 + 7))


def test_irrational_shares_stay_within_one_for_a_long_run():
    share = shares([math.pi, 1.0], 1.7)
    source, _ = Interleaving(["a", "b"], share)(np.arange(1_000_000))
    counts = counts_by_prefix(source, 2)
    assert np.abs(counts - np.arange(1_000_001)[:, None] * share).max() < 1.01


def test_a_share_too_small_to_express_is_refused():
    with pytest.raises(DataError) as error:
        Interleaving(["web", "rare"], shares([1.0, 1e-6], 1.0))
    assert str(error.value) == (
        '[[data.sources]] "rare": its share of the mixture is 1e-06, the smallest possible is 1/65536; '
        "raise its weight or the temperature, or drop it"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=8))
def test_permute_is_a_permutation(count, keys):
    image = permute(np.arange(count), count, same(keys, count))
    np.testing.assert_array_equal(np.sort(image), np.arange(count))


def test_permute_is_random_access_into_huge_ranges():
    count, keys = 10**13 + 7, [3, 1, 4, 1, 5, 9, 2]
    some = np.array([0, 1, 2, 5 * 10**12, count - 1])
    image = permute(some, count, same(keys, 5))
    assert len(set(image.tolist())) == 5 and (image >= 0).all() and (image < count).all()
    np.testing.assert_array_equal(permute(some[3:4], count, same(keys, 1)), image[3:4])


def test_permute_is_close_to_uniform():
    """Each of the 24 orders of four items, over 4,800 keys: 200 ± 5 standard deviations."""
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.integers(0, 2**63, (7, 4800), dtype=np.uint64), 4, axis=1)
    orders = permute(np.tile(np.arange(4), 4800), 4, list(keys)).reshape(4800, 4)
    seen = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(seen) == 24 and abs(seen - 200).max() < 5 * math.sqrt(200)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(0, 5), st.integers(0, 99))
def test_an_epoch_visits_each_window_once(tokens, seq_len, epoch, seed):
    tokens = max(tokens, seq_len)
    windows = ShuffledWindows("a", tokens, seq_len, seed)
    starts = windows.starts(np.arange(epoch * windows.count, (epoch + 1) * windows.count))
    covered = (starts[:, None] + np.arange(seq_len)) % tokens
    assert len(np.unique(covered)) == windows.count * seq_len


def test_order_depends_on_epoch_seed_and_source():
    def order(name, seed, epoch):
        windows = ShuffledWindows(name, 64_000, 64, seed)
        return windows.starts(np.arange(epoch * 1000, (epoch + 1) * 1000)).tolist()

    orders = [order("a", 0, 0), order("a", 0, 1), order("a", 1, 0), order("b", 0, 0)]
    assert all(x != y for i, x in enumerate(orders) for y in orders[:i])
    steps = np.diff(orders[0])
    assert (steps == 64).mean() < 0.01  # neighbours in the run are not neighbours in the file
    assert order("a", 0, 0) == orders[0]
