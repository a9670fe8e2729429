"""Scene: one acquisition of one sensor. Place: the scenes, and perhaps a label, of one spot on the ground."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import rasterio
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from shards.grid import Grid
from shards.store import gdal_options

LABEL = "label"


class SceneError(ValueError):
    """A file cannot be used; the message names it and says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[SceneError], tuple[str, str]]:
        """Survives the way back from a worker process."""
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Asset:
    """One raster file and the bands of the sensor that it holds, in the file's order; empty means all of them."""

    path: str
    bands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One acquisition of one sensor (or the label), in one file or one file per band."""

    sensor: str
    assets: tuple[Asset, ...]
    time: datetime | None = None

    @property
    def path(self) -> str:
        """The first file, for messages and identifiers."""
        return self.assets[0].path


@dataclass(frozen=True)
class Place:
    """The scenes of one spot. `group` (city, strip, region) and `split` say which samples must stay together."""

    name: str
    scenes: tuple[Scene, ...]
    group: str = ""
    split: str = ""

    def of(self, sensor: str) -> list[Scene]:
        """The scenes of one sensor, oldest first."""
        found = [scene for scene in self.scenes if scene.sensor == sensor]
        return sorted(found, key=lambda scene: (scene.time or datetime.min, scene.path))

    def views(self, sensors: tuple[str, ...], max_days: float | None) -> Iterator[Place]:
        """One place per acquisition of the reference sensor (the first), with the nearest scene of each other.

        Args:
            sensors: those wanted; the label comes along when there is one.
            max_days: a scene further away in time than this does not count; None for no limit. Scenes without a time
                (elevation) fit any.

        Raises:
            SceneError: a sensor has no scene near enough.
        """
        for reference in self.of(sensors[0]):
            chosen = [reference]
            for sensor in (*sensors[1:], LABEL):
                near = [scene for scene in self.of(sensor) if _days(scene, reference) <= (max_days or float("inf"))]
                if near:
                    chosen.append(min(near, key=lambda scene: _days(scene, reference)))
                elif sensor != LABEL:
                    limit = "" if max_days is None else f" within {max_days:g} days"
                    raise SceneError(reference.path, f"place {self.name} has no {sensor} scene{limit}")
            yield replace(self, scenes=tuple(chosen))


def _days(a: Scene, b: Scene) -> float:
    if a.time is None or b.time is None:
        return 0.0
    return abs(a.time - b.time) / timedelta(days=1)


@contextmanager
def open_raster(path: str) -> Iterator[DatasetReader]:
    """A raster file or s3:// object, open for reading.

    Raises:
        SceneError: it is missing, truncated or not a raster.
    """
    address = path.replace("s3://", "/vsis3/", 1)
    try:
        with rasterio.Env(**gdal_options(path)), rasterio.open(address) as raster:
            yield raster
    except RasterioError as error:
        raise SceneError(path, f"not readable: {error}") from error


def grid_of(raster: DatasetReader) -> Grid:
    """The grid of an open raster.

    Raises:
        SceneError: it has no CRS.
    """
    if raster.crs is None:
        raise SceneError(
            raster.name, "has no CRS; give the file its georeference (gdal_edit -a_srs, or gdalwarp for GCPs)"
        )
    code = raster.crs.to_epsg()
    crs = f"EPSG:{code}" if code else raster.crs.to_wkt()
    return Grid(tuple(raster.transform)[:6], raster.height, raster.width, crs)
