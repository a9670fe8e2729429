"""Scenes that are listed in a table, and the addresses and names of bands that lists may have."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from shards.archives import ArchiveError
from shards.archives.rows import address, band_name
from shards.scene import Asset, CloudMask, Radiometry
from tests.archive_checks import discover, samples
from tests.safe_trees import L1C, L2A
from tests.scenes import write_scene


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
        (
            {"time": "2018-06-01", "href": "S2A_MSIL2A_20230101T101031_N0509_R022_T33UUP_20230101T120000/a.tif"},
            Radiometry(offset=-1000),
        ),
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
    (place,) = discover("catalog", catalog(tmp_path, row))[0].values()
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
    places, left_out = discover("catalog", tmp_path)
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
        discover("catalog", catalog(tmp_path, *rows))


def test_samples_of_a_catalog_with_radiometry_and_clouds(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(900, 4000, (12, 64, 64)).astype(np.uint16)
    write_scene(tmp_path / "a.tif", L2A, values=stored)
    power = np.random.default_rng(1).uniform(0.01, 0.9, (2, 64, 64)).astype(np.float32)
    write_scene(tmp_path / "s1.tif", "s1", values=power)
    qa = np.zeros((64, 64), np.uint16)
    qa[:32, :32], qa[:32, 32:48], qa[32:, :8] = 1024, 2048, 512
    write_scene(tmp_path / "qa60.tif", "label", values=qa[None])
    time = {"time": "2023-01-01T10:00:00Z"}
    catalog(
        tmp_path, time, {"href": "qa60.tif", "band": "QA60", **time},
        {"sensor": "s1", "href": "s1.tif", "quantity": "power"},
    )  # fmt: skip
    made = samples("catalog", tmp_path, [L2A, "s1"])
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
    over = samples("catalog", tmp_path, [L2A], out=tmp_path / "over")
    catalog(tmp_path, {"href": "a.tif"})
    beside = samples("catalog", tmp_path, [L2A], out=tmp_path / "beside")
    np.testing.assert_array_equal(over["a-00000-00000"].tiles[L2A].values, beside["a-00000-00000"].tiles[L2A].values)


@pytest.mark.parametrize(
    ("sensor", "text", "wanted"),
    [(L2A, "b02", "B2"), (L2A, "B8A", "B8A"), (L2A, "B10", ""), (L1C, "B10", "B10"), (L1C, "scl", "SCL"),
     ("s1", "vv", "VV"), ("s1", "SCL", ""), ("label", "B1", ""), ("rgbnir", "nir", "NIR")],
)  # fmt: skip
def test_names_of_bands(sensor: str, text: str, wanted: str) -> None:
    assert band_name(sensor, text) == wanted
