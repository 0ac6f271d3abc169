"""The order of a run: which window of which source is its k-th sequence, computed for any k at once.

Nothing here has state or grows with the data: resuming at step 1,000,000 costs what step 0 costs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

from nmoe.errors import DataError

MAX_PERIOD = 1 << 16  # of the interleaving; a share below 1 / MAX_PERIOD cannot be expressed


def shares(weights: Sequence[float], temperature: float) -> np.ndarray:
    """Share of each source, float64, ∝ weight^(1/temperature); they sum to 1."""
    logits = np.log(np.asarray(weights, dtype=np.float64)) / temperature
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


class Interleaving:
    """A periodic sequence of sources in which every prefix holds each source's share to within one.

    Shares become fractions counts/period: the first period up to 65,536 whose fractions are the nearest,
    hence exact for weights in simple proportion. Over a period, each occurrence of a source may only lie
    where its count stays within one of its share (the windows of Pfair scheduling: Baruah, Cohen, Plaxton,
    Varvel, Algorithmica 15, 1996); earliest deadline first meets them whenever they can be met, and they can.
    """

    def __init__(self, names: Sequence[str], share: np.ndarray):
        if (least := float(share.min())) * MAX_PERIOD < 1:
            raise DataError(
                f'[[data.sources]] "{names[int(share.argmin())]}": its share of the mixture is {least:.2g}, '
                f"the smallest possible is 1/{MAX_PERIOD}; raise its weight or the temperature, or drop it"
            )
        self.counts = _fractions(share)
        self.period = int(self.counts.sum())
        self._sources = _earliest_deadline_first(self.counts)
        self._ranks = np.empty(self.period, dtype=np.int64)
        for source, count in enumerate(self.counts):
            self._ranks[self._sources == source] = np.arange(count)

    def __call__(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sequence of the run: its source, and how many sequences of that source precede it."""
        period, place = np.divmod(sequence, self.period)
        source = self._sources[place]
        return source, period * self.counts[source] + self._ranks[place]


def _fractions(share: np.ndarray) -> np.ndarray:
    """Positive integers in the proportion nearest to `share` among all that sum to MAX_PERIOD or less."""
    periods = np.arange(len(share), MAX_PERIOD + 1)
    counts = np.rint(np.outer(periods, share)).astype(np.int64)
    error = np.abs(counts / periods[:, None] - share).max(axis=1)
    error[(counts.sum(axis=1) != periods) | (counts.min(axis=1) < 1)] = np.inf
    return counts[np.argmax(error <= error.min() + 1e-12)]


def _earliest_deadline_first(counts: np.ndarray) -> np.ndarray:
    """Source of each slot of a period. Occurrence j of a source with n of P slots belongs to slots
    ⌊jP/n⌋ … ⌈(j+1)P/n⌉ - 1."""
    period = int(counts.sum())
    source = np.repeat(np.arange(len(counts)), counts)
    count = counts[source]
    occurrence = np.concatenate([np.arange(n) for n in counts])
    release = occurrence * period // count
    deadline = -(-(occurrence + 1) * period // count)
    jobs = sorted(zip(release.tolist(), deadline.tolist(), source.tolist(), strict=True), reverse=True)
    waiting: list[tuple[int, int]] = []
    slots = np.empty(period, dtype=np.int64)
    for slot in range(period):
        while jobs and jobs[-1][0] <= slot:
            heapq.heappush(waiting, jobs.pop()[1:])
        slots[slot] = heapq.heappop(waiting)[1]
    return slots


class ShuffledWindows:
    """The windows of one source in a random order, new in every epoch.

    The source's tokens form a ring, cut every `seq_len` tokens from an offset drawn per epoch; the cuts are
    visited in the order of a keyed permutation of `[0, count)`. Both need O(1) memory and time a window at
    any corpus size, where an order of documents would need all their lengths summed in that order.
    """

    def __init__(self, name: str, tokens: int, seq_len: int, seed: int):
        self._tokens, self._seq_len = tokens, seq_len
        self._key = np.frombuffer(hashlib.blake2b(f"{seed}/{name}".encode()).digest(), dtype="<u8")
        self.count = tokens // seq_len  # windows an epoch

    def starts(self, nth: np.ndarray) -> np.ndarray:
        """Position in the source at which the window of its `nth` sequence starts; int64 `[n]`."""
        epoch, index = np.divmod(nth, self.count)
        offset, *keys = _mix(self._key[:, None] + epoch.astype(np.uint64) * _GOLDEN)
        cut = (offset % np.uint64(self._tokens)).astype(np.int64)
        return (permute(index, self.count, keys) * self._seq_len + cut) % self._tokens


def permute(index: np.ndarray, count: int, keys: Sequence[np.ndarray]) -> np.ndarray:
    """Image of each `index` under the pseudo-random permutation of `[0, count)` that its keys select.

    `index` is int64 `[n]`, `keys` are one uint64 `[n]` a round. A Feistel network (Luby and Rackoff, SIAM J.
    Comput. 17, 1988) over the smallest domain of 4^n ≥ count; images outside are enciphered again until they
    fall inside (cycle walking: Black and Rogaway, CT-RSA 2002), fewer than four times on average.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    image = index.astype(np.uint64)
    walking = np.arange(len(image))
    while len(walking):
        left, right = image[walking] >> half, image[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key[walking]) & mask)
        image[walking] = (left << half) | right
        walking = walking[image[walking] >= count]
    return image.astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the increment of SplitMix64: 2^64 / golden ratio


def _mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
