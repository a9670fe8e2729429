from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import Order, hash64, permutation
from shards.stream import Share

shard_sizes = st.lists(st.integers(1, 150), min_size=1, max_size=6)


@given(shard_sizes, st.integers(1, 70), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_every_sample_exactly_once(sizes: list[int], lanes: int, seed: int, epoch: int) -> None:
    order = Order(sizes, seed, lanes)
    count = len(order)
    seen = [order.sample(position) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(seen) == list(range(count))


@given(shard_sizes, st.integers(1, 20), st.integers(0, 500))
def test_a_block_lies_in_one_shard_and_holds_its_position(sizes: list[int], lanes: int, position: int) -> None:
    order = Order(sizes, 1, lanes)
    block, offset = order.block(position)
    assert 1 <= block.count <= 64 and block.first >= 0 and block.first + block.count <= sizes[block.shard]
    assert sorted(block.taken) == list(range(block.count))
    row = order.sample(position)
    assert row == order.starts[block.shard] + block.first + block.taken[offset]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first, again, other = (Order([40, 30], seed, 4) for seed in (1, 1, 2))
    a, b, c = ([order.sample(p) for p in range(140)] for order in (first, again, other))
    assert a == b != c
    assert a[:70] != a[70:]
    assert [Order([40, 30], 1, 4).sample(p) for p in (139, 3, 70)] == [a[139], a[3], a[70]]  # no history


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_the_shares_of_all_ranks_make_the_batch(ranks: int, per_rank: int, batch: int) -> None:
    size = ranks * per_rank
    slots = [Share(size, ranks, rank).slots(batch) for rank in range(ranks)]
    assert sorted(p for part in slots for p in part) == list(range(batch * size, (batch + 1) * size))
    assert {len(part) for part in slots} == {per_rank}


def test_shares_of_unequal_size_and_empty_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the ranks"):
        Share(10, 3, 0)
    with pytest.raises(ValueError, match="0 samples"):
        Order([], 0)


def test_hash_is_splitmix64() -> None:
    # First output of SplitMix64 seeded with 0, from the reference implementation (Vigna 2015).
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert hash64(1, np.arange(3)).dtype == np.uint64
    assert sorted(permutation(100, 3, 4)) == list(range(100))


def test_far_positions_are_as_quick_as_near_ones() -> None:
    order = Order([1000] * 10_000, 0)
    assert 0 <= order.sample(10**7 * 50 + 12345) < 10**7
