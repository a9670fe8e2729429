"""Plausible: numbers that are surely not in the unit they are said to be in, found before they are written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shards.sample import Tile
from shards.sensors import SENSORS, Sensor

EVERY = 5  # a pixel in each direction is enough to know a unit
BLACK = 0.2  # share of pixels that an offset taken off twice pushes to 0 in all bands


@dataclass
class Looks:
    """What has been seen of one scene so far."""

    sensor: str
    low: float = np.inf
    high: float = -np.inf
    valid: int = 0
    black: int = field(default=0)

    def add(self, tile: Tile) -> None:
        """Look at some of the valid pixels of a tile."""
        valid = tile.valid[::EVERY, ::EVERY]
        if not valid.any():
            return
        values = tile.values[:, ::EVERY, ::EVERY][:, valid]
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.valid += values.shape[1]
        self.black += int((values == 0).all(axis=0).sum())

    def suspicion(self) -> str:
        """Why these numbers cannot be what they are said to be; empty when they can."""
        row = SENSORS[self.sensor]
        if self.valid == 0:
            return ""
        if _is_decibel(row) and self.low >= 0:
            return (
                f"all values lie between {self.low:.4g} and {self.high:.4g}, as backscatter on a linear scale does; "
                "say so (quantity=power or quantity=amplitude in the catalog), and dB are made of it"
            )
        if row.kind == "optical" and row.clip[1] >= 1000 and self.high <= 2:
            return (
                f"no value exceeds {self.high:.4g}, as reflectance from 0 to 1 does; {row.name} is {row.unit}: "
                "write scale=10000 in the catalog"
            )
        if row.unit.startswith("reflectance") and self.black > BLACK * self.valid:
            return (
                f"{self.black / self.valid:.0%} of the pixels are black in every band once the offset is taken off: "
                "it was taken off before; write offset=0 in the catalog"
            )
        return ""


def _is_decibel(row: Sensor) -> bool:
    return row.unit == "dB" and row.clip[1] <= 0
