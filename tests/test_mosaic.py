from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mosaic import CLASS, CONFIDENCE, COVERAGE, NODATA, ONE, PROBABILITIES, Layout, Seen, blend, weights
from shards.grid import Grid, Window


def layout(height: int, width: int, overlap: int = 8, block: int = 64, window: int = 32) -> Layout:
    return Layout(Grid((10, 0, 0, 0, -10, 0), height, width, "EPSG:32633"), window, overlap, block)


def certain(truth: np.ndarray, windows: list[Window], classes: int = 3) -> list[Seen]:
    """What a model says that sees the class of every pixel, and is certain of it; nothing is valid off the scene."""
    found = []
    for window in windows:
        inner = np.full((window.height, window.width), -1)
        part = window.clipped(*truth.shape)
        assert part is not None
        inner[part.within(window)] = truth[part.within(Window(0, 0, *truth.shape))]
        found.append((window, np.stack([(inner == k) * ONE for k in range(classes)]), (inner >= 0).astype(np.uint8)))
    return found


@settings(max_examples=20)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([0, 8, 16, 31]), st.sampled_from([64, 80]))
def test_blending_keeps_what_all_windows_agree_on(height: int, width: int, overlap: int, side: int) -> None:
    """No seam, no shift, no gap, whatever the size; and a probability of 1 is 100 percent."""
    truth = np.add.outer(np.arange(height), 2 * np.arange(width)) // 5 % 3
    cut, found = layout(height, width, overlap, side), np.full((3, height, width), 9)
    for block in cut.blocks():
        values = blend(block, cut, certain(truth, cut.windows(block)), 3)
        rows, cols = block.within(Window(0, 0, height, width))
        found[:, rows, cols] = values[:PROBABILITIES]
        np.testing.assert_array_equal(values[PROBABILITIES:], 100 * (truth[rows, cols] == np.arange(3)[:, None, None]))
    np.testing.assert_array_equal(found[CLASS], truth)
    assert (found[CONFIDENCE] == 100).all() and (found[COVERAGE] == 1).all()


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0, 8, 31]))
def test_windows_cover_the_grid_and_reach_over_it_only_where_it_is_smaller(
    height: int, width: int, overlap: int
) -> None:
    cut = layout(height, width, overlap, 64)
    blocks = np.zeros((height, width), int)
    for block in cut.blocks():
        rows, cols = block.within(Window(0, 0, height, width))
        blocks[rows, cols] += 1
        seen = np.zeros((height, width), int)
        for window in cut.windows(block):
            assert window.row + 32 <= max(height, 32) and window.col + 32 <= max(width, 32)
            part = window.clipped(height, width)
            assert part is not None and part.clipped(height, width)
            seen[part.within(Window(0, 0, height, width))] += 1
        assert (seen[rows, cols] >= 1).all()
    assert (blocks == 1).all()


def noisy(cut: Layout, seed: int = 0) -> dict[Window, Seen]:
    """Other probabilities in every window, and pixels that nobody sees."""
    rng = np.random.default_rng(seed)
    whole = Window(0, 0, cut.grid.height, cut.grid.width)
    found = {}
    for window in cut.windows(whole):
        shares = rng.dirichlet((1, 1, 1), (32, 32)).transpose(2, 0, 1)
        found[window] = (window, (shares * ONE).round().astype(np.int32), rng.integers(0, 3, (32, 32), np.uint8))
    return found


def test_a_block_is_the_same_cut_out_of_any_larger_one() -> None:
    """Also where windows of it were left out, and in any order of the windows of a row."""
    seen = noisy(layout(150, 170))
    whole = layout(150, 170, block=512)
    (all_of_it,) = whole.blocks()
    expected = blend(all_of_it, whole, [seen[window] for window in whole.windows(all_of_it)], 3)
    small = layout(150, 170, block=64)
    for block in small.blocks():
        windows = small.windows(block)
        random.Random(1).shuffle(windows)
        windows.sort(key=lambda window: window.row)
        found = blend(block, small, [seen[window] for window in windows], 3)
        rows, cols = block.within(all_of_it)
        np.testing.assert_array_equal(found, expected[:, rows, cols])


def test_blending_is_the_weighted_mean() -> None:
    cut = layout(60, 75)
    (block,) = layout(60, 75, block=128).blocks()
    seen = noisy(cut, 3)
    sums, total, bits = np.zeros((3, 60, 75)), np.zeros((60, 75)), np.zeros((60, 75), int)
    for window, values, coverage in seen.values():
        here = window.within(block)
        sums[:, *here] += values / ONE * weights(32)
        total[here] += weights(32)
        bits[here] |= coverage
    found = blend(block, cut, seen.values(), 3)
    known = bits > 0
    assert not known.all()
    np.testing.assert_array_equal(found[COVERAGE], bits)
    np.testing.assert_array_equal(found[CLASS][known], sums.argmax(0)[known])
    np.testing.assert_allclose(found[PROBABILITIES:, known], (100 * sums / total)[:, known], atol=0.51)
    np.testing.assert_array_equal(found[CONFIDENCE][known], found[PROBABILITIES:, known].max(0))
    assert (found[:COVERAGE, ~known] == NODATA).all() and (found[PROBABILITIES:, ~known] == NODATA).all()


def test_the_middle_of_a_window_weighs_most() -> None:
    assert weights(32)[0].max() == 16 and weights(32)[15, 15] == weights(32).max() == 256
    np.testing.assert_array_equal(weights(32), weights(32)[::-1, ::-1])


@pytest.mark.parametrize("rows_missing", [1, 3])
def test_windows_without_a_valid_pixel_may_be_left_out(rows_missing: int) -> None:
    truth = np.zeros((150, 40), int)
    cut = layout(150, 40, block=256)
    (block,) = cut.blocks()
    seen = certain(truth, cut.windows(block))
    starts = sorted({window.row for window, _, _ in seen})
    kept = [item for item in seen if item[0].row not in starts[1 : 1 + rows_missing]]
    reached = np.zeros(truth.shape, bool)
    for window, _, _ in kept:
        reached[window.within(block)] = True
    found = blend(block, cut, kept, 3)
    assert ((found[CLASS] == 0) == reached).all() and ((found[CLASS] == NODATA) == ~reached).all()
