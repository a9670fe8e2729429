"""Files as the benchmark archives have them, and what is made of them; for the tests of these archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import configs
from shards.raster_io import write_geotiff
from shards.scene import Place
from tests.archive_checks import built_samples, discover
from tests.scenes import ORIGIN, UTM, north_up

SIZE = 32


def put(
    path: Path, values: np.ndarray[Any, Any], metres: float = 10.0, east: float = 0.0, crs: str | None = UTM
) -> Path:
    """A GeoTIFF without descriptions and nodata, as in the real archives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_geotiff(path, values, crs=crs, transform=north_up(metres, ORIGIN[0] + east))
    return path


def optical(bands: int, size: int = SIZE, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(300, 4000, (bands, size, size)).astype(np.uint16)


def radar(dtype: type = np.float32, seed: int = 0, bands: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(-13, 3, (bands, SIZE, SIZE)).astype(dtype)


def codes(allowed: list[int], dtype: type = np.uint8, bands: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).choice(allowed, (bands, SIZE, SIZE)).astype(dtype)


def found(name: str, root: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Places by name, and why the rest was left out."""
    places, left_out = discover(name, root)
    return places, {item.name: item.reason for item in left_out}


def sensors(place: Place) -> list[str]:
    return [scene.sensor for scene in place.scenes]


def built(preset: str, root: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """The samples that a preset makes of an archive, by key."""
    settings = [f"archive.root={root}", f"out={out}", f"tile.size={SIZE}", "workers=1", *overrides]
    return built_samples(configs.load(preset, settings))


def merged(raw: np.ndarray[Any, Any], preset: str) -> np.ndarray[Any, Any]:
    """Class indices of codes by the preset's table, 255 for all others."""
    lookup = np.full(1000, 255, np.uint8)
    for code, index in configs.load(preset).label.table().items():
        lookup[code] = index
    return np.asarray(lookup[raw])
