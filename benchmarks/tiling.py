"""Tiling: scenes to tiles against reading them whole and slicing, to shards, by processes, and memory by archive size.

The peers do the least that anyone must: decode every pixel once with rasterio (and reproject it as one piece), then
copy tiles out of the array. Ours opens and checks the files, reads the same pixels window by window, finds out which
are valid, and makes samples with footprints. What a build does besides (shifts, statistics, encoding, hashes) is in the
rows of whole builds.
"""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import rasterio
import rasterio.warp
from affine import Affine
from numpy.typing import NDArray

import configs
from benchmarks.timing import compare
from benchmarks.training import in_new_process, peak
from shards.build import _view_samples as samples_of_a_view
from shards.build import build
from shards.plan import plan
from shards.sample import Sample, encode
from shards.sensors import SENSORS

PIXELS, TILE, SCENES = 4096, 256, 8
ORIGIN = (500000.0, 5300000.0)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiled": {"tiled": True, "blockxsize": 256, "blockysize": 256},
    "striped": {"blockysize": 1},
    "tiled, deflate": {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "predictor": 2},
    "striped, deflate": {"blockysize": 1, "compress": "deflate", "predictor": 2},
}
SHIFTED = (3.3, 7.1)  # metres between the grids of the two sensors in the rows that warp


