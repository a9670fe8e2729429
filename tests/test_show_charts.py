"""The map of footprints and the histograms of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from shards.contract import Contract
from shards.manifest import select
from shards.sample import Sample, Tile
from shards.show.atlas import COLOURS, Footprints, atlas, places
from shards.show.histograms import histograms
from shards.statistics import measure
from tests.shown_dataset import CONTRACT, make_sample, modality, write
from tests.test_report import HOSTILE, Page, chromium, probe  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("show") / "data", [make_sample(number) for number in range(6)])


# --- the map ---------------------------------------------------------------------------------------------------------


def rows_of(west: Any, south: Any, split: Any = "train", size: float = 0.01) -> pa.Table:
    west, south = (np.atleast_1d(np.asarray(values, np.float64)) for values in (west, south))
    boxes = shapely.to_wkb(shapely.box(west, south, west + size, south + size))
    splits = np.broadcast_to(np.asarray(split, object), west.shape)
    geometry = pa.array(boxes.tolist(), pa.binary())
    return pa.table({"geometry": geometry, "split": pa.array(splits, pa.string()), "group": ["g"] * len(west)})


def polygons(axes: Any) -> PolyCollection:
    (found,) = (item for item in axes.collections if isinstance(item, PolyCollection))
    return found


def test_footprints_are_drawn_where_they_are_in_the_colours_of_their_splits(data: str) -> None:
    rows = select(data).rows(["geometry", "split", "group"])
    figure = atlas(rows)
    assert figure is not None
    (axes,) = figure.axes
    found = polygons(axes)
    outlines = np.concatenate([path.vertices for path in found.get_paths()])
    wanted = shapely.total_bounds(shapely.from_wkb(rows["geometry"].to_pylist()))
    np.testing.assert_allclose([*outlines.min(0), *outlines.max(0)], wanted)
    (west, east), (south, north) = axes.get_xlim(), axes.get_ylim()
    assert west < wanted[0] < wanted[2] < east < west + 0.2 and south < wanted[1] < wanted[3] < north
    colours = [tuple(colour[:3]) for colour in found.get_edgecolor()]
    for split, count in (("train", 3), ("val", 1), ("test", 1), ("", 1)):
        assert colours.count(to_rgb(COLOURS[split])) == count
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train: 3", "val: 1", "test: 1", "no split: 1",
    ]  # fmt: skip
    assert all(label.get_text().endswith("\N{DEGREE SIGN}E") for label in axes.get_xticklabels())


def test_places_far_apart_have_maps_of_their_own() -> None:
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4))).reshape(2, -1) * 0.01
    parts = [rows_of(west + grid[0], south + grid[1]) for west, south in ((10, 50), (-60, -20), (100, 5))]
    figure = atlas(pa.concat_tables([*parts, parts[1], rows_of(0.0, 0.0)]))  # the second twice, and a single window
    assert figure is not None
    overview, *close = figure.axes
    assert len(close) == 3
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["4 places, 3 of them below", "A  g, 32 samples", "B  g, 16 samples", "C  g, 16 samples"]
    assert np.round(close[0].get_xlim()).mean() == -60
    assert {np.round(axes.get_xlim()).mean() for axes in close[1:]} == {10, 100}
    assert all(len(polygons(axes).get_paths()) == 16 for axes in close)
    assert {text.get_text() for text in overview.texts} >= {"A", "B", "C"}


def test_footprints_across_the_date_line_are_one_place() -> None:
    rows = rows_of([179.98, 179.99, -180.0, -179.99], [-17.0] * 4)
    found = Footprints.of(rows)
    assert found is not None and places(found).tolist() == [0] * 4
    assert found.extent == pytest.approx((179.98, -17, 180.02, -16.99))
    figure = atlas(rows)
    assert figure is not None
    assert {label.get_text()[-1] for label in figure.axes[0].get_xticklabels()} <= {"E", "W", "\N{DEGREE SIGN}"}


def test_many_footprints_are_drawn_as_squares_and_no_split_is_hidden() -> None:
    rng = np.random.default_rng(0)
    split = np.where(rng.random(200_000) < 0.1, "val", "train")
    figure = atlas(rows_of(rng.uniform(5, 15, 200_000), rng.uniform(45, 55, 200_000), split))
    assert figure is not None
    (axes,) = figure.axes
    assert not any(isinstance(item, PolyCollection) for item in axes.collections)
    image = np.asarray(axes.images[0].get_array())
    drawn = image[image[..., 3] > 0]
    yellow = (drawn[:, :3] == to_rgb(COLOURS["val"])).all(1).mean()
    assert len(drawn) > 1000 and 0.07 < yellow < 0.13


def test_no_map_without_footprints() -> None:
    rows = rows_of(0.0, 0.0)
    assert atlas(rows.set_column(0, "geometry", pa.nulls(1, pa.binary()))) is None


# --- histograms ------------------------------------------------------------------------------------------------------


def test_a_histogram_per_band_with_percentiles_and_clip_range(data: str) -> None:
    sample = make_sample(0)
    figure = histograms(CONTRACT, measure(sample))
    assert figure is not None
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title().split(":")[0] for axes in drawn]
    assert titles == [band for m in CONTRACT.modalities for band in m.bands]
    vv = drawn[titles.index("VV")]
    lines = sorted(float(line.get_xdata()[0]) for line in vv.lines)
    statistics = measure(sample)["s1"]
    wanted = [float(statistics.percentile(share, (-25.0, 0.0))[0]) for share in (0.02, 0.98)]
    assert lines == sorted([-25.0, 0.0, *wanted])
    assert "3,840 valid pixels" in figure.subfigs[0].get_suptitle()
    assert figure.subfigs[2].get_suptitle() == "dem: 4,096 valid pixels; m, clipped to -500 to 9000"


def test_values_piled_up_at_the_clip_range_are_named() -> None:
    values = np.full((1, 10, 10), 9000.0, np.float32)
    values[0, :9] = np.linspace(0, 2000, 90).reshape(9, 10)
    statistics = measure(Sample("k", {"dem": Tile(values, np.ones((10, 10), bool))}))
    figure = histograms(Contract(modalities=(modality("dem"),)), statistics)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["10 % in the last bin"]
    assert histograms(CONTRACT, {}) is None
