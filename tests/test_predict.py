from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rio_cogeo import cog_validate

import configs
from pipeline import predict as stage
from pipeline.finetune import finetune
from pipeline.predict import ONE, predict
from shards.contract import ContractError
from shards.grid import Grid, Window
from shards.scene import SceneError
from shards.sensors import SensorError
from tests import test_finetune
from tests.scenes import north_up, write_scene
from tests.small_dataset import one_thread, write_dataset  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run finetuned on s1 and dem, and scenes of one place: s1 at 10 m with a hole, dem at 30 m in another zone."""
    folder = tmp_path_factory.mktemp("predict")
    write_dataset(folder / "data")
    finetune(test_finetune.config(folder, "run", steps=2, seed=4))
    rng = np.random.default_rng(0)
    values = rng.normal(-12, 3, (2, 100, 90)).astype(np.float32)
    values[:, :20, :30] = np.nan
    write_scene(folder / "s1.tif", "s1", values=values)
    write_scene(folder / "dem.tif", "dem", size=60, transform=north_up(30.0, 500000 - 300, 5300000 + 300))
    return folder


def config(folder: Path, **changes: Any) -> Any:
    scene = {"s1": str(folder / "s1.tif"), "dem": str(folder / "dem.tif")}
    raw = {"stage": "predict", "checkpoint": str(folder / "run"), "scene": scene, "out": str(folder / "map.tif")}
    return configs.parse({**raw, "window": 64, "overlap": 32, **changes})


def test_a_map_is_a_valid_cog_on_the_grid_of_the_scene(folder: Path) -> None:
    out = predict(config(folder))
    assert cog_validate(out, quiet=True)[0]
    with rasterio.open(out) as found, rasterio.open(folder / "s1.tif") as scene:
        assert (found.crs, found.shape, found.transform) == (scene.crs, scene.shape, scene.transform)
        assert found.nodata == 255 and found.colormap(1)[1][:3] == (0, 200, 0)
        assert json.loads(found.tags()["classes"]) == {"0": "water", "1": "field", "2": "town"}
        assert set(np.unique(found.read(1))) <= {0, 1, 2}


def test_nothing_is_said_where_no_modality_is_valid(folder: Path) -> None:
    out = predict(config(folder, scene={"s1": str(folder / "s1.tif")}, out=str(folder / "s1-only.tif")))
    with rasterio.open(out) as found:
        classes = found.read(1)
    assert (classes[:20, :30] == 255).all()
    classes[:20, :30] = 0
    assert (classes < 3).all()


def test_windows_in_any_batch_size_give_the_same_map(folder: Path) -> None:
    maps = []
    for size in (1, 5):
        out = predict(config(folder, micro_batch=size, out=str(folder / f"map-{size}.tif")))
        with rasterio.open(out) as found:
            maps.append(found.read(1))
    assert (maps[0] == maps[1]).mean() > 0.999  # matrix products of other sizes may differ in the last bit


@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([0, 8, 16, 31]))
def test_blending_keeps_what_all_windows_agree_on(height: int, width: int, overlap: int) -> None:
    """A fake model that sees the class of every pixel: no seam, no shift, no gap, whatever the size."""
    truth = np.add.outer(np.arange(height), 2 * np.arange(width)) // 5 % 3

    def classify(model: Any, scenes: Any, contract: Any, grid: Grid, windows: list[Window]) -> Iterator[Any]:
        for window in windows:
            padded = np.zeros((window.row + 32, window.col + 32), int)
            rows, cols = min(height, padded.shape[0]), min(width, padded.shape[1])
            padded[:rows, :cols] = truth[:rows, :cols]
            inner = padded[window.row :, window.col :]
            yield window, np.stack([(inner == k) * ONE for k in range(3)]), np.ones((32, 32), bool)

    class Model:
        outputs = 3

        def to(self, device: object) -> Model:
            return self

    class Source:
        def build(self) -> Model:
            return Model()

    grid = Grid((10, 0, 0, 0, -10, 0), height, width, "EPSG:32633")
    raw = {"checkpoint": "x", "scene": {"s1": "x"}, "out": "x", "window": 32, "overlap": overlap}
    found = np.full((height, width), 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_classify", classify)
        for row, strip in stage._strips(Source(), {}, None, grid, configs.parse({"stage": "predict", **raw})):  # type: ignore[arg-type]
            found[row : row + strip.shape[0]] = strip
    np.testing.assert_array_equal(found, truth)


def test_scenes_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    far = write_scene(tmp_path / "far.tif", "dem", transform=north_up(30.0, 900000))
    with pytest.raises(SceneError, match=r"far\.tif: dem does not overlap .*s1\.tif"):
        predict(config(folder, scene={"s1": str(folder / "s1.tif"), "dem": str(far)}))
    coarse = write_scene(tmp_path / "coarse.tif", "s1", metres=20.0, transform=north_up(20.0))
    with pytest.raises(ContractError, match="pixels of 20, the model was trained at 10 m"):
        predict(config(folder, scene={"s1": str(coarse)}))
    with pytest.raises(SensorError, match="'s2' fits 0 of the sensors s1, dem"):
        predict(config(folder, scene={"s2": "a.tif"}))
    with pytest.raises(SceneError, match=r"absent\.tif: not readable"):
        predict(config(folder, scene={"s1": "absent.tif"}))
    with pytest.raises(configs.ConfigError, match="scene: none given; the model takes s1, dem"):
        predict(config(folder, scene={}))
    with pytest.raises(configs.ConfigError, match="overlap=64 must be smaller than window=64"):
        config(folder, overlap=64)
