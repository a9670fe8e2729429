from __future__ import annotations

import numpy as np
import pytest
import shapely

from shards.ground import Footprints, cut
from shards.raster_io import transform_points
from tests.footprints import ring


@pytest.mark.parametrize(
    ("crs", "x", "y", "side", "kind"),
    [
        ("EPSG:32633", 500_000, 5_000_000, 20_000, "Polygon"),
        ("EPSG:32660", 726_000, 5_000_000, 20_000, "MultiPolygon"),
        ("EPSG:32701", 166_000, 6_000_000, 20_000, "Polygon"),
        ("EPSG:32701", 160_000, 8_000_000, 40_000, "MultiPolygon"),
        # A corner or an edge that lies on the line itself.
        ("+proj=aeqd +lat_0=40 +lon_0=180", 0, 0, 1000, "Polygon"),
        ("+proj=aeqd +lat_0=40 +lon_0=180", -470, 0, 1000, "MultiPolygon"),
        ("EPSG:4326", 179, 10, 1, "Polygon"),
        ("EPSG:4326", 179.5, 10, 1, "MultiPolygon"),
        ("EPSG:4326", 180, 10, 1, "Polygon"),
        ("EPSG:4326", -180.25, 10, 1, "MultiPolygon"),
        ("EPSG:4326", 200, 10, 1, "Polygon"),
        # Around both poles, and beside one.
        ("EPSG:3413", -3000, -2000, 5000, "Polygon"),
        ("EPSG:3031", -1000, -2000, 5000, "Polygon"),
        ("EPSG:3413", 1000, -2000, 5000, "Polygon"),
    ],
)
def test_a_cut_polygon_lies_in_the_world_and_has_the_right_area(
    crs: str, x: float, y: float, side: float, kind: str
) -> None:
    found = ring(crs, x, y, side)
    assert found.is_valid and found.geom_type == kind
    west, south, east, north = found.bounds
    assert shapely.box(-180, -90, 180, 90).covers(found)
    assert (west, east) == (-180, 180) if kind == "MultiPolygon" else east - west < 180 or max(-south, north) == 90
    middle = transform_points(crs, "OGC:CRS84", np.array([x + side / 2.0]), np.array([y + side / 2.0]))
    assert shapely.intersects_xy(found, (middle[0][0] + 180) % 360 - 180, middle[1][0])
    # Back in its own plane, turned to one side of the date line, it is the square again.
    if crs != "EPSG:4326":
        there = shapely.transform(
            shapely.segmentize(found, 0.05),
            lambda points: np.stack(transform_points("OGC:CRS84", crs, *points.T), axis=1),
        )
        assert there.area == pytest.approx(side**2, rel=0.02 if crs in ("EPSG:3413", "EPSG:3031") else 2e-3)


def test_distances_are_those_over_the_ground() -> None:
    # Points of known distance: along the equator and along meridians at several latitudes, on WGS 84.
    for lon, lat, east, north, metres in [
        (10, 0, 0.1, 0, 11_131.949),
        (10, 0, 0, 0.1, 11_057.428),
        (179.95, 0, 0.1, 0, 11_131.949),
        (10, 60, 0, 0.1, 11_141.249),
        (-70, 89.9, 0, 0.1, 11_169.396),
    ]:
        size = 1e-5
        squares = [cut(*square(lon, lat, -size, -size)), cut(*square(lon + east, lat + north, size * bool(east), size))]
        prints = Footprints.of(np.array(squares, object))
        near = [bool(prints.near(np.array([0]), np.array([1]), metres * share)[0]) for share in (0.995, 1.001)]
        assert near == [False, True], (lon, lat)


def square(lon: float, lat: float, wide: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A tiny square with one corner at the point."""
    return np.array([lon, lon + wide, lon + wide, lon, lon]), np.array([lat, lat, lat + high, lat + high, lat])


def test_nothing_is_near_nothing() -> None:
    prints = Footprints.of(np.array([shapely.box(0, 0, 1, 1)], object))
    none = np.array([], np.int64)
    assert prints.near(np.array([0]), none, 100.0).tolist() == [False]
    assert prints.near(none, np.array([0]), 100.0).tolist() == []
    empty = Footprints.of(np.array([], object))
    assert empty.near(none, none, 100.0).tolist() == []
