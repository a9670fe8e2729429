"""Arrays to GeoTIFF files and back, footprints and coordinate changes: the thin layer over GDAL.

Formats: GeoTIFF (OGC 19-008r4) and Cloud-Optimised GeoTIFF (OGC 21-026).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.features
import rasterio.warp
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.shutil import copy as rio_copy
from rasterio.windows import Window as RasterWindow
from shapely.geometry import mapping

from shards.grid import Grid, Window
from shards.ground import cut

Transform = tuple[float, float, float, float, float, float]
Colormap = Mapping[int, tuple[int, int, int]]
CACHE = 128 << 20  # bytes of GDAL's blocks while a large file is written; by default, a twentieth of all memory


def write_geotiff(
    path: Path,
    values: NDArray[Any],
    *,
    crs: str | None,
    transform: Transform,
    nodata: float | None = None,
    descriptions: Sequence[str] = (),
    colormap: Colormap | None = None,
) -> None:
    """Write `values` [C, H, W] as a tiled, deflated GeoTIFF; the file appears whole or not at all.

    Args:
        path: where to; folders must exist.
        values: bands of one dtype that GeoTIFF knows (uint8, uint16, int16, float32, ...).
        crs: anything that PROJ understands ("EPSG:32633", WKT), or None.
        transform: the affine's (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f.
        nodata: the value that means "nothing here", in the units of `values`.
        descriptions: a name per band.
        colormap: class value -> (r, g, b), for one band of uint8.
    """
    options = {"compress": "deflate", "predictor": 3 if values.dtype.kind == "f" else 2, "zlevel": 6}
    if min(values.shape[1:]) >= 128:
        options |= {"tiled": True, "blockxsize": 128, "blockysize": 128}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with rasterio.open(
        temporary, "w", driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, crs=crs, transform=Affine(*transform), nodata=nodata, **options,
    ) as raster:  # fmt: skip
        raster.write(values)
        for band, name in enumerate(descriptions, 1):
            raster.set_band_description(band, name)
        if colormap is not None:
            raster.write_colormap(1, dict(colormap))
    os.replace(temporary, path)


def to_geotiff_bytes(values: NDArray[Any], crs: str | None, transform: Transform) -> bytes:
    """`values` [C, H, W] as a GeoTIFF of one block (deflate with predictor), for use inside other files."""
    options: dict[str, Any] = {"compress": "deflate", "predictor": 3 if values.dtype.kind == "f" else 2, "zlevel": 6}
    options |= {"blockysize": values.shape[1], "interleave": "band"}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2], dtype=values.dtype,
            crs=crs, transform=Affine(*transform), **options,
        ) as raster:  # fmt: skip
            raster.write(values)
        return bytes(memory.read())


def from_geotiff_bytes(data: bytes) -> NDArray[Any]:
    """Bands [C, H, W] of a GeoTIFF.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with warnings.catch_warnings(), MemoryFile(data) as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open() as raster:
                return np.asarray(raster.read())
    except RasterioError as error:
        raise ValueError(f"not a readable GeoTIFF ({len(data)} bytes): {error}") from None


def write_parts(
    path: Path,
    grid: Grid,
    parts: Iterable[tuple[Window, NDArray[np.uint8]]],
    *,
    nodata: int | None = None,
    descriptions: Sequence[str] = ("",),
    colormap: Colormap | None = None,
) -> None:
    """Write a tiled, deflated GeoTIFF of uint8 part by part, so that no more than one of them is in memory.

    Args:
        path: where to; not whole before this returns.
        grid: of the whole file.
        parts: windows of the grid and their values [C, h, w].
        nodata: as for `write_geotiff`.
        descriptions: a name per band, of which there are so many.
        colormap: as for `write_geotiff`.
    """
    options = {"compress": "deflate", "zlevel": 1, "tiled": True, "blockxsize": 512, "blockysize": 512}
    if colormap is None:
        options["photometric"] = "minisblack"  # or else the fourth of four bands would be their transparency
    with rasterio.Env(GDAL_CACHEMAX=CACHE), rasterio.open(
        path, "w", driver="GTiff", count=len(descriptions), height=grid.height, width=grid.width, dtype="uint8",
        crs=grid.crs, transform=Affine(*grid.transform), nodata=nodata, bigtiff="if_safer", **options,
    ) as raster:  # fmt: skip
        for band, name in enumerate(descriptions, 1):
            raster.set_band_description(band, name)
        if colormap is not None:
            raster.write_colormap(1, dict(colormap))
        for window, values in parts:
            raster.write(values, window=RasterWindow(window.col, window.row, window.width, window.height))


def read_classes(path: Path, largest: int | None = None) -> NDArray[np.uint8]:
    """The first band of a raster of classes, [H, W]; from its overviews, so that no side is over `largest` pixels."""
    with rasterio.open(path) as raster:
        step = max(1.0, max(raster.shape) / (largest or max(raster.shape)))
        return np.asarray(raster.read(1, out_shape=tuple(max(1, int(side / step)) for side in raster.shape)), np.uint8)


