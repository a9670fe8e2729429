from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from shapely.geometry import box

from shards.config import Split
from shards.raster_io import transform_points
from shards.splits import SplitError, assign
from tests.footprints import ring

HALVES = {"train": 0.5, "test": 0.5}
MADRID, ZONE_60 = "EPSG:32630", "EPSG:32660"


def local(lon: float, lat: float) -> str:
    """A plane around a point in which distances near it are true."""
    return f"+proj=aeqd +lat_0={lat} +lon_0={lon} +datum=WGS84 +units=m"


def table(
    crs: str | None, squares: list[tuple[float, float, float]], groups: list[str], splits: list[str] | None = None
) -> pa.Table:
    """Rows of a manifest: squares given by (x, y, side) in `crs`."""
    geometry = [ring(crs, x, y, side).wkb if crs else None for x, y, side in squares]
    return pa.table(
        {
            "key": [f"tile-{number}" for number in range(len(squares))],
            "group": groups,
            "split": splits or [""] * len(squares),
            "geometry": pa.array(geometry, pa.binary()),
        }
    )


def block(count: int, side: float = 1000.0, x: float = 400_000.0, y: float = 4_400_000.0) -> list[Any]:
    """count x count squares side by side."""
    return [(x + side * col, y + side * row, side) for row in range(count) for col in range(count)]


def by_split(rows: pa.Table) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate(rows["split"].to_pylist()):
        found.setdefault(name, []).append(number)
    return found


def nearest(squares: list[Any], some: list[int], others: list[int]) -> np.ndarray[Any, Any]:
    """For each of `some`, metres to the nearest of `others`, in the plane of the squares."""
    shapes = np.array([box(x, y, x + s, y + s) for x, y, s in squares], object)
    if not others:
        return np.full(len(some), np.inf)
    return np.asarray(shapely.distance(shapes[some][:, None], shapes[others][None]).min(axis=1))


# With the metres by which an edge that is straight in degrees may bend there.
PLACES = [
    ((5.0, 52.0), 0.1), ((-70.0, -33.0), 0.1), ((179.99, -17.0), 0.1), ((-179.9, 68.0), 0.5), ((20.0, 88.5), 0.5),
    ((0.0, 90.0), np.inf), ((100.0, -89.9), 15.0),
]  # fmt: skip
TILES = st.tuples(
    st.integers(-12_000, 12_000), st.integers(-12_000, 12_000), st.sampled_from([100, 640, 2560]), st.integers(0, 7)
)


@settings(max_examples=100)
@given(
    place=st.sampled_from(PLACES),
    tiles=st.lists(TILES, min_size=6, max_size=25),
    by=st.sampled_from(["group", "block"]),
    buffer=st.sampled_from([0.0, 30.0, 1000.0, 4000.0]),
    seed=st.integers(0, 3),
)
def test_no_tile_lies_within_the_buffer_of_another_split(
    place: Any, tiles: list[Any], by: Any, buffer: float, seed: int
) -> None:
    (lon, lat), bend = place
    squares = [(x + 0.5, y + 0.5, side) for x, y, side, _ in tiles]
    rows = table(local(lon, lat), squares, [f"g{group}" for *_, group in tiles])
    try:
        rows, report = assign(rows, Split(by=by, fractions=HALVES, buffer_m=buffer, block_km=3, seed=seed))
    except SplitError:
        return  # too few groups, or nothing left of one split; both have their own tests
    found = by_split(rows)
    assert set(found) <= {"train", "test", "buffer"}
    assert nearest(squares, found["train"], found["test"]).min() >= max(buffer, 0.001)
    # ... and nothing went that did not have to, but for the margin.
    gone = nearest(squares, found.get("buffer", []), found["test"])
    assert (gone <= buffer * 1.002 + 1.5 + 2 * bend).all()
    assert report["samples"] == {name: len(found.get(name, [])) for name in ("train", "test", "buffer")}


def test_three_splits_keep_apart_and_the_larger_one_gives_way() -> None:
    squares = block(30)
    rows, report = assign(table(MADRID, squares, [""] * 900), Split(by="block", block_km=5, buffer_m=900, seed=3))
    found = by_split(rows)
    for name, others in {"train": ["val", "test"], "val": ["test"]}.items():
        rest = [number for other in others for number in found[other]]
        assert nearest(squares, found[name], rest).min() >= 900
    assert report["moved"]["train"] > 0 and report["moved"]["test"] == 0
    assert report["samples"] == {**{name: len(found[name]) for name in found}}
    assert sum(report["samples"].values()) == 900


def test_a_tile_goes_only_for_one_that_stays() -> None:
    # test at 0, val at 1 (goes for test's sake), train at 2: train touches only the val tile that is gone.
    squares = [(1000.0 * i + 400_000, 4_400_000.0, 1000.0) for i in (0, 1, 2, 30, 31, 60, 61, 62)]
    own = ["test", "val", "train", "val", "val", "train", "train", "train"]
    rows, report = assign(table(MADRID, squares, ["g"] * 8, own), Split(by="archive"))
    assert rows["split"].to_pylist() == ["test", "buffer", "train", "val", "val", "train", "train", "train"]
    assert report["moved"] == {"train": 0, "val": 1, "test": 0}


