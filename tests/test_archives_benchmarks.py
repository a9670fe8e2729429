"""SEN12MS, DFC2020, BigEarthNet and Hunan: trees to the letter of each layout, what is found in them, and pixels."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

import configs
from configs import ConfigError
from shards.archives import ArchiveError, about, open_archive
from shards.archives.bigearthnet import time
from shards.build import build
from shards.manifest import select
from shards.raster_io import write_geotiff
from shards.scene import LABEL, LeftOut, Place
from shards.sensors import SENSORS
from shards.stream import Share, Stream
from shards.verify import verify
from tests.conftest import REAL_DATA
from tests.scenes import ORIGIN, UTM, north_up

SIZE = 32
NAMES = ("sen12ms", "dfc2020", "bigearthnet-v1", "bigearthnet-v2", "hunan")


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
    items = list(open_archive(name, str(root)))
    places = [item for item in items if isinstance(item, Place)]
    assert len({place.name for place in places}) == len(places)
    assert list(open_archive(name, str(root))) == items, "the order is not fixed"
    return {place.name: place for place in places}, {i.name: i.reason for i in items if isinstance(i, LeftOut)}


def sensors(place: Place) -> list[str]:
    return [scene.sensor for scene in place.scenes]


def built(preset: str, root: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """The samples that a preset makes of an archive, by key."""
    settings = [f"archive.root={root}", f"out={out}", f"tile.size={SIZE}", "workers=1", *overrides]
    build(configs.load(preset, settings))
    assert verify(str(out)) == []
    return {sample.key: sample for sample, _ in Stream(select(str(out)), 0, 1, Share(1)).once()}


def merged(raw: np.ndarray[Any, Any], preset: str) -> np.ndarray[Any, Any]:
    """Class indices of codes by the preset's table, 255 for all others."""
    lookup = np.full(1000, 255, np.uint8)
    for code, index in configs.load(preset).label.table().items():
        lookup[code] = index
    return np.asarray(lookup[raw])


# --- SEN12MS and DFC2020 ---------------------------------------------------------------------------------------------


def patch(root: Path, folder: str, scene: str, number: int, kinds: tuple[str, ...], **more: Any) -> None:
    """The files of one patch, `folder` being ROIs1158_spring and the like."""
    values = {
        "s1": radar(more.get("radar", np.float32), number),
        "s2": optical(13, seed=number),
        "s2_cloudy": optical(13),
        "lc": codes(list(range(18)), np.uint16, 4),
        "dfc": codes(list(range(11)), more.get("label", np.uint8)),
    }
    for kind in kinds:
        where = root / folder / f"{kind}_{more.get('token', scene)}"
        put(where / f"{folder}_{kind}_{scene}_p{number}.tif", values[kind], east=1000.0 * number)


def sen12ms(root: Path) -> Path:
    for folder, scene, numbers in (("ROIs1158_spring", "124", (30, 100)), ("ROIs2017_winter", "8", (9,))):
        for number in numbers:
            patch(root, folder, scene, number, ("s1", "s2", "lc"))
    return root


def test_sen12ms(tmp_path: Path) -> None:
    root = sen12ms(tmp_path)
    places, left_out = found("sen12ms", root)
    assert list(places) == ["ROIs1158_spring_124_p30", "ROIs1158_spring_124_p100", "ROIs2017_winter_8_p9"]
    assert left_out == {}
    first = places["ROIs1158_spring_124_p30"]
    assert (first.group, first.split, first.facts) == ("ROIs1158_spring_124", "", {"season": "spring"})
    assert sensors(first) == ["s2-l1c", "s1", LABEL] and {scene.time for scene in first.scenes} == {None}
    assert first.scenes[0].assets[0].bands == SENSORS["s2-l1c"].band_names
    assert first.scenes[2].assets[0].bands == ("label", "", "", "")


