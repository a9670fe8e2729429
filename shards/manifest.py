"""The manifest: the only list of what a dataset holds. Selection: some of its rows and modalities, with a fingerprint.

`manifest.parquet` is GeoParquet 1.1 (one row per sample, footprint in OGC:CRS84); `dataset.json` carries the contract,
the shards' hashes and the fingerprint. Both are written by the build's merge and described in docs/format.md.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.contract import Contract
from shards.order import Use, hash64
from shards.store import AbsentError, Store, open_store
from shards.tables import read_table

FORMAT_VERSION = 1

# Columns that reading needs; the rest stays in the file.
READ = ["key", "shard", "members", "checksum", "group", "split", "classes", "valid", "cloud", "transform", "crs"]


class ManifestError(ValueError):
    """A dataset folder or a selection of it cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Selection:
    """Rows and modalities of a dataset, in manifest order.

    `fingerprint` changes with the dataset's bytes, the modalities, the filter and the limit, so that a checkpoint can
    refuse another selection than its own. `store` holds the tars; `foreign` says how to read those that are not ours.
    """

    store: Store
    contract: Contract
    rows: pa.Table
    fingerprint: str
    foreign: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @cached_property
    def shards(self) -> list[tuple[str, int]]:
        """Shards in their order, with the number of selected samples in each."""
        names = self.rows["shard"].combine_chunks()
        runs = pc.run_end_encode(names)
        ends = np.asarray(runs.run_ends)
        return list(zip(runs.values.to_pylist(), np.diff(ends, prepend=0).tolist(), strict=True))

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Row number by sample key."""
        return {key: i for i, key in enumerate(self.rows["key"].to_pylist())}


def select(
    data: str,
    *,
    modalities: Sequence[str] = (),
    where: Mapping[str, Sequence[Any]] | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Sequence[str] = (),
) -> Selection:
    """Choose samples of a dataset.

    Args:
        data: dataset folder, local or s3://, that holds manifest.parquet and dataset.json.
        modalities: sensors to read, in this order; all when empty.
        where: allowed values by column, such as `{"split": ["train"]}`; the column `labelled` takes `[True]`.
        limit: take only this many samples, chosen by a hash of (seed, row); all when None.
        seed: of that choice.
        columns: of the manifest that are wanted besides those that reading needs.

    Raises:
        ManifestError: no dataset there, a newer format, an unknown column, or nothing left.
        ContractError: an unknown modality.
    """
    store = open_store(data)
    facts = read_facts(store)
    contract = Contract.from_json(facts["contract"]).restrict(modalities)
    rows = read_table(store.get("manifest.parquet"), [*READ, *columns])
    rows = rows.filter(_mask(rows, where or {}))
    if limit is not None:
        rows = some(rows, limit, seed)
    if rows.num_rows == 0:
        raise ManifestError(f"{data}: no sample fits where={dict(where or {})}; it holds {summary(store)}")
    filters = sorted((key, sorted(map(str, values))) for key, values in (where or {}).items())
    identity = [facts["fingerprint"], list(contract.sensors), filters, limit, seed if limit is not None else None]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    foreign = facts.get("foreign")
    tars = open_store(_beside(data, foreign["root"])) if foreign else store
    return Selection(tars, contract, rows.combine_chunks(), fingerprint, foreign)


def some(rows: pa.Table, limit: int, seed: int = 0) -> pa.Table:
    """At most `limit` of the rows in their order, chosen by a hash of (seed, row)."""
    if limit >= rows.num_rows:
        return rows
    chosen = np.argsort(hash64(seed, Use.LIMIT, np.arange(rows.num_rows)), kind="stable")[:limit]
    return rows.take(np.sort(chosen))


def _beside(data: str, root: str) -> str:
    """`root` seen from the dataset folder."""
    return root if "://" in root or "://" in data else str(Path(data) / root)


def read_facts(store: Store) -> dict[str, Any]:
    """`dataset.json` of a dataset; ManifestError when it is absent or newer than this release reads."""
    try:
        facts: dict[str, Any] = json.loads(store.get("dataset.json"))
    except AbsentError as error:
        raise ManifestError(
            f"{store.url}: not a dataset ({error}); a dataset folder holds manifest.parquet and dataset.json, "
            "which `mcf shards build` writes at its end (or `mcf shards merge` after builds in parts)"
        ) from None
    if facts.get("format_version", 0) > FORMAT_VERSION:
        raise ManifestError(
            f"{store.url}: format_version {facts['format_version']}; this release reads {FORMAT_VERSION}"
        )
    return facts


def summary(store: Store) -> str:
    """How many samples of which split a dataset holds, in words."""
    rows = read_table(store.get("manifest.parquet"), ["split"])
    counts = rows["split"].value_counts().to_pylist()
    return ", ".join(f"{item['counts']} of split {item['values'] or '(none)'!r}" for item in counts) or "no samples"


def _mask(rows: pa.Table, where: Mapping[str, Sequence[Any]]) -> pa.Array:
    mask = pa.array(np.ones(rows.num_rows, np.bool_))
    for column, values in where.items():
        if column == "labelled":
            found = pc.is_in(pc.is_valid(rows["classes"]), value_set=pa.array(list(values), pa.bool_()))
        elif column in ("group", "split", "key", "shard"):
            found = pc.is_in(rows[column], value_set=pa.array([str(value) for value in values], pa.string()))
        else:
            raise ManifestError(f"where.{column}: unknown column; allowed: group, split, key, shard, labelled")
        mask = pc.and_(mask, found)
    return mask


def write_manifest(store: Store, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Put `manifest.parquet`, then `dataset.json`; the dataset exists from the second on."""
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        # No "crs" key: GeoParquet's default, OGC:CRS84.
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}},
    }
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), buffer, compression="zstd")
    store.put("manifest.parquet", buffer.getvalue())
    store.put("dataset.json", json.dumps(facts, indent=1, sort_keys=True).encode())
