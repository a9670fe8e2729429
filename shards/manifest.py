"""The manifest: the only list of what a dataset holds. Selection: some of its rows and modalities, with a fingerprint.

`manifest.parquet` is GeoParquet 1.1 (one row per sample, footprint in OGC:CRS84); `dataset.json` carries the contract,
the shards' hashes and the fingerprint. Both are written by the build's merge and described in docs/format.md.

A selection does not hold its rows: it knows how many each shard has, and reads where a sample lies when it is asked. So
ten million samples take seconds to select and some hundred MB.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.contract import Contract, ContractError, apart, compare
from shards.order import Use, hash64
from shards.store import AbsentError, Store, open_store
from shards.tables import GEOPARQUET, Table

FORMAT_VERSION = 1
MANIFEST = "manifest.parquet"

# Columns that say where a sample lies; the rest is read when it is asked for.
PLACE = ("key", "shard", "members", "checksum")
ROWS = 2048  # of a row group, or one shard's if it has more

Ints = NDArray[np.int64]

log = logging.getLogger(__name__)


class ManifestError(ValueError):
    """A dataset folder or a selection of it cannot be used; the message says what to do."""


class Member(NamedTuple):
    """A run of bytes in a tar."""

    name: str
    shard: str
    offset: int
    bytes: int


class Row(NamedTuple):
    """Where a sample lies: its members, and the crc32c of their bytes in order (None when nobody knows it)."""

    key: str
    members: tuple[Member, ...]
    checksum: int | None


@dataclass(frozen=True)
class Part:
    """Chosen rows of one dataset, in manifest order.

    Attributes:
        store: that holds the tars.
        table: the manifest.
        chosen: numbers of the chosen rows; None is all.
        shards: tar and number of chosen rows in it, in order.
        identity: what was selected from what, in JSON; another identity is another order.
        sizes: bytes of each tar.
        weight: share of this dataset among those that are mixed.
        foreign: how to read tars that are not ours.
    """

    store: Store
    table: Table
    chosen: Ints | None
    shards: Sequence[tuple[str, int]]
    identity: Mapping[str, Any]
    sizes: Mapping[str, int]
    weight: int = 1
    foreign: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.table) if self.chosen is None else len(self.chosen)

    def row(self, number: int) -> Row:
        """Where the sample of row `number` of the selection lies."""
        group, at = self.table.row(number if self.chosen is None else int(self.chosen[number]))
        shard, members = group["shard"][at].as_py(), group["members"].chunk(0)
        first, last = members.offsets[at].as_py(), members.offsets[at + 1].as_py()
        inside = members.values.slice(first, last - first)
        names, offsets, sizes = (inside.field(name).to_pylist() for name in ("name", "offset", "bytes"))
        shards = inside.field("shard").to_pylist() if self.foreign else [shard] * len(names)
        found = tuple(map(Member, names, shards, offsets, sizes))
        return Row(group["key"][at].as_py(), found, group["checksum"][at].as_py())

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """These columns of all chosen rows, at once."""
        names = list(columns)
        whole = pa.Table.from_batches(self.table.scan(names), self.table.schema(names))
        return (whole if self.chosen is None else whole.take(self.chosen)).combine_chunks()

    def some(self, limit: int, seed: int) -> Part:
        """At most `limit` of the rows in their order, chosen by a hash of (seed, row)."""
        if limit >= len(self):
            return self
        return self.only(np.argsort(hash64(seed, Use.LIMIT, np.arange(len(self))), kind="stable")[:limit])

    def only(self, which: Ints) -> Part:
        """These of the rows, by their numbers here, in their order."""
        which = np.unique(which)
        shards, chosen = _count(self.shards, which), which if self.chosen is None else self.chosen[which]
        return replace(self, chosen=chosen, shards=shards)


@dataclass(frozen=True)
class Selection:
    """Samples to read, as parts of one dataset or of several that are mixed; and what their numbers mean."""

    contract: Contract
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What was selected from what, part by part, in JSON."""
        return [{**part.identity, "weight": part.weight} for part in self.parts]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the identity: changes with the datasets' bytes, modalities, filter, limit and weights."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def place(self, number: int) -> tuple[int, int]:
        """Number of the part that holds row `number` of all, and which of the part's rows it is."""
        own = number
        for index, part in enumerate(self.parts):
            if own < len(part):
                return index, own
            own -= len(part)
        raise IndexError(f"row {number} of a selection of {len(self)}")

    def row(self, number: int) -> Row:
        """Where the sample of row `number` lies."""
        index, own = self.place(number)
        return self.parts[index].row(own)

    def some(self, limit: int, seed: int = 0) -> Selection:
        """At most `limit` of each part's rows, chosen by a hash of (seed, row)."""
        return replace(self, parts=tuple(_limited(part, limit, seed) for part in self.parts))

    def only(self, which: Ints, **why: Any) -> Selection:
        """These rows of one dataset, by number; `why` joins the identity.

        Raises:
            ManifestError: no row is left, or several datasets are mixed.
        """
        if len(self.parts) != 1 or not len(which):
            raise ManifestError(f"{len(which)} samples chosen from {len(self.parts)} datasets; one dataset is needed")
        (part,) = self.parts
        return replace(self, parts=(replace(part.only(which), identity={**part.identity, **why}),))

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """These columns of the manifest for all selected samples; takes memory for them."""
        return pa.concat_tables([part.rows(columns) for part in self.parts])

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Row number by sample key; takes memory for every key."""
        return {key: i for i, key in enumerate(self.rows(["key"])["key"].to_pylist())}


def select(
    data: str | Mapping[str, int],
    *,
    modalities: Sequence[str] = (),
    where: Mapping[str, Sequence[Any]] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Selection:
    """Choose samples of a dataset, or of several to be mixed.

    Args:
        data: dataset folder, local or s3://, that holds manifest.parquet and dataset.json; or weights by folder.
        modalities: sensors to read, in this order; all (of the first dataset) when empty.
        where: allowed values by column, such as `{"split": ["train"]}`; the column `labelled` takes `[True]`.
        limit: take only this many samples of each dataset, chosen by a hash of (seed, row); all when None.
        seed: of that choice.

    Raises:
        ManifestError: no dataset there, a newer format, an unknown column, or nothing left.
        ContractError: an unknown modality, or datasets whose numbers mean different things.
    """
    weights = {data: 1} if isinstance(data, str) else data
    if not weights:
        raise ManifestError("data: no dataset is named; give a folder, or {folder: weight, ...}")
    if wrong := [f"{name}: {weight}" for name, weight in weights.items() if type(weight) is not int or weight < 1]:
        raise ManifestError(f"data: {wrong[0]}; a weight is a whole number of 1 or more")
    parts, contracts = [], list[Contract]()
    for address, weight in weights.items():
        contract, part = _part(address, modalities or (contracts[0].sensors if contracts else ()), where or {})
        parts.append(replace(part, weight=weight))
        contracts.append(contract)
    selection = Selection(_common(weights, contracts), tuple(parts))
    return selection if limit is None else selection.some(limit, seed)


def differences(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between the identities of two selections, a line each."""
    if len(then) != len(now):
        return [f"data: {len(then)} datasets in the state, {len(now)} here"]
    names = {name: None for part in (*then, *now) for name in part}
    return [
        f"data.{name}: {a.get(name)} in the state, {b.get(name)} here"
        for a, b in zip(then, now, strict=True)
        for name in names
        if a.get(name) != b.get(name)
    ]


