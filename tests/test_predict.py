from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.enums import ColorInterp
from rio_cogeo import cog_validate

import configs
from pipeline import predict as stage
from pipeline.checkpoint import find
from pipeline.finetune import finetune
from pipeline.mosaic import ONE, Layout
from pipeline.predict import Network, predict, unfinished_parts
from pipeline.ranks import Ranks
from pipeline.signals import Stopped
from shards.archives import ArchiveError
from shards.contract import ContractError
from shards.grid import Grid, Window
from shards.raster_io import to_cog, write_parts
from shards.scene import SceneError
from shards.sensors import SensorError
from shards.store import open_store
from tests import test_finetune
from tests.scenes import north_up, write_catalog, write_scene
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401

CLASSES = {"0": "water", "1": "field", "2": "town"}


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
    raw = {**raw, "window": 64, "overlap": 32, "block": 64, **changes}
    return configs.parse({key: value for key, value in raw.items() if value is not None})


def read(path: Path, band: int = 1) -> np.ndarray:
    with rasterio.open(path) as found:
        return np.asarray(found.read(band))


PRODUCTS = ("", "-confidence", "-coverage", "-probabilities")


@pytest.fixture(scope="module")
def mapped(folder: Path) -> Path:
    """A map with everything, in four blocks."""
    out = folder / "all" / "map.tif"
    assert predict(config(folder, out=str(out), probabilities=True, polygons="geojson")) == out
    return out


def test_all_rasters_are_valid_cogs_on_the_grid_of_the_scene(folder: Path, mapped: Path) -> None:
    with rasterio.open(folder / "s1.tif") as scene:
        for end in PRODUCTS:
            path = mapped.with_name(f"map{end}.tif")
            assert cog_validate(path, quiet=True)[0], path
            with rasterio.open(path) as found:
                assert (found.crs, found.shape, found.transform) == (scene.crs, scene.shape, scene.transform)
                assert found.nodata == (0 if end == "-coverage" else 255) and set(found.dtypes) == {"uint8"}
    with rasterio.open(mapped) as found:
        assert found.colormap(1)[1][:3] == (0, 200, 0) and json.loads(found.tags()["classes"]) == CLASSES
        assert "forced" not in found.tags()
        assert set(np.unique(found.read(1))) <= {0, 1, 2}
    with rasterio.open(mapped.with_name("map-probabilities.tif")) as found:
        assert found.descriptions == ("water", "field", "town")
        shares = found.read()
    chosen = np.take_along_axis(shares, read(mapped)[None], 0)[0]
    np.testing.assert_array_equal(chosen, shares.max(0))
    np.testing.assert_array_equal(chosen, read(mapped.with_name("map-confidence.tif")))
    assert (abs(shares.sum(0, dtype=int) - 100) <= 2).all()
    assert not mapped.with_name("map.tif.parts").exists()


@pytest.mark.parametrize("bands", [1, 3, 4, 5])
def test_no_band_of_a_large_file_is_transparency(tmp_path: Path, bands: int) -> None:
    grid = Grid((10, 0, 0, 0, -10, 0), 50, 70, "EPSG:32633")
    values = np.random.default_rng(0).integers(0, 101, (bands, 50, 70), np.uint8)
    parts = [(window, values[:, *window.within(Window(0, 0, 50, 70))]) for window in Layout(grid, 32, 0, 64).blocks()]
    write_parts(tmp_path / "a.tif", grid, parts, nodata=255, descriptions=[f"class {k}" for k in range(bands)])
    to_cog(tmp_path / "a.tif", tmp_path / "b.tif", resampling="average")
    with rasterio.open(tmp_path / "b.tif") as found:
        assert ColorInterp.alpha not in found.colorinterp and found.descriptions[-1] == f"class {bands - 1}"
        np.testing.assert_array_equal(found.read(), values)


def test_coverage_says_which_sensor_saw_a_pixel(mapped: Path) -> None:
    with rasterio.open(mapped.with_name("map-coverage.tif")) as found:
        assert found.descriptions == ("1: s1, 2: dem",)
        coverage = found.read(1)
    expected = np.full((100, 90), 3)
    expected[:20, :30] = 2
    np.testing.assert_array_equal(coverage, expected)


