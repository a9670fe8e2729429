"""Sentinel-1 backscatter that is calibrated and lies on a map grid: GeoTIFFs with VV and VH, in one file or in two.

What the numbers are is told by the bands' names and the names of files and folders, as their makers write them:

- SNAP: `Sigma0_VV`, `Gamma0_VH` on a linear scale, `Sigma0_VV_db` in dB (also inside the file, see `snap`);
- ASF HyP3 RTC: `S1A_IW_20181102T155531_DVP_RTC30_G_gpuned_5685_VV.tif`, where the second letter of `gpuned` is p for
  power, d for decibel, a for amplitude (HyP3 RTC product guide, naming convention);
- Planetary Computer's sentinel-1-rtc: `.../S1A_IW_GRDH_.../measurement/iw-vv.rtc.tiff`, linear gamma0;
- OPERA RTC-S1: `OPERA_L2_RTC-S1_..._VV.tif`, gamma0 power;
- pyroSAR: `S1A__IW___A_20210723T155034_VH_gamma0-rtc_db.tif`, linear without `_db`;
- anything else with dB, decibel, power, linear or amplitude as a word of its name.

Level-1 products as downloaded are refused: their numbers are not calibrated and they have no map grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from shards.archives import snap
from shards.grid import Grid
from shards.raster import open_raster
from shards.raster_io import footprint
from shards.scene import Asset, LeftOut, Radiometry, Scene, SceneError
from shards.sensors import SENSORS

Quantity = Literal["value", "power", "amplitude"]
STEPS = (
    "Sentinel-1 as downloaded, neither calibrated nor on a map grid: first remove thermal noise, calibrate to sigma0 "
    "or gamma0 and correct for terrain (with SNAP, pyroSAR or OpenSARToolkit, or order RTC products from ASF HyP3)"
)
UNTOLD = (
    "Sentinel-1 whose name does not say whether it is linear or in dB: list it in a catalog (archive.name=catalog) "
    "with quantity=power, amplitude or dB"
)
UNDATED = "Sentinel-1 without a date in its name: list it in a catalog (archive.name=catalog) with its time"
UNNAMED = "Sentinel-1 whose bands have no names: list it in a catalog (archive.name=catalog), one band per file"
INTEGERS = (
    "Sentinel-1 stored as integers, so not calibrated or scaled: calibrate it, or list it in a catalog "
    "(archive.name=catalog) with scale, offset and quantity"
)
PARTIAL = "Sentinel-1 without both VV and VH"
OTHER = "no VV or VH in its name, so not taken for Sentinel-1"

NAME_LENGTH = 64  # of a place; with sensor and window it has to fit the 100 characters that a tar has for a name

# Names of Level-1 and Level-0 products, and of the images inside them.
RAW_PRODUCT = re.compile(r"(?i)S1[A-D]_\w\w_(GRD|SLC|RAW|OCN)[FHM_]_\w+\.SAFE")
RAW_IMAGE = re.compile(r"(?i)s1[a-d]-\w{2,3}-(grd|slc)-(vv|vh|hh|hv)-.*\.tiff?")
_POLARISATION = re.compile(r"(?i)(?<![a-z])(vv|vh|hh|hv)(?![a-z])")
_UNCALIBRATED = re.compile(r"(?i)(?<![a-z])((amplitude|intensity)_[vh][vh]|beta0)(?![a-z0-9])")  # bands of SNAP
_QUANTITIES: tuple[tuple[re.Pattern[str], Quantity], ...] = (
    (re.compile(r"_RTC\d\d_G_[gs]p[uw]"), "power"),
    (re.compile(r"_RTC\d\d_G_[gs]d[uw]"), "value"),
    (re.compile(r"_RTC\d\d_G_[gs]a[uw]"), "amplitude"),
    (re.compile(r"(?i)(?<![a-z])(db|decibels?)(?![a-z])"), "value"),
    (re.compile(r"(?i)(?<![a-z])amplitude(?![a-z])"), "amplitude"),
    (re.compile(r"(?i)(?<![a-z])(power|linear)(?![a-z])"), "power"),
    (re.compile(r"(?<![a-z])(Sigma0|Gamma0)_(VV|VH)"), "power"),
    (re.compile(r"iw-v[vh]\.rtc\.tiff?$"), "power"),
    (re.compile(r"OPERA_L2_RTC-S1_"), "power"),
    (re.compile(r"^S1[A-D]_+\w\w_+[AD]_\d{8}T\d{6}_.*(gamma0|sigma0)-"), "power"),
)


@dataclass(frozen=True)
class Radar:
    """One acquisition: `name` is its product's, `area` its ground in OGC:CRS84, `kind` what its numbers are."""

    name: str
    scene: Scene
    area: BaseGeometry
    kind: str


def quantity(names: Sequence[str]) -> Quantity | None:
    """What the first of some names that tells says of the numbers; `value` is dB, None when none tells."""
    for name in names:
        for pattern, found in _QUANTITIES:
            if pattern.search(name):
                return found
    return None


