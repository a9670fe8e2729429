"""The merge of a build: records of all shards become the manifest; `dataset.json` says what the numbers mean."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.archives import about
from shards.coarse import looks_coarse
from shards.config import ShardsConfig
from shards.contract import Contract, ContractError, Modality, compare
from shards.manifest import FORMAT_VERSION, read_facts, write_manifest
from shards.plan import BuildError, Plan, plan, shard_name
from shards.raster_io import is_geographic
from shards.scene import Scene
from shards.sensors import SENSORS
from shards.splits import assign
from shards.statistics import BandStatistics
from shards.statistics import merge as merge_statistics
from shards.store import Store, open_store
from shards.tile import open_scene
from shards.write import ShardRecord, read_record

TABLES = 64  # of shards that are made one

log = logging.getLogger(__name__)


def merge(config: ShardsConfig, planned: Plan | None = None, store: Store | None = None) -> str:
    """Put the parts of a build together, and with the builds of other names that are in the dataset already.

    Writes manifest.parquet and dataset.json to `store`, by default the one at `config.out`; shards are not touched.

    Raises:
        BuildError: shards are missing (they are named), no tile survived, or two builds hold the same keys.
        ContractError: the dataset's other builds mean something else by their numbers.
    """
    store = store or open_store(config.out)
    planned = planned or plan(config)
    check_contract(config, planned)
    found = _Found()
    _add_own(found, config, planned, store)
    own = list(found.records)
    others = {name: facts for name, facts in _builds(store).items() if name != config.name}
    for name, facts in others.items():
        for index in range(facts["shards"]):
            record, _, table = read_record(store, f"{name}-{index:06d}")
            found.add(record, table)
    rows = found.rows()
    facts = dataset_facts(config, planned, found.records, rows, found.statistics)
    builds = {**others, config.name: _build_facts(config, planned, own)}
    facts |= {"builds": builds, **_of_all(builds)}
    for line in facts["warnings"]:
        log.warning("%s: %s", config.out, line)
    _check_rows(config, rows, facts)
    if config.split is not None:
        rows, facts["split"] = assign(rows, config.split)
    identity = [FORMAT_VERSION, facts["contract"], facts["shards"], rows["split"].to_pylist()]
    facts["fingerprint"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    write_manifest(store, rows, facts)
    return config.out


@dataclass
class _Found:
    """What the records of many shards tell, kept small: a table or the histograms of each shard would take more."""

    tables: list[pa.Table] = field(default_factory=list)
    last: list[pa.Table] = field(default_factory=list)
    records: list[ShardRecord] = field(default_factory=list)
    statistics: dict[str, BandStatistics] = field(default_factory=dict)

    def add(self, record: ShardRecord, table: pa.Table) -> None:
        """One more shard."""
        self.last.append(table.replace_schema_metadata(None))
        if len(self.last) == TABLES:
            self.tables.append(pa.concat_tables(self.last).combine_chunks())
            self.last.clear()
        self.statistics = merge_statistics(self.statistics, record.statistics)
        self.records.append(replace(record, statistics={}))

    def rows(self) -> pa.Table:
        """Of all shards."""
        return pa.concat_tables(self.tables + self.last)


def _add_own(found: _Found, config: ShardsConfig, planned: Plan, store: Store) -> None:
    names = [shard_name(config, index) for index in range(planned.shards)]
    there = set(store.list(f"{config.name}-"))
    if missing := [name for name in names if f"{name}.parquet" not in there]:
        raise BuildError(f"{config.out}: {len(missing)} shards are not built yet: {', '.join(missing[:5])} ...")
    for name in names:
        record, fingerprint, table = read_record(store, name)
        if fingerprint != planned.fingerprint:
            raise BuildError(f"{config.out}: {name} belongs to another build; give another out=, or remove that folder")
        found.add(record, table)


def _builds(store: Store) -> dict[str, dict[str, Any]]:
    """The builds that the dataset in the store is made of, by name; none where there is no dataset yet."""
    if not store.exists("dataset.json"):
        return {}
    facts = read_facts(store)
    if "builds" not in facts:
        raise BuildError(
            f"{store.url}: holds an index over foreign tars, to which shards cannot be added; give another out="
        )
    return dict(facts["builds"])


def check_contract(config: ShardsConfig, planned: Plan) -> None:
    """Refuse to add to a dataset whose numbers mean something else.

    Raises:
        ContractError: naming what differs.
    """
    store = open_store(config.out)
    others = set(_builds(store)) - {config.name}
    if not others:
        return
    there, new = Contract.from_json(read_facts(store)["contract"]), _contract(config, planned, {})
    if found := compare(there, new):
        raise ContractError(
            f"{config.out} holds {', '.join(sorted(others))} (left), which build {config.name!r} (right) does not fit: "
            f"{'; '.join(found)}; give another out="
        )


def _build_facts(config: ShardsConfig, planned: Plan, records: Sequence[ShardRecord]) -> dict[str, Any]:
    return {
        "plan": planned.fingerprint,
        "shards": planned.shards,
        "planned": planned.items,
        "archive": _archive(config),
        "label": _label(config),
        **_lost(planned, records),
    }


def _label(config: ShardsConfig) -> dict[str, Any] | None:
    """What codes became which class; None without labels. With polygons there are no codes: 0 outside, 1 inside."""
    if config.label is None:
        return None
    table = config.label.table()
    codes = [[code for code, index in table.items() if index == number] for number in range(len(config.label.names))]
    return {"codes": codes, "ignored": list(config.label.ignored), "min_area": float(config.label.min_area)}


def _lost(planned: Plan, records: Sequence[ShardRecord]) -> dict[str, Any]:
    """What is not in the shards: counts by reason, and files that could not be used, each once."""
    left_out = sum((Counter(record.left_out) for record in records), Counter(planned.reasons()))
    skipped = dict.fromkeys(reason for record in records for reason in record.skipped)
    return {"left_out": dict(left_out), "skipped": [*planned.problems, *skipped]}


def _of_all(builds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was planned and lost in all builds together."""
    each = [builds[name] for name in sorted(builds)]
    return {
        "planned": sum(build["planned"] for build in each),
        "left_out": dict(sum((Counter(build.get("left_out", {})) for build in each), Counter())),
        "skipped": [reason for build in each for reason in build.get("skipped", ())],
    }


