"""Scenes that are listed: by a table, by the names in a folder, by STAC items."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyproj import Transformer

import configs
from shards.archives import ArchiveError, open_archive
from shards.archives.folder import compiled
from shards.archives.rows import address, band_name
from shards.archives.sentinel1_product import STEPS, UNTOLD
from shards.archives.sentinel2_product import OLDER
from shards.build import build
from shards.manifest import select
from shards.sample import Sample
from shards.scene import Asset, CloudMask, LeftOut, Place, Radiometry
from shards.sensors import SENSORS
from shards.stream import Share, Stream
from shards.verify import verify
from tests.scenes import ORIGIN, UTM, north_up, write_scene

L1C, L2A = "s2-l1c", "s2-l2a"
PRODUCT = "S2A_MSIL2A_20230101T101031_N0509_R022_T33UUP_20230101T120000"


def found(name: str, root: Path, pattern: str = "") -> tuple[dict[str, Place], list[LeftOut]]:
    items = list(open_archive(name, str(root), pattern))
    left_out = [item for item in items if isinstance(item, LeftOut)]
    return {item.name: item for item in items if isinstance(item, Place)}, left_out


def samples(name: str, root: Path, sensors: list[str], out: Path, pattern: str = "") -> dict[str, Sample]:
    archive = {"name": name, "root": str(root), "pattern": pattern}
    raw = {"stage": "shards", "archive": archive, "out": str(out), "sensors": sensors, "tile": {"size": 32}}
    build(configs.parse(raw))
    assert verify(str(out)) == []
    return {sample.key: sample for sample, _ in Stream(select(str(out)), 0, 1, Share(1)).once()}


def codes(path: Path, values: np.ndarray, metres: float) -> Path:
    """A raster of codes [H, W] at the common corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_scene(path, "label", values=values[None], transform=north_up(metres))


# Catalog ---------------------------------------------------------------------------------------------------------


def catalog(root: Path, *rows: dict[str, str]) -> Path:
    columns = ["place", "sensor", "href", "time", "band", "group", "split", "scale", "offset", "quantity", "nodata"]
    with (root / "catalog.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows({"place": "a", "sensor": L2A, "href": "a.tif", **row} for row in rows)
    return root


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({}, Radiometry()),
        ({"time": "2022-01-24"}, Radiometry()),
        ({"time": "2022-01-25"}, Radiometry(offset=-1000)),
        ({"time": "2022-06-01", "offset": "0"}, Radiometry()),
        ({"time": "2022-06-01", "scale": "10000"}, Radiometry(scale=10000)),
        ({"time": "2018-06-01", "href": f"{PRODUCT}/a.tif"}, Radiometry(offset=-1000)),
        ({"time": "2022-06-01", "href": "S2A_MSIL2A_20220601T101031_N0301_R022_T33UUP/a.tif"}, Radiometry()),
        ({"time": "2022-06-01", "sensor": "s1"}, Radiometry()),
        ({"sensor": "s1", "quantity": "dB"}, Radiometry()),
        ({"sensor": "s1", "quantity": "power"}, Radiometry(quantity="power")),
        ({"sensor": "s1", "quantity": "amplitude", "scale": "0.1"}, Radiometry(0.1, 0.0, "amplitude")),
        ({"sensor": "dem", "scale": "0.3048", "offset": "-2"}, Radiometry(0.3048, -2)),
        ({"sensor": "label", "time": "2022-06-01"}, Radiometry()),
    ],
)
def test_what_numbers_of_a_catalog_mean(tmp_path: Path, row: dict[str, str], wanted: Radiometry) -> None:
    (place,) = found("catalog", catalog(tmp_path, row))[0].values()
    assert place.scenes[0].assets[0].radiometry == wanted