@pytest.mark.parametrize("buffer", [0.0, 500.0, 2500.0])
def test_the_date_line_is_no_border(buffer: float) -> None:
    # A row of squares of 2 km over the line: in degrees, the two sides are a world apart.
    squares = [(x, -1000.0, 2000.0) for x in np.arange(-10_000.0, 10_000.0, 2000.0)]
    splits = ["train"] * 5 + ["test"] * 5
    given_rows = table(local(180.0, -17.0), squares, ["g"] * 10, splits)
    geometry = shapely.from_wkb(given_rows["geometry"].to_pylist())
    assert shapely.bounds(geometry)[:5, 0].min() > 179 and shapely.bounds(geometry)[5:, 2].max() < -179
    rows, _ = assign(given_rows, Split(by="archive", buffer_m=buffer))
    gone = 1 if buffer < 2000 else 2
    assert rows["split"].to_pylist() == ["train"] * (5 - gone) + ["buffer"] * gone + ["test"] * 5


def test_a_tile_over_the_date_line_is_cut_and_counts_as_one() -> None:
    squares = [(x + 30.0, 0.0, 1000.0) for x in (-500, 700, -1600, 9000)]
    rows = table(local(180.0, 40.0), squares, ["g"] * 4, ["test", "train", "train", "train"])
    assert shapely.from_wkb(rows["geometry"][0].as_py()).geom_type == "MultiPolygon"
    found, _ = assign(rows, Split(by="archive", buffer_m=300))
    assert found["split"].to_pylist() == ["test", "buffer", "buffer", "train"]


def test_tiles_of_two_utm_zones_meet() -> None:
    # The same square of ground, cut once from the grid of zone 30 and once from that of zone 31.
    x, y = transform_points("OGC:CRS84", MADRID, np.array([0.0]), np.array([52.0]))
    u, v = transform_points("OGC:CRS84", "EPSG:32631", np.array([0.0]), np.array([52.0]))
    west = table(MADRID, [(x[0] - 3000, y[0], 2000.0), (x[0] - 900, y[0], 1000.0)], ["g"] * 2, ["train"] * 2)
    east = table("EPSG:32631", [(u[0], v[0], 1000.0)], ["g"], ["test"])
    rows, _ = assign(pa.concat_tables([west, east]), Split(by="archive"))
    assert rows["split"].to_pylist() == ["train", "buffer", "test"]


def test_touching_counts_and_a_clear_gap_does_not() -> None:
    squares = [(400_000.0, 4_400_000.0, 1000.0), (401_000.0, 4_400_000.0, 1000.0), (399_000.0 - 5, 4_400_000.0, 1000.0)]
    rows, _ = assign(table(MADRID, squares, ["g"] * 3, ["test", "train", "train"]), Split(by="archive"))
    assert rows["split"].to_pylist() == ["test", "buffer", "train"]


def test_what_a_map_shows_as_nearer_than_the_buffer_is_nearer() -> None:
    # UTM shows 1000 m of ground in the middle of a zone as 999.6 m.
    squares = [(500_000.0, 4_400_000.0, 1000.0), (501_999.7, 4_400_000.0, 1000.0), (497_990.0, 4_400_000.0, 1000.0)]
    own = ["test", "train", "train"]
    rows, _ = assign(table(MADRID, squares, ["g"] * 3, own), Split(by="archive", buffer_m=1000))
    assert rows["split"].to_pylist() == ["test", "buffer", "train"]


def test_one_place_at_many_dates_in_two_groups_is_found() -> None:
    squares = [(400_000.0, 4_400_000.0, 1000.0)] * 3 + [(450_000.0, 4_400_000.0, 1000.0)]
    rows, _ = assign(table(MADRID, squares, ["g"] * 4, ["train", "train", "test", "train"]), Split(by="archive"))
    assert rows["split"].to_pylist() == ["buffer", "buffer", "test", "train"]


