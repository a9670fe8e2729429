"""read_tile: one modality of one window, on the window's own grid, in the sensor's unit, with every pixel's validity.

Where the file's grid is the window's grid, pixels are read as they lie. Everything else is warped: the part of the file
under the window is read with a margin, invalid pixels are taken out first, and GDAL's warper resamples the rest, so
that an invalid pixel never leaks into a valid one. A window may be as large as memory allows: reading many tiles as one
window and cutting them out is how the build reads each block of a file once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from shards.raster_io import is_geographic, transform_points
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
        rasters = [(asset, stack.enter_context(open_raster(asset))) for asset in scene.assets]
        yield open_rasters(scene, rasters, coregistered, cloud)


def open_rasters(
    scene: Scene, rasters: Sequence[tuple[Asset, Raster]], coregistered: bool, cloud: OpenScene | None = None
) -> OpenScene:
    """A scene of rasters that are open already; otherwise as `open_scene`."""
    files = [_open_file(scene, asset, raster, coregistered) for asset, raster in rasters]
    opened = OpenScene(scene, tuple(files), cloud)
    found = {name for file in files for name in file.bands}
    if missing := [name for name in opened.bands if name not in found]:
        raise SceneError(scene.path, f"{scene.sensor} needs bands {', '.join(opened.bands)}; missing {missing}")
    return opened


def _open_file(scene: Scene, asset: Asset, raster: Raster, coregistered: bool) -> OpenFile:
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
    parts = [(file, *_read(opened.row, file, grid)) for file in opened.files]
    valid = np.logical_and.reduce([seen for _, _, seen in parts])
    if len(parts) == 1 and parts[0][0].bands == opened.bands:
        values = to_unit(parts[0][1], parts[0][0].asset.radiometry)  # one file holds everything: no copy
    else:
        values = np.zeros((len(opened.bands), *valid.shape), opened.dtype)
        for file, part, _ in parts:
            values[[opened.bands.index(name) for name in file.bands]] = to_unit(part, file.asset.radiometry)
    if not valid.all():
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
    span = _span(grid, file.grid)
    under = _window_under(span, grid, file.grid) if span else None
    if span is None or under is None:
        shape = (grid.height, grid.width)
        return np.zeros((len(file.indexes), *shape), file.raster.dtype), np.zeros(shape, np.bool_)
    values, valid = _read_window(row, file, under)
    if valid.all() and _inside(span, file.grid):
        return _resample(row, values, file.grid.window(under), grid, None), np.ones((grid.height, grid.width), np.bool_)
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
    if row.nodata is not None:
        valid &= ~_all_bands(values, row.nodata)
    if file.asset.nodata is not None:
        valid &= (values != file.asset.nodata).all(axis=0)
    elif file.raster.nodata is None or file.raster.nodata != row.nodata:
        valid &= file.raster.mask(file.indexes, part)
    if row.possible is not None:
        valid &= _between(to_unit(values, file.asset.radiometry), *row.possible)
    elif values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    return valid


def _all_bands(values: NDArray[Any], number: float) -> NDArray[np.bool_]:
    """Pixels [H, W] in which every band holds `number`; looks no further than the bands that can matter."""
    found: NDArray[np.bool_] = values[0] == number
    for band in values[1:]:
        if not found.any():
            break
        found &= band == number
    return found


def _between(values: NDArray[Any], low: float, high: float) -> NDArray[np.bool_] | np.bool_:
    """Pixels [H, W] whose bands all lie in the range, which NaN does not; as a rule all do, which is quickly told."""
    if low <= values.min() and values.max() <= high:
        return np.True_
    return np.asarray(((values >= low) & (values <= high)).all(axis=0))


@dataclass(frozen=True)
class Span:
    """Rows and columns of a source, as fractions, that a grid reaches over."""

    top: float
    left: float
    bottom: float
    right: float


def _span(grid: Grid, source: Grid) -> Span | None:
    """Where `grid` lies in the pixels of `source`; None when that cannot be told."""
    if (grid.crs is None) != (source.crs is None):
        return None
    xs, ys = (np.array(values) for values in zip(*grid.edge(), strict=True))
    if grid.crs is not None and source.crs is not None and grid.crs != source.crs:
        xs, ys = transform_points(grid.crs, source.crs, xs, ys)
        if is_geographic(source.crs):  # longitudes count from either side of the date line
            middle, _ = source.xy(source.height / 2, source.width / 2)
            xs = middle + (xs - middle + 180) % 360 - 180
    if not np.isfinite([*xs, *ys]).all():
        return None
    rows, cols = zip(*(source.rowcol(x, y) for x, y in zip(xs, ys, strict=True)), strict=True)
    return Span(min(rows), min(cols), max(rows), max(cols))


def _window_under(span: Span, grid: Grid, source: Grid) -> Window | None:
    """The window of `source` that `grid` needs, with a margin; None when they do not meet."""
    # Where pixels shrink, the warper's kernel grows with the ratio.
    ratio = max(1.0, (span.bottom - span.top) / grid.height, (span.right - span.left) / grid.width)
    margin = math.ceil(MARGIN * ratio)
    top, left = math.floor(span.top) - margin, math.floor(span.left) - margin
    bottom, right = math.ceil(span.bottom) + margin, math.ceil(span.right) + margin
    return Window(top, left, bottom - top, right - left).clipped(source.height, source.width)


def _inside(span: Span, source: Grid, tolerance: float = 0.05) -> bool:
    """Whether `source` holds the whole span, to within `tolerance` of a pixel."""
    low = min(span.top, span.left)
    return low >= -tolerance and span.bottom <= source.height + tolerance and span.right <= source.width + tolerance


def _warp(
    row: Sensor, values: NDArray[Any], valid: NDArray[np.bool_], source: Grid, grid: Grid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Resample with holes: a target pixel is valid where the warper found valid source pixels."""
    floats = values.astype(_exact(values.dtype))
    floats[:, ~valid] = np.nan
    out = _resample(row, floats, source, grid, np.nan)
    seen = np.isfinite(out).all(axis=0)
    out[:, ~seen] = 0
    return (np.rint(out) if values.dtype.kind in "iu" else out).astype(values.dtype), seen


