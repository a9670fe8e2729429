"""Files as the benchmark archives have them, and what is made of them; for the tests of these archives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely

import configs
from shards.grid import Grid
from shards.raster_io import burn, write_geotiff
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


# --- trees from which something can be learnt -------------------------------------------------------------------------


def cover(seed: int, classes: int, size: int = SIZE) -> np.ndarray[Any, Any]:
    """Class indices [H, W]: squares of 8 pixels, each of a class drawn by `seed`."""
    squares = np.random.default_rng(seed).integers(0, classes, (size // 8, size // 8))
    return np.kron(squares, np.ones((8, 8), int))


def seen_from_above(covers: np.ndarray[Any, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Sentinel-2 and -1 of class indices [H, W]: every class has its own brightness in every band."""
    rng = np.random.default_rng(seed)
    s2 = 400 + 300 * covers + rng.normal(0, 40, (13, *covers.shape))
    s1 = -22 + 2.0 * covers + rng.normal(0, 0.4, (2, *covers.shape))
    return {"s2": s2.astype(np.uint16), "s1": s1.astype(np.float32)}


def dfc2020_patch(root: Path, folder: str, scene: str, number: int, token: str = "", kinds: str = "s1 s2 dfc") -> None:
    """A patch of DFC2020 whose images tell its labels; patches stand 1 km apart, in a row for each scene."""
    of_class = np.array([1, 2, 4, 5, 6, 7, 9, 10])
    covers = cover(number, len(of_class))
    values = {**seen_from_above(covers, number), "dfc": of_class[covers][None].astype(np.uint8)}
    values["dfc"][:, :2] = 3  # savanna, which is ignored
    values["lc"] = np.repeat(values["dfc"], 4, 0)
    for kind in kinds.split():
        where = root / folder / f"{kind}_{token or scene}" / f"{folder}_{kind}_{scene}_p{number}.tif"
        put(where, values[kind], east=1000.0 * number + (500_000 if "validation" in folder else 0))


def hunan_tile(root: Path, split: str, number: int) -> None:
    """A tile of Hunan whose images tell its labels; code 11 is in a corner, where it looks like 'others' (code 7)."""
    of_class = np.array([1, 2, 3, 5, 6, 9, 7])
    covers = cover(number, len(of_class))
    covers[:8, :8] = 6
    labels = of_class[covers].astype(np.uint8)
    labels[:8, :8] = 11
    topo = np.stack([50.0 + 100.0 * covers, np.zeros_like(covers)]).astype(np.float32)
    files = {**seen_from_above(covers, number), "topo": topo, "lc": labels[None]}
    for kind, values in files.items():
        put(root / split / kind / f"{kind}_{number}.tif", values, crs=None)


def spacenet6_tile(
    root: Path, strip: str, number: int, west: float, *, split: str = "Train", houses: int | None = 2, size: int = 64
) -> None:
    """A tile of SpaceNet 6 at 0.5 m, in whose images buildings are bright; without GeoJSON when `houses` is None."""
    rings = [
        [[x, y], [x + 10, y], [x + 10, y - 5], [x, y - 5], [x, y]]
        for x, y in ((west + 3 + 14 * n, 5_748_000.0 - 4 - 8 * n) for n in range(houses or 0))
    ]
    small = [[west + 1, 5_747_970.0], [west + 3, 5_747_970.0], [west + 3, 5_747_968.0], [west + 1, 5_747_970.0]]
    grid = Grid((0.5, 0.0, west, 0.0, -0.5, 5_748_000.0), size, size, "EPSG:32631")
    built_up = burn([(1, shapely.Polygon(ring)) for ring in rings], grid) > 0
    rng = np.random.default_rng(number)
    sar = 12 + 8.0 * built_up + rng.normal(0, 0.5, (4, size, size))
    sar[:, :, :4] = 0  # beyond the strip's edge
    rgbnir = 300 + 200 * built_up + rng.normal(0, 20, (4, size, size))
    files: dict[str, np.ndarray[Any, Any]] = {
        "SAR-Intensity": sar.astype(np.float32),
        "PS-RGBNIR": rgbnir.astype(np.uint16),
    }
    folder = root / {"Train": "train", "Test_Public": "test_public"}[split] / "AOI_11_Rotterdam"
    name = f"SN6_{split}_AOI_11_Rotterdam_{{}}_{strip}_tile_{number}"
    for kind, values in files.items():
        if split == "Train" or kind == "SAR-Intensity":
            path = folder / kind / f"{name.format(kind)}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_geotiff(path, values, crs=grid.crs, transform=grid.transform)
    if split == "Train" and houses is not None:
        path = folder / "geojson_buildings" / f"{name.format('Buildings')}.geojson"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = [{"type": "Polygon", "coordinates": [ring]} for ring in (*rings, *([small] if houses else []))]
        features = [{"type": "Feature", "properties": {}, "geometry": geometry} for geometry in drawn]
        crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32631"}}
        path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
