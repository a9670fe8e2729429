"""Scene: one acquisition of one sensor. Place: the scenes, and perhaps a label, of one spot on the ground.

Plain values: they say where files are and what their numbers mean, and open nothing. Archives make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

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
class Radiometry:
    """What a file's numbers mean: `number * scale + offset` is the value in the sensor's unit.

    Where `quantity` is power or amplitude, that value is backscatter on a linear scale and the sensor's unit is dB, so
    10 log10 (of power) or 20 log10 (of amplitude) of it is taken after resampling.
    """

    scale: float = 1.0
    offset: float = 0.0
    quantity: Literal["value", "power", "amplitude"] = "value"


@dataclass(frozen=True)
class Asset:
    """One raster: a file, or a part of one.

    Args:
        path: local file or s3:// address (GeoTIFF, JPEG 2000 and all else that GDAL opens), or a container (.zarr.zip,
            .h5, .parquet, .tar); for a label also GeoJSON.
        bands: the sensor's bands that it holds, in its own order; empty means "as described in the file, or all".
        item: which part of a container (`containers.py` says how each kind is addressed); empty for plain files.
        radiometry: what the numbers mean.
        nodata: the number that means "nothing measured", instead of what the file says.
    """

    path: str
    bands: tuple[str, ...] = ()
    item: str = ""
    radiometry: Radiometry = Radiometry()
    nodata: float | None = None


@dataclass(frozen=True)
class CloudMask:
    """The product's own mask of an optical scene: one band, and the codes in it that mean cloud (empty: all but 0)."""

    asset: Asset
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One acquisition of one sensor (or the label), in one file or one file per band."""

    sensor: str
    assets: tuple[Asset, ...]
    time: datetime | None = None
    cloud: CloudMask | None = None

    @property
    def path(self) -> str:
        """The first file, for messages and identifiers."""
        return self.assets[0].path


@dataclass(frozen=True)
class LeftOut:
    """Something in an archive that makes no sample, and why; the build counts these and names them."""

    name: str
    reason: str


@dataclass(frozen=True)
class Place:
    """The scenes of one spot.

    Args:
        name: unique in the archive; becomes the beginning of the samples' keys.
        scenes: of any sensors, in any number; the label is one of them.
        group: city, strip, region: what must stay together when a dataset is split.
        split: the archive's own split, "" when it has none.
        coregistered: the archive promises that files of equal size show the same ground, so that files without CRS
            can be used.
        facts: what else is known, in JSON's types; it is written into the samples.
    """

    name: str
    scenes: tuple[Scene, ...]
    group: str = ""
    split: str = ""
    coregistered: bool = False
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        """Survives the way to a worker process (a mapping proxy does not by itself)."""
        return type(self), (self.name, self.scenes, self.group, self.split, self.coregistered, dict(self.facts))

    def of(self, sensor: str) -> list[Scene]:
        """The scenes of one sensor, oldest first."""
        found = [scene for scene in self.scenes if scene.sensor == sensor]
        return sorted(found, key=lambda scene: (scene.time.timestamp() if scene.time else 0.0, scene.path))

    def views(self, sensors: tuple[str, ...], max_days: float | None) -> Iterator[Place | LeftOut]:
        """One place per acquisition of the reference sensor (the first), with the nearest scene of each other.

        Args:
            sensors: those wanted; the label comes along when there is one.
            max_days: a scene further away in time than this does not count; None for no limit. Scenes without a time
                (elevation) fit any.
        """
        if not self.of(sensors[0]):
            yield LeftOut(self.name, f"no {sensors[0]} scene")
        for reference in self.of(sensors[0]):
            chosen, missing = [reference], []
            for sensor in (*sensors[1:], LABEL):
                near = [scene for scene in self.of(sensor) if _days(scene, reference) <= _limit(max_days)]
                if near:
                    chosen.append(min(near, key=lambda scene: _days(scene, reference)))
                elif sensor != LABEL:
                    missing.append(sensor)
            within = "" if max_days is None else f" within {max_days:g} days"
            if missing:
                yield LeftOut(self.name, f"no {', '.join(missing)} scene{within}")
            else:
                yield replace(self, scenes=tuple(chosen))


def _limit(max_days: float | None) -> float:
    return float("inf") if max_days is None else max_days


def _days(a: Scene, b: Scene) -> float:
    if a.time is None or b.time is None:
        return 0.0
    return abs(a.time - b.time) / timedelta(days=1)
