"""SEN12MS, DFC2020 and Hunan: trees to the letter of each layout, what is found in them, and pixels.

At the end, what all benchmark archives have in common.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from configs import ConfigError
from shards.archives import ArchiveError, about, open_archive
from shards.scene import LABEL
from shards.sensors import SENSORS
from tests.benchmark_trees import SIZE, built, codes, found, merged, optical, put, radar, sensors
from tests.conftest import REAL_DATA

NAMES = ("sen12ms", "dfc2020", "bigearthnet-v1", "bigearthnet-v2", "hunan")


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
