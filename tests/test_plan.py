"""The plan of a dataset and the filters of its build: grids, duplicates, clouds, units that cannot be, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from shards.build import BuildError, build, plan
from shards.manifest import select
from shards.plausible import Looks
from shards.sample import Tile
from shards.scene import SceneError
from shards.stream import Share, Stream
from shards.tables import read_table
from shards.verify import registration, verify
from tests.scenes import ORIGIN, make_archive, north_up, shards_config, write_catalog, write_scene

ROWS = [{"place": "p", "sensor": sensor, "href": f"{sensor}.tif"} for sensor in ("s2-l2a", "s1")]


def config(root: Path, *overrides: str) -> Any:
    return shards_config(root, root / "data", "label=null", *overrides)


def facts(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "data/dataset.json").read_text()))


def test_shards_are_the_windows_of_all_views_in_order(tmp_path: Path) -> None:
    make_archive(tmp_path, places=5)
    planned = plan(config(tmp_path, "samples_per_shard=7"))
    assert (planned.items, planned.shards) == (45, 7)
    keys = [item.key for index in range(planned.shards) for item in planned.shard(index)]
    assert keys == [f"place{p}-{r:05d}-{c:05d}" for p in range(5) for r in (0, 32, 64) for c in (0, 32, 64)]
    assert [len(planned.shard(index)) for index in range(7)] == [7] * 6 + [3]


def test_two_scenes_of_one_moment_show_their_common_ground_once(tmp_path: Path) -> None:
    """Two Sentinel-2 tiles of one datatake overlap by 64 of 96 pixels; a third is of another day."""
    rows = []
    times = {"a": "2023-06-01T10:00:00", "b": "2023-06-01T10:00:15", "c": "2023-06-11T10:00:00"}
    for name, time in times.items():
        east = 0 if name == "a" else 320
        write_scene(tmp_path / f"{name}.tif", "s2-l2a", transform=north_up(10.0, ORIGIN[0] + east))
        rows.append({"place": name, "sensor": "s2-l2a", "href": f"{name}.tif", "time": time})
    write_catalog(tmp_path, rows)
    build(config(tmp_path, "sensors=[s2-l2a]"))
    keys = select(str(tmp_path / "data")).rows(["key"])["key"].to_pylist()
    assert [sum(key.startswith(name) for key in keys) for name in "abc"] == [9, 3, 9]
    assert {key for key in keys if key.startswith("b")} == {f"b-{row:05d}-00064" for row in (0, 32, 64)}
    assert facts(tmp_path)["left_out"] == {"shown by another scene of the same time": 6}
    assert verify(str(tmp_path / "data")) == []


def test_names_that_would_share_keys_are_refused(tmp_path: Path) -> None:
    rows = make_archive(tmp_path, places=2, sensors=("s1",))
    for row, place in zip(rows, ("a b", "a:b"), strict=True):
        row["place"] = place
    write_catalog(tmp_path, rows)
    with pytest.raises(BuildError, match=r"1 names stand for several places.*\['a-b'\]"):
        plan(config(tmp_path, "sensors=[s1]"))


def test_a_grid_of_given_metres_in_the_utm_zone(tmp_path: Path) -> None:
    degrees = (1e-4, 0.0, 14.99, 0.0, -1e-4, 47.86)
    write_scene(tmp_path / "s2-l2a.tif", "s2-l2a", 200, transform=degrees, crs="EPSG:4326")
    write_scene(tmp_path / "s1.tif", "s1", 300, transform=degrees, crs="EPSG:4326")
    write_catalog(tmp_path, ROWS)
    build(config(tmp_path, "tile.metres=10"))
    selection = select(str(tmp_path / "data"))
    assert set(selection.rows(["crs"])["crs"].to_pylist()) == {"EPSG:32633"}
    assert selection.contract.resolution == 10.0
    corners = np.array(selection.rows(["transform"])["transform"].to_pylist())
    assert (corners[:, [0, 4]] == [10, -10]).all() and (corners[:, [2, 5]] % 10 == 0).all()


def test_without_crs_only_equal_sizes_fit(tmp_path: Path) -> None:
    from shards.plan import _views
    from shards.scene import Asset, Place, Scene

    for sensor, size in (("s2-l2a", 96), ("s1", 48)):
        write_scene(tmp_path / f"{sensor}.tif", sensor, size, crs=None, transform=(1, 0, 0, 0, 1, 0))
    scenes = tuple(Scene(sensor, (Asset(str(tmp_path / f"{sensor}.tif")),)) for sensor in ("s2-l2a", "s1"))
    with pytest.raises(
        SceneError, match="48 x 48 pixels with CRS None beside .* with 96 x 96.*only files of equal size"
    ):
        list(_views(Place("p", scenes, coregistered=True), config(tmp_path)))


def test_cloudy_tiles_are_left_out_and_counted(tmp_path: Path) -> None:
    write_scene(tmp_path / "s2-l2a.tif", "s2-l2a")
    write_scene(tmp_path / "s1.tif", "s1")
    codes = np.full((1, 48, 48), 4, np.uint8)
    codes[:, :16], codes[:, 16:32, :8] = 9, 10  # a third under cloud; in the next third half of its first tile
    write_scene(tmp_path / "scl.tif", "label", values=codes, transform=north_up(20.0))
    write_catalog(tmp_path, [*ROWS, {"place": "p", "sensor": "s2-l2a", "href": "scl.tif", "band": "SCL"}])
    build(config(tmp_path, "tile.max_cloud=0.3"))
    assert facts(tmp_path)["left_out"] == {"cloud over 0.3": 4}
    assert set(select(str(tmp_path / "data")).rows(["cloud"])["cloud"].to_pylist()) == {0.0}
    build(shards_config(tmp_path, tmp_path / "all", "label=null"))
    assert sorted(select(str(tmp_path / "all")).rows(["cloud"])["cloud"].to_pylist()) == [0, 0, 0, 0, 0, 0.5, 1, 1, 1]


WRONG = {
    "linear as dB": ("s1", np.full((2, 96, 96), 0.02, np.float32), "backscatter on a linear scale.*quantity=power"),
    "0 to 1": ("s2-l2a", np.full((12, 96, 96), 0.2, np.float32), "as reflectance from 0 to 1 does.*write scale=10000"),
}


@pytest.mark.parametrize("what", WRONG)
def test_units_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, what: str) -> None:
    sensor, values, message = WRONG[what]
    for other in ("s2-l2a", "s1"):
        write_scene(tmp_path / f"{other}.tif", other)
    write_scene(tmp_path / f"{sensor}.tif", sensor, values=values)
    write_catalog(tmp_path, ROWS)
    with pytest.raises(SceneError, match=rf"{sensor}.tif: .*{message}"):
        build(config(tmp_path))
    assert not list((tmp_path / "data").glob("*.tar"))


def test_an_offset_taken_off_twice_is_noticed() -> None:
    values = np.zeros((12, 50, 50), np.uint16)
    values[:, :20] = 700
    looks = Looks("s2-l2a")
    looks.add(Tile(values, np.ones((50, 50), np.bool_)))
    assert "60% of the pixels are black in every band" in looks.suspicion()
    looks.add(Tile(np.full((12, 500, 500), 700, np.uint16), np.ones((500, 500), np.bool_)))
    assert looks.suspicion() == ""


def test_splits_of_the_config_are_in_the_manifest_and_in_the_fingerprint(tmp_path: Path) -> None:
    make_archive(tmp_path, places=3, sensors=("s1",))
    raw = configs.to_dict(config(tmp_path, "sensors=[s1]"))
    split = {"by": "group", "fractions": {"train": 0.6, "val": 0.4}}
    fingerprints = set()
    for seed in range(4):
        build(configs.parse({**raw, "split": {**split, "seed": seed}}))  # shards stay; only the manifest is new
        rows = select(str(tmp_path / "data")).rows(["group", "split"])
        by_group = {
            (group, split) for group, split in zip(rows["group"].to_pylist(), rows["split"].to_pylist(), strict=True)
        }
        assert len(by_group) == 3 and {split for _, split in by_group} == {"train", "val"}
        assert facts(tmp_path)["split"]["samples"] == {"train": 18, "val": 9, "buffer": 0}
        fingerprints.add(facts(tmp_path)["fingerprint"])
    assert len(fingerprints) > 1


def test_the_contract_says_where_data_come_from_and_what_was_done(tmp_path: Path) -> None:
    write_scene(tmp_path / "s2-l2a.tif", "s2-l2a")
    write_scene(tmp_path / "s1.tif", "s1", values=np.full((2, 96, 96), 0.02, np.float32))
    rows = [dict(row) for row in ROWS]
    rows[1]["quantity"] = "power"
    write_catalog(tmp_path, rows)
    build(config(tmp_path, "archive.licence=CC-BY-4.0", "archive.attribution=Somebody"))
    contract = select(str(tmp_path / "data")).contract
    assert contract.modality("s1").note == "dB of power" and contract.modality("s2-l2a").note == ""
    archive = facts(tmp_path)["archive"]
    assert (archive["licence"], archive["attribution"]) == ("CC-BY-4.0", "Somebody")
    sample = next(iter(Stream(select(str(tmp_path / "data")), 0, 1, Share(1))))[0]
    assert sample.tiles["s1"].values == pytest.approx(10 * np.log10(0.02), abs=1e-4)


def test_planted_shifts_are_measured_reported_and_filtered(tmp_path: Path) -> None:
    """One scene shows edges at random places; in the second place radar lies 3 rows down and 2 columns left of them."""
    rng = np.random.default_rng(1)
    rows = []
    for place, (down, right) in {"right": (0, 0), "off": (3, -2)}.items():
        fields = np.kron(rng.integers(0, 2, (24, 24)), np.ones((8, 8))).astype(np.float32)
        optical = np.broadcast_to(800 + 2000 * fields, (12, 192, 192)).astype(np.uint16)
        radar = np.broadcast_to(np.roll(-8 - 8 * fields, (down, right), (0, 1)), (2, 192, 192)).astype(np.float32)
        write_scene(tmp_path / f"{place}/s2.tif", "s2-l2a", values=optical)
        write_scene(tmp_path / f"{place}/s1.tif", "s1", values=radar + rng.normal(0, 1, radar.shape).astype(np.float32))
        rows += [{"place": place, "sensor": s, "href": f"{place}/{s[:2]}.tif"} for s in ("s2-l2a", "s1")]
    write_catalog(tmp_path, rows)
    build(config(tmp_path, "tile.size=96"))
    table = select(str(tmp_path / "data")).parts[0].store.get("manifest.parquet")
    for row in read_table(table).to_pylist():
        assert row["shift"]["s1"] == pytest.approx((3, -2) if row["key"].startswith("off") else (0, 0), abs=0.2)
    (line,) = registration(str(tmp_path / "data"))
    assert "s1 against s2-l2a: shift measured in 8 of 8 samples" in line and "4 over 2 px, 0 over 4 px" in line
    build(shards_config(tmp_path, tmp_path / "near", "label=null", "tile.size=96", "tile.max_shift=2"))
    left_out = json.loads((tmp_path / "near/dataset.json").read_text())["left_out"]
    assert left_out == {"s1 lies more than 2 px off": 4}
