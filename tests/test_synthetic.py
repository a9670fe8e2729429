"""The made-up archive: its traps are there, its bytes are fixed, and its sensors need each other."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.warp import Resampling, reproject, transform_bounds
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import jaccard_score
from threadpoolctl import threadpool_limits

from shards.sensors import SENSORS
from shards.synthetic import CLASSES, _splits, make_archive, make_place, site
from shards.synthetic.instruments import LOOKS, radar
from shards.synthetic.landscape import Cover, Landscape, Material

PLACES, SIZE = 12, 192

Array = NDArray[Any]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive: 12 places and the scene to predict."""
    return make_archive(tmp_path_factory.mktemp("archive"), places=PLACES, size=SIZE).parent


def catalog(archive: Path) -> list[dict[str, str]]:
    """Rows of the archive's catalog."""
    with open(archive / "catalog.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scenes(archive: Path, sensor: str) -> dict[str, Path]:
    """Place -> path of its scene of `sensor`, the scene to predict left out."""
    rows = catalog(archive)
    return {
        row["place"]: archive / row["href"] for row in rows if row["sensor"] == sensor and row["split"] != "predict"
    }


def read(path: Path) -> Array:
    """All bands [C, H, W]."""
    with rasterio.open(path) as raster:
        return np.asarray(raster.read())


def on_grid_of(path: Path, like: Path) -> Array:
    """The scene `path` warped (bilinear) to the grid of `like`; NaN where it has nothing."""
    with rasterio.open(path) as source, rasterio.open(like) as target:
        values = np.full((source.count, *target.shape), np.nan, dtype=np.float32)
        reproject(
            rasterio.band(source, list(source.indexes)), values, src_nodata=np.nan, dst_nodata=np.nan,
            dst_transform=target.transform, dst_crs=target.crs, resampling=Resampling.bilinear,
        )  # fmt: skip
    return values


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_catalog_names_every_scene_of_every_place(archive: Path) -> None:
    rows = catalog(archive)
    assert list(rows[0]) == ["place", "sensor", "href", "time", "offset", "group", "split"]
    splits = {row["place"]: row["split"] for row in rows}
    assert len(splits) == PLACES + 1
    assert {split: list(splits.values()).count(split) for split in splits.values()} == {
        "train": 9, "val": 1, "test": 2, "predict": 1,
    }  # fmt: skip
    assert {row["group"] for row in rows} == {"33N", "21S", "36S", "14N"}
    for place in splits:
        assert {row["sensor"] for row in rows if row["place"] == place} == {"s2-l1c", "s1", "dem", "label"}
    assert all((archive / row["href"]).is_file() for row in rows)


def test_default_splits_are_16_3_and_5_places() -> None:
    splits = _splits(24)
    assert [splits.count(name) for name in ("train", "val", "test")] == [16, 3, 5]


def test_scenes_have_the_types_and_grids_of_real_ones(archive: Path) -> None:
    zones = set()
    for place, path in scenes(archive, "s2-l1c").items():
        with rasterio.open(path) as optical, rasterio.open(archive / place / "label.tif") as label:
            assert (optical.count, optical.dtypes[0], optical.shape) == (13, "uint16", (SIZE, SIZE))
            assert optical.descriptions == SENSORS["s2-l1c"].band_names
            assert optical.res == (10.0, 10.0) and optical.nodata == 0
            assert (label.transform, label.crs, label.dtypes) == (optical.transform, optical.crs, ("uint8",))
            assert [label.colormap(1)[k][:3] for k in range(len(CLASSES.names))] == list(CLASSES.palette)
            zones.add(optical.crs.to_epsg())
        with rasterio.open(archive / place / "dem.tif") as dem:
            assert (dem.count, dem.dtypes[0], dem.res) == (1, "float32", (30.0, 30.0))
            assert np.isfinite(dem.read()).all()
    assert zones == {32633, 32721, 32736, 32614}


def test_radar_lies_on_another_grid_and_partly_in_another_crs(archive: Path) -> None:
    kinds = set()
    for place, path in scenes(archive, "s1").items():
        with rasterio.open(path) as sar, rasterio.open(archive / place / "s2-l1c.tif") as optical:
            assert (sar.count, sar.dtypes[0]) == (2, "float32")
            same = sar.crs == optical.crs
            kinds.add("same" if same else "degrees" if sar.crs.to_epsg() == 4326 else "other zone")
            if same:
                offset = (
                    np.array([sar.transform.c, sar.transform.f]) - [optical.transform.c, optical.transform.f]
                ) / 10
                assert np.abs(offset - offset.round()).max() > 0.05
            west, south, east, north = transform_bounds(optical.crs, sar.crs, *optical.bounds, densify_pts=9)
            box = sar.bounds
            assert box.left <= west and box.bottom <= south and box.right >= east and box.top >= north
    assert kinds == {"same", "degrees", "other zone"}


def test_edges_clouds_and_gaps_are_there_but_not_everywhere(archive: Path) -> None:
    empty = {place: float((read(path) == 0).all(0).mean()) for place, path in scenes(archive, "s2-l1c").items()}
    gaps = {place: float(np.isnan(read(path)).mean()) for place, path in scenes(archive, "s1").items()}
    unknown = {place: float((read(path) == 255).mean()) for place, path in scenes(archive, "label").items()}
    clouds = {place: float((read(path)[1] > 3000).mean()) for place, path in scenes(archive, "s2-l1c").items()}
    for shares in (empty, gaps, unknown, clouds):
        assert 2 <= sum(share > 0.005 for share in shares.values()) <= PLACES - 2
        assert max(shares.values()) < 0.6


def test_every_class_is_somewhere_and_none_is_everything(archive: Path) -> None:
    labels = [read(path).ravel() for path in scenes(archive, "label").values()]
    counts = np.bincount(np.concatenate(labels), minlength=256)
    shares = counts[: len(CLASSES.names)] / counts[: len(CLASSES.names)].sum()
    assert shares.min() > 0.01 and shares.max() < 0.4
    assert set(np.flatnonzero(counts)) <= {*range(len(CLASSES.names)), CLASSES.ignore}


def test_radar_and_label_agree_to_a_pixel_on_every_kind_of_grid(archive: Path) -> None:
    checked = set()
    for place, path in scenes(archive, "s1").items():
        water = read(archive / place / "label.tif")[0] == Cover.WATER
        decibels = on_grid_of(path, archive / place / "label.tif")[1]
        if np.isnan(decibels).any() or not 0.02 < water.mean() < 0.6:
            continue
        contrast = {
            (dy, dx): decibels[np.roll(water, (dy, dx), (0, 1))].mean() for dy in range(-3, 4) for dx in range(-3, 4)
        }
        darkest = min(contrast, key=lambda shift: float(contrast[shift]))
        assert np.abs(darkest).max() <= 1, place
        with rasterio.open(path) as sar:
            checked.add(sar.crs.to_epsg() == 4326 or str(sar.crs) == site(0, int(place[-3:]), SIZE).region.crs)
    assert checked == {True, False}


def test_speckle_has_the_stated_number_of_looks() -> None:
    place = site(0, 8, 256)
    side = place.size + 2 * place.margin
    shares = np.zeros((len(Material), side, side), dtype=np.float32)
    shares[Material.CLEAR_WATER] = 1
    flat = np.zeros((side, side), dtype=np.float32)
    lake = Landscape(flat, flat.astype(np.uint8), shares, flat + 1)
    intensity = 10 ** (radar(place, lake).values / 10)
    for band in intensity:
        seen = band[np.isfinite(band)]
        assert seen.mean() ** 2 / seen.var() == pytest.approx(LOOKS, rel=0.05)


def test_bytes_depend_on_nothing_but_the_arguments(archive: Path, tmp_path: Path) -> None:
    wanted = {name: sha for name, sha in digest(archive).items() if name.startswith("21S-001")}
    code = (
        "import sys; from pathlib import Path; from shards.synthetic import make_place, site; "
        f"make_place(Path(sys.argv[1]), site(0, 1, {SIZE}))"
    )
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | threads, check=True)
    assert digest(tmp_path) == wanted and len(wanted) == 4


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_place(tmp_path / str(seed), site(seed, 0, 64))
    assert not set(digest(tmp_path / "0").values()) & set(digest(tmp_path / "1").values())


