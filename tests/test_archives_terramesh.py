"""TerraMesh: what is found in its tars and its table, and pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from shards.archives import ArchiveError, open_archive
from shards.archives.zarr_groups import Tar
from shards.containers import tar_index
from shards.zarr_zip import NoCodecsError
from tests.archive_checks import one
from tests.benchmark_trees import SIZE, built, found, sensors
from tests.conftest import REAL_DATA
from tests.terramesh_trees import DATES, SEASONS, corner, shard, terramesh, values
from tests.zarr_trees import Stored, write_group, write_tar


@pytest.mark.parametrize("table", [False, True], ids=["groups", "metadata"])
def test_terramesh(tmp_path: Path, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