def _part(data: str, modalities: Sequence[str], where: Mapping[str, Sequence[Any]]) -> tuple[Contract, Part]:
    store = open_store(data)
    facts = read_facts(store)
    contract = Contract.from_json(facts["contract"]).restrict(modalities)
    table = Table(store, MANIFEST, PLACE)
    chosen, shards = _scan(table, where)
    if not shards:
        raise ManifestError(f"{data}: no sample fits where={dict(where)}; it holds {summary(store)}")
    identity = {
        "dataset": facts["fingerprint"],
        "modalities": list(contract.sensors),
        "where": {key: sorted(map(str, values)) for key, values in sorted(where.items())},
    }
    foreign = facts.get("foreign")
    tars = open_store(_beside(data, foreign["root"])) if foreign else store
    sizes = {name if foreign else f"{name}.tar": shard["bytes"] for name, shard in facts.get("shards", {}).items()}
    return contract, Part(tars, table, chosen, shards, identity, sizes, foreign=foreign)


def _limited(part: Part, limit: int, seed: int) -> Part:
    # In the identity even where it changes nothing now: the dataset may grow.
    return replace(part.some(limit, seed), identity={**part.identity, "limit": limit, "limit_seed": seed})


def _scan(table: Table, where: Mapping[str, Sequence[Any]]) -> tuple[Ints | None, list[tuple[str, int]]]:
    """Numbers of the rows that fit (None: all), and how many each shard has; keeps no more of the manifest."""
    columns = {"classes" if column == "labelled" else column for column in where}
    chosen: list[Ints] = []
    shards: list[tuple[str, int]] = []
    first = 0
    for batch in table.scan(sorted({"shard", *columns} & {*table.names})):
        mask = _mask(batch, where)
        for name, count in _runs(batch["shard"].filter(mask)):
            if shards and shards[-1][0] == name:
                count += shards.pop()[1]
            shards.append((name, count))
        if where:
            chosen.append(first + np.flatnonzero(mask))
        first += batch.num_rows
    return (np.concatenate([np.zeros(0, np.int64), *chosen]) if where else None), shards


