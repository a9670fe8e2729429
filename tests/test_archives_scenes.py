"""Raw scenes: Sentinel-2 products as downloaded and calibrated Sentinel-1 images, from the files to the samples."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

import configs
from shards.archives import ArchiveError, about, open_archive, snap
from shards.archives import sentinel1_product as s1
from shards.archives.baseline import of_baseline, offset
from shards.archives.safe import parse
from shards.archives.sentinel2_product import OLDER
from shards.build import build
from shards.manifest import select
from shards.raster import open_raster
from shards.raster_io import write_geotiff
from shards.sample import Sample
from shards.scene import LeftOut, Place, SceneError
from shards.sensors import SENSORS
from shards.stream import Share, Stream
from shards.tile import open_scene, read_cloud, read_tile
from shards.verify import verify
from tests.safe_trees import L1C, L2A, NATIVE, ORDER, SIZE, Safe

NEW = Safe()
OLD = Safe(
    tile="32TQR", start="20160605T101732", seen="2016-06-05T10:20:11.460Z", baseline="02.02", style="old",
    generated="20160605T174834", strip="20160605T101732", offset=None,
)  # fmt: skip
PRODUCTS = {
    "L1C": NEW,
    "L2A": replace(NEW, level=L2A),
    "L1C before the offset": replace(NEW, baseline="03.01", offset=None),
    "L1C of 2016": OLD,
    "L2A of Sen2Cor, 2016": replace(OLD, level=L2A, style="sen2cor"),
    "L2A of 2017": replace(OLD, level=L2A, style="2017", baseline="02.05"),
    "other quantification": replace(NEW, quantification=1000),
}
UTM34, ORIGIN = "EPSG:32634", (300000.0, 6100020.0)
GAMMA0 = "S1A_IW_20230823T163131_DVP_RTC10_G_gpuned_1A2B"  # HyP3, power


def fresh(product: Safe, **changes: Any) -> Safe:
    return replace(product, numbers={}, **changes)


def found(root: Path) -> tuple[dict[str, Place], list[LeftOut]]:
    items = list(open_archive("sentinel", str(root)))
    places = {item.name: item for item in items if isinstance(item, Place)}
    left_out = [item for item in items if isinstance(item, LeftOut)]
    assert len(places) + len(left_out) == len(items)
    return places, left_out


def samples(root: Path, sensors: list[str], **tile: Any) -> dict[str, Sample]:
    raw = {"stage": "shards", "archive": {"name": "sentinel", "root": str(root)}, "out": str(root / ".data")}
    build(configs.parse({**raw, "sensors": sensors, "tile": {"size": 32, **tile}}))
    assert verify(str(root / ".data")) == []
    selection = select(str(root / ".data"))
    return {sample.key: sample for sample, _ in Stream(selection, 0, 1, Share(1)).once()}


def zipped(folder: Path) -> Path:
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    shutil.rmtree(folder)
    return path


@pytest.mark.parametrize("name", PRODUCTS)
def test_bands_numbers_and_times_of_every_naming(tmp_path: Path, name: str) -> None:
    product = fresh(PRODUCTS[name])
    product.write(tmp_path)
    places, left_out = found(tmp_path)
    assert left_out == []
    (place,) = places.values()
    assert (place.name, place.group, place.coregistered) == (f"T{product.tile}", f"T{product.tile}", False)
    (scene,) = place.scenes
    assert scene.sensor == product.level and scene.time == datetime.fromisoformat(product.seen)
    assert tuple(asset.bands for asset in scene.assets) == tuple((band,) for band in product.bands)
    scale = 10000 / product.quantification
    for asset, band in zip(scene.assets, product.bands, strict=True):
        added = 0 if product.offset is None else product.offset - ORDER.index(band)
        assert (asset.radiometry.scale, asset.radiometry.offset) == (scale, added * scale)
        with open_raster(asset) as raster:
            assert raster.grid.resolution == NATIVE[band]
            assert raster.grid.height == SIZE * 10 // NATIVE[band]
    with open_scene(scene) as opened:
        tile = read_tile(opened, opened.grid)
    for band in ("B2", "B8"):
        added = 0 if product.offset is None else product.offset - ORDER.index(band)
        wanted = np.maximum((product.numbers[band].astype(float) + added) * scale, 0 if scale == 1 else -np.inf)
        np.testing.assert_allclose(tile.values[product.bands.index(band)], wanted, rtol=1e-6)


def test_samples_of_a_zip_are_those_of_its_folder(tmp_path: Path) -> None:
    folder = fresh(NEW).write(tmp_path / "folder", mask=np.zeros((3, 16, 16)))
    shutil.copytree(folder, tmp_path / "zip" / folder.name)
    zipped(tmp_path / "zip" / folder.name)
    one, two = samples(tmp_path / "folder", [L1C]), samples(tmp_path / "zip", [L1C])
    assert len(one) == 9 and list(one) == list(two)
    for key, sample in one.items():
        np.testing.assert_array_equal(sample.tiles[L1C].values, two[key].tiles[L1C].values)
        assert sample.meta["cloud"] == two[key].meta["cloud"] == 0.0


def test_one_zip_or_one_product_can_be_the_root(tmp_path: Path) -> None:
    folder = fresh(NEW).write(tmp_path)
    assert list(found(folder)[0]) == ["T34UCF"]
    assert list(found(zipped(folder))[0]) == ["T34UCF"]


def test_samples_hold_reflectance_without_the_offset_and_the_share_of_cloud(tmp_path: Path) -> None:
    codes = np.full((48, 48), 4)
    codes[:16, :16] = 9  # the whole first tile
    codes[:16, 16:32] = np.resize([3, 8, 10, 11], (16, 16))  # shadow and snow are no cloud
    product = fresh(NEW, level=L2A)
    product.write(tmp_path, mask=codes)
    made = samples(tmp_path, [L2A])
    assert len(made) == 9
    for key, sample in made.items():
        row, col = (int(part) for part in key.split("-")[-2:])
        wanted = np.maximum(product.numbers["B4"].astype(int) - 1003, 0)[row : row + 32, col : col + 32]
        np.testing.assert_array_equal(sample.tiles[L2A].values[ORDER.index("B4")], wanted)
        assert sample.tiles[L2A].valid.all()
        assert sample.meta["cloud"] == {(0, 0): 1.0, (0, 32): 0.5}.get((row, col), 0.0)
        assert sample.meta["place"] == "T34UCF"


def test_cloud_mask_of_level_1c_is_its_band_of_opaque_clouds(tmp_path: Path) -> None:
    mask = np.zeros((3, 16, 16))
    mask[0, :8], mask[1, 8:], mask[2] = 1, 1, 1  # opaque above, cirrus below, snow everywhere
    fresh(NEW).write(tmp_path, mask=mask)
    places, _ = found(tmp_path)
    assert dict(places["T34UCF"].facts) == {
        "baselines": ["05.09"], "cloud mask of s2-l1c": ["MSK_CLASSI opaque clouds"],
    }  # fmt: skip
    with open_scene(places["T34UCF"].scenes[0]) as opened:
        cloud = read_cloud(opened, opened.grid)
    assert cloud is not None and cloud[:48].all() and not cloud[48:].any()


def test_older_products_say_that_they_have_no_cloud_mask(tmp_path: Path) -> None:
    folder = fresh(OLD).write(tmp_path)
    masks = folder / OLD.granule / "QI_DATA"
    masks.mkdir()
    (masks / "S2A_OPER_MSK_CLOUDS_PDMC_20160605T174834_A033753_T32TQR_B00_MSIL1C.gml").write_text("<eop:Mask/>")
    (place,) = found(tmp_path)[0].values()
    assert place.scenes[0].cloud is None and place.facts["cloud mask of s2-l1c"] == ["none"]


def test_old_products_with_many_tiles(tmp_path: Path) -> None:
    one, two = fresh(OLD), fresh(OLD, tile="32TQS", origin=(300000.0, 5000040.0))
    folder = one.write(tmp_path)
    metadata = next(folder.glob("*_MTD_SAFL1C_*.xml"))
    first = re.search(r"(?s)<Granules.*</Granules>", metadata.read_text())
    assert first is not None and two.write(tmp_path, seed=1) == folder
    metadata.write_text(metadata.read_text().replace("<Granule_List>", f"<Granule_List>{first[0]}"))
    places, left_out = found(tmp_path)
    assert list(places) == ["T32TQR", "T32TQS"] and left_out == []
    assert all(tile[1:] in asset.path for tile in places for asset in places[tile].scenes[0].assets)
    (folder / f"{one.image('B8', 10)}.jp2").unlink()
    places, left_out = found(tmp_path)
    assert list(places) == ["T32TQS"] and "T32TQR" in left_out[0].name


def test_of_several_processings_the_newest_is_used(tmp_path: Path) -> None:
    fresh(NEW, baseline="03.01", offset=None, generated="20200101T000000").write(tmp_path)
    newest = fresh(NEW, baseline="05.10", generated="20240101T000000").write(tmp_path)
    shutil.copytree(newest, tmp_path / "copy" / newest.name)
    zipped(tmp_path / "copy" / newest.name)
    fresh(NEW, baseline="05.00", generated="20230101T000000").write(tmp_path)
    fresh(NEW, level=L2A, baseline="05.00").write(tmp_path)
    places, left_out = found(tmp_path)
    assert [(s.sensor, "N0510" in s.path, ".zip" in s.path) for s in places["T34UCF"].scenes] == [
        (L1C, True, False), (L2A, False, False),
    ]  # fmt: skip
    assert {item.reason for item in left_out} == {OLDER} and len(left_out) == 3
    assert all("(34UCF)" in item.name for item in left_out)


def test_two_strips_of_one_data_take_are_two_scenes(tmp_path: Path) -> None:
    fresh(NEW).write(tmp_path)
    fresh(NEW, strip="20230823T095911", seen="2023-08-23T10:05:41.003Z", generated="20230823T130000").write(tmp_path)
    places, left_out = found(tmp_path)
    assert len({scene.time for scene in places["T34UCF"].scenes}) == 2 and left_out == []


def break_product(folder: Path, product: Safe, fault: str) -> None:
    metadata = folder / "MTD_MSIL1C.xml"
    band = folder / f"{product.image('B5', 20)}.jp2"
    text = metadata.read_text()
    if fault == "no metadata":
        metadata.unlink()
    elif fault == "missing band":
        band.unlink()
    elif fault == "truncated band":
        band.write_bytes(band.read_bytes()[:-100])
    elif fault == "truncated mask":
        mask = folder / product.granule / "QI_DATA/MSK_CLASSI_B00.jp2"
        mask.write_bytes(mask.read_bytes()[:-10])
    elif fault == "empty band without manifest":
        band.write_bytes(b"")
        (folder / "manifest.safe").unlink()
    elif fault == "document type":
        metadata.write_text(text.replace("<n1:Level", '<!DOCTYPE a [<!ENTITY x "y">]><n1:Level', 1))
    elif fault == "truncated metadata":
        metadata.write_text(text[: len(text) // 2])
    elif fault == "another level":
        metadata.write_text(text.replace(">Level-1C<", ">Level-1B<"))
    elif fault == "offset missing":
        metadata.write_text(re.sub(r"<Radiometric_Offset_List>.*</Radiometric_Offset_List>", "", text))
    elif fault == "no number":
        metadata.write_text(text.replace(">10000<", ">many<"))
    elif fault == "no granule":
        metadata.write_text(re.sub(r"(?s)<Granule .*</Granule>", "", text))


FAULTS = {
    "no metadata": "no metadata (MTD_MSIL1C.xml or MTD_MSIL2A.xml); download the product again",
    "missing band": "incomplete, bands are missing; download it again",
    "truncated band": "truncated files; download it again",
    "truncated mask": "truncated files; download it again",
    "empty band without manifest": "truncated files; download it again",
    "document type": "metadata that cannot be read; download the product again",
    "truncated metadata": "metadata that cannot be read; download the product again",
    "another level": "of another level than 1C and 2A",
    "offset missing": "metadata of baseline 04.00 or newer without the offset",
    "no number": "metadata without a number that is needed",
    "no granule": "metadata without granules; download the product again",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_unusable_products_are_named_with_the_reason(tmp_path: Path, fault: str, packed: bool) -> None:
    good, bad = fresh(NEW, tile="34UDF"), fresh(NEW)
    good.write(tmp_path)
    folder = bad.write(tmp_path, mask=np.zeros((3, 16, 16)))
    break_product(folder, bad, fault)
    if packed:
        zipped(folder)
    places, left_out = found(tmp_path)
    assert list(places) == ["T34UDF"]
    assert [item.reason for item in left_out] == [FAULTS[fault]]
    assert left_out[0].name.startswith(bad.name.removesuffix(".SAFE"))
    if fault in ("missing band", "truncated band"):
        assert re.search("B0?5", left_out[0].name)


def test_truncated_zip_and_other_zips_are_named(tmp_path: Path) -> None:
    fresh(NEW, tile="34UDF").write(tmp_path)
    path = zipped(fresh(NEW).write(tmp_path))
    path.write_bytes(path.read_bytes()[:-1000])
    for name in (
        f"{GAMMA0}.zip",
        "photos.zip",
        "S1A_IW_SLC__1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.zip",
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name[:-4]}/a.tif", b"")
    reasons = {item.name: item.reason for item in found(tmp_path)[1]}
    assert reasons == {
        path.name: "truncated, or no zip; download it again",
        f"{GAMMA0}.zip": "Sentinel-1 in a zip: unpack it",
        "photos.zip": "a zip without a Sentinel-2 product",
        "S1A_IW_SLC__1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.zip": s1.STEPS,
    }


def test_junk_and_wrapped_folders(tmp_path: Path) -> None:
    fresh(NEW).write(tmp_path / "download/S2B_34UCF.SAFE")
    for junk in ("__MACOSX/._S2B.SAFE/MTD_MSIL1C.xml", ".trash/MTD_MSIL1C.xml", "download/._x.tif", "notes.txt"):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).write_text("junk")
    (tmp_path / "bands").mkdir()
    (tmp_path / "bands/T34UCF_20230823T095559_B02.jp2").write_bytes(b"")
    os.symlink(fresh(NEW, tile="34UDF").write(tmp_path / ".elsewhere"), tmp_path / "link.SAFE")
    places, left_out = found(tmp_path)
    assert list(places) == ["T34UCF", "T34UDF"]
    assert [(item.name, item.reason[:19]) for item in left_out] == [("bands", "bands of Sentinel-2")]


def test_nothing_usable_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such folder; expected one with S2B_MSIL2A"):
        found(tmp_path / "absent")
    with pytest.raises(ArchiveError, match="no Sentinel product to use.*MTD_MSIL2A.xml.*Left out: nothing"):
        found(tmp_path)


def test_entities_are_refused_in_any_encoding() -> None:
    bomb = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a>&d;</a>'
    outside = b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><a>&b;</a>'
    for content in (bomb.encode("utf-16"), outside):
        with pytest.raises(ValueError, match="document type declaration"):
            parse(content)
    assert parse(b"<a>b</a>").text == "b"


@pytest.mark.parametrize(
    ("product", "day", "wanted"),
    [
        ("S2A_MSIL2A_20230101T101031_N0509_R022_T33UUP_20230101T120000", "2023-01-01", -1000),
        ("archive/S2A_MSIL1C_20180101T101031_N0500_R022_T33UUP_20230901T120000.SAFE/B02.tif", "2018-01-01", -1000),
        ("S2A_MSIL2A_20220201T101031_N0301_R022_T33UUP_20220201T120000", "2022-02-01", 0),
        ("S2A_OPER_MSI_L2A_TL_2APS_20240108T121951_A044635_T34VEL_N05.10", None, -1000),
        ("S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57", "2022-06-13", 0),
        ("tile_7.tif", "2022-01-24", 0),
        ("tile_7.tif", "2022-01-25", -1000),
        ("tile_N0509_.tif", None, 0),
    ],
)
def test_offset_by_name_or_date(product: str, day: str | None, wanted: float) -> None:
    time = None if day is None else datetime.fromisoformat(day).replace(tzinfo=UTC)
    assert offset(product, time) == wanted
    assert offset(product, None if time is None else time.replace(tzinfo=None)) == wanted


def test_offset_by_baseline() -> None:
    assert [of_baseline(text) for text in ("02.14", "03.01", "04.00", "05.11", "99.99")] == [0, 0, -1000, -1000, 0]


# Sentinel-1 ------------------------------------------------------------------------------------------------------


def radar(
    path: Path, bands: tuple[str, ...] = ("",), *, values: np.ndarray | None = None, east: float = 0.0, **options: Any
) -> Path:
    """A GeoTIFF of backscatter; `bands` are the descriptions, `east` metres off the tile's corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(len(path.name)).uniform(0.01, 1, (len(bands), SIZE, SIZE)).astype(np.float32)
    options = {"crs": UTM34, "transform": (10.0, 0.0, ORIGIN[0] + east, 0.0, -10.0, ORIGIN[1]), **options}
    write_geotiff(path, values, descriptions=bands, **options)
    return path


