"""Streams under torch's DataLoader: any number of worker processes gives the same batches; one that dies is told."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.augment import Augmentation
from pipeline.batch import Batch
from pipeline.dataset import StreamDataset, training_batches
from shards.manifest import select
from shards.reading import Reading
from shards.stream import Share, Stream, StreamError
from tests.small_dataset import write_dataset

HOW = Augmentation(seed=7, turn="all", crop=12)
COUNT = 14  # micro-batches: more than an epoch


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("torch") / "data", samples=24, size=16)


def dataset(address: str, share: Share, position: int = 0) -> StreamDataset:
    stream = Stream(select(address), 3, 4, share, reading=Reading(threads=1, ahead=4))
    stream.load(stream.state(position))
    return StreamDataset(stream, stream.selection.contract.normalised("statistics"), HOW)


def loaded(source: StreamDataset, workers: int, how: str = "fork", count: int = COUNT) -> list[Batch]:
    context = multiprocessing.get_context(how) if workers else None
    loader: Any = DataLoader(source, batch_size=None, num_workers=workers, multiprocessing_context=context)
    return list(islice(loader, count))


def same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys == two.keys and torch.equal(one.positions, two.positions)
        for name in one.values:
            assert torch.equal(one.values[name], two.values[name]) and torch.equal(one.valid[name], two.valid[name])
        assert one.label is not None and two.label is not None and torch.equal(one.label, two.label)


SHARE = Share(8, 2, 1, micro_batch=2)


@pytest.fixture(scope="module")
def plain(address: str) -> list[Batch]:
    return loaded(dataset(address, SHARE), 0)


def test_batches_are_those_of_training(address: str, plain: list[Batch]) -> None:
    source = dataset(address, SHARE)
    batches = training_batches(source.stream, 2, source.contract, HOW)
    same(plain, list(islice(batches, COUNT)))
    batches.close()  # type: ignore[attr-defined]
    assert plain[0].values["s1"].shape == (2, 2, 12, 12)
    assert torch.cat([batch.positions for batch in plain]).tolist() == list(range(1, 4 * COUNT, 2))


@pytest.mark.parametrize(("workers", "how"), [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_any_number_of_workers_gives_the_same_batches(address: str, plain: list[Batch], workers: int, how: str) -> None:
    same(plain, loaded(dataset(address, SHARE), workers, how))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_with_other_workers_and_ranks(address: str, plain: list[Batch], workers: int) -> None:
    same(plain[4:], loaded(dataset(address, SHARE, position=16), workers, count=COUNT - 4))
    alone = loaded(dataset(address, Share(8, micro_batch=4), position=16), workers, count=2)
    found = torch.cat([batch.values["s1"] for batch in alone])[1::2]
    assert torch.equal(found, torch.cat([batch.values["s1"] for batch in plain[4:6]]))


def test_a_second_pass_begins_where_the_stream_does(address: str, plain: list[Batch]) -> None:
    source = dataset(address, SHARE)
    for _ in range(2):
        same(plain[:3], loaded(source, 2, count=3))


def test_pickled_in_the_midst_of_reading(address: str, plain: list[Batch]) -> None:
    source = dataset(address, SHARE)
    items = iter(source)
    next(items)
    same(plain[:3], loaded(pickle.loads(pickle.dumps(source)), 0, count=3))
    same(plain[1:3], list(islice(items, 2)))


def test_batches_for_a_gpu_are_pinned(address: str, plain: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    source = dataset(address, SHARE)
    batches = training_batches(source.stream, 2, source.contract, HOW)
    first = next(batches)
    batches.close()  # type: ignore[attr-defined]
    same([first], plain[:1])
    for tensor in (*first.values.values(), *first.valid.values(), first.label):
        assert any(tensor is one for one in pinned)


@pytest.fixture
def loader(address: str) -> Iterator[Any]:
    made: Any = iter(DataLoader(dataset(address, SHARE), batch_size=None, num_workers=2))
    yield made
    made._shutdown_workers()


def test_a_worker_that_is_killed_raises_in_the_trainer(loader: Any) -> None:
    next(loader)
    os.kill(loader._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed by signal|exited unexpectedly)"):
        for _ in range(100):
            next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_trainer_and_names_the_shard(tmp_path: Path, workers: int) -> None:
    source = dataset(write_dataset(tmp_path / "data", samples=8, size=16), SHARE)
    shard = tmp_path / "data/small-000001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    with pytest.raises(StreamError, match=r"small-000001\.tar.*the object is truncated"):
        loaded(source, workers)
