from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import zarr_zip
from shards.containers import open_item, tar_index
from shards.grid import Window
from shards.raster import open_raster
from shards.scene import Asset, SceneError
from shards.zarr_zip import Source, ZarrError, open_zarr
from tests.scenes import UTM, north_up, write_scene
from tests.zarr_trees import Stored, write_group, write_tar

RNG = np.random.default_rng(0)
SAMPLES = RNG.integers(1, 5000, (5, 3, 2, 6, 8)).astype(np.int16)  # sample, time, band, y, x
X = 500005.0 + 10 * np.arange(8) + 1000 * np.arange(5)[:, None]
Y = 5299995.0 - 10 * np.arange(6) - 1000 * np.arange(5)[:, None]


def sample_group(path: Path, chunks: tuple[int, ...] | None = None, **options: Any) -> Path:
    arrays = {
        "bands": Stored(SAMPLES, ("sample", "time", "band", "y", "x"), chunks, more=options.pop("more", {})),
        "band": Stored(np.array(["vv", "vh"]), ("band",)),
        "x": Stored(np.arange(8), ("x",)),
        "y": Stored(np.arange(6), ("y",)),
        "x_": Stored(X, ("sample", "x")),
        "y_": Stored(Y, ("sample", "y")),
        "crs": Stored(np.array([32651, 32751, 32601, 32633, 32634]), ("sample",)),
        "cloud_mask": Stored(SAMPLES[:, :, 0].astype(np.uint8), ("sample", "time", "y", "x")),
    }
    return write_group(path, arrays, **options)


def whole(asset: Asset) -> np.ndarray[Any, Any]:
    with open_raster(asset) as raster:
        grid = raster.grid
        return raster.read(range(1, len(raster.names) + 1), Window(0, 0, grid.height, grid.width))


@pytest.mark.parametrize("chunks", [None, (5, 1, 2, 6, 8), (1, 1, 1, 4, 5), (2, 2, 2, 5, 3)])
@pytest.mark.parametrize("consolidated", [True, False])
def test_a_part_of_an_array_whatever_its_chunks(
    tmp_path: Path, chunks: tuple[int, ...] | None, consolidated: bool
) -> None:
    path = sample_group(tmp_path / "a.zarr.zip", chunks, consolidated=consolidated)
    with open_item(Asset(str(path), item="bands/3/1")) as raster:
        assert raster.names == ("vv", "vh") and raster.dtype == np.int16
        assert raster.grid.crs == "EPSG:32633"  # of sample 3, and so is the corner of its first pixel
        assert raster.grid.transform == (10.0, 0.0, X[3, 0] - 5, 0.0, -10.0, Y[3, 0] + 5)
        np.testing.assert_array_equal(raster.read([2, 1], Window(1, 2, 4, 5)), SAMPLES[3, 1][[1, 0], 1:5, 2:7])
        assert raster.mask([1], Window(0, 0, 6, 8)).all()
    mask = whole(Asset(str(path), item="cloud_mask/4/2"))
    np.testing.assert_array_equal(mask, SAMPLES[4, 2, :1].astype(np.uint8))


