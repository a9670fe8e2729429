"""Pairs of optical and radar tiles, real and made up, and shifts to plant in them; for tests and the benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.warp import Resampling, reproject
from scipy import ndimage

from shards.register import Shift, shift, stand_ins
from shards.sample import Tile
from shards.synthetic.instruments import Raster, optical, radar
from shards.synthetic.landscape import landscape
from shards.synthetic.site import site

TERRAMESH = ("282D_485L_3_3", "38D_378R_2_3", "609U_541L_3_0")
BIGEARTHNET = ("33UUP_87_48", "35VPK_69_24", "29SND_56_35")


@dataclass(frozen=True)
class Pair:
    """Tiles of one place, with the bands that stand for each."""

    name: str
    optical: Tile
    radar: Tile
    optical_bands: tuple[int, ...]
    radar_bands: tuple[int, ...]

    def shift(self) -> Shift | None:
        return shift(self.optical, self.radar, self.optical_bands, self.radar_bands)

    def window(self, row: int, col: int, size: int) -> Pair:
        return replace(self, optical=cut(self.optical, row, col, size), radar=cut(self.radar, row, col, size))

    def planted(self, rows: float, cols: float) -> Pair:
        return replace(self, radar=moved(self.radar, rows, cols))


def cut(tile: Tile, row: int, col: int, size: int) -> Tile:
    part = slice(row, row + size), slice(col, col + size)
    return Tile(tile.values[:, *part], tile.valid[part])


def moved(tile: Tile, rows: float, cols: float) -> Tile:
    """Content moved down by `rows` and right by `cols`, by cubic splines; what touches a hole or edge is invalid."""
    middle = tile.values[:, tile.valid].mean(axis=1)[:, None, None]
    filled = np.where(tile.valid, tile.values, middle).astype(np.float64)
    values = np.stack([ndimage.shift(band, (rows, cols), order=3, mode="nearest") for band in filled])
    holes = ndimage.shift((~tile.valid).astype(np.float64), (rows, cols), order=1, mode="constant", cval=1) > 0.01
    valid = ~ndimage.binary_dilation(holes, np.ones((5, 5)))
    return Tile(np.where(valid, values, 0).astype(np.float32), valid)


def planted_shifts(seed: int = 0) -> list[tuple[float, float]]:
    """Four of 0.5, 1, 2, 4 and 8 pixels each, in random directions."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, (5, 4))
    lengths = np.array([0.5, 1, 2, 4, 8])[:, None]
    return list(zip((lengths * np.sin(angles)).ravel(), (lengths * np.cos(angles)).ravel(), strict=True))


def distance(found: Shift, rows: float, cols: float) -> float:
    return float(np.hypot(found.rows - rows, found.cols - cols))


def _read(paths: Sequence[Path]) -> NDArray[Any]:
    bands = []
    for path in paths:
        with rasterio.open(path) as raster:
            bands.append(raster.read().astype(np.float32))
    return np.concatenate(bands)


def _tile(values: NDArray[Any], valid: NDArray[np.bool_]) -> Tile:
    return Tile(np.where(valid, values, 0), valid)


def real_pairs(folder: Path) -> list[Pair]:
    """Three pairs of TerraMesh (224 px), three of BigEarthNet (120 px), one of SpaceNet 6 (200 px, 39 % empty)."""
    pairs, paired = [], folder / "paired"
    for name in TERRAMESH:
        values = _read([paired / "terramesh/S2L2A" / f"{name}.tif"])
        radar_values = _read([paired / "terramesh/S1RTC" / f"{name}.tif"])
        tiles = _tile(values, (values != 0).any(0)), _tile(radar_values, np.isfinite(radar_values).all(0))
        pairs.append(Pair(f"TerraMesh {name}", *tiles, stand_ins("s2-l2a"), stand_ins("s1")))
    for name in BIGEARTHNET:
        root, spot = paired / "bigearthnet_v1_examples", name.split("_", 1)[1]
        values = _read([next(root.glob(f"S2/*{spot}/*_{band}.tif")) for band in ("B04", "B03", "B02")])
        radar_values = _read([next(root.glob(f"S1/*{name}/*_{band}.tif")) for band in ("VV", "VH")])
        tiles = _tile(values, (values != 0).any(0)), _tile(radar_values, np.isfinite(radar_values).all(0))
        pairs.append(Pair(f"BigEarthNet {name}", *tiles, (), ()))
    root = paired / "spacenet6_rotterdam_crops"
    values, radar_values = _read([root / "rgb_unmasked.tif"]), _read([root / "sar_masked.tif"])
    tiles = _tile(values, np.ones(values.shape[1:], np.bool_)), _tile(radar_values, np.isfinite(radar_values).all(0))
    pairs.append(Pair("SpaceNet 6 Rotterdam", *tiles, (), stand_ins("sar-quadpol")))
    return pairs


def _on_grid(raster: Raster, crs: str, transform: Affine, size: int) -> Tile:
    values = np.full((len(raster.values), size, size), np.nan, np.float32)
    reproject(
        raster.values, values, src_transform=Affine(*raster.transform), src_crs=raster.crs, src_nodata=np.nan,
        dst_transform=transform, dst_crs=crs, dst_nodata=np.nan, resampling=Resampling.bilinear,
    )  # fmt: skip
    return _tile(values, np.isfinite(values).all(0))


def made_up_pairs(
    shifts: Sequence[tuple[float, float]], size: int = 192, seed: int = 0
) -> Iterator[tuple[Pair, float, float]]:
    """One place of the made-up archive for each shift: what the radar saw, read from a grid that lies off by it."""
    for number, (rows, cols) in enumerate(shifts):
        place = site(seed, number, size)
        land = landscape(seed, number, size + 2 * place.margin, place.region.climate, place.day)
        seen = optical(place, land)
        grid = Affine(*seen.transform)
        tile = _on_grid(radar(place, land), seen.crs, grid @ Affine.translation(-cols, -rows), size)
        bands = stand_ins("s2-l1c"), stand_ins("s1")
        yield Pair(place.name, Tile(seen.values, (seen.values != 0).any(0)), tile, *bands), rows, cols
