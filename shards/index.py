"""index: a dataset over the tars of an archive, without writing a shard."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from shapely.geometry import shape
from tqdm import tqdm

from shards.config import ShardsConfig
from shards.foreign import Part, to_json
from shards.manifest import write_manifest
from shards.merge import dataset_facts
from shards.order import Use, hash64
from shards.plan import BuildError, Plan, View, plan
from shards.raster_io import footprint
from shards.sample import Sample
from shards.scene import Scene
from shards.splits import assign
from shards.statistics import BandStatistics, measure, merge
from shards.store import open_store
from shards.tile import open_scene, read_tile
from shards.write import schema

MEASURED = 512  # samples whose pixels are read for the statistics
ITEM = re.compile(r"(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+):(?P<item>.+)")


def index(config: ShardsConfig) -> str:
    """Write the manifest of an archive of tars: `manifest.parquet` and `dataset.json` in `config.out`.

    Pixels are read of some samples only, for the statistics; so valid fractions and checksums are null, and clouds and
    shifts too. Tiles are the archive's own.

    Raises:
        BuildError: the archive is not made of tars of zarr groups, its tiles are larger than `tile.size`, numbers that
            have to be converted, or groups of one sensor that are read in different ways.
        ArchiveError: nothing usable is there.
    """
    planned = plan(config)
    parts = _parts(config, planned)
    rows = pa.concat_tables(_tables(config, planned))
    facts = dataset_facts(config, planned, [], rows, _statistics(config, planned))
    facts["encoding"], facts["shards"] = "foreign", _tars(config, rows)
    facts["foreign"] = {"root": _relative(config), "parts": to_json(parts)}
    if config.split is not None:
        rows, facts["split"] = assign(rows, config.split)
    identity = [facts["contract"], facts["shards"], facts["foreign"]["parts"], rows["key"].to_pylist()]
    identity.append(rows["split"].to_pylist())
    facts["fingerprint"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    write_manifest(open_store(config.out), rows, facts)
    return config.out


def _relative(config: ShardsConfig) -> str:
    """Where the tars are, seen from the dataset, so that both can move together."""
    root = config.archive.root
    return root if "://" in config.out else os.path.relpath(root, config.out)


def _found(scene: Scene) -> dict[str, str]:
    found = ITEM.fullmatch(scene.assets[0].item)
    if len(scene.assets) != 1 or found is None or not scene.path.endswith(".tar"):
        raise BuildError(f"{scene.path}: only archives of tars of zarr groups can be indexed; use mcf shards build")
    return found.groupdict()


def _parts(config: ShardsConfig, planned: Plan) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for view in planned.views:
        if max(view.grid.height, view.grid.width) > view.size:
            size = f"{view.grid.height} x {view.grid.width}"
            raise BuildError(f"{view.stem} has {size} pixels, and an index cannot cut: give tile.size its longer side")
        for name in config.sensors:
            (scene,) = view.place.of(name)
            found, asset = _found(scene), scene.assets[0]
            if asset.radiometry != type(asset.radiometry)():
                raise BuildError(f"{scene.path}: {name} has to be converted ({asset.radiometry}); use mcf shards build")
            part = Part(found["item"], asset.bands, asset.nodata)
            if parts.setdefault(name, part) != part:
                raise BuildError(
                    f"{scene.path}: {view.stem} has {name} as {part}, others as {parts[name]}; index apart"
                )
    return parts


def _tables(config: ShardsConfig, planned: Plan) -> Iterator[pa.Table]:
    """Rows as columns, some thousand at a time: there may be millions."""
    plain = schema(config.sensors)
    member = pa.struct([*plain.field("members").type.value_type, ("shard", pa.string())])
    wanted = plain.set(plain.get_field_index("members"), pa.field("members", pa.list_(member)))
    rows: list[dict[str, Any]] = []
    for view in tqdm(planned.views, "index", unit="sample", disable=None, leave=False):
        rows.append(_row(config, view))
        if len(rows) == 4096:
            yield pa.Table.from_pylist(rows, schema=wanted)
            rows = []
    yield pa.Table.from_pylist(rows, schema=wanted)


def _row(config: ShardsConfig, view: View) -> dict[str, Any]:
    members = []
    for name in config.sensors:
        (scene,) = view.place.of(name)
        found = _found(scene)
        tar = Path(scene.path).relative_to(config.archive.root).as_posix()
        where = {"offset": int(found["offset"]), "bytes": int(found["size"]), "shard": tar}
        members.append({"name": f"{view.stem}.{name}.zarr.zip", **where})
    grid = view.grid
    return {
        "key": view.stem,
        "shard": members[0]["shard"],
        "members": members,
        "crs": grid.crs,
        "transform": list(grid.transform),
        "group": view.place.group,
        "split": view.place.split,
        "times": {scene.sensor: scene.time for scene in view.place.scenes if scene.sensor in config.sensors},
        "sources": [member["shard"] for member in members],
        "geometry": shape(footprint(grid.crs, grid.corners())).wkb if grid.crs else None,
    }


def _tars(config: ShardsConfig, rows: pa.Table) -> dict[str, dict[str, int]]:
    names = sorted({name for sources in rows["sources"].to_pylist() for name in sources})
    return {name: {"bytes": (Path(config.archive.root) / name).stat().st_size} for name in names}


def _statistics(config: ShardsConfig, planned: Plan) -> dict[str, BandStatistics]:
    order = np.argsort(hash64(0, Use.LIMIT, np.arange(len(planned.views))), kind="stable")
    found: dict[str, BandStatistics] = {}
    for number in tqdm(np.sort(order[:MEASURED]), "statistics", unit="sample", disable=None, leave=False):
        found = merge(found, measure(_sample(planned.views[number], config.sensors)))
    return found


def _sample(view: View, sensors: Sequence[str]) -> Sample:
    with ExitStack() as stack:
        scenes = [scene for name in sensors for scene in view.place.of(name)]
        opened = [stack.enter_context(open_scene(scene, view.place.coregistered)) for scene in scenes]
        return Sample(view.stem, {scene.scene.sensor: read_tile(scene, view.grid) for scene in opened})
