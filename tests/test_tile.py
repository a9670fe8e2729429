"""Reading one modality of one window: grids of all kinds, every source of validity, and what numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from shards.grid import Grid, Window
from shards.raster_io import transform_points, utm_grid
from shards.sample import Tile
from shards.scene import Asset, CloudMask, Radiometry, Scene, SceneError
from shards.tile import open_scene, overlaps, read_cloud, read_tile
from tests.scenes import ORIGIN, UTM, north_up, write_scene

GRID = Grid(north_up(10.0), 96, 96, UTM)
# A Lambert conic of one's own: no EPSG code, no name that PROJ knows.
CUSTOM = "+proj=lcc +lat_0=47.9 +lon_0=15.1 +lat_1=47.5 +lat_2=48.3 +x_0=1000 +y_0=2000 +ellps=bessel +units=m +no_defs"


def read(scene: Scene | Path, grid: Grid = GRID, **options: Any) -> Tile:
    scene = Scene("s1", (Asset(str(scene)),)) if isinstance(scene, Path) else scene
    with open_scene(scene, **options) as opened:
        return read_tile(opened, grid)


def ramp(grid: Grid, crs: str = UTM) -> np.ndarray[Any, Any]:
    """Bands that are linear in the ground's coordinates, so that any right resampling gives a known value."""
    rows, cols = np.mgrid[: grid.height, : grid.width] + 0.5
    a, b, c, d, e, f = grid.transform
    xs, ys = a * cols + b * rows + c, d * cols + e * rows + f
    if grid.crs != crs:
        assert grid.crs is not None
        xs, ys = transform_points(grid.crs, crs, xs, ys)
    x, y = xs - ORIGIN[0], ys - ORIGIN[1]
    return np.stack([-20 + x / 200, -20 + y / 200]).astype(np.float32)


def in_crs(crs: str, metres_or_degrees: float, size: int, turn: float = 0.0) -> Grid:
    """A grid of `size` pixels about the middle of GRID, turned by some degrees."""
    x, y = GRID.xy(48, 48)
    if crs != UTM:
        xs, ys = transform_points(UTM, crs, np.array([x]), np.array([y]))
        x, y = float(xs[0]), float(ys[0])
    step = metres_or_degrees
    cos, sin = step * np.cos(np.radians(turn)), step * np.sin(np.radians(turn))
    half = size / 2
    return Grid((cos, sin, x - (cos + sin) * half, sin, -cos, y - (sin - cos) * half), size, size, crs)


GRIDS = {
    "geographic": in_crs("EPSG:4326", 1e-4, 200),
    "custom CRS without EPSG code": in_crs(CUSTOM, 10.0, 140),
    "rotated": in_crs(UTM, 10.0, 150, turn=30.0),
    "coarser": in_crs(UTM, 20.0, 60),
    "finer": in_crs(UTM, 5.0, 200),
    "another zone": in_crs("EPSG:32632", 10.0, 140),
    "web mercator": in_crs("EPSG:3857", 15.0, 140),
}


@pytest.mark.parametrize("source", GRIDS)
def test_any_grid_is_warped_to_the_right_place(tmp_path: Path, source: str) -> None:
    grid = GRIDS[source]
    path = write_scene(tmp_path / "s1.tif", "s1", values=ramp(grid), transform=grid.transform, crs=grid.crs)
    tile = read(path)
    assert tile.valid.mean() > 0.95
    off = np.abs(tile.values - ramp(GRID))[:, tile.valid]
    assert off.max() < 0.01  # of a band that changes by 0.05 per pixel: a fifth of a pixel
    small = GRID.window(Window(30, 40, 16, 16))
    np.testing.assert_allclose(read(path, small).values, tile.values[:, 30:46, 40:56], atol=2e-3)


@pytest.mark.parametrize("reference", GRIDS)
def test_any_grid_can_be_the_reference(tmp_path: Path, reference: str) -> None:
    grid = GRIDS[reference]
    path = write_scene(tmp_path / "s1.tif", "s1", values=ramp(GRID), transform=GRID.transform)
    tile = read(path, grid)
    assert tile.valid.any() and not tile.valid.all()
    assert np.abs(tile.values - ramp(grid))[:, tile.valid].max() < 0.026  # half a pixel, along the scene's edge


