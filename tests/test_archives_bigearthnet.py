"""BigEarthNet v1 and v2: trees to the letter of their layouts, what is found in them, and pixels."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from shards.archives import ArchiveError
from shards.archives.bigearthnet import time
from shards.manifest import select
from shards.scene import LABEL
from shards.sensors import SENSORS
from tests.benchmark_trees import built, found, merged, put, sensors
from tests.conftest import REAL_DATA

PIXELS = {60.0: 20, 20.0: 60, 10.0: 120}
PAIRS = {  # the hour without its leading zero is as in the archive
    "S2A_MSIL2A_20170613T101031_87_48": "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48",
    "S2B_MSIL2A_20170924T93020_69_24": "S1A_IW_GRDH_1SDV_20170925T043256_35VPK_69_24",
}


def optical_patch(folder: Path, fill: int = 1000, east: float = 0) -> Path:
    """Twelve files of three resolutions; a band's pixels are its place in the list plus `fill`."""
    for place, band in enumerate(SENSORS["s2-l2a"].bands):
        size = PIXELS[band.resolution]
        suffix = band.name if band.name == "B8A" else f"B{int(band.name[1:]):02d}"
        values = np.full((1, size, size), fill + place, np.uint16)
        put(folder / f"{folder.name}_{suffix}.tif", values, band.resolution, east)
    return folder


def radar_patch(folder: Path, east: float = 0) -> Path:
    for place, name in enumerate(("VV", "VH")):
        put(folder / f"{folder.name}_{name}.tif", np.full((1, 120, 120), -10.0 - place, np.float32), east=east)
    return folder


def bigearthnet_v1(root: Path, optical_home: str = "BigEarthNet-v1.0", radar_home: str = "BigEarthNet-S1-v1.0") -> Path:
    for one, two in PAIRS.items():
        tile = two.split("_")[5]
        known = {"labels": ["Pastures"], "tile_source": f"S2A_MSIL1C_20170613T101031_N0205_R022_T{tile}_20170613.SAFE"}
        folder = optical_patch(root / optical_home / one)
        (folder / f"{one}_labels_metadata.json").write_text(json.dumps(known))
        folder = radar_patch(root / radar_home / two)
        known = {"labels": ["Pastures"], "corresponding_s2_patch": one}
        (folder / f"{two}_labels_metadata.json").write_text(json.dumps(known))
    return root


@pytest.mark.parametrize("homes", [(), ("S2", "S1"), ("a/BigEarthNet-v1.0", "a/b"), (".", ".")], ids=str)
def test_bigearthnet_v1(tmp_path: Path, homes: tuple[str, ...]) -> None:
    places, left_out = found("bigearthnet-v1", bigearthnet_v1(tmp_path, *homes))
    assert left_out == {} and list(places) == sorted(PAIRS)
    place = places["S2B_MSIL2A_20170924T93020_69_24"]
    assert (place.group, place.split, place.facts) == ("35VPK", "", {"labels": ["Pastures"]})
    assert sensors(place) == ["s2-l2a", "s1"]
    assert [asset.bands for asset in place.scenes[0].assets] == [(name,) for name in SENSORS["s2-l2a"].band_names]
    assert place.scenes[0].time == datetime(2017, 9, 24, 9, 30, 20, tzinfo=UTC)
    assert place.scenes[1].time == datetime(2017, 9, 25, 4, 32, 56, tzinfo=UTC)


def test_bigearthnet_v1_that_lacks_files(tmp_path: Path) -> None:
    root = bigearthnet_v1(tmp_path)
    first, second = PAIRS
    (root / "BigEarthNet-v1.0" / first / f"{first}_B8A.tif").unlink()
    (root / "BigEarthNet-S1-v1.0" / PAIRS[second] / f"{PAIRS[second]}_labels_metadata.json").write_text("{")
    places, left_out = found("bigearthnet-v1", root)
    assert sensors(places[first]) == ["s1"] and places[first].group == "33UUP"
    assert sensors(places[second]) == ["s2-l2a"] and places[second].group == "35VPK"
    assert left_out == {
        first: "bands of s2-l2a are missing",
        PAIRS[second]: "no JSON file names its Sentinel-2 patch",
    }


def test_bigearthnet_v1_with_patches_twice(tmp_path: Path) -> None:
    root = bigearthnet_v1(tmp_path / "a")
    bigearthnet_v1(tmp_path / "b")
    places, left_out = found("bigearthnet-v1", tmp_path)
    assert list(places) == sorted(PAIRS)
    assert all(str(root) in asset.path for p in places.values() for s in p.scenes for asset in s.assets)
    homes = [f"b/BigEarthNet-v1.0/{one}" for one in PAIRS] + [f"b/BigEarthNet-S1-v1.0/{two}" for two in PAIRS.values()]
    assert left_out == dict.fromkeys(homes, "a second patch beside the one that is used")


