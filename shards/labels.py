"""Labels on a window's grid: codes of a raster as class indices, or polygons burnt in, with an instance per polygon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import shapely
from numpy.typing import NDArray

from shards.config import Label
from shards.contract import IGNORE
from shards.grid import Grid
from shards.raster_io import burn, transform_points
from shards.scene import Scene, SceneError
from shards.tile import OpenScene, open_scene, read_tile

VECTORS = (".geojson", ".json")
EQUAL_AREA = "EPSG:6933"
CRS84 = "OGC:CRS84"

Classes = NDArray[np.uint8]
Instances = NDArray[np.uint16]


class OpenLabel(Protocol):
    """A label whose file is open."""

    def read(self, grid: Grid) -> tuple[Classes, Instances | None]:
        """Class indices [H, W], 255 where there is none; for polygons also their numbers, 0 outside."""


@contextmanager
def open_label(scene: Scene, label: Label, coregistered: bool = False) -> Iterator[OpenLabel]:
    """Open the label of a place.

    Raises:
        SceneError: the file cannot be read, or is GeoJSON without polygons where it should have them.
    """
    if scene.path.endswith(VECTORS):
        yield PolygonLabel.of(scene.path, label)
    else:
        with open_scene(scene, coregistered) as opened:
            yield RasterLabel(opened, label)


@dataclass(frozen=True)
class RasterLabel:
    """A raster of codes; `label.codes` says which are which class."""

    opened: OpenScene
    label: Label

    def read(self, grid: Grid) -> tuple[Classes, None]:
        """Class indices [H, W], 255 for ignored codes, nodata and outside.

        Raises:
            SceneError: codes that the config does not know.
        """
        tile = read_tile(self.opened, grid)
        codes = tile.values[0]
        out = np.full(codes.shape, IGNORE, np.uint8)
        known = self.label.table()
        for code, index in known.items():
            out[codes == code] = index
        strange = np.setdiff1d(codes[tile.valid], [*known, *self.label.ignored])
        if strange.size:
            raise SceneError(
                self.opened.scene.path,
                f"label codes {strange[:10].tolist()} are neither in label.codes {sorted(known)} "
                f"nor in label.ignored {list(self.label.ignored)}",
            )
        out[~tile.valid] = IGNORE
        return out, None


@dataclass(frozen=True)
class PolygonLabel:
    """Polygons of one class: index 1 inside, 0 outside; each polygon keeps its number (from 1) in all tiles."""

    path: str
    polygons: tuple[shapely.Geometry, ...]
    crs: str

    @staticmethod
    def of(path: str, label: Label) -> PolygonLabel:
        """Read GeoJSON (RFC 7946, and the older `crs` member for projected coordinates).

        Polygons smaller than `label.min_area` square metres are dropped; broken rings are mended.

        Raises:
            SceneError: not GeoJSON, or geometries other than polygons.
        """
        if len(label.names) != 2:
            raise SceneError(path, f"polygons give two classes (outside, inside); label.names has {len(label.names)}")
        try:
            data = json.loads(Path(path).read_text())
            drawn = [item["geometry"] for item in data["features"] if item["geometry"] is not None]
            shapes = [shapely.from_geojson(json.dumps(geometry)) for geometry in drawn]
        except (OSError, ValueError, KeyError, TypeError, shapely.errors.ShapelyError) as error:
            raise SceneError(path, f"not a readable GeoJSON FeatureCollection: {error}") from error
        crs = (data.get("crs") or {}).get("properties", {}).get("name", CRS84)
        polygons = [shapely.make_valid(item) for item in shapes if not item.is_empty]
        if others := sorted({item.geom_type for item in polygons if "Polygon" not in item.geom_type}):
            raise SceneError(path, f"holds {', '.join(others)}; labels are Polygons or MultiPolygons")
        large = [item for item in polygons if label.min_area == 0 or _area(item, crs) >= label.min_area]
        return PolygonLabel(path, tuple(large), crs)

    def read(self, grid: Grid) -> tuple[Classes, Instances]:
        """Where the polygons are on `grid`, and the number of each pixel's polygon."""
        if grid.crs is None:
            raise SceneError(self.path, "polygons need an image with a CRS")
        near = [(number, _to(item, self.crs, grid.crs)) for number, item in enumerate(self.polygons, 1)]
        instances = burn(near, grid)
        return (instances > 0).astype(np.uint8), instances


def _to(geometry: shapely.Geometry, source: str, target: str) -> shapely.Geometry:
    def change(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(transform_points(source, target, points[:, 0], points[:, 1]), axis=1)

    return geometry if source == target else shapely.transform(geometry, change)


def _area(geometry: shapely.Geometry, crs: str) -> float:
    return float(_to(geometry, crs, EQUAL_AREA).area)
