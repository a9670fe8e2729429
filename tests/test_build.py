from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest

import configs
from shards.archives import ArchiveError
from shards.build import BuildError, build, merge, plan
from shards.contract import ContractError
from shards.manifest import ManifestError, select
from shards.scene import SceneError
from shards.stream import Share, Stream, StreamError
from shards.verify import verify
from tests.scenes import make_archive, north_up, shards_config, write_catalog, write_scene


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    make_archive(root / "archive")
    build(shards_config(root / "archive", root / "data"))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_samples_hold_the_pixels_of_their_scenes(dataset: Path) -> None:
    import rasterio

    stream = Stream(select(str(dataset / "data")), 0, 4, Share(1))
    sample = stream.at("place1-00032-00064")
    for sensor in ("s2-l2a", "s1"):
        with rasterio.open(dataset / f"archive/place1/{sensor}.tif") as raster:
            np.testing.assert_array_equal(sample.tiles[sensor].values, raster.read()[:, 32:64, 64:96])
        assert sample.tiles[sensor].valid.all()
    assert sample.label is not None and set(np.unique(sample.label)) <= {0, 1, 2}


def test_dataset_is_sound_and_says_what_it_is(dataset: Path) -> None:
    assert verify(str(dataset / "data")) == []
    facts = json.loads((dataset / "data/dataset.json").read_text())
    assert facts["samples"] == facts["planned"] == 27 and facts["left_out"] == {} and facts["skipped"] == []
    assert facts["contract"]["resolution"] == 10.0
    mean = facts["contract"]["modalities"][1]["mean"]
    assert mean == pytest.approx([-12, -12], abs=0.1)


def test_manifest_is_geoparquet_with_footprints_where_the_tiles_are(dataset: Path) -> None:
    frame = geopandas.read_parquet(dataset / "data/manifest.parquet")
    assert frame.crs == "OGC:CRS84"
    row = frame[frame.key == "place2-00000-00032"].iloc[0]
    centre = geopandas.GeoSeries([row.geometry], crs=frame.crs).to_crs("EPSG:32633").iloc[0].centroid
    assert (centre.x, centre.y) == pytest.approx((510000 + 480, 5300000 - 160), abs=0.5)
    assert row.split == "test" and row.group == "place2" and list(row.classes) == [0, 1, 2]


@pytest.mark.parametrize("how", ["workers", "parts"])
def test_any_number_of_workers_and_parts_gives_the_same_bytes(dataset: Path, tmp_path: Path, how: str) -> None:
    archive = dataset / "archive"
    if how == "workers":
        build(shards_config(archive, tmp_path / "data", "workers=2"))
    else:
        for part in ("2/3", "1/3"):
            build(shards_config(archive, tmp_path / "data", f"part={part}"))
        with pytest.raises(BuildError, match="2 shards are not built yet: shard-000002"):
            merge(shards_config(archive, tmp_path / "data"))
        build(shards_config(archive, tmp_path / "data", "part=3/3"))
        merge(shards_config(archive, tmp_path / "data", "part=3/3"))
    assert contents(tmp_path / "data") == contents(dataset / "data")


def test_killed_at_any_moment_and_run_again(dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(shards_config(dataset / "archive", tmp_path / "data")))
    command = [sys.executable, "-m", "launchers.command", "shards", "build", str(config)]
    for number in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("data/shard*"))) < 2 + 3 * number:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "data/dataset.json").exists() or number == 2
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "data") == contents(dataset / "data")


def test_another_plan_in_the_same_folder_is_refused(dataset: Path) -> None:
    with pytest.raises(BuildError, match="holds shard-\\* of another build.*out="):
        build(shards_config(dataset / "archive", dataset / "data", "tile.size=48"))


def broken_archive(root: Path, fault: str) -> None:
    rows = make_archive(root)
    path = root / "place1/s1.tif"
    if fault == "missing band":
        write_scene(
            path, "s1", values=np.ones((1, 96, 96), np.float32), descriptions=["VV"], transform=north_up(10, 505000)
        )
    elif fault == "only NaN":
        write_scene(path, "s1", values=np.full((2, 96, 96), np.nan, np.float32), transform=north_up(10, 505000))
    elif fault == "no overlap":
        write_scene(path, "s1", transform=north_up(10, 900000))
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:20_000])
    elif fault == "no CRS":
        write_scene(path, "s1", crs=None)
    elif fault == "missing file":
        path.unlink()
    elif fault == "strange label":
        values = np.full((1, 96, 96), 77, np.uint8)
        write_scene(root / "place1/label.tif", "label", values=values, transform=north_up(10, 505000))
    elif fault == "missing scene":
        write_catalog(root, [row for row in rows if row["href"] != "place1/s1.tif"])


