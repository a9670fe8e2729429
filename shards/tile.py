"""read_tile: one modality of one window, on the window's own grid, with the validity of every pixel.

Where the file's grid is the window's grid, pixels are read as they lie. Everything else is warped: the part of the file
under the window is read with a margin, invalid pixels are taken out first, and GDAL's warper resamples the rest, so
that an invalid pixel never leaks into a valid one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio.transform
import rasterio.warp
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow

from shards.grid import Grid, Window
from shards.sample import Tile
from shards.scene import LABEL, Scene, SceneError, grid_of, open_raster
from shards.sensors import SENSORS

MARGIN = 3  # source pixels around a window, enough for a bicubic kernel


@dataclass(frozen=True)
class OpenScene:
    """A scene whose files are open: per file the raster, its grid, and which bands (1-based) to read as which names."""

    scene: Scene
    files: tuple[tuple[DatasetReader, Grid, tuple[int, ...], tuple[str, ...]], ...]

    @property
    def bands(self) -> tuple[str, ...]:
        """The sensor's bands, or one for a label."""
        return SENSORS[self.scene.sensor].band_names if self.scene.sensor != LABEL else (LABEL,)

    @property
    def grid(self) -> Grid:
        """The grid of the file with the smallest pixels."""
        return min((grid for _, grid, _, _ in self.files), key=lambda grid: grid.resolution)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of all files."""
        return np.result_type(*(raster.dtypes[0] for raster, _, _, _ in self.files))


@contextmanager
def open_scene(scene: Scene) -> Iterator[OpenScene]:
    """Open every file of a scene and check that its bands are all there.

    Raises:
        SceneError: a file that cannot be read or has no CRS, a missing or unknown band, complex values.
    """
    with ExitStack() as stack:
        files = []
        for asset in scene.assets:
            raster = stack.enter_context(open_raster(asset.path))
            if raster.dtypes[0].startswith("complex"):
                raise SceneError(asset.path, "holds complex values; detect them first (amplitude or intensity in dB)")
            files.append((raster, grid_of(raster), *_bands(scene, raster, asset.bands)))
        opened = OpenScene(scene, tuple(files))
        found = {name for _, _, _, names in opened.files for name in names}
        if missing := [name for name in opened.bands if name not in found]:
            raise SceneError(scene.path, f"{scene.sensor} needs bands {', '.join(opened.bands)}; missing {missing}")
        yield opened


def _bands(scene: Scene, raster: DatasetReader, named: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which bands of a file to read, and their names: from the archive, the descriptions, or the sensor's order."""
    if scene.sensor == LABEL:
        return (1,), (LABEL,)
    wanted = SENSORS[scene.sensor].band_names
    described = tuple(name or "" for name in raster.descriptions)
    names = named or (described if set(wanted) & set(described) else wanted)
    if len(names) != raster.count:
        raise SceneError(
            raster.name,
            f"has {raster.count} bands where {scene.sensor} has {len(names)} ({', '.join(names)}); "
            "describe its bands, or name them in the catalog's band column",
        )
    if unknown := [name for name in names if named and name not in wanted]:
        raise SceneError(raster.name, f"unknown bands {unknown}; {scene.sensor} has {', '.join(wanted)}")
    chosen = [(i, name) for i, name in enumerate(names, 1) if name in wanted]
    return tuple(i for i, _ in chosen), tuple(name for _, name in chosen)


def read_tile(opened: OpenScene, grid: Grid) -> Tile:
    """Values and validity of a scene on `grid`.

    Returns:
        A tile with values [C, H, W] in the file's dtype, 0 where invalid; pixels outside the scene are invalid.

    Raises:
        SceneError: the file is damaged.
    """
    shape = (grid.height, grid.width)
    values = np.zeros((len(opened.bands), *shape), opened.dtype)
    valid = np.ones(shape, np.bool_)
    for raster, source, indexes, names in opened.files:
        try:
            part, seen = _read(opened.scene, raster, source, indexes, grid)
        except RasterioError as error:
            raise SceneError(raster.name, f"damaged: {error}") from error
        for name, band in zip(names, part, strict=True):
            values[opened.bands.index(name)] = band
        valid &= seen
    values[:, ~valid] = 0
    return Tile(values, valid, opened.scene.time)


