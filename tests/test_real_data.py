"""Every stage on real Sentinel-2, Sentinel-1, elevation and land cover: three places in three UTM zones (TerraMesh)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import rasterio

import configs
from launchers.job import Job
from shards.manifest import read_facts, select
from shards.store import open_store
from shards.stream import Share, Stream
from shards.verify import verify
from tests.scenes import write_catalog

pytestmark = pytest.mark.real_data

FOLDERS = {"s2-l2a": "S2L2A", "s1": "S1RTC", "dem": "DEM", "label": "LULC"}
# Codes of the land cover of TerraMesh (the Esri 10 m annual land cover, classes in its documentation).
NAMES = [
    "water",
    "trees",
    "flooded vegetation",
    "crops",
    "built area",
    "bare ground",
    "snow or ice",
    "clouds",
    "rangeland",
]
CODES = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import REAL_DATA

    root = tmp_path_factory.mktemp("terramesh")
    source = REAL_DATA / "paired/terramesh"
    places = sorted(path.stem for path in (source / "S2L2A").glob("*.tif"))
    assert len(places) == 3
    rows = [
        {"place": name, "sensor": sensor, "href": str(source / folder / f"{name}.tif"), "split": "train"}
        for name in places
        for sensor, folder in FOLDERS.items()
    ]
    write_catalog(root, rows)
    label = {"names": NAMES, "palette": [[20 * i, 100, 0] for i in range(9)], "codes": CODES, "ignored": [0, 255]}
    raw = {"stage": "shards", "archive": {"root": str(root)}, "out": str(root / "data"), "label": label}
    raw |= {"sensors": ["s2-l2a", "s1", "dem"], "tile": {"size": 64}, "samples_per_shard": 12}
    Job(configs.parse(raw))()
    return root


def test_shards_hold_the_real_pixels(dataset: Path) -> None:
    assert verify(str(dataset / "data")) == []
    facts = read_facts(open_store(dataset / "data"))
    assert facts["samples"] >= 40
    selection = select(str(dataset / "data"))
    assert set(selection.rows(["crs"])["crs"].to_pylist()) == {f"EPSG:{crs}" for crs in _crs_of_the_files(dataset)}
    for sample, _ in Stream(selection, 0, 1, Share(1)).once():
        source = Path(sample.meta["sources"][0])
        row, col = (int(part) for part in sample.key.split("-")[-2:])
        with rasterio.open(_source("s2-l2a") / source) as raster:
            whole = raster.read()[:, row : row + 64, col : col + 64]
        height, width = whole.shape[1:]
        valid = sample.tiles["s2-l2a"].valid[:height, :width]
        np.testing.assert_array_equal(sample.tiles["s2-l2a"].values[:, :height, :width][:, valid], whole[:, valid])
        assert sample.tiles["s2-l2a"].valid.sum() == (whole != 0).any(0).sum()


def _source(sensor: str) -> Path:
    from tests.conftest import REAL_DATA

    return REAL_DATA / "paired/terramesh" / FOLDERS[sensor]


def _crs_of_the_files(dataset: Path) -> set[int]:
    found = set()
    for path in _source("s2-l2a").glob("*.tif"):
        with rasterio.open(path) as raster:
            found.add(raster.crs.to_epsg())
    assert len(found) == 3
    return found


@pytest.mark.parametrize("sensors", [("s2-l2a", "s1"), ("s2-l2a", "dem")], ids="+".join)
def test_pretraining_finetuning_and_a_map(dataset: Path, tmp_path: Path, sensors: tuple[str, ...]) -> None:
    shared: dict[str, Any] = {
        "data": str(dataset / "data"),
        "sensors": list(sensors),
        "model": {"size": "nano", "d_state": 4},
        "normalise": "statistics",
        "batch": {"global_batch": 8},
        "steps": 20,
    }
    optim = {"lr": 2e-3, "schedule": "cosine"}
    pretrained = tmp_path / "pretrain"
    Job(configs.parse({"stage": "pretrain", "run": str(pretrained), "optim": optim, **shared}))()
    losses = _losses(pretrained)
    assert len(losses) == 20 and mean(losses[-5:]) < 0.9 * mean(losses[:5])
    tuned = tmp_path / "finetune"
    more = {"run": str(tuned), "checkpoint": str(pretrained), "optim": {"lr": 2e-3}}
    Job(configs.parse({"stage": "finetune", **more, **shared}))()
    losses = _losses(tuned)
    assert len(losses) == 20 and mean(losses[-5:]) < 0.9 * mean(losses[:5])
    _check_map(tuned, sensors, tmp_path / "map.tif")


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _check_map(run: Path, sensors: tuple[str, ...], out: Path) -> None:
    path = next(iter(sorted(_source("s2-l2a").glob("*.tif"))))
    scene = {name: str(_source(name) / path.name) for name in sensors}
    raw = {"stage": "predict", "checkpoint": str(run), "scene": scene, "out": str(out), "window": 96, "overlap": 32}
    Job(configs.parse(raw))()
    with (
        rasterio.open(path) as source,
        rasterio.open(out) as found,
        rasterio.open(_source("label") / path.name) as label,
    ):
        assert (found.crs, found.shape, found.nodata) == (source.crs, source.shape, 255)
        assert found.transform.almost_equals(source.transform)
        classes, truth = found.read(1), label.read(1)
        assert json.loads(found.tags()["classes"])["0"] == "water"
    assert set(np.unique(classes)) <= set(range(9))
    agreement = (np.array(CODES)[classes] == truth).mean()
    assert agreement > 1.5 / 9, "the map of a training scene is no better than chance"