@pytest.mark.parametrize(
    "more",
    [
        {"compressors": None},
        {"compressors": numcodecs.Zlib(3)},
        {"compressors": numcodecs.Blosc("lz4"), "filters": [numcodecs.Delta("<i2")]},
        {"order": "F"},
        {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
    ],
    ids=["raw", "zlib", "delta", "fortran", "nested"],
)
def test_what_zarr_writes_is_read_back(tmp_path: Path, more: dict[str, Any]) -> None:
    path = sample_group(tmp_path / "a.zarr.zip", (2, 2, 2, 5, 3), more=more)
    np.testing.assert_array_equal(whole(Asset(str(path), item="bands/2/0")), SAMPLES[2, 0])


def test_chunks_that_are_not_there_hold_the_fill_value(tmp_path: Path) -> None:
    values = np.full((4, 6), np.nan, np.float32)
    values[:2] = 7
    path = tmp_path / "a.zarr.zip"
    write_group(path, {"bands": Stored(values, ("y", "x"), (2, 6), more={"fill_value": float("nan")})})
    with zipfile.ZipFile(path) as file:
        assert "bands/1.0" not in file.namelist()
    np.testing.assert_array_equal(whole(Asset(str(path), item="bands")), values[None])


def test_a_chunk_of_many_samples_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample_group(tmp_path / "a.zarr.zip", (5, 1, 2, 6, 8))
    monkeypatch.setattr(zarr_zip, "LARGE", SAMPLES[:, :1].nbytes - 1)
    decoded, real = [], zarr_zip._decoded
    monkeypatch.setattr(zarr_zip, "_decoded", lambda *args: decoded.append(args[1]) or real(*args))
    for sample in range(5):
        np.testing.assert_array_equal(whole(Asset(str(path), item=f"bands/{sample}/1")), SAMPLES[sample, 1])
    assert decoded.count("bands/0.1.0.0.0") == 1
    sample_group(path, (5, 1, 2, 6, 8), more={"fill_value": 1})
    os.utime(path, ns=(1, 1))  # another content under the same path
    whole(Asset(str(path), item="bands/0/1"))
    assert decoded.count("bands/0.1.0.0.0") == 2


def test_half_floats_become_floats_and_grids_may_be_told_in_wkt(tmp_path: Path) -> None:
    values = RNG.normal(-12, 3, (1, 2, 6, 8)).astype(np.float16)
    arrays = {
        "bands": Stored(values, ("time", "band", "y", "x")),
        "x": Stored(X[0], ("x",)),
        "y": Stored(Y[0], ("y",)),
        "spatial_ref": Stored(np.int64(0), (), attrs={"crs_wkt": UTM}),
    }
    path = write_group(tmp_path / "a.zarr.zip", arrays)
    with open_item(Asset(str(path), item="bands/0")) as raster:
        assert raster.dtype == np.float32 and raster.grid.crs == UTM
        assert raster.grid.transform[2] == 500000.0
        np.testing.assert_array_equal(raster.read([1, 2], Window(0, 0, 6, 8)), values[0].astype(np.float32))


def test_without_crs_pixels_are_the_coordinates(tmp_path: Path) -> None:
    path = write_group(tmp_path / "a.zarr.zip", {"bands": Stored(SAMPLES[0, 0], ("band", "y", "x"))})
    with open_item(Asset(str(path), item="bands")) as raster:
        assert raster.grid.crs is None and (raster.grid.height, raster.grid.width) == (6, 8)


@pytest.mark.parametrize("member", ["in/place.tif", "group.zarr.zip:bands/3/1"])
@pytest.mark.parametrize("located", [False, True], ids=["by name", "by offset"])
def test_members_of_a_tar(tmp_path: Path, member: str, located: bool) -> None:
    scene = write_scene(tmp_path / "place.tif", "s2-l2a", size=40)
    group = sample_group(tmp_path / "group.zarr.zip")
    tar = write_tar(tmp_path / "shard.tar", {"in/place.tif": scene, "group.zarr.zip": group})
    name, colon, part = member.partition(":")
    offset, size = tar_index(tar)[name]
    item = f"{name}@{offset}+{size}{colon}{part}" if located else member
    expected = SAMPLES[3, 1] if colon else whole(Asset(str(scene)))
    np.testing.assert_array_equal(whole(Asset(str(tar), item=item)), expected)


def test_a_member_by_offset_needs_no_header(tmp_path: Path) -> None:
    group = sample_group(tmp_path / "group.zarr.zip")
    tar = write_tar(tmp_path / "shard.tar", {"first.txt": Path(__file__), "group.zarr.zip": group})
    offset, size = tar_index(tar)["group.zarr.zip"]
    with tar.open("r+b") as file:  # the header of the member is damaged
        file.seek(offset - 512)
        file.write(b"\xff" * 512)
    np.testing.assert_array_equal(whole(Asset(str(tar), item=f"x@{offset}+{size}:bands/0/0")), SAMPLES[0, 0])


def h5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("sentinel2", data=SAMPLES[:, 0], chunks=(1, 2, 6, 8), compression="gzip")
        file.create_dataset("era5", data=np.zeros((5, 12), np.float32))
    return path


def test_a_row_of_hdf5(tmp_path: Path) -> None:
    path = h5(tmp_path / "a.h5")
    with open_item(Asset(str(path), item="sentinel2/4")) as raster:
        assert raster.grid.crs is None and raster.dtype == np.int16 and len(raster.names) == 2
        np.testing.assert_array_equal(raster.read([1, 2], Window(0, 0, 6, 8)), SAMPLES[4, 0])


def parquet(path: Path, rows_per_group: int) -> list[Path]:
    scenes = [write_scene(path.with_name(f"{i}.tif"), "dem", size=32 + i, nodata=-32768) for i in range(5)]
    cells = [scene.read_bytes() for scene in scenes]
    table = pa.table({"grid_cell": [str(i) for i in range(5)], "DEM": cells, "none": pa.nulls(5, pa.binary())})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return scenes


@pytest.mark.parametrize("rows_per_group", [1, 2, 5])
def test_a_cell_of_parquet(tmp_path: Path, rows_per_group: int) -> None:
    scenes = parquet(tmp_path / "a.parquet", rows_per_group)
    for row, scene in enumerate(scenes):
        asset = Asset(str(tmp_path / "a.parquet"), item=f"{row}:DEM")
        np.testing.assert_array_equal(whole(asset), whole(Asset(str(scene))))
    with open_item(asset) as raster:
        assert raster.nodata == -32768 and raster.grid.crs == UTM and raster.grid.transform == north_up(10.0)


def test_only_the_row_group_and_column_asked_for_is_read(tmp_path: Path) -> None:
    """All bytes of the other rows and columns are overwritten, and the cell is still whole."""
    path, scenes = tmp_path / "a.parquet", parquet(tmp_path / "a.parquet", 1)
    footer = pq.read_metadata(path)
    content = bytearray(path.read_bytes())
    for group in range(footer.num_row_groups):
        for number in range(footer.num_columns):
            column = footer.row_group(group).column(number)
            if (group, column.path_in_schema) != (3, "DEM"):
                start = column.dictionary_page_offset or column.data_page_offset
                content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    np.testing.assert_array_equal(whole(Asset(str(path), item="3:DEM")), whole(Asset(str(scenes[3]))))
    with pytest.raises(SceneError, match="2:DEM"):
        whole(Asset(str(path), item="2:DEM"))


@pytest.mark.parametrize(
    "item, message",
    [
        ("a.zarr.zip|nothing/0", "no array 'nothing'; it has band, bands"),
        ("a.zarr.zip|bands/7/0", "index 7 of dimension 0 is outside"),
        ("a.zarr.zip|bands/one", "write ARRAY/INDEX/INDEX"),
        ("a.zarr.zip|bands/0", "leaves .3, 2, 6, 8., not .band, y, x."),
        ("a.tar|nobody.tif", "no member 'nobody.tif' among 1: .'a.zarr.zip'."),
        ("a.h5|sentinel3/0", "no dataset 'sentinel3'; it has era5, sentinel2"),
        ("a.h5|sentinel2", "write DATASET/ROW"),
        ("a.h5|sentinel2/5", "no .band, y, x. at row 5"),
        ("a.h5|era5/0", "era5 has the shape .5, 12."),
        ("a.parquet|5:DEM", "has 5 rows, so none is number 5"),
        ("a.parquet|0:B04", "no column 'B04'; it has grid_cell, DEM, none"),
        ("a.parquet|DEM", "write ROW:COLUMN"),
        ("a.parquet|0:none", "the cell is empty"),
        ("gone.zarr.zip|bands/0/0", "not readable"),
        ("gone.h5|sentinel2/0", "not readable"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, item: str, message: str) -> None:
    write_tar(tmp_path / "a.tar", {"a.zarr.zip": sample_group(tmp_path / "a.zarr.zip")})
    h5(tmp_path / "a.h5")
    parquet(tmp_path / "a.parquet", 2)
    name, _, part = item.partition("|")
    with pytest.raises(SceneError, match=message) as error:
        whole(Asset(str(tmp_path / name), item=part))
    assert error.value.path.startswith(str(tmp_path / name))


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    path = sample_group(tmp_path / "a.zarr.zip")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("bands/0.0.0.0.0").header_offset + 60
    path.write_bytes(content[:start] + b"\xff" * 200 + content[start + 200 :])
    with (
        open_item(Asset(str(path), item="bands/1/1")) as raster,
        pytest.raises(SceneError, match="damaged: chunk bands/0"),
    ):
        raster.read([1], Window(0, 0, 6, 8))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SceneError, match="damaged: File is not a zip"):
        whole(Asset(str(path), item="bands/1/1"))
    (tmp_path / "a.tar").write_bytes(b"\xff" * 2048)
    with pytest.raises(SceneError, match="uncompressed tar"):
        whole(Asset(str(tmp_path / "a.tar"), item="x.tif"))


def test_other_zips_and_uneven_coordinates_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "3.zarr.zip", "w") as file:
        file.writestr("zarr.json", json.dumps({"zarr_format": 3}))
    with pytest.raises(ZarrError, match="format 3"), open_zarr(Source(str(tmp_path / "3.zarr.zip"))):
        pass
    x = X[0].copy()
    x[3] += 2
    arrays = {
        "bands": Stored(SAMPLES[0, 0], ("band", "y", "x")),
        "x": Stored(x, ("x",)),
        "y": Stored(Y[0], ("y",)),
        "crs": Stored(np.int64(32633), ()),
    }
    path = write_group(tmp_path / "a.zarr.zip", arrays)
    with pytest.raises(SceneError, match="not evenly spaced"):
        whole(Asset(str(path), item="bands"))


def test_containers_are_local(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="local folders only; copy it first"):
        whole(Asset("s3://bucket/shard.tar", item="a.tif"))
