"""The order in which streams give samples: once per epoch, the same however it is shared, and resumed by a number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import command
from shards import tables
from shards.manifest import ManifestError, Selection, select
from shards.reading import Reading
from shards.stream import Share, StateError, Stream, order_of
from tests.streams import Far, all_ranks, far, keys, store_of, write_rows

TRAIN = {"split": ["train"]}
shard_sizes = st.lists(st.integers(1, 25), min_size=1, max_size=6)


@st.composite
def batches(draw: st.DrawFn, size: int) -> list[Share]:
    """One way to deal global batches of `size`: ranks x micro-batch x accumulation, and workers of each rank."""
    ranks = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    micro = draw(st.sampled_from([n for n in range(1, size // ranks + 1) if size // ranks % n == 0]))
    workers = draw(st.integers(1, 3))
    return [Share(size, ranks, rank, micro, workers, worker) for rank in range(ranks) for worker in range(workers)]


readings = st.builds(
    Reading, threads=st.integers(1, 4), requests=st.integers(1, 4), ahead=st.sampled_from([1, 2, 7, 64])
)


def wanted(selection: Selection, seed: int, lanes: int, first: int, end: int) -> list[tuple[int, str]]:
    """What the order says of these positions."""
    order = order_of(selection, seed, lanes)
    return [(position, selection.row(order.sample(position)).key) for position in range(first, end)]


def rounds(shares: list[Share], count: int) -> int:
    """At least `count` batches, so that the workers of a rank end with equal shares."""
    return -(-count // shares[0].workers) * shares[0].workers


@settings(max_examples=40)
@given(st.data(), st.sampled_from([1, 2, 4, 6, 12]), st.integers(0, 50))
def test_ranks_micro_batches_and_workers_deal_out_every_position_once(data: Any, size: int, first: int) -> None:
    shares = data.draw(batches(size))
    count = rounds(shares, 4)
    dealt = []
    for share in shares:
        own = size // share.ranks * count // share.workers  # all have as many
        dealt += list(islice(share.positions(first), own))
    assert sorted(dealt) == list(range(first * size, (first + count) * size))


@settings(max_examples=40)
@given(st.data(), st.sampled_from([2, 6, 8]), st.integers(0, 9))
def test_taken_in_turn_workers_give_the_micro_batches_of_their_rank(data: Any, size: int, first: int) -> None:
    shares = [share for share in data.draw(batches(size)) if share.rank == 0]
    micro, count = shares[0].micro_batch, 12
    alone = list(islice(replace(shares[0], workers=1, worker=0).positions(first), micro * count * len(shares)))
    made = [share.positions(first) for share in shares]
    in_turn = [list(islice(made[number % len(made)], micro)) for number in range(count * len(made))]
    assert [position for batch in in_turn for position in batch] == alone


@settings(max_examples=30)
@given(st.data(), shard_sizes, st.integers(1, 20), st.sampled_from([1, 2, 4, 6]), st.booleans())
def test_the_sequence_is_that_of_the_order_however_it_is_read_stopped_and_resumed(
    tmp_path_factory: pytest.TempPathFactory, data: Any, sizes: list[int], lanes: int, size: int, distant: bool
) -> None:
    address = write_rows(tmp_path_factory.mktemp("data"), sizes)
    selection = select(address, where=data.draw(st.sampled_from([{}, TRAIN])))
    selection = far(selection) if distant else selection
    seed = data.draw(st.integers(0, 3))
    before, after = data.draw(batches(size)), data.draw(batches(size))
    stop = rounds(before, data.draw(st.integers(0, len(selection) // size + 1)))
    more = rounds(after, 2 * len(selection) // size + 1)
    state = json.loads(json.dumps(Stream(selection, seed, lanes, Share(size)).state(stop * size)))

    def made(share: Share) -> Stream:
        return Stream(selection, seed, lanes, share, reading=data.draw(readings))

    def resumed(share: Share) -> Stream:
        stream = made(share)
        stream.load(state)
        return stream

    seen = all_ranks(made, before, stop) + all_ranks(resumed, after, more)
    assert seen == wanted(selection, seed, lanes, 0, (stop + more) * size)
    whole = sorted(row.as_py() for row in selection.rows(["key"])["key"])
    for first in range(0, len(seen) - len(whole) + 1, len(whole)):
        assert sorted(key for _, key in seen[first : first + len(whole)]) == whole


def test_samples_that_were_consumed_are_not_read_again(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [50] * 8)))
    start = 392  # of 400: at the end of an epoch
    stream = Stream(selection, 1, 3, Share(4, 2, 1), start, Reading(ahead=1, threads=1))
    items = stream.members()
    assert next(items)[1] == start + 1
    rows = [stream.order.sample(p) for p in range(start + 1, start + 40, 2)]
    places = {(m.shard, m.offset, m.bytes) for row in rows for m in selection.row(row).members}
    assert set(store_of(selection).asked) <= places
    items.close()


def test_fewer_shards_than_ranks(tmp_path: Path) -> None:
    selection = select(write_rows(tmp_path, [5]))
    shares = [Share(8, 8, rank) for rank in range(8)]
    seen = all_ranks(lambda share: Stream(selection, 0, 16, share), shares, 5)
    assert [position for position, _ in seen] == list(range(40))
    for first in range(0, 40, 5):
        assert len({key for _, key in seen[first : first + 5]}) == 5


def test_two_iterators_of_one_stream_do_not_disturb_each_other(tmp_path: Path) -> None:
    selection = far(select(write_rows(tmp_path, [40, 40])))
    stream = Stream(selection, 0, 2, Share(2))
    first, second = stream.members(), stream.members()
    for _ in range(3):
        next(first), next(second)
    first.close()
    assert [position for _, position in islice(second, 300)] == list(range(3, 303))
    for _ in range(20):
        for _, position in stream.members():
            if position == 5:
                break  # while much is under way
    assert [position for position, _ in keys(stream, 300)] == list(range(300))


def test_once_gives_every_sample_in_the_manifests_order(tmp_path: Path) -> None:
    selection = select(write_rows(tmp_path, [4, 9, 2]), where=TRAIN)
    streams = [Stream(selection, 0, 4, Share(3, 3, rank)) for rank in range(3)]
    numbers = []
    for stream in streams:
        stream.reader.decoded = lambda part, members: next(iter(members))  # type: ignore[assignment, method-assign]
        numbers.append([number for _, number in stream.once()])
    assert numbers == [list(range(rank, len(selection), 3)) for rank in range(3)]


def test_wrong_shares_and_positions_are_refused(tmp_path: Path) -> None:
    selection = select(write_rows(tmp_path, [4]))
    with pytest.raises(ValueError, match="position 3 is not a multiple of the global batch 2"):
        Stream(selection, 0, 1, Share(2), 3)
    with pytest.raises(ValueError, match="multiple of the ranks times the micro-batch"):
        Share(8, 2, 0, micro_batch=3)
    for wrong in ({"ranks": 0}, {"global_batch": 0}, {"rank": 2, "ranks": 2}, {"rank": -1}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match=r"global batch \d"):
            Share(**{"global_batch": 4, **wrong})
    for wrong in ({"workers": 0}, {"workers": 2, "worker": 2}):
        with pytest.raises(ValueError, match="worker"):
            Share(4, **wrong)


# State


def stream_of(address: Any, seed: int = 0, lanes: int = 4, **chosen: Any) -> Stream:
    return Stream(select(address, **chosen), seed, lanes, Share(2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stream")
    write_rows(folder / "a", [10, 20, 5], name="a")
    write_rows(folder / "b", [8, 8], name="b")
    yield folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"address": "b"}, "data.dataset"),
        ({"where": TRAIN}, "data.where"),
        ({"limit": 7}, "data.limit"),
        ({"lanes": 5}, "lanes: 4 in the state, 5 here"),
        ({"seed": 9}, "seed: 0 in the state, 9 here"),
        ({"modalities": ["dem"]}, "data.modalities"),
    ],
)
def test_a_state_of_another_order_is_refused_and_what_differs_is_named(
    data: Path, change: dict[str, Any], said: str
) -> None:
    state = json.loads(json.dumps(stream_of(str(data / "a")).state(6)))
    other = stream_of(str(data / change.get("address", "a")), **{k: v for k, v in change.items() if k != "address"})
    with pytest.raises(StateError, match=said) as caught:
        other.load(state)
    names = (".dataset:", ".where:", ".limit:", " lanes:", " seed:", ".modalities:")
    assert len([name for name in names if name in str(caught.value)]) == 1  # and nothing else
    assert other.position == 0


def test_a_state_names_the_weight_and_the_number_of_datasets_that_differ(data: Path) -> None:
    a, b = str(data / "a"), str(data / "b")
    state = stream_of({a: 3, b: 1}).state(0)
    with pytest.raises(StateError, match="data.weight: 3 in the state, 1 here.*data.weight: 1 in the state, 3 here"):
        stream_of({a: 1, b: 3}).load(state)
    with pytest.raises(StateError, match="2 datasets in the state, 1 here"):
        stream_of(a).load(state)


def test_a_state_is_small_and_of_this_format(data: Path) -> None:
    stream = stream_of(str(data / "a"), where={"split": ["train"], "labelled": [False]}, limit=9, seed=2)
    state = stream.state(12)
    assert len(json.dumps(state)) < 600
    stream.load(json.loads(json.dumps(state)))
    assert stream.position == 12
    with pytest.raises(StateError, match="format_version"):
        stream.load({**state, "format_version": 2})
    with pytest.raises(ValueError, match="13 is not a multiple"):
        stream.load({**state, "position": 13})
    with pytest.raises(StateError):
        stream.load({})


# The command


def test_the_listing_is_what_the_streams_give_and_reads_no_shard(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = write_rows(tmp_path, [9, 4, 6])
    seen = dict(all_ranks(lambda share: Stream(select(address), 5, 3, share), [Share(6, 2, 0), Share(6, 2, 1)], 8))
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    given = ["global_batch=6", "seed=5", "step=3", "steps=4", "world=2", "lanes=3"]
    for rank in ([], ["rank=1"]):
        assert command.main(["shards", "order", address, *given, *rank]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["step"], line["rank"]) for line in lines] == [
            (step, r) for step in range(3, 7) for r in ([1] if rank else [0, 1])
        ]
        for line in lines:
            assert line["keys"] == [seen[p] for p in Share(6, 2, line["rank"]).slots(line["step"])]


def test_the_listing_of_mixed_datasets_is_what_the_streams_give(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = {str(data / "a"): 3, str(data / "b"): 2}
    seen = dict(keys(Stream(select(mixed), 1, 4, Share(8)), 64))
    assert command.main(["shards", "order", json.dumps(mixed), "global_batch=8", "seed=1", "steps=8", "lanes=4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [key for line in lines for key in line["keys"]] == [seen[p] for p in range(64)]


@pytest.mark.parametrize("text", ["{a", "{a}", "{a: x}", "{}"])
def test_a_mixture_that_is_none_is_told_in_a_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["shards", "order", text, "global_batch=4"]) == 1
    assert capsys.readouterr().err.startswith("mcf: ")


@pytest.mark.parametrize(
    "wrong", ["world=3", "world=0", "rank=1", "global_batch=0", "lanes=0", "step=-1", "glob=3", "seed=x"]
)
def test_wrong_settings_of_the_listing_are_told_in_a_line(
    data: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["shards", "order", str(data / "a"), "global_batch=4", wrong]) == 1
    assert capsys.readouterr().err.startswith("mcf: ")


# Many samples


def test_of_a_large_manifest_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counted:
        """A file that counts what is read of it."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int = -1) -> bytes:
            found: bytes = self.file.read(size)
            read.append(len(found))
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    groups: list[int] = []
    original, local = tables.Table._read_group, tables._local
    monkeypatch.setattr(tables.Table, "_read_group", lambda self, index: groups.append(index) or original(self, index))
    monkeypatch.setattr(tables, "_local", lambda *given: Counted(local(*given)))
    address = write_rows(tmp_path, [500] * 200)
    whole = (tmp_path / "manifest.parquet").stat().st_size
    selection = select(address)
    assert len(selection) == 100_000 and len(selection.parts[0].shards) == 200 and selection.parts[0].chosen is None
    assert groups == [] and 0 < sum(read) < whole / 10
    order = order_of(selection, 0, 16)
    assert selection.row(order.sample(10**9)).key.startswith("s")
    assert len(groups) == 1 and sum(read) < whole / 5
    for position in range(64):  # 16 lanes
        selection.row(order.sample(position))
    assert len(groups) <= 17


