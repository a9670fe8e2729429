"""What SSL4EO-S12 v1.1 and TerraMesh share: zarr groups of one modality each, and tars of such groups.

    <split>/<modality>/<shard>.tar      members <key>.zarr.zip; shards of one name hold the same keys

A group has `bands` [time, band, y, x] (TerraMesh: one time), `time` in nanoseconds since 1970 (0 for elevation),
coordinates `band`, `x`, `y` (pixel centres), `crs` (EPSG code) and, with Sentinel-2, `cloud_mask` [time, y, x].

Sources: terramesh.py of ibm-esa-geospatial/TerraMesh; ssl4eos12_dataset.py, zarr_dataset.py and README.md of
DLR-MF-DAS/SSL4EO-S12-v1.1 (it gives the classes of the cloud mask, SEnSeIv2: land 0, water 1, snow 2, thin cloud 3,
thick cloud 4, cloud shadow 5, no data 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.archives.tree import placed, visible
from shards.containers import tar_index
from shards.scene import Asset, CloudMask, LeftOut, Place, Scene, SceneError
from shards.sensors import SENSORS
from shards.zarr_zip import Source, ZarrError, ZarrZip, open_zarr

SENSOR = {"S2L2A": "s2-l2a", "S2L1C": "s2-l1c", "S1RTC": "s1", "S1GRD": "s1", "DEM": "dem"}
CLOUD = (3, 4)
NO_DATA = 6
END = ".zarr.zip"
SECONDS = {
    "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1, "milliseconds": 1e-3, "microseconds": 1e-6,
    "nanoseconds": 1e-9,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What the groups of one modality are like; `dated` when `bands` begins with a dimension of time."""

    sensor: str
    bands: tuple[str, ...]
    dated: bool
    masked: bool


def kind_of(group: ZarrZip, modality: str) -> Kind:
    """Told by one group of a modality.

    Raises:
        ZarrError: it has no `bands`.
    """
    array = group.array("bands")
    sensor = SENSOR[modality]
    dated = len(array.shape) > 3 or array.dims[0] == "time"
    return Kind(sensor, _bands(group, sensor), dated, "cloud_mask" in group)


def _bands(group: ZarrZip, sensor: str) -> tuple[str, ...]:
    """The group's bands as the sensor table calls them ("B01" is B1, "vv" is VV); "" for those that it has not."""
    known = SENSORS[sensor].band_names
    if "band" not in group or len(known) == 1:
        return known
    names = (str(name).upper().replace("B0", "B") for name in group.read("band"))
    return tuple(name if name in known else "" for name in names)


def times(group: ZarrZip, name: str) -> NDArray[np.datetime64]:
    """An array of times as numpy's, in seconds; not-a-time where it holds 0.

    Numbers without a unit are nanoseconds since 1970, others as CF conventions have it ("hours since 2020-01-01").

    Raises:
        ZarrError: no such array, or a unit of time that is not known.
    """
    numbers, units = group.read(name), str(group.array(name).attrs.get("units", ""))
    if numbers.dtype.kind == "M":
        return numbers.astype("datetime64[s]")
    unit, _, since = (units or "nanoseconds since 1970-01-01").partition(" since ")
    if unit not in SECONDS:
        raise ZarrError(f"{name} is in {units!r}; known units are {', '.join(SECONDS)} since a date")
    start = np.datetime64(since.strip().replace(" ", "T").removesuffix("Z"), "s")
    found = start + np.rint(numbers * SECONDS[unit]).astype("int64").astype("timedelta64[s]")
    found[found == np.datetime64(0, "s")] = np.datetime64("NaT")
    return np.asarray(found)


def moment(time: Any) -> datetime | None:
    """A time of numpy's as Python's, in UTC."""
    seconds = np.datetime64(time, "s")
    return None if np.isnat(seconds) else datetime.fromtimestamp(int(seconds.astype(np.int64)), UTC)


@dataclass(frozen=True)
class Told:
    """What a table of metadata says of the groups of one key: their times by satellite ("S1", "S2"), and their sample.

    A sample is named after its place on the ground: 282D_485L_3_3 lies in cell 282D_485L of Major TOM, 0194630_1 is
    one date of place 0194630 of SSL4EO-S12.
    """

    times: Mapping[str, datetime | None]
    sample: str


