"""The table of sensors: what a band is called, what its numbers mean and how they are resampled.

A new sensor is a row of `SENSORS`, never a branch in the code. Standard library only.

Sources: Sentinel-2 band names and resolutions, ESA Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD),
sections 3 and 4; Sentinel-1 polarisations, ESA Sentinel-1 Product Specification (S1-RS-MDA-52-7441); value ranges of
S2 (0..10000) and S1 (-25..0 dB), Liu et al. 2025 (JAG 145:104960), experiments on DFC2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["optical", "sar", "elevation"]
Resampling = Literal["nearest", "bilinear", "cubic", "average"]


class SensorError(ValueError):
    """A name that stands for no sensor, or for several; the message lists those that exist."""


@dataclass(frozen=True)
class Band:
    """One band: its name and the ground sampling distance of the instrument in metres."""

    name: str
    resolution: float


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """One row of the table.

    `clip` is the range of useful values in `unit`; `nodata` is the value that the sensor's products use for "nothing
    measured here" even where a file carries no tag (None: only tags, masks and NaN count); `possible` is
    the range beyond which a number is no measurement but an undeclared nodata value (-9999, -32768, infinity); `rgb`
    names the bands of a true or conventional colour picture.
    """

    name: str
    kind: Kind
    bands: tuple[Band, ...]
    unit: str
    clip: tuple[float, float]
    resampling: Resampling = "bilinear"
    nodata: float | None = None
    possible: tuple[float, float] | None = None
    rgb: tuple[str, ...] = ()

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of the bands in the order in which samples store them."""
        return tuple(band.name for band in self.bands)


_S2 = (
    Band("B1", 60.0), Band("B2", 10.0), Band("B3", 10.0), Band("B4", 10.0), Band("B5", 20.0), Band("B6", 20.0),
    Band("B7", 20.0), Band("B8", 10.0), Band("B8A", 20.0), Band("B9", 60.0), Band("B10", 60.0), Band("B11", 20.0),
    Band("B12", 20.0),
)  # fmt: skip
_S1 = (Band("VV", 10.0), Band("VH", 10.0))
_REFLECTANCE = "reflectance x 10000"

SENSORS: Mapping[str, Sensor] = MappingProxyType(
    {
        sensor.name: sensor
        for sensor in (
            Sensor(
                name="s1", kind="sar", bands=_S1, unit="dB", clip=(-25.0, 0.0), possible=(-100.0, 60.0),
                rgb=("VV", "VH"),
            ),
            Sensor(
                name="s2-l1c", kind="optical", bands=_S2, unit=_REFLECTANCE, clip=(0.0, 10000.0), nodata=0.0,
                rgb=("B4", "B3", "B2"),
            ),
            Sensor(
                name="s2-l2a", kind="optical", bands=tuple(band for band in _S2 if band.name != "B10"),
                unit=_REFLECTANCE, clip=(0.0, 10000.0), nodata=0.0, rgb=("B4", "B3", "B2"),
            ),
            Sensor(
                name="dem", kind="elevation", bands=(Band("DEM", 30.0),), unit="m", clip=(-500.0, 9000.0),
                possible=(-9900.0, 9000.0),
            ),
            Sensor(
                name="sar-quadpol", kind="sar", bands=tuple(Band(name, 0.5) for name in ("HH", "HV", "VH", "VV")),
                unit="dB", clip=(-30.0, 50.0), nodata=0.0, possible=(-200.0, 200.0), rgb=("HH", "HV", "VV"),
            ),
            Sensor(
                name="rgbnir", kind="optical", bands=tuple(Band(name, 0.5) for name in ("R", "G", "B", "NIR")),
                unit="digital number", clip=(0.0, 2047.0), nodata=0.0, rgb=("R", "G", "B"),
            ),
        )
    }
)  # fmt: skip


def match(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` stands for: itself, or the only one that begins with it (`s2` for `s2-l1c`).

    Raises:
        SensorError: none or several fit.
    """
    names = list(known)
    found = [name] if name in names else [other for other in names if other.split("-")[0] == name]
    if len(found) != 1:
        raise SensorError(f"{name!r} fits {len(found)} of the sensors {', '.join(names)}; write one of these names")
    return found[0]
