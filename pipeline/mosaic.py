"""Mosaic: which windows make which block of a map, and how their overlapping probabilities become one.

A block depends on nothing but the windows that touch it, so blocks can be made in any order, by anybody, again after a
kill, and are the same bytes. Probabilities are integers in units of 1 / ONE, weights are integers, and sums of integers
do not depend on their order; a probability of 1 in all windows blends to exactly 100 percent.

Letters: K classes; S side of a window; h w sides of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.grid import Grid, Window

ONE = 1 << 16  # a probability of 1, as an integer
NODATA = 255  # class and percent where no modality is valid
CLASS, CONFIDENCE, COVERAGE, PROBABILITIES = 0, 1, 2, 3  # bands of a block; the last is the first of K

Ints = NDArray[np.integer]
Seen = tuple[Window, Ints, NDArray[np.uint8]]
"""A window, the classes' probabilities [K, S, S] in units of 1 / ONE, and its coverage [S, S]: bit i for modality i."""


@dataclass(frozen=True)
class Layout:
    """A grid cut into blocks, and covered by windows that overlap.

    Args:
        grid: of the map.
        window: side of a window in pixels.
        overlap: pixels that neighbours share at least.
        block: side of a block in pixels.
    """

    grid: Grid
    window: int
    overlap: int
    block: int

    def blocks(self) -> list[Window]:
        """Blocks row by row; those at the right and lower edge are smaller."""
        return [
            Window(row, col, min(self.block, self.grid.height - row), min(self.block, self.grid.width - col))
            for row in range(0, self.grid.height, self.block)
            for col in range(0, self.grid.width, self.block)
        ]

    def windows(self, block: Window) -> list[Window]:
        """The windows that touch a block, row by row."""
        rows = self._starts(self.grid.height, block.row, block.row + block.height)
        cols = self._starts(self.grid.width, block.col, block.col + block.width)
        return [Window(row, col, self.window, self.window) for row in rows for col in cols]

    def _starts(self, length: int, low: int, high: int) -> list[int]:
        """Where windows begin that touch pixels `low` to `high`. The last is moved inwards, so that none is padded."""
        last = max(length - self.window, 0)
        starts = [*range(0, last, self.window - self.overlap), last]
        return [start for start in starts if start < high and start + self.window > low]


def weights(size: int) -> NDArray[np.int64]:
    """Weights [S, S]: 1 at the window's edge, rising linearly to its middle."""
    ramp = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1
    return np.asarray(np.outer(ramp, ramp), np.int64)


def blend(block: Window, layout: Layout, seen: Iterable[Seen], classes: int, one: int = ONE) -> NDArray[np.uint8]:
    """A block of the map from what the model says of its windows.

    Args:
        block: of `layout.blocks()`.
        layout: of the map.
        seen: of `layout.windows(block)` in their order; those without a valid pixel may be left out.
        classes: K.
        one: the integer that stands for a probability of 1, a multiple of ONE where several views were added up.

    Returns:
        [3 + K, h, w]: class; percent of its probability; coverage; percent of each class. Class and percent are NODATA
        where the coverage is 0.
    """
    out = np.full((PROBABILITIES + classes, block.height, block.width), NODATA, np.uint8)
    out[COVERAGE] = 0
    # Of the rows that the windows at hand may still reach: the sums of each class, and of the weights.
    sums = np.zeros((classes + 1, layout.window, block.width), np.int64)  # [K + 1, S, w]
    bits = np.zeros((layout.window, block.width), np.uint8)  # [S, w]
    weight, top = weights(layout.window), 0
    for window, probabilities, coverage in seen:
        if window.row != top:
            _finish(out, sums, bits, top - block.row, min(window.row - top, layout.window))
            top = _advance(sums, bits, window.row - top, window.row)
        left, right = max(window.col, block.col), min(window.col + layout.window, block.col + block.width)
        here, there = slice(left - block.col, right - block.col), slice(left - window.col, right - window.col)
        sums[:classes, :, here] += probabilities[:, :, there] * weight[:, there]
        sums[classes, :, here] += one * weight[:, there]
        bits[:, here] |= coverage[:, there]
    _finish(out, sums, bits, top - block.row, layout.window)
    return out


def _advance(sums: NDArray[np.int64], bits: NDArray[np.uint8], step: int, top: int) -> int:
    """Moves the strip down by `step` rows, to begin at `top`."""
    keep = max(bits.shape[0] - step, 0)
    for strip in (sums, bits[None]):
        strip[:, :keep] = strip[:, bits.shape[0] - keep :].copy()
        strip[:, keep:] = 0
    return top


def _finish(out: NDArray[np.uint8], sums: NDArray[np.int64], bits: NDArray[np.uint8], row: int, count: int) -> None:
    """Writes the first `count` rows of the strip, which lie at `row` of the block, as far as they are in it."""
    low, high = max(row, 0), min(row + count, out.shape[1])
    if low >= high:
        return
    strip = slice(low - row, high - row)
    seen = bits[strip] != 0  # [h, w]
    total = np.maximum(sums[-1, strip], 1)
    percent = ((100 * sums[:-1, strip] + total // 2) // total).astype(np.uint8)  # [K, h, w]
    best = sums[:-1, strip].argmax(0)  # [h, w]
    chosen = np.take_along_axis(percent, best[None], 0)[0]
    for band, values in ((CLASS, best), (CONFIDENCE, chosen)):
        out[band, low:high] = np.where(seen, values, NODATA)
    out[COVERAGE, low:high] = bits[strip]
    out[PROBABILITIES:, low:high] = np.where(seen, percent, NODATA)