def test_sen12ms_in_a_messy_tree(tmp_path: Path) -> None:
    root = sen12ms(tmp_path / "ROIs1158_spring_unpacked")
    patch(root, "ROIs1868_summer", "146", 202, ("s1", "s2", "lc"))
    patch(root, "ROIs1158_spring", "1", 31, ("s1", "s2_cloudy"))
    patch(root, "ROIs0000_test", "0", 1, ("s1", "s2"))
    source = root / "ROIs1158_spring/s1_124/ROIs1158_spring_s1_124_p30.tif"
    for copy in ("__MACOSX/s1_124/ROIs1158_spring_s1_124_p30.tif", "s1_124/._a.tif", "copy/" + source.name, "map.tif"):
        (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / copy).write_bytes(source.read_bytes())
    places, left_out = found("sen12ms", tmp_path)
    assert sensors(places["ROIs1868_summer_146_p202"]) == ["s2-l1c", LABEL]
    assert sensors(places["ROIs1158_spring_1_p31"]) == ["s1"]
    assert len(places) == 5 and len(left_out) == 7
    broken = left_out.pop("ROIs1158_spring_unpacked/ROIs1868_summer/s1_146/ROIs1868_summer_s1_146_p202.tif")
    assert "NaN" in broken and "README" in broken
    assert Counter(left_out.values()) == {
        "left behind by an unpacker": 2,
        "cloudy image of SEN12MS-CR": 1,
        "a second file of the same name": 1,
        "not a name of this archive": 1,
        "DFC2020: archive.name=dfc2020": 1,
    }


def test_sen12ms_splits_from_lists_of_patches(tmp_path: Path) -> None:
    root = sen12ms(tmp_path)
    (root / "splits").mkdir()
    (root / "splits/train_list.txt").write_text("ROIs1158_spring_s2_124_p30.tif\nROIs2017_winter_s2_8_p9.tif\n")
    (root / "splits/val_list.txt").write_text("ROIs2017_winter_s2_8_p9.tif\n")
    (root / "SEN12MS_holdOutScenes.txt").write_text("ROIs1158_spring/s1_124\n")
    places, _ = found("sen12ms", root)
    assert [place.split for place in places.values()] == ["train", "", "val"]


def test_sen12ms_splits_from_the_list_of_scenes(tmp_path: Path) -> None:
    (sen12ms(tmp_path) / "SEN12MS_holdOutScenes.txt").write_text("ROIs1158_spring/s1_124\nROIs1158_spring/s1_8\n")
    places, _ = found("sen12ms", tmp_path)
    assert [place.split for place in places.values()] == ["test", "test", "train"]


@pytest.mark.real_data
def test_the_real_lists_of_sen12ms(tmp_path: Path) -> None:
    for source, name, splits in (
        ("SEN12MS_test_list.head40.txt", "test_list.txt", ["", "test", ""]),
        ("SEN12MS_holdOutScenes.txt", "SEN12MS_holdOutScenes.txt", ["test", "test", "train"]),
    ):
        root = sen12ms(tmp_path / source)
        (root / name).write_bytes((REAL_DATA / "layout_files" / source).read_bytes())
        assert [place.split for place in found("sen12ms", root)[0].values()] == splits


def test_sen12ms_as_shards(tmp_path: Path) -> None:
    root = sen12ms(tmp_path / "in")
    samples = built("shards-sen12ms", root, tmp_path / "out")
    assert len(samples) == 3
    sample = samples["ROIs1158_spring_124_p100-00000-00000"]
    np.testing.assert_array_equal(sample.tiles["s2-l1c"].values, optical(13, seed=100))
    np.testing.assert_array_equal(sample.tiles["s1"].values, radar(seed=100))
    np.testing.assert_array_equal(sample.label, merged(codes(list(range(18)), np.uint16, 4)[0], "shards-sen12ms"))
    assert sample.meta["season"] == "spring" and sample.meta["group"] == "ROIs1158_spring_124"


def contest(root: Path) -> Path:
    both = ("s1", "s2", "dfc", "lc")
    for number in (0, 30):
        patch(root, "ROIs0000_validation", "0", number, both, token="validation", radar=np.float64, label=np.int32)
    patch(root, "ROIs0000_test", "0", 7, both, radar=np.float64)
    patch(root, "ROIs0000_test", "0", 9, ("s1", "lc"))
    return root


def test_dfc2020_as_the_contest_gave_it_out(tmp_path: Path) -> None:
    places, left_out = found("dfc2020", contest(tmp_path))
    assert [(place.name, place.split, place.group) for place in places.values()] == [
        ("ROIs0000_test_0_p7", "test", "ROIs0000_test_0"),
        ("ROIs0000_test_0_p9", "test", "ROIs0000_test_0"),
        ("ROIs0000_validation_0_p0", "val", "ROIs0000_validation_0"),
        ("ROIs0000_validation_0_p30", "val", "ROIs0000_validation_0"),
    ]
    assert [sensors(place) for place in places.values()] == [
        ["s2-l1c", "s1", LABEL],
        ["s1"],
        *[["s2-l1c", "s1", LABEL]] * 2,
    ]
    assert all("_dfc_" in place.scenes[-1].path for place in places.values() if LABEL in sensors(place))
    assert list(left_out.values()) == ["MODIS land cover of 500 m; the labels are dfc"] * 4