def test_bigearthnet_v1_with_the_authors_lists(tmp_path: Path) -> None:
    root = bigearthnet_v1(tmp_path)
    first, second = PAIRS
    (root / "train.csv").write_text(f"{first},{PAIRS[first]}\n")
    (root / "bigearthnet-val.csv").write_text(f"{second},{PAIRS[second]}\r\n")
    assert [place.split for place in found("bigearthnet-v1", root)[0].values()] == ["train", "val"]
    (root / "patches_with_seasonal_snow.csv").write_text(f"{second}\n")
    places, left_out = found("bigearthnet-v1", root)
    assert list(places) == [first] and left_out == {second: "seasonal snow"}


@pytest.mark.parametrize(
    ("name", "clock"),
    [
        ("S2A_MSIL2A_20170613T101031_87_48", (10, 10, 31)),
        ("S2B_MSIL2A_20170924T93020_69_24", (9, 30, 20)),
        ("S2A_MSIL2A_20171221T112575_56_35", (11, 25, 59)),
        ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48", (16, 50, 43)),
    ],
)
def test_times_in_the_names_of_patches(name: str, clock: tuple[int, int, int]) -> None:
    found = time(name)
    assert (found.hour, found.minute, found.second) == clock and found.tzinfo is UTC


def test_bigearthnet_v1_as_shards(tmp_path: Path) -> None:
    root = bigearthnet_v1(tmp_path / "in")
    samples = built("shards-bigearthnet-v1", root, tmp_path / "out", "tile.size=120")
    assert set(samples) == {f"{name}-00000-00000" for name in PAIRS}
    for sample in samples.values():
        tile = sample.tiles["s2-l2a"]
        assert tile.valid.all() and tile.values.dtype == np.uint16
        assert (tile.values == np.arange(1000, 1012)[:, None, None]).all()
        assert (sample.tiles["s1"].values == np.array([-10, -11])[:, None, None]).all()


@pytest.mark.real_data
def test_real_patches_of_bigearthnet_v1(tmp_path: Path) -> None:
    root = REAL_DATA / "paired/bigearthnet_v1_examples"
    places, left_out = found("bigearthnet-v1", root)
    assert left_out == {} and [place.group for place in places.values()] == ["33UUP", "29SND", "35VPK"]
    samples = built("shards-bigearthnet-v1", root, tmp_path / "out", "tile.size=120")
    assert len(samples) == 3
    for name, place in places.items():
        tiles = samples[f"{name}-00000-00000"].tiles
        for sensor in ("s2-l2a", "s1"):
            bands = {a.bands[0]: a.path for s in place.of(sensor) for a in s.assets}
            for index, band in enumerate(SENSORS[sensor].bands):
                with rasterio.open(bands[band.name]) as raster:
                    whole = raster.read(1)
                if whole.shape == (120, 120):
                    np.testing.assert_array_equal(tiles[sensor].values[index], whole)
                else:  # resampled: the same mean over the patch
                    assert tiles[sensor].values[index].mean() == pytest.approx(whole.mean(), rel=0.03)
            assert tiles[sensor].valid.all()
        assert tiles["s2-l2a"].time == place.scenes[0].time


CORINE = [111, 112, 212, 241, 312, 333, 412, 512, 522, 122, 423, 999]
ROWS = {
    "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57": ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_26_57", "train"),
    "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_58": (
        "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_26_58",
        "validation",
    ),
    "S2B_MSIL2A_20180515T094029_N9999_R036_T35VPK_01_02": ("S1B_IW_GRDH_1SDV_20180515T044142_35VPK_01_02", "test"),
}