def test_the_record_tells_areas_and_where_the_map_comes_from(folder: Path, mapped: Path) -> None:
    facts, classes = json.loads(mapped.with_suffix(".json").read_text()), read(mapped)
    pixels = [int((classes == k).sum()) for k in range(3)]
    assert [facts["classes"][name]["pixels"] for name in CLASSES.values()] == pixels
    assert facts["classes"]["town"]["hectares"] == pytest.approx(pixels[2] / 100)
    assert facts["seen"] == {"s1": 100 * 90 - 600, "dem": 9000} and facts["nodata"] == 0
    assert facts["identity"]["checkpoint"] == find(folder / "run").sha256
    assert facts["micro_batch"] == stage.ON_CPU and facts["forced"] == []


def test_outlines_cover_the_pixels_of_their_classes(folder: Path, mapped: Path) -> None:
    counts, facts = read(mapped), json.loads(mapped.with_name("map-polygons.geojson").read_text())
    assert "crs" not in facts  # RFC 7946: always longitude and latitude
    ring = facts["features"][0]["geometry"]["coordinates"][0]
    assert sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(ring)) > 0, "counter-clockwise"
    found = geopandas.read_file(mapped.with_name("map-polygons.geojson"))
    areas = found.groupby("class")["area_m2"].sum()
    for name, code in (("field", 1), ("town", 2)):
        assert areas.get(name, 0) == pytest.approx(100 * (counts == code).sum())
    assert set(found["class"]) <= {"field", "town"}
    np.testing.assert_allclose(found.to_crs("EPSG:32633").area, found["area_m2"], rtol=3e-3)
    out = predict(config(folder, out=str(folder / "p.tif"), polygons="parquet", polygon_classes=["town", "water"]))
    found = geopandas.read_parquet(Path(out).with_name("p-polygons.parquet"))
    assert found.crs == "OGC:CRS84" and found["area_m2"].sum() == pytest.approx(100 * (counts != 1).sum())
    with pytest.raises(configs.ConfigError, match="polygon_classes: 'roads' given; the model has water, field, town"):
        predict(config(folder, polygon_classes=["roads"]))


def test_the_quick_look_shows_the_map_with_its_legend(mapped: Path) -> None:
    picture = np.asarray(Image.open(mapped.with_suffix(".png")).convert("RGB"))
    for part in (picture[: len(picture) // 2], picture[-len(picture) // 10 :]):
        colours = {tuple(colour) for colour in np.unique(part.reshape(-1, 3), axis=0)}
        assert {(0, 0, 200), (0, 200, 0), (200, 0, 0)} <= colours


def test_nothing_is_said_where_no_modality_is_valid(folder: Path) -> None:
    out = Path(predict(config(folder, scene={"s1": str(folder / "s1.tif")}, out=str(folder / "s1-only.tif"))))
    hole = np.zeros((100, 90), bool)
    hole[:20, :30] = True
    for path, nodata in ((out, 255), (folder / "s1-only-confidence.tif", 255), (folder / "s1-only-coverage.tif", 0)):
        assert ((read(path) == nodata) == hole).all()


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


def test_parts_in_any_order_give_the_same_bytes(folder: Path, mapped: Path) -> None:
    out = folder / "parts" / "map.tif"
    whole = config(folder, out=str(out), probabilities=True, polygons="geojson")
    assert unfinished_parts(whole, 3) == [1, 2, 3]
    for part in ("3/3", "1/3"):
        predict(configs.parse({**configs.to_dict(whole), "part": part}))
        assert not out.exists()
    assert unfinished_parts(whole, 3) == [2]
    predict(whole)
    assert files(out) == files(mapped)
    assert unfinished_parts(whole, 3) == []
    before = out.stat().st_mtime_ns
    predict(whole)
    assert out.stat().st_mtime_ns == before and not out.with_name("map.tif.parts").exists(), "done before"
    predict(configs.parse({**configs.to_dict(whole), "flips": True}))
    assert out.stat().st_mtime_ns != before, "another map is made anew"


RUN = "import sys, configs; from pipeline.predict import predict; predict(configs.load(sys.argv[1]))"


def test_a_killed_process_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(-12, 3, (2, 256, 256)).astype(np.float32)
    scene = {"s1": str(write_scene(folder / "large.tif", "s1", values=values))}
    whole, killed = (tmp_path / name / "map.tif" for name in ("whole", "killed"))
    told = config(folder, scene=scene, out=str(killed))
    (tmp_path / "predict.yaml").write_text(configs.dump(told))
    child = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "predict.yaml")])
    while child.poll() is None and not list(tmp_path.glob("killed/map.tif.parts/block-*.tif")):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    left = unfinished_parts(told, 16)
    assert 0 < len(left) < 16 and not killed.exists()
    written: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        keep = stage.Products.keep
        patch.setattr(stage.Products, "keep", lambda self, n, *rest: written.append(n) or keep(self, n, *rest))
        predict(told)
    assert sorted(number + 1 for number in written) == left
    predict(config(folder, scene=scene, out=str(whole)))
    assert files(killed) == files(whole)


