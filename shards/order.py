"""The order of samples as a pure function of position: no state, no I/O, nothing to replay.

N samples in shards, L lanes. Position p lies in epoch e = p div N; its place i = p mod N in the epoch is slot
j = i div L of lane i mod L, and lanes are consecutive stretches of the epoch's shuffled list. That is a bijection for
every N and L. The list is shuffled twice: shards are permuted by (seed, e); each lane's stretch is cut into blocks
(of at most 8 samples, and at shard ends), and samples are permuted inside their block by (seed, e, lane, block).
A block lies in one shard, so it can be read by one ranged request.

Reading L lanes in turn mixes L shards in every batch; a rank that takes every R-th slot with R dividing L reads only
its own lanes.

Several datasets are mixed by cycles of 1,024 positions: each has its share of a cycle's slots, which slots is a
permutation by (seed, cycle), and so its own position follows at once. In its own positions each has the order above.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LANES = 32
BLOCK = 8  # samples: some 10 MB of Sentinel-1 and -2, few enough for the blocks of all lanes to be held at once
CYCLE = 1024

Ints = NDArray[np.int64]


class Use(IntEnum):
    """What a keyed random number is for: two uses never share a number."""

    MASK = 1
    RATIO = 2
    AUGMENT = 3
    MODALITY_DROP = 4
    DROP_PATH = 5
    SHUFFLE_SHARDS = 6
    SHUFFLE_BLOCK = 7
    LIMIT = 8
    SPLIT = 9
    MIX = 10
    BOOTSTRAP = 11


class OrderError(ValueError):
    """An order, or a share of it, that cannot be; the message says what would be allowed."""


def hash64(*words: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """A keyed 64-bit hash, broadcast over its words: h = mix(h + word + golden ratio), from h = 0.

    `mix` is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA). `pipeline.model.keyed` computes the same
    bits in torch.
    """
    state: NDArray[np.uint64] = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            added = np.asarray(word).astype(np.int64).astype(np.uint64)
            state = _mix(state + added + np.uint64(0x9E3779B97F4A7C15))
    return state


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words_of(names: Iterable[str]) -> Ints:
    """Names as words for `hash64`, int64 [N]: the first 64 bits of the sha256 of each."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)


