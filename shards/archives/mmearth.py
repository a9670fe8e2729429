"""MMEarth: 1.2 million places of 128 or 64 pixels in one HDF5 file.

    data_1M_v001/data_1M_v001.h5  ..._splits.json (rows by split)  ..._tile_info.json (by tile)
    (data_1M_v001_64 and data_100k_v001 alike)

Row by row, the file holds `metadata` (tile, level of Sentinel-2), `sentinel2` (13 bands, B8A before B8; in tiles of
Level-2A B10 is 0), `sentinel1` (VV, VH, HH, HV of an ascending, then of a descending pass; -inf where there is none),
`aster` (elevation, slope), `sentinel2_scl`, `sentinel2_cloudmask` (QA60) and more. `tile_info` tells S2_DATE, S2_type,
CRS, lat, lon and BANDS. It has no transform, so the pixels' exact position is not known and places have no CRS.

Sources: vishalned/MMEarth-data, utils/convert_to_h5.py, utils/utils.py (update_tile_info), utils/splits.py,
config/config_data.yaml, ee_utils/ee_data.py; torchgeo.datasets.MMEarth; Nedungadi et al. 2024 (arXiv:2405.02771).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shards.archives import About, ArchiveError
from shards.archives.tree import visible
from shards.archives.walk import nothing
from shards.containers import load_h5py
from shards.scene import Asset, CloudMask, LeftOut, Place, Scene

ABOUT = About(
    title="MMEarth",
    licence="CC-BY-4.0",
    attribution=(
        "Nedungadi et al. 2024, MMEarth; contains modified Copernicus Sentinel data 2017-2020; ASTER GDEM is a product "
        "of METI and NASA"
    ),
    source="https://github.com/vishalned/MMEarth-data",
    notes={
        "s1": (
            "GRD (no terrain correction of radiometry), dB, from Earth Engine's COPERNICUS/S1_GRD; the pass nearest to "
            "the Sentinel-2 date, whose own date is not told. By the code that made the file, tiles of Level-2A whose "
            "BANDS lack MSK_CLDPRB may hold bands shifted by one, here and in aster"
        ),
        "s2-l1c": "from Earth Engine's COPERNICUS/S2_HARMONIZED: the offset of baseline 04.00 is removed",
        "s2-l2a": "from Earth Engine's COPERNICUS/S2_SR_HARMONIZED: the offset of baseline 04.00 is removed",
        "dem": "ASTER GDEM, metres above EGM96, whole numbers",
    },
)

LAYOUT = "data_1M_v001/{data_1M_v001.h5,data_1M_v001_splits.json,data_1M_v001_tile_info.json}"
SPLITS = ("train", "val", "test")
LEVEL = {"l1c": "s2-l1c", "l2a": "s2-l2a"}
OPTICAL = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
PASSES = {"asc": ("VV", "VH", "", "", "", "", "", ""), "desc": ("", "", "", "", "VV", "VH", "", "")}
# Cloud of medium and high probability, and cirrus, in the scene classification; bits 10 and 11 of QA60.
MASKS = {"s2-l2a": ("sentinel2_scl", (8, 9, 10), 255), "s2-l1c": ("sentinel2_cloudmask", (1024, 2048, 3072), 65535)}


@dataclass(frozen=True)
class Tile:
    """What tile_info says of one tile."""

    date: str
    crs: str
    lat: float
    lon: float
    passes: tuple[str, ...]


def places(root: str) -> Iterator[Place | LeftOut]:
    """Places in the order of the file's rows.

    Args:
        root: the file, its folder, or the folder above it.

    Raises:
        ArchiveError: no such file, or without its splits and tile_info.
    """
    file = _find(Path(root))
    beside = {what: file.with_name(f"{file.stem}_{what}.json") for what in ("splits", "tile_info")}
    if missing := [path.name for path in beside.values() if not path.is_file()]:
        raise ArchiveError(f"{file}: {', '.join(missing)} must lie beside it; load them from the same place")
    split_of = {row: name for name, rows in json.loads(beside["splits"].read_text()).items() for row in rows}
    tiles = _tiles(beside["tile_info"])
    for row, (name, level) in enumerate(_rows(file)):
        if name not in tiles:
            yield LeftOut(name, "not in tile_info")
        elif level not in LEVEL:
            yield LeftOut(name, "level of Sentinel-2 unknown")
        else:
            yield _place(str(file), row, name, LEVEL[level], tiles[name], split_of.get(row, ""))


def _find(root: Path) -> Path:
    if root.suffix == ".h5" and root.is_file():
        return root
    folders = [root, *(path for path in visible(root) if path.is_dir())] if root.is_dir() else []
    files = [path for folder in folders for path in visible(folder) if path.suffix == ".h5"]
    if len(files) > 1:
        raise ArchiveError(f"{root}: several files, {', '.join(path.name for path in files)}; give one's folder")
    if not files:
        raise nothing(str(root), "no .h5", LAYOUT)
    return files[0]


def _rows(file: Path) -> list[tuple[str, str]]:
    """Tile and level by row; the names of the two columns differ between versions."""
    with load_h5py(str(file)).File(file, "r", locking="best-effort") as opened:
        rows = opened["metadata"][:]
    tile, level = rows.dtype.names[:2]
    return [(name.decode(), kind.decode()) for name, kind in zip(rows[tile], rows[level], strict=True)]


def _tiles(path: Path) -> Mapping[str, Tile]:
    """tile_info, of which only what is used is kept: whole, it takes ten gigabytes."""
    with path.open(encoding="utf-8") as file:
        return {name: tile for name, tile in json.load(file, object_hook=_tile).items() if isinstance(tile, Tile)}


def _tile(read: dict[str, Any]) -> Any:
    if "S2_DATE" not in read:
        return read
    bands = read["BANDS"]
    passes = tuple(name for name in PASSES if {"VV", "VH"} <= set(bands.get(f"sentinel1_{name}") or ()))
    return Tile(read["S2_DATE"], read["CRS"], read["lat"], read["lon"], passes)


def _place(path: str, row: int, name: str, sensor: str, tile: Tile, split: str) -> Place:
    time = datetime.strptime(tile.date, "%Y-%m-%d").replace(tzinfo=UTC)
    mask, codes, unknown = MASKS[sensor]
    cloud = CloudMask(Asset(path, item=f"{mask}/{row}", nodata=unknown), codes)
    bands = tuple("" if band == "B10" and sensor == "s2-l2a" else band for band in OPTICAL)
    scenes = [Scene(sensor, (Asset(path, bands, f"sentinel2/{row}"),), time, cloud)]
    # Both passes are near the optical date, their own are not told: one of them stands for Sentinel-1.
    scenes += [Scene("s1", (Asset(path, PASSES[each], f"sentinel1/{row}"),)) for each in tile.passes[:1]]
    scenes.append(Scene("dem", (Asset(path, ("DEM", ""), f"aster/{row}"),)))
    degree = f"{math.floor(tile.lat)},{math.floor(tile.lon)}"
    facts = {"tile_crs": tile.crs, "lat": tile.lat, "lon": tile.lon}
    return Place(name, tuple(scenes), group=degree, split=split, coregistered=True, facts=facts)
