"""Raster: what tiles are read from. A file that GDAL opens, or an array taken out of a container."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.session import AWSSession
from rasterio.windows import Window as RasterWindow

from shards.grid import Grid, Window
from shards.scene import Asset, SceneError
from shards.store import open_store

CONTAINERS = (".zarr.zip", ".h5", ".parquet", ".tar")
# Bytes of decoded blocks, which is as good as none: of an answer that was cut short GDAL makes a block of zeros, and
# another attempt would find it in its cache.
CACHE = 512
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
REMOTE = ("s3://", "/vsicurl/")
ATTEMPTS = 8  # at a remote file, each after GDAL's own

T = TypeVar("T")
log = logging.getLogger(__name__)


class Raster(Protocol):
    """Bands of numbers on one grid.

    `names` are the bands' names ("" where the file does not tell), `dtype` holds the numbers of all bands, and
    `nodata` is the number that the file itself declares to mean "nothing measured".
    """

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def grid(self) -> Grid:
        """Where the pixels lie; its crs is None where the file does not tell."""

    @property
    def names(self) -> tuple[str, ...]:
        """A name or "" per band."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers."""

    @property
    def nodata(self) -> float | None:
        """The declared number, if any."""

    def read(self, indexes: Sequence[int], window: Window) -> NDArray[Any]:
        """Bands (from 1) of a window inside the raster, [C, h, w]; SceneError when the bytes are damaged."""

    def mask(self, indexes: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """Pixels [h, w] that the file's nodata value, masks and alpha band let through in all these bands."""


@dataclass(frozen=True)
class ArrayRaster:
    """A raster that is in memory: `values` [C, H, W] on `grid`."""

    name: str
    values: NDArray[Any]
    grid: Grid
    names: tuple[str, ...]
    nodata: float | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.values.dtype

    def read(self, indexes: Sequence[int], window: Window) -> NDArray[Any]:
        """Bands (from 1) of a window, [C, h, w]."""
        rows = slice(window.row, window.row + window.height)
        cols = slice(window.col, window.col + window.width)
        return self.values[[index - 1 for index in indexes], rows, cols]

    def mask(self, indexes: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """Pixels [h, w] in which no band holds the nodata value."""
        values = self.read(indexes, window)
        if self.nodata is None:
            return np.ones(values.shape[1:], np.bool_)
        return np.asarray((values != self.nodata).all(axis=0))


class _File:
    """A file that is open in GDAL. A remote one that fails is opened again: GDAL keeps what a cut connection left."""

    def __init__(self, path: str, memory: MemoryFile | None) -> None:
        self._open = memory.open if memory else partial(rasterio.open, path.replace("s3://", "/vsis3/", 1))
        self._path, self._reader = path, None
        self._attempts = ATTEMPTS if memory is None and path.startswith(REMOTE) else 1

    def ask(self, question: Callable[[DatasetReader], T]) -> T:
        """What a question to the reader gives; SceneError when the file is absent, unreadable or damaged."""
        for attempt in range(1, self._attempts + 1):
            try:
                if self._reader is None:
                    self._reader = self._open()
                return question(self._reader)
            except RasterioError as error:
                trouble = f"{'damaged' if self._reader else 'not readable'}: {error}"
                self.close()
            if attempt < self._attempts:
                self._look()
                log.info("%s: %s; opening it again", self._path, trouble)
        raise SceneError(self._path, trouble)

    def _look(self) -> None:
        """Waits until the server answers again, and tells better than GDAL what does not pass."""
        bucket, _, key = self._path.removeprefix("s3://").partition("/")
        if self._path.startswith("s3://") and not open_store(f"s3://{bucket}").exists(key):
            raise SceneError(self._path, "not found; check the address, and AWS_ENDPOINT_URL")

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class FileRaster:
    """A raster file that is open in GDAL. An alpha band is a mask, not a band."""

    def __init__(self, file: _File, name: str) -> None:
        self._file, self.name = file, name
        file.ask(self._describe)

    def _describe(self, reader: DatasetReader) -> None:
        if any("complex" in str(dtype) for dtype in reader.dtypes):
            raise SceneError(self.name, "holds complex values; detect it first (amplitude or intensity, then dB)")
        self._alpha = [i for i, kind in enumerate(reader.colorinterp, 1) if kind is ColorInterp.alpha]
        self._bands = [i for i, kind in enumerate(reader.colorinterp, 1) if kind is not ColorInterp.alpha]
        self._masked = any(flags != [MaskFlags.all_valid] for flags in reader.mask_flag_enums)
        self.names = tuple(reader.descriptions[i - 1] or "" for i in self._bands)
        self.dtype = np.result_type(*(reader.dtypes[i - 1] for i in self._bands))
        self.nodata = reader.nodata
        self.grid = _grid_of(reader, self.name)

    def read(self, indexes: Sequence[int], window: Window) -> NDArray[Any]:
        """Bands (from 1, alpha not counted) of a window, [C, h, w]."""
        return np.asarray(self._file.ask(lambda reader: reader.read(self._numbers(indexes), window=_part(window))))

    def mask(self, indexes: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """Pixels [h, w] that nodata, masks and alpha let through."""
        return self._file.ask(lambda reader: self._mask(reader, self._numbers(indexes), window))

    def _mask(self, reader: DatasetReader, numbers: Sequence[int], window: Window) -> NDArray[np.bool_]:
        found = np.ones((window.height, window.width), np.bool_)
        if self._masked:
            found &= (reader.read_masks(numbers, window=_part(window)) > 0).all(axis=0)
        if self._alpha:  # GDAL's masks know of alpha only in files of two or four bands
            found &= (reader.read(self._alpha, window=_part(window)) > 0).all(axis=0)
        return found

    def _numbers(self, indexes: Sequence[int]) -> list[int]:
        return [self._bands[index - 1] for index in indexes]


def _part(window: Window) -> RasterWindow:
    return RasterWindow(window.col, window.row, window.width, window.height)


def _grid_of(reader: DatasetReader, name: str) -> Grid:
    transform = tuple(reader.transform)[:6]
    if reader.crs is None:
        if reader.gcps[0]:
            raise SceneError(
                name, "lies on ground control points only; give it a grid first: gdalwarp -tps -t_srs EPSG:... IN OUT"
            )
        return Grid(transform, reader.height, reader.width, None)
    if not np.isfinite(transform).all() or math.isclose(transform[0] * transform[4] - transform[1] * transform[3], 0):
        raise SceneError(name, f"its transform {transform} is none; write it again with gdal_translate -a_ullr")
    code = reader.crs.to_epsg()
    return Grid(transform, reader.height, reader.width, f"EPSG:{code}" if code else reader.crs.to_wkt())


@contextmanager
def open_raster(asset: Asset) -> Iterator[Raster]:
    """An asset, open for reading.

    Raises:
        SceneError: it is missing, truncated, complex or not a raster.
    """
    if asset.path.endswith(CONTAINERS):
        from shards.containers import open_item

        with open_item(asset) as raster:
            yield raster
    else:
        with open_file(asset.path) as raster:
            yield raster


@contextmanager
def open_file(path: str, content: bytes | None = None) -> Iterator[FileRaster]:
    """A raster file by its path or s3:// address, or the `content` of one that is named `path` in messages."""
    with _environment(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # said by us where it matters
        with closing(_File(path, None if content is None else MemoryFile(content))) as file:
            yield FileRaster(file, path)


def _environment(path: str) -> rasterio.Env:
    if not path.startswith(REMOTE):
        return rasterio.Env(GDAL_CACHEMAX=CACHE)
    from shards.s3 import gdal_options, session

    credentials = AWSSession(session()) if path.startswith("s3://") else None
    return rasterio.Env(credentials, GDAL_CACHEMAX=CACHE, **gdal_options(path))
