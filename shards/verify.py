"""Verifying a dataset against its own manifest: hashes, counts, keys, checksums, decodability, valid fractions.

However large the dataset is, only one sample, one piece of a tar and some rows of the manifest are in memory, and eight
bytes per sample, by which keys are compared. Each tar is read once, from its beginning to its end.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import IO, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shards.contract import Contract
from shards.manifest import MANIFEST, PLACE, read_facts, select
from shards.sample import Sample, checksum, decode
from shards.shifts import LIMITS, Shifts
from shards.statistics import BandStatistics, measure, merge
from shards.store import Store, StoreError, open_store
from shards.stream import Share, Stream, StreamError
from shards.tables import Table

PIECE = 1 << 20  # bytes of a tar that are read at once
BATCH = 1024  # rows of the manifest

Row = Mapping[str, Any]


def verify(data: str) -> list[str]:
    """Everything that is wrong with a dataset, a line each; empty when it is sound.

    Raises:
        ManifestError: there is no dataset.
        StoreError: its manifest cannot be read.
    """
    store = open_store(data)
    facts = read_facts(store)
    manifest = Table(store, MANIFEST, PLACE)
    found = list(_verify_keys(manifest, facts["samples"]))
    foreign = "foreign" in facts
    return [*found, *(_verify_foreign(data, facts["shards"]) if foreign else _verify_shards(store, manifest, facts))]


def _rows(manifest: Table, columns: Sequence[str]) -> Iterator[Row]:
    for batch in manifest.scan(columns, BATCH):
        yield from batch.to_pylist()


def _verify_keys(manifest: Table, promised: int) -> Iterator[str]:
    """How many rows there are, and keys that occur twice."""
    hashes = np.fromiter((hash(row["key"]) for row in _rows(manifest, ["key"])), np.int64)
    if len(hashes) != promised:
        yield f"manifest.parquet: {len(hashes)} rows, {promised} promised"
    hashes.sort()
    if same := set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()):  # equal keys, or rarely two of one hash
        counts = Counter(row["key"] for row in _rows(manifest, ["key"]) if hash(row["key"]) in same)
        if twice := [key for key, count in counts.items() if count > 1]:
            yield f"manifest.parquet: {len(twice)} keys occur twice, such as {', '.join(twice[:5])}"


def _verify_shards(store: Store, manifest: Table, facts: Mapping[str, Any]) -> Iterator[str]:
    """Every tar that the manifest names, in its order, and the statistics of all samples when nothing else is wrong."""
    contract, left = Contract.from_json(facts["contract"]), dict(facts["shards"])
    statistics: dict[str, BandStatistics] = {}
    sound = True
    total = sum(shard["bytes"] for shard in left.values())
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        rows = _rows(manifest, [*PLACE, "valid"])
        for tar, mine in groupby(rows, key=lambda row: row["shard"]):
            told = left.pop(tar.removesuffix(".tar"), None)
            for seen in _verify_tar(store, tar, told, mine, contract):
                if isinstance(seen, Sample):
                    statistics = merge(statistics, measure(seen))
                else:
                    sound = False
                    yield f"{tar}: {seen}"
            bar.update(told["bytes"] if told else 0)
    yield from (f"{name}.tar: in dataset.json, but not in manifest.parquet" for name in left)
    if sound and not left:
        yield from _verify_statistics(facts["statistics"], statistics)


def _verify_statistics(told: Mapping[str, Any], found: Mapping[str, BandStatistics]) -> Iterator[str]:
    """Statistics of dataset.json against those of all samples, taken anew."""
    for name, values in told.items():
        was, now = BandStatistics.from_json(values), found.get(name)
        same = (
            now is not None
            and was.count == now.count
            and all(
                np.allclose(getattr(was, part), getattr(now, part), rtol=1e-6, atol=1e-9)
                for part in ("mean", "std", "low", "high", "histogram")
            )
        )
        if not same:
            yield f"dataset.json: statistics of {name} are not those of its samples"


def _verify_tar(
    store: Store, name: str, told: Mapping[str, Any] | None, rows: Iterable[Row], contract: Contract
) -> Iterator[Sample | str]:
    """The samples of one tar that can be read, and what is wrong."""
    if told is None:
        yield "not in dataset.json, or not all of its rows in manifest.parquet stand together"
        return
    try:
        with store.reading(name) as file:
            hashed = _Hashed(file)
            yield from _verify_members(hashed, rows, contract)
            if hashed.rest() != told["sha256"]:
                yield "sha256 differs from dataset.json"
    except StoreError as error:
        yield str(error)


class _Hashed:
    """A file that is read once, in order, and the sha256 of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def rest(self) -> str:
        """Read to the end; the digest of the whole file."""
        while self.read(PIECE):
            pass
        return self._digest.hexdigest()


