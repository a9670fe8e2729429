"""Footprints of squares, for the tests of what is decided by geography."""

from __future__ import annotations

import numpy as np
import shapely

from shards.ground import cut
from shards.raster_io import transform_points


def ring(crs: str, x: float, y: float, side: float) -> shapely.Geometry:
    """The square from (x, y) up and to the right, 8 points a side, as a polygon in degrees."""
    along = np.linspace(0, 1, 9)[:-1] * side
    still = np.zeros(8)
    xs = x + np.concatenate([along, still + side, side - along, still, [0]])
    ys = y + np.concatenate([still, along, still + side, side - along, [0]])
    return cut(*transform_points(crs, "OGC:CRS84", xs, ys))
