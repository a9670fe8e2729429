"""Containers: files that hold many rasters. An asset's `item` says which one.

| path ends in | item                          | example                                       | is                    |
|--------------|-------------------------------|-----------------------------------------------|-----------------------|
| `.zarr.zip`  | ARRAY/INDEX/INDEX...          | `bands/12/3`: sample 12, date 3               | the other dimensions  |
| `.h5`        | DATASET/ROW                   | `sentinel2/4711`                              | one row               |
| `.parquet`   | ROW:COLUMN                    | `17:B04`                                      | a GeoTIFF in a cell   |
| `.tar`       | MEMBER or MEMBER@OFFSET+SIZE  | `place7.tif@1536+524288`                      | a GeoTIFF             |
|              | the same, then `:` and an     | `majortom_val_0000001.zarr.zip@512+9:bands/0` | a zarr zip as above   |
|              | array's item                  |                                               |                       |

Indices count from 0 and stand for the first dimensions of an array; what is left must be [y, x] or [band, y, x]. Rows
of parquet count through the whole file. OFFSET and SIZE are those of the member's data in the tar; with them no header
of the tar is looked at.

Only what is asked for is read: chunks of one array, one row, one column of one row group, one member. Grids come from
headers; pixels are read at the first look at them.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.grid import Grid, Window
from shards.raster import IDENTITY, ArrayRaster, Raster, open_file
from shards.scene import Asset, SceneError
from shards.zarr_zip import Array, NoCodecsError, Source, ZarrError, ZarrZip, open_zarr

ZARR = ".zarr.zip"
OPEN_FILES = 4  # whose footers or indexes are kept per process: one per sensor of an archive
SPACING = 1e-3  # of a pixel, by which coordinates may stray from a regular grid


@dataclass(frozen=True)
class LazyRaster:
    """A raster whose grid is known and whose values [C, H, W] are loaded at the first look at a pixel."""

    name: str
    load: Callable[[], NDArray[Any]]
    dtype: np.dtype[Any]
    grid: Grid
    names: tuple[str, ...]
    nodata: float | None = None

    @cached_property
    def _loaded(self) -> ArrayRaster:
        with readable(self.name):
            values = self.load().astype(self.dtype, copy=False)
        return ArrayRaster(self.name, values, self.grid, self.names, self.nodata)

    def read(self, indexes: Sequence[int], window: Window) -> NDArray[Any]:
        """Bands (from 1) of a window, [C, h, w]; SceneError when the bytes are damaged."""
        return self._loaded.read(indexes, window)

    def mask(self, indexes: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """Pixels [h, w] in which no band holds the nodata value."""
        return self._loaded.mask(indexes, window)


@contextmanager
def open_item(asset: Asset) -> Iterator[Raster]:
    """The raster that an asset names inside its container.

    Raises:
        SceneError: not a local file, a malformed item, no such part, damaged bytes, or a missing library (named).
    """
    name = f"{asset.path}/{asset.item}"
    if "://" in asset.path:
        raise SceneError(asset.path, "containers are read from local folders only; copy it first (aws s3 cp ...)")
    ending = next((ending for ending in _OPENERS if asset.path.endswith(ending)), None)
    if ending is None:
        raise SceneError(asset.path, f"is no container; those end in {', '.join(_OPENERS)}")
    with ExitStack() as stack:
        with readable(name):
            raster = _OPENERS[ending](asset, name, stack)
        yield raster


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns errors of the libraries that read containers into SceneError."""
    try:
        yield
    except SceneError:
        raise
    except (ZarrError, NoCodecsError) as error:
        raise SceneError(name, str(error)) from error
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
        raise SceneError(name, f"not readable: {error}") from error


def changed(path: str | Path) -> int:
    """When a file was last written, in nanoseconds: tells contents under one path apart."""
    return Path(path).stat().st_mtime_ns


def _zarr(asset: Asset, name: str, stack: ExitStack) -> Raster:
    source = Source(asset.path, changed=changed(asset.path))
    return zarr_raster(stack.enter_context(open_zarr(source)), asset.item, name)