def test_a_request_to_stop_keeps_the_finished_blocks(folder: Path, tmp_path: Path) -> None:
    told = config(folder, out=str(tmp_path / "map.tif"))
    with pytest.MonkeyPatch.context() as patch:
        keep = stage.Products.keep

        def keep_and_signal(self: Any, *rest: Any) -> None:
            keep(self, *rest)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(stage.Products, "keep", keep_and_signal)
        with pytest.raises(Stopped, match="finished blocks stay"):
            predict(told)
    assert unfinished_parts(told, 4) == [2, 3, 4]


def test_the_ranks_of_a_job_share_its_blocks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each of two ranks, which here do not wait for each other; the first joins the blocks of both."""
    told = config(folder, out=str(tmp_path / "map.tif"))
    monkeypatch.setattr(stage.ranks, "init", lambda _: None)
    for rank, left in ((1, [1, 3]), (0, [])):
        monkeypatch.setattr(stage.ranks, "from_environment", lambda rank=rank: Ranks(rank, 2, rank, 2))
        predict(told)
        assert unfinished_parts(told, 4) == left
    assert (tmp_path / "map.tif").exists()


def test_work_on_another_map_is_refused(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "map.tif")
    predict(config(folder, out=out, part="1/2"))
    for change in ({"overlap": 16}, {"micro_batch": 2}, {"scene": {"s1": str(folder / "s1.tif")}}):
        (name,) = change
        for act in (predict, lambda other: unfinished_parts(other, 2)):
            with pytest.raises(ContractError, match=rf"map\.tif\.parts holds blocks of another map \({name}"):
                act(config(folder, out=out, **change))


def test_the_size_of_a_batch_hardly_changes_the_map(folder: Path, mapped: Path) -> None:
    for size in (1, 5):
        out = predict(config(folder, micro_batch=size, out=str(folder / f"map-{size}.tif"), probabilities=True))
        assert (read(Path(out)) == read(mapped)).mean() > 0.999  # products of other sizes may differ in the last bit
        for band in (1, 2, 3):
            shares = [read(p.with_name(f"{p.stem}-probabilities.tif"), band).astype(int) for p in (Path(out), mapped)]
            assert abs(shares[0] - shares[1]).max() <= 1


def test_a_map_of_one_window_is_what_the_model_says(folder: Path, tmp_path: Path) -> None:
    """The scene is smaller than a window and is padded with what is not valid; blending changes nothing."""
    out = predict(config(folder, window=128, out=str(tmp_path / "map.tif"), probabilities=True))
    network = Network(find(folder / "run"), config(folder))
    with stage.opened(stage.requests(config(folder), network.source.contract)[0]) as scenes:
        ((sample, _),) = stage._samples(scenes, scenes["s1"].grid, [Window(0, 0, 128, 128)])
    (batch,) = stage.micro_batches(iter([(sample, 0)]), 1, network.source.contract)
    expected = torch.from_numpy(network(batch)[0]).float() / ONE
    shares = np.stack([read(Path(out).with_name("map-probabilities.tif"), band) for band in (1, 2, 3)])
    np.testing.assert_allclose(shares, 100 * expected[:, :100, :90], atol=0.51)


def test_a_map_of_many_windows_is_that_of_one_large_window(folder: Path, tmp_path: Path) -> None:
    """The network sees the whole window, so the two cannot be equal; but no seam of windows or blocks stands out."""
    field = np.kron(np.random.default_rng(2).normal(0, 5, (16, 16)), np.ones((8, 8)))
    noise = np.random.default_rng(3).normal(0, 1, (2, 128, 128))
    scene = {"s1": str(write_scene(tmp_path / "s1.tif", "s1", values=(field + noise - 13).astype(np.float32)))}
    shares = []
    for name, window, block in (("one", 128, 128), ("many", 64, 64)):
        told = config(folder, scene=scene, out=str(tmp_path / f"{name}.tif"), window=window, block=block)
        predict(configs.parse({**configs.to_dict(told), "probabilities": True}))
        with rasterio.open(tmp_path / f"{name}-probabilities.tif") as found:
            shares.append(found.read().astype(int))
    off = abs(shares[0] - shares[1]).mean(0)
    assert off.mean() < 0.5
    steps = [abs(np.diff(share, axis=1)).mean((0, 2)) for share in shares]
    seams = [31, 32, 63, 64, 95, 96]  # from the last row of a window to the one below it
    np.testing.assert_allclose(steps[0][seams], steps[1][seams], atol=0.3)


def test_flips_are_the_mean_of_four_views_and_a_turn_is_one(folder: Path, mapped: Path, tmp_path: Path) -> None:
    """Of a scene turned by 180 degrees, `turn` makes the turned map; of four views the map is turned anyway."""
    for name, sensor in (("s1", "s1"), ("dem", "dem")):
        with rasterio.open(folder / f"{name}.tif") as scene:
            values = scene.read()[..., :60, :60]
        values = np.nan_to_num(values, nan=-12.0)
        write_scene(tmp_path / f"{name}.tif", sensor, values=values)
        write_scene(tmp_path / f"{name}-turned.tif", sensor, values=values[..., ::-1, ::-1].copy())
    straight = {name: str(tmp_path / f"{name}.tif") for name in ("s1", "dem")}
    turned = {name: str(tmp_path / f"{name}-turned.tif") for name in ("s1", "dem")}
    settings = {"window": 32, "overlap": 4, "probabilities": True}  # windows lie symmetrically on 60 pixels

    def shares(name: str, **changes: Any) -> np.ndarray:
        out = predict(config(folder, out=str(tmp_path / f"{name}.tif"), **settings, **changes))
        with rasterio.open(Path(out).with_name(f"{name}-probabilities.tif")) as found:
            return found.read().astype(int)

    plain = shares("plain", scene=straight)
    assert abs(shares("turned", scene=turned, turn=True)[:, ::-1, ::-1] - plain).max() <= 1
    assert abs(shares("not-turned", scene=turned)[:, ::-1, ::-1] - plain).max() > 1, "the model is not symmetric"
    mean = shares("mean", scene=straight, flips=True)
    assert abs(shares("mean-turned", scene=turned, flips=True)[:, ::-1, ::-1] - mean).max() <= 1
    assert abs(mean - plain).max() > 1


def test_scenes_of_other_pixels_are_mapped_at_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    coarse = write_scene(tmp_path / "coarse.tif", "s1", size=33, metres=20.0)
    out = predict(config(folder, scene={"s1": str(coarse)}, out=str(tmp_path / "map.tif")))
    with rasterio.open(out) as found:
        assert found.res == (10, 10) and found.shape == (66, 66) and found.transform.c == 500000
    degrees = (1e-4, 0.0, 15.0, 0.0, -1e-4, 47.8)
    lonlat = write_scene(tmp_path / "lonlat.tif", "s1", size=80, crs="EPSG:4326", transform=degrees)
    out = predict(config(folder, scene={"s1": str(lonlat)}, out=str(tmp_path / "utm.tif")))
    with rasterio.open(out) as found:
        assert found.crs == "EPSG:32633" and found.res == (10, 10)
        assert found.shape == pytest.approx((89, 60), abs=3)
        assert (found.read(1) < 3).mean() > 0.9


def test_the_ground_of_all_scenes_is_mapped_if_asked(folder: Path, tmp_path: Path) -> None:
    west, east = (
        write_scene(tmp_path / f"{sensor}.tif", sensor, size=60, transform=north_up(10.0, 500000 + x, 5300000 + y))
        for sensor, x, y in (("s1", 0, 0), ("dem", 400, 200))
    )
    scene = {"s1": str(west), "dem": str(east)}
    out = Path(predict(config(folder, scene=scene, out=str(tmp_path / "map.tif"), extent="union")))
    expected = np.zeros((80, 100), int)
    expected[20:, :60] |= 1
    expected[:60, 40:] |= 2
    np.testing.assert_array_equal(read(out.with_name("map-coverage.tif")), expected)
    np.testing.assert_array_equal(read(out) == 255, expected == 0)


def test_a_catalog_gives_a_map_for_each_place(folder: Path, tmp_path: Path) -> None:
    rows = [{"place": "a b", "sensor": name, "href": str(folder / f"{name}.tif")} for name in ("s1", "dem")]
    rows += [{"place": "c", "sensor": "s1", "href": str(folder / "s1.tif")}]
    table, out = write_catalog(tmp_path, rows), tmp_path / "maps"
    told = {"scene": None, "catalog": str(table)}
    assert unfinished_parts(config(folder, **told, out=str(out)), 5) == [1, 2, 3, 4, 5]
    for part in ("1/2", "2/2"):
        predict(config(folder, **told, out=str(out), part=part))
    assert predict(config(folder, **told, out=str(out))) == out
    np.testing.assert_array_equal(read(out / "c-coverage.tif") == 1, read(out / "a_b-coverage.tif") == 3)
    made = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "c.json").unlink()
    predict(config(folder, **told, out=str(out)))
    again = {path.name for path, when in made.items() if path.stat().st_mtime_ns != when}
    assert again == {f"c{end}" for end in (".tif", "-confidence.tif", "-coverage.tif", ".png", ".json")}


def test_catalogs_that_cannot_be_mapped_are_refused(folder: Path, tmp_path: Path) -> None:
    s1, label = ({"place": "a", "sensor": name, "href": str(folder / "s1.tif")} for name in ("s1", "label"))
    dates = [{**s1, "time": "2020-01-01"}, {**s1, "time": "2020-02-01"}]
    for rows, message in (
        (dates, "place a has several scenes of s1"),
        ([label], "place a has no scene of s1, dem"),
        ([{**s1, "place": "a b"}, {**s1, "place": "a_b"}], r"places a b and a_b are both a_b\.tif"),
    ):
        table = write_catalog(tmp_path, rows)
        with pytest.raises(configs.ConfigError, match=message):
            predict(config(folder, scene=None, catalog=str(table), out=str(tmp_path / "maps")))
    with pytest.raises(ArchiveError, match="no table there"):
        predict(config(folder, scene=None, catalog=str(tmp_path / "absent.csv"), out=str(tmp_path / "maps")))
    with pytest.raises(configs.ConfigError, match="scene and catalog given"):
        config(folder, catalog="a.csv")


def test_numbers_that_are_not_in_the_unit_are_refused_unless_forced(folder: Path, tmp_path: Path) -> None:
    power = np.random.default_rng(0).gamma(2, 0.05, (2, 64, 64)).astype(np.float32)
    scene = {"s1": str(write_scene(tmp_path / "power.tif", "s1", values=power))}
    out = tmp_path / "map.tif"
    with pytest.raises(ContractError, match=r"power\.tif: all values lie between .* linear scale.*--force"):
        predict(config(folder, scene=scene, out=str(out)))
    assert not out.exists()
    predict(config(folder, scene=scene, out=str(out), force=True))
    with rasterio.open(out) as found:
        assert "linear scale" in found.tags()["forced"]
    assert "linear scale" in json.loads(out.with_suffix(".json").read_text())["forced"][0]
    with pytest.raises(ContractError, match="linear scale"):
        predict(config(folder, scene=scene, out=str(out)))


def test_scenes_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    far = write_scene(tmp_path / "far.tif", "dem", transform=north_up(30.0, 900000))
    with pytest.raises(SceneError, match=r"far\.tif: dem does not overlap .*s1\.tif"):
        predict(config(folder, scene={"s1": str(folder / "s1.tif"), "dem": str(far)}))
    with pytest.raises(SensorError, match="'s2' fits 0 of the sensors s1, dem"):
        predict(config(folder, scene={"s2": "a.tif"}))
    with pytest.raises(SceneError, match=r"absent\.tif: not readable"):
        predict(config(folder, scene={"s1": "absent.tif"}))
    with pytest.raises(configs.ConfigError, match="scene: none given; the model takes s1, dem"):
        predict(config(folder, scene={}))
    with pytest.raises(configs.ConfigError, match="overlap=64 must be smaller than window=64"):
        config(folder, overlap=64)
    with pytest.raises(configs.ConfigError, match="'3/2' given; the first number is at most the second"):
        config(folder, part="3/2")


@pytest.mark.s3
def test_scenes_and_maps_may_be_on_s3(folder: Path, mapped: Path, s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    for name in ("s1", "dem"):
        store.put(f"{name}.tif", folder / f"{name}.tif")
    scene = {name: f"{s3_url}/{name}.tif" for name in ("s1", "dem")}
    told = {"scene": scene, "out": f"{s3_url}/maps/map.tif", "work": str(tmp_path), "probabilities": True}
    assert predict(config(folder, **told)) == told["out"]
    for end in PRODUCTS:
        assert store.get(f"maps/map{end}.tif") == mapped.with_name(f"map{end}.tif").read_bytes()
    assert unfinished_parts(config(folder, **told), 2) == [] and not list(tmp_path.iterdir())
