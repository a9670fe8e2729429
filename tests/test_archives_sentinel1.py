"""Calibrated Sentinel-1 images, alone and with Sentinel-2, from the files to the samples."""

from __future__ import annotations

import os
import re
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from shards.archives import ArchiveError, snap
from shards.archives import sentinel1_product as s1
from shards.raster_io import write_geotiff
from shards.tile import open_scene, read_tile
from tests.archive_checks import discover, samples
from tests.radar_trees import GAMMA0, hyp3, radar
from tests.safe_trees import L1C, ORIGIN, SIZE, UTM34, Safe


def test_radar_belongs_to_the_tiles_that_it_overlaps(tmp_path: Path) -> None:
    Safe().write(tmp_path)
    Safe(tile="34UDF", origin=(ORIGIN[0] + 5000, ORIGIN[1])).write(tmp_path)
    hyp3(tmp_path)
    hyp3(tmp_path, "S1A_IW_20230830T163131_DVP_RTC10_G_sauned_1A2C", east=4900)
    hyp3(tmp_path, "S1A_IW_20230831T163131_DVP_RTC10_G_gduned_1A2D", east=90_000)
    places, left_out = discover("sentinel", tmp_path)
    times = {
        name: [f"{s.time:%m%d}" for s in place.scenes if s.sensor == "s1" and s.time] for name, place in places.items()
    }
    assert times == {"T34UCF": ["0823"], "T34UDF": ["0830"]} and left_out == []
    assert places["T34UCF"].facts["s1"] == ["gamma0, from linear power"]
    assert places["T34UDF"].facts["s1"] == ["sigma0, from linear amplitude"]


@pytest.mark.parametrize(("letter", "decibels"), [("p", 10.0), ("a", 20.0), ("d", None)])
def test_samples_hold_decibels(tmp_path: Path, letter: str, decibels: float | None) -> None:
    product = Safe()
    product.write(tmp_path)
    values = np.random.default_rng(1).uniform(0.01, 0.9, (1, SIZE, SIZE)).astype(np.float32)
    values = values if decibels else 10 * np.log10(values)
    values[0, :8] = 0  # outside the swath, and not declared
    numbers = hyp3(tmp_path, f"S1A_IW_20230823T163131_DVP_RTC10_G_g{letter}uned_1A2B", values=values)
    made = samples("sentinel", tmp_path, [L1C, "s1"])
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
    places, left_out = discover("sentinel", tmp_path)
    scene = scene[:64]
    assert list(places) == [GAMMA0, f"{GAMMA0}-2", scene] and left_out == []
    place = places[scene]
    assert place.scenes[0].time == datetime(2023, 8, 22, 5, 21, 31, tzinfo=UTC)
    assert [asset.nodata for asset in place.scenes[0].assets] == [None, None]  # as the file says
    assert len(samples("sentinel", tmp_path, ["s1"])) == 18  # the copy shows nothing new


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
    places, _ = discover("sentinel", tmp_path)
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
        discover("sentinel", tmp_path)
    add_snap_tag(path, ("Sigma0_VH", "Sigma0_VV"), big)
    assert snap.band_names(path) == ("Sigma0_VH", "Sigma0_VV")
    (place,) = discover("sentinel", tmp_path)[0].values()
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
        discover("sentinel", tmp_path)
    Safe().write(tmp_path)
    assert [item.reason.startswith(reason) for item in discover("sentinel", tmp_path)[1]] == [True, True]


def test_one_polarisation_and_files_beside_the_product_are_left_out(tmp_path: Path) -> None:
    hyp3(tmp_path)
    radar(tmp_path / f"{GAMMA0[:-4]}9999_VV.tif")
    radar(tmp_path / f"{GAMMA0[:-4]}8888_HH.tif")
    radar(tmp_path / GAMMA0 / f"{GAMMA0}_dem.tif")
    (tmp_path / GAMMA0 / f"{GAMMA0}_area.tif").write_bytes(b"no raster")
    (tmp_path / "a.dim").touch()
    (tmp_path / "a.data").mkdir()
    reasons = {
        Path(item.name).name.removeprefix(GAMMA0[:-4]): item.reason for item in discover("sentinel", tmp_path)[1]
    }
    assert reasons == {
        "9999_VV.tif": s1.PARTIAL, "8888_HH.tif": s1.PARTIAL, "1A2B_dem.tif": s1.OTHER, "1A2B_area.tif": s1.OTHER,
        "a.data": "BEAM-DIMAP of SNAP: write it as GeoTIFF",
    }  # fmt: skip


def test_level_1_product_is_refused_with_the_steps(tmp_path: Path) -> None:
    name = "S1A_IW_GRDH_1SDV_20230823T163131_20230823T163156_050000_0603F2_1D2C.SAFE"
    (tmp_path / name / "measurement").mkdir(parents=True)
    (tmp_path / name / "manifest.safe").touch()
    with pytest.raises(ArchiveError, match="thermal noise, calibrate.*terrain.*SNAP, pyroSAR.*HyP3") as caught:
        discover("sentinel", tmp_path)
    assert "(1)" in str(caught.value)


@pytest.mark.real_data
def test_real_level_1_image_with_control_points_is_refused(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "scenes/rio-tiler/cog_gcps.tif"
    os.symlink(source, tmp_path / "S1A_IW_20180716T060623_VV.tif")
    with pytest.raises(ArchiveError, match="thermal noise"):
        discover("sentinel", tmp_path)


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
    made = samples("sentinel", tmp_path, ["s1"], size=64, min_valid=0.9)
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
