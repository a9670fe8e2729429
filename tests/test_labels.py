"""Labels made of polygons: where they are, which is which, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.features
from shapely.geometry import box, mapping

import configs
from shards.build import build
from shards.config import Label
from shards.grid import Grid, Window
from shards.labels import open_label
from shards.manifest import select
from shards.scene import Asset, Scene, SceneError
from shards.stream import Share, Stream
from shards.verify import verify
from tests.conftest import REAL_DATA
from tests.scenes import UTM, north_up, write_catalog, write_scene

BUILDINGS = Label(names=("background", "building"), palette=((0, 0, 0), (255, 0, 0)))
GRID = Grid(north_up(0.5), 96, 96, UTM)


def house(row: float, col: float, height: float, width: float) -> Any:
    (x0, y0), (x1, y1) = GRID.xy(row, col), GRID.xy(row + height, col + width)
    return box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def write_houses(path: Path, houses: list[Any], crs: str | None = "urn:ogc:def:crs:EPSG::32633") -> Path:
    features = [{"type": "Feature", "properties": {}, "geometry": item and mapping(item)} for item in houses]
    data: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if crs:
        data["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(data))
    return path


def read(path: Path, label: Label = BUILDINGS, grid: Grid = GRID) -> tuple[Any, Any]:
    with open_label(Scene("label", (Asset(str(path)),)), label) as opened:
        return opened.read(grid)


def test_polygons_are_burnt_where_they_are_with_a_number_each(tmp_path: Path) -> None:
    path = write_houses(tmp_path / "a.geojson", [house(10, 20, 8, 12), None, house(50, 60, 20, 10)])
    classes, instances = read(path)
    assert (instances[10:18, 20:32] == 1).all() and (instances[50:70, 60:70] == 2).all()
    assert (instances > 0).sum() == 8 * 12 + 20 * 10
    np.testing.assert_array_equal(classes, instances > 0)
    part = read(path, grid=GRID.window(Window(48, 48, 32, 32)))
    np.testing.assert_array_equal(part[1], instances[48:80, 48:80])


def test_coordinates_in_degrees_when_the_file_names_no_crs(tmp_path: Path) -> None:
    import geopandas

    frame = geopandas.GeoSeries([house(10, 20, 8, 12)], crs=UTM).to_crs("EPSG:4326")
    classes, _ = read(write_houses(tmp_path / "a.geojson", list(frame), None))
    assert classes[10:18, 20:32].mean() > 0.95 and classes.sum() == pytest.approx(96, abs=4)


def test_small_polygons_are_dropped_and_none_at_all_is_background(tmp_path: Path) -> None:
    path = write_houses(tmp_path / "a.geojson", [house(10, 20, 8, 9), house(50, 60, 20, 10)])  # 18 and 50 m2
    label = Label(names=BUILDINGS.names, palette=BUILDINGS.palette, min_area=20)
    assert read(path, label)[0].sum() == 200
    classes, instances = read(write_houses(tmp_path / "none.geojson", []))
    assert not classes.any() and not instances.any()


def test_what_is_no_polygon_label_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.geojson"
    bad.write_text('{"features": [{"geome')
    with pytest.raises(SceneError, match="bad.geojson: not a readable GeoJSON FeatureCollection"):
        read(bad)
    with pytest.raises(SceneError, match="holds Point; labels are Polygons"):
        read(write_houses(tmp_path / "p.geojson", [house(1, 1, 9, 9).centroid]))
    three = Label(names=("a", "b", "c"), palette=((0, 0, 0),) * 3)
    with pytest.raises(SceneError, match="two classes"):
        read(write_houses(tmp_path / "a.geojson", []), three)


def test_instances_travel_into_shards_and_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(12, 3, (4, 96, 96)).astype(np.float32)
    write_scene(tmp_path / "sar.tif", "sar-quadpol", metres=0.5, values=values)
    write_houses(tmp_path / "a.geojson", [house(10, 20, 8, 12), house(50, 60, 20, 10)])
    rows = [{"place": "p", "sensor": s, "href": h} for s, h in (("sar-quadpol", "sar.tif"), ("label", "a.geojson"))]
    write_catalog(tmp_path, rows)
    label = {"names": ["background", "building"], "palette": [[0, 0, 0], [255, 0, 0]]}
    raw = {"stage": "shards", "archive": {"root": str(tmp_path)}, "out": str(tmp_path / "data"), "label": label}
    build(configs.parse({**raw, "sensors": ["sar-quadpol"], "tile": {"size": 48}}))
    assert verify(str(tmp_path / "data")) == []
    sample = Stream(select(str(tmp_path / "data")), 0, 1, Share(1)).at("p-00048-00048")
    assert sample.instances is not None and sample.label is not None
    assert set(np.unique(sample.instances)) == {0, 2} and (sample.instances == 2).sum() == 200
    np.testing.assert_array_equal(sample.label, sample.instances > 0)


@pytest.mark.real_data
def test_real_footprints_on_a_real_image() -> None:
    folder = REAL_DATA / "labels/spacenet_atlanta_footprints"
    with rasterio.open(folder / "sample_geotiff.tif") as raster:
        grid = Grid(tuple(raster.transform)[:6], raster.height, raster.width, f"EPSG:{raster.crs.to_epsg()}")
        shapes = json.loads((folder / "geotiff_labels.geojson").read_text())["features"]
        expected = rasterio.features.rasterize([item["geometry"] for item in shapes], raster.shape,
                                               transform=raster.transform)  # fmt: skip
    classes, instances = read(folder / "geotiff_labels.geojson", grid=grid)
    assert len(shapes) == 43 and len(np.unique(instances)) == 44
    assert (classes != expected).mean() < 1e-3 and 0.02 < classes.mean() < 0.5