def radars(root: Path, files: Sequence[Path]) -> Iterator[Radar | LeftOut]:
    """Acquisitions among GeoTIFFs below `root`, and the files that are none, in the files' order.

    Two files belong together when their paths differ in VV and VH alone.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_POLARISATION.sub("*", file.relative_to(root).as_posix()), []).append(file)
    for members in groups.values():
        name = members[0].relative_to(root).as_posix()
        try:
            yield _radar(name, [_image(root, file) for file in members])
        except _Unusable as error:
            yield from (LeftOut(file.relative_to(root).as_posix(), error.reason) for file in members)


class _Unusable(ValueError):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Image:
    """A file: names of its bands (or of the file), which of them are VV and VH, and its ground."""

    path: Path
    names: tuple[str, ...]
    bands: tuple[str, ...]
    grid: Grid
    nodata: float | None


def _image(root: Path, path: Path) -> _Image:
    if RAW_IMAGE.fullmatch(path.name):
        raise _Unusable(STEPS)
    try:
        with open_raster(Asset(str(path))) as raster:
            described, grid, dtype, nodata = raster.names, raster.grid, raster.dtype, raster.nodata
    except SceneError as error:
        if not _POLARISATION.search(path.name):
            raise _Unusable(OTHER) from None
        raise _Unusable(STEPS if "ground control points" in error.reason else error.reason) from None
    names = described if any(_POLARISATION.search(name) for name in described) else snap.band_names(path)
    bands = _bands(path, names, len(described))
    if any(_UNCALIBRATED.search(name) for name in (*names, path.name)):
        raise _Unusable(STEPS)
    return _checked(_Image(path, tuple(names), bands, grid, nodata), dtype)


def _checked(image: _Image, dtype: np.dtype[Any]) -> _Image:
    if not any(image.bands):
        raise _Unusable(PARTIAL)
    if dtype.kind != "f":
        raise _Unusable(INTEGERS)
    if image.grid.crs is None:
        raise _Unusable(
            "Sentinel-1 without CRS: give the file its georeference (gdal_edit -a_srs EPSG:... -a_ullr ...)"
        )
    return image


def _bands(path: Path, names: Sequence[str], count: int) -> tuple[str, ...]:
    """VV, VH or "" for each band."""
    if len(names) == count:
        told = [match[1].upper() if (match := _POLARISATION.search(name)) else "" for name in names]
    else:
        told = [text.upper() for text in _POLARISATION.findall(path.name)]
        if not told:
            raise _Unusable(OTHER)
        if len(told) != count:
            raise _Unusable(UNNAMED)
    return tuple(name if name in SENSORS["s1"].band_names else "" for name in told)


def _radar(name: str, images: Sequence[_Image]) -> Radar:
    found = [band for image in images for band in image.bands if band]
    if sorted(found) != sorted(SENSORS["s1"].band_names):
        raise _Unusable(PARTIAL if len(found) < 2 else UNNAMED)
    folders = list(reversed(PurePosixPath(name).parent.parts))
    told = [quantity([*image.names, image.path.name, *folders[:1]]) for image in images]
    if None in told or len(set(told)) > 1:
        raise _Unusable(UNTOLD)
    meant: Quantity = told[0] or "value"
    assets = tuple(_asset(image, meant) for image in images)
    area = shape(footprint(images[0].grid.crs or "", images[0].grid.corners()))
    scene = Scene("s1", assets, _time([PurePosixPath(name).name, *folders]))
    unit = {"value": "dB", "power": "linear power", "amplitude": "linear amplitude"}[meant]
    return Radar(_product(name), scene, area, f"{_calibration([*images[0].names, name])}, from {unit}")


def _asset(image: _Image, meant: Quantity) -> Asset:
    # SNAP and GAMMA write 0 outside the swath, and SNAP does not declare it; no measurement is exactly 0.
    nodata = 0.0 if image.nodata is None else None
    return Asset(str(image.path), image.bands, radiometry=Radiometry(quantity=meant), nodata=nodata)


def _calibration(names: Sequence[str]) -> str:
    text = " ".join(names).lower()
    letter = re.search(r"_rtc\d\d_g_([gs])[pda]", text)
    if letter:
        return {"g": "gamma0", "s": "sigma0"}[letter[1]]
    return next(
        (name for name in ("gamma0", "sigma0") if name in text), "gamma0" if "rtc" in text else "calibration unsaid"
    )


def _time(names: Sequence[str]) -> datetime:
    """The first time, or else the first day, that the names of a file and its folders hold."""
    for pattern in (r"(?<!\d)(20\d{6}T\d{6})(?!\d)", r"(?<!\d)(20\d{6})(?!\d)"):
        for name in names:
            for text in re.findall(pattern, name):
                try:
                    return datetime.fromisoformat(text).replace(tzinfo=UTC)
                except ValueError:
                    continue
    raise _Unusable(UNDATED)


def _product(name: str) -> str:
    """What to call a product by its first file: the file or the nearest folder that is named after a day."""
    path = PurePosixPath(name).with_suffix("")
    own = _POLARISATION.sub("", path.name).strip("_-. ")
    named = (text for text in (own, *reversed(path.parent.parts)) if re.search(r"(?<!\d)20\d{6}(?!\d)", text))
    return next(named, own)[:NAME_LENGTH]
