"""Rows, one per file, put together to places: what the layouts `catalog`, `folder` and `stac` have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from shards.archives import ArchiveError
from shards.archives.baseline import offset
from shards.scene import LABEL, Asset, CloudMask, Place, Radiometry, Scene
from shards.sensors import SENSORS

# Bands that are masks, and their codes for cloud. SCL (Sentinel-2 Level-2A): 8 and 9 are cloud of medium and high
# probability, 10 is thin cirrus; cloud shadow (3) does not count, as the ground is seen there. QA60 (Earth Engine): bit
# 10 is opaque cloud, bit 11 cirrus. CLOUD: anything but 0.
MASKS: dict[str, tuple[int, ...]] = {"SCL": (8, 9, 10), "QA60": (1024, 2048, 3072), "CLOUD": ()}


@dataclass(frozen=True)
class Row:
    """One file of one scene. An asset whose only band is one of MASKS is the cloud mask of its scene."""

    place: str
    sensor: str
    asset: Asset
    time: datetime | None = None
    group: str = ""
    split: str = ""


def assemble(rows: Iterable[Row]) -> Iterator[Place]:
    """Places in the order in which the rows first name them; rows of one place, sensor and time are one scene.

    Raises:
        ArchiveError: a cloud mask without its image, or two files of one band or mask for one scene.
    """
    by_place: dict[str, list[Row]] = {}
    for row in rows:
        by_place.setdefault(row.place, []).append(row)
    for name, members in by_place.items():
        group = next((row.group for row in members if row.group), name)
        split = next((row.split for row in members if row.split), "")
        yield Place(name, tuple(_scenes(name, members)), group=group, split=split)


def _scenes(place: str, rows: list[Row]) -> Iterator[Scene]:
    images: dict[tuple[str, datetime | None], list[Asset]] = {}
    masks: dict[tuple[str, datetime | None], CloudMask] = {}
    for row in rows:
        key = (row.sensor, row.time)
        if row.asset.bands and row.asset.bands[0] in MASKS:
            if key in masks:
                raise ArchiveError(f"place {place}: two cloud masks for {_called(*key)}; leave one out")
            masks[key] = CloudMask(replace(row.asset, bands=(), radiometry=Radiometry()), MASKS[row.asset.bands[0]])
        else:
            images.setdefault(key, []).append(row.asset)
    for (sensor, time), assets in images.items():
        names = [band for asset in assets for band in asset.bands if band]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ArchiveError(f"place {place}: several files of {', '.join(twice)} for {_called(sensor, time)}")
    if lonely := [key for key in masks if key not in images]:
        raise ArchiveError(
            f"place {place}: a cloud mask but no image for {_called(*lonely[0])}; "
            "a mask needs the place, sensor and time of its image"
        )
    for (sensor, time), assets in images.items():
        yield Scene(sensor, tuple(assets), time, masks.get((sensor, time)))


def _called(sensor: str, time: datetime | None) -> str:
    return f"{sensor} of {time.isoformat() if time else 'no time'}"


def band_name(sensor: str, text: str) -> str:
    """A band or mask as the sensor table writes it, for `B02`, `b2` or `vv`; "" when the sensor has no such band."""
    if sensor == LABEL:
        return ""
    known = {name.upper(): name for name in (*SENSORS[sensor].band_names, *mask_names(sensor))}
    return known.get(re.sub(r"^B0(?=\d)", "B", text.upper()), "")


def mask_names(sensor: str) -> tuple[str, ...]:
    """The cloud masks that scenes of this sensor may have."""
    return tuple(MASKS) if sensor in SENSORS and SENSORS[sensor].kind == "optical" else ()


def radiometry(sensor: str, name: str, time: datetime | None) -> Radiometry:
    """What a file's numbers mean when nobody says: the sensor's unit, less the offset of Sentinel-2's newer baselines.

    Args:
        sensor: a name of the sensor table, or `label`.
        name: of the file, with its folders; may hold the product's name.
        time: of the acquisition.
    """
    return Radiometry(offset=offset(name, time)) if sensor.startswith("s2-") else Radiometry()


def address(href: str, base: Path) -> str:
    """A path or address that can be opened, for one that may be relative to the folder `base`.

    Files behind http(s) are read in place through GDAL (/vsicurl/).

    Raises:
        ArchiveError: a scheme that cannot be read, or a signed address, which would expire during a build and whose
            signature would be written into the dataset.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", href)
    if scheme is None:
        return href if href.startswith("/vsi") else str(base / href)
    if scheme[1] == "s3":
        return href
    if scheme[1] == "file":
        return href.removeprefix("file://")
    if scheme[1] not in ("http", "https"):
        raise ArchiveError(f"{href}: write a path, or an address that begins with s3://, https:// or http://")
    if "?" in href or "@" in href.split("/")[2]:
        raise ArchiveError(f"{href.split('?')[0].split('@')[-1]}: a signed address; download such files first")
    return f"/vsicurl/{href}"