def _runs(names: pa.Array) -> Iterator[tuple[str, int]]:
    runs = pc.run_end_encode(names)
    yield from zip(runs.values.to_pylist(), np.diff(np.asarray(runs.run_ends), prepend=0).tolist(), strict=True)


def _count(shards: Sequence[tuple[str, int]], which: Ints) -> list[tuple[str, int]]:
    """How many of the rows `which` each shard has."""
    ends = np.cumsum([count for _, count in shards])
    counts = np.bincount(np.searchsorted(ends, which, side="right"), minlength=len(shards)).tolist()
    return [(name, count) for (name, _), count in zip(shards, counts, strict=True) if count]


def _common(weights: Mapping[str, int], contracts: Sequence[Contract]) -> Contract:
    """The contract of datasets that are mixed: the first's, with the statistics of the mixture.

    Raises:
        ContractError: they mean different things.
    """
    (first, *others), (name, *names) = contracts, weights
    for other, contract in zip(names, others, strict=True):
        if found := compare(first, contract):
            raise ContractError(f"{name} (left) and {other} (right) cannot be mixed: {'; '.join(found)}")
        for line in apart(first, contract):
            log.warning("%s and %s, which are mixed, differ: %s", name, other, line)
    return first.pooled(others, list(weights.values())) if others else first


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
    except ValueError as error:
        raise ManifestError(
            f"{store.url}: dataset.json is damaged ({error}); restore it, or remove it and run `mcf shards merge`"
        ) from None
    if facts.get("format_version", 0) > FORMAT_VERSION:
        raise ManifestError(
            f"{store.url}: format_version {facts['format_version']}; this release reads {FORMAT_VERSION}"
        )
    return facts


def summary(store: Store) -> str:
    """How many samples of which split a dataset holds, in words."""
    counts = Counter[str]()
    for batch in Table(store, MANIFEST, PLACE).scan(["split"]):
        counts.update(
            {item["values"] or "(none)": item["counts"] for item in batch["split"].value_counts().to_pylist()}
        )
    return ", ".join(f"{count} of split {split!r}" for split, count in counts.items()) or "no samples"


def _mask(rows: pa.RecordBatch, where: Mapping[str, Sequence[Any]]) -> NDArray[np.bool_]:
    mask = np.ones(rows.num_rows, np.bool_)
    for column, values in where.items():
        if column == "labelled":
            found = pc.is_in(rows["classes"].is_valid(), value_set=pa.array(list(values), pa.bool_()))
        elif column in ("group", "split", "key", "shard"):
            found = pc.is_in(rows[column], value_set=pa.array([str(value) for value in values], pa.string()))
        else:
            raise ManifestError(f"where.{column}: unknown column; allowed: group, split, key, shard, labelled")
        mask &= np.asarray(found)
    return mask


def write_manifest(store: Store, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Put `manifest.parquet`, then `dataset.json`; the dataset exists from the second on."""
    table = table.replace_schema_metadata(GEOPARQUET)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        for first, last in _groups(table):
            writer.write_table(table.slice(first, last - first), row_group_size=last - first)
    store.put(MANIFEST, buffer.getvalue())
    store.put("dataset.json", json.dumps(facts, indent=1, sort_keys=True).encode())


def _groups(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Rows of each row group: whole shards, so that a reader of one shard decodes little else."""
    first = last = 0
    for _, count in _runs(table["shard"].combine_chunks()):
        last += count
        if last - first >= ROWS:
            yield first, last
            first = last
    if last > first:
        yield first, last
