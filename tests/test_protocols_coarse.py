"""Labels that only look fine: a land cover product of 500 m, warped to 10 m, against true maps of 10 m."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from pipeline.config import ProtocolChoice
from pipeline.protocols import samples
from shards.build import build
from shards.coarse import ENOUGH, looks_coarse, stretches
from shards.raster_io import from_geotiff_bytes
from tests.benchmark_trees import cover, put, seen_from_above

SIZE = 256


def warped(seed: int, cell: float, shear: float = 0.0, turn: float = 0.0) -> np.ndarray[Any, Any]:
    """Class indices [256, 256] at 10 m of a product whose cells of so many metres lie sheared and turned on them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] * 10.0
    x, y = x * np.cos(turn) - y * np.sin(turn) + 9000, x * np.sin(turn) + y * np.cos(turn) + 9000
    x = x + shear * y
    cells = rng.integers(0, 8, (64, 64))
    return np.asarray(cells[(y // cell).astype(int) % 64, (x // cell).astype(int) % 64], np.uint8)


def counted(labels: list[np.ndarray[Any, Any]], metres: float = 10.0) -> tuple[int, int]:
    found = np.array([stretches(label, metres) for label in labels]).sum(0)
    return int(found[0]), int(found[1])


@pytest.mark.parametrize("cell", [463.3, 500.0, 926.6])
@pytest.mark.parametrize(("shear", "turn"), [(0.0, 0.0), (0.3, 0.05), (1.0, 0.03), (1.7, 0.08)])
def test_a_warped_product_looks_coarse(cell: float, shear: float, turn: float) -> None:
    words = looks_coarse(*counted([warped(seed, cell, shear, turn) for seed in range(6)]))
    assert "look like those of a product of about 500 m" in words


@pytest.mark.parametrize("side", [10, 30, 100])
def test_finer_maps_do_not(side: int) -> None:
    assert looks_coarse(*counted([warped(seed, side, 0.2, 0.02) for seed in range(2)])) == ""


@pytest.mark.real_data
def test_real_maps_of_10_m_do_not(real_data: Path) -> None:
    found = {}
    for path in sorted((real_data / "paired/terramesh/LULC").glob("*.tif")):
        codes = from_geotiff_bytes(path.read_bytes())[0]
        found[path.stem] = counted([np.where(codes == 0, 255, codes).astype(np.uint8)])
    codes = np.load(real_data / "paired/eolearn_slovenia_patch/LULC.npy").squeeze()
    found["slovenia"] = counted([np.where(codes == 0, 255, codes).astype(np.uint8)])
    judged = {name: short / count for name, (count, short) in found.items() if count >= ENOUGH}
    assert len(judged) == 3 and min(judged.values()) > 0.55, judged
    assert all(looks_coarse(*counts) == "" for counts in found.values())


def test_what_a_stretch_is() -> None:
    line = np.array([[0, 0, 1, 1, 1, 2, 2, 255, 255, 3, 4, 4]], np.uint8)
    # 1 1 1 lies between two changes; 2 2 and 3 end at ignored pixels, the outer ones at the edge.
    assert stretches(line, 10.0) == (1, 1) == stretches(line.T, 10.0)
    assert stretches(line, 49.9) == (1, 1) and stretches(line, 50.0) == (1, 0)
    assert stretches(np.zeros((4, 4), np.uint8), 10.0) == (0, 0)
    assert looks_coarse(ENOUGH - 1, 0) == "" != looks_coarse(ENOUGH, 0)


def test_builds_and_protocols_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_class = np.array([1, 2, 4, 5, 6, 7, 9, 10], np.uint8)
    for number, split in enumerate(("test", "validation")):
        covers = cover(number, 8, SIZE)
        files = {**seen_from_above(covers, number), "dfc": of_class[warped(number, 463.3)][None]}
        for kind, values in files.items():
            name = f"ROIs0000_{split}_{kind}_0_p{number}.tif"
            put(tmp_path / "in" / f"ROIs0000_{split}" / kind / name, values, east=5000.0 * number)
    data = str(tmp_path / "data")
    settings = [f"archive.root={tmp_path / 'in'}", f"out={data}", "workers=1"]
    with caplog.at_level(logging.WARNING):
        build(configs.load("shards-dfc2020", settings))
    assert "the labels look like those of a product of about 500 m: 0% of their stretches" in caplog.text
    facts = json.loads(Path(data, "dataset.json").read_text())
    assert len(facts["warnings"]) == 1 and facts["label_stretches"]["all"] > ENOUGH
    caplog.clear()
    samples(ProtocolChoice(name="dfc2020/competition"), data, "test")
    assert "by dfc2020/competition: the labels look like those of a product" in caplog.text
