from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.grid import Grid, Window

sizes = st.integers(1, 300)


def grid(height: int = 100, width: int = 80, transform: tuple[float, ...] = (10, 0, 500000, 0, -10, 5300000)) -> Grid:
    return Grid(tuple(transform), height, width, "EPSG:32633")  # type: ignore[arg-type]


@given(sizes, sizes, st.integers(1, 64), st.data())
def test_windows_cover_every_pixel_and_start_inside(height: int, width: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    covered = np.zeros((height, width), int)
    for window in grid(height, width).windows(size, stride):
        assert window.row < height and window.col < width
        covered[window.row : window.row + size, window.col : window.col + size] += 1
    assert covered.min() >= 1
    if stride == size:
        assert covered.max() == 1


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-math.pi, math.pi), st.floats(0.5, 60))
def test_rowcol_undoes_xy_on_rotated_grids(row: float, col: float, angle: float, metres: float) -> None:
    a, d = metres * math.cos(angle), metres * math.sin(angle)
    rotated = grid(transform=(a, d, 5e5, d, -a, 5e6))
    assert rotated.rowcol(*rotated.xy(row, col)) == pytest.approx((row, col), abs=1e-3)
    assert rotated.resolution == pytest.approx(metres)


def test_window_of_a_grid_keeps_the_ground() -> None:
    part = grid().window(Window(7, -3, 10, 20))
    assert part.xy(0, 0) == grid().xy(7, -3)
    assert part.inside(grid()) == Window(7, -3, 10, 20)


@pytest.mark.parametrize(("shift", "equal"), [(0.3, True), (0.6, False), (10.0, True)])
def test_grids_equal_within_a_twentieth_of_a_pixel(shift: float, equal: bool) -> None:
    moved = grid(transform=(10, 0, 500000 + shift, 0, -10, 5300000))
    assert (moved.inside(grid()) is not None) == equal


def test_other_pixel_size_or_crs_is_not_inside() -> None:
    assert grid(transform=(10.01, 0, 500000, 0, -10.01, 5300000)).inside(grid()) is None
    assert Grid(grid().transform, 5, 5, "EPSG:32634").inside(grid()) is None


@pytest.mark.parametrize(("height", "transform"), [(0, (1, 0, 0, 0, -1, 0)), (3, (1, 0, 0, 1, 0, 0))])
def test_what_cannot_be_a_grid_is_refused(height: int, transform: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not a grid"):
        grid(height, transform=transform)


def test_stride_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 65"):
        list(grid().windows(64, 65))
