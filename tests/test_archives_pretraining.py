"""SSL4EO-S12 (v1, v1.1), Major TOM, MMEarth and TerraMesh: trees to the letter of each layout, and pixels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

import configs
from shards.archives import ArchiveError, about, open_archive
from shards.containers import tar_index
from shards.scene import CloudMask, Place, Radiometry, Scene, SceneError
from shards.sensors import SENSORS
from shards.zarr_zip import NoCodecsError
from tests.benchmark_trees import SIZE, built, found, optical, put, radar, sensors
from tests.conftest import REAL_DATA
from tests.scenes import ORIGIN, write_scene
from tests.zarr_trees import Stored, write_group, write_tar

NAMES = ("ssl4eo-s12", "ssl4eo-s12-v1.1", "majortom", "mmearth", "terramesh")
L1C, L2A = SENSORS["s2-l1c"].band_names, SENSORS["s2-l2a"].band_names
FILES = {"s1": ("vv", "vh")} | {
    name: tuple(f"B{b[1:]:0>2}" for b in SENSORS[name].band_names) for name in ("s2-l1c", "s2-l2a")
}
DATES = [datetime(2020, 11, 16, 2, 30, 1, tzinfo=UTC) + timedelta(days=90 * i) for i in range(4)]
SEASONS = [DATES[i] + timedelta(days=2) for i in range(4)]


def one(place: Place, sensor: str, number: int = 0) -> Scene:
    return place.of(sensor)[number]


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


# --- SSL4EO-S12 v1.1 and TerraMesh: groups ---------------------------------------------------------------------------


def corner(number: int) -> tuple[float, float]:
    return ORIGIN[0] + 5000.0 * number, ORIGIN[1]


def values(modality: str, *shape: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(modality))
    if modality.startswith("S1"):
        return rng.normal(-13, 3, shape).astype(np.float16)
    return rng.integers(1100, 6000, shape).astype(np.float32 if modality == "DEM" else np.int16)


def band_names(modality: str) -> tuple[str, ...]:
    sensor = {"S1": "s1", "S2L1C": "s2-l1c", "S2L2A": "s2-l2a"}.get(modality[:2] if modality[1] == "1" else modality)
    return FILES[sensor] if sensor else (modality,)


def nanoseconds(dates: list[datetime]) -> np.ndarray[Any, Any]:
    return np.array([int(date.timestamp()) * 10**9 for date in dates])


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
    assert sample.meta["cloud"] == pytest.approx(2 / 7, abs=0.01) and sample.meta["split"] == "train"
    assert built("shards-ssl4eo-s12-v1.1", root, tmp_path / "clear", "tile.max_cloud=0.3")
    with pytest.raises(Exception, match="cloud over 0.1"):
        built("shards-ssl4eo-s12-v1.1", root, tmp_path / "none")


def group(path: Path, modality: str, number: int, dates: list[datetime], sample: str, masked: bool = True) -> Path:
    """One sample as the tars hold it: bands [time, band, y, x] in a single chunk."""
    bands = band_names(modality)
    dated = [] if modality == "DEM" else dates
    pixels = 10.0 * np.arange(SIZE) + 5
    shape = (max(len(dated), 1), len(bands), SIZE, SIZE)
    arrays = {
        "bands": Stored(values(modality, *shape), ("time", "band", "y", "x")),
        "band": Stored(np.array(bands), ("band",)),
        "x": Stored(corner(number)[0] + pixels, ("x",)),
        "y": Stored(corner(number)[1] - pixels, ("y",)),
        "crs": Stored(np.int64(32633), ()),
        "time": Stored(nanoseconds(dated) if dated else np.zeros(1, np.int64), ("time",)),
        "sample": Stored(np.array(sample), ()),
    }
    if modality.startswith("S2") and masked:
        arrays["cloud_mask"] = Stored(np.full((shape[0], SIZE, SIZE), 4, np.uint8), ("time", "y", "x"))
    return write_group(path, arrays)


def shard(path: Path, samples: Mapping[str, tuple[int, str]], dates: list[datetime], masked: bool = True) -> Path:
    """A tar: key -> number of the place, and what its sample is called."""
    modality = path.parent.name
    when = [date + timedelta(days=2) for date in dates] if modality.startswith("S1") else dates
    files = {
        f"{key}.zarr.zip": group(
            path.parents[2] / f"tmp/{modality}-{key}.zarr.zip", modality, number, when, name, masked
        )
        for key, (number, name) in samples.items()
    }
    return write_tar(path, files)


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


TERRAMESH = {
    "majortom": {"majortom_train_0000001": (1, "282D_485L_3_3"), "majortom_train_0000009": (2, "38D_378R_2_3")},
    "ssl4eos12": {"ssl4eos12_train_0000003": (3, "0194630_1")},
}


def terramesh(root: Path, table: bool = False) -> Path:
    rows: list[dict[str, Any]] = []
    for source, samples in TERRAMESH.items():
        radio = "S1RTC" if source == "majortom" else "S1GRD"
        name = f"{source}_shard_00000{len(samples)}.tar"
        for modality in ("S2L1C", "S2L2A", radio, "DEM", "NDVI"):
            shard(root / f"train/{modality}/{name}", samples, DATES[:1])
        for key, (_, sample) in samples.items():
            times = {"S1_time": DATES[0] + timedelta(days=2), "S2_time": DATES[0]}
            rows.append({"tar": name, "zarr": f"{key}.zarr.zip", "sample_id": sample, "cloud_cover": 0.0, **times})
    if table:
        schema = pa.schema({"S1_time": pa.timestamp("ns"), "S2_time": pa.timestamp("ns")})
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        naive = {name: [time.replace(tzinfo=None) for time in columns[name]] for name in schema.names}
        arrays = {name: pa.array(column, pa.timestamp("ns")) for name, column in naive.items()}
        pq.write_table(pa.table({**columns, **arrays}), root / "train_metadata.parquet")
    return root


@pytest.mark.parametrize("table", [False, True], ids=["groups", "metadata"])
def test_terramesh(tmp_path: Path, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.archives.zarr_groups import Tar

    terramesh(tmp_path / "a/TerraMesh", table)
    if table:
        monkeypatch.delattr(Tar, "dates")  # no group is opened for its date
        monkeypatch.delattr(Tar, "sample")
    places, left_out = found("terramesh", tmp_path)
    assert list(places) == ["majortom_train_0000001", "majortom_train_0000009", "ssl4eos12_train_0000003"]
    assert left_out == {"train/NDVI": "modality not used"}
    place = places["majortom_train_0000009"]
    assert sensors(place) == ["s2-l2a", "s2-l1c", "s1", "dem"] and place.split == "train"
    assert [scene.time for scene in place.scenes] == [DATES[0], DATES[0], SEASONS[0], None]
    assert "/S1RTC/" in one(place, "s1").path
    assert [places[name].group for name in sorted(places)] == ["282D_485L", "38D_378R", "0194630"]
    assert "/S1GRD/" in one(places["ssl4eos12_train_0000003"], "s1").path


def test_terramesh_with_partners_missing(tmp_path: Path) -> None:
    root = terramesh(tmp_path)
    (root / "train/S1RTC/majortom_shard_000002.tar").unlink()
    (root / "train/DEM/majortom_shard_000002.tar").write_bytes(b"\0" * 10240)
    shard(root / "train/S2L1C/majortom_shard_000002.tar", {"majortom_train_0000001": (1, "282D_485L_3_3")}, DATES[:1])
    places, left_out = found("terramesh", tmp_path)
    assert sensors(places["majortom_train_0000001"]) == ["s2-l2a", "s2-l1c"]
    assert sensors(places["majortom_train_0000009"]) == ["s2-l2a"]
    assert left_out["train/DEM/majortom_shard_000002.tar"] == "no readable tar of zarr groups"


def test_a_damaged_group_is_left_out(tmp_path: Path) -> None:
    root = terramesh(tmp_path)
    path = root / "train/S2L2A/majortom_shard_000002.tar"
    offset, size = tar_index(path)["majortom_train_0000009.zarr.zip"]
    with path.open("r+b") as file:
        file.seek(offset + size - 200)
        file.write(b"\xff" * 200)
    places, left_out = found("terramesh", root)
    assert "majortom_train_0000009" not in places and len(places) == 2
    assert left_out["train/majortom_train_0000009"] == "damaged zarr group"


def test_without_the_codecs_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = terramesh(tmp_path)
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(NoCodecsError, match=r"pip install 'mcf-mamba.zarr.'"):
        list(open_archive("terramesh", str(root)))


def test_terramesh_as_shards(tmp_path: Path) -> None:
    root = terramesh(tmp_path / "in")
    samples = built("shards-terramesh", root, tmp_path / "out", "sensors=[s2-l2a,s1,dem]", "tile.max_cloud=1")
    assert len(samples) == 3
    sample = samples["majortom_train_0000009-00000-00000"]
    np.testing.assert_array_equal(sample.tiles["s2-l2a"].values, values("S2L2A", 1, 12, SIZE, SIZE)[0])
    np.testing.assert_array_equal(sample.tiles["s1"].values, values("S1RTC", 1, 2, SIZE, SIZE)[0].astype(np.float32))
    assert sample.tiles["s1"].time == SEASONS[0] and sample.meta["cloud"] == 1.0
    assert sample.meta["transform"][2] == corner(2)[0]


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    root = terramesh(tmp_path)
    pq.write_table(pa.table({"tar": ["a"], "zarr": ["b"]}), root / "train_metadata.parquet")
    with pytest.raises(ArchiveError, match="lacks the columns .'S1_time', 'S2_time', 'sample_id'"):
        list(open_archive("terramesh", str(root)))


def optical_date(path: Path) -> str:
    """Of Sentinel-2: the land cover has it."""
    with rasterio.open(path.parents[1] / "LULC" / path.name) as raster:
        return str(raster.tags()["datetime"])


def real_groups(folder: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """The real GeoTIFFs of one modality as the zarr groups that TerraMesh has of them."""
    for path in sorted(folder.glob("*.tif")):
        with rasterio.open(path) as raster:
            pixels, transform = raster.read(), raster.transform
            stamp = raster.tags().get("datetime") or optical_date(path)
            arrays = {
                "bands": Stored(pixels[None], ("time", "band", "y", "x")),
                "x": Stored(transform.c + transform.a * (np.arange(raster.width) + 0.5), ("x",)),
                "y": Stored(transform.f + transform.e * (np.arange(raster.height) + 0.5), ("y",)),
                "crs": Stored(np.int64(raster.crs.to_epsg()), ()),
                "time": Stored(np.array([stamp], "datetime64[ns]").astype(np.int64), ("time",)),
                "sample": Stored(np.array(path.stem), ()),
            }
        yield path.stem, write_group(scratch / folder.name / f"{path.stem}.zarr.zip", arrays)


@pytest.mark.real_data
def test_real_places_of_terramesh(tmp_path: Path) -> None:
    source = REAL_DATA / "paired/terramesh"
    for modality in ("S2L2A", "S1RTC", "DEM"):
        groups = {
            f"majortom_{stem}.zarr.zip": path for stem, path in real_groups(source / modality, tmp_path / "groups")
        }
        assert len(groups) == 3
        write_tar(tmp_path / f"in/train/{modality}/majortom_shard_000001.tar", groups)
    samples = built(
        "shards-terramesh", tmp_path / "in", tmp_path / "out", "sensors=[s2-l2a,s1,dem]", "tile.size=224",
        "tile.min_valid=0.3",
    )  # fmt: skip
    assert len(samples) == 3
    for key, sample in samples.items():
        stem = key.removeprefix("majortom_").removesuffix("-00000-00000")
        for sensor, modality in (("s2-l2a", "S2L2A"), ("s1", "S1RTC"), ("dem", "DEM")):
            with rasterio.open(source / modality / f"{stem}.tif") as raster:
                pixels, tile = raster.read(), sample.tiles[sensor]
                np.testing.assert_array_equal(
                    tile.values[:, tile.valid], pixels.astype(tile.values.dtype)[:, tile.valid]
                )
                np.testing.assert_allclose(sample.meta["transform"], tuple(raster.transform)[:6], atol=1e-6)
                assert sample.meta["crs"] == f"EPSG:{raster.crs.to_epsg()}"
        assert sample.meta["group"] == stem.rsplit("_", 2)[0]


# --- Major TOM -------------------------------------------------------------------------------------------------------

PRODUCTS = {
    "Core-S2L1C": "S2A_MSIL1C_20190313T063511_N0500_R134_T40KCB_20221119T233855",
    "Core-S2L2A": "S2B_MSIL2A_20181022T112119_N0206_R037_T29TQG_20181022T151431",
    "Core-S1RTC": "S1A_IW_GRDH_1SDV_20190315T063511_20190315T063536_026348_02F2C8_rtc",
    "Core-DEM": "id",
}
SOURCE = {"Core-S2L1C": "s2-l1c", "Core-S2L2A": "s2-l2a", "Core-S1RTC": "s1", "Core-DEM": "dem"}


def cell_values(source: str, column: str, size: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(sum(map(ord, source + column)))
    if source == "Core-S1RTC":
        return rng.uniform(0.01, 1, (1, size, size)).astype(np.float32)
    if source == "Core-DEM":
        return rng.uniform(100, 900, (1, size, size)).astype(np.float32)
    return (
        rng.integers(0, 4, (1, size, size)).astype(np.uint8) if column == "cloud_mask" else optical(1, size, 5) + 1000
    )


def columns(source: str) -> dict[str, float]:
    """Column and pixel size of each image of a row."""
    sensor = SENSORS[SOURCE[source]]
    if source == "Core-S1RTC":
        return {"vv": 10.0, "vh": 10.0}
    if source == "Core-DEM":
        return {"DEM": 30.0}
    return {f"B{b.name[1:]:0>2}": b.resolution for b in sensor.bands} | {"cloud_mask": 10.0}


def cell_file(path: Path, source: str, column: str, metres: float, number: int) -> Path:
    image = cell_values(source, column, int(8 * 240 / metres))
    if source in ("Core-S1RTC", "Core-DEM"):
        image[:, :2] = -32768
    return put(path, image, metres, east=1920.0 * number)


def parquet(root: Path, source: str, cells: list[str], product: str | None = None) -> None:
    """A part of the images and the metadata, which tell of another part too."""
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        row: dict[str, Any] = {"product_id": product or PRODUCTS[source], "grid_cell": cell}
        for column, metres in columns(source).items():
            scratch = root.parent / "scratch" / source / f"{cell}-{column}.tif"
            row[column] = cell_file(scratch, source, column, metres, number).read_bytes()
        rows.append({**row, "thumbnail": b"png"})
    images = root / source / "images"
    images.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), images / "part_00002.parquet", row_group_size=1)
    url = f"https://example.org/datasets/Major-TOM/{source}/resolve/main/images/part_{{:05d}}.parquet"
    meta = [
        {"grid_cell": "1U_1R", "product_id": "far", "parquet_url": url.format(1), "parquet_row": 0},
        *({"grid_cell": row["grid_cell"], "product_id": row["product_id"], "parquet_url": url.format(2),
           "parquet_row": i} for i, row in enumerate(rows)),
    ]  # fmt: skip
    if source == "Core-DEM":
        meta = [{name: value for name, value in row.items() if name != "product_id"} for row in meta]
    pq.write_table(pa.Table.from_pylist(meta), root / source / "metadata.parquet")


def majortom(root: Path, unpacked: bool) -> Path:
    for source, product in PRODUCTS.items():
        cells = ["433D_629L", "433D_628L"][: 1 if source == "Core-DEM" else 2]
        if not unpacked:
            parquet(root, source, cells)
            continue
        for number, cell in enumerate(cells):
            for column, metres in columns(source).items():
                cell_file(root / source[5:] / "433D" / cell / product / f"{column}.tif", source, column, metres, number)
    return root


@pytest.mark.parametrize("unpacked", [False, True], ids=["parquet", "unpacked"])
def test_majortom(tmp_path: Path, unpacked: bool) -> None:
    root = majortom(tmp_path / "in", unpacked)
    places, left_out = found("majortom", root)
    assert list(places) == ["433D_628L", "433D_629L"]
    absent = "part of the images that is not there"
    assert left_out == ({} if unpacked else {f"{name}/images/part_00001.parquet": absent for name in PRODUCTS})
    assert sorted(sensors(places["433D_628L"])) == ["s1", "s2-l1c", "s2-l2a"]
    place = places["433D_629L"]
    assert sorted(sensors(place)) == ["dem", "s1", "s2-l1c", "s2-l2a"] and place.group == "433D_629L"
    level1, level2, radio, height = (one(place, name) for name in ("s2-l1c", "s2-l2a", "s1", "dem"))
    assert [asset.bands for asset in level1.assets] == [(band,) for band in L1C]
    # A product of 2019 that was processed again has the offset, one of 2018 that was not has none.
    assert {asset.radiometry.offset for asset in level1.assets} == {-1000.0}
    assert {asset.radiometry.offset for asset in level2.assets} == {0.0}
    assert [(a.radiometry.quantity, a.nodata, a.bands) for a in radio.assets] == [
        ("power", -32768.0, ("VV",)), ("power", -32768.0, ("VH",)),
    ]  # fmt: skip
    assert (radio.time, height.time) == (datetime(2019, 3, 15, 6, 35, 11, tzinfo=UTC), None)
    assert level2.cloud is not None and level2.cloud.codes == (1, 2) and radio.cloud is None
    where = level1.assets[L1C.index("B8A")]
    assert (where.path.endswith("/B8A.tif"), where.item) == ((True, "") if unpacked else (False, "0:B8A"))


def test_majortom_is_the_same_from_parquet_and_from_files(tmp_path: Path) -> None:
    made = [
        built(
            "shards-majortom", majortom(tmp_path / name / "in", name == "files"), tmp_path / name / "out",
            "sensors=[s2-l1c,s1]", "tile.max_cloud=1",
        )
        for name in ("parquet", "files")
    ]  # fmt: skip
    assert list(made[0]) == list(made[1]) and len(made[0]) > 20
    for key, sample in made[0].items():
        for name, tile in sample.tiles.items():
            np.testing.assert_array_equal(tile.values, made[1][key].tiles[name].values)
    sample = made[0]["433D_629L-00032-00032"]
    red, radio = cell_values("Core-S2L1C", "B04", 192), cell_values("Core-S1RTC", "vv", 192)
    np.testing.assert_array_equal(sample.tiles["s2-l1c"].values[3], red[0, 32:64, 32:64] - 1000)
    decibel = 10 * np.log10(radio[0, 32:64, 32:64])
    np.testing.assert_allclose(sample.tiles["s1"].values[0], decibel, rtol=1e-5)
    assert not made[0]["433D_629L-00000-00032"].tiles["s1"].valid[:2].any()
    clouds = np.isin(cell_values("Core-S2L1C", "cloud_mask", 192)[0, 32:64, 32:64], (1, 2))
    assert sample.meta["cloud"] == pytest.approx(clouds.mean())


def test_majortom_in_a_messy_tree(tmp_path: Path) -> None:
    root = majortom(tmp_path, unpacked=True)
    cell = root / "S2L2A/433D/433D_629L"
    (cell / PRODUCTS["Core-S2L2A"] / "B01.tif").unlink()
    again = PRODUCTS["Core-S2L1C"].replace("T40KCB", "T40KDB")  # the same moment on the neighbouring tile
    folder = root / "S2L1C/433D/433D_629L"
    (folder / again).symlink_to(folder / PRODUCTS["Core-S2L1C"])
    put(root / "S2L1C/433D/433D_629L/S3A_OL/Oa01.tif", optical(1))
    put(root / "S2L1C/433D/thumbs/S2A_MSIL1C_x/B01.tif", optical(1))
    places, left_out = found("majortom", root)
    assert left_out == {
        "433D_629L/S3A_OL": "sensor unknown",
        "thumbs/S2A_MSIL1C_x": "not the name of a cell",
        PRODUCTS["Core-S2L2A"]: "bands are missing",
        "433D_629L s2-l1c 2019-03-13 06:35:11+00:00": "another scene has its sensor and time",
    }
    assert sorted(sensors(places["433D_629L"])) == ["dem", "s1", "s2-l1c"]


def test_majortom_needs_its_metadata(tmp_path: Path) -> None:
    parquet(tmp_path / "in", "Core-DEM", ["433D_629L"])
    (tmp_path / "in/Core-DEM/metadata.parquet").unlink()
    with pytest.raises(ArchiveError, match="metadata.parquet, which tells .* is missing"):
        list(open_archive("majortom", str(tmp_path / "in")))


# --- MMEarth ---------------------------------------------------------------------------------------------------------

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


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_archive_is_an_error_that_shows_the_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere"):
        list(open_archive(name, str(tmp_path / "nowhere")))
    for folder in ("s1/notes", "train/S2L2A", "a/b/c/d"):
        (tmp_path / folder).mkdir(parents=True)
    write_scene(tmp_path / "some.tif", "dem", size=8)
    with pytest.raises(ArchiveError) as caught:
        list(open_archive(name, str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and str(caught.value).count("\n") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_an_archive(name: str) -> None:
    known = about(name)
    assert known.title and known.licence.startswith("CC-BY") and "Copernicus" in known.attribution
    assert known.source.startswith("https://") and set(known.notes) <= set(SENSORS)
    assert configs.load(f"shards-{name}").archive.name == name
