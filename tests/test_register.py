"""Sub-pixel shifts between modalities: the sign, planted shifts in made-up and real pairs, holes, and silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shards.register import MIN_CONFIDENCE, REACH, shift, stand_ins
from shards.sample import Tile
from tests.registration import Pair, distance, made_up_pairs, moved, planted_shifts, real_pairs

Array = NDArray[Any]


def full(values: Array) -> Tile:
    return Tile(values, np.ones(values.shape[1:], np.bool_))


def shapes(size: int = 96, seed: int = 0) -> Array:
    """Rectangles of random brightness over each other [1, size, size]."""
    rng = np.random.default_rng(seed)
    image = np.zeros((1, size, size), np.float32)
    for _ in range(60):
        row, col = rng.integers(0, size, 2)
        height, width = rng.integers(5, 25, 2)
        image[:, row : row + height, col : col + width] = rng.uniform(0, 1)
    return image


@pytest.fixture(scope="module")
def made_up() -> list[tuple[Pair, float, float]]:
    return list(made_up_pairs(planted_shifts()))


@pytest.fixture(scope="module")
def real() -> list[Pair]:
    from tests.conftest import REAL_DATA

    return real_pairs(REAL_DATA)


@pytest.mark.parametrize(("rows", "cols"), [(3, 0), (-3, 0), (0, 3), (0, -3), (5, -7), (-11, 11)])
def test_content_further_down_and_right_is_positive(rows: int, cols: int) -> None:
    scene = shapes(160)
    reference = full(scene[:, 30:126, 30:126])
    # What the reference shows at its first pixel, the other shows at [rows, cols]: its window begins that much earlier.
    other = full(1 - scene[:, 30 - rows : 126 - rows, 30 - cols : 126 - cols])  # and bright is dark
    found = shift(reference, other)
    assert found is not None
    assert distance(found, rows, cols) < 0.05
    back = shift(other, reference)
    assert back is not None
    assert distance(back, -rows, -cols) < 0.05


@pytest.mark.parametrize("part", [0.25, 0.5, -0.4])
def test_parts_of_a_pixel(part: float) -> None:
    tile = full(shapes(128))
    found = shift(tile, moved(tile, part, -2 * part))
    assert found is not None
    assert distance(found, part, -2 * part) < 0.1


def test_planted_shifts_between_made_up_optical_and_radar(made_up: list[tuple[Pair, float, float]]) -> None:
    found = [(pair.shift(), rows, cols) for pair, rows, cols in made_up]
    errors = [distance(one, rows, cols) for one, rows, cols in found if one]
    assert len(errors) >= 0.9 * len(made_up)
    assert np.median(errors) < 0.15
    assert np.quantile(errors, 0.9) < 0.4


def test_the_expected_error_is_about_the_error(made_up: list[tuple[Pair, float, float]]) -> None:
    windows = [
        (pair.window(row, col, 96).shift(), rows, cols)
        for pair, rows, cols in made_up for row in (0, 96) for col in (0, 96)
    ]  # fmt: skip
    ratios = [distance(one, rows, cols) / one.error for one, rows, cols in windows if one]
    assert len(ratios) > 40
    assert 0.4 < np.median(ratios) < 1.6
    assert np.quantile(ratios, 0.95) < 4
    assert all(one.confidence >= MIN_CONFIDENCE for one, _, _ in windows if one)


def test_other_places_have_no_shift(made_up: list[tuple[Pair, float, float]]) -> None:
    pairs = [pair for pair, _, _ in made_up]
    wrong = [replace(a, radar=b.radar).shift() for a in pairs for b in pairs if a is not b]
    assert len(wrong) == 380
    assert sum(one is not None for one in wrong) <= 4


def test_holes_do_not_vote() -> None:
    rng = np.random.default_rng(1)
    reference, other = full(shapes(128)), moved(full(shapes(128)), 2.0, -3.0)
    valid = np.ones((128, 128), np.bool_)
    valid[20:60, 30:90], valid[:, 100:] = False, False
    garbage = np.where(valid, reference.values, rng.choice([np.nan, -9999.0, 9999.0], valid.shape)).astype(np.float32)
    clean = Tile(np.where(valid, reference.values, 0), valid)
    found, same = shift(Tile(garbage, valid), other), shift(clean, other)
    assert found is not None
    assert found == same
    assert distance(found, 2, -3) < 0.1


def test_holes_at_one_spot_in_both_are_not_taken_for_content(made_up: list[tuple[Pair, float, float]]) -> None:
    """Edges of equal masks match perfectly at no shift; the ground says something else."""
    mask = np.ones((192, 192), np.bool_)
    for start in range(8, 192, 24):
        mask[start : start + 6], mask[:, start : start + 6] = False, False
    tried = 0
    for pair, rows, cols in made_up:
        if np.hypot(rows, cols) > 3 and pair.optical.valid.all():
            found = replace(pair, optical=masked(pair.optical, mask), radar=masked(pair.radar, mask)).shift()
            assert found is not None
            assert distance(found, rows, cols) < 1.5
            tried += 1
    assert tried >= 3


def masked(tile: Tile, mask: Array) -> Tile:
    valid = tile.valid & mask
    return Tile(np.where(valid, tile.values, 0), valid)


def flat_and_others() -> dict[str, tuple[Tile, Tile]]:
    rng = np.random.default_rng(0)
    tile, noise = full(shapes(96)), full(rng.normal(size=(1, 96, 96)))
    few = np.zeros((96, 96), np.bool_)
    few[:30, :30] = True
    rows = np.arange(96)[:, None] * np.ones(96)
    return {
        "flat": (full(np.full((2, 96, 96), 7.0)), tile),
        "flat integers": (tile, full(np.zeros((1, 96, 96), np.uint16))),
        "few valid": (Tile(tile.values, few), tile),
        "none valid": (tile, Tile(np.zeros((1, 96, 96)), np.zeros((96, 96), np.bool_))),
        "valid apart": (Tile(tile.values, few), Tile(tile.values, ~few)),
        "noise": (tile, noise),
        "one straight edge": (full((rows > 48)[None].astype(np.float32)), full((rows > 50)[None].astype(np.float32))),
        "stripes": (full(np.sin(rows)[None]), full(np.sin(rows + 1)[None])),
        "beyond reach": (full(shapes(160)[:, :96, :96]), full(shapes(160)[:, REACH + 8 : REACH + 104, :96])),
        "tiny": (full(shapes(8)), full(shapes(8))),
    }


@pytest.mark.parametrize("case", flat_and_others())
def test_where_nothing_can_be_said(case: str) -> None:
    assert shift(*flat_and_others()[case]) is None


@pytest.mark.parametrize("height, width", [(64, 64), (65, 97), (512, 128)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_sizes_and_types(height: int, width: int, dtype: type) -> None:
    scene = (200 * shapes(560)).astype(dtype)
    other = scene[:, 4 : height + 4, 1 : width + 1]
    found = shift(full(scene[:, :height, :width]), full(other))
    assert found is not None
    assert distance(found, -4, -1) < 0.1


def test_only_the_named_bands_are_looked_at() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 96, 96)).astype(np.float32) * 100
    tile, both = full(shapes()), full(np.concatenate([noise, shapes()]))
    assert shift(tile, both, (), (0,)) is None
    found = shift(tile, both, (), (1,))
    assert found is not None
    assert distance(found, 0, 0) < 0.01


def test_bands_that_stand_for_a_sensor() -> None:
    assert (stand_ins("s2-l2a"), stand_ins("s1"), stand_ins("dem")) == ((3, 2, 1), (0, 1), (0,))


def test_unequal_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(96, 96\) and \(64, 64\) pixels: give two tiles of equal height and width"):
        shift(full(shapes(96)), full(shapes(64)))


REGISTRABLE = ("38D_378R", "609U_541L", "33UUP_87_48", "35VPK_69_24", "SpaceNet 6")


def named(pairs: list[Pair], part: str) -> Pair:
    return next(pair for pair in pairs if part in pair.name)


@pytest.mark.real_data
def test_planted_shifts_between_real_optical_and_radar(real: list[Pair]) -> None:
    """Measured against the shift found where none was planted: median 0.06, 90 % below 0.16."""
    errors, tried = [], 0
    for part in REGISTRABLE:
        pair = named(real, part)
        own = pair.shift()
        assert own is not None, pair.name
        for rows, cols in planted_shifts():
            found, tried = pair.planted(rows, cols).shift(), tried + 1
            errors += [distance(found, own.rows + rows, own.cols + cols)] if found else []
    assert tried == 100 and len(errors) >= 90
    assert np.median(errors) < 0.15
    assert np.quantile(errors, 0.9) < 0.35


@pytest.mark.real_data
@pytest.mark.parametrize("part", REGISTRABLE[:2])
def test_quarters_of_a_real_tile_agree_with_the_whole(real: list[Pair], part: str) -> None:
    """Quarters share no pixels, so this is the error that noise makes, speckle and fields that changed included."""
    pair = named(real, part)
    whole = pair.shift()
    assert whole is not None
    quarters = [pair.window(row, col, 112).shift() for row in (0, 112) for col in (0, 112)]
    errors = [distance(one, whole.rows, whole.cols) for one in quarters if one]
    assert len(errors) >= 3
    assert max(errors) < 0.8


@pytest.mark.real_data
def test_real_tiles_of_other_places_have_no_shift(real: list[Pair]) -> None:
    found = []
    for a in real:
        for b in real:
            if a is b:
                continue
            size = min(a.optical.valid.shape[0], b.radar.valid.shape[0])
            mixed = replace(a, radar=b.radar, radar_bands=b.radar_bands)
            found += [replace(mixed, optical=a.window(0, 0, size).optical, radar=b.window(0, 0, size).radar).shift()]
    assert len(found) == 42
    assert sum(one is not None for one in found) <= 1