def hyp3(root: Path, name: str = GAMMA0, **options: Any) -> dict[str, np.ndarray]:
    """VV and VH of one HyP3 product."""
    numbers = {}
    for band in ("VV", "VH"):
        path = radar(root / name / f"{name}_{band}.tif", **options)
        with rasterio.open(path) as raster:
            numbers[band] = raster.read(1)
    return numbers


def test_radar_belongs_to_the_tiles_that_it_overlaps(tmp_path: Path) -> None:
    fresh(NEW).write(tmp_path)
    fresh(NEW, tile="34UDF", origin=(ORIGIN[0] + 5000, ORIGIN[1])).write(tmp_path)
    hyp3(tmp_path)
    hyp3(tmp_path, "S1A_IW_20230830T163131_DVP_RTC10_G_sauned_1A2C", east=4900)
    hyp3(tmp_path, "S1A_IW_20230831T163131_DVP_RTC10_G_gduned_1A2D", east=90_000)
    places, left_out = found(tmp_path)
    times = {
        name: [f"{s.time:%m%d}" for s in place.scenes if s.sensor == "s1" and s.time] for name, place in places.items()
    }
    assert times == {"T34UCF": ["0823"], "T34UDF": ["0830"]} and left_out == []
    assert places["T34UCF"].facts["s1"] == ["gamma0, from linear power"]
    assert places["T34UDF"].facts["s1"] == ["sigma0, from linear amplitude"]


