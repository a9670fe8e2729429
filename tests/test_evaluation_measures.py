"""What an evaluation measures beside the confusion matrix: calibration, outlines, buildings, intervals."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import shapely
import torch
from numpy.typing import NDArray

from pipeline.boundaries import boundary_counts, boundary_scores
from pipeline.calibration import BINS, calibration, reliability
from pipeline.instances import EMPTY, Outlines, buildings, instance_scores, matched, origin, write_buildings
from pipeline.metrics import accuracy, confusion_matrices, confusion_matrix, intersection_over_union, mean_over_classes
from pipeline.spread import quantile, said, spread

IGNORE = 255


def noisy(seed: int, count: int = 3, side: int = 20, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K, H, W] and labels [B, H, W], a tenth of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (count, side, side), generator=generator)
    logits = torch.randn(count, classes, side, side, generator=generator)
    logits += 1.5 * torch.nn.functional.one_hot(label, classes).permute(0, 3, 1, 2)
    label[torch.rand(label.shape, generator=generator) < 0.1] = IGNORE
    return logits.softmax(1), label


def test_matrices_of_samples_add_up_to_that_of_all() -> None:
    shares, label = noisy(0)
    each = confusion_matrices(shares.argmax(1), label, 4, IGNORE)
    assert each.shape == (3, 4, 4)
    assert torch.equal(each[1], confusion_matrix(shares[1].argmax(0), label[1], 4, IGNORE))
    assert torch.equal(each.sum(0), confusion_matrix(shares.argmax(1), label, 4, IGNORE))


def test_measures_of_stacked_matrices() -> None:
    stack = np.array([[[3, 1], [0, 4]], [[0, 0], [0, 5]], [[0, 0], [0, 0]]])
    iou = intersection_over_union(stack)
    np.testing.assert_allclose(iou[0], [3 / 4, 4 / 5])
    assert np.isnan(iou[1, 0]) and iou[1, 1] == 1
    np.testing.assert_allclose(mean_over_classes(iou), [0.775, 1, np.nan])
    np.testing.assert_allclose(accuracy(stack), [7 / 8, 1, np.nan])


def test_calibration_is_that_of_a_loop_over_bins() -> None:
    shares, label = noisy(1, side=40)
    table = reliability(shares, label, IGNORE)
    confidence, predicted = (each.numpy() for each in shares.max(1))
    counted = label.numpy() != IGNORE
    sure, right = confidence[counted].astype(np.float64), (predicted == label.numpy())[counted]
    error = 0.0
    for number in range(BINS):
        inside = (sure > number / BINS) & (sure <= (number + 1) / BINS)
        assert int(table[number, 0]) == inside.sum() and int(table[number, 1]) == right[inside].sum()
        if inside.any():
            error += inside.sum() * abs(right[inside].mean() - sure[inside].mean())
    found = calibration(table.numpy())
    assert found["ECE"] == pytest.approx(100 * error / counted.sum(), abs=0.005)
    assert [each["pixels"] for each in found["bins"]] == table[:, 0].tolist()
    assert found["bins"][0] == {"confidence": None, "accuracy": None, "pixels": 0}  # of four classes none is below 1/4


def test_a_sure_model_that_is_half_right_has_an_error_of_a_half() -> None:
    shares = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 4, 4)
    label = torch.tensor([[0, 1] * 2] * 4)[None]
    assert calibration(reliability(shares, label, IGNORE).numpy())["ECE"] == 50.0


def square(top: int, left: int, side: int = 6, size: int = 20) -> torch.Tensor:
    image = torch.zeros(1, size, size, dtype=torch.int64)
    image[0, top : top + side, left : left + side] = 1
    return image


@pytest.mark.parametrize(("tolerance", "expected"), [(0, None), (1, 100.0)])
def test_a_boundary_may_be_off_by_the_tolerance(tolerance: int, expected: float | None) -> None:
    counts = boundary_counts(square(5, 6), square(5, 5), 2, IGNORE, tolerance).numpy()
    assert counts[1, 0] == counts[1, 2] == 20  # 4 x 6 - 4 pixels inside its edge
    found = boundary_scores(counts, ["ground", "house"])
    if expected is None:
        assert 0 < found["house"] < 100  # type: ignore[operator]
    else:
        assert found["house"] == found["ground"] == found["mean"] == expected


def test_near_is_a_disk_and_every_boundary_pixel_is_looked_at() -> None:
    shares, label = noisy(2, count=2, side=24, classes=3)
    predicted, tolerance = shares.argmax(1), 2
    counts = boundary_counts(predicted, label, 3, IGNORE, tolerance).numpy()
    for kind in range(3):
        total = np.zeros(4, np.int64)
        for b in range(2):
            guess, truth = (edges(image[b].numpy(), label[b].numpy() != IGNORE, kind) for image in (predicted, label))
            for one, other, place in ((guess, truth, 0), (truth, guess, 2)):
                near = [p for p in one if any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= tolerance**2 for q in other)]
                total[place : place + 2] += len(one), len(near)
        np.testing.assert_array_equal(counts[kind], total)


def edges(image: NDArray[np.int64], counted: NDArray[np.bool_], kind: int) -> list[tuple[int, int]]:
    """Boundary pixels of a class by looking at each pixel."""
    found = []
    for row, col in itertools.product(*map(range, image.shape)):
        around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
        inside = [(r, c) for r, c in around if 0 <= r < image.shape[0] and 0 <= c < image.shape[1] and counted[r, c]]
        if counted[row, col] and image[row, col] == kind and any(image[place] != kind for place in inside):
            found.append((row, col))
    return found


def test_edges_of_images_and_of_unlabelled_areas_are_no_boundaries() -> None:
    label = square(0, 0, side=10)
    label[0, :, 10:], label[0, 10:] = IGNORE, IGNORE
    counts = boundary_counts(torch.zeros_like(label), label, 3, IGNORE, 1).numpy()
    assert not counts.any()
    assert boundary_scores(counts, ["a", "b", "c"]) == {"mean": None, "a": None, "b": None, "c": None}


def test_a_boundary_in_one_of_the_two_alone_counts_as_missed() -> None:
    counts = boundary_counts(square(5, 5) * 0, square(5, 5), 2, IGNORE, 1).numpy()
    assert boundary_scores(counts, ["ground", "house"]) == {"mean": 0.0, "ground": 0.0, "house": 0.0}


def random_mask(seed: int, side: int = 40) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    coarse = rng.random((side // 4, side // 4)) < 0.4
    return np.asarray(coarse.repeat(4, 0).repeat(4, 1) & (rng.random((side, side)) < 0.97))


def test_buildings_are_the_pixels_that_touch_side_by_side() -> None:
    mask = np.zeros((8, 8), bool)
    mask[1:4, 1:4] = True
    mask[2, 2] = False  # a court
    mask[4, 4] = True  # touches at a corner alone
    probability = np.where(mask, 0.75, 0.25).astype(np.float32)
    found, numbers = buildings(mask, probability, corner=(10, 20))
    assert sorted(each.outline.area for each in found) == [1, 8]
    assert [each.confidence for each in found] == [0.75, 0.75]
    assert max(found, key=lambda each: each.outline.area).outline.bounds == (21, 11, 24, 14)
    np.testing.assert_array_equal(numbers > 0, mask)
    assert numbers[4, 4] != numbers[3, 3]
    large, left = buildings(mask, probability, min_area=2)
    assert len(large) == 1 and left[4, 4] == 0 and left[1, 1] == 1


def test_any_number_of_buildings_can_be_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask(0)
    whole = buildings(mask, mask.astype(np.float32))[1]
    monkeypatch.setattr("pipeline.instances.MOST", 3)
    np.testing.assert_array_equal(buildings(mask, mask.astype(np.float32))[1], whole)
    assert whole.max() > 6


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_greedy_one_on_outlines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth_mask = random_mask(seed)
    mask = truth_mask ^ (rng.random(truth_mask.shape) < 0.12)
    predicted, numbers = buildings(mask, rng.random(mask.shape).astype(np.float32))
    true, ids = buildings(truth_mask, np.ones(mask.shape, np.float32))
    left, found = [each.outline for each in true], 0
    for each in sorted(predicted, key=lambda each: -each.confidence):
        ious = [each.outline.intersection(other).area / each.outline.union(other).area for other in left]
        if ious and max(ious) > 0.5:
            left.pop(int(np.argmax(ious)))
            found += 1
    sparse = np.where(ids > 0, 7 * ids + 3, 0)  # numbers need not follow each other
    assert matched(numbers, sparse) == (found, len(predicted) - found, len(true) - found)
    assert 0 < found < len(predicted)


def test_nothing_matches_nothing() -> None:
    empty, one = np.zeros((5, 5), np.int32), np.ones((5, 5), np.int32)
    assert (matched(empty, empty), matched(one, empty), matched(empty, one)) == ((0, 0, 0), (0, 1, 0), (0, 0, 1))
    half = one.copy()
    half[:, 2:] = 0
    assert matched(half, one) == (0, 1, 1)  # IoU 0.4
    assert instance_scores(0, 0, 0)["F1"] is None
    assert instance_scores(3, 1, 2) == {
        "precision": 75.0, "recall": 60.0, "F1": 66.67, "TP": 3, "FP": 1, "FN": 2, "iou": 0.5,
    }  # fmt: skip


def test_tiles_know_their_image() -> None:
    assert origin("x_tile_7-00448-00896", {"place": "x_tile_7"}) == ("x_tile_7", (448, 896))
    assert origin("chip-12", {"place": "p"}) == ("chip-12", (0, 0))
    assert origin("a-00000-00000", {}) == ("a-00000-00000", (0, 0))


def write(folder: Path, world: int) -> list[list[str]]:
    """Four tiles of three images, by so many ranks; the rows of the file."""
    parts = [Outlines(folder, rank) for rank in range(world)]
    house = shapely.box(3, 4, 9, 8)
    tiles = [("a", 0), ("a", 2), ("b", 0), ("c", 1)]
    for number, (image, count) in enumerate(tiles):
        found = [buildings(np.ones((1, 1), bool), np.ones((1, 1), np.float32))[0][0]._replace(outline=house)] * count
        parts[number % world].add(number, image, found)
    for each in parts:
        each.close()
    write_buildings(folder, world, "buildings.csv")
    assert [path.name for path in folder.iterdir()] == ["buildings.csv"]
    with (folder / "buildings.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_outlines_are_written_as_spacenet_takes_them_whatever_the_ranks(tmp_path: Path) -> None:
    rows = write(tmp_path / "one", 1)
    assert rows[0] == ["ImageId", "PolygonWKT_Pix", "Confidence"]
    assert [row[0] for row in rows[1:]] == ["a", "a", "c", "b"]
    assert shapely.from_wkt(rows[1][1]).equals(shapely.box(3, 4, 9, 8)) and rows[1][2] == "1.0"
    assert rows[-1] == ["b", EMPTY, "0"]
    assert write(tmp_path / "three", 3) == rows


def test_the_interval_is_students() -> None:
    for freedom in (1, 2, 9, 30, 31, 200):
        assert quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=0.001)
    values = [50.0, 52.0, 57.0]
    found = spread(values)
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert found["interval"] == pytest.approx([low, high], abs=0.01)
    assert (found["mean"], found["std"]) == (53.0, pytest.approx(np.std(values, ddof=1), abs=1e-4))
    assert said(found).startswith("53.00 ± 3.61 (95 %: 44.0")
    assert spread([5.0]) == {"values": [5.0], "mean": 5.0, "std": None, "interval": None}
    assert said(spread([5.0])) == "5.00"
