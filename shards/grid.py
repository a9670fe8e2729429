"""Grid: where the pixels of a raster lie. All tiling arithmetic, for building shards and for predicting maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels: `height` x `width` from (`row`, `col`); it may reach over the grid's edge."""

    row: int
    col: int
    height: int
    width: int

    def clipped(self, height: int, width: int) -> Window | None:
        """The part inside a raster of `height` x `width`; None when there is none."""
        top, left = max(self.row, 0), max(self.col, 0)
        bottom, right = min(self.row + self.height, height), min(self.col + self.width, width)
        return Window(top, left, bottom - top, right - left) if top < bottom and left < right else None

    def within(self, outer: Window) -> tuple[slice, slice]:
        """Rows and columns of this window in an array of the window `outer`, which contains it."""
        top, left = self.row - outer.row, self.col - outer.col
        return slice(top, top + self.height), slice(left, left + self.width)

    @staticmethod
    def around(windows: Sequence[Window]) -> Window:
        """The smallest window that holds all of them."""
        top, left = min(window.row for window in windows), min(window.col for window in windows)
        bottom = max(window.row + window.height for window in windows)
        right = max(window.col + window.width for window in windows)
        return Window(top, left, bottom - top, right - left)


@dataclass(frozen=True)
class Grid:
    """H x W pixels, an affine transform and a CRS.

    Args:
        transform: (a, b, c, d, e, f) with x = a col + b row + c and y = d col + e row + f, pixel corners at integers.
        height: rows, at least 1.
        width: columns, at least 1.
        crs: as "EPSG:..." or WKT; None where the files carry no georeference.

    Raises:
        ValueError: no pixels, or a transform that collapses them.
    """

    transform: Transform
    height: int
    width: int
    crs: str | None

    def __post_init__(self) -> None:
        """Refuse what cannot be a grid."""
        a, b, _, d, e, _ = self.transform
        if self.height < 1 or self.width < 1 or a * e - b * d == 0:
            raise ValueError(f"not a grid: {self.height} x {self.width} pixels, transform {self.transform}")

    @property
    def resolution(self) -> float:
        """Side of a pixel in the CRS's unit: the square root of its area."""
        a, b, _, d, e, _ = self.transform
        return math.sqrt(abs(a * e - b * d))

    def xy(self, row: float, col: float) -> tuple[float, float]:
        """Coordinates of a point given in pixels."""
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def rowcol(self, x: float, y: float) -> tuple[float, float]:
        """Pixel position (row, col) of a point given in coordinates; the inverse of `xy`."""
        a, b, c, d, e, f = self.transform
        det = a * e - b * d
        return (a * (y - f) - d * (x - c)) / det, (e * (x - c) - b * (y - f)) / det

    def corners(self) -> list[tuple[float, float]]:
        """The four outer corners, in order around the grid."""
        pixels = ((0, 0), (0, self.width), (self.height, self.width), (self.height, 0))
        return [self.xy(*pixel) for pixel in pixels]

    def edge(self, steps: int = 8) -> list[tuple[float, float]]:
        """Points around the outer edge, `steps` per side: straight here, a curve in another CRS."""
        marks = [step / steps for step in range(steps)]
        pixels = [(0.0, t * self.width) for t in marks] + [(t * self.height, float(self.width)) for t in marks]
        pixels += [(float(self.height), (1 - t) * self.width) for t in marks]
        pixels += [((1 - t) * self.height, 0.0) for t in marks]
        return [self.xy(row, col) for row, col in pixels]

    def count(self, size: int, stride: int) -> int:
        """How many windows there are."""
        return len(_starts(self.height, size, stride)) * len(_starts(self.width, size, stride))

    def nth(self, number: int, size: int, stride: int) -> Window:
        """The window called `number`, counted row by row."""
        cols = _starts(self.width, size, stride)
        row, col = divmod(number, len(cols))
        return Window(_starts(self.height, size, stride)[row], cols[col], size, size)

    def windows(self, size: int, stride: int | None = None) -> Iterator[Window]:
        """Windows of `size` x `size` that cover the grid row by row; those at the edge reach over it.

        Args:
            size: pixels on a side.
            stride: pixels from one window to the next, at most `size`; `size` when None.
        """
        step = stride or size
        return (self.nth(number, size, step) for number in range(self.count(size, step)))

    def window(self, window: Window) -> Grid:
        """The grid of a window."""
        a, b, _, d, e, _ = self.transform
        x, y = self.xy(window.row, window.col)
        return Grid((a, b, x, d, e, y), window.height, window.width, self.crs)

    def inside(self, other: Grid, tolerance: float = 0.05) -> Window | None:
        """This grid as a window of `other`, when both share CRS and pixels to within `tolerance` of a pixel.

        Files of one scene often differ in the last bits of their transforms; such grids are equal, and nothing is
        resampled.
        """
        if self.crs != other.crs:
            return None
        found = [other.rowcol(x, y) for x, y in self.corners()]
        row, col = round(found[0][0]), round(found[0][1])
        wanted = [(row, col), (row, col + self.width), (row + self.height, col + self.width), (row + self.height, col)]
        off = max(abs(f - w) for pair, goal in zip(found, wanted, strict=True) for f, w in zip(pair, goal, strict=True))
        return Window(row, col, self.height, self.width) if off <= tolerance else None


def _starts(length: int, size: int, stride: int) -> range:
    if not 0 < stride <= size:
        raise ValueError(f"stride {stride}: must be between 1 and the window's size {size}")
    return range(0, max(length - size + stride, 1), stride)