@pytest.mark.parametrize(("letter", "decibels"), [("p", 10.0), ("a", 20.0), ("d", None)])
def test_samples_hold_decibels(tmp_path: Path, letter: str, decibels: float | None) -> None:
    product = fresh(NEW)
    product.write(tmp_path)
    values = np.random.default_rng(1).uniform(0.01, 0.9, (1, SIZE, SIZE)).astype(np.float32)
    values = values if decibels else 10 * np.log10(values)
    values[0, :8] = 0  # outside the swath, and not declared
    numbers = hyp3(tmp_path, f"S1A_IW_20230823T163131_DVP_RTC10_G_g{letter}uned_1A2B", values=values)
    made = samples(tmp_path, [L1C, "s1"])
    assert len(made) == 9
    for key, sample in made.items():
        row, col = (int(part) for part in key.split("-")[-2:])
        cut = numbers["VH"][row : row + 32, col : col + 32]
        seen = sample.tiles["s1"].valid
        np.testing.assert_array_equal(seen, cut != 0)
        wanted = decibels * np.log10(cut[seen]) if decibels else cut[seen]
        np.testing.assert_allclose(sample.tiles["s1"].values[1][seen], wanted, rtol=1e-5)


def test_without_sentinel_2_each_radar_product_is_a_place(tmp_path: Path) -> None:
    hyp3(tmp_path)
    hyp3(tmp_path / "again")
    scene = "S1A_IW_GRDH_1SDV_20230822T052131_20230822T052156_050000_0603F2_9C2C"
    for band in ("vv", "vh"):
        radar(tmp_path / scene / "measurement" / f"iw-{band}.rtc.tiff", nodata=-32768)
    places, left_out = found(tmp_path)
    scene = scene[:64]
    assert list(places) == [GAMMA0, f"{GAMMA0}-2", scene] and left_out == []
    place = places[scene]
    assert place.scenes[0].time == datetime(2023, 8, 22, 5, 21, 31, tzinfo=UTC)
    assert [asset.nodata for asset in place.scenes[0].assets] == [None, None]  # as the file says
    assert len(samples(tmp_path, ["s1"])) == 18  # the copy shows nothing new