def test_row_groups_are_whole_shards(tmp_path: Path) -> None:
    part = select(write_rows(tmp_path, [900, 900, 900, 3000, 10])).parts[0]
    assert [part.table.row(number)[0].num_rows for number in (0, 2699, 2700, 5709)] == [2700, 2700, 3000, 10]
    assert len(part) == 5710 and part.row(5709).key == "s0005709"


def test_an_unknown_column_and_an_empty_choice_are_refused(data: Path) -> None:
    with pytest.raises(ManifestError, match="unknown column; allowed: group, split"):
        select(str(data / "a"), where={"splt": ["train"]})
    with pytest.raises(ManifestError, match="no sample fits.*23 of split 'train'|no sample fits.*24 of split 'train'"):
        select(str(data / "a"), where={"split": ["test"]})


def test_a_limit_is_chosen_by_seed_and_counted_by_shard(data: Path) -> None:
    whole, some = select(str(data / "a"), where=TRAIN), select(str(data / "a"), where=TRAIN, limit=11)
    chosen = some.rows(["key", "shard"]).to_pylist()
    assert len(some) == len(chosen) == 11 and sum(count for _, count in some.parts[0].shards) == 11
    counted = [(shard, sum(row["shard"] == shard for row in chosen)) for shard, _ in some.parts[0].shards]
    assert counted == list(some.parts[0].shards)
    assert [some.row(number).key for number in range(11)] == [row["key"] for row in chosen]
    every = whole.rows(["key"])["key"].to_pylist()
    assert [key for key in every if key in {row["key"] for row in chosen}] == [row["key"] for row in chosen]
    assert select(str(data / "a"), where=TRAIN, limit=11, seed=1).rows(["key"]) != some.rows(["key"])
    assert isinstance(store_of(far(some)), Far) and far(some).fingerprint == some.fingerprint != whole.fingerprint