def to_cog(source: Path, target: Path, *, tags: Mapping[str, str] | None = None, resampling: str = "") -> None:
    """Copy a GeoTIFF to a Cloud-Optimised GeoTIFF with overviews.

    Args:
        source: any GeoTIFF; read only.
        target: replaced whole.
        tags: metadata items for the copy, such as the classes' names.
        resampling: of the overviews; nearest for uint8 and average otherwise when empty.
    """
    with rasterio.open(source) as raster:
        usual = "nearest" if raster.dtypes[0] == "uint8" else "average"
    if tags:
        with rasterio.open(source, "r+") as raster:
            raster.update_tags(**tags)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with rasterio.Env(GDAL_CACHEMAX=CACHE):
        rio_copy(
            source, temporary, driver="COG", compress="deflate", blocksize=256, overviews="AUTO",
            resampling=resampling or usual, bigtiff="if_safer",
        )  # fmt: skip
    os.replace(temporary, target)


def polygons(source: NDArray[np.uint8] | Path, transform: Transform | None = None) -> Iterator[tuple[int, Any]]:
    """Outlines of connected pixels of one value, side by side (4-connected); 0 is outside.

    Args:
        source: values [H, W], or a raster of them, which is read row by row.
        transform: of the values; in pixels (x = column, y = row) when None. A raster has its own.

    Yields:
        Value and GeoJSON polygon, with holes, along the edges of pixels.
    """
    if isinstance(source, Path):
        with rasterio.open(source) as raster:
            band = rasterio.band(raster, 1)
            for shape, value in rasterio.features.shapes(band, mask=band, transform=raster.transform):
                yield int(value), shape
    else:
        for shape, value in rasterio.features.shapes(
            source, mask=source != 0, transform=Affine(*(transform or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))
        ):
            yield int(value), shape


def to_lonlat(crs: str, geometries: Sequence[Any]) -> list[Any]:
    """GeoJSON geometries of `crs` in OGC:CRS84, cut at the date line, with 7 decimals (about 1 cm; RFC 7946, 11.2)."""
    return list(rasterio.warp.transform_geom(_crs(crs), _crs("OGC:CRS84"), list(geometries), precision=7))


def burn(polygons: Sequence[tuple[int, Any]], grid: Grid) -> NDArray[np.uint16]:
    """Numbered polygons (of the grid's CRS) as an image [H, W] of their numbers; 0 outside, later ones on top.

    Raises:
        ValueError: a number beyond 65,535.
    """
    if polygons and max(number for number, _ in polygons) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(polygons)} polygons in one label; at most 65535 can be numbered")
    out = np.zeros((grid.height, grid.width), np.uint16)
    if polygons:
        shapes = [(polygon, number) for number, polygon in polygons]
        rasterio.features.rasterize(shapes, out=out, transform=Affine(*grid.transform), dtype="uint16")
    return out


def utm_grid(source: Grid, metres: float) -> Grid:
    """The north-up grid of square pixels in the UTM zone of `source`'s middle that covers `source`.

    Its corner lies on a multiple of `metres`, so that the grids of neighbours fit together. Beyond 84 degrees north or
    80 south it is the polar stereographic grid of UPS (NGA.SIG.0012).

    Raises:
        ValueError: `source` has no CRS.
    """
    if source.crs is None:
        raise ValueError("a grid without CRS has no place on the ground, so no UTM zone")
    x, y = (np.array([value]) for value in source.xy(source.height / 2, source.width / 2))
    lon, lat = (float(values[0]) for values in transform_points(source.crs, "OGC:CRS84", x, y))
    zone = int((lon + 180) // 6) % 60 + 1
    crs = f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"
    if not -80 <= lat <= 84:
        crs = "EPSG:5041" if lat > 0 else "EPSG:5042"
    xs, ys = (np.array(values) for values in zip(*source.edge(), strict=True))
    xs, ys = transform_points(source.crs, crs, xs, ys)
    west, north = np.floor(xs.min() / metres) * metres, np.ceil(ys.max() / metres) * metres
    width, height = int(np.ceil((xs.max() - west) / metres)), int(np.ceil((north - ys.min()) / metres))
    return Grid((metres, 0.0, float(west), 0.0, -metres, float(north)), height, width, crs)


@lru_cache(maxsize=64)
def _crs(text: str) -> CRS:
    return CRS.from_user_input(text)  # slow, and the same few are asked for again and again


def is_geographic(crs: str) -> bool:
    """Whether coordinates of this CRS are degrees."""
    return bool(_crs(crs).is_geographic)


def transform_points(
    source: str, target: str, xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates `xs`, `ys` (any one shape) of the CRS `source` in the CRS `target`; x is easting or longitude."""
    shape = np.shape(xs)
    out = rasterio.warp.transform(_crs(source), _crs(target), xs.ravel(), ys.ravel())
    return np.asarray(out[0]).reshape(shape), np.asarray(out[1]).reshape(shape)


def footprint(crs: str, corners: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The polygon through `corners` of `crs` as a GeoJSON geometry in OGC:CRS84, cut in two at the date line."""
    steps = np.linspace(0.0, 1.0, 5)[:-1, None]  # a straight edge of a projected grid is a curve in degrees
    ring = [np.array(a) + steps * (np.array(b) - np.array(a)) for a, b in pairwise([*corners, corners[0]])]
    points = np.concatenate([*ring, [corners[0]]])
    lons, lats = transform_points(crs, "OGC:CRS84", points[:, 0], points[:, 1])
    if np.ptp(lons) < 180 and np.abs(lats).max() < 90:
        return {"type": "Polygon", "coordinates": [np.stack([lons, lats], axis=1).tolist()]}
    return dict(mapping(cut(lons, lats)))
