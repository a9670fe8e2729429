"""Scenes that are listed as STAC items."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyproj import Transformer

from shards.archives import ArchiveError
from shards.archives.sentinel1_product import STEPS, UNTOLD
from shards.archives.sentinel2_product import OLDER
from shards.scene import LeftOut, Radiometry
from shards.sensors import SENSORS
from tests.archive_checks import discover, samples
from tests.safe_trees import L2A
from tests.scenes import ORIGIN, UTM, north_up, write_scene

PRODUCT = "S2A_MSIL2A_20230101T101031_N0509_R022_T33UUP_20230101T120000"


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
    places, left_out = discover("stac", save(tmp_path / "items.json", earth_search(applied)))
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
    (place,) = discover("stac", save(tmp_path / "items.json", raw))[0].values()
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
    (place,) = discover("stac", save(tmp_path / "items.json", raw))[0].values()
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
    (place,) = discover("stac", save(tmp_path / "items.json", raw))[0].values()
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
    places, left_out = discover("stac", save(tmp_path / "items.json", *raw))
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
    (place,) = discover("stac", tmp_path)[0].values()
    assert (place.name, place.group, place.split) == ("graz", "Austria", "test")
    assert [(scene.sensor, scene.assets[0].bands) for scene in place.scenes] == [("s1", ("VV", "VH")), ("label", ())]
    assert place.scenes[0].assets[0].path == str(tmp_path / "0/s1.tif")


def test_of_two_processings_the_newest_item_is_used(tmp_path: Path) -> None:
    old, new = earth_search(False), earth_search(False)
    old["id"], old["properties"]["s2:processing_baseline"] = "older", "03.01"
    for order in ((old, new), (new, old)):
        places, left_out = discover("stac", save(tmp_path / "items.json", *order))
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
        discover("stac", tmp_path / "items.json")


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
    write_scene(tmp_path / "SCL.tif", "label", values=scl[None], metres=20.0)
    power = rng.uniform(0.01, 0.9, (2, 64, 64)).astype(np.float32)
    for number, band in enumerate(("vv", "vh")):
        path = tmp_path / f"measurement/iw-{band}.tiff"
        write_scene(path, "label", values=power[number : number + 1])
    save(tmp_path / "items.json", earth_search(False), radar("S1A_IW_GRDH_rtc", "sentinel-1-rtc"))
    made = samples("stac", tmp_path / "items.json", [L2A, "s1"], out=tmp_path / "data")
    assert made["T07HFE-00000-00000"].meta["cloud"] == 1.0 and made["T07HFE-00000-00032"].meta["cloud"] == 0.0
    tiles = made["T07HFE-00000-00032"].tiles
    np.testing.assert_array_equal(tiles[L2A].values[3], numbers["B4"][0, :32, 32:64] - 1000)
    np.testing.assert_allclose(tiles["s1"].values[1], 10 * np.log10(power[1, :32, 32:]), rtol=1e-5)
