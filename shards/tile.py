"""read_tile: one modality of one window, on the window's own grid, in the sensor's unit, with every pixel's validity.

Where the file's grid is the window's grid, pixels are read as they lie. Everything else is warped: the part of the file
under the window is read with a margin, invalid pixels are taken out first, and GDAL's warper resamples the rest, so
that an invalid pixel never leaks into a valid one. A window may be as large as memory allows: reading many tiles as one
window and cutting them out is how the build reads each block of a file once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio.warp
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling

from shards.grid import Grid, Window
from shards.raster import Raster, open_raster
from shards.sample import Tile
from shards.scene import LABEL, Asset, Radiometry, Scene, SceneError
from shards.sensors import SENSORS, Sensor

MARGIN = 3  # source pixels around a window, enough for a bicubic kernel
CLOUD = "CLOUD"
POWER_OF = {"power": 10.0, "amplitude": 20.0}  # dB per decade
# The row for rasters of codes: a label or a cloud mask.
_CODES = Sensor(name=LABEL, kind="optical", bands=(), unit="", clip=(0, 0), resampling="nearest")


@dataclass(frozen=True)
class OpenFile:
    """One open raster of a scene, and which of its bands (from 1) hold which of the sensor's."""

    asset: Asset
    raster: Raster
    grid: Grid
    indexes: tuple[int, ...]
    bands: tuple[str, ...]


@dataclass(frozen=True)
class OpenScene:
    """A scene whose files are open."""

    scene: Scene
    files: tuple[OpenFile, ...]
    cloud: OpenScene | None = None

    @property
    def row(self) -> Sensor:
        """The sensor's row of the table; for labels and masks one that says "codes"."""
        return SENSORS.get(self.scene.sensor, _CODES)

    @property
    def bands(self) -> tuple[str, ...]:
        """The sensor's bands, or one of codes."""
        return self.row.band_names or (self.scene.sensor,)

    @property
    def grid(self) -> Grid:
        """The grid of the file with the smallest pixels."""
        return min((file.grid for file in self.files), key=lambda grid: grid.resolution)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of all files in the sensor's unit."""
        return np.result_type(*(_dtype(file.raster.dtype, file.asset.radiometry) for file in self.files))


@contextmanager
def open_scene(scene: Scene, coregistered: bool = False) -> Iterator[OpenScene]:
    """Open every file of a scene and check that its bands are all there.

    Args:
        scene: of a sensor of the table, or the label.
        coregistered: accept files without CRS; their pixels themselves are then the coordinates.

    Raises:
        SceneError: a file that cannot be read or has no CRS, a missing or unknown band, complex values.
    """
    with ExitStack() as stack:
        cloud = None
        if scene.cloud is not None:
            cloud = stack.enter_context(open_scene(Scene(CLOUD, (scene.cloud.asset,), scene.time), coregistered))
        files = [_open_file(scene, asset, stack, coregistered) for asset in scene.assets]
        opened = OpenScene(scene, tuple(files), cloud)
        found = {name for file in files for name in file.bands}
        if missing := [name for name in opened.bands if name not in found]:
            raise SceneError(scene.path, f"{scene.sensor} needs bands {', '.join(opened.bands)}; missing {missing}")
        yield opened


def _open_file(scene: Scene, asset: Asset, stack: ExitStack, coregistered: bool) -> OpenFile:
    raster = stack.enter_context(open_raster(asset))
    grid = raster.grid
    if grid.crs is None:
        if not coregistered:
            raise SceneError(
                raster.name, "has no CRS; give the file its georeference (gdal_edit -a_srs EPSG:... -a_ullr ...)"
            )
        grid = Grid((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), grid.height, grid.width, None)
    return OpenFile(asset, raster, grid, *_bands(scene, raster, asset.bands))


