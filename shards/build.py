"""Building a dataset: plan, build, merge.

The plan is made without reading a pixel. Every place is opened once for its grid; each acquisition of the reference
sensor is cut into windows; the windows, in order, are dealt into shards of a fixed number of tiles. So a shard is a
fixed list of (place, window) whatever is found later, any builder can make any shard, and two builders of one plan
write the same bytes.

A builder then takes its share of the shards that are not finished yet. For each, it opens the scenes of one place after
the other, reads every window on the reference grid, leaves out tiles with too few valid pixels (and counts them), and
writes the tar and then its record. The record is the mark of a finished shard: what a killed builder leaves behind is
at most a tar without record, which is written again.

Merge puts the records' rows together into the manifest and writes `dataset.json`. Until then no dataset exists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from configs import to_dict
from shards.archives import ArchiveError, open_archive
from shards.config import Label, ShardsConfig
from shards.contract import Contract, Modality
from shards.grid import Grid, Window
from shards.manifest import FORMAT_VERSION, write_manifest
from shards.raster_io import footprint
from shards.sample import Sample, Tile
from shards.scene import LABEL, Place, SceneError
from shards.sensors import SENSORS
from shards.statistics import BandStatistics
from shards.statistics import merge as merge_statistics
from shards.store import Store, open_store
from shards.tile import OpenScene, is_empty, open_scene, overlaps, read_tile
from shards.write import ShardRecord, finish_shard, read_record, schema, write_shard


class BuildError(ValueError):
    """A build cannot go on; the message lists the reasons, a line each."""


@dataclass(frozen=True)
class Item:
    """One planned sample: a place with one scene per sensor, and a window on the reference scene's grid."""

    key: str
    place: Place
    window: Window


@dataclass(frozen=True)
class Plan:
    """Shards as fixed lists of items; `skipped` are places that could not be used, with the reason."""

    shards: tuple[tuple[Item, ...], ...]
    skipped: tuple[str, ...]
    fingerprint: str

    @property
    def items(self) -> int:
        """Number of planned samples."""
        return sum(map(len, self.shards))


def shard_name(index: int) -> str:
    """Name of a shard's files without extension."""
    return f"shard-{index:06d}"


def plan(config: ShardsConfig) -> Plan:
    """Decide every shard's content from headers alone.

    Raises:
        ArchiveError: the archive is empty or unreadable.
        BuildError: places that cannot be used, under `on_error=fail`; all of them are listed.
    """
    items: list[Item] = []
    problems: list[str] = []
    places = list(open_archive(config.archive.name, config.archive.root))
    if not places:
        raise ArchiveError(f"{config.archive.root}: no place in the archive")
    for place in tqdm(places, "plan", unit="place", disable=None, leave=False):
        try:
            items += _plan_place(place, config)
        except SceneError as error:
            problems.append(str(error))
    if problems and (config.on_error == "fail" or not items):
        raise BuildError(_refusal(problems, len(places)))
    size = config.samples_per_shard
    shards = tuple(tuple(items[i : i + size]) for i in range(0, len(items), size))
    return Plan(shards, tuple(problems), _fingerprint(config, items))


def _refusal(problems: Sequence[str], places: int) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{len(problems)} of {places} places cannot be used (on_error=skip leaves such places out):\n{lines}"


def _fingerprint(config: ShardsConfig, items: Sequence[Item]) -> str:
    settings = to_dict(config)
    for key in ("part", "workers", "out", "archive"):  # change nothing in what is written
        settings.pop(key)
    identity = [settings, [[item.key, vars(item.window)] for item in items]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _plan_place(place: Place, config: ShardsConfig) -> Iterator[Item]:
    views = list(place.views(config.sensors, config.tile.max_days))
    if not views:
        raise SceneError(place.scenes[0].path, f"place {place.name} has no {config.sensors[0]} scene")
    for view in views:
        with ExitStack() as stack:
            opened = [stack.enter_context(open_scene(scene)) for scene in view.scenes]
            grid = opened[0].grid
            for other in opened[1:]:
                if not overlaps(grid, other.grid):
                    first = opened[0].scene.path
                    raise SceneError(other.scene.path, f"does not overlap {first} (place {place.name})")
        time = view.scenes[0].time
        stem = place.name if time is None or len(views) == 1 else f"{place.name}-{time:%Y%m%dT%H%M%S}"
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:90]
        for window in grid.windows(config.tile.size, config.tile.stride):
            yield Item(f"{stem}-{window.row:05d}-{window.col:05d}", view, window)