def test_an_interrupted_call_is_made_again_and_keeps_what_is_finished(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_archive(tmp_path, places=3, size=64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = digest(tmp_path)
    lost, kept = tmp_path / "21S-001" / "s1.tif", tmp_path / "33N-000" / "s1.tif"
    lost.unlink()
    (tmp_path / "catalog.csv").unlink()
    age = kept.stat().st_mtime_ns
    make_archive(tmp_path, places=3, size=64)
    assert digest(tmp_path) == before
    assert kept.stat().st_mtime_ns == age


def test_a_folder_with_another_archive_is_refused(tmp_path: Path) -> None:
    make_archive(tmp_path, places=3, size=64)
    with pytest.raises(ValueError, match=r"seed.: 0.*seed.: 1.*another folder"):
        make_archive(tmp_path, places=3, size=64, seed=1)


@pytest.mark.parametrize(("places", "size"), [(2, 64), (197, 64), (3, 63), (3, 1537)])
def test_arguments_out_of_range_are_refused(tmp_path: Path, places: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"places={places}, size={size}: give 3 to 196"):
        make_archive(tmp_path / "never", places=places, size=size)
    assert not (tmp_path / "never").exists()


def mean_of_neighbours(values: Array, reach: int = 2) -> Array:
    """Mean over (2 reach + 1) squared pixels of `values` [C, H, W]; NaN counts as 0."""
    padded = np.pad(np.nan_to_num(values), ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), (1, 2))
    return np.asarray(windows.mean((-2, -1)))


@pytest.fixture(scope="module")
def pixels(archive: Path) -> dict[str, dict[str, Array]]:
    """For train and test places: pixels of each kind of input [N, C] and their classes [N]."""
    rng = np.random.default_rng(0)
    parts: dict[str, dict[str, list[Array]]] = {"train": defaultdict(list), "test": defaultdict(list)}
    splits = {row["place"]: row["split"] for row in catalog(archive)}
    for place, path in scenes(archive, "s2-l1c").items():
        if splits[place] not in parts:
            continue
        label = read(archive / place / "label.tif")[0]
        optical, sar = read(path).astype(np.float32), on_grid_of(archive / place / "s1.tif", path)
        chosen = rng.choice(np.flatnonzero(label != CLASSES.ignore), 1500 if splits[place] == "train" else 6000)
        both = np.concatenate([optical, sar])
        inputs = {"optical": optical, "sar": sar, "both": both}
        inputs["neighbours"] = np.concatenate([both, mean_of_neighbours(both)])
        for name, image in inputs.items():
            parts[splits[place]][name].append(image.reshape(len(image), -1)[:, chosen].T)
        parts[splits[place]]["class"].append(label.ravel()[chosen])
    return {split: {name: np.concatenate(arrays) for name, arrays in kinds.items()} for split, kinds in parts.items()}


@pytest.fixture(scope="module")
def miou(pixels: dict[str, dict[str, Array]]) -> dict[str, float]:
    """Mean IoU on unseen places of a per-pixel classifier, for each kind of input."""
    found = {}
    for name in ("optical", "sar", "both", "neighbours"):
        model = HistGradientBoostingClassifier(max_iter=30, learning_rate=0.25, max_leaf_nodes=15, random_state=0)
        with threadpool_limits(1):  # OpenMP threads of a busy machine wait for each other
            guess = model.fit(pixels["train"][name], pixels["train"]["class"]).predict(pixels["test"][name])
        found[name] = float(jaccard_score(pixels["test"]["class"], guess, average="macro"))
    return found


def test_both_sensors_together_beat_each_alone(miou: dict[str, float]) -> None:
    assert miou["both"] > miou["optical"] + 0.04
    assert miou["both"] > miou["sar"] + 0.15


def test_neighbours_help(miou: dict[str, float]) -> None:
    assert miou["neighbours"] > miou["both"] + 0.015


def effect(values: Array, classes: Array, one: Cover, other: Cover) -> Array:
    """Distance of the means of two classes per band, in standard deviations [C]."""
    a, b = values[classes == one], values[classes == other]
    spread = np.sqrt((np.nanvar(a, 0) + np.nanvar(b, 0)) / 2)
    return np.asarray(np.abs(np.nanmean(a, 0) - np.nanmean(b, 0)) / spread)


@pytest.mark.parametrize(
    ("one", "other", "better", "worse"),
    [
        (Cover.BUILT, Cover.BARE, "sar", "optical"),
        (Cover.WETLAND, Cover.GRASS, "sar", "optical"),
        (Cover.CROPS, Cover.GRASS, "optical", "sar"),
    ],
)
def test_what_one_sensor_confuses_the_other_tells_apart(
    pixels: dict[str, dict[str, Array]], one: Cover, other: Cover, better: str, worse: str
) -> None:
    train = pixels["train"]
    clear = (train["optical"][:, 1] > 0) & (train["optical"][:, 1] < 2500)
    found = {name: effect(train[name][clear], train["class"][clear], one, other).max() for name in (better, worse)}
    assert found[better] > 1.5 * found[worse]
