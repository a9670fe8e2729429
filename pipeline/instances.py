"""Buildings one by one: instance F1 at IoU 0.5, and their outlines as the challenges of SpaceNet take them.

A predicted building is a group of pixels of class 1 that touch side by side, as GDAL polygonises. It is found where it
and a true one have an IoU of more than 0.5, which at most one true building can have with it: no order of matching is
needed, and greedy matching by confidence gives the same (SpaceNet's own scoring; Kirillov et al. 2019, CVPR, "Panoptic
Segmentation", section 4.1, has the proof). True positives, false positives and false negatives are added up over the
set. IoU on pixels is that of outlines along their edges.

Each sample is matched by itself: a building that the edge of a tile cuts counts in both tiles.
"""

from __future__ import annotations

import csv
import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.metrics import percent, share
from shards.grid import Grid
from shards.raster_io import burn, polygons

BUILDING = 1  # labels of polygons have two classes: outside, inside
IOU = 0.5
MOST = 65535  # outlines that `burn` numbers at once
COLUMNS = ("ImageId", "PolygonWKT_Pix", "Confidence")
EMPTY = "POLYGON EMPTY"
DECIMALS = 4  # of a confidence

Mask = NDArray[np.bool_]
Ids = NDArray[np.int32]


class Building(NamedTuple):
    """A predicted building: its outline in pixels (x = column, y = row), and its mean probability."""

    outline: shapely.Polygon
    confidence: float


def buildings(
    mask: Mask, probability: NDArray[np.float32], min_area: int = 0, corner: tuple[int, int] = (0, 0)
) -> tuple[list[Building], Ids]:
    """The connected parts of `mask` [H, W] with at least `min_area` pixels, and their numbers from 1 as [H, W].

    Args:
        mask: where the class is predicted.
        probability: of the class, 0 to 1.
        min_area: pixels.
        corner: row and column, in the outlines' pixels, of the upper left pixel.
    """
    row, column = corner
    height, width = mask.shape
    grid = Grid((1.0, 0.0, float(column), 0.0, 1.0, float(row)), height, width, None)
    found = [shapely.geometry.shape(outline) for _, outline in polygons(mask.astype(np.uint8), grid.transform)]
    outlines = [outline for outline in found if outline.area >= min_area]
    numbers = np.zeros(mask.shape, np.int32)
    for first in range(0, len(outlines), MOST):
        some = burn(list(enumerate(outlines[first : first + MOST], 1)), grid)
        numbers[some > 0] = some[some > 0].astype(np.int32) + first
    sums = np.bincount(numbers.ravel(), probability.ravel().astype(np.float64), len(outlines) + 1)[1:]
    areas = [outline.area for outline in outlines]
    sure = [round(float(total / area), DECIMALS) for total, area in zip(sums, areas, strict=True)]
    return list(map(Building, outlines, sure)), numbers


def matched(predicted: Ids, truth: Ids) -> tuple[int, int, int]:
    """True positives, false positives and false negatives of two images [H, W] of numbers, 0 where there is none."""
    one, other = (np.unique(image, return_inverse=True) for image in (predicted, truth))
    areas = [np.bincount(inverse.ravel()) for _, inverse in (one, other)]
    both = (predicted > 0) & (truth > 0)
    pairs = np.stack([one[1].reshape(both.shape)[both], other[1].reshape(both.shape)[both]])
    (i, j), common = np.unique(pairs, axis=1, return_counts=True)
    found = int((common > IOU * (areas[0][i] + areas[1][j] - common)).sum())
    return found, int((one[0] > 0).sum()) - found, int((other[0] > 0).sum()) - found


def instance_scores(found: int, wrong: int, missed: int) -> dict[str, Any]:
    """Precision, recall and F1 in percent of pooled counts; None where undefined."""
    counts = np.array([found, found, 2 * found], np.float64)
    whole = np.array([found + wrong, found + missed, 2 * found + wrong + missed], np.float64)
    rates = dict(zip(("precision", "recall", "F1"), map(percent, share(counts, whole)), strict=True))
    return {**rates, "TP": found, "FP": wrong, "FN": missed, "iou": IOU}


def origin(key: str, facts: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """The image that a tile was cut from, and the row and column of its corner there; the sample itself if unknown."""
    cut = re.fullmatch(r".*-(\d{5,})-(\d{5,})", key)
    return (str(facts["place"]), (int(cut[1]), int(cut[2]))) if cut and "place" in facts else (key, (0, 0))


class Outlines:
    """The buildings of this rank's samples, in a file of its own until all ranks have written theirs."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = part(folder, rank).open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)

    def add(self, number: int, image: str, found: Sequence[Building]) -> None:
        """Those of sample `number`; a rank's numbers rise."""
        self._rows.writerows(
            (number, image, shapely.to_wkt(outline, rounding_precision=0), confidence) for outline, confidence in found
        )
        if not found:
            self._rows.writerow((number, image, EMPTY, 0))

    def close(self) -> None:
        """Before the parts are put together."""
        self._file.close()


def part(folder: Path, rank: int) -> Path:
    """Where a rank's outlines wait."""
    return folder / f".buildings-{rank}.csv"


def write_buildings(folder: Path, world: int, name: str) -> None:
    """FOLDER/NAME of all ranks' parts, in the order of the samples whatever their number, and the parts removed.

    An image without a building gets one row at the end, `POLYGON EMPTY` with confidence 0.
    """
    temporary = folder / f".{name}.tmp"
    with ExitStack() as stack, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        files = [stack.enter_context(part(folder, rank).open(newline="", encoding="utf-8")) for rank in range(world)]
        built: dict[str, bool] = {}
        for _, image, outline, confidence in _in_order(map(csv.reader, files)):
            built[image] = built.get(image, False) or outline != EMPTY
            if outline != EMPTY:
                rows.writerow((image, outline, confidence))
        rows.writerows((image, EMPTY, 0) for image, any_there in built.items() if not any_there)
    temporary.replace(folder / name)
    for rank in range(world):
        part(folder, rank).unlink()


def _in_order(parts: Iterator[Iterator[list[str]]]) -> Iterator[list[str]]:
    return heapq.merge(*parts, key=lambda row: int(row[0]))
