from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box

from shards.duplicates import Outline, duplicates
from shards.raster_io import transform_points
from tests.footprints import ring

NOON = datetime(2020, 6, 1, 12, tzinfo=UTC)


def later(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def scene(x: float, y: float, width: int, height: int, time: datetime | None = NOON, step: int = 1) -> Outline:
    """A scene in degrees, cut into windows of 0.02 degrees each `step` hundredths; like a plan's, some reach over."""

    def windows() -> list[Any]:
        corners = [(x + i / 100, y + j / 100) for j in range(0, height, step) for i in range(0, width, step)]
        return [box(a, b, a + 0.02, b + 0.02) for a, b in corners]

    return Outline(box(x, y, x + width / 100, y + height / 100), time, windows)


def untouchable(outline: Outline) -> Outline:
    def windows() -> Any:
        raise AssertionError("windows of a view without a duplicate were made")

    return Outline(outline.footprint, outline.time, windows)


def test_a_scene_listed_twice_or_thrice_is_kept_once() -> None:
    views = [scene(10, 50, 8, 8, step=2), scene(10, 50, 8, 8, step=2), scene(10, 50, 8, 8, step=2)]
    assert duplicates(views) == {1: list(range(16)), 2: list(range(16))}


def test_windows_of_the_overlap_go_where_at_least_half_is_shown() -> None:
    # The second scene begins 3 hundredths before the first one ends: its windows begin at 0.05, 0.07, 0.09, ...
    views = [scene(10, 50, 8, 2, step=2), scene(10.05, 50, 8, 2, step=2)]
    # 0.05-0.07 is covered, of 0.07-0.09 one half, of 0.09-0.11 nothing.
    assert duplicates(views) == {1: [0, 1]}
    assert duplicates(views, covered=0.51) == {1: [0]}
    assert duplicates(views[::-1]) == {1: [2, 3]}  # 0.06-0.08 lies under the other; of 0.04-0.06 one half
    assert duplicates([views[0], scene(10.06, 50, 8, 2, step=2)]) == {1: [0]}


@pytest.mark.parametrize(("seconds", "found"), [(0, True), (60, True), (-60, True), (61, False), (86_400, False)])
def test_only_scenes_of_one_time_show_the_same(seconds: float, found: bool) -> None:
    views = [scene(10, 50, 4, 4, later(seconds)), scene(10, 50, 4, 4)]
    assert bool(duplicates(views)) is found


def test_nearness_in_time_is_between_two_views_and_not_along_a_chain() -> None:
    a, b, c = (scene(10, 50, 2, 2, later(seconds), step=2) for seconds in (0, 50, 100))
    assert duplicates([a, b, c]) == {1: [0]}  # c is 100 s from a, and b is gone
    assert duplicates([b, a, c]) == {1: [0], 2: [0]}


def test_unknown_times_and_places_are_never_compared() -> None:
    known, timeless = scene(10, 50, 4, 4), scene(10, 50, 4, 4, time=None)
    placeless = Outline(None, NOON, known.windows)
    assert duplicates([known, timeless, timeless, placeless, placeless]) == {}
    assert duplicates([]) == {}


def test_only_scenes_that_overlap_cost_anything() -> None:
    views = [
        scene(10, 50, 4, 4),
        untouchable(scene(10.04, 50, 4, 4)),  # beside the first: they touch
        untouchable(scene(20, 50, 4, 4)),
        untouchable(scene(10, 50, 4, 4, later(3600))),
        scene(10, 50, 4, 4),
    ]
    assert list(duplicates(views)) == [4]


def test_windows_that_went_do_not_take_others_with_them() -> None:
    # b's only window lies to 60 % under a and goes; c lies under b, but only to 30 % under a: it must stay.
    a = Outline(box(0, 0, 10, 10), NOON, lambda: [box(0, 0, 10, 10)])
    b = Outline(box(4, 0, 14, 10), NOON, lambda: [box(4, 0, 14, 10)])
    c = Outline(box(7, 0, 17, 10), NOON, lambda: [box(7, 0, 17, 10)])
    assert duplicates([a, b, c]) == {1: [0]}
    assert duplicates([b, c]) == {1: [0]}


def test_two_earlier_scenes_cover_together() -> None:
    left, right = scene(10, 50, 3, 2, step=2), scene(10.07, 50, 3, 2, step=2)
    middle = Outline(box(10.02, 50, 10.08, 50.02), NOON, lambda: [box(10.02, 50, 10.08, 50.02)])
    # 0.02-0.03 on the left and 0.07-0.08 on the right: a third in all; each alone a sixth.
    assert duplicates([left, right, middle], covered=0.33) == {2: [0]}
    assert duplicates([left, middle], covered=0.33) == {}


def test_what_lies_beyond_a_scenes_edge_shows_nothing_and_needs_nothing() -> None:
    # The first scene's window reaches over its edge to 0.04; the ground there is only in the second.
    first = Outline(box(10, 50, 10.03, 50.02), NOON, lambda: [box(10, 50, 10.02, 50.02), box(10.02, 50, 10.04, 50.02)])
    second = Outline(box(10.02, 50, 10.08, 50.02), NOON, lambda: [box(10.025, 50, 10.045, 50.02)])
    assert duplicates([first, second]) == {}
    # The second's window lies to a quarter in its scene, and that quarter is shown already.
    narrow = Outline(box(10.01, 50, 10.015, 50.02), NOON, lambda: [box(10.01, 50, 10.03, 50.02)])
    assert duplicates([first, narrow]) == {1: [0]}


def test_overlapping_windows_of_one_view_stay() -> None:
    assert duplicates([scene(10, 50, 8, 8, step=1), scene(30, 50, 8, 8)]) == {}


def tile(crs: str, x: float, y: float) -> Outline:
    """A scene of 20 km with its upper left corner at (x, y), in windows of 2.5 km."""

    def windows() -> list[Any]:
        return [ring(crs, x + 2500 * col, y - 2500 * (row + 1), 2500) for row in range(8) for col in range(8)]

    return Outline(ring(crs, x, y - 20_000, 20_000), NOON, windows)


def test_neighbouring_tiles_of_one_datatake() -> None:
    views = [tile("EPSG:32660", 600_000.0, 5_000_000.0), tile("EPSG:32660", 615_000.0, 5_000_000.0)]
    assert duplicates(views) == {1: [number for number in range(64) if number % 8 < 2]}


def test_tiles_of_two_zones_that_meet_on_the_date_line() -> None:
    views = [tile("EPSG:32660", 726_000.0, 5_000_000.0), tile("EPSG:32601", 256_000.0, 4_996_000.0)]
    assert all(view.footprint.geom_type == "MultiPolygon" for view in views)
    # The same in a plane around the line, where nothing is cut.
    around = "+proj=aeqd +lat_0=45 +lon_0=180 +datum=WGS84"

    def flat(crs: str, x: float, y: float, side: float) -> Any:
        xs, ys = np.array([x, x + side, x + side, x]), np.array([y, y, y - side, y - side])
        return shapely.Polygon(np.stack(transform_points(crs, around, xs, ys), axis=1))

    first = flat("EPSG:32660", 726_000.0, 5_000_000.0, 20_000.0)
    corners = [(256_000.0 + 2500 * col, 4_996_000.0 - 2500 * row) for row in range(8) for col in range(8)]
    windows = [flat("EPSG:32601", x, y, 2500.0) for x, y in corners]
    shares = [window.intersection(first).area / window.area for window in windows]
    assert 5 < sum(share >= 0.5 for share in shares) < 60 and min(abs(share - 0.5) for share in shares) > 1e-3
    assert duplicates(views) == {1: [number for number, share in enumerate(shares) if share >= 0.5]}


@settings(max_examples=100)
@given(
    scenes=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 3)),
        min_size=2,
        max_size=6,
    )
)
def test_what_goes_is_shown_by_what_stays_and_what_stays_is_not(scenes: list[Any]) -> None:
    views = [scene(x / 100, y / 100, w, h, later(25 * t), step=2) for x, y, w, h, t in scenes]
    found = duplicates(views)
    parts = [[shapely.intersection(item, view.footprint) for item in view.windows()] for view in views]
    for number, view in enumerate(views):
        earlier = [i for i in range(number) if abs((views[i].time - view.time).total_seconds()) <= 60]
        stay = [parts[i][j] for i in earlier for j in range(len(parts[i])) if j not in found.get(i, [])]
        shown = shapely.union_all(stay)
        for j, part in enumerate(parts[number]):
            share = part.intersection(shown).area / part.area if stay else 0.0
            assert (j in found.get(number, [])) == (share >= 0.5 - 1e-5), (number, j, share)
