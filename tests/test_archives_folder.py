"""Scenes that are told by the names in a folder."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from shards.archives import ArchiveError
from shards.archives.folder import compiled
from shards.manifest import select
from shards.scene import LeftOut, Radiometry
from shards.sensors import SENSORS
from tests.archive_checks import discover, samples
from tests.safe_trees import L2A
from tests.scenes import ORIGIN, north_up, write_scene


@pytest.mark.parametrize(
    ("pattern", "name", "fields"),
    [
        ("{place}/{sensor}.tif", "a b/S2-L2A.tif", {"place": "a b", "sensor": "S2-L2A"}),
        ("{place}/{sensor}_{time}.tif", "a/s1_20230101.tif", {"place": "a", "sensor": "s1", "time": "20230101"}),
        (
            "{place}_{sensor}_{time}.tif",
            "a_b_c_s1_2023-01-01T10:20:30Z.tif",
            {"place": "a_b_c", "time": "2023-01-01T10:20:30Z"},
        ),
        ("{sensor}/{place}_{band}.tif", "s2-l1c/a_1_B08.tif", {"place": "a_1", "band": "B08"}),
        ("{sensor}/{place}_{band}.tif", "s2-l1c/a_1_B12.tif", {"place": "a_1", "band": "B12"}),
        ("{split}/{group}/{sensor}/{place}.tif", "train/x/dem/7.tif", {"split": "train", "group": "x", "place": "7"}),
        ("{place}/{place}_{sensor}*.tif", "a/a_label_v2.tif", {"place": "a", "sensor": "label"}),
        ("{place}/{place}_{sensor}.tif", "a/b_s1.tif", None),
        ("{place}/{sensor}.tif", "x/a/s1.tif", None),
        ("{place}/{sensor}.tif", "a/s1xtif", None),
        ("{place}/{sensor}.tif", "a/s9.tif", None),
        ("{place}_{sensor}.tif", "_s1.tif", None),
    ],
)
def test_patterns(pattern: str, name: str, fields: dict[str, str] | None) -> None:
    match = compiled(pattern).fullmatch(name)
    assert (match is None) == (fields is None)
    assert fields is None or match is None or fields.items() <= match.groupdict().items()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{place}/{instrument}.tif", "unknown fields \\['instrument'\\]; known: place, sensor, time"),
        ("{place}/{sensor:d}/{}.tif", "unknown fields \\[''\\]"),
        ("{sensor}.tif", "\\['place'\\] missing; patterns look like {place}/{sensor}.tif"),
        ("", "\\['place', 'sensor'\\] missing"),
        ("{place}/{sensor.tif", "expected '}'"),
        (
            "{place}/{sensor}/none.tif",
            "no file fits.*there is a/s1.tif; patterns look like.*sensors are called s1, s2-l1c",
        ),
    ],
)
def test_mistakes_in_patterns_are_explained(tmp_path: Path, pattern: str, words: str) -> None:
    write_scene(tmp_path / "a/s1.tif", "s1", size=32)
    with pytest.raises(ArchiveError, match=words):
        discover("folder", tmp_path, pattern)


def test_a_folder_by_pattern(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        where = north_up(10.0, ORIGIN[0] + 5000 * number)
        for sensor in (L2A, "s1"):
            write_scene(tmp_path / f"{split}/p{number}/{sensor.upper()}_20230101T101500.tif", sensor, transform=where)
    (tmp_path / "test/p1/notes.txt").touch()
    (tmp_path / "test/p1/._s1_20230101T101500.tif").touch()
    shutil.copy(tmp_path / "train/p0/S1_20230101T101500.tif", tmp_path / "train/p0/S1_copy.tif")
    pattern = "{split}/{place}/{sensor}_{time}.tif"
    places, left_out = discover("folder", tmp_path, pattern)
    assert {name: (place.split, place.group) for name, place in places.items()} == {
        "p1": ("test", "p1"), "p0": ("train", "p0"),
    }  # fmt: skip
    assert left_out == [LeftOut("train/p0/S1_copy.tif", "does not fit archive.pattern")]
    scenes = {scene.sensor: scene for scene in places["p0"].scenes}
    assert scenes["s1"].time == datetime(2023, 1, 1, 10, 15, tzinfo=UTC)
    assert scenes[L2A].assets[0].radiometry.offset == -1000 and scenes["s1"].assets[0].radiometry == Radiometry()
    made = samples("folder", tmp_path, [L2A, "s1"], pattern)
    assert len(made) == 18
    assert set(select(str(tmp_path / ".data")).rows(["split"])["split"].to_pylist()) == {"train", "test"}


def test_one_file_per_band_with_its_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = {}
    for band in SENSORS[L2A].bands:
        count = int(640 / band.resolution)
        numbers[band.name] = rng.integers(1, 3000, (1, count + 1, count + 1)).astype(np.uint16)
        name = f"{L2A}/a_{band.name}.tif"
        write_scene(tmp_path / name, "label", values=numbers[band.name], transform=north_up(band.resolution))
    scl = np.full((33, 33), 4, np.uint8)
    scl[:16, :16] = 8
    write_scene(tmp_path / L2A / "a_SCL.tif", "label", values=scl[None], metres=20.0)
    made = samples("folder", tmp_path, [L2A], "{sensor}/{place}_{band}.tif")
    assert made["a-00000-00000"].meta["cloud"] == 1.0 and made["a-00000-00032"].meta["cloud"] == 0.0
    values = made["a-00000-00032"].tiles[L2A].values
    np.testing.assert_array_equal(values[SENSORS[L2A].band_names.index("B3")], numbers["B3"][0, :32, 32:64])
    with pytest.raises(ArchiveError, match="a_VV.tif: s2-l2a has no band VV"):
        write_scene(tmp_path / L2A / "a_VV.tif", "dem", size=32)
        discover("folder", tmp_path, "{sensor}/{place}_{band}.tif")
