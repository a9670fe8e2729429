"""SpaceNet 6: trees to the letter of the layout, what is found in them, and pixels, labels and turns."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from pipeline.batch import collate
from shards.archives import ArchiveError, about
from shards.manifest import select
from shards.raster_io import write_geotiff
from shards.scene import LABEL
from shards.sensors import SENSORS
from tests.benchmark_trees import built, found, sensors

AOI = "AOI_11_Rotterdam"
FROM_SOUTH, FROM_NORTH = "20190804111224_20190804111453", "20190804111851_20190804112030"
SIZE, METRES = 64, 0.5
EAST, NORTH = 592_000.0, 5_748_000.0  # of Rotterdam in EPSG:32631
KINDS = ("SAR-Intensity", "PAN", "PS-RGB", "PS-RGBNIR", "RGBNIR", "Buildings")


def file(root: Path, kind: str, strip: str, number: int, split: str = "train") -> Path:
    """Where a tile's file lies in the trees that the tarballs unpack to."""
    token, folder = ("Train", kind) if split == "train" else ("Test_Public", kind)
    folder = {"Buildings": "geojson_buildings"}.get(folder, folder)
    end = "geojson" if kind == "Buildings" else "tif"
    return root / split / AOI / folder / f"SN6_{token}_{AOI}_{kind}_{strip}_tile_{number}.{end}"


def corner(number: int) -> tuple[float, float]:
    return EAST + 5000.0 * (number % 50), NORTH