class Tar:
    """One modality's tar of a shard.

    Raises:
        SceneError: it is no tar.
        ZarrError: it holds no zarr groups.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.modality = path, path.parent.name
        self.members = {
            Path(name).name.removesuffix(END): extent for name, extent in tar_index(path).items() if _is_group(name)
        }
        if not self.members:
            raise ZarrError(f"{path}: no member ends in {END}")
        with self._group(next(iter(self.members))) as group:
            self.kind = kind_of(group, self.modality)

    @contextmanager
    def _group(self, key: str) -> Iterator[ZarrZip]:
        with open_zarr(Source(str(self.path), *self.members[key])) as group:
            yield group

    def item(self, array: str, number: int) -> str:
        """How a date of an array is addressed."""
        return f"{array}/{number}" if self.kind.dated else array

    def asset(self, key: str, item: str, **options: Any) -> Asset:
        """An array of a group as an asset."""
        start, size = self.members[key]
        return Asset(str(self.path), item=f"{key}{END}@{start}+{size}:{item}", **options)

    def dates(self, key: str) -> Sequence[datetime | None]:
        """The times of a group."""
        with self._group(key) as group:
            return [moment(time) for time in times(group, "time").reshape(-1)] if "time" in group else [None]

    def sample(self, key: str) -> str:
        """The sample that a group says it shows; "" where it does not."""
        with self._group(key) as group:
            return str(group.read("sample")) if "sample" in group and not group.array("sample").shape else ""


def _is_group(name: str) -> bool:
    return name.endswith(END) and not Path(name).name.startswith(".")


def tar_places(folder: Path, table: Mapping[str, Mapping[str, Told]]) -> Iterator[Place | LeftOut]:
    """Places of a split that is a folder of modalities, each a folder of tars.

    Args:
        folder: of the split.
        table: by name of tar and key, what is known without opening groups; may be empty.
    """
    yield from unused(folder)
    paths = [path for name in SENSOR if (folder / name).is_dir() for path in visible(folder / name)]
    for shard in sorted({path.name for path in paths if path.name.endswith(".tar")}):
        tars: list[Tar] = []
        for path in (path for path in paths if path.name == shard):
            try:
                tars.append(Tar(path))
            except (SceneError, ZarrError):
                yield LeftOut(f"{folder.name}/{path.parent.name}/{shard}", "no readable tar of zarr groups")
        yield from _shard_places(tars, folder.name, table.get(shard, {}))


def unused(folder: Path) -> Iterator[LeftOut]:
    """The modalities of a split that no sensor of ours stands for."""
    for path in visible(folder):
        if path.is_dir() and path.name not in SENSOR:
            yield LeftOut(f"{folder.name}/{path.name}", "modality not used")


def _shard_places(tars: Sequence[Tar], split: str, table: Mapping[str, Told]) -> Iterator[Place | LeftOut]:
    for key in sorted({key for tar in tars for key in tar.members}):
        there, told = [tar for tar in tars if key in tar.members], table.get(key)
        try:
            sample = told.sample if told else there[0].sample(key)
            dates = [[told.times.get(tar.modality[:2])] if told else tar.dates(key) for tar in there]
        except ZarrError:
            yield LeftOut(f"{split}/{key}", "damaged zarr group")
            continue
        masks = [tar for tar in there if tar.kind.masked]
        scenes = (scene for tar, days in zip(there, dates, strict=True) for scene in _scenes(tar, key, days, masks))
        yield from placed(key, scenes, group=_location(key, sample), split=split)


def _scenes(tar: Tar, key: str, dates: Sequence[datetime | None], masks: Sequence[Tar]) -> Iterator[Scene]:
    """One scene per date. All optical modalities of a key share one cloud mask, which not each needs to hold."""
    kind = tar.kind
    masked = tar if tar in masks else next(iter(masks), None)
    for number, date in enumerate(dates):
        cloud = None
        if kind.sensor.startswith("s2") and masked is not None:
            cloud = CloudMask(masked.asset(key, masked.item("cloud_mask", number), nodata=NO_DATA), CLOUD)
        yield Scene(kind.sensor, (tar.asset(key, tar.item("bands", number), bands=kind.bands),), date, cloud)


def _location(key: str, sample: str) -> str:
    return sample.rsplit("_", 2 if key.startswith("majortom") else 1)[0] or key
