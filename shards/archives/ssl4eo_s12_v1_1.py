"""SSL4EO-S12 v1.1: 246,144 places in four seasons. As zarr zips of 64 places, or (since 2026) as tars of zarr groups.

    {train,val}/{S1GRD,S2L1C,S2L2A,...}/ssl4eos12_train_seasonal_data_000001.zarr.zip
    {train,val}/{S1GRD,S2L1C,S2L2A,DEM,...}/ssl4eos12_shard_000001.tar

A zip holds `bands` (sample, time, band, y, x), `sample` (number of the place), `time_` (sample, time), `crs` (sample),
`x_` (sample, x), `y_` (sample, y), and `cloud_mask` (sample, time, y, x) with Sentinel-2. Zips of one name hold the
same places. The tars are as zarr_groups.py says, with four times.

Sources: README.md, zarr_dataset.py and ssl4eos12_dataset.py of DLR-MF-DAS/SSL4EO-S12-v1.1; Blumenstiel et al. 2025
(arXiv:2503.00168).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from shards.archives import About
from shards.archives.tree import base, placed, visible
from shards.archives.walk import nothing
from shards.archives.zarr_groups import (
    CLOUD,
    END,
    NO_DATA,
    SENSOR,
    Kind,
    kind_of,
    moment,
    tar_places,
    times,
    unused,
)
from shards.scene import Asset, CloudMask, LeftOut, Place, Radiometry, Scene
from shards.zarr_zip import Source, ZarrError, open_zarr

ABOUT = About(
    title="SSL4EO-S12 v1.1",
    licence="CC-BY-4.0",
    attribution="Blumenstiel et al. 2025, SSL4EO-S12 v1.1; contains modified Copernicus Sentinel data 2019-2021",
    source="https://github.com/DLR-MF-DAS/SSL4EO-S12-v1.1",
    notes={
        "s1": "GRD (ground range, no terrain correction of radiometry), dB as half floats",
        "s2-l1c": "the zips hold reflectance x 10000 + 1000 whatever the date, the tars without the 1000",
        "s2-l2a": "the zips hold reflectance x 10000 + 1000 whatever the date, the tars without the 1000",
        "dem": "in the tars only: Copernicus DEM GLO-30, metres above EGM2008",
    },
    broken={
        "*/S1GRD/*": "loaded before 2026-02-19, it is not sorted by date (README, News; issue 4): load it again",
    },
)

LAYOUT = """\
{train,val}/{S1GRD,S2L1C,S2L2A}/ssl4eos12_train_seasonal_data_000001.zarr.zip
or {train,val}/{S1GRD,S2L1C,S2L2A,DEM}/ssl4eos12_shard_000001.tar"""
SPLITS = ("train", "val")
# zarr_dataset.py: its statistics include +1000, added to all dates to agree with ESA's newest processing.
SHIFTED = Radiometry(offset=-1000.0)


def places(root: str) -> Iterator[Place | LeftOut]:
    """Places in the order of splits and files, each with up to four scenes per sensor.

    Args:
        root: the folder that holds train or val.

    Raises:
        ArchiveError: neither, or no file in them.
    """
    top, empty = base(root, SPLITS, LAYOUT), True
    for split in (top / name for name in SPLITS if (top / name).is_dir()):
        tars = any(True for name in SENSOR for _ in (split / name).glob("*.tar"))
        for place in tar_places(split, {}) if tars else _zip_places(split):
            empty = empty and isinstance(place, LeftOut)
            yield place
    if empty:
        raise nothing(str(top), f"no {END} and no .tar", LAYOUT)


@dataclass(frozen=True)
class _Zip:
    """One modality's zip: its places, by number, with their positions and dates."""

    path: Path
    kind: Kind
    dates: Mapping[str, tuple[int, list[datetime | None]]]


def _zip_places(folder: Path) -> Iterator[Place | LeftOut]:
    yield from unused(folder)
    paths = [path for name in SENSOR if (folder / name).is_dir() for path in visible(folder / name)]
    for file in sorted({path.name for path in paths if path.name.endswith(END)}):
        zips: list[_Zip] = []
        for path in (path for path in paths if path.name == file):
            try:
                zips.append(_open(path))
            except ZarrError:
                yield LeftOut(f"{folder.name}/{path.parent.name}/{file}", "no readable zarr group")
        for number in sorted({number for zipped in zips for number in zipped.dates}):
            scenes = (scene for zipped in zips if number in zipped.dates for scene in _scenes(zipped, number))
            yield from placed(number, scenes, group=number, split=folder.name)


def _open(path: Path) -> _Zip:
    with open_zarr(Source(str(path))) as group:
        numbers, dates = group.read("sample").tolist(), times(group, "time_")
        found = {str(n): (i, [moment(time) for time in dates[i]]) for i, n in enumerate(numbers)}
        return _Zip(path, kind_of(group, path.parent.name), found)


def _scenes(zipped: _Zip, number: str) -> Iterator[Scene]:
    position, dates = zipped.dates[number]
    kind, path = zipped.kind, str(zipped.path)
    radiometry = SHIFTED if kind.sensor.startswith("s2") else Radiometry()
    for season, date in enumerate(dates):
        at = f"{position}/{season}"
        mask = CloudMask(Asset(path, item=f"cloud_mask/{at}", nodata=NO_DATA), CLOUD) if kind.masked else None
        yield Scene(kind.sensor, (Asset(path, kind.bands, f"bands/{at}", radiometry),), date, mask)