def _check_rows(config: ShardsConfig, rows: pa.Table, facts: Mapping[str, Any]) -> None:
    if rows.num_rows == 0:
        raise BuildError(f"{config.out}: no tile survived; left out: {facts['left_out']}")
    if pc.count_distinct(rows["key"]).as_py() < rows.num_rows:
        twice = [item["values"] for item in pc.value_counts(rows["key"]).to_pylist() if item["counts"] > 1]
        raise BuildError(
            f"{config.out}: {len(twice)} keys are in another build of this dataset too: {twice[:5]}. Give these places "
            f"other names or leave them out, and remove {config.out}/{config.name}-*"
        )


def dataset_facts(
    config: ShardsConfig, planned: Plan, records: Sequence[ShardRecord], rows: pa.Table,
    statistics: Mapping[str, BandStatistics],
) -> dict[str, Any]:  # fmt: skip
    """What `dataset.json` says, but for splits and the fingerprint."""
    contract = _contract(config, planned, statistics).to_json()
    shards = {record.name: {"sha256": record.sha256, "bytes": record.bytes} for record in records if record.sha256}
    stretches = sum((Counter(record.stretches) for record in records), Counter[str]())
    warning = looks_coarse(stretches["all"], stretches["short"])
    return {
        "format_version": FORMAT_VERSION,
        "contract": contract,
        "statistics": {name: values.to_json() for name, values in statistics.items()},
        "encoding": config.encoding,
        "shards": shards,
        "samples": rows.num_rows,
        "planned": planned.items,
        "plan": planned.fingerprint,
        "tile": {"size": config.tile.size, "min_valid": config.tile.min_valid},
        "written_by": f"mcf-mamba {version('mcf-mamba')}",
        "archive": _archive(config),
        "left_out_examples": planned.examples(),
        "label_stretches": {name: stretches[name] for name in ("all", "short")},
        "warnings": [warning] if warning else [],
        **_lost(planned, records),
    }


def _archive(config: ShardsConfig) -> dict[str, Any]:
    """What is known of where the data come from; what the config says goes before what the layout implies."""
    known = about(config.archive.name)
    return {
        "name": config.archive.name,
        "title": known.title,
        "licence": config.archive.licence or known.licence,
        "attribution": config.archive.attribution or known.attribution,
        "source": known.source,
    }


def _contract(config: ShardsConfig, planned: Plan, statistics: Mapping[str, BandStatistics]) -> Contract:
    view = planned.views[0]
    modalities = []
    with ExitStack() as stack:
        for scene in (scene for name in config.sensors for scene in view.place.of(name)):
            opened = stack.enter_context(open_scene(scene, view.place.coregistered))
            row, found = SENSORS[scene.sensor], statistics.get(scene.sensor)
            mean = tuple(found.mean.tolist()) if found else None
            std = tuple(found.std.tolist()) if found else None
            modality = Modality(
                sensor=row.name, bands=row.band_names, unit=row.unit, dtype=str(opened.dtype), clip=row.clip,
                offset=(), scale=(), mean=mean, std=std, note=_note(config, scene),
            )  # fmt: skip
            modalities.append(modality.normalised("range"))
    grid = view.grid
    metres = grid.resolution if grid.crs and not is_geographic(grid.crs) else None
    classes = config.label.classes() if config.label else None
    return Contract(modalities=tuple(modalities), classes=classes, resolution=metres)


def _note(config: ShardsConfig, scene: Scene) -> str:
    """What the sensor's unit leaves open: by the archive, and what is done to the numbers."""
    notes = [about(config.archive.name).notes.get(scene.sensor, "")]
    radiometry = {asset.radiometry for asset in scene.assets}
    notes += [f"dB of {item.quantity}" for item in radiometry if item.quantity != "value"]
    notes += [f"offset {item.offset:g} added" for item in radiometry if item.offset]
    return "; ".join(sorted({note for note in notes if note}))
