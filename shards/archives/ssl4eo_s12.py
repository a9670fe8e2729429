"""SSL4EO-S12 (version 1): 251,079 places in four seasons, one file per band.

    {s1,s2c,s2a}/0000042/<season>/<band>.tif    s1: VV, VH; s2c: 13 bands (L1C); s2a: 12 (L2A); in native resolution

The folder of a season begins with the date of Sentinel-2 (20200604T054639_...), or is the product's name of Sentinel-1
(S1A_IW_GRDH_1SDV_20200607T010800_...). Numbers of places have gaps.

Source: zhu-xlab/SSL4EO-S12, README and pretrain_ssl/datasets/SSL4EO/ssl4eo_dataset.py; Wang et al. 2023 (IEEE GRSM
11(3):98-106).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from shards.archives import About
from shards.archives.baseline import offset
from shards.archives.tree import base, placed, visible
from shards.archives.walk import nothing
from shards.scene import Asset, LeftOut, Place, Radiometry, Scene
from shards.sensors import SENSORS

ABOUT = About(
    title="SSL4EO-S12 v1",
    licence="CC-BY-4.0",
    attribution="Wang et al. 2023, SSL4EO-S12; contains modified Copernicus Sentinel data 2019-2021",
    source="https://github.com/zhu-xlab/SSL4EO-S12",
    notes={
        "s1": "GRD (ground range, no terrain correction of radiometry), dB, as Earth Engine serves it",
        "s2-l1c": "digital numbers before baseline 04.00, so without its offset of 1000",
        "s2-l2a": "digital numbers before baseline 04.00, so without its offset of 1000",
    },
)

LAYOUT = "{s1,s2c,s2a}/0000042/SEASON/BAND.tif"
# The folders' names inside the archives, and those of the parts on Hugging Face.
FOLDERS = {"s1": "s1", "s1_grd": "s1", "s2c": "s2-l1c", "s2_l1c": "s2-l1c", "s2a": "s2-l2a", "s2_l2a": "s2-l2a"}
DATE = {"s1": r".{16}_(\d{8}T\d{6})", "s2-l1c": r"(\d{8}T\d{6})", "s2-l2a": r"(\d{8}T\d{6})"}
PLACE = r"\d{7}"


def places(root: str) -> Iterator[Place | LeftOut]:
    """Places by number, each with up to four scenes per sensor.

    Args:
        root: the folder that holds s1, s2c or s2a.

    Raises:
        ArchiveError: none of these folders, or no place in them.
    """
    top = base(root, FOLDERS, LAYOUT)
    folders = [top / name for name in FOLDERS if (top / name).is_dir()]
    found = {path.name for folder in folders for path in visible(folder)}
    numbers = sorted(name for name in found if re.fullmatch(PLACE, name))
    if not numbers:
        raise nothing(str(top), "no folder of seven digits", LAYOUT)
    yield from (LeftOut(name, "not the number of a place") for name in sorted(found - set(numbers)))
    for number in numbers:
        seasons = [(path, FOLDERS[folder.name]) for folder in folders for path in _below(folder / number)]
        yield from placed(number, (_scene(season, sensor) for season, sensor in seasons), group=number)


def _below(folder: Path) -> list[Path]:
    return visible(folder) if folder.is_dir() else []


def _scene(season: Path, sensor: str) -> Scene | LeftOut:
    name = "/".join(season.parts[-3:])
    date = re.match(DATE[sensor], season.name)
    if date is None:
        return LeftOut(name, "no date in the folder's name")
    time = datetime.strptime(date[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    bands = SENSORS[sensor].band_names
    there = {path.name for path in season.iterdir()}
    if any(f"{band}.tif" not in there for band in bands):
        return LeftOut(name, "bands are missing")
    numbers = Radiometry() if sensor == "s1" else Radiometry(offset=offset(season.name, time))
    return Scene(sensor, tuple(Asset(str(season / f"{band}.tif"), (band,), "", numbers) for band in bands), time)