FAULTS = {
    "missing band": "place1/s1.tif.*missing \\['VH'\\]",
    "only NaN": "place1/s1.tif: holds no valid pixel of s1",
    "no overlap": "place1/s1.tif: does not overlap .*place1/s2-l2a.tif",
    "truncated": "place1/s1.tif: (damaged|not readable)",
    "no CRS": "place1/s1.tif: has no CRS",
    "missing file": "place1/s1.tif: not readable",
    "strange label": "place1/label.tif: label codes \\[77\\]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_named_and_fails_or_is_counted(tmp_path: Path, fault: str) -> None:
    broken_archive(tmp_path / "archive", fault)
    with pytest.raises((BuildError, SceneError), match=FAULTS[fault]):
        build(shards_config(tmp_path / "archive", tmp_path / "data"))
    assert not (tmp_path / "data/dataset.json").exists()
    build(shards_config(tmp_path / "archive", tmp_path / "skipping", "on_error=skip"))
    facts = json.loads((tmp_path / "skipping/dataset.json").read_text())
    assert facts["samples"] == 18 and len(facts["skipped"]) == 1 and "place1" in facts["skipped"][0]
    assert verify(str(tmp_path / "skipping")) == []


def test_a_place_without_a_wanted_sensor_is_left_out_and_said(tmp_path: Path) -> None:
    broken_archive(tmp_path / "archive", "missing scene")
    build(shards_config(tmp_path / "archive", tmp_path / "data"))
    facts = json.loads((tmp_path / "data/dataset.json").read_text())
    assert facts["samples"] == 18 and facts["left_out"] == {"no s1 scene": 1}
    assert facts["left_out_examples"] == {"no s1 scene": ["place1"]}
    with pytest.raises(ArchiveError, match="no place with dem; left out: {'no dem scene': 3}"):
        build(shards_config(tmp_path / "archive", tmp_path / "other", "sensors=[dem]"))


def test_the_command_names_the_file_and_exits_non_zero(tmp_path: Path) -> None:
    broken_archive(tmp_path / "archive", "no overlap")
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(shards_config(tmp_path / "archive", tmp_path / "data")))
    command = [sys.executable, "-m", "launchers.command", "shards", "build", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "1 of 3 places cannot be used" in result.stderr and "place1/s1.tif" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_empty_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no table there; .*catalog\.csv"):
        plan(shards_config(tmp_path, tmp_path / "data"))
    with pytest.raises(ArchiveError, match="unknown archive 'sen13ms'; known: catalog"):
        plan(shards_config(tmp_path, tmp_path / "data", "archive.name=sen13ms"))
    write_catalog(tmp_path, [])
    with pytest.raises(ArchiveError, match="holds no rows"):
        plan(shards_config(tmp_path, tmp_path / "data"))


def test_catalog_mistakes_are_gathered(tmp_path: Path) -> None:
    write_catalog(
        tmp_path, [{"place": "a", "sensor": "s9", "href": "x"}, {"place": "b", "sensor": "s1", "time": "noon"}]
    )
    with pytest.raises(ArchiveError, match="row 1: unknown sensor 's9'.*row 2: empty href"):
        plan(shards_config(tmp_path, tmp_path / "data"))


def test_tiles_under_the_valid_fraction_are_left_out_and_counted(tmp_path: Path) -> None:
    make_archive(tmp_path / "archive", places=1)
    values = np.full((2, 96, 96), -12, np.float32)
    values[:, :, :40] = np.nan
    write_scene(tmp_path / "archive/place0/s1.tif", "s1", values=values)
    build(shards_config(tmp_path / "archive", tmp_path / "data"))
    facts = json.loads((tmp_path / "data/dataset.json").read_text())
    assert facts["samples"] == 6 and facts["left_out"] == {"valid fraction of s1 under 0.5": 3}
    rows = pq.read_table(tmp_path / "data/manifest.parquet").to_pylist()
    assert {row["valid"]["s1"] for row in rows} == {0.75, 1.0}


def test_a_shard_without_survivors_is_finished_all_the_same(tmp_path: Path) -> None:
    make_archive(tmp_path / "archive", places=2)
    write_scene(tmp_path / "archive/place0/s1.tif", "s1", transform=north_up(10, 500000 - 900))
    build(shards_config(tmp_path / "archive", tmp_path / "data", "samples_per_shard=9"))
    assert (tmp_path / "data/shard-000000.parquet").exists() and not (tmp_path / "data/shard-000000.tar").exists()
    assert len(select(str(tmp_path / "data"))) == 9


def test_selection(dataset: Path) -> None:
    data = str(dataset / "data")
    train = select(data, modalities=["s1"], where={"split": ["train"]})
    assert len(train) == 18 and train.contract.sensors == ("s1",)
    few = select(data, where={"split": ["train"], "labelled": [True]}, limit=4, seed=1)
    assert len(few) == 4 and few.row_of_key != select(data, where={"split": ["train"]}, limit=4, seed=2).row_of_key
    prints = [select(data).fingerprint, train.fingerprint, few.fingerprint]
    assert len(set(prints)) == 3 and select(data).fingerprint == prints[0]
    with pytest.raises(ManifestError, match="no sample fits.*18 of split 'train'"):
        select(data, where={"split": ["tarin"]})
    with pytest.raises(ManifestError, match=r"where\.colour: unknown column; allowed: group"):
        select(data, where={"colour": ["red"]})
    with pytest.raises(ManifestError, match="not a dataset.*mcf shards build"):
        select(str(dataset / "archive"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_the_same_sequence_from_any_position(dataset: Path, ranks: int) -> None:
    selection = select(str(dataset / "data"))
    whole = Stream(selection, 3, 4, Share(4))
    expected = [selection.row(whole.order.sample(p)).key for p in range(60)]
    found: dict[int, str] = {}
    for rank in range(ranks):
        stream = iter(Stream(selection, 3, 4, Share(4, ranks, rank), position=8))
        found |= {p: sample.key for sample, p in (next(stream) for _ in range(52 // ranks))}
    assert [found[p] for p in sorted(found)] == expected[8:60] and min(found) == 8


def test_a_position_inside_a_batch_is_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match="position 3 is not a multiple of the global batch 4"):
        Stream(select(str(dataset / "data")), 0, 4, Share(4), position=3)


def test_once_gives_every_sample_once_over_the_ranks(dataset: Path) -> None:
    selection = select(str(dataset / "data"))
    keys = [s.key for rank in range(2) for s, _ in Stream(selection, 0, 4, Share(2, 2, rank)).once()]
    assert sorted(keys) == sorted(selection.row_of_key)


@pytest.mark.parametrize("damage", ["altered", "truncated", "removed"])
def test_a_damaged_shard_is_found_by_reading_and_by_verify(dataset: Path, tmp_path: Path, damage: str) -> None:
    for name, data in contents(dataset / "data").items():
        (tmp_path / name).write_bytes(data)
    tar = tmp_path / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.unlink()
    if damage != "removed":
        tar.write_bytes(data if damage == "altered" else data[:4000])
    stream = iter(Stream(select(str(tmp_path)), 0, 4, Share(1)))
    with pytest.raises((StreamError, OSError), match=r"shard-000002\.tar"):
        for _ in range(27):
            next(stream)
    assert any("shard-000002.tar" in problem for problem in verify(str(tmp_path)))


def test_statistics_that_are_not_those_of_the_samples_are_found(dataset: Path, tmp_path: Path) -> None:
    for name, data in contents(dataset / "data").items():
        (tmp_path / name).write_bytes(data)
    facts = json.loads((tmp_path / "dataset.json").read_text())
    facts["statistics"]["s1"]["mean"][1] += 0.01
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert verify(str(tmp_path)) == ["dataset.json: statistics of s1 are not those of its samples"]


def test_listing_is_what_the_stream_gives(dataset: Path) -> None:
    from shards.listing import listing

    data = str(dataset / "data")
    lines = list(
        listing(data, {"global_batch": "4", "seed": "3", "step": "2", "steps": "2", "world": "2", "lanes": "4"})
    )
    for rank in (0, 1):
        stream = iter(Stream(select(data), 3, 4, Share(4, 2, rank), position=8))
        for step in (2, 3):
            (line,) = [line for line in lines if (line["step"], line["rank"]) == (step, rank)]
            assert line["keys"] == [next(stream)[0].key for _ in range(2)]
    with pytest.raises(ManifestError, match="unknown setting 'glob'"):
        list(listing(data, {"glob": "4"}))


def test_another_build_adds_its_samples_and_touches_no_shard(tmp_path: Path) -> None:
    """Three places first, two more later: old shards stay as they are, and the union is one dataset."""
    rows = make_archive(tmp_path / "archive", places=5)
    write_catalog(tmp_path / "archive", rows[:9])
    build(shards_config(tmp_path / "archive", tmp_path / "data"))
    before, first = contents(tmp_path / "data"), select(str(tmp_path / "data"))
    write_catalog(tmp_path / "archive", rows[9:])
    with pytest.raises(BuildError, match="add to that dataset under another name="):
        build(shards_config(tmp_path / "archive", tmp_path / "data"))
    build(shards_config(tmp_path / "archive", tmp_path / "data", "name=later"))
    after, second = contents(tmp_path / "data"), select(str(tmp_path / "data"))
    assert {name for name in before if after[name] != before[name]} == {"dataset.json", "manifest.parquet"}
    assert (len(first), len(second)) == (27, 45) and first.fingerprint != second.fingerprint
    assert verify(str(tmp_path / "data")) == []
    facts = json.loads(after["dataset.json"])
    assert {name: entry["planned"] for name, entry in facts["builds"].items()} == {"shard": 27, "later": 18}
    assert facts["statistics"]["s1"]["count"] == 45 * 32 * 32 and facts["planned"] == 45
    keys = {sample.key for sample, _ in Stream(second, 0, 4, Share(1)).once()}
    assert len(keys) == 45 and {key[:6] for key in keys} == {f"place{number}" for number in range(5)}


def test_a_build_that_does_not_fit_the_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    for name, data in contents(dataset / "data").items():
        (tmp_path / name).write_bytes(data)
    archive = dataset / "archive"
    with pytest.raises(ContractError, match=r"holds shard \(left\), which build 'b' .*s1 is missing on the right"):
        build(shards_config(archive, tmp_path, "name=b", "sensors=[s2-l2a]"))
    with pytest.raises(BuildError, match=r"27 keys are in another build of this dataset too: \['place0-00000-00000'"):
        build(shards_config(archive, tmp_path, "name=b"))


@pytest.mark.s3
def test_built_to_s3_and_streamed_back(dataset: Path, s3_url: str) -> None:
    build(shards_config(dataset / "archive", f"{s3_url}/data"))
    assert verify(f"{s3_url}/data") == []
    local, remote = select(str(dataset / "data")), select(f"{s3_url}/data")
    assert local.fingerprint == remote.fingerprint
    one, two = (iter(Stream(selection, 1, 4, Share(4))) for selection in (local, remote))
    for _ in range(30):
        (a, p), (b, q) = next(one), next(two)
        assert (a.key, p) == (b.key, q)
        np.testing.assert_array_equal(a.tiles["s1"].values, b.tiles["s1"].values)


@pytest.mark.s3
def test_s3_mistakes_are_explained(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.store import StoreError, open_store

    with pytest.raises(StoreError, match="not found"):
        open_store(s3_url).get("absent")
    assert not open_store(s3_url).exists("absent")
    with pytest.raises(StoreError, match="NoSuchBucket.*check the bucket"):
        open_store("s3://no-such-bucket-here").get("a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="access denied.*AWS_SECRET_ACCESS_KEY") as caught:
        open_store(s3_url).get("absent")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] + " " not in str(caught.value)


def test_a_damaged_dataset_json_is_told_in_a_line(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "data", tmp_path / "data")
    (tmp_path / "data/dataset.json").write_text('{"format')
    with pytest.raises(ManifestError, match=r"dataset\.json is damaged .*restore it"):
        select(str(tmp_path / "data"))