def build(config: ShardsConfig) -> Path | str:
    """Build this part of a dataset, and merge it when there is only one part.

    Returns:
        The dataset's address.

    Raises:
        BuildError, ArchiveError, SceneError, StoreError: nothing is lost; run the same command again to go on.
    """
    store = open_store(config.out)
    planned = plan(config)
    part, parts = map(int, config.part.split("/"))
    mine = [i for i in range(len(planned.shards)) if i % parts == part - 1]
    finished = _finished(store, planned)
    todo = [(i, planned.shards[i]) for i in mine if shard_name(i) not in finished]
    _build_shards(config, planned.fingerprint, todo, len(mine) - len(todo))
    if parts == 1:
        merge(config, planned)
    return config.out


def _finished(store: Store, planned: Plan) -> set[str]:
    """Names of the shards that are done; refuses a folder in which another plan was begun."""
    names = {name.removesuffix(".parquet") for name in store.list("shard-") if name.endswith(".parquet")}
    for name in sorted(names)[:1]:
        _, found, _ = read_record(store, name)
        if found != planned.fingerprint:
            raise BuildError(
                f"{store.url}: holds shards of another build (other archive content, sensors or tiling); "
                "give another out=, or remove that folder"
            )
    return names


def _build_shards(config: ShardsConfig, fingerprint: str, todo: Sequence[tuple[int, Any]], done: int) -> None:
    total = sum(len(items) for _, items in todo)
    note = f" ({done} shards were finished before)" if done else ""
    with tqdm(total=total, desc=f"build{note}", unit="tile", disable=None) as bar:
        for record, planned in _run(config, fingerprint, todo):
            bar.update(planned)
            bar.set_postfix_str(f"{record.name}, {sum(record.left_out.values())} left out")