def run() -> None:
    """One table per kind of file; every function handles the same pixels."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for layout, options in LAYOUTS.items():
            scenes = _scenes(folder, PIXELS, 12, **options)
            compare(
                f"S2 + S1, {PIXELS} x {PIXELS}, one grid, {layout}, tiles of {TILE}",
                {
                    "read whole and slice": partial(_whole, scenes),
                    "tiles": partial(_tiles, folder, scenes),
                    "tiles, encoded": partial(_encoded, folder, scenes),
                },
            )
        _build(folder, scenes)
        scenes = _scenes(folder, PIXELS, 12, shift=SHIFTED, **LAYOUTS["tiled"])
        compare(
            f"S2 + S1 on a grid of its own, {PIXELS} x {PIXELS}",
            {
                "read and reproject whole, slice": partial(_reprojected, scenes),
                "tiles": partial(_tiles, folder, scenes),
            },
        )
        scenes = _jpeg2000(folder, 2048)
        compare(
            "S2 as JPEG 2000, 10, 20 and 60 m bands, 2048 x 2048",
            {"decode every band": partial(_decoded, scenes), "tiles": partial(_tiles, folder, scenes)},
        )
    print("\nPeak memory of a build, a process each, 512 x 512 scenes of S2 + S1")
    for count in (10, 1000):
        print(f"  {count:5d} scenes {in_new_process(_peak_of_a_build, count):9.1f} MiB", flush=True)


Scenes = dict[str, list[tuple[Path, tuple[str, ...]]]]


def _image(bands: int, pixels: int, low: float, high: float, dtype: str) -> NDArray[Any]:
    """Fields with edges and some noise, which compress about as scenes do."""
    rng = np.random.default_rng(bands)
    rows, cols = np.mgrid[:pixels, :pixels].astype(np.float32)
    land = np.sin(rows / 37) * np.cos(cols / 53) + ((rows // 96 + cols // 128) % 3) / 2
    noise = rng.normal(0, 0.02, (pixels, pixels)).astype(np.float32)
    unit = np.clip((land + noise + 1) / 3.1, 0, 1)
    return np.stack([low + (high - low) * unit * (1 - 0.03 * band) for band in range(bands)]).astype(dtype)


def _write(
    path: Path, values: NDArray[Any], metres: float, shift: tuple[float, float] = (0, 0), **options: Any
) -> None:
    transform = Affine(metres, 0, ORIGIN[0] + shift[0], 0, -metres, ORIGIN[1] + shift[1])
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    options = {"driver": "GTiff", "crs": "EPSG:32633", "transform": transform, **shape, **options}
    if values.dtype.kind == "f" and "predictor" in options:
        options["predictor"] = 3
    with rasterio.open(path, "w", **options) as raster:
        raster.write(values)


def _scenes(folder: Path, pixels: int, bands: int, shift: tuple[float, float] = (0, 0), **options: Any) -> Scenes:
    _write(folder / "s2.tif", _image(bands, pixels, 200, 4000, "uint16"), 10.0, **options)
    _write(folder / "s1.tif", _image(2, pixels, -24, -2, "float32"), 10.0, shift, **options)
    return {"s2-l2a": [(folder / "s2.tif", ())], "s1": [(folder / "s1.tif", ())]}


def _jpeg2000(folder: Path, pixels: int) -> Scenes:
    """A file per band in blocks of 1,024 pixels, lossless, as Sentinel-2 products have them."""
    options = {"driver": "JP2OpenJPEG", "quality": "100", "reversible": "YES", "blockxsize": 1024, "blockysize": 1024}
    found = []
    for number, band in enumerate(SENSORS["s2-l2a"].bands):
        path = folder / f"{band.name}.jp2"
        values = _image(1, round(pixels * 10 / band.resolution), 200 + number, 4000, "uint16")
        _write(path, values, band.resolution, **options)
        found.append((path, (band.name,)))
    return {"s2-l2a": found}


def _slices(values: NDArray[Any]) -> int:
    starts = range(0, values.shape[1], TILE)
    return sum(np.ascontiguousarray(values[:, r : r + TILE, c : c + TILE]).nbytes for r in starts for c in starts)


def _read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as raster:
        return np.asarray(raster.read())


def _whole(scenes: Scenes) -> int:
    return sum(_slices(_read(path)) for files in scenes.values() for path, _ in files)


def _reprojected(scenes: Scenes) -> int:
    (optical, _), (radar, _) = scenes["s2-l2a"][0], scenes["s1"][0]
    with rasterio.open(optical) as target, rasterio.open(radar) as source:
        out = np.empty((source.count, target.height, target.width), np.float32)
        rasterio.warp.reproject(
            source.read(), out, src_transform=source.transform, src_crs=source.crs, dst_transform=target.transform,
            dst_crs=target.crs, src_nodata=np.nan, dst_nodata=np.nan, resampling=rasterio.enums.Resampling.bilinear,
        )  # fmt: skip
        return _slices(target.read()) + _slices(out)


def _decoded(scenes: Scenes) -> int:
    return sum(_read(path).nbytes for path, _ in scenes["s2-l2a"])


def _config(folder: Path, scenes: Scenes, places: int = 1, **options: Any) -> Any:
    with (folder / "catalog.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["place", "sensor", "href", "band"])
        for place in range(places):
            for sensor, files in scenes.items():
                table.writerows([f"p{place}", sensor, path.name, *(bands or [""])] for path, bands in files)
    raw = {"stage": "shards", "archive": {"root": str(folder)}, "sensors": list(scenes), "tile": {"size": TILE}}
    return configs.parse({"out": str(folder / "out"), **raw, **options})


def _tiles(folder: Path, scenes: Scenes) -> int:
    return sum(np.ascontiguousarray(t.values).nbytes for s in _samples(folder, scenes) for t in s.tiles.values())


def _encoded(folder: Path, scenes: Scenes) -> int:
    return sum(len(data) for sample in _samples(folder, scenes) for data in encode(sample, "blosc2-zstd").values())


def _samples(folder: Path, scenes: Scenes) -> Iterator[Sample]:
    config = _config(folder, scenes)
    planned = plan(config)
    items = [item for index in range(planned.shards) for item in planned.shard(index)]
    with mock.patch("shards.build._shifts", lambda tiles: {}):  # a cost of its own: benchmarks/registration.py
        yield from samples_of_a_view(config, items, Counter())


def _build(folder: Path, scenes: Scenes) -> None:
    """Whole builds into new folders: with encoding, shifts and statistics, by one process and by two."""

    def with_workers(workers: int) -> Callable[[], object]:
        options = {"workers": workers, "samples_per_shard": 64}

        def run() -> None:
            build(_config(folder, scenes, SCENES, **options))
            shutil.rmtree(folder / "out")

        return run

    compare(
        f"Shards of S2 + S1, {SCENES} scenes of {PIXELS} x {PIXELS}, striped, deflate",
        {
            "read whole and slice": lambda: [_whole(scenes) for _ in range(SCENES)],
            "build": with_workers(1),
            "build, 2 processes": with_workers(2),
        },
        repetitions=3,
    )


def _peak_of_a_build(count: int) -> float:
    """MiB of a process that builds `count` scenes (the same files under many names)."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        scenes = _scenes(folder, 512, 12, **LAYOUTS["tiled"])
        build(_config(folder, scenes, count, samples_per_shard=8, encoding="blosc2-lz4"))
        return peak()
