"""Streams from a real S3 server: killed in mid-epoch, behind a proxy that spoils requests, through a node's cache."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import boto3
import pytest

from shards import s3
from shards.manifest import select
from shards.reading import Reading
from shards.store import FolderStore, open_store
from shards.stream import Share, Stream, StreamError
from tests.services import root
from tests.services.faults import faults
from tests.services.s3 import Swift, shared
from tests.streams import keys, write_rows

pytestmark = pytest.mark.s3
OUTAGE = 20.0  # seconds


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_rows(folder, [40, 24, 40], lambda n: 5000 + n)
    return folder


def upload(folder: Path, url: str) -> str:
    store = open_store(url)
    for name in FolderStore(folder).list():
        store.put(name, folder / name)
    return url


def stream_of(address: str, share: Share | None = None, **reading: object) -> Stream:
    return Stream(select(address), 1, 4, share or Share(4), reading=Reading(**{"ahead": 4, **reading}))  # type: ignore[arg-type]


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Swift]:
    """A server that a test may kill, with an empty bucket `bucket`, where the environment leads."""
    first = 24000 + os.getpid() % 1000 * 4  # not ports that the system deals out
    server = Swift(root() / f"s3-stream-{os.getpid()}", (first, first + 1, first + 2, first + 3))
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    try:
        server.start()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.folder)


def test_a_server_that_is_away_for_20_seconds_in_mid_epoch_changes_nothing(own_server: Swift, data: Path) -> None:
    wanted = keys(stream_of(str(data)), 250)  # more than two epochs
    stream = stream_of(upload(data, "s3://bucket/data"))
    items = stream.members()
    seen = [(position, next(iter(members))) for members, position in islice(items, 30)]
    own_server.kill()
    began = time.monotonic()
    back = threading.Timer(OUTAGE, own_server.start)
    back.start()
    seen += [(position, next(iter(members))) for members, position in islice(items, 220)]
    back.join()
    items.close()
    assert seen == [(position, f"{key}.bin") for position, key in wanted]
    assert time.monotonic() - began >= OUTAGE and stream.ledger["retries"] > 0


def test_a_server_that_stays_away_ends_the_stream_with_shard_range_attempts_and_cause(
    own_server: Swift, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.01)
    stream = stream_of(upload(data, "s3://bucket/data"))
    items = stream.members()
    next(items)
    own_server.kill()
    with pytest.raises(
        StreamError, match=r"bytes \d+ to \d+ of s3://bucket/data/s-\d+\.tar: connection \w+ \(8 attempts\); check"
    ):
        list(islice(items, 1000))
    assert stream.ledger["retries"] >= 7


@pytest.mark.parametrize("cached", [False, True])
def test_faults_change_nothing_and_are_counted(
    s3_url: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", 1)
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr("shards.cache.PIECE", 20_000)
    wanted = keys(stream_of(str(data)), 150)
    upload(data, s3_url)
    with faults(shared().endpoint, rate=0.15, seed=2, delay=1.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        stream = stream_of(s3_url, cache_dir=str(tmp_path / "cache") if cached else "")
        assert keys(stream, 150) == wanted
        stream.close()
        assert proxy.faults() > 0 and stream.ledger["retries"] > 0
    assert ("hits" in stream.ledger) == cached


def test_ranks_of_another_world_size_go_on_from_s3(s3_url: str, data: Path) -> None:
    wanted = keys(stream_of(str(data)), 120)
    first = stream_of(upload(data, s3_url))
    seen = keys(first, 40)
    for rank in range(2):
        stream = stream_of(s3_url, Share(4, 2, rank))
        stream.load(first.state(40))
        seen += keys(stream, 40)
    assert sorted(seen) == wanted