def test_groups_stay_whole_and_shares_are_met() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, 80)
    groups = [f"city-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    squares = [
        (300_000.0 + 5000 * (hash_ // 80), 4_000_000.0 + 5000 * (hash_ % 80), 100.0)
        for hash_ in [int(group.split("-")[1]) for group in groups]
    ]
    rows, report = assign(table(MADRID, squares, groups), Split(by="group"))
    sides: dict[str, set[str]] = {}
    for group, name in zip(groups, rows["split"].to_pylist(), strict=True):
        sides.setdefault(group, set()).add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert report["groups"] == dict(Counter(next(iter(names)) for names in sides.values()))
    shares = {name: count / len(groups) for name, count in report["samples"].items()}
    assert shares["train"] == pytest.approx(0.8, abs=0.01) and shares["buffer"] == 0
    assert shares["val"] == pytest.approx(0.1, abs=0.01) and shares["test"] == pytest.approx(0.1, abs=0.01)


def test_few_uneven_groups_leave_no_split_empty() -> None:
    # Dealt badly, one of the two large cities would be the test set.
    sizes = {"a": 1000, "b": 900, "c": 90, "d": 80, "e": 30}
    groups = [name for name, size in sizes.items() for _ in range(size)]
    squares = [(100_000.0 * "abcde".index(group) + 200_000, 4_000_000.0, 100.0) for group in groups]
    for seed in range(4):
        _, report = assign(table(MADRID, squares, groups), Split(by="group", seed=seed))
        assert report["samples"]["train"] >= 1900
        assert report["samples"]["val"] > 0 and report["samples"]["test"] > 0


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    groups = [f"g{number % 25}" for number in range(200)]
    squares = [(300_000.0 + 9000 * (number % 25), 4_000_000.0, 100.0) for number in range(200)]
    rows = table(MADRID, squares, groups)
    first = dict(zip(groups, assign(rows, Split(by="group"))[0]["split"].to_pylist(), strict=True))
    order = np.random.default_rng(1).permutation(200)
    again, _ = assign(rows.take(order), Split(by="group"))
    assert dict(zip(again["group"].to_pylist(), again["split"].to_pylist(), strict=True)) == first
    other = assign(rows, Split(by="group", seed=1))[0]["split"].to_pylist()
    assert dict(zip(groups, other, strict=True)) != first
    assert assign(rows, Split(by="group"))[0].equals(assign(rows, Split(by="group"))[0])


def test_blocks_are_squares_of_equal_ground() -> None:
    squares = block(24, side=500.0)
    rows, report = assign(table(MADRID, squares, [""] * 576), Split(by="block", block_km=3, fractions=HALVES))
    middles = np.array([(x + s / 2, y + s / 2) for x, y, s in squares])
    lon, lat = transform_points(MADRID, "OGC:CRS84", *middles.T)
    x, y = transform_points("OGC:CRS84", "EPSG:6933", lon, lat)
    sides: dict[tuple[int, int], set[str]] = {}
    for col, row, name in zip(x // 3000, y // 3000, rows["split"].to_pylist(), strict=True):
        sides.setdefault((int(col), int(row)), set()).add(name)
    assert all(len(names - {"buffer"}) <= 1 for names in sides.values())
    assert sum(report["groups"].values()) == len(sides)


def test_a_leak_certificate_changes_nothing() -> None:
    squares = block(6)
    own = ["train"] * 18 + ["validation"] * 6 + ["test"] * 12
    rows = table(MADRID, squares, ["g"] * 36, own)
    kept, report = assign(rows, Split(by="archive", enforce=False))
    assert kept.equals(rows)
    # Rows of six: the third touches the fourth (validation), which touches the fifth (test).
    assert report["near"] == {"train": 6, "validation": 6, "test": 6}
    _, wide = assign(rows, Split(by="archive", enforce=False, buffer_m=1500))
    assert wide["near"] == {"train": 12, "validation": 6, "test": 12}
    _, moved = assign(rows, Split(by="archive", buffer_m=0))
    assert moved["moved"] == {"train": 6, "test": 6, "validation": 0}


def test_an_archive_may_leave_samples_without_split() -> None:
    rows = table(MADRID, block(2), ["g"] * 4, ["", "train", "train", ""])
    found, report = assign(rows, Split(by="archive"))
    assert found["split"].to_pylist() == ["", "train", "train", ""]
    assert report["samples"] == {"train": 2, "buffer": 0, "": 2}


def test_samples_without_crs_are_split_by_group_and_reported() -> None:
    rows = table(None, block(4), [f"g{number % 5}" for number in range(16)])
    found, report = assign(rows, Split(by="group", fractions=HALVES))
    assert report["unchecked"] == 16 and set(found["split"].to_pylist()) == {"train", "test"}
    mixed = pa.concat_tables([rows, table(MADRID, block(4), ["g0"] * 8 + ["g1"] * 8)])
    assert assign(mixed, Split(by="group", fractions=HALVES))[1]["unchecked"] == 16
    with pytest.raises(SplitError, match=r"16 samples have no CRS.*split\.by=group"):
        assign(mixed, Split(by="block"))


def test_what_cannot_be_split_is_refused() -> None:
    rows = table(MADRID, block(2), ["a", "a", "b", "b"])
    with pytest.raises(SplitError, match=r"2 groups for the splits train, val, test"):
        assign(rows, Split(by="group"))
    with pytest.raises(SplitError, match=r"all samples of split train lie within 0 m of another"):
        assign(rows, Split(by="group", fractions=HALVES))
    with pytest.raises(SplitError, match=r"no splits of its own"):
        assign(rows, Split(by="archive"))
    with pytest.raises(SplitError, match=r"4 samples have no group"):
        assign(table(MADRID, block(2), [""] * 4), Split(by="group"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fractions": {"train": 0.8, "val": 0.1}}, "sum to 0.9; 1 is expected"),
        ({"fractions": {"train": 0.8, "buffer": 0.2}}, "'buffer' cannot name a split"),
        ({"fractions": {"train": 1.2, "test": -0.2}}, "fractions"),
        ({"buffer_m": -1}, "buffer_m"),
        ({"block_km": 0}, "block_km"),
        ({"by": "place"}, "by"),
    ],
)
def test_configs_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Split(**{"by": "group", **wrong})