def zarr_raster(group: ZarrZip, item: str, name: str) -> LazyRaster:
    """An array of a group, or the part of it at the item's indices, on the grid that the group's coordinates tell.

    The grid is taken from x and y (of pixel centres, in metres or degrees; `x_` and `y_` where each sample has its own)
    and an EPSG code in `crs` or WKT in `spatial_ref`. Without these the raster has no CRS.
    """
    array_name, *indices = item.split("/")
    array = group.array(array_name)
    if not all(index.isdecimal() for index in indices):
        raise SceneError(name, f"item {item!r}: write ARRAY/INDEX/INDEX, as in bands/12/3")
    at = {dim: int(index) for dim, index in enumerate(indices)}
    shape = array.shape[len(at) :]
    if len(shape) not in (2, 3):
        raise SceneError(name, f"{array_name} has the shape {array.shape}; {item!r} leaves {shape}, not [band, y, x]")
    dtype = np.dtype(np.float32) if array.dtype == np.float16 else array.dtype
    count, *size = (1, *shape)[-3:]
    return LazyRaster(
        name, lambda: group.read(array_name, at).reshape(count, *size), dtype, _grid(group, array, at, size, name),
        _band_names(group, count),
    )  # fmt: skip


def coordinate(group: ZarrZip, name: str, of: Array, at: Mapping[int, int]) -> NDArray[Any]:
    """A coordinate of a group at the indices `at` of the array `of`, matched by the names of dimensions."""
    named = {of.dims[dim]: index for dim, index in at.items() if of.dims[dim]}
    dims = group.array(name).dims
    return group.read(name, {dim: named[label] for dim, label in enumerate(dims) if label in named})


def _grid(group: ZarrZip, array: Array, at: Mapping[int, int], size: Sequence[int], name: str) -> Grid:
    x_name, y_name = ("x_", "y_") if "x_" in group else ("x", "y")
    crs = _crs(group, array, at)
    if crs is None or x_name not in group or y_name not in group:
        return Grid(IDENTITY, size[0], size[1], None)
    x, y = (coordinate(group, axis, array, at).astype(np.float64) for axis in (x_name, y_name))
    if (y.size, x.size) != tuple(size) or min(size) < 2:
        raise SceneError(name, f"its coordinates are for {y.size} x {x.size} pixels, its values {size[0]} x {size[1]}")
    (dx, left), (dy, top) = _axis(x, name), _axis(y, name)
    return Grid((dx, 0.0, left, 0.0, dy, top), size[0], size[1], crs)


def _axis(centres: NDArray[np.float64], name: str) -> tuple[float, float]:
    """Spacing, and where the first pixel begins."""
    step = float(centres[-1] - centres[0]) / (centres.size - 1)
    stray = np.abs(centres - (centres[0] + step * np.arange(centres.size))).max()
    if step == 0 or stray > SPACING * abs(step):
        raise SceneError(name, "its coordinates are not evenly spaced; warp it to a regular grid first")
    return step, float(centres[0]) - step / 2


def _crs(group: ZarrZip, array: Array, at: Mapping[int, int]) -> str | None:
    if "crs" in group:
        return f"EPSG:{int(coordinate(group, 'crs', array, at).reshape(-1)[0])}"
    attrs = group.array("spatial_ref").attrs if "spatial_ref" in group else {}
    found = attrs.get("crs_wkt") or attrs.get("spatial_ref")
    return str(found) if found else None


def _band_names(group: ZarrZip, count: int) -> tuple[str, ...]:
    if "band" in group and group.array("band").shape == (count,) and group.array("band").dtype.kind in "UO":
        return tuple(map(str, group.read("band")))
    return ("",) * count


