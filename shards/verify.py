"""Verifying a dataset against its own manifest: hashes, counts, keys, checksums, decodability, valid fractions."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import groupby
from typing import Any

import crc32c
import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from shards.contract import Contract
from shards.manifest import read_facts, select
from shards.sample import Sample, decode
from shards.shifts import LIMITS, Shifts
from shards.statistics import BandStatistics, measure, merge
from shards.store import Store, StoreError, open_store
from shards.stream import Share, Stream
from shards.tables import read_table


def verify(data: str) -> list[str]:
    """Everything that is wrong with a dataset, a line each; empty when it is sound.

    Raises:
        ManifestError: there is no dataset.
    """
    store = open_store(data)
    facts = read_facts(store)
    rows = read_table(store.get("manifest.parquet")).to_pylist()
    found = (
        [] if len(rows) == facts["samples"] else [f"manifest.parquet: {len(rows)} rows, {facts['samples']} promised"]
    )
    if len({row["key"] for row in rows}) != len(rows):
        found.append("manifest.parquet: keys occur twice")
    contract = Contract.from_json(facts["contract"])
    if "foreign" in facts:
        return [*found, *_verify_foreign(data, facts["shards"])]
    by_shard = {name: list(mine) for name, mine in groupby(rows, key=lambda row: row["shard"])}
    statistics: dict[str, BandStatistics] = {}
    for name, shard in tqdm(facts["shards"].items(), "verify", unit="shard", disable=None, leave=False):
        tar = f"{name}.tar"
        for seen in _verify_shard(store, tar, shard["sha256"], by_shard.get(tar, []), contract):
            if isinstance(seen, Sample):
                statistics = merge(statistics, measure(seen))
            else:
                found.append(f"{tar}: {seen}")
    return found or list(_verify_statistics(facts["statistics"], statistics))


def _verify_statistics(told: Mapping[str, Any], found: Mapping[str, BandStatistics]) -> Iterator[str]:
    """Statistics of dataset.json against those of all samples, taken anew."""
    for name, values in told.items():
        was, now = BandStatistics.from_json(values), found[name]
        same = was.count == now.count and all(
            np.allclose(getattr(was, part), getattr(now, part), rtol=1e-6, atol=1e-9)
            for part in ("mean", "std", "low", "high", "histogram")
        )
        if not same:
            yield f"dataset.json: statistics of {name} are not those of its samples"


def _verify_foreign(data: str, tars: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Tars of others: there, of the size that they had, and their first samples readable."""
    selection = select(data)
    reader = Stream(selection, 0, 1, Share(1))
    for name, facts in tars.items():
        try:
            selection.store.range(name, facts["bytes"] - 1, 1)
        except StoreError as error:
            yield str(error)
    for shard, _ in selection.shards:
        key = selection.rows["key"][pc.index(selection.rows["shard"], shard).as_py()].as_py()
        try:
            reader.at(key)
        except (StoreError, ValueError) as error:
            yield f"{shard}: {key}: {error}"


def registration(data: str) -> list[str]:
    """How far the modalities of a dataset lie off the first one, a line each, from the manifest's column `shift`."""
    store = open_store(data)
    first, *others = Contract.from_json(read_facts(store)["contract"]).sensors
    shifts = read_table(store.get("manifest.parquet"), ["shift"])["shift"]
    return [_distribution(first, name, Shifts.of(shifts, name)) for name in others]


def _distribution(first: str, name: str, found: Shifts) -> str:
    title = f"{name} against {first}: shift measured in {found.measured} of {found.samples} samples"
    if not found.measured:
        return title
    over = ", ".join(f"{count} over {limit} px" for count, limit in zip(found.over, LIMITS, strict=True))
    whole = f"on the whole {found.rows:+.2f} rows, {found.cols:+.2f} columns"
    return f"{title}; median {found.median:.2f} px, 90 % within {found.most:.2f} px; {over}; {whole}"


def _verify_shard(
    store: Store, name: str, sha256: str, rows: list[dict[str, Any]], contract: Contract
) -> Iterator[Sample | str]:
    """The samples of one tar that can be read, and what is wrong."""
    try:
        data = store.get(name)
    except StoreError as error:
        yield str(error)
        return
    if hashlib.sha256(data).hexdigest() != sha256:
        yield "sha256 differs from dataset.json"
    try:
        with tarfile.open(fileobj=BytesIO(data)) as tar:
            members = [member.name for member in tar]
    except tarfile.TarError as error:
        yield f"not a readable tar: {error}"
        return
    if members != [member["name"] for row in rows for member in row["members"]]:
        yield "members differ from the manifest"
    for row in rows:
        try:
            sample = _decoded(data, row, contract)
        except ValueError as error:
            yield f"{row['key']}: {error}"
            continue
        yield sample
        yield from (f"{row['key']}: {problem}" for problem in _verify_sample(sample, row, contract))


def _decoded(data: bytes, row: dict[str, Any], contract: Contract) -> Sample:
    parts, checksum = {}, 0
    for member in row["members"]:
        parts[member["name"]] = data[member["offset"] : member["offset"] + member["bytes"]]
        checksum = crc32c.crc32c(parts[member["name"]], checksum)
    if checksum != row["checksum"]:
        raise ValueError("checksum differs")
    return decode(parts, contract.sensors)


def _verify_sample(sample: Sample, row: dict[str, Any], contract: Contract) -> Iterator[str]:
    if sample.key != row["key"]:
        yield f"holds key {sample.key}"
    for name, tile in sample.tiles.items():
        if abs(tile.fraction - row["valid"][name]) > 1e-6:
            yield f"{name}: valid fraction {tile.fraction:.4f}, manifest says {row['valid'][name]:.4f}"
        if tile.values.shape[0] != len(contract.modality(name).bands):
            yield f"{name}: {tile.values.shape[0]} bands, contract says {len(contract.modality(name).bands)}"