def _resample(row: Sensor, values: NDArray[Any], source: Grid, grid: Grid, hole: float | None) -> NDArray[Any]:
    """`values` [C, h, w] of `source` on `grid` by the sensor's rule; GDAL is faster when there is no `hole` value."""
    exact = values.astype(_exact(values.dtype), copy=False)
    out = np.full((values.shape[0], grid.height, grid.width), np.nan, exact.dtype)
    rasterio.warp.reproject(
        exact, out, src_transform=Affine(*source.transform), src_crs=CRS.from_user_input(source.crs),
        dst_transform=Affine(*grid.transform), dst_crs=CRS.from_user_input(grid.crs),
        src_nodata=hole, dst_nodata=hole, resampling=Resampling[row.resampling],
    )  # fmt: skip
    return out if values.dtype.kind == "f" else np.rint(out).astype(values.dtype)


def _exact(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """A float type that holds all numbers of `dtype`."""
    wide = dtype.itemsize > 4 or (dtype.kind in "iu" and dtype.itemsize > 2)
    return np.float64 if wide else np.float32


def is_empty(opened: OpenScene) -> bool:
    """Whether a scene holds no valid pixel at all, by a look at strips of it from top to bottom."""
    file = opened.files[0]
    grid = file.grid
    height = max(1, (1 << 24) // (grid.width * len(file.indexes)))  # about 16 million values at a time
    strips = (Window(row, 0, min(height, grid.height - row), grid.width) for row in range(0, grid.height, height))
    return not any(_read_window(opened.row, file, strip)[1].any() for strip in strips)


def overlaps(a: Grid, b: Grid) -> bool:
    """Whether two grids share any ground."""
    span = _span(a, b)
    return span is not None and span.bottom > 0 and span.right > 0 and span.top < b.height and span.left < b.width


def bounds_in(grid: Grid, other: Grid) -> Window | None:
    """The smallest window of `grid`, perhaps beyond its edges, that holds the ground of `other`; None without any."""
    span = _span(other, grid)
    if span is None:
        return None
    top, left = (math.floor(value + 1e-6) for value in (span.top, span.left))  # bits that differ are no pixel
    bottom, right = (math.ceil(value - 1e-6) for value in (span.bottom, span.right))
    return Window(top, left, bottom - top, right - left)
