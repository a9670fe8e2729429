"""Major TOM, in Parquet and unpacked: trees to the letter of the layout, what is found in them, and pixels."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.archives import ArchiveError, open_archive
from shards.sensors import SENSORS
from tests.archive_checks import one
from tests.benchmark_trees import built, found, optical, put, sensors
from tests.safe_trees import two_digits

L1C = SENSORS["s2-l1c"].band_names


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
    return {two_digits(b.name): b.resolution for b in sensor.bands} | {"cloud_mask": 10.0}


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