def _verify_members(file: _Hashed, rows: Iterable[Row], contract: Contract) -> Iterator[Sample | str]:
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=PIECE) as tar:  # type: ignore[call-overload]
            for row in rows:
                parts = _members(tar, row)
                if parts is None:
                    yield f"{row['key']}: members differ from the manifest; what follows was not compared"
                    return
                yield from _verify_sample(parts, row, contract)
                tar.members = []  # which it would keep to its end
            if tar.next() is not None:
                yield "holds members that are not in the manifest"
    except tarfile.TarError as error:
        yield f"not a readable tar: {error}"


def _members(tar: tarfile.TarFile, row: Row) -> dict[str, bytes] | None:
    """The next members of a tar by name; None when they are not those that the row tells."""
    parts = {}
    for told in row["members"]:
        member = tar.next()
        if member is None or (member.name, member.offset_data, member.size) != tuple(told.values()):
            return None
        file = tar.extractfile(member)
        parts[member.name] = file.read() if file else b""
    return parts


def _verify_sample(parts: Mapping[str, bytes], row: Row, contract: Contract) -> Iterator[Sample | str]:
    if checksum(parts) != row["checksum"]:
        yield f"{row['key']}: checksum differs"
        return
    try:
        sample = decode(parts, contract.sensors)
    except ValueError as error:
        yield f"{row['key']}: {error}"
        return
    yield sample
    yield from (f"{row['key']}: {problem}" for problem in _compare(sample, row, contract))


def _compare(sample: Sample, row: Row, contract: Contract) -> Iterator[str]:
    if sample.key != row["key"]:
        yield f"holds key {sample.key}"
    for name, tile in sample.tiles.items():
        if abs(tile.fraction - row["valid"][name]) > 1e-6:
            yield f"{name}: valid fraction {tile.fraction:.4f}, manifest says {row['valid'][name]:.4f}"
        if tile.values.shape[0] != len(contract.modality(name).bands):
            yield f"{name}: {tile.values.shape[0]} bands, contract says {len(contract.modality(name).bands)}"


def _verify_foreign(data: str, tars: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Tars of others: there, of the size that they had, and their first samples readable."""
    selection = select(data)
    (part,) = selection.parts
    reader = Stream(selection, 0, 1, Share(1))
    for name, facts in tars.items():
        try:
            part.store.range(name, facts["bytes"] - 1, 1)
        except StoreError as error:
            yield str(error)
    first = 0
    for shard, count in part.shards:
        try:
            reader.row(first)
        except (StoreError, StreamError, ValueError) as error:
            yield f"{shard}: {part.row(first).key}: {error}"
        first += count


def registration(data: str) -> list[str]:
    """How far the modalities of a dataset lie off the first one, a line each, from the manifest's column `shift`."""
    store = open_store(data)
    first, *others = Contract.from_json(read_facts(store)["contract"]).sensors
    shifts = pa.Table.from_batches(Table(store, MANIFEST, PLACE).scan(["shift"]))["shift"]
    return [_distribution(first, name, Shifts.of(shifts, name)) for name in others]


def _distribution(first: str, name: str, found: Shifts) -> str:
    title = f"{name} against {first}: shift measured in {found.measured} of {found.samples} samples"
    if not found.measured:
        return title
    over = ", ".join(f"{count} over {limit} px" for count, limit in zip(found.over, LIMITS, strict=True))
    whole = f"on the whole {found.rows:+.2f} rows, {found.cols:+.2f} columns"
    return f"{title}; median {found.median:.2f} px, 90 % within {found.most:.2f} px; {over}; {whole}"