def _run(config: ShardsConfig, fingerprint: str, todo: Sequence[tuple[int, Any]]) -> Iterator[tuple[ShardRecord, int]]:
    if config.workers == 1 or len(todo) < 2:
        for index, items in todo:
            yield build_shard(config, fingerprint, index, items), len(items)
        return
    with ProcessPoolExecutor(config.workers, get_context("spawn")) as pool:
        running = {pool.submit(build_shard, config, fingerprint, i, items): len(items) for i, items in todo}
        try:
            for future in as_completed(running):
                yield future.result(), running[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def build_shard(config: ShardsConfig, fingerprint: str, index: int, items: Sequence[Item]) -> ShardRecord:
    """Read, write and record one planned shard."""
    store, left_out, skipped = open_store(config.out), Counter[str](), list[str]()
    record = write_shard(_samples(config, items, left_out, skipped), store, shard_name(index), config.encoding)
    record.left_out, record.skipped = dict(left_out), skipped
    finish_shard(record, store, fingerprint, config.sensors)
    return record


def _samples(
    config: ShardsConfig, items: Sequence[Item], left_out: Counter[str], skipped: list[str]
) -> Iterator[Sample]:
    for _, group in groupby(items, key=lambda item: item.place):
        members, poor = list(group), Counter[str]()
        try:
            # A place is read whole before any of it is written, so that a damaged file leaves nothing half done.
            yield from list(_place_samples(config, members, poor))
            left_out.update(poor)
        except SceneError as error:
            if config.on_error == "fail":
                raise
            skipped.append(str(error))
            left_out["unreadable"] += len(members)


def _place_samples(config: ShardsConfig, items: Sequence[Item], left_out: Counter[str]) -> Iterator[Sample]:
    place = items[0].place
    with ExitStack() as stack:
        opened = {scene.sensor: stack.enter_context(open_scene(scene)) for scene in place.scenes}
        reference = opened[config.sensors[0]].grid
        seen = dict.fromkeys(config.sensors, False)
        for item in items:
            grid = reference.window(item.window)
            tiles = {name: read_tile(opened[name], grid) for name in config.sensors}
            seen = {name: seen[name] or bool(tile.valid.any()) for name, tile in tiles.items()}
            poor = [name for name, tile in tiles.items() if tile.fraction < config.tile.min_valid]
            if poor:
                left_out[f"valid fraction of {poor[0]} under {config.tile.min_valid:g}"] += 1
                continue
            label = _label(opened[LABEL], grid, config.label) if config.label and LABEL in opened else None
            yield Sample(item.key, tiles, label, _facts(place, grid))
        for name in (name for name, any_valid in seen.items() if not any_valid):
            if is_empty(opened[name]):
                raise SceneError(opened[name].scene.path, f"holds no valid pixel of {name}")


def _label(opened: OpenScene, grid: Grid, label: Label) -> NDArray[np.uint8]:
    """Class indices [H, W], 255 where there is none."""
    tile: Tile = read_tile(opened, grid)
    codes = tile.values[0]
    known = label.codes or tuple(range(len(label.names)))
    out = np.full(codes.shape, 255, np.uint8)
    for index, code in enumerate(known):
        out[codes == code] = index
    strange = np.setdiff1d(codes[tile.valid], [*known, *label.ignored])
    if strange.size:
        raise SceneError(
            opened.scene.path,
            f"label codes {strange[:10].tolist()} are neither in label.codes {list(known)} "
            f"nor in label.ignored {list(label.ignored)}",
        )
    out[~tile.valid] = 255
    return out


def _facts(place: Place, grid: Grid) -> dict[str, Any]:
    return {
        "place": place.name,
        "group": place.group,
        "split": place.split,
        "crs": grid.crs,
        "transform": list(grid.transform),
        "sources": [Path(asset.path).name for scene in place.scenes for asset in scene.assets],
        "footprint": footprint(grid.crs, grid.corners()) if grid.crs else None,
    }


def merge(config: ShardsConfig, planned: Plan | None = None) -> Path | str:
    """Put the parts of a build together: manifest.parquet and dataset.json.

    Raises:
        BuildError: shards are missing (they are named), or no tile survived.
    """
    store = open_store(config.out)
    planned = planned or plan(config)
    names = [shard_name(i) for i in range(len(planned.shards))]
    if missing := sorted(set(names) - _finished(store, planned)):
        raise BuildError(f"{config.out}: {len(missing)} shards are not built yet: {', '.join(missing[:5])} ...")
    tables, records, statistics = [], [], dict[str, BandStatistics]()
    for name in names:
        record, _, table = read_record(store, name)
        tables.append(table.replace_schema_metadata(None))
        records.append(record)
        statistics = merge_statistics(statistics, record.statistics)
    rows = pa.concat_tables(tables) if tables else schema(config.sensors).empty_table()
    left_out = sum((Counter(record.left_out) for record in records), Counter[str]())
    if rows.num_rows == 0:
        raise BuildError(f"{config.out}: no tile survived; left out: {dict(left_out) or 'none were planned'}")
    skipped = [*planned.skipped, *dict.fromkeys(reason for record in records for reason in record.skipped)]
    facts = _dataset_facts(config, planned, records, statistics, rows)
    write_manifest(store, rows, {**facts, "left_out": dict(left_out), "skipped": skipped})
    return config.out


def _dataset_facts(
    config: ShardsConfig, planned: Plan, records: Sequence[ShardRecord],
    statistics: dict[str, BandStatistics], rows: pa.Table,
) -> dict[str, Any]:  # fmt: skip
    contract = _contract(config, planned, statistics).to_json()
    shards = {record.name: {"sha256": record.sha256, "bytes": record.bytes} for record in records if record.sha256}
    identity = [FORMAT_VERSION, contract, shards]
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
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "written_by": f"mcf-mamba {version('mcf-mamba')}",
    }


def _contract(config: ShardsConfig, planned: Plan, statistics: dict[str, BandStatistics]) -> Contract:
    first = planned.shards[0][0].place
    modalities = []
    with ExitStack() as stack:
        opened = {s.sensor: stack.enter_context(open_scene(s)) for s in first.scenes if s.sensor != LABEL}
        grid = opened[config.sensors[0]].grid
        for name in config.sensors:
            row, found = SENSORS[name], statistics.get(name)
            mean = tuple(found.mean.tolist()) if found else None
            std = tuple(found.std.tolist()) if found else None
            modality = Modality(
                sensor=name, bands=row.band_names, unit=row.unit, dtype=str(opened[name].dtype), clip=row.clip,
                offset=(), scale=(), mean=mean, std=std,
            )  # fmt: skip
            modalities.append(modality.normalised("range"))
    metres = grid.resolution if grid.crs and not grid.crs.startswith("EPSG:4326") else None
    classes = config.label.classes() if config.label else None
    return Contract(modalities=tuple(modalities), classes=classes, resolution=metres)