def test_a_window_is_the_same_alone_and_cut_out_of_a_large_one(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s1.tif", "s1")
    whole = read(path)
    for window in (Window(0, 0, 32, 32), Window(32, 64, 32, 32), Window(80, 80, 32, 32)):
        tile = read(path, GRID.window(window))
        rows, cols = slice(window.row, window.row + 32), slice(window.col, window.col + 32)
        inside = whole.values[:, rows, cols]
        np.testing.assert_array_equal(tile.values[:, : inside.shape[1], : inside.shape[2]], inside)
    assert read(path, GRID.window(Window(80, 80, 32, 32))).valid.sum() == 16 * 16


def test_grids_that_differ_in_the_last_bits_are_not_resampled(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(-12, 3, (2, 96, 96)).astype(np.float32)
    for off, same in ((1e-7, True), (0.3, True), (3.0, False)):
        path = write_scene(tmp_path / f"{off}.tif", "s1", values=values, transform=north_up(10.0, ORIGIN[0] + off))
        assert np.array_equal(read(path).values, values) == same


@pytest.mark.parametrize("longitude", [179.95, -179.95])
def test_scenes_on_both_sides_of_the_date_line(tmp_path: Path, longitude: float) -> None:
    """One file runs over 180 degrees in degrees; the window is UTM, on either side of the line."""
    degrees = (0.001, 0.0, 179.8, 0.0, -0.001, -16.8)
    cols = np.broadcast_to(179.8 + 0.001 * (np.arange(400) + 0.5), (2, 400, 400))
    path = write_scene(tmp_path / "s1.tif", "s1", values=(cols - 200).astype(np.float32), transform=degrees,
                       crs="EPSG:4326")  # fmt: skip
    crs = "EPSG:32760" if longitude > 0 else "EPSG:32701"
    x, y = (float(v[0]) for v in transform_points("EPSG:4326", crs, np.array([longitude]), np.array([-17.0])))
    grid = Grid(north_up(100.0, x, y), 32, 32, crs)
    tile = read(path, grid)
    assert tile.valid.all()
    assert tile.values[0, 0, 0] + 200 == pytest.approx(longitude % 360, abs=2e-3)


def test_a_scene_in_degrees_over_the_date_line_gets_one_utm_grid() -> None:
    source = Grid((0.001, 0.0, 179.8, 0.0, -0.001, -16.8), 400, 400, "EPSG:4326")
    grid = utm_grid(source, 100.0)
    assert grid.crs in ("EPSG:32760", "EPSG:32701") and grid.width < 500 and overlaps(grid, source)


def test_utm_grids_of_neighbours_share_their_pixels_and_cover_the_scene() -> None:
    left, right = (Grid((1e-4, 0.0, lon, 0.0, -1e-4, 48.0), 500, 500, "EPSG:4326") for lon in (14.0, 14.05))
    grids = [utm_grid(source, 10.0) for source in (left, right)]
    assert {grid.crs for grid in grids} == {"EPSG:32633"}
    row, col = grids[0].rowcol(*grids[1].xy(0, 0))
    assert (row, col) == (pytest.approx(round(row)), pytest.approx(round(col)))
    xs, ys = transform_points("EPSG:4326", "EPSG:32633", *(np.array(v) for v in zip(*left.edge(), strict=True)))
    rows, cols = zip(*(grids[0].rowcol(x, y) for x, y in zip(xs, ys, strict=True)), strict=True)
    assert min(rows) >= 0 and min(cols) >= 0 and max(rows) <= grids[0].height and max(cols) <= grids[0].width
    assert utm_grid(Grid((1e-3, 0, 10.0, 0, -1e-3, 86.0), 9, 9, "EPSG:4326"), 10.0).crs == "EPSG:5041"


def test_ground_control_points_and_complex_values_are_refused_with_what_to_do(tmp_path: Path) -> None:
    points = [GroundControlPoint(row=r, col=c, x=15 + c / 1e4, y=48 - r / 1e4) for r in (0, 90) for c in (0, 90)]
    for name, dtype in (("gcps.tif", "float32"), ("slc.tif", "complex64")):
        with rasterio.open(tmp_path / name, "w", "GTiff", 96, 96, 2, dtype=dtype) as raster:
            raster.write(np.ones((2, 96, 96), dtype))
            if name == "gcps.tif":
                raster.gcps = (points, CRS.from_epsg(4326))
    with pytest.raises(SceneError, match=r"gcps.tif: lies on ground control points only; .*gdalwarp -tps"):
        read(tmp_path / "gcps.tif")
    with pytest.raises(SceneError, match=r"slc.tif: holds complex values; detect it first"):
        read(tmp_path / "slc.tif")


def test_files_without_crs_are_read_only_where_the_archive_vouches_for_them(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s1.tif", "s1", crs=None, transform=(1, 0, 0, 0, 1, 0))
    with pytest.raises(SceneError, match=r"has no CRS; give the file its georeference \(gdal_edit"):
        read(path)
    pixels = Grid((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 96, 96, None)
    assert read(path, pixels, coregistered=True).valid.all()


def holes(tmp_path: Path, how: str) -> Path:
    """A scene of one value with a hole of 10 x 10 pixels, said in one of the ways files say it."""
    values = np.full((2, 96, 96), -12, np.float32)
    hole = (slice(None), slice(20, 30), slice(40, 50))
    values[hole] = {"tag": -7, "NaN": np.nan, "infinite": -np.inf, "undeclared": -32768}.get(how, -12)
    if how == "wrong tag":
        return write_scene(tmp_path / "s1.tif", "s1", values=np.where(values == -12, -12, values), nodata=-12)
    path = write_scene(tmp_path / "s1.tif", "s1", values=values, nodata=-7 if how == "tag" else None)
    mask = np.full((96, 96), 255, np.uint8)
    mask[hole[1:]] = 0
    if how == "mask band":
        with rasterio.open(path, "r+") as raster:
            raster.write_mask(mask)
    return path


@pytest.mark.parametrize("how", ["tag", "NaN", "infinite", "undeclared", "mask band"])
@pytest.mark.parametrize("warped", [False, True])
def test_every_way_of_saying_nodata(tmp_path: Path, how: str, warped: bool) -> None:
    path = holes(tmp_path, how)
    grid = Grid(north_up(10.0, ORIGIN[0] + 3.0), 95, 95, UTM) if warped else GRID
    tile = read(path, grid)
    assert not tile.valid[21:29, 41:49].any()
    assert tile.valid[5:15, 5:90].all()
    assert (tile.values[:, tile.valid] == pytest.approx(-12)) and (tile.values[:, ~tile.valid] == 0).all()
    assert (~tile.valid).sum() in ((100,) if not warped else range(90, 122))


def test_an_alpha_band_is_a_mask_and_no_band(tmp_path: Path) -> None:
    values = np.full((5, 96, 96), 300, np.uint16)
    values[4] = 65535
    values[4, 20:30, 40:50] = 0
    path = tmp_path / "rgbnir.tif"
    options = {"crs": UTM, "transform": Affine(*GRID.transform), "photometric": "RGB", "alpha": "UNSPECIFIED"}
    with rasterio.open(path, "w", "GTiff", 96, 96, 5, dtype="uint16", **options) as raster:
        raster.colorinterp = [*raster.colorinterp[:4], ColorInterp.alpha]
        raster.write(values)
    tile = read(Scene("rgbnir", (Asset(str(path)),)))
    assert tile.values.shape[0] == 4 and (~tile.valid).sum() == 100 and not tile.valid[20:30, 40:50].any()


def test_a_wrong_tag_is_overruled_by_the_archive(tmp_path: Path) -> None:
    path = holes(tmp_path, "wrong tag")
    assert not read(path).valid.any()
    assert read(Scene("s1", (Asset(str(path), nodata=float("nan")),))).valid.all()


def test_the_nodata_rule_of_a_sensor_needs_all_bands(tmp_path: Path) -> None:
    values = np.full((4, 96, 96), 5, np.float32)
    values[:, :10], values[0, 50:] = 0, 0
    path = write_scene(tmp_path / "sar.tif", "sar-quadpol", values=values)
    tile = read(Scene("sar-quadpol", (Asset(str(path)),)))
    assert not tile.valid[:10].any() and tile.valid[10:].all()


def test_bands_of_several_resolutions_in_several_files_become_one_tile(tmp_path: Path) -> None:
    from shards.sensors import SENSORS

    assets = []
    for number, band in enumerate(SENSORS["s2-l2a"].bands):
        size = round(960 / band.resolution)
        values = np.full((1, size, size), 100 + number, np.uint16)
        path = tmp_path / f"{band.name}.tif"
        write_scene(path, "s2-l2a", values=values, transform=north_up(band.resolution), descriptions=())
        assets.append(Asset(str(path), (band.name,)))
    tile = read(Scene("s2-l2a", tuple(reversed(assets))))
    assert tile.values.dtype == np.uint16 and tile.valid.all()
    assert [set(band.ravel()) for band in tile.values] == [{100 + number} for number in range(12)]


def test_an_offset_is_taken_off_and_integers_stay_integers(tmp_path: Path) -> None:
    values = np.full((12, 96, 96), 1700, np.uint16)
    values[:, :10], values[3, 20], values[:, 30] = 0, 400, 900
    path = write_scene(tmp_path / "s2.tif", "s2-l2a", values=values)
    tile = read(Scene("s2-l2a", (Asset(str(path), radiometry=Radiometry(offset=-1000)),)))
    assert tile.values.dtype == np.uint16
    assert not tile.valid[:10].any() and tile.valid[10:].all()
    assert (tile.values[:, 50:] == 700).all() and (tile.values[3, 20] == 0).all() and (tile.values[4, 20] == 700).all()


@pytest.mark.parametrize(("quantity", "number"), [("power", 0.01), ("amplitude", 0.1)])
def test_linear_backscatter_becomes_decibels_after_resampling(tmp_path: Path, quantity: Any, number: float) -> None:
    values = np.full((2, 96, 96), number, np.float32)
    values[:, :4] = 0  # power of 0 is no measurement
    path = write_scene(tmp_path / "s1.tif", "s1", values=values)
    scene = Scene("s1", (Asset(str(path), radiometry=Radiometry(quantity=quantity)),))
    tile = read(scene)
    assert tile.values[:, 4:] == pytest.approx(-20, abs=1e-4) and not tile.valid[:4].any()
    half = np.full((2, 96, 96), number, np.float32)
    half[:, :, 1::2] *= 3
    write_scene(path, "s1", values=half)
    coarse = read(scene, Grid(north_up(20.0), 48, 48, UTM))
    mean = half[0, 0, :2].mean()
    decibels = 10 * np.log10(mean) if quantity == "power" else 20 * np.log10(mean)
    assert np.median(coarse.values) == pytest.approx(decibels, abs=0.6)


def test_reflectance_from_0_to_1_is_scaled(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s2.tif", "s2-l2a", values=np.full((12, 96, 96), 0.07, np.float64))
    tile = read(Scene("s2-l2a", (Asset(str(path), radiometry=Radiometry(scale=10000)),)))
    assert tile.values.dtype == np.float32 and tile.values == pytest.approx(700)


def test_clouds_by_the_products_own_mask(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s2.tif", "s2-l2a")
    codes = np.full((1, 48, 48), 4, np.uint8)
    codes[:, :12], codes[:, 12:24] = 9, 3
    mask = write_scene(tmp_path / "scl.tif", "label", values=codes, transform=north_up(20.0), nodata=0)
    scene = Scene("s2-l2a", (Asset(str(path)),), cloud=CloudMask(Asset(str(mask)), (8, 9, 10)))
    with open_scene(scene) as opened:
        cloud = read_cloud(opened, GRID)
        assert cloud is not None and cloud[:24].all() and not cloud[24:].any()
    with open_scene(Scene("s2-l2a", (Asset(str(path)),))) as opened:
        assert read_cloud(opened, GRID) is None