def _h5(asset: Asset, name: str, stack: ExitStack) -> Raster:
    dataset_name, _, row = asset.item.rpartition("/")
    file = _h5_file(asset.path, changed(asset.path))
    if not dataset_name or not row.isdecimal():
        raise SceneError(name, f"item {asset.item!r}: write DATASET/ROW, as in sentinel2/4711")
    if dataset_name not in file:
        raise SceneError(name, f"has no dataset {dataset_name!r}; it has {', '.join(file)}")
    dataset = file[dataset_name]
    rows, *shape = dataset.shape
    if len(shape) not in (2, 3) or int(row) >= rows:
        raise SceneError(name, f"{dataset_name} has the shape {dataset.shape}: no [band, y, x] at row {row}")
    count, height, width = (1, *shape)[-3:]
    return LazyRaster(
        name, lambda: dataset[int(row)].reshape(count, height, width), dataset.dtype,
        Grid(IDENTITY, height, width, None), ("",) * count,
    )  # fmt: skip


@lru_cache(maxsize=OPEN_FILES)
def _h5_file(path: str, changed: int) -> Any:
    """An open file; opening one with millions of rows costs more than reading a row."""
    return load_h5py(path).File(path, "r", locking="best-effort")


def load_h5py(path: str) -> Any:
    """The library, or SceneError that says how to install it."""
    try:
        import h5py
    except ImportError as error:
        raise SceneError(path, "HDF5 needs h5py: pip install 'mcf-mamba[h5]'") from error
    return h5py


def _parquet(asset: Asset, name: str, stack: ExitStack) -> Raster:
    import pyarrow as pa

    row, _, column = asset.item.partition(":")
    if not row.isdecimal() or not column:
        raise SceneError(name, f"item {asset.item!r}: write ROW:COLUMN, as in 17:B04")
    try:
        content = _cell(asset.path, int(row), column)
    except pa.ArrowException as error:
        raise SceneError(name, f"damaged: {error}") from error
    if content is None:
        raise SceneError(name, "the cell is empty")
    return stack.enter_context(open_file(name, content))


def _cell(path: str, row: int, column: str) -> bytes | None:
    import pyarrow.parquet as pq

    footer, ends = _footer(path, changed(path))
    if column not in footer.schema.names:
        raise SceneError(path, f"has no column {column!r}; it has {', '.join(footer.schema.names)}")
    group = int(np.searchsorted(ends, row, side="right"))
    if group == len(ends):
        raise SceneError(path, f"has {footer.num_rows} rows, so none is number {row}")
    with pq.ParquetFile(path, metadata=footer) as file:
        cells = file.read_row_group(group, columns=[column]).column(0)
    content: bytes | None = cells[row - int(ends[group]) + len(cells)].as_py()
    return content


@lru_cache(maxsize=OPEN_FILES)
def _footer(path: str, changed: int) -> tuple[Any, NDArray[np.int64]]:
    """What parquet says of its row groups, and where each ends; costly with thousands of columns of row groups."""
    import pyarrow.parquet as pq

    footer = pq.read_metadata(path)
    return footer, np.cumsum([footer.row_group(i).num_rows for i in range(footer.num_row_groups)])


def _tar(asset: Asset, name: str, stack: ExitStack) -> Raster:
    member, colon, part = asset.item.partition(":")
    source = _member(asset.path, member, name)
    if colon:
        return zarr_raster(stack.enter_context(open_zarr(source)), part, name)
    with source.open() as file:
        return stack.enter_context(open_file(name, file.read()))


def _member(path: str, item: str, name: str) -> Source:
    _, at, extent = item.rpartition("@")
    offset, plus, size = extent.partition("+")
    if at and plus and offset.isdecimal() and size.isdecimal():
        return Source(path, int(offset), int(size), changed(path))
    members = tar_index(path)
    if item not in members:
        raise SceneError(name, f"the tar has no member {item!r} among {len(members)}: {sorted(members)[:3]} ...")
    return Source(path, *members[item], changed(path))


def tar_index(path: str | Path) -> dict[str, tuple[int, int]]:
    """Offset and size of the data of every file in a tar, by name, in the tar's order; looks at headers alone.

    Raises:
        SceneError: it is compressed, truncated or no tar.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    except (tarfile.TarError, OSError) as error:
        raise SceneError(str(path), f"not readable as an uncompressed tar: {error}") from error


_OPENERS: Mapping[str, Callable[[Asset, str, ExitStack], Raster]] = {
    ZARR: _zarr, ".h5": _h5, ".parquet": _parquet, ".tar": _tar,
}  # fmt: skip
