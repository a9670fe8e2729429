"""Sentinel-2 products as downloaded, from the files to the samples."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.archives import ArchiveError, about
from shards.archives import sentinel1_product as s1
from shards.archives.baseline import of_baseline, offset
from shards.archives.safe import parse
from shards.archives.sentinel2_product import OLDER
from shards.raster import open_raster
from shards.scene import SceneError
from shards.sensors import SENSORS
from shards.tile import open_scene, read_cloud, read_tile
from tests.archive_checks import discover, samples
from tests.radar_trees import GAMMA0
from tests.safe_trees import L1C, L2A, NATIVE, ORDER, SIZE, Safe

OLD = Safe(
    tile="32TQR", start="20160605T101732", seen="2016-06-05T10:20:11.460Z", baseline="02.02", style="old",
    generated="20160605T174834", strip="20160605T101732", offset=None,
)  # fmt: skip
PRODUCTS = {
    "L1C": Safe(),
    "L2A": Safe(level=L2A),
    "L1C before the offset": Safe(baseline="03.01", offset=None),
    "L1C of 2016": OLD,
    "L2A of Sen2Cor, 2016": replace(OLD, level=L2A, style="sen2cor"),
    "L2A of 2017": replace(OLD, level=L2A, style="2017", baseline="02.05"),
    "other quantification": Safe(quantification=1000),
}


def fresh(product: Safe, **changes: Any) -> Safe:
    return replace(product, numbers={}, **changes)


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
    places, left_out = discover("sentinel", tmp_path)
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
    folder = Safe().write(tmp_path / "folder", mask=np.zeros((3, 16, 16)))
    shutil.copytree(folder, tmp_path / "zip" / folder.name)
    zipped(tmp_path / "zip" / folder.name)
    one, two = samples("sentinel", tmp_path / "folder", [L1C]), samples("sentinel", tmp_path / "zip", [L1C])
    assert len(one) == 9 and list(one) == list(two)
    for key, sample in one.items():
        np.testing.assert_array_equal(sample.tiles[L1C].values, two[key].tiles[L1C].values)
        assert sample.meta["cloud"] == two[key].meta["cloud"] == 0.0


def test_one_zip_or_one_product_can_be_the_root(tmp_path: Path) -> None:
    folder = Safe().write(tmp_path)
    assert list(discover("sentinel", folder)[0]) == ["T34UCF"]
    assert list(discover("sentinel", zipped(folder))[0]) == ["T34UCF"]


def test_samples_hold_reflectance_without_the_offset_and_the_share_of_cloud(tmp_path: Path) -> None:
    codes = np.full((48, 48), 4)
    codes[:16, :16] = 9  # the whole first tile
    codes[:16, 16:32] = np.resize([3, 8, 10, 11], (16, 16))  # shadow and snow are no cloud
    product = Safe(level=L2A)
    product.write(tmp_path, mask=codes)
    made = samples("sentinel", tmp_path, [L2A])
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
    Safe().write(tmp_path, mask=mask)
    places, _ = discover("sentinel", tmp_path)
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
    (place,) = discover("sentinel", tmp_path)[0].values()
    assert place.scenes[0].cloud is None and place.facts["cloud mask of s2-l1c"] == ["none"]


def test_old_products_with_many_tiles(tmp_path: Path) -> None:
    one, two = fresh(OLD), fresh(OLD, tile="32TQS", origin=(300000.0, 5000040.0))
    folder = one.write(tmp_path)
    metadata = next(folder.glob("*_MTD_SAFL1C_*.xml"))
    first = re.search(r"(?s)<Granules.*</Granules>", metadata.read_text())
    assert first is not None and two.write(tmp_path, seed=1) == folder
    metadata.write_text(metadata.read_text().replace("<Granule_List>", f"<Granule_List>{first[0]}"))
    places, left_out = discover("sentinel", tmp_path)
    assert list(places) == ["T32TQR", "T32TQS"] and left_out == []
    assert all(tile[1:] in asset.path for tile in places for asset in places[tile].scenes[0].assets)
    (folder / f"{one.image('B8', 10)}.jp2").unlink()
    places, left_out = discover("sentinel", tmp_path)
    assert list(places) == ["T32TQS"] and "T32TQR" in left_out[0].name


def test_of_several_processings_the_newest_is_used(tmp_path: Path) -> None:
    Safe(baseline="03.01", offset=None, generated="20200101T000000").write(tmp_path)
    newest = Safe(baseline="05.10", generated="20240101T000000").write(tmp_path)
    shutil.copytree(newest, tmp_path / "copy" / newest.name)
    zipped(tmp_path / "copy" / newest.name)
    Safe(baseline="05.00", generated="20230101T000000").write(tmp_path)
    Safe(level=L2A, baseline="05.00").write(tmp_path)
    places, left_out = discover("sentinel", tmp_path)
    assert [(s.sensor, "N0510" in s.path, ".zip" in s.path) for s in places["T34UCF"].scenes] == [
        (L1C, True, False), (L2A, False, False),
    ]  # fmt: skip
    assert {item.reason for item in left_out} == {OLDER} and len(left_out) == 3
    assert all("(34UCF)" in item.name for item in left_out)


def test_two_strips_of_one_data_take_are_two_scenes(tmp_path: Path) -> None:
    Safe().write(tmp_path)
    Safe(strip="20230823T095911", seen="2023-08-23T10:05:41.003Z", generated="20230823T130000").write(tmp_path)
    places, left_out = discover("sentinel", tmp_path)
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
    good, bad = Safe(tile="34UDF"), Safe()
    good.write(tmp_path)
    folder = bad.write(tmp_path, mask=np.zeros((3, 16, 16)))
    break_product(folder, bad, fault)
    if packed:
        zipped(folder)
    places, left_out = discover("sentinel", tmp_path)
    assert list(places) == ["T34UDF"]
    assert [item.reason for item in left_out] == [FAULTS[fault]]
    assert left_out[0].name.startswith(bad.name.removesuffix(".SAFE"))
    if fault in ("missing band", "truncated band"):
        assert re.search("B0?5", left_out[0].name)


def test_truncated_zip_and_other_zips_are_named(tmp_path: Path) -> None:
    Safe(tile="34UDF").write(tmp_path)
    path = zipped(Safe().write(tmp_path))
    path.write_bytes(path.read_bytes()[:-1000])
    for name in (
        f"{GAMMA0}.zip",
        "photos.zip",
        "S1A_IW_SLC__1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.zip",
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name[:-4]}/a.tif", b"")
    reasons = {item.name: item.reason for item in discover("sentinel", tmp_path)[1]}
    assert reasons == {
        path.name: "truncated, or no zip; download it again",
        f"{GAMMA0}.zip": "Sentinel-1 in a zip: unpack it",
        "photos.zip": "a zip without a Sentinel-2 product",
        "S1A_IW_SLC__1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.zip": s1.STEPS,
    }


def test_junk_and_wrapped_folders(tmp_path: Path) -> None:
    Safe().write(tmp_path / "download/S2B_34UCF.SAFE")
    for junk in ("__MACOSX/._S2B.SAFE/MTD_MSIL1C.xml", ".trash/MTD_MSIL1C.xml", "download/._x.tif", "notes.txt"):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).write_text("junk")
    (tmp_path / "bands").mkdir()
    (tmp_path / "bands/T34UCF_20230823T095559_B02.jp2").write_bytes(b"")
    os.symlink(Safe(tile="34UDF").write(tmp_path / ".elsewhere"), tmp_path / "link.SAFE")
    places, left_out = discover("sentinel", tmp_path)
    assert list(places) == ["T34UCF", "T34UDF"]
    assert [(item.name, item.reason[:19]) for item in left_out] == [("bands", "bands of Sentinel-2")]


def test_nothing_usable_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such folder; expected one with S2B_MSIL2A"):
        discover("sentinel", tmp_path / "absent")
    with pytest.raises(ArchiveError, match="no Sentinel product to use.*MTD_MSIL2A.xml.*Left out: nothing"):
        discover("sentinel", tmp_path)


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


def test_sources_and_terms_are_stated() -> None:
    told = about("sentinel")
    assert "Copernicus Sentinel" in told.attribution and set(told.notes) == {"s1", L1C, L2A}
    assert all(name in SENSORS for name in told.notes)


def test_damaged_jp2_is_found_without_a_manifest(tmp_path: Path) -> None:
    product = Safe()
    folder = product.write(tmp_path)
    (folder / "manifest.safe").unlink()
    band = folder / f"{product.image('B3', 10)}.jp2"
    band.write_bytes(band.read_bytes()[: band.stat().st_size // 2])
    with pytest.raises(SceneError, match="B03.jp2: damaged"):
        samples("sentinel", tmp_path, [L1C])