def _bands(scene: Scene, raster: Raster, named: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which bands of a file to read, and their names: from the archive, the descriptions, or the sensor's order."""
    wanted = SENSORS[scene.sensor].band_names if scene.sensor in SENSORS else (scene.sensor,)
    if scene.sensor not in SENSORS and not named:
        return (1,), wanted
    names = named or (raster.names if set(wanted) & set(raster.names) else wanted)
    if len(names) != len(raster.names):
        raise SceneError(
            raster.name,
            f"has {len(raster.names)} bands where {scene.sensor} has {len(names)} ({', '.join(names)}); "
            "describe its bands, or name them in the catalog's band column",
        )
    if unknown := [name for name in names if named and name and name not in wanted]:
        raise SceneError(raster.name, f"unknown bands {unknown}; {scene.sensor} has {', '.join(wanted)}")
    chosen = [(i, name) for i, name in enumerate(names, 1) if name in wanted]
    return tuple(i for i, _ in chosen), tuple(name for _, name in chosen)


def read_tile(opened: OpenScene, grid: Grid) -> Tile:
    """Values and validity of a scene on `grid`.

    Returns:
        A tile with values [C, H, W] in the sensor's unit, 0 where invalid; pixels outside the scene are invalid.

    Raises:
        SceneError: the file is damaged.
    """
    shape = (grid.height, grid.width)
    values = np.zeros((len(opened.bands), *shape), opened.dtype)
    valid = np.ones(shape, np.bool_)
    for file in opened.files:
        part, seen = _read(opened.row, file, grid)
        for name, band in zip(file.bands, to_unit(part, file.asset.radiometry), strict=True):
            values[opened.bands.index(name)] = band
        valid &= seen
    values[:, ~valid] = 0
    return Tile(values, valid, opened.scene.time)


def read_cloud(opened: OpenScene, grid: Grid) -> NDArray[np.bool_] | None:
    """Pixels [H, W] of `grid` that the product's own mask calls cloud; None when the product has no mask."""
    if opened.cloud is None or opened.scene.cloud is None:
        return None
    mask, codes = read_tile(opened.cloud, grid), opened.scene.cloud.codes
    found = np.isin(mask.values[0], codes) if codes else mask.values[0] != 0
    return np.asarray(found & mask.valid)


def _dtype(stored: np.dtype[Any], radiometry: Radiometry) -> np.dtype[Any]:
    """The dtype of values in the sensor's unit; floats are float32, whose error is far below any sensor's."""
    whole = radiometry.scale == 1 and radiometry.offset == int(radiometry.offset) and radiometry.quantity == "value"
    return stored if whole and stored.kind in "iu" else np.dtype(np.float32)


def to_unit(numbers: NDArray[Any], radiometry: Radiometry) -> NDArray[Any]:
    """Numbers of a file as values in the sensor's unit.

    Integers that only lose an offset stay integers; what falls below their range becomes its lowest value (reflectance
    of Sentinel-2 below 0 is 0).
    """
    dtype = _dtype(numbers.dtype, radiometry)
    if radiometry == Radiometry():
        return numbers.astype(dtype, copy=False)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.clip(numbers.astype(np.int64) + int(radiometry.offset), max(limits.min, 0), limits.max).astype(dtype)
    values = numbers.astype(np.float32) * np.float32(radiometry.scale) + np.float32(radiometry.offset)
    if radiometry.quantity != "value":
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values) * np.float32(POWER_OF[radiometry.quantity])
    return values


def _read(row: Sensor, file: OpenFile, grid: Grid) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    window = grid.inside(file.grid)
    if window is not None:
        return _read_window(row, file, window)
    under = _window_under(grid, file.grid)
    if under is None:
        shape = (grid.height, grid.width)
        return np.zeros((len(file.indexes), *shape), file.raster.dtype), np.zeros(shape, np.bool_)
    values, valid = _read_window(row, file, under)
    return _warp(row, values, valid, file.grid.window(under), grid)