def write(root: Path, kind: str, strip: str, number: int, split: str = "train", houses: int = 2) -> Path:
    """One file of a tile, with values that depend on the tile."""
    path = file(root, kind, strip, number, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    x, y = corner(number)
    if kind == "Buildings":
        path.write_text(json.dumps(buildings(x, y, houses)))
        return path
    bands, dtype, metres = {
        "SAR-Intensity": (4, np.float32, METRES), "PAN": (1, np.uint16, METRES), "PS-RGB": (3, np.uint8, METRES),
        "PS-RGBNIR": (4, np.uint16, METRES), "RGBNIR": (4, np.uint16, 2 * METRES),
    }[kind]  # fmt: skip
    side = int(SIZE * METRES / metres)
    values = rng.integers(10, 250, (bands, side, side)).astype(dtype)
    if kind == "SAR-Intensity":
        values = values / np.float32(10)
        values[:, :, :8] = 0  # beyond the strip's edge
    write_geotiff(path, values, crs="EPSG:32631", transform=(metres, 0.0, x, 0.0, -metres, y))
    return path


def buildings(x: float, y: float, houses: int) -> dict[str, Any]:
    """GeoJSON in metres, as solaris wrote it; a house is 10 x 5 m, the n-th at row 4, column 10 + 24 n."""
    rings = []
    for n in range(houses):
        left, top = x + (10 + 24 * n) * METRES, y - 4 * METRES
        rings.append([[left, top], [left + 10, top], [left + 10, top - 5], [left, top - 5], [left, top]])
    return {
        "type": "FeatureCollection",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32631"}},
        "features": [
            {"type": "Feature", "properties": {"n": n}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
            for n, ring in enumerate(rings)
        ],
    }


def orientations(root: Path, text: str = f"{FROM_SOUTH} 1\n{FROM_NORTH} 0\n") -> Path:
    path = root / "train" / AOI / "SummaryData" / "SAR_orientations.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two strips of train with all products, and two tiles of test_public."""
    root = tmp_path / "SN6_buildings"
    for strip, number in ((FROM_SOUTH, 8679), (FROM_SOUTH, 10), (FROM_NORTH, 7)):
        for kind in KINDS:
            write(root, kind, strip, number)
    for strip, number in ((FROM_SOUTH, 21), (FROM_NORTH, 22)):
        write(root, "SAR-Intensity", strip, number, "test_public")
    orientations(root)
    (root / "train" / AOI / "SummaryData" / f"SN6_Train_{AOI}_Buildings.csv").write_text("ImageId\n")
    return root


def test_the_layout_of_the_tarballs(tree: Path) -> None:
    places, left_out = found("spacenet6", tree)
    names = [f"{FROM_SOUTH}_tile_{number}" for number in (10, 21, 8679)] + [f"{FROM_NORTH}_tile_{n}" for n in (7, 22)]
    assert list(places) == names
    first = places[names[0]]
    assert (first.group, first.split, first.facts) == (FROM_SOUTH, "train", {"orientation": 1})
    assert sensors(first) == ["sar-quadpol", "rgbnir", LABEL]
    sar, optical, label = first.scenes
    assert sar.time == datetime(2019, 8, 4, 11, 12, 24, tzinfo=UTC) and optical.time == datetime(
        2019, 8, 31, tzinfo=UTC
    )
    assert label.time is None and label.path == str(file(tree, "Buildings", FROM_SOUTH, 10))
    assert optical.path == str(file(tree, "PS-RGBNIR", FROM_SOUTH, 10))
    assert sar.assets[0].bands == SENSORS["sar-quadpol"].band_names == ("HH", "HV", "VH", "VV")
    hidden = places[names[1]]
    assert (hidden.split, sensors(hidden), hidden.facts) == ("test_public", ["sar-quadpol"], {"orientation": 1})
    assert places[names[3]].facts == {"orientation": 0}
    assert Counter(left_out.values()) == {
        "panchromatic; PS-RGBNIR is used": 3,
        "no near infrared; PS-RGBNIR is used": 3,
        "coarser; PS-RGBNIR is used": 3,
    }


@pytest.mark.parametrize("inner", ["", "SN6", "a/b/c/d"])
def test_the_folder_may_lie_at_any_depth(tree: Path, tmp_path: Path, inner: str) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.move(str(tree), str(outer / inner))
    assert len(found("spacenet6", outer)[0]) == 5


def test_a_messy_tree(tree: Path) -> None:
    sar = file(tree, "SAR-Intensity", FROM_SOUTH, 10)
    (tree / "__MACOSX").mkdir()
    shutil.copy(sar, tree / "__MACOSX" / f"._{sar.name}")
    shutil.copy(sar, tree / sar.name)
    shutil.copy(sar, sar.parent / "preview.tif")
    shutil.copy(sar, sar.parent / sar.name.replace("20190804111224", "20191304111224"))  # month 13
    file(tree, "PS-RGBNIR", FROM_SOUTH, 10).unlink()
    file(tree, "SAR-Intensity", FROM_SOUTH, 8679).unlink()
    file(tree, "Buildings", FROM_NORTH, 7).unlink()
    write(tree, "Buildings", FROM_NORTH, 99)  # a label alone
    write(tree, "SAR-Intensity", FROM_NORTH, 7, "test_public")  # a tile of train
    places, left_out = found("spacenet6", tree)
    assert len(places) == 5
    assert sensors(places[f"{FROM_SOUTH}_tile_10"]) == ["sar-quadpol", LABEL]
    assert sensors(places[f"{FROM_SOUTH}_tile_8679"]) == ["rgbnir", LABEL]
    assert sensors(places[f"{FROM_NORTH}_tile_7"]) == ["sar-quadpol", "rgbnir"]
    reasons = {name.rsplit("/", 1)[-1]: reason for name, reason in left_out.items()}
    assert reasons[f"._{sar.name}"] == "left behind by an unpacker"
    assert reasons["preview.tif"] == "not a name of this archive"
    assert reasons[sar.name.replace("20190804111224", "20191304111224")] == "not a name of this archive"
    assert reasons[sar.name] == "a second file of the same name"
    assert reasons[f"{FROM_NORTH}_tile_99"] == "no image"
    assert "no GeoJSON file, so not labelled" in reasons[f"{FROM_NORTH}_tile_7 label"]
    assert reasons[f"{FROM_NORTH}_tile_7 test_public"] == "the tile is in train, too"


def test_rgbnir_takes_the_place_of_ps_rgbnir_only_where_there_is_none_at_all(tree: Path) -> None:
    places, _ = found("spacenet6", tree)
    shutil.rmtree(tree / "train" / AOI / "PS-RGBNIR")
    coarse, left_out = found("spacenet6", tree)
    assert list(coarse) == list(places)
    for name, place in coarse.items():
        assert sensors(place) == sensors(places[name])
        assert all("_RGBNIR_" in scene.path for scene in place.of("rgbnir"))
    assert "coarser; PS-RGBNIR is used" not in left_out.values()


def test_strips_of_unknown_orientation(tree: Path) -> None:
    path = orientations(tree, f"{FROM_SOUTH} 1\n\nstrip flag\n{FROM_NORTH} 2\n")
    places, left_out = found("spacenet6", tree)
    assert places[f"{FROM_SOUTH}_tile_10"].facts == {"orientation": 1}
    assert places[f"{FROM_NORTH}_tile_7"].facts == {}
    assert left_out[FROM_NORTH] == "orientation of the strip is not known; not turned"
    assert left_out["SAR_orientations.txt: strip flag"] == "not '<start>_<stop> <0|1>'"
    assert left_out[f"SAR_orientations.txt: {FROM_NORTH} 2"] == "not '<start>_<stop> <0|1>'"
    path.unlink()
    places, left_out = found("spacenet6", tree)
    assert all(place.facts == {} for place in places.values())
    assert left_out["SAR_orientations.txt"] == "not found; no tile is turned"


def test_orientations_that_contradict_each_other_are_refused(tree: Path) -> None:
    (tree / "SAR_orientations.txt").write_text(f"{FROM_SOUTH} 1\n{FROM_NORTH} 1\n")
    with pytest.raises(ArchiveError, match=rf"orientation of strip {FROM_NORTH} is 0 and 1"):
        found("spacenet6", tree)


def test_a_folder_without_images_is_an_error_that_shows_the_layout(tmp_path: Path) -> None:
    (tmp_path / "SN6_buildings_AOI_11_Rotterdam_train.tar.gz").write_bytes(b"")
    orientations(tmp_path)
    with pytest.raises(ArchiveError, match=r"no image of SpaceNet 6 was found there(?s:.*)tar xf SN6") as error:
        found("spacenet6", tmp_path)
    assert "SAR-Intensity/SN6_Train_AOI_11_Rotterdam" in str(error.value)


def test_what_is_said_of_the_archive() -> None:
    assert about("spacenet6").licence == "CC-BY-SA-4.0" and "Shermeyer" in about("spacenet6").attribution
    config = configs.load("shards-spacenet6")
    assert config.label.names == ("background", "building") and config.sensors == ("sar-quadpol", "rgbnir")


def test_shards_hold_the_tiles_and_batches_turn_them(tree: Path, tmp_path: Path) -> None:
    write(tree, "Buildings", FROM_NORTH, 7, houses=0)
    out = tmp_path / "data"
    samples = built("shards-spacenet6", tree, out, f"tile.size={SIZE}", "split.by=archive")
    assert {key.split("-")[0] for key in samples} == {f"{FROM_SOUTH}_tile_{n}" for n in (10, 8679)} | {
        f"{FROM_NORTH}_tile_7"
    }
    sample = next(sample for key, sample in samples.items() if "_tile_10-" in key)
    rng = np.random.default_rng(10)
    sar = rng.integers(10, 250, (4, SIZE, SIZE)).astype(np.float32) / np.float32(10)
    sar[:, :, :8] = 0
    np.testing.assert_array_equal(sample.tiles["sar-quadpol"].values, sar)
    np.testing.assert_array_equal(sample.tiles["sar-quadpol"].valid, (sar != 0).any(0))
    expected = np.zeros((SIZE, SIZE), np.uint8)
    expected[4:14, 10:30] = expected[4:14, 34:54] = 1
    assert sample.label is not None
    np.testing.assert_array_equal(sample.label, expected)
    assert sample.meta["orientation"] == 1 and sample.meta["group"] == FROM_SOUTH
    empty = next(sample for key, sample in samples.items() if "_tile_7-" in key)
    assert empty.label is not None and not empty.label.any()
    contract = select(str(out)).contract
    batch = collate([(sample, 0), (empty, 1)], contract)
    assert batch.label is not None
    np.testing.assert_array_equal(batch.label[0].numpy(), expected[::-1, ::-1])
    assert not batch.valid["sar-quadpol"][0, :, -8:].any() and not batch.valid["sar-quadpol"][1, :, :8].any()


@pytest.mark.real_data
def test_the_real_lists_of_tiles_and_strips(tmp_path: Path, real_data: Path) -> None:
    lists = real_data / "layout_files"
    ids = (lists / "SN6_train_tile_ids.txt").read_text().split()[1:]
    assert len(ids) == 3401
    path = orientations(tmp_path)
    shutil.copy(lists / "SN6_SAR_orientations.txt", path)
    for name in ids:
        strip, number = name.split("_tile_")
        for kind in ("SAR-Intensity", "PS-RGBNIR", "Buildings"):
            target = file(tmp_path, kind, strip, int(number))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    places, left_out = found("spacenet6", tmp_path)
    assert set(places) == set(ids) and left_out == {}
    flags = dict(line.split() for line in (lists / "SN6_SAR_orientations.txt").read_text().splitlines())
    assert all(str(place.facts["orientation"]) == flags[place.group] for place in places.values())
    assert Counter(flags.values()) == {"0": 102, "1": 102} and len({place.group for place in places.values()}) == 204
    assert all(sensors(place) == ["sar-quadpol", "rgbnir", LABEL] for place in places.values())
