"""Small GeoTIFF scenes and catalogs for the tests of the shards floor."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

import configs
from shards.raster_io import write_geotiff
from shards.sensors import SENSORS

UTM = "EPSG:32633"
ORIGIN = (500000.0, 5300000.0)


def north_up(
    metres: float, x: float = ORIGIN[0], y: float = ORIGIN[1]
) -> tuple[float, float, float, float, float, float]:
    """Transform of a raster whose upper left corner is at (x, y)."""
    return (metres, 0.0, x, 0.0, -metres, y)


def write_scene(path: Path, sensor: str, size: int = 96, metres: float = 10.0, **options: Any) -> Path:
    """A scene of random values; `values`, `transform`, `crs`, `nodata` replace the defaults."""
    rng = np.random.default_rng(len(sensor))
    if sensor == "label":
        values = rng.integers(0, 3, (1, size, size)).astype(np.uint8)
        names: tuple[str, ...] = ()
    else:
        names = SENSORS[sensor].band_names
        shape = (len(names), size, size)
        if SENSORS[sensor].kind == "optical":
            values = rng.integers(500, 4000, shape).astype(np.uint16)
        else:
            values = rng.normal(-12 if sensor == "s1" else 300, 3, shape).astype(np.float32)
    values = options.pop("values", values)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crs": UTM, "transform": north_up(metres), "descriptions": names, **options}
    write_geotiff(path, values, **options)
    return path


def write_catalog(root: Path, rows: list[dict[str, str]]) -> Path:
    """catalog.csv with these rows."""
    columns = list(dict.fromkeys(["place", "sensor", "href", *(key for row in rows for key in row)]))
    with (root / "catalog.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    return root / "catalog.csv"


def make_archive(
    root: Path, places: int = 3, sensors: tuple[str, ...] = ("s2-l2a", "s1", "label")
) -> list[dict[str, str]]:
    """Places side by side, 96 px each, with a catalog; returns its rows."""
    rows = []
    for number in range(places):
        for sensor in sensors:
            href = f"place{number}/{sensor}.tif"
            where = north_up(10.0, ORIGIN[0] + 5000 * number)
            write_scene(root / href, sensor, transform=where)
            split = "test" if number == places - 1 else "train"
            rows.append({"place": f"place{number}", "sensor": sensor, "href": href, "split": split})
    write_catalog(root, rows)
    return rows


def shards_config(root: Path, out: Path | str, *overrides: str) -> Any:
    """A config that builds tiles of 32 px from an archive of `make_archive`."""
    raw = {
        "stage": "shards",
        "archive": {"root": str(root)},
        "out": str(out),
        "sensors": ["s2-l2a", "s1"],
        "label": {"names": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]},
        "tile": {"size": 32},
        "samples_per_shard": 5,
    }
    for text in overrides:
        configs._override(raw, text)
    return configs.parse(raw)