def permutation(count: int, *key: int) -> Ints:
    """A permutation of 0..count-1 that depends on nothing but `key`."""
    return np.argsort(hash64(*key, np.arange(count)), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Block:
    """A run of `count` consecutive samples of one shard, and the order in which they are taken."""

    shard: int
    first: int
    count: int
    taken: tuple[int, ...]


class Mix:
    """Which of several datasets stands at a position, and at which of its own.

    Args:
        orders: of each dataset.
        weights: of each dataset, positive; rounded to whole slots of a cycle by largest remainder.
        seed: of the permutation of slots.

    Raises:
        OrderError: a weight below 1, or one so small that its dataset has no slot in a cycle.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], seed: int) -> None:
        if min(weights) < 1:
            raise OrderError(f"weights {list(weights)}: each must be 1 or more")
        exact = np.asarray(weights, np.float64) * CYCLE / sum(weights)
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]] += 1
        if counts.min() < 1:
            raise OrderError(f"weights {list(weights)}: the smallest has less than one slot of {CYCLE}; leave it out")
        self.orders, self.counts, self.seed = tuple(orders), counts, seed
        self.starts = np.cumsum([0, *(order.count for order in orders)])  # first row of each dataset
        self._cycle = lru_cache(maxsize=4)(self._deal)

    def own(self, position: int) -> tuple[int, int]:
        """Number of the dataset at `position`, and its own position there."""
        if len(self.orders) == 1:
            return 0, position
        cycle, slot = divmod(position, CYCLE)
        datasets, ranks = self._cycle(cycle)
        which = int(datasets[slot])
        return which, cycle * int(self.counts[which]) + int(ranks[slot])

    def sample(self, position: int) -> int:
        """Row of the selection, all its datasets one after the other, that stands at `position` (0 or more)."""
        which, own = self.own(position)
        return int(self.starts[which]) + self.orders[which].sample(own)

    def _deal(self, cycle: int) -> tuple[Ints, Ints]:
        """Of each slot of a cycle: the dataset, and how many slots before it are that dataset's."""
        kinds = np.repeat(np.arange(len(self.counts)), self.counts)
        datasets = kinds[permutation(CYCLE, self.seed, Use.MIX, cycle)]
        ranks = np.empty(CYCLE, np.int64)
        ranks[np.argsort(datasets, kind="stable")] = np.concatenate([np.arange(count) for count in self.counts])
        return datasets, ranks


class Order:
    """Where each position's sample lies: `sample` tells its row, `block` the unit of reading.

    Args:
        shard_sizes: samples per shard, in the order of the selection.
        seed: of the shuffle.
        lanes: stretches of the epoch that are read side by side.

    Raises:
        OrderError: no sample at all, or fewer than one lane.
    """

    def __init__(self, shard_sizes: Sequence[int] | Ints, seed: int, lanes: int = LANES) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # first row of each shard
        self.seed, self.lanes, self.count = seed, lanes, int(self.starts[-1])
        if self.count < 1 or lanes < 1:
            raise OrderError(f"{self.count} samples in {lanes} lanes; at least one of each is needed")
        # Memos of pure functions; a few epochs and the blocks now being read.
        self._epoch = lru_cache(maxsize=4)(self._shuffle_shards)
        self._block = lru_cache(maxsize=8 * lanes)(self._make_block)

    def __len__(self) -> int:
        return self.count

    def sample(self, position: int) -> int:
        """Row of the selection that stands at `position` (0 or more)."""
        block, offset = self.block(position)
        return int(self.starts[block.shard]) + block.first + block.taken[offset]

    def block(self, position: int) -> tuple[Block, int]:
        """The block that holds `position`, and which of its samples in taken order this is."""
        epoch, place = divmod(position, self.count)
        slot, lane = divmod(place, self.lanes)
        start = self._lane_start(lane)
        _, ends = self._epoch(epoch)
        shard = int(np.searchsorted(ends, start + slot, side="right"))
        shard_start = int(ends[shard - 1]) if shard else 0
        first = max(start, shard_start)  # of this lane's part of this shard
        number = (start + slot - first) // BLOCK
        block = self._block(epoch, lane, shard, number)
        return block, start + slot - first - number * BLOCK

    def upcoming(self, position: int) -> list[int]:
        """Shards that the lanes read at `position`, then those that follow them in the epoch."""
        epoch, place = divmod(position, self.count)
        shards, ends = self._epoch(epoch)
        bounds = np.array([self._lane_start(lane) for lane in range(self.lanes + 1)])
        at = np.minimum(bounds[:-1] + place // self.lanes, bounds[1:] - 1)[bounds[1:] > bounds[:-1]]
        now = np.searchsorted(ends, at, side="right")
        return list(dict.fromkeys(shards[[*now, *np.minimum(now + 1, len(shards) - 1)]].tolist()))

    def _lane_start(self, lane: int) -> int:
        size, rest = divmod(self.count, self.lanes)
        return lane * size + min(lane, rest)

    def _shuffle_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards of an epoch in their order, and where each ends in the epoch's list."""
        shards = permutation(len(self.sizes), self.seed, Use.SHUFFLE_SHARDS, epoch)
        return shards, np.cumsum(self.sizes[shards])

    def _make_block(self, epoch: int, lane: int, shard: int, number: int) -> Block:
        shards, ends = self._epoch(epoch)
        shard_start = int(ends[shard - 1]) if shard else 0
        low = max(self._lane_start(lane), shard_start) + number * BLOCK
        count = min(BLOCK, int(ends[shard]) - low, self._lane_start(lane + 1) - low)
        taken = permutation(count, self.seed, Use.SHUFFLE_BLOCK, epoch, lane, shard, number)
        return Block(int(shards[shard]), low - shard_start, count, tuple(taken.tolist()))