def _read(
    scene: Scene, raster: DatasetReader, source: Grid, indexes: tuple[int, ...], grid: Grid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    window = grid.inside(source)
    if window is not None:
        return _read_window(scene, raster, indexes, window)
    under = _window_under(grid, source)
    if under is None:
        shape = (grid.height, grid.width)
        return np.zeros((len(indexes), *shape), raster.dtypes[0]), np.zeros(shape, np.bool_)
    values, valid = _read_window(scene, raster, indexes, under)
    return _warp(scene, values, valid, source.window(under), grid)


def _read_window(
    scene: Scene, raster: DatasetReader, indexes: tuple[int, ...], window: Window
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Pixels of a window as they lie; the part beyond the raster's edge is invalid."""
    values = np.zeros((len(indexes), window.height, window.width), raster.dtypes[0])
    valid = np.zeros(values.shape[1:], np.bool_)
    top, left = max(window.row, 0), max(window.col, 0)
    bottom = min(window.row + window.height, raster.height)
    right = min(window.col + window.width, raster.width)
    if top < bottom and left < right:
        part = RasterWindow(left, top, right - left, bottom - top)
        rows = slice(top - window.row, bottom - window.row)
        cols = slice(left - window.col, right - window.col)
        values[:, rows, cols] = raster.read(list(indexes), window=part)
        valid[rows, cols] = _validity(scene, raster, indexes, part, values[:, rows, cols])
    return values, valid


def _validity(
    scene: Scene, raster: DatasetReader, indexes: tuple[int, ...], part: RasterWindow, values: NDArray[Any]
) -> NDArray[np.bool_]:
    """Pixels that hold a measurement: by the file's masks, by NaN, and by the sensor's own nodata value.

    Where the tagged value is the sensor's own (0 in Sentinel-2), a pixel counts as empty only if all its bands hold
    it: a dark band may well be 0 beside others that are not.
    """
    own = SENSORS[scene.sensor].nodata if scene.sensor != LABEL else None
    valid = np.ones(values.shape[1:], np.bool_)
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    if own is not None:
        valid &= (values != own).any(axis=0)
    if raster.nodata is None or raster.nodata != own:
        valid &= (raster.read_masks(list(indexes), window=part) > 0).all(axis=0)
    return valid


def _window_under(grid: Grid, source: Grid) -> Window | None:
    """The part of `source` that lies under `grid`, with a margin; None when they do not meet."""
    steps = np.linspace(0.0, 1.0, 9)
    edge = [(t * grid.height, c) for t in steps for c in (0, grid.width)]
    edge += [(r, t * grid.width) for t in steps for r in (0, grid.height)]
    xs, ys = zip(*(grid.xy(row, col) for row, col in edge), strict=True)
    if grid.crs != source.crs:
        xs, ys = rasterio.warp.transform(grid.crs, source.crs, xs, ys)
    if not np.isfinite([*xs, *ys]).all():
        return None
    rows, cols = zip(*(source.rowcol(x, y) for x, y in zip(xs, ys, strict=True)), strict=True)
    top, left = max(math.floor(min(rows)) - MARGIN, 0), max(math.floor(min(cols)) - MARGIN, 0)
    bottom = min(math.ceil(max(rows)) + MARGIN, source.height)
    right = min(math.ceil(max(cols)) + MARGIN, source.width)
    return Window(top, left, bottom - top, right - left) if top < bottom and left < right else None


def _warp(
    scene: Scene, values: NDArray[Any], valid: NDArray[np.bool_], source: Grid, grid: Grid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Resample by the sensor's rule; a target pixel is valid where the warper found valid source pixels."""
    rule = SENSORS[scene.sensor].resampling if scene.sensor != LABEL else "nearest"
    exact = (
        np.float64
        if values.dtype.itemsize > 4 or (values.dtype.kind in "iu" and values.dtype.itemsize > 2)
        else np.float32
    )
    floats = values.astype(exact)
    floats[:, ~valid] = np.nan
    out = np.full((values.shape[0], grid.height, grid.width), np.nan, exact)
    rasterio.warp.reproject(
        floats, out, src_transform=Affine(*source.transform), src_crs=CRS.from_user_input(source.crs),
        dst_transform=Affine(*grid.transform), dst_crs=CRS.from_user_input(grid.crs),
        src_nodata=np.nan, dst_nodata=np.nan, resampling=Resampling[rule],
    )  # fmt: skip
    seen = np.isfinite(out).all(axis=0)
    out[:, ~seen] = 0
    return (np.rint(out) if values.dtype.kind in "iu" else out).astype(values.dtype), seen


def is_empty(opened: OpenScene) -> bool:
    """Whether a scene holds no valid pixel at all, by a look at strips of it from top to bottom."""
    raster, grid, indexes, _ = opened.files[0]
    height = max(1, (1 << 24) // (grid.width * len(indexes)))  # about 16 million values at a time
    strips = (Window(row, 0, min(height, grid.height - row), grid.width) for row in range(0, grid.height, height))
    try:
        return not any(_read_window(opened.scene, raster, indexes, strip)[1].any() for strip in strips)
    except RasterioError as error:
        raise SceneError(raster.name, f"damaged: {error}") from error


def overlaps(a: Grid, b: Grid) -> bool:
    """Whether two grids share any ground."""
    return _window_under(a, b) is not None
