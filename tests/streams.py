"""Datasets for the tests of streams: many tiny samples in shards of any size, near or far away."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import crc32c
import pyarrow as pa

from shards.contract import Contract
from shards.manifest import Selection, write_manifest
from shards.store import FolderStore, Store, open_store
from shards.stream import Share, Stream
from tests.small_dataset import CONTRACT

GAP = 24  # bytes between two members, as a tar has its headers there

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("members", pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())]))),
        ("checksum", pa.uint32()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("classes", pa.list_(pa.int32())),
    ]
)


def content(key: str, size: int) -> bytes:
    """What the only member of a sample holds."""
    return (f"{key} " * (size // len(key) + 1)).encode()[:size]


def rows_of(
    sizes: Sequence[int], size: Callable[[int], int] = lambda _: 20, name: str = "s"
) -> Iterator[dict[str, Any]]:
    """Rows of a manifest over shards of `sizes` samples, each of `size(number)` bytes; every third is of split val."""
    number = 0
    for shard, count in enumerate(sizes):
        offset = 0
        for _ in range(count):
            key, length = f"{name}{number:07d}", size(number)
            yield {
                "key": key,
                "shard": f"{name}-{shard:06d}.tar",
                "members": [{"name": f"{key}.bin", "offset": offset + GAP, "bytes": length}],
                "checksum": crc32c.crc32c(content(key, length)),
                "split": "val" if number % 3 == 2 else "train",
                "group": f"g{shard}",
            }
            offset, number = offset + GAP + length, number + 1


def write_rows(
    folder: Path,
    sizes: Sequence[int],
    size: Callable[[int], int] = lambda _: 20,
    name: str = "s",
    contract: Contract = CONTRACT,
) -> str:
    """A dataset whose samples can be read undecoded; its address."""
    store, rows = open_store(str(folder)), list(rows_of(sizes, size, name))
    tars: dict[str, bytearray] = {}
    for row in rows:
        data = content(row["key"], row["members"][0]["bytes"])
        tars.setdefault(row["shard"], bytearray()).extend(bytes(GAP) + data)
    folder.mkdir(parents=True, exist_ok=True)
    for tar, bytes_ in tars.items():
        (folder / tar).write_bytes(bytes_)
    shards = {tar.removesuffix(".tar"): {"bytes": len(data)} for tar, data in tars.items()}
    facts = {"format_version": 1, "contract": contract.to_json(), "fingerprint": f"{name}-{list(sizes)}"}
    write_manifest(store, pa.Table.from_pylist(rows, SCHEMA), {**facts, "shards": shards})
    return str(folder)


class Far:
    """A store across a network, as far as a stream can tell. It tells what it was asked for; `trouble` may raise."""

    def __init__(self, near: Store) -> None:
        self.near, self.url, self.retries = near, f"far:{near.url}", Counter[str]()
        self.get, self.put, self.list, self.exists = near.get, near.put, near.list, near.exists
        self.reading, self.writing = near.reading, near.writing
        self.asked: list[tuple[str, int, int]] = []
        self.trouble: Callable[[str, int, int], None] = lambda *_: None
        self._lock = threading.Lock()

    def range(self, name: str, start: int, length: int) -> bytes:
        with self._lock:
            self.asked.append((name, start, length))
        self.trouble(name, start, length)
        return self.near.range(name, start, length)


def far(selection: Selection) -> Selection:
    """The same selection, its tars far away."""
    return replace(selection, parts=tuple(replace(part, store=Far(part.store)) for part in selection.parts))


def store_of(selection: Selection) -> Any:
    """Where the samples of the first part are."""
    return selection.parts[0].store


def folder_of(selection: Selection) -> Path:
    """The folder of the first part's tars."""
    store = store_of(selection)
    near = store.near if isinstance(store, Far) else store
    assert isinstance(near, FolderStore)
    return near.root


def keys(stream: Stream, count: int) -> list[tuple[int, str]]:
    """(position, key) of the next samples of a stream, read undecoded; each sample's bytes are compared."""
    found = []
    for members, position in islice(stream.members(), count):
        ((name, data),) = members.items()
        key = name.removesuffix(".bin")
        assert bytes(data) == content(key, len(data))
        found.append((position, key))
    return found


def all_ranks(make: Callable[[Share], Stream], shares: Sequence[Share], batches: int) -> list[tuple[int, str]]:
    """(position, key) of the next global batches, all ranks together, in order of position."""
    found = []
    for share in shares:
        # Workers of a rank have equal shares of whole rounds only; what they begin is read to its end.
        count = batches * share.global_batch // share.ranks // share.workers
        found += keys(make(share), count)
    return sorted(found)
