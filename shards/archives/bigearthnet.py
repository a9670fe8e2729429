"""What both versions of BigEarthNet have in common: folders of one patch, with one file per band."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from shards.archives.tree import visible
from shards.scene import Asset, Scene
from shards.sensors import SENSORS

S1 = re.compile(r"S1[AB]_IW_GRDH_1SDV_\d{8}T\d{6}_(?P<tile>\d{2}[A-Z]{3})_\d+_\d+")
_TIME = re.compile(r"_(\d{8})T(\d{5,6})_")


def folders(root: Path, names: re.Pattern[str], depth: int = 3) -> Iterator[Path]:
    """Folders whose names match, at most `depth` levels below `root`, sorted; none lies inside of another."""
    for entry in visible(root):
        if names.fullmatch(entry.name):
            yield entry
        elif depth > 1 and entry.is_dir():
            yield from folders(entry, names, depth - 1)


def scene(sensor: str, folder: Path) -> Scene | str:
    """The scene of a patch folder, or why there is none; B1 is in <folder>_B01.tif and VV in <folder>_VV.tif."""
    bands = SENSORS[sensor].band_names
    paths = {band: f"{folder.name}_{_suffix(band)}.tif" for band in bands}
    try:
        there = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return f"no {sensor} patch"
    if not there.issuperset(paths.values()):
        return f"bands of {sensor} are missing"
    return Scene(sensor, tuple(Asset(str(folder / paths[band]), (band,)) for band in bands), time(folder.name))


def time(name: str) -> datetime:
    """The acquisition time in the name of a patch.

    Names of version 1 lack the leading zero of the hour, and some have seconds beyond 59 (both noted in the pipeline
    that made version 2, https://github.com/kai-tub/bigearthnet-pipeline, which sets the latter to 59, as is done here).
    """
    found = _TIME.search(name)
    if found is None:
        raise ValueError(f"{name}: no time in the name of a patch")
    clock = found[2].zfill(6)
    seconds = min(int(clock[4:]), 59)
    return datetime.strptime(f"{found[1]}{clock[:4]}{seconds:02d}", "%Y%m%d%H%M%S").replace(tzinfo=UTC)


def _suffix(band: str) -> str:
    return f"B{band[1:].zfill(2)}" if band[0] == "B" else band