NAMES = {
    "Sigma0_VV_db": "value",
    "Sigma0_VV": "power",
    "Gamma0_VH": "power",
    "S1A_IW_GRDH_1SDV_20230823T163131_Orb_NR_Cal_TC_dB.tif": "value",
    "S1A_IW_20181102T155531_DVP_RTC30_G_gpuned_5685_VV.tif": "power",
    "S1B_IW_20200714T162902_SVR_RTC10_G_gdufem_5685_VV.tif": "value",
    "S1A_IW_20181102T155531_DVP_RTC30_G_sawned_5685_VH.tif": "amplitude",
    "iw-vv.rtc.tiff": "power",
    "OPERA_L2_RTC-S1_T115-245714-IW1_20250418T141628Z_20250419T010229Z_S1A_30_v1.0_VV.tif": "power",
    "S1A__IW___A_20210723T155034_VH_gamma0-rtc_db.tif": "value",
    "S1A__IW___A_20210723T155034_VH_gamma0-rtc.tif": "power",
    "s1_20230823_linear_VV.tif": "power",
    "s1_20230823_amplitude_VV.tif": "amplitude",
    "S1A_20230823_VV.tif": None,
    "adbe_dbx.tif": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_linear_and_decibel_are_told_by_name(name: str) -> None:
    assert s1.quantity([name]) == NAMES[name]
    assert s1.quantity(["nothing", name]) == NAMES[name]


def test_bands_are_found_by_description_in_any_order(tmp_path: Path) -> None:
    bands = ("Sigma0_VH_db", "localIncidenceAngle", "Sigma0_VV_db")
    values = np.stack([np.full((SIZE, SIZE), value, np.float32) for value in (-20, 35, -10)])
    radar(tmp_path / "S1A_20230823T163131_TC.tif", bands, values=values)
    places, _ = found(tmp_path)
    (scene,) = next(iter(places.values())).scenes
    assert scene.assets[0].bands == ("VH", "", "VV") and scene.assets[0].radiometry.quantity == "value"
    with open_scene(scene) as opened:
        assert read_tile(opened, opened.grid).values[:, 0, 0].tolist() == [-10, -20]


def add_snap_tag(path: Path, bands: tuple[str, ...], big: bool) -> None:
    """What SNAP adds to a GeoTIFF: tag 65000 with a DIMAP document."""
    blocks = "".join(
        f"<Spectral_Band_Info><BAND_INDEX>{i}</BAND_INDEX><BAND_DESCRIPTION/><BAND_NAME>{name}</BAND_NAME>"
        "<DATA_TYPE>float32</DATA_TYPE></Spectral_Band_Info>"
        for i, name in enumerate(bands)
    )
    virtual = "<Spectral_Band_Info><BAND_INDEX>9</BAND_INDEX><BAND_NAME>x</BAND_NAME><VIRTUAL_BAND>true</VIRTUAL_BAND>"
    text = f'<Dimap_Document name="a">{virtual}</Spectral_Band_Info>{blocks}</Dimap_Document>\0'.encode()
    start, length, entry = ("<Q", "<Q", "<HHQQ") if big else ("<I", "<H", "<HHII")
    data = bytearray(path.read_bytes())
    at = 8 if big else 4
    (position,) = struct.unpack_from(start, data, at)
    (count,) = struct.unpack_from(length, data, position)
    first = position + struct.calcsize(length)
    old = bytes(data[first : first + count * struct.calcsize(entry)])
    data += b"\0" * (len(data) % 2)
    where = len(data)
    data += text + b"\0" * (len(text) % 2)
    struct.pack_into(start, data, at, len(data))
    data += struct.pack(length, count + 1) + old + struct.pack(entry, 65000, 2, len(text), where) + b"\0" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
def test_band_names_that_snap_hides_in_its_tag(tmp_path: Path, big: bool) -> None:
    path = tmp_path / "S1A_IW_GRDH_1SDV_20230823T163131_Orb_NR_Cal_TC.tif"
    values = np.stack([np.full((SIZE, SIZE), value, np.float32) for value in (0.01, 0.1)])
    with rasterio.open(
        path, "w", driver="GTiff", count=2, height=SIZE, width=SIZE, dtype="float32", crs=UTM34,
        transform=rasterio.Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1]), BIGTIFF="YES" if big else "NO",
    ) as raster:  # fmt: skip
        raster.write(values)
    with pytest.raises(ArchiveError, match="no VV or VH in its name"):
        found(tmp_path)
    add_snap_tag(path, ("Sigma0_VH", "Sigma0_VV"), big)
    assert snap.band_names(path) == ("Sigma0_VH", "Sigma0_VV")
    (place,) = found(tmp_path)[0].values()
    with open_scene(place.scenes[0]) as opened:
        np.testing.assert_allclose(read_tile(opened, opened.grid).values[:, 0, 0], [-10, -20], rtol=1e-6)
    assert place.facts["s1"] == ["sigma0, from linear power"]


