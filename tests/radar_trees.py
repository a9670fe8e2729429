"""GeoTIFFs of calibrated Sentinel-1 images on the ground of the products of `safe_trees`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from shards.raster_io import write_geotiff
from tests.safe_trees import ORIGIN, SIZE, UTM34

GAMMA0 = "S1A_IW_20230823T163131_DVP_RTC10_G_gpuned_1A2B"  # HyP3, power


def radar(
    path: Path, bands: tuple[str, ...] = ("",), *, values: np.ndarray | None = None, east: float = 0.0, **options: Any
) -> Path:
    """A GeoTIFF of backscatter; `bands` are the descriptions, `east` metres off the tile's corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(len(path.name)).uniform(0.01, 1, (len(bands), SIZE, SIZE)).astype(np.float32)
    options = {"crs": UTM34, "transform": (10.0, 0.0, ORIGIN[0] + east, 0.0, -10.0, ORIGIN[1]), **options}
    write_geotiff(path, values, descriptions=bands, **options)
    return path


def hyp3(root: Path, name: str = GAMMA0, **options: Any) -> dict[str, np.ndarray]:
    """VV and VH of one HyP3 product."""
    numbers = {}
    for band in ("VV", "VH"):
        path = radar(root / name / f"{name}_{band}.tif", **options)
        with rasterio.open(path) as raster:
            numbers[band] = raster.read(1)
    return numbers
