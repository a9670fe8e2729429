"""SSL4EO-S12 v1 and v1.1: trees to the letter of each layout, what is found in them, and pixels."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from shards.manifest import select
from shards.scene import CloudMask, Radiometry
from shards.sensors import SENSORS
from tests.archive_checks import one
from tests.benchmark_trees import SIZE, built, found, optical, put, radar, sensors
from tests.terramesh_trees import DATES, SEASONS, band_names, corner, shard, values
from tests.zarr_trees import Stored, write_group

L1C, L2A = SENSORS["s2-l1c"].band_names, SENSORS["s2-l2a"].band_names


# --- SSL4EO-S12 v1 ---------------------------------------------------------------------------------------------------


def season(root: Path, sensor: str, place: str, date: datetime, seed: int = 0) -> Path:
    folder = {"s1": "s1", "s2-l1c": "s2c", "s2-l2a": "s2a"}[sensor]
    stamp = f"{date:%Y%m%dT%H%M%S}"
    name = f"S1A_IW_GRDH_1SDV_{stamp}_{stamp}_032904_03CFBA_D457" if sensor == "s1" else f"{stamp}_{stamp}_T51TXH"
    for i, band in enumerate(SENSORS[sensor].bands):
        metres = max(band.resolution, 10.0)
        size = int(3 * SIZE * 10 / metres)
        values = radar(bands=1) if sensor == "s1" else optical(1, size, seed=100 * seed + i)
        values = np.tile(values, (1, 3, 3)) if sensor == "s1" else values
        put(root / folder / place / name / f"{band.name}.tif", values, metres, east=1000.0 * int(place))
    return root / folder / place / name


def ssl4eo(root: Path) -> Path:
    for place in ("0000042", "0000044"):
        for date in DATES:
            season(root, "s2-l1c", place, date, seed=1)
            season(root, "s2-l2a", place, date, seed=2)
            season(root, "s1", place, date + timedelta(days=2))
    return root


def test_ssl4eo(tmp_path: Path) -> None:
    places, left_out = found("ssl4eo-s12", ssl4eo(tmp_path))
    assert list(places) == ["0000042", "0000044"] and left_out == {}
    place = places["0000044"]
    assert sensors(place) == ["s1"] * 4 + ["s2-l1c"] * 4 + ["s2-l2a"] * 4 and place.group == "0000044"
    assert [scene.time for scene in place.of("s2-l1c")] == DATES and [s.time for s in place.of("s1")] == SEASONS
    assert [asset.bands for asset in one(place, "s2-l1c").assets] == [(band,) for band in L1C]
    assert one(place, "s2-l2a").assets[3].path.endswith("s2a/0000044/20201116T023001_20201116T023001_T51TXH/B4.tif")
    assert {asset.radiometry for scene in place.scenes for asset in scene.assets} == {Radiometry()}


def test_ssl4eo_in_a_messy_tree(tmp_path: Path) -> None:
    root = ssl4eo(tmp_path / "unpacked/ssl4eo")
    (one_band := season(root, "s2-l2a", "0000050", DATES[0])).joinpath("B8A.tif").unlink()
    season(root, "s1", "0000051", DATES[0]).rename(root / "s1/0000051/undated")
    season(root, "s2-l1c", "0000052", datetime(2022, 6, 1, tzinfo=UTC))
    for folder in ("s1/notes", "__MACOSX/s1/0000042", "s1/0000042/.cache"):
        (root / folder).mkdir(parents=True)
    (root / "s2c/._0000042").touch()
    places, left_out = found("ssl4eo-s12", tmp_path)
    assert list(places) == ["0000042", "0000044", "0000052"]
    assert left_out == {
        "notes": "not the number of a place",
        f"s2a/0000050/{one_band.name}": "bands are missing",
        "0000050": "no complete scene",
        "s1/0000051/undated": "no date in the folder's name",
        "0000051": "no complete scene",
    }
    assert one(places["0000052"], "s2-l1c").assets[0].radiometry.offset == -1000.0


def test_ssl4eo_as_shards(tmp_path: Path) -> None:
    samples = built("shards-ssl4eo-s12", ssl4eo(tmp_path / "in"), tmp_path / "out", "sensors=[s2-l1c,s1]")
    assert len(samples) == 2 * 4 * 9
    tile = samples["0000042-20210214T023001-00032-00000"].tiles["s2-l1c"]
    assert tile.time == DATES[1] and tile.valid.all()
    blue = optical(1, 3 * SIZE, seed=100 + L1C.index("B2"))
    np.testing.assert_array_equal(tile.values[L1C.index("B2")], blue[0, SIZE : 2 * SIZE, :SIZE])


# --- SSL4EO-S12 v1.1 -------------------------------------------------------------------------------------------------


def v1_1_zip(path: Path, places: list[str], size: int = SIZE) -> Path:
    """As xarray writes it: a chunk per date, times in a unit of their own."""
    modality, count = path.parent.name, len(places)
    bands = band_names(modality)
    data = values(modality, count, 4, len(bands), size, size)
    dates = SEASONS if modality.startswith("S1") else DATES
    hours = np.array([[int((date - DATES[0]).total_seconds() // 3600) for date in dates]] * count)
    pixels = 10.0 * np.arange(size) + 5
    x = np.array([corner(int(place))[0] + pixels for place in places])
    y = np.array([corner(int(place))[1] - pixels for place in places])
    arrays = {
        "bands": Stored(data, ("sample", "time", "band", "y", "x"), (count, 1, len(bands), size, size)),
        "band": Stored(np.array(bands), ("band",)),
        "sample": Stored(np.array(places), ("sample",)),
        "time": Stored(np.arange(4), ("time",)),
        "time_": Stored(hours, ("sample", "time"), attrs={"units": "hours since 2020-11-16 02:30:01"}),
        "x": Stored(np.arange(size), ("x",)),
        "y": Stored(np.arange(size), ("y",)),
        "x_": Stored(x, ("sample", "x")),
        "y_": Stored(y, ("sample", "y")),
        "crs": Stored(np.full(count, 32633), ("sample",)),
    }
    if modality.startswith("S2"):
        mask = np.resize(np.arange(7, dtype=np.uint8), (count, 4, size, size))
        arrays["cloud_mask"] = Stored(mask, ("sample", "time", "y", "x"), (count, 1, size, size))
    return write_group(path, arrays)


def v1_1(root: Path) -> Path:
    for modality in ("S1GRD", "S2L1C", "S2L2A", "S2RGB"):
        for split, numbers in (("train", ["0000012", "0000007"]), ("val", ["0000020"])):
            order = numbers[::-1] if modality == "S1GRD" else numbers
            name = f"ssl4eos12_{split}_seasonal_data_000001.zarr.zip"
            v1_1_zip(root / split / modality / name, order)
    return root


def test_v1_1_zips(tmp_path: Path) -> None:
    root = v1_1(tmp_path / "data/ssl4eo-s12")
    (root / "train/S2L2A/ssl4eos12_train_seasonal_data_000002.zarr.zip").write_bytes(b"half")
    places, left_out = found("ssl4eo-s12-v1.1", tmp_path)
    assert list(places) == ["0000007", "0000012", "0000020"]
    assert left_out == {
        "train/S2RGB": "modality not used",
        "val/S2RGB": "modality not used",
        "train/S2L2A/ssl4eos12_train_seasonal_data_000002.zarr.zip": "no readable zarr group",
    }
    place = places["0000012"]
    assert (place.split, place.group) == ("train", "0000012") and places["0000020"].split == "val"
    optic, radio = place.of("s2-l2a"), place.of("s1")
    assert [scene.time for scene in optic] == [date.replace(minute=30) for date in DATES] and len(radio) == 4
    # Places of one file may be in another order in its partner: they are matched by their numbers.
    assert optic[2].assets[0].item == "bands/0/2" and radio[2].assets[0].item == "bands/1/2"
    assert radio[0].assets[0].bands == ("VV", "VH") and optic[0].assets[0].bands == L2A
    assert (optic[0].assets[0].radiometry.offset, radio[0].assets[0].radiometry.offset) == (-1000.0, 0.0)
    assert optic[2].cloud is not None and optic[2].cloud.codes == (3, 4)
    assert optic[2].cloud.asset.item == "cloud_mask/0/2" and radio[0].cloud is None


def test_v1_1_zips_as_shards(tmp_path: Path) -> None:
    root = v1_1(tmp_path / "in")
    samples = built("shards-ssl4eo-s12-v1.1", root, tmp_path / "out", "tile.max_cloud=1")
    assert len(samples) == 3 * 4
    sample = samples["0000012-20210214T023001-00000-00000"]
    data = values("S2L2A", 2, 4, 12, SIZE, SIZE)[0, 1]
    np.testing.assert_array_equal(sample.tiles["s2-l2a"].values, data - 1000)
    radio = values("S1GRD", 2, 4, 2, SIZE, SIZE)[1, 1]
    np.testing.assert_array_equal(sample.tiles["s1"].values, radio.astype(np.float32))
    assert sample.tiles["s1"].time == SEASONS[1].replace(minute=30)
    assert sample.meta["crs"] == "EPSG:32633"
    assert sample.meta["transform"] == [10.0, 0.0, corner(12)[0], 0.0, -10.0, corner(12)[1]]
    # Codes 0 to 6 in turn: 3 and 4 are cloud, 6 is no data.
    assert sample.meta["cloud"] == pytest.approx(2 / 7, abs=0.01)
    rows = select(str(tmp_path / "out")).rows(["key", "split"])
    assert rows["split"][rows["key"].to_pylist().index(sample.key)].as_py() == "train"
    assert built("shards-ssl4eo-s12-v1.1", root, tmp_path / "clear", "tile.max_cloud=0.3")
    with pytest.raises(Exception, match="cloud over 0.1"):
        built("shards-ssl4eo-s12-v1.1", root, tmp_path / "none")


def test_v1_1_tars(tmp_path: Path) -> None:
    root = tmp_path / "in"
    samples = {"ssl4eos12_train_0000002": (2, "0000002"), "ssl4eos12_train_0000001": (1, "0000001")}
    for modality in ("S2L1C", "S2L2A", "S1GRD", "DEM", "LULC"):
        shard(root / f"train/{modality}/ssl4eos12_shard_000001.tar", samples, DATES, masked=modality == "S2L2A")
    places, left_out = found("ssl4eo-s12-v1.1", root)
    assert list(places) == ["ssl4eos12_train_0000001", "ssl4eos12_train_0000002"]
    assert left_out == {"train/LULC": "modality not used"}
    place = places["ssl4eos12_train_0000002"]
    assert place.group == "0000002" and [s.time for s in place.of("s2-l1c")] == DATES
    assert one(place, "dem").time is None
    masks = [one(place, sensor, 1).cloud for sensor in ("s2-l1c", "s2-l2a")]  # one mask for both
    assert masks[0] == masks[1] and isinstance(masks[0], CloudMask) and masks[0].asset.item.endswith(":cloud_mask/1")
    assert one(place, "s2-l1c").assets[0].radiometry == Radiometry()
    samples_of = built("shards-ssl4eo-s12-v1.1", root, tmp_path / "out", "sensors=[s2-l1c,s1,dem]", "tile.max_cloud=1")
    assert len(samples_of) == 8
    tiles = samples_of["ssl4eos12_train_0000002-20210214T023001-00000-00000"].tiles
    np.testing.assert_array_equal(tiles["s2-l1c"].values, values("S2L1C", 4, 13, SIZE, SIZE)[1])
    np.testing.assert_array_equal(tiles["dem"].values, values("DEM", 1, 1, SIZE, SIZE)[0])