@pytest.mark.parametrize(
    "content", [b"", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*" + b"\0" * 12, b"no TIFF at all, but text"]
)
def test_other_files_have_no_snap_tag(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    assert snap.band_names(tmp_path / "a.tif") == ()
    assert snap.band_names(tmp_path / "absent.tif") == ()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unsaid": ("S1A_20230823T163131_{}.tif", {}, s1.UNTOLD),
    "undated": ("Gamma0_{}.tif", {}, s1.UNDATED),
    "uncalibrated band": ("Intensity_{}_20230823.tif", {}, s1.STEPS),
    "beta0": ("Beta0_{}_20230823.tif", {}, s1.STEPS),
    "level-1 image": ("s1a-iw-grd-{}-20230823t163131-20230823t163156-050000-0603f2-001.tiff", {}, s1.STEPS),
    "integers": (
        f"{GAMMA0}_{{}}.tif", {"values": np.ones((1, SIZE, SIZE), np.uint16)}, s1.INTEGERS,
    ),
    "two bands without names": (
        f"{GAMMA0}_{{}}.tif", {"values": np.ones((2, SIZE, SIZE), np.float32), "bands": ("", "")}, s1.UNNAMED,
    ),
    "no CRS": (f"{GAMMA0}_{{}}.tif", {"crs": None}, "Sentinel-1 without CRS"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_radar_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path, what: str) -> None:
    name, options, reason = REFUSED[what]
    for band in ("VV", "VH"):
        radar(tmp_path / name.format(band), **options)
    with pytest.raises(ArchiveError, match=re.escape(reason)):
        found(tmp_path)
    fresh(NEW).write(tmp_path)
    assert [item.reason.startswith(reason) for item in found(tmp_path)[1]] == [True, True]


def test_one_polarisation_and_files_beside_the_product_are_left_out(tmp_path: Path) -> None:
    hyp3(tmp_path)
    radar(tmp_path / f"{GAMMA0[:-4]}9999_VV.tif")
    radar(tmp_path / f"{GAMMA0[:-4]}8888_HH.tif")
    radar(tmp_path / GAMMA0 / f"{GAMMA0}_dem.tif")
    (tmp_path / GAMMA0 / f"{GAMMA0}_area.tif").write_bytes(b"no raster")
    (tmp_path / "a.dim").touch()
    (tmp_path / "a.data").mkdir()
    reasons = {Path(item.name).name.removeprefix(GAMMA0[:-4]): item.reason for item in found(tmp_path)[1]}
    assert reasons == {
        "9999_VV.tif": s1.PARTIAL, "8888_HH.tif": s1.PARTIAL, "1A2B_dem.tif": s1.OTHER, "1A2B_area.tif": s1.OTHER,
        "a.data": "BEAM-DIMAP of SNAP: write it as GeoTIFF",
    }  # fmt: skip


def test_level_1_product_is_refused_with_the_steps(tmp_path: Path) -> None:
    name = "S1A_IW_GRDH_1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.SAFE"
    (tmp_path / name / "measurement").mkdir(parents=True)
    (tmp_path / name / "manifest.safe").touch()
    with pytest.raises(ArchiveError, match="thermal noise, calibrate.*terrain.*SNAP, pyroSAR.*HyP3") as caught:
        found(tmp_path)
    assert "(1)" in str(caught.value)


@pytest.mark.real_data
def test_real_level_1_image_with_control_points_is_refused(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "scenes/rio-tiler/cog_gcps.tif"
    os.symlink(source, tmp_path / "S1A_IW_20180716T060623_VV.tif")
    with pytest.raises(ArchiveError, match="thermal noise"):
        found(tmp_path)


@pytest.mark.real_data
def test_real_linear_gamma0_becomes_decibels(tmp_path: Path, real_data: Path) -> None:
    folder = tmp_path / "S1B_20200106_10TET_ASC"  # as in the archive of Sentinel-1 RTC on AWS that the file is from
    folder.mkdir()
    os.symlink(real_data / "scenes/rio-tiler/cog_nodata_nan.tif", folder / "Gamma0_VV.tif")
    with rasterio.open(folder / "Gamma0_VV.tif") as raster:
        power, transform = raster.read(1), tuple(raster.transform)[:6]
    write_geotiff(
        folder / "Gamma0_VH.tif", power[None] / 4, crs="EPSG:32610", transform=transform, nodata=0,
        descriptions=("Gamma0_VH",),
    )  # fmt: skip
    made = samples(tmp_path, ["s1"], size=64, min_valid=0.9)
    assert len(made) > 20
    for key, sample in made.items():
        row, col = (int(part) for part in key.split("-")[-2:])
        cut, seen = np.nan_to_num(power[row : row + 64, col : col + 64]), sample.tiles["s1"].valid
        np.testing.assert_array_equal(seen[: cut.shape[0], : cut.shape[1]], cut != 0)
        seen = seen[: cut.shape[0], : cut.shape[1]]
        vv, vh = sample.tiles["s1"].values[:, : cut.shape[0], : cut.shape[1]][:, seen]
        np.testing.assert_allclose(vv, 10 * np.log10(cut[seen]), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(vv - vh, 10 * np.log10(4), atol=1e-3)
        assert -40 < vv.mean() < 0


def test_sources_and_terms_are_stated() -> None:
    told = about("sentinel")
    assert "Copernicus Sentinel" in told.attribution and set(told.notes) == {"s1", L1C, L2A}
    assert all(name in SENSORS for name in told.notes)


def test_damaged_jp2_is_found_without_a_manifest(tmp_path: Path) -> None:
    product = fresh(NEW)
    folder = product.write(tmp_path)
    (folder / "manifest.safe").unlink()
    band = folder / f"{product.image('B3', 10)}.jp2"
    band.write_bytes(band.read_bytes()[: band.stat().st_size // 2])
    with pytest.raises(SceneError, match="B03.jp2: damaged"):
        samples(tmp_path, [L1C])
