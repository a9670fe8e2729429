"""write_shard: samples to one tar and its rows, the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from shapely.geometry import shape

from shards.sample import Encoding, Sample, checksum, encode
from shards.statistics import BandStatistics, measure, merge
from shards.store import Store
from shards.tables import read_table

FORMAT_VERSION = 1


@dataclass
class ShardRecord:
    """What is known of a finished shard: a row per sample, the tar's hash, statistics, and what was left out.

    `stretches` of the raster labels: `all`, and those that are `short` (`shards.coarse`).
    `retries` (of the store that it went to, by reason) is of this run alone and stays out of what is written.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = ""
    bytes: int = 0
    statistics: dict[str, BandStatistics] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stretches: dict[str, int] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)


def schema(sensors: Iterable[str]) -> pa.Schema:
    """The columns of a manifest over these sensors (docs/format.md)."""
    names = list(sensors)
    member = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())])
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("members", pa.list_(member)),
            ("checksum", pa.uint32()),
            ("crs", pa.string()),
            ("transform", pa.list_(pa.float64(), 6)),
            ("group", pa.string()),
            ("split", pa.string()),
            ("times", pa.struct([(name, pa.timestamp("us", tz="UTC")) for name in names])),
            ("valid", pa.struct([(name, pa.float32()) for name in names])),
            ("cloud", pa.float32()),
            ("classes", pa.list_(pa.int32())),
            ("shift", pa.struct([(name, pa.list_(pa.float32(), 2)) for name in names])),
            ("sources", pa.list_(pa.string())),
            ("geometry", pa.binary()),
        ]
    )


def write_shard(samples: Iterable[Sample], store: Store, name: str, encoding: Encoding) -> ShardRecord:
    """Write one tar of samples to the store as `NAME.tar`, in one put.

    The tar is POSIX ustar with all times, owners and modes fixed. It is made in a temporary file, so that nothing
    unfinished is ever visible and memory does not grow with it. Nothing is written when there are no samples.

    Returns:
        The record; `finish_shard` makes it durable.

    Raises:
        StoreError: the store cannot be written.
    """
    record = ShardRecord(name)
    with store.writing(f"{name}.tar") as path:
        with path.open("wb") as file:
            for sample in samples:
                record.rows.append(_add(file, sample, f"{name}.tar", encoding))
                record.statistics = merge(record.statistics, measure(sample))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        if not record.rows:
            path.unlink()
            return record
        record.bytes = path.stat().st_size
        with path.open("rb") as file:
            record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return record


def _add(file: IO[bytes], sample: Sample, shard: str, encoding: Encoding) -> dict[str, Any]:
    members, encoded = [], encode(sample, encoding)
    for name, data in encoded.items():
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        members.append({"name": name, "offset": file.tell(), "bytes": len(data)})
        file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return _row(sample, {"shard": shard, "members": members, "checksum": checksum(encoded)})


def _row(sample: Sample, stored: Mapping[str, Any]) -> dict[str, Any]:
    meta = sample.meta
    classes = None
    if sample.label is not None:
        classes = sorted({int(value) for value in set(sample.label.ravel().tolist())} - {255})
    return {
        "key": sample.key,
        **stored,
        **{key: meta.get(key) for key in ("crs", "transform", "group", "split", "cloud", "shift", "sources")},
        "times": {name: tile.time for name, tile in sample.tiles.items()},
        "valid": {name: tile.fraction for name, tile in sample.tiles.items()},
        "classes": classes,
        "geometry": shape(meta["footprint"]).wkb if meta.get("footprint") else None,
    }


def finish_shard(record: ShardRecord, store: Store, plan: str, sensors: Iterable[str]) -> None:
    """Put `NAME.parquet`, the record of a shard; from then on the shard counts as finished.

    Args:
        record: of `write_shard`.
        store: where the tar is.
        plan: fingerprint of the plan that the shard belongs to.
        sensors: those of the dataset.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "plan": plan,
        "sha256": record.sha256,
        "bytes": record.bytes,
        "statistics": {name: values.to_json() for name, values in record.statistics.items()},
        "left_out": record.left_out,
        "skipped": record.skipped,
        "stretches": record.stretches,
    }
    table = pa.Table.from_pylist(record.rows, schema=schema(sensors))
    table = table.replace_schema_metadata({"mcf_shard": json.dumps(facts, sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.put(f"{record.name}.parquet", buffer.getvalue())


def read_record(store: Store, name: str) -> tuple[ShardRecord, str, pa.Table]:
    """The record of a finished shard, the plan it belongs to, and its rows as a table."""
    table = read_table(store.get(f"{name}.parquet"))
    facts = json.loads(table.schema.metadata[b"mcf_shard"])
    statistics = {sensor: BandStatistics.from_json(values) for sensor, values in facts["statistics"].items()}
    record = ShardRecord(
        name, [], facts["sha256"], facts["bytes"], statistics, facts["left_out"], facts["skipped"],
        facts.get("stretches", {}),
    )  # fmt: skip
    return record, facts["plan"], table
