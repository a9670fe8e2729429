"""How samples are read: within the memory for it, every byte verified, errors told, through a node's cache."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.cache import Cache
from shards.manifest import Selection, select
from shards.order import BLOCK
from shards.reading import Reading
from shards.store import StoreError
from shards.stream import Share, Stream, StreamError, order_of
from tests.cached_node import until
from tests.small_dataset import make_sample, write_dataset
from tests.streams import Far, far, folder_of, keys, store_of, write_rows

MEMORY = 1 << 20  # the least that can be given


def stream_of(selection: Selection, lanes: int = 2, share: Share | None = None, **reading: Any) -> Stream:
    return Stream(selection, 0, lanes, share or Share(1), reading=Reading(**{"memory": MEMORY, **reading}))


def check_order(stream: Stream, count: int) -> None:
    wanted = [(p, stream.selection.row(stream.order.sample(p)).key) for p in range(count)]
    assert keys(stream, count) == wanted


def lengths(selection: Selection) -> set[int]:
    """Of the ranges that were asked for."""
    return {length for _, _, length in store_of(selection).asked}


# Memory


def test_blocks_of_several_lanes_stay_within_the_memory_for_them(tmp_path: Path) -> None:
    # Of every four shards one has samples of 60 times the size: on average blocks fit, two of those do not.
    large = {number for number in range(16 * 16) if number // 16 % 4 == 0}
    selection = far(select(write_rows(tmp_path, [16] * 16, lambda n: 60_000 if n in large else 1000)))
    streams = [stream_of(selection, lanes) for lanes in (1, 2, 3, 4)]
    for stream in (stream for stream in streams if stream.whole_blocks):
        check_order(stream, 4 * len(selection))
        assert 0 < stream.ledger["held"] <= MEMORY
        assert stream.ledger["requests"] < 2 * len(selection)  # for four epochs
    assert streams[1].whole_blocks


def test_a_block_that_was_taken_is_given_up(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [40] * 20, lambda _: 1000)))
    stream = stream_of(selection, 2, ahead=1, memory=100 * MEMORY)
    check_order(stream, len(selection))
    assert 2 * BLOCK * 1000 < stream.ledger["held"] < 6 * BLOCK * 1024  # of 50 and more blocks


def test_what_nobody_takes_is_not_read_on(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [50], lambda _: 100_000)))
    stream, store = stream_of(selection, 1), store_of(selection)
    items = stream.members()
    next(items)
    before = -1
    while before != (before := len(store.asked)):
        threading.Event().wait(0.1)
    read = sum(length for _, _, length in store.asked)
    assert 100_000 <= read <= 1.7e6  # of 5: a million bytes of tars, half a million on their way to the consumer
    items.close()


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("size", [MEMORY // 8, 3 * MEMORY // 2])
def test_blocks_and_samples_that_are_larger_than_the_memory_are_read(tmp_path: Path, lanes: int, size: int) -> None:
    selection = far(select(write_rows(tmp_path, [9, 5], lambda _: size)))
    for whole in (False, True):
        stream = stream_of(selection, lanes)
        stream.whole_blocks = whole  # by its size alone it would not
        check_order(stream, 20)
        assert stream.ledger["held"] <= max(size, MEMORY)


def test_iterators_that_are_left_do_not_spoil_the_count_of_others(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [30, 30], lambda n: 20_000 + n)))
    stream = stream_of(selection, 4)
    stream.whole_blocks = True  # blocks that fill the memory
    store_of(selection).trouble = lambda *_: threading.Event().wait(0.02)
    first, second = stream.members(), stream.members()
    next(first), next(second)
    first.close()  # while much is under way in both
    assert [position for _, position in islice(second, 100)] == list(range(1, 101))
    for _ in range(2):
        for _, position in stream.members():
            if position == 3:
                break
        check_order(stream, 70)
    assert stream.ledger["held"] <= MEMORY


# Which bytes


def test_blocks_are_read_where_all_their_samples_are_wanted(tmp_path: Path) -> None:
    address = write_rows(tmp_path, [40, 40, 40])
    whole, dense = select(address), select(address, where={"split": ["train"]})
    sparse, few = select(address, where={"split": ["val"]}), select(address, limit=50)
    for selection, lanes, share, blocks in (
        (whole, 4, Share(2), True),
        (whole, 4, Share(2, 2, 1), True),
        (dense, 4, Share(2), True),
        (whole, 4, Share(6, 3, 1), False),  # a rank without lanes of its own
        (whole, 4, Share(2, workers=2, worker=1), False),
        (sparse, 4, Share(2), False),
        (few, 4, Share(2), False),
    ):
        distant = far(selection)
        stream = stream_of(distant, lanes, share)
        found = keys(stream, 30)
        assert [key for _, key in found] == [selection.row(stream.order.sample(p)).key for p, _ in found]
        assert (max(lengths(distant)) > 20) == blocks, (selection.identity, share)


def test_a_block_is_asked_for_once_and_near_tars_sample_by_sample(tmp_path: Path) -> None:
    selection = select(write_rows(tmp_path, [40, 40]))
    distant = far(selection)
    check_order(stream_of(distant, 2), len(selection))
    epoch = {
        (block.shard, block.first) for block, _ in map(order_of(selection, 0, 2).orders[0].block, range(len(selection)))
    }
    first = store_of(distant).asked[: len(epoch)]
    assert len(set(first)) == len(epoch) and sum(length for _, _, length in first) > 80 * 20
    near = stream_of(selection, 2)
    check_order(near, 30)
    assert near.ledger["held"] == 0 and near.ledger["bytes"] == 20 * near.ledger["requests"]


def test_the_ledger_counts(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [40, 40], lambda n: 100 + n)))
    stream, store = stream_of(selection, ahead=1, threads=1), store_of(selection)
    assert stream.ledger == {"samples": 0, "bytes": 0, "requests": 0, "wait": 0, "held": 0, "retries": 0}
    store.retries = Counter({"503": 2, "connection cut": 1})
    store.trouble = lambda *_: threading.Event().wait(0.05)
    keys(stream, 7)
    until(lambda: stream.ledger["requests"] == len(store.asked))
    assert stream.ledger["bytes"] == sum(length for _, _, length in store.asked)
    assert stream.ledger["samples"] == 7 and stream.ledger["retries"] == 3 and stream.ledger["wait"] > 0


def test_a_sample_by_key_and_by_row(tmp_path: Path) -> None:
    selection = select(write_dataset(tmp_path / "data"), where={"split": ["train"]})
    stream = stream_of(selection)
    assert stream.at("sample-004").key == "sample-004"
    assert [stream.row(number).key for number in range(8)] == selection.rows(["key"])["key"].to_pylist()
    with pytest.raises(KeyError):
        stream.at("sample-002")  # of split val
    assert [sample.key for sample, _ in stream.once()] == selection.rows(["key"])["key"].to_pylist()


@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize("encoding", ["npy", "blosc2-zstd", "blosc2-lz4", "geotiff"])
def test_samples_stay_as_they_were_decoded_while_others_are_read(tmp_path: Path, encoding: Any, distant: bool) -> None:
    selection = select(write_dataset(tmp_path / "data", samples=24, encoding=encoding))
    stream = stream_of(far(selection) if distant else selection, threads=2)
    kept = [sample for sample, _ in islice(stream, 72)]
    kept += [sample for sample, _ in stream.once()] + [stream.row(number) for number in range(24)]
    for sample in kept:
        made = make_sample(int(sample.key[-3:]))
        for name, tile in made.tiles.items():
            np.testing.assert_array_equal(sample.tiles[name].values, tile.values)
            np.testing.assert_array_equal(sample.tiles[name].valid, tile.valid)
        np.testing.assert_array_equal(sample.label, made.label)


# What is wrong


def last_of(path: Path, count: int) -> None:
    """Cuts that many bytes off."""
    path.write_bytes(path.read_bytes()[:-count])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), r"bytes \d+ to \d+ of .*s-000001\.tar: No such file"),
        (lambda path: last_of(path, 5), r"bytes \d+ to \d+ of .*s-000001\.tar: \d+ of the \d+ bytes .* truncated"),
        (altered, r"s-000001\.tar: sample s0000029 differs from the manifest's checksum; the shard was altered"),
    ],
)
def test_a_harmed_shard_is_found_and_never_skipped(tmp_path: Path, distant: bool, harm: Any, said: str) -> None:
    selection = select(write_rows(tmp_path, [20, 10, 20]))
    selection = far(selection) if distant else selection
    harm(folder_of(selection) / "s-000001.tar")
    stream = stream_of(selection, 3)
    seen = []
    with pytest.raises(StreamError, match=said):
        for _, position in stream.members():
            seen.append(position)
            assert position < 50
    assert seen == list(range(len(seen)))  # until then in order
    row = selection.row(stream.order.sample(len(seen)))
    assert row.members[0].shard == "s-000001.tar"
    stream.reader.decoded = stream.reader.members  # type: ignore[assignment, method-assign]
    with pytest.raises(StreamError, match=said):
        list(stream.once())
    with pytest.raises(StreamError, match=said):
        stream.at("s0000029")


def test_a_store_that_fails_for_good_is_told_with_shard_range_and_cause(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [20])))
    store = store_of(selection)

    def fail(name: str, start: int, length: int) -> None:
        raise StoreError(f"{store.url}/{name}: no answer in time (8 attempts); check the server")

    store.trouble = fail
    for items in (stream_of(selection).members(), stream_of(selection).once()):
        with pytest.raises(
            StreamError, match=r"bytes \d+ to \d+ of far:.*s-000000\.tar: no answer in time \(8 attempts\); check"
        ) as caught:
            next(items)
        assert isinstance(caught.value.__cause__, StoreError)


@pytest.mark.parametrize("distant", [False, True])
def test_what_cannot_be_decoded_ends_the_stream_with_its_error(tmp_path: Path, distant: bool) -> None:
    selection = select(write_rows(tmp_path, [20]))
    with pytest.raises(ValueError, match=r"no \.json among them"):
        next(iter(stream_of(far(selection) if distant else selection)))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("fetch", "decode"))]


def test_no_thread_goes_on_when_a_stream_is_left(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [200] * 3)))
    store = store_of(selection)
    for leave in ("close", "drop", "error"):
        store.trouble = lambda *_: threading.Event().wait(0.02)
        items = stream_of(selection, 5, Share(2, 2), threads=3, requests=4).members()  # sample by sample
        next(items)
        assert len(readers()) >= 2
        if leave == "close":
            items.close()
        if leave == "error":
            store.trouble = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                list(items)
        del items
        count = len(store.asked)
        until(lambda: not readers())
        assert len(store.asked) <= count + 4  # of some 250 that were waiting


# Cache


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Any]:
    """Makes streams over a far dataset of three tars, with a cache."""
    selection = far(select(write_rows(tmp_path / "data", [20, 10, 20], lambda _: 1000)))
    made: list[Stream] = []

    def make(share: Share | None = None, limit: int = 10**9) -> Stream:
        made.append(stream_of(selection, 3, share, cache_dir=str(tmp_path / "cache"), cache_limit=limit))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def fetched(stream: Stream) -> Counter[str]:
    """How often each tar was."""
    return Counter(name for name, _, _ in store_of(stream.selection).asked)


def test_through_a_cache_every_tar_is_fetched_once_by_all_ranks_of_a_node(cached: Any) -> None:
    streams = [cached(Share(2, 2, rank)) for rank in range(2)]
    for stream in streams:
        for position, key in keys(stream, 50):
            assert key == stream.selection.row(stream.order.sample(position)).key
    assert set(fetched(streams[0]).values()) == {1} and len(fetched(streams[0])) == 3
    found = streams[1].ledger
    assert found["hits"] >= 45 and found["hits"] + found["misses"] == found["requests"] and found["bypassed"] == 0
    assert streams[0].ledger["bytes_fetched"] + found["bytes_fetched"] == 50 * 1024


def test_the_cache_is_filled_ahead_in_the_order_of_reading(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[list[str]] = []
    monkeypatch.setattr(Cache, "ahead", lambda self, names: lists.append(list(names)))
    stream = cached()
    items = stream.members()
    next(items)
    now = [stream.selection.row(stream.order.sample(p)).members[0].shard for p in range(3)]
    assert lists[0][: len(set(now))] == list(dict.fromkeys(now))
    assert set(lists[0]) == {f"s-{number:06d}.tar" for number in range(3)}
    items.close()


def test_the_cache_is_filled_ahead_from_where_any_rank_goes_on(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[list[str]] = []
    monkeypatch.setattr(Cache, "ahead", lambda self, names: lists.append(list(names)))
    stream = cached(Share(2, 2, 1))
    block = stream.order.orders[0].block
    stream.position = next(p for p in range(0, 50, 2) if block(p)[1] and block(p + 1)[1])  # in mid-block
    stream._job(stream.position + 1)
    assert len(lists) == 1


def test_an_altered_cached_tar_is_forgotten_and_fetched_again(cached: Any, tmp_path: Path) -> None:
    keys(cached(), 50)
    tars = list((tmp_path / "cache").rglob("s-000001.tar"))
    altered(tars[0])
    again = cached()
    check_order(again, 50)
    assert fetched(again) == {"s-000000.tar": 1, "s-000001.tar": 2, "s-000002.tar": 1}
    tars[0].write_bytes(bytes(tars[0].stat().st_size))  # all of its samples wrong: still fetched once
    again = cached()
    check_order(again, 50)
    assert fetched(again)["s-000001.tar"] <= 5


def test_a_tar_that_is_altered_at_its_source_is_told(cached: Any, tmp_path: Path) -> None:
    altered(tmp_path / "data/s-000001.tar")
    stream = cached()
    with pytest.raises(StreamError, match=r"s-000001\.tar: sample s0000029 differs"):
        keys(stream, 50)
    assert fetched(stream)["s-000001.tar"] == 2


def test_a_store_that_fails_behind_a_cache_is_told(cached: Any) -> None:
    stream = cached()

    def fail(name: str, *_: int) -> None:
        raise StoreError(f"far/{name}: no answer in time (8 attempts); check the server")

    store_of(stream.selection).trouble = fail
    with pytest.raises(StreamError, match=r"bytes \d+ to \d+ of far/s-.*no answer in time \(8 attempts\)"):
        next(stream.members())


def test_tars_that_do_not_fit_the_cache_are_read_straight(cached: Any) -> None:
    stream = cached(limit=1000)
    check_order(stream, 50)
    assert stream.ledger["bypassed"] == stream.ledger["requests"] > 0


def test_a_folder_is_not_cached(tmp_path: Path) -> None:
    stream = stream_of(select(write_rows(tmp_path / "data", [5])), cache_dir=str(tmp_path / "cache"))
    keys(stream, 5)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    selection = far(select(write_rows(tmp_path / "data", [5])))
    with pytest.raises(StoreError, match="cannot be a cache"):
        stream_of(selection, cache_dir=str(tmp_path / "file"))


def test_mixed_near_and_far_datasets_are_read_alike(tmp_path: Path) -> None:
    a, b = (write_rows(tmp_path / name, [20, 20], name=name) for name in "ab")
    near = select({a: 1, b: 1})
    mixed = replace(near, parts=(near.parts[0], replace(near.parts[1], store=Far(near.parts[1].store))))
    assert keys(stream_of(near), 100) == keys(stream_of(mixed), 100)
