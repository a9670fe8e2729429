from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sample import (
    EXTENSIONS,
    ONLY_IN_MANIFEST,
    Encoding,
    Sample,
    Tile,
    _to_b2nd,
    decode,
    decode_array,
    decode_webdataset,
    encode,
    encode_array,
)  # fmt: skip
from shards.statistics import measure, merge
from shards.store import open_store
from shards.write import write_shard
from tests.small_dataset import make_sample

ENCODINGS: list[Encoding] = ["blosc2-zstd", "blosc2-lz4", "npy", "geotiff"]


@pytest.mark.parametrize("encoding", ["blosc2-zstd", "blosc2-lz4"])
def test_frames_that_are_made_or_read_once_are_those_of_any_other(encoding: Encoding) -> None:
    """Of tiles without holes; and an array that was decoded is the caller's own."""
    for plane in (np.ones((64, 64), bool), np.zeros((64, 64), bool), np.ones((32, 128), bool)):
        data = encode_array(plane, encoding)
        assert data == _to_b2nd(plane, encoding)
        first = decode_array(data, "b2nd")
        first[...] = ~first
        assert np.array_equal(decode_array(data, "b2nd"), plane)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sample_comes_back_as_it_was(encoding: Encoding) -> None:
    sample = make_sample(1)
    again = decode(encode(sample, encoding))
    kept = {name: value for name, value in sample.meta.items() if name not in ONLY_IN_MANIFEST}
    assert (again.key, again.meta) == (sample.key, kept) and len(kept) < len(sample.meta)
    for name, tile in sample.tiles.items():
        np.testing.assert_array_equal(again.tiles[name].values, tile.values)
        np.testing.assert_array_equal(again.tiles[name].valid, tile.valid)
        assert again.tiles[name].values.dtype == tile.values.dtype
    np.testing.assert_array_equal(again.label, sample.label)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(["u1", "u2", "i2", "f4", "f8"]),
)
@settings(max_examples=20)
def test_arrays_of_any_shape_and_type(encoding: Encoding, shape: tuple[int, int, int], dtype: str) -> None:
    values = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    found = decode_array(encode_array(values, encoding), EXTENSIONS[encoding])
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype


def test_only_the_modalities_asked_for_are_decoded() -> None:
    members = encode(make_sample(1), "npy")
    assert list(decode(members, ("dem",)).tiles) == ["dem"]
    with pytest.raises(ValueError, match=r"no modality \['s2'\]; there are"):
        decode(members, ("s2",))


def test_foreign_and_damaged_members_are_named() -> None:
    members = encode(make_sample(1), "blosc2-zstd")
    with pytest.raises(ValueError, match=r"no \.json"):
        decode({name: data for name, data in members.items() if not name.endswith("json")})
    with pytest.raises(ValueError, match="not a readable b2nd"):
        decode_array(b"abc", "b2nd")
    with pytest.raises(ValueError, match="arrays end in"):
        decode_array(b"abc", "png")
    with pytest.raises(ValueError, match=r"not a readable GeoTIFF \(3 bytes\)"):
        decode_array(b"abc", "tif")


def test_bad_keys_and_unequal_sizes_are_refused() -> None:
    tile = Tile(np.zeros((1, 4, 4)), np.ones((4, 4), bool))
    with pytest.raises(ValueError, match=r"'a\.b'"):
        Sample("a.b", {"s1": tile})
    with pytest.raises(ValueError, match="one H x W"):
        Sample("a", {"s1": tile, "dem": Tile(np.zeros((1, 5, 5)), np.ones((5, 5), bool))})


def test_the_same_samples_give_the_same_bytes_and_a_plain_tar(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    samples = [make_sample(i) for i in range(4)]
    records = [write_shard(samples, store, name, "blosc2-zstd") for name in ("a", "b")]
    assert store.get("a.tar") == store.get("b.tar")
    assert records[0].sha256 == hashlib.sha256(store.get("a.tar")).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(store.get("a.tar"))) as tar:
        for row in records[0].rows:
            for member in row["members"]:
                file = tar.extractfile(member["name"])
                assert file is not None
                start = member["offset"]
                assert file.read() == store.get("a.tar")[start : start + member["bytes"]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_webdataset_with_our_decoder_gives_our_samples(tmp_path: Path, encoding: Encoding) -> None:
    write_shard([make_sample(i) for i in range(3)], open_store(tmp_path), "shard-000000", encoding)
    tar = str(tmp_path / "shard-000000.tar")
    found = list(webdataset.WebDataset(tar, shardshuffle=False).map(decode_webdataset))
    assert [sample.key for sample in found] == [make_sample(i).key for i in range(3)]
    for number, sample in enumerate(found):
        for name, tile in make_sample(number).tiles.items():
            np.testing.assert_array_equal(sample.tiles[name].values, tile.values)
            np.testing.assert_array_equal(sample.tiles[name].valid, tile.valid)


def test_geotiff_members_say_where_they_lie(tmp_path: Path) -> None:
    sample = make_sample(1)
    grid = {"crs": "EPSG:32633", "transform": [10.0, 0.0, 500000.0, 0.0, -10.0, 5300000.0]}
    members = encode(Sample(sample.key, sample.tiles, sample.label, grid), "geotiff")
    with rasterio.MemoryFile(members[f"{sample.key}.s1.tif"]) as memory, memory.open() as raster:
        assert raster.crs.to_epsg() == 32633 and list(raster.transform)[:6] == grid["transform"]
        np.testing.assert_array_equal(raster.read(), sample.tiles["s1"].values)


def test_webdataset_reads_the_tar(tmp_path: Path) -> None:
    write_shard([make_sample(i) for i in range(3)], open_store(tmp_path), "shard-000000", "npy")
    found = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode())
    assert [item["__key__"] for item in found] == [make_sample(i).key for i in range(3)]
    np.testing.assert_array_equal(found[1]["s1.npy"], make_sample(1).tiles["s1"].values)


def test_streamed_statistics_equal_those_of_all_pixels_together() -> None:
    samples = [make_sample(i) for i in range(5)]
    total: dict[str, object] = {}
    for sample in samples:
        total = merge(total, measure(sample))  # type: ignore[arg-type, assignment]
    pixels = np.concatenate([s.tiles["s1"].values[:, s.tiles["s1"].valid] for s in samples], axis=1).clip(-25, 0)
    found = total["s1"]
    assert found.count == pixels.shape[1]  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.mean, pixels.mean(1, dtype=np.float64), rtol=1e-9)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.std, pixels.std(1, dtype=np.float64), rtol=1e-9)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.percentile(0.5, (-25, 0)), np.median(pixels, 1), atol=0.1)  # type: ignore[attr-defined]


def test_a_percentile_lies_inside_its_bin_and_inside_the_values() -> None:
    """Dark bands of reflectance lie in one bin of 39: its edge would be above their mean."""
    values = np.linspace(10, 20, 1024, dtype=np.float32).reshape(1, 32, 32)
    tile = Tile(np.repeat(values, 12, 0), np.ones((32, 32), bool))
    found = measure(Sample("dark", {"s2-l2a": tile}))["s2-l2a"]
    low, middle, high = (found.percentile(share, (0, 10_000))[0] for share in (0.02, 0.4, 1.0))
    assert (low, high) == (10, 20) and middle == pytest.approx(0.4 * 10_000 / 256)