def test_dfc2020_as_the_public_bundle(tmp_path: Path) -> None:
    root = tmp_path / "DFC_Public_Dataset"
    patch(root, "ROIs0000_autumn", "CapeTown", 1277, ("s1", "s2", "lc", "dfc"))
    patch(root, "ROIs0000_winter", "MexicoCity", 3, ("s1", "s2", "lc", "dfc"))
    sen12ms(tmp_path)
    places, left_out = found("dfc2020", tmp_path)
    town = places["ROIs0000_autumn_CapeTown_p1277"]
    assert (town.group, town.split) == ("ROIs0000_autumn_CapeTown", "")
    assert town.facts == {"season": "autumn", "city": "CapeTown"}
    assert set(places) == {town.name, "ROIs0000_winter_MexicoCity_p3"}
    assert left_out["ROIs1158_spring"] == left_out["ROIs2017_winter"] == "SEN12MS: archive.name=sen12ms"


def test_dfc2020_as_shards(tmp_path: Path) -> None:
    samples = built("shards-dfc2020", contest(tmp_path / "in"), tmp_path / "out")
    assert set(samples) == {
        f"ROIs0000_{name}-00000-00000" for name in ("test_0_p7", "validation_0_p0", "validation_0_p30")
    }
    sample = samples["ROIs0000_validation_0_p30-00000-00000"]
    assert sample.tiles["s1"].values.dtype == np.float32
    np.testing.assert_array_equal(sample.tiles["s1"].values, radar(np.float64, 30).astype(np.float32))
    expected = merged(codes(list(range(11)))[0], "shards-dfc2020")
    assert {0, 7, 255} <= set(np.unique(expected))
    np.testing.assert_array_equal(sample.label, expected)
    facts = json.loads((tmp_path / "out/dataset.json").read_text())
    assert facts["left_out"]["MODIS land cover of 500 m; the labels are dfc"] == 4


# --- BigEarthNet -----------------------------------------------------------------------------------------------------

PIXELS = {60.0: 20, 20.0: 60, 10.0: 120}
PAIRS = {  # the hour without its leading zero is as in the archive
    "S2A_MSIL2A_20170613T101031_87_48": "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48",
    "S2B_MSIL2A_20170924T93020_69_24": "S1A_IW_GRDH_1SDV_20170925T043256_35VPK_69_24",
}


def optical_patch(folder: Path, fill: int = 1000) -> Path:
    """Twelve files of three resolutions; a band's pixels are its place in the list plus `fill`."""
    for place, band in enumerate(SENSORS["s2-l2a"].bands):
        size = PIXELS[band.resolution]
        suffix = band.name if band.name == "B8A" else f"B{int(band.name[1:]):02d}"
        put(folder / f"{folder.name}_{suffix}.tif", np.full((1, size, size), fill + place, np.uint16), band.resolution)
    return folder


def radar_patch(folder: Path) -> Path:
    for place, name in enumerate(("VV", "VH")):
        put(folder / f"{folder.name}_{name}.tif", np.full((1, 120, 120), -10.0 - place, np.float32))
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
    for one, (two, _) in rows.items():
        tile = one.rsplit("_", 2)[0]
        optical_patch(root / "BigEarthNet-S2" / tile / one, 2000)
        radar_patch(root / "BigEarthNet-S1" / two.rsplit("_", 3)[0] / two)
        labels = np.random.default_rng(3).choice(CORINE, (1, 120, 120)).astype(np.uint16)
        put(root / "Reference_Maps" / tile / one / f"{one}_reference_map.tif", labels)
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
    assert len(samples) == 2 and {sample.meta["split"] for sample in samples.values()} == {"train", "val"}
    for sample in samples.values():
        assert (sample.tiles["s2-l2a"].values == np.arange(2000, 2012)[:, None, None]).all()
        np.testing.assert_array_equal(sample.label, merged(raw, "shards-bigearthnet-v2"))
    assert (sample.label[raw == 112] == 0).all() and (sample.label[raw == 522] == 18).all()
    assert (sample.label[np.isin(raw, [122, 423, 999])] == 255).all()


# --- Hunan -----------------------------------------------------------------------------------------------------------


def hunan(root: Path) -> Path:
    for split, numbers in {"train": (2604, 11624), "val": (15184,), "test": (3,)}.items():
        for number in numbers:
            topo = np.stack([np.full((SIZE, SIZE), 100.0 + number % 7), np.full((SIZE, SIZE), 7.0)]).astype(np.float32)
            files = {"s2": optical(13, seed=number), "s1": radar(seed=number), "topo": topo}
            files["lc"] = codes([*range(13), 255])
            files |= {"tri": topo[:1]} if split == "train" else {}
            for kind, values in files.items():
                put(root / split / kind / f"{kind}_{number}.tif", values, crs=None)
    return root