def _read_window(row: Sensor, file: OpenFile, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Pixels of a window as they lie; the part beyond the raster's edge is invalid."""
    part = window.clipped(file.grid.height, file.grid.width)
    if part == window:
        values = file.raster.read(file.indexes, window)
        return values, _validity(row, file, window, values)
    whole = np.zeros((len(file.indexes), window.height, window.width), file.raster.dtype)
    valid = np.zeros(whole.shape[1:], np.bool_)
    if part is not None:
        rows, cols = part.within(window)
        whole[:, rows, cols] = values = file.raster.read(file.indexes, part)
        valid[rows, cols] = _validity(row, file, part, values)
    return whole, valid


def _validity(row: Sensor, file: OpenFile, part: Window, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels that hold a measurement: by the archive, the file's masks, NaN, and the sensor's own rules.

    Where the declared number is the sensor's own (0 in Sentinel-2), a pixel counts as empty only if all its bands hold
    it: a dark band may well be 0 beside others that are not.
    """
    valid = np.ones(values.shape[1:], np.bool_)
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    if row.nodata is not None:
        valid &= (values != row.nodata).any(axis=0)
    if file.asset.nodata is not None:
        valid &= (values != file.asset.nodata).all(axis=0)
    elif file.raster.nodata is None or file.raster.nodata != row.nodata:
        valid &= file.raster.mask(file.indexes, part)
    if row.possible is not None:
        low, high = row.possible
        measured = to_unit(values, file.asset.radiometry)
        valid &= ((measured >= low) & (measured <= high)).all(axis=0)
    return valid


def _window_under(grid: Grid, source: Grid) -> Window | None:
    """The part of `source` that lies under `grid`, with a margin; None when they do not meet."""
    if (grid.crs is None) != (source.crs is None):
        return None
    xs, ys = (np.array(values) for values in zip(*grid.edge(), strict=True))
    if grid.crs != source.crs:
        xs, ys = (np.array(values) for values in rasterio.warp.transform(grid.crs, source.crs, xs, ys))
        if CRS.from_user_input(source.crs).is_geographic:  # longitudes count from either side of the date line
            middle, _ = source.xy(source.height / 2, source.width / 2)
            xs = middle + (xs - middle + 180) % 360 - 180
    if not np.isfinite([*xs, *ys]).all():
        return None
    rows, cols = zip(*(source.rowcol(x, y) for x, y in zip(xs, ys, strict=True)), strict=True)
    # Where pixels shrink, the warper's kernel grows with the ratio.
    margin = math.ceil(MARGIN * max(1.0, (max(rows) - min(rows)) / grid.height, (max(cols) - min(cols)) / grid.width))
    top, left = math.floor(min(rows)) - margin, math.floor(min(cols)) - margin
    bottom, right = math.ceil(max(rows)) + margin, math.ceil(max(cols)) + margin
    return Window(top, left, bottom - top, right - left).clipped(source.height, source.width)


def _warp(
    row: Sensor, values: NDArray[Any], valid: NDArray[np.bool_], source: Grid, grid: Grid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Resample by the sensor's rule; a target pixel is valid where the warper found valid source pixels."""
    wide = values.dtype.itemsize > 4 or (values.dtype.kind in "iu" and values.dtype.itemsize > 2)
    exact = np.float64 if wide else np.float32
    floats = values.astype(exact)
    floats[:, ~valid] = np.nan
    out = np.full((values.shape[0], grid.height, grid.width), np.nan, exact)
    rasterio.warp.reproject(
        floats, out, src_transform=Affine(*source.transform), src_crs=CRS.from_user_input(source.crs),
        dst_transform=Affine(*grid.transform), dst_crs=CRS.from_user_input(grid.crs),
        src_nodata=np.nan, dst_nodata=np.nan, resampling=Resampling[row.resampling],
    )  # fmt: skip
    seen = np.isfinite(out).all(axis=0)
    out[:, ~seen] = 0
    return (np.rint(out) if values.dtype.kind in "iu" else out).astype(values.dtype), seen


def is_empty(opened: OpenScene) -> bool:
    """Whether a scene holds no valid pixel at all, by a look at strips of it from top to bottom."""
    file = opened.files[0]
    grid = file.grid
    height = max(1, (1 << 24) // (grid.width * len(file.indexes)))  # about 16 million values at a time
    strips = (Window(row, 0, min(height, grid.height - row), grid.width) for row in range(0, grid.height, height))
    return not any(_read_window(opened.row, file, strip)[1].any() for strip in strips)


def overlaps(a: Grid, b: Grid) -> bool:
    """Whether two grids share any ground."""
    return _window_under(a, b) is not None