def bigearthnet_v2(root: Path, rows: dict[str, tuple[str, str]] = ROWS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, (one, (two, _)) in enumerate(rows.items()):
        tile, east = one.rsplit("_", 2)[0], 1200 * number
        optical_patch(root / "BigEarthNet-S2" / tile / one, 2000, east)
        radar_patch(root / "BigEarthNet-S1" / two.rsplit("_", 3)[0] / two, east)
        labels = np.random.default_rng(3).choice(CORINE, (1, 120, 120)).astype(np.uint16)
        put(root / "Reference_Maps" / tile / one / f"{one}_reference_map.tif", labels, east=east)
    table = {"patch_id": list(rows), "labels": [["Pastures"]] * len(rows), "country": ["Austria"] * len(rows)}
    table |= {"s1_name": [two for two, _ in rows.values()], "split": [split for _, split in rows.values()]}
    pq.write_table(pa.table(table), root / "metadata.parquet")
    return root


@pytest.mark.parametrize("wrapped", [False, True])
def test_bigearthnet_v2(tmp_path: Path, wrapped: bool) -> None:
    root = bigearthnet_v2(tmp_path / "BigEarthNet" if wrapped else tmp_path)
    if wrapped:
        (root / "BigEarthNet-S1").rename(tmp_path / "inner")
        (root / "BigEarthNet-S1").mkdir()
        (tmp_path / "inner").rename(root / "BigEarthNet-S1/BigEarthNet-S1")
    places, left_out = found("bigearthnet-v2", tmp_path)
    assert left_out == {} and list(places) == sorted(ROWS)
    assert [place.split for place in places.values()] == ["train", "val", "test"]
    assert [place.group for place in places.values()] == ["33UUP", "33UUP", "35VPK"]
    last = places["S2B_MSIL2A_20180515T094029_N9999_R036_T35VPK_01_02"]
    assert sensors(last) == ["s2-l2a", "s1", LABEL]
    assert last.scenes[0].time == datetime(2018, 5, 15, 9, 40, 29, tzinfo=UTC)
    assert {asset.radiometry.offset for scene in last.scenes for asset in scene.assets} == {0.0}
    assert last.facts == {"labels": ["Pastures"], "country": "Austria"}


def test_bigearthnet_v2_that_lacks_files(tmp_path: Path) -> None:
    snow = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_00_01"
    root = bigearthnet_v2(tmp_path)
    first, second, third = sorted(ROWS)
    tile = first.rsplit("_", 2)[0]
    optical_patch(root / "BigEarthNet-S2" / tile / snow)
    (root / "Reference_Maps" / tile / first / f"{first}_reference_map.tif").unlink()
    (root / "BigEarthNet-S2" / tile / second / f"{second}_B01.tif").unlink()
    (root / "BigEarthNet-S1" / ROWS[third][0].rsplit("_", 3)[0]).rename(tmp_path / "elsewhere")
    places, left_out = found("bigearthnet-v2", root)
    assert [sensors(places[name]) for name in (first, second, third)] == [
        ["s2-l2a", "s1"],
        ["s1", LABEL],
        ["s2-l2a", LABEL],
    ]
    assert left_out == {
        snow: "not in metadata.parquet (seasonal snow, clouds or their shadow)",
        second: "bands of s2-l2a are missing",
        third: "no s1 patch",
    }


def test_names_of_a_foreign_table_do_not_become_paths(tmp_path: Path) -> None:
    root = bigearthnet_v2(tmp_path / "in", {name: ROWS[name] for name in sorted(ROWS)[:1]})
    rows = pq.read_table(root / "metadata.parquet").to_pylist()
    rows += [{**rows[0], "patch_id": "../../x_1_2"}, {**rows[0], "patch_id": sorted(ROWS)[1], "s1_name": "../a_b_c_d"}]
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    places, left_out = found("bigearthnet-v2", root)
    assert list(places) == sorted(ROWS)[:1]
    assert left_out == dict.fromkeys(["../../x_1_2", sorted(ROWS)[1]], "metadata.parquet has no valid names for it")


def test_bigearthnet_v2_without_its_table_or_columns(tmp_path: Path) -> None:
    root = bigearthnet_v2(tmp_path)
    pq.write_table(pq.read_table(root / "metadata.parquet").drop_columns(["s1_name"]), root / "metadata.parquet")
    with pytest.raises(ArchiveError, match=r"columns \['s1_name'\] are missing"):
        found("bigearthnet-v2", root)
    (root / "metadata.parquet").unlink()
    with pytest.raises(ArchiveError, match=r"metadata.parquet is missing"):
        found("bigearthnet-v2", root)


def test_bigearthnet_v2_as_shards(tmp_path: Path) -> None:
    root = bigearthnet_v2(tmp_path / "in", dict(list(ROWS.items())[:2]))
    samples = built("shards-bigearthnet-v2", root, tmp_path / "out", "tile.size=120")
    raw = np.random.default_rng(3).choice(CORINE, (120, 120))
    assert len(samples) == 2
    assert set(select(str(tmp_path / "out")).rows(["split"])["split"].to_pylist()) == {"train", "val"}
    for sample in samples.values():
        assert (sample.tiles["s2-l2a"].values == np.arange(2000, 2012)[:, None, None]).all()
        np.testing.assert_array_equal(sample.label, merged(raw, "shards-bigearthnet-v2"))
    assert (sample.label[raw == 112] == 0).all() and (sample.label[raw == 522] == 18).all()
    assert (sample.label[np.isin(raw, [122, 423, 999])] == 255).all()