def test_hunan(tmp_path: Path) -> None:
    places, left_out = found("hunan", hunan(tmp_path / "Hunan_Dataset"))
    assert list(places) == ["train_2604", "train_11624", "val_15184", "test_3"]
    place = places["val_15184"]
    assert sensors(place) == ["s2-l1c", "s1", "dem", LABEL] and place.coregistered
    assert (place.group, place.split, place.facts) == ("val", "val", {"year": 2017})
    assert place.scenes[2].assets[0].bands == ("DEM", "") and place.scenes[0].time is None
    assert list(left_out.values()) == ["terrain ruggedness, made from the elevation"] * 2


def test_hunan_in_a_messy_tree(tmp_path: Path) -> None:
    root = hunan(tmp_path / "a")
    (root / "train/lc/lc_2604.tif").rename(root / "train/lc/2604.tif")  # as some copies call them
    (root / "train/s1/s1_11624.tif").unlink()
    (root / "s2").mkdir()
    (root / "s2/s2_1.tif").write_bytes(b"")
    (root / "train/s2/._s2_2604.tif").write_bytes(b"")
    (root / "train/s2/copy").mkdir()
    (root / "train/s2/copy/s2_2604.tif").write_bytes(b"")
    places, left_out = found("hunan", tmp_path)
    assert sensors(places["train_2604"]) == ["s2-l1c", "s1", "dem", LABEL]
    assert sensors(places["train_11624"]) == ["s2-l1c", "dem", LABEL]
    assert left_out["a/s2/s2_1.tif"] == "not a name of this archive"
    assert left_out["a/train/s2/._s2_2604.tif"] == "left behind by an unpacker"
    assert left_out["a/train/s2/copy/s2_2604.tif"] == "a second file of the same tile"


def test_hunan_as_shards(tmp_path: Path) -> None:
    samples = built("shards-hunan", hunan(tmp_path / "in"), tmp_path / "out")
    assert len(samples) == 4
    sample = samples["train_2604-00000-00000"]
    assert sample.meta["crs"] is None and sample.meta["footprint"] is None
    np.testing.assert_array_equal(sample.tiles["s2-l1c"].values, optical(13, seed=2604))
    np.testing.assert_array_equal(sample.tiles["s1"].values, radar(seed=2604))
    assert (sample.tiles["dem"].values == 100.0 + 2604 % 7).all() and sample.tiles["dem"].values.shape[0] == 1
    # The authors' table, with the class 7 that their list of classes does not have ignored.
    table = np.array([255, 0, 1, 2, 1, 3, 4, 6, 6, 5, 6, 255, 255])
    raw = codes([*range(13), 255])[0]
    np.testing.assert_array_equal(sample.label, table[np.where(raw == 255, 12, raw)])


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_archive_is_an_error_that_shows_the_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere"):
        list(open_archive(name, str(tmp_path / "nowhere")))
    put(tmp_path / "a/some.tif", codes([1]))
    with pytest.raises(ArchiveError) as caught:
        list(open_archive(name, str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and str(caught.value).count("\n") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_an_archive(name: str) -> None:
    known = about(name)
    assert known.title and known.licence and known.attribution and known.source.startswith("https://")
    assert set(known.notes) <= set(SENSORS)
    assert configs.load(f"shards-{name}").archive.name == name


def test_several_codes_may_be_one_class() -> None:
    label = configs.load(
        "shards-catalog", ["label={names: [a, b], palette: [[0, 0, 0], [9, 9, 9]], codes: [[4, 2], 7]}"]
    )
    assert label.label.table() == {4: 0, 2: 0, 7: 1}
    assert configs.parse(configs.to_dict(label)) == label


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("codes: [[4, 2], 2]", r"codes \[2\] stand for two classes"),
        ("codes: [[4, 255], 2]", r"codes \[255\] stand for two classes, or for one and 'no label here'"),
        ("codes: [1, 2], ignored: [2]", r"codes \[2\] stand"),
        ("codes: [[1, 2]]", "2 names but 1 codes; give one, or a list, per class"),
    ],
)
def test_codes_that_contradict_each_other(wrong: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configs.load("shards-catalog", [f"label={{names: [a, b], palette: [[0, 0, 0], [9, 9, 9]], {wrong}}}"])
