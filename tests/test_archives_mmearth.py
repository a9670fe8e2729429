"""MMEarth: a file to the letter of the layout, what is found in it, and pixels."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shards.archives import ArchiveError, open_archive
from shards.scene import CloudMask, SceneError
from shards.sensors import SENSORS
from tests.archive_checks import one
from tests.benchmark_trees import SIZE, built, found, sensors

OPTICAL = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
TILES = {"aa_0": "l1c", "bb_1": "l2a", "cc_2": "l2a", "dd_3": "l1c"}
PASSES = ("asc", "desc")
ORBITS = {"aa_0": ("asc", "desc"), "bb_1": ("desc",), "cc_2": (), "dd_3": ("asc",)}


def mmearth(root: Path) -> Path:
    root.mkdir(parents=True)
    optic = np.random.default_rng(3).integers(300, 4000, (4, 13, SIZE, SIZE)).astype(np.uint16)
    optic[1:3, OPTICAL.index("B10")] = 0
    radio = np.full((4, 8, SIZE, SIZE), -np.inf, np.float32)
    for row, tile in enumerate(TILES):
        for orbit in ORBITS[tile]:
            first = {"asc": 0, "desc": 4}[orbit]
            radio[row, first : first + 2] = np.random.default_rng(row + first).normal(-12, 3, (2, SIZE, SIZE))
    levels = np.array([(name.encode(), level.encode()) for name, level in TILES.items()], "S100,S10")
    levels.dtype.names = ("tile_id", "S2_type")
    classes = np.resize(np.arange(12, dtype=np.uint8), (4, 1, SIZE, SIZE))
    bits = np.resize(np.array([0, 1024, 2048, 65535], np.uint16), (4, 1, SIZE, SIZE))
    with h5py.File(root / f"{root.name}.h5", "w") as file:
        for name, data in (("sentinel2", optic), ("sentinel1", radio), ("sentinel2_scl", classes),
                           ("sentinel2_cloudmask", bits), ("aster", heights())):  # fmt: skip
            file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]), compression="gzip")
        file.create_dataset("metadata", data=levels)
    bands = {"sentinel2": list(OPTICAL), "aster": ["b1", "slope"]}
    info = {
        name: {
            "S2_DATE": f"2019-06-0{row + 1}", "S2_type": level, "CRS": "EPSG:32633", "lat": 47.9, "lon": -0.5 + row,
            "biome": 3, "era5": {"year": [1.0, 2.0]},
            "BANDS": {**bands, **{f"sentinel1_{o}": ["VV", "VH"] if o in ORBITS[name] else None for o in PASSES}},
        }
        for row, (name, level) in enumerate(TILES.items())
    }  # fmt: skip
    (root / f"{root.name}_tile_info.json").write_text(json.dumps(info))
    (root / f"{root.name}_splits.json").write_text(json.dumps({"train": [0, 2], "val": [1], "test": []}))
    return root


def heights() -> np.ndarray[Any, Any]:
    return np.random.default_rng(8).integers(1, 900, (4, 2, SIZE, SIZE)).astype(np.int16)


def test_mmearth(tmp_path: Path) -> None:
    mmearth(tmp_path / "data_100k_v001")
    places, left_out = found("mmearth", tmp_path)
    assert list(places) == list(TILES) and left_out == {}
    assert [sensors(place) for place in places.values()] == [
        ["s2-l1c", "s1", "dem"], ["s2-l2a", "s1", "dem"], ["s2-l2a", "dem"], ["s2-l1c", "s1", "dem"],
    ]  # fmt: skip
    assert [place.split for place in places.values()] == ["train", "val", "train", ""]
    first, second = places["aa_0"], places["bb_1"]
    assert first.coregistered and first.group == "47,-1" and second.group == "47,0"
    assert first.facts == {"tile_crs": "EPSG:32633", "lat": 47.9, "lon": -0.5}
    assert one(first, "s2-l1c").time == datetime(2019, 6, 1, tzinfo=UTC) and one(first, "s1").time is None
    assert one(first, "s2-l1c").assets[0].bands == OPTICAL
    assert one(second, "s2-l2a").assets[0].bands == (*OPTICAL[:10], "", *OPTICAL[11:])
    assert one(first, "s1").assets[0].bands[:2] == ("VV", "VH") and one(second, "s1").assets[0].bands[4:6] == (
        "VV",
        "VH",
    )
    assert one(second, "s2-l2a").cloud == CloudMask(one(second, "s2-l2a").cloud.asset, (8, 9, 10))  # type: ignore[union-attr]
    assert one(first, "s2-l1c").assets[0].item == "sentinel2/0" and one(second, "dem").assets[0].item == "aster/1"


@pytest.mark.parametrize(("sensor", "keys"), [("s2-l1c", ["aa_0", "dd_3"]), ("s2-l2a", ["bb_1"])])
def test_mmearth_as_shards(tmp_path: Path, sensor: str, keys: list[str]) -> None:
    root = mmearth(tmp_path / "data_100k_v001")
    samples = built("shards-mmearth", root, tmp_path / "out", f"sensors=[{sensor},s1,dem]", "tile.max_cloud=1")
    assert list(samples) == [f"{key}-00000-00000" for key in keys]
    sample, row = samples[f"{keys[-1]}-00000-00000"], list(TILES).index(keys[-1])
    with h5py.File(root / "data_100k_v001.h5") as file:
        optic, radio = file["sentinel2"][row], file["sentinel1"][row]
    order = [OPTICAL.index(band) for band in SENSORS[sensor].band_names]
    np.testing.assert_array_equal(sample.tiles[sensor].values, optic[order])
    first = 4 if keys[-1] == "bb_1" else 0
    np.testing.assert_array_equal(sample.tiles["s1"].values, radio[first : first + 2])
    np.testing.assert_array_equal(sample.tiles["dem"].values, heights()[row, :1])
    assert sample.meta["crs"] is None and sample.meta["tile_crs"] == "EPSG:32633"
    assert sample.meta["cloud"] == pytest.approx(3 / 12 if sensor == "s2-l2a" else 2 / 4, abs=0.01)


def test_mmearth_without_its_lists(tmp_path: Path) -> None:
    root = mmearth(tmp_path / "data_100k_v001")
    (tmp_path / "data_100k_v001/data_100k_v001_tile_info.json").write_text(json.dumps({}))
    _, left_out = found("mmearth", root)
    assert left_out == dict.fromkeys(TILES, "not in tile_info")
    (root / "data_100k_v001_splits.json").unlink()
    with pytest.raises(ArchiveError, match="data_100k_v001_splits.json must lie beside it"):
        list(open_archive("mmearth", str(root)))


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = mmearth(tmp_path / "data_100k_v001")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SceneError, match=r"pip install 'mcf-mamba.h5.'"):
        list(open_archive("mmearth", str(root)))