def test_masks_bands_and_nodata_of_a_catalog(tmp_path: Path) -> None:
    day = {"time": "2020-06-01"}
    catalog(
        tmp_path,
        {"href": "b2.tif", "band": "B02", "nodata": "-1", **day},
        {"href": "scl.tif", "band": "SCL", "time": "2020-06-01T00:00:00Z"},
        {"sensor": L1C, "href": "c.tif", **day},
        {"sensor": L1C, "href": "qa60.tif", "band": "QA60", **day},
        {"place": "b", "href": "s3://bucket/b.tif", "group": "Graz", "split": "test"},
        {"place": "b", "href": "cloud.tif", "band": "CLOUD"},
    )
    places, left_out = found("catalog", tmp_path)
    assert left_out == [] and (places["a"].group, places["b"].group, places["b"].split) == ("a", "Graz", "test")
    time = datetime(2020, 6, 1, tzinfo=UTC)
    l2a, l1c = places["a"].scenes
    assert (l2a.assets, l2a.time) == ((Asset(str(tmp_path / "b2.tif"), ("B2",), nodata=-1),), time)
    assert l2a.cloud == CloudMask(Asset(str(tmp_path / "scl.tif")), (8, 9, 10))
    assert l1c.cloud == CloudMask(Asset(str(tmp_path / "qa60.tif")), (1024, 2048, 3072))
    assert places["b"].scenes[0].assets[0].path == "s3://bucket/b.tif"
    assert places["b"].scenes[0].cloud == CloudMask(Asset(str(tmp_path / "cloud.tif")))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"scale": "many"}], "row 1: scale 'many' is not a number"),
        ([{}, {"place": "b", "scale": "0"}], "row 2: scale '0' makes no values"),
        ([{"offset": "nan"}], "offset 'nan' makes no values"),
        ([{"sensor": "s1", "quantity": "decibel"}], "unknown quantity 'decibel'.*value, dB, power or amplitude"),
        ([{"quantity": "power"}], "quantity 'power' is for radar, not for s2-l2a"),
        ([{"band": "B10"}], "unknown band 'B10'.*s2-l2a has B1, B2.*B12, SCL, QA60, CLOUD"),
        ([{"sensor": "s1", "band": "SCL"}], "unknown band 'SCL'.*s1 has VV, VH"),
        ([{"sensor": "label", "band": "B1"}], "unknown band 'B1'.*label has none"),
        ([{"band": "SCL"}], "place a: a cloud mask but no image for s2-l2a of no time"),
        ([{"time": "2020-01-01"}, {"band": "SCL"}], "needs the place, sensor and time of its image"),
        ([{}, {"band": "SCL"}, {"band": "CLOUD"}], "place a: two cloud masks for s2-l2a"),
        ([{"band": "B2"}, {"band": "B02"}], "place a: several files of B2 for s2-l2a"),
        ([{"href": "ftp://host/a.tif"}], "s3://, https:// or http://"),
    ],
)
def test_mistakes_of_a_catalog_are_named(tmp_path: Path, rows: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        found("catalog", catalog(tmp_path, *rows))


def test_samples_of_a_catalog_with_radiometry_and_clouds(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(900, 4000, (12, 64, 64)).astype(np.uint16)
    write_scene(tmp_path / "a.tif", L2A, values=stored)
    power = np.random.default_rng(1).uniform(0.01, 0.9, (2, 64, 64)).astype(np.float32)
    write_scene(tmp_path / "s1.tif", "s1", values=power)
    qa = np.zeros((64, 64), np.uint16)
    qa[:32, :32], qa[:32, 32:48], qa[32:, :8] = 1024, 2048, 512
    codes(tmp_path / "qa60.tif", qa, 10.0)
    time = {"time": "2023-01-01T10:00:00Z"}
    catalog(
        tmp_path, time, {"href": "qa60.tif", "band": "QA60", **time},
        {"sensor": "s1", "href": "s1.tif", "quantity": "power"},
    )  # fmt: skip
    made = samples("catalog", tmp_path, [L2A, "s1"], tmp_path / "data")
    assert {key[-11:]: sample.meta["cloud"] for key, sample in made.items()} == {
        "00000-00000": 1.0, "00000-00032": 0.5, "00032-00000": 0.0, "00032-00032": 0.0,
    }  # fmt: skip
    tiles = made["a-00032-00032"].tiles
    np.testing.assert_array_equal(tiles[L2A].values, np.maximum(stored.astype(int) - 1000, 0)[:, 32:, 32:])
    np.testing.assert_allclose(tiles["s1"].values, 10 * np.log10(power[:, 32:, 32:]), rtol=1e-5)


# Addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("href", "wanted"),
    [
        ("b/a.tif", "/base/b/a.tif"),
        ("./b/a.tif", "/base/b/a.tif"),
        ("/abs/a.tif", "/abs/a.tif"),
        ("file:///abs/a.tif", "/abs/a.tif"),
        ("s3://bucket/a.tif", "s3://bucket/a.tif"),
        ("https://host/a.tif", "/vsicurl/https://host/a.tif"),
        ("/vsizip/a.zip/a.tif", "/vsizip/a.zip/a.tif"),
    ],
)
def test_addresses(href: str, wanted: str) -> None:
    assert address(href, Path("/base")) == wanted


@pytest.mark.parametrize("href", ["https://host/a.tif?sig=hidden", "https://user:hidden@host/a.tif"])
def test_signed_addresses_are_refused_without_repeating_the_secret(href: str) -> None:
    with pytest.raises(ArchiveError, match="host/a.tif: a signed address; download such files first") as caught:
        address(href, Path("/base"))
    assert "hidden" not in str(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address at which the files of `tmp_path` are served."""

    command = [sys.executable, "-m", "tests.http_server", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_files_behind_http_are_read_in_place(tmp_path: Path, server: str) -> None:
    write_scene(tmp_path / "a.tif", L2A, size=32)
    catalog(tmp_path, {"href": f"{server}/a.tif"})
    over = samples("catalog", tmp_path, [L2A], tmp_path / "over")
    catalog(tmp_path, {"href": "a.tif"})
    beside = samples("catalog", tmp_path, [L2A], tmp_path / "beside")
    np.testing.assert_array_equal(over["a-00000-00000"].tiles[L2A].values, beside["a-00000-00000"].tiles[L2A].values)


@pytest.mark.parametrize(
    ("sensor", "text", "wanted"),
    [(L2A, "b02", "B2"), (L2A, "B8A", "B8A"), (L2A, "B10", ""), (L1C, "B10", "B10"), (L1C, "scl", "SCL"),
     ("s1", "vv", "VV"), ("s1", "SCL", ""), ("label", "B1", ""), ("rgbnir", "nir", "NIR")],
)  # fmt: skip
def test_names_of_bands(sensor: str, text: str, wanted: str) -> None:
    assert band_name(sensor, text) == wanted


# Folder ----------------------------------------------------------------------------------------------------------


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
        found("folder", tmp_path, pattern)


def test_a_folder_by_pattern(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        where = north_up(10.0, ORIGIN[0] + 5000 * number)
        for sensor in (L2A, "s1"):
            write_scene(tmp_path / f"{split}/p{number}/{sensor.upper()}_20230101T101500.tif", sensor, transform=where)
    (tmp_path / "test/p1/notes.txt").touch()
    (tmp_path / "test/p1/._s1_20230101T101500.tif").touch()
    shutil.copy(tmp_path / "train/p0/S1_20230101T101500.tif", tmp_path / "train/p0/S1_copy.tif")
    pattern = "{split}/{place}/{sensor}_{time}.tif"
    places, left_out = found("folder", tmp_path, pattern)
    assert {name: (place.split, place.group) for name, place in places.items()} == {
        "p1": ("test", "p1"), "p0": ("train", "p0"),
    }  # fmt: skip
    assert left_out == [LeftOut("train/p0/S1_copy.tif", "does not fit archive.pattern")]
    scenes = {scene.sensor: scene for scene in places["p0"].scenes}
    assert scenes["s1"].time == datetime(2023, 1, 1, 10, 15, tzinfo=UTC)
    assert scenes[L2A].assets[0].radiometry.offset == -1000 and scenes["s1"].assets[0].radiometry == Radiometry()
    made = samples("folder", tmp_path, [L2A, "s1"], tmp_path / ".data", pattern)
    assert len(made) == 18
    assert set(select(str(tmp_path / ".data")).rows["split"].to_pylist()) == {"train", "test"}


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
    codes(tmp_path / L2A / "a_SCL.tif", scl, 20.0)
    made = samples("folder", tmp_path, [L2A], tmp_path / ".data", "{sensor}/{place}_{band}.tif")
    assert made["a-00000-00000"].meta["cloud"] == 1.0 and made["a-00000-00032"].meta["cloud"] == 0.0
    values = made["a-00000-00032"].tiles[L2A].values
    np.testing.assert_array_equal(values[SENSORS[L2A].band_names.index("B3")], numbers["B3"][0, :32, 32:64])
    with pytest.raises(ArchiveError, match="a_VV.tif: s2-l2a has no band VV"):
        write_scene(tmp_path / L2A / "a_VV.tif", "dem", size=32)
        found("folder", tmp_path, "{sensor}/{place}_{band}.tif")


# STAC ------------------------------------------------------------------------------------------------------------


def polygon(size: int = 64, east: float = 0.0) -> dict[str, Any]:
    """The ground of `size` pixels of 10 m from the common corner, in degrees."""
    to = Transformer.from_crs(UTM, "OGC:CRS84", always_xy=True)
    x, y, side = ORIGIN[0] + east, ORIGIN[1], size * 10
    ring = [(x, y), (x + side, y), (x + side, y - side), (x, y - side), (x, y)]
    return {"type": "Polygon", "coordinates": [[list(to.transform(*corner)) for corner in ring]]}


def item(name: str, collection: str, assets: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "links": [],
        "geometry": polygon(), "bbox": [14, 47, 16, 48], "assets": assets,
        "properties": {"datetime": "2023-01-01T10:10:31Z", **properties},
    }  # fmt: skip


def save(path: Path, *items: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items)}))
    return path


EARTH_SEARCH = {  # key, common name
    "coastal": "B1", "blue": "B2", "green": "B3", "red": "B4", "rededge1": "B5", "rededge2": "B6", "rededge3": "B7",
    "nir": "B8", "nir08": "B8A", "nir09": "B9", "swir16": "B11", "swir22": "B12",
}  # fmt: skip


def earth_search(applied: bool) -> dict[str, Any]:
    """As Earth Search v1 lists Sentinel-2 Level-2A: a GeoTIFF and a JPEG 2000 per band, pictures, masks."""
    assets: dict[str, Any] = {}
    scaled = [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}]
    for key, band in EARTH_SEARCH.items():
        bands = [{"name": key, "common_name": key.rstrip("123") if "edge" in key else key}]
        assets[f"{key}-jp2"] = {"href": f"s3://raw/{band}.jp2", "eo:bands": bands, "raster:bands": scaled}
        assets[key] = {"href": f"./{band}.tif", "eo:bands": bands, "raster:bands": scaled, "roles": ["data"]}
    assets["visual"] = {"href": "TCI.tif", "roles": ["visual"], "eo:bands": [{"name": "red"}, {"name": "green"}]}
    assets["scl"] = {"href": "SCL.tif", "raster:bands": [{"nodata": 0}], "roles": ["data"]}
    assets["cloud"] = {"href": "CLD.tif"}  # probabilities, no mask
    assets["aot"] = {"href": "AOT.tif", "raster:bands": [{"scale": 0.001}]}
    facts = {"grid:code": "MGRS-7HFE", "s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": applied}
    return item("S2A_7HFE_20230101_0_L2A", "sentinel-2-l2a", assets, constellation="sentinel-2", **facts)


@pytest.mark.parametrize("applied", [True, False])
def test_items_of_earth_search(tmp_path: Path, applied: bool) -> None:
    places, left_out = found("stac", save(tmp_path / "items.json", earth_search(applied)))
    (scene,) = places["T07HFE"].scenes
    assert left_out == [] and scene.sensor == L2A and places["T07HFE"].group == "T07HFE"
    assert {asset.bands: asset.path for asset in scene.assets} == {
        (band,): str(tmp_path / f"{band}.tif") for band in EARTH_SEARCH.values()
    }
    assert {asset.radiometry for asset in scene.assets} == {Radiometry(1.0, 0.0 if applied else -1000.0)}
    assert scene.cloud is not None and scene.cloud.asset.path == str(tmp_path / "SCL.tif")
    assert scene.time == datetime(2023, 1, 1, 10, 10, 31, tzinfo=UTC)


def test_jpeg_2000_of_earth_search_still_has_the_offset(tmp_path: Path) -> None:
    raw = earth_search(True)
    raw["assets"] = {key: value for key, value in raw["assets"].items() if key.endswith("-jp2")}
    (place,) = found("stac", save(tmp_path / "items.json", raw))[0].values()
    assert {asset.radiometry.offset for asset in place.scenes[0].assets} == {-1000.0}


def planetary(band: str) -> dict[str, Any]:
    return {"href": f"{band}.tif", "eo:bands": [{"name": band}], "roles": ["data"]}


@pytest.mark.parametrize(("baseline", "wanted"), [("05.09", -1000.0), ("03.01", 0.0), (None, -1000.0)])
def test_items_without_scale_go_by_the_baseline(tmp_path: Path, baseline: str | None, wanted: float) -> None:
    facts = {"s2:mgrs_tile": "33UUP", "platform": "Sentinel-2A", "s2:product_type": "S2MSI2A"}
    facts |= {"s2:processing_baseline": baseline} if baseline else {}
    raw = item(
        PRODUCT.replace("_N0509", ""), "sentinel-2-l2a", {"B02": planetary("B02"), "SCL": planetary("SCL")}, **facts
    )
    (place,) = found("stac", save(tmp_path / "items.json", raw))[0].values()
    assert place.name == "T33UUP" and place.scenes[0].assets[0].radiometry == Radiometry(offset=wanted)
    assert place.scenes[0].cloud is not None


def test_native_resolution_is_taken_and_stac_1_1_is_understood(tmp_path: Path) -> None:
    def asset(band: str, metres: int) -> dict[str, Any]:
        facts = {"name": band, "raster:scale": 0.0001, "raster:offset": -0.1, "nodata": 0}
        return {
            "href": f"{band}_{metres}m.jp2",
            "gsd": metres,
            "bands": [facts],
            "proj:transform": [metres, 0, 0, 0, -metres, 0],
        }

    assets = {f"{band}_{m}m": asset(band, m) for band in ("B02", "B05", "B01") for m in (10, 20, 60)}
    raw = item(PRODUCT, "sentinel-2-l2a", assets, **{"grid:code": "MGRS-33UUP", "processing:version": "05.09"})
    raw["stac_version"] = "1.1.0"
    (place,) = found("stac", save(tmp_path / "items.json", raw))[0].values()
    assert {asset.bands[0]: Path(asset.path).name for asset in place.scenes[0].assets} == {
        "B2": "B02_10m.jp2", "B5": "B05_20m.jp2", "B1": "B01_60m.jp2",
    }  # fmt: skip
    assert {asset.radiometry for asset in place.scenes[0].assets} == {Radiometry(1.0, -1000.0)}


def radar(name: str, collection: str, folder: str = "measurement", **more: Any) -> dict[str, Any]:
    assets = {band: {"href": f"{folder}/iw-{band}.tiff", **more} for band in ("vv", "vh")}
    return item(name, collection, assets, platform="SENTINEL-1A", constellation="Sentinel-1")


def test_radar_and_elevation_belong_to_the_places_they_overlap(tmp_path: Path) -> None:
    far = {**radar("S1A_IW_GRDH_far_rtc", "sentinel-1-rtc"), "geometry": polygon(east=50_000)}
    nowhere = {**radar("S1A_IW_GRDH_none_rtc", "sentinel-1-rtc"), "geometry": None}
    nowhere.pop("bbox")
    dem = item("Copernicus_DSM_COG_10_N47_00_E015_00_DEM", "cop-dem-glo-30", {"data": {"href": "dem.tif"}})
    grd = radar("S1A_IW_GRDH_1SDV_20230101T163131", "sentinel-1-grd")
    untold = radar("S1A_backscatter", "my-gamma0")
    decibels = radar("S1A_mine", "my-gamma0", **{"raster:bands": [{"unit": "dB"}]})
    decibels["properties"]["datetime"] = "2023-01-02T16:31:31Z"
    landsat = item("LC09", "landsat-c2-l2", {"red": {"href": "a.tif"}}, platform="landsat-9")
    raw = [
        earth_search(True),
        radar("S1A_IW_GRDH_rtc", "sentinel-1-rtc"),
        far,
        nowhere,
        dem,
        grd,
        untold,
        decibels,
        landsat,
    ]
    places, left_out = found("stac", save(tmp_path / "items.json", *raw))
    scenes = places["T07HFE"].scenes
    assert list(places) == ["T07HFE"] and sorted(scene.sensor for scene in scenes) == ["dem", "s1", "s1", L2A]
    quantities = {a.radiometry.quantity for s in scenes if s.sensor == "s1" for a in s.assets}
    assert quantities == {"power", "value"}
    reasons = {entry.name: entry.reason for entry in left_out}
    assert reasons == {
        "LC09": "no sensor of the table fits; write one into the item's property `sensor`",
        "S1A_IW_GRDH_1SDV_20230101T163131": STEPS, "S1A_IW_GRDH_far_rtc": "overlaps no place",
        "S1A_IW_GRDH_none_rtc": "an item without place and geometry",
        "S1A_backscatter (vv)": UNTOLD, "S1A_backscatter (vh)": UNTOLD,
    }  # fmt: skip


def test_own_items_name_place_group_split_and_sensor(tmp_path: Path) -> None:
    own = {"place": "graz", "group": "Austria", "split": "test"}
    both = {"eo:bands": [{"name": "VV"}, {"name": "VH"}], "raster:bands": [{"unit": "dB"}] * 2}
    raw = [
        item("one", "mine", {"all": {"href": "s1.tif", **both}}, sensor="s1", **own),
        item("two", "mine", {"classes": {"href": "label.tif"}}, sensor="label", **own),
    ]  # fmt: skip
    for number, one in enumerate(raw):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/item.json").write_text(json.dumps(one))
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "c", "links": []}))
    (tmp_path / "list.json").write_text("[1]")
    (place,) = found("stac", tmp_path)[0].values()
    assert (place.name, place.group, place.split) == ("graz", "Austria", "test")
    assert [(scene.sensor, scene.assets[0].bands) for scene in place.scenes] == [("s1", ("VV", "VH")), ("label", ())]
    assert place.scenes[0].assets[0].path == str(tmp_path / "0/s1.tif")


def test_of_two_processings_the_newest_item_is_used(tmp_path: Path) -> None:
    old, new = earth_search(False), earth_search(False)
    old["id"], old["properties"]["s2:processing_baseline"] = "older", "03.01"
    for order in ((old, new), (new, old)):
        places, left_out = found("stac", save(tmp_path / "items.json", *order))
        assert len(places["T07HFE"].scenes) == 1 and left_out == [LeftOut("older", OLDER)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ('{"type": "FeatureCollection", "features": []}', "no STAC item there; give an ItemCollection as a file"),
        ('{"type": "Feature", "stac_version": "1.0.0", "id": "x"}', "item 'x' is no STAC item"),
        (json.dumps(item("x", "landsat", {}, platform="landsat-9")), "none of 1 STAC items can be used: no sensor"),
        (json.dumps(radar("S1A_IW_GRDH_x", "sentinel-1-grd")), "first remove thermal noise"),
        (
            json.dumps(item("x", "sentinel-2-l2a", {"B02": {"href": "https://h/a.tif?sig=x"}})),
            "h/a.tif: a signed address",
        ),
    ],
)
def test_mistakes_of_items_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "items.json").write_text(content)
    with pytest.raises(ArchiveError, match=words):
        found("stac", tmp_path / "items.json")


def test_samples_of_items(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = {}
    for band in SENSORS[L2A].bands:
        count = int(640 // band.resolution) + 1
        numbers[band.name] = rng.integers(1000, 3000, (1, count, count)).astype(np.uint16)
        write_scene(
            tmp_path / f"{band.name}.tif", "label", values=numbers[band.name], transform=north_up(band.resolution)
        )
    scl = np.full((33, 33), 4, np.uint8)
    scl[:16, :16] = 10
    codes(tmp_path / "SCL.tif", scl, 20.0)
    power = rng.uniform(0.01, 0.9, (2, 64, 64)).astype(np.float32)
    for number, band in enumerate(("vv", "vh")):
        path = tmp_path / f"measurement/iw-{band}.tiff"
        write_scene(path, "label", values=power[number : number + 1])
    save(tmp_path / "items.json", earth_search(False), radar("S1A_IW_GRDH_rtc", "sentinel-1-rtc"))
    made = samples("stac", tmp_path / "items.json", [L2A, "s1"], tmp_path / "data")
    assert made["T07HFE-00000-00000"].meta["cloud"] == 1.0 and made["T07HFE-00000-00032"].meta["cloud"] == 0.0
    tiles = made["T07HFE-00000-00032"].tiles
    np.testing.assert_array_equal(tiles[L2A].values[3], numbers["B4"][0, :32, 32:64] - 1000)
    np.testing.assert_allclose(tiles["s1"].values[1], 10 * np.log10(power[1, :32, 32:]), rtol=1e-5)
