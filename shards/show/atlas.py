"""The map of all footprints: one of everything, and one of each place where places lie far apart.

Longitude and latitude are drawn with the same scale in both directions at the middle of each map. Where footprints are
too small or too many to be told apart, the map shows squares of the ground, each in the colour of one of its samples.

Letters in the comments: P polygons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from shards.order import Use, hash64
from shards.pictures import plain

COLOURS = {"train": "#0072b2", "val": "#e69f00", "test": "#009e73", "buffer": "#999999", "": "#444444"}
OTHERS = ("#cc79a7", "#56b4e9", "#d55e00", "#b8a800")
DRAWN = 5000  # polygons in one map
LEAST = 3  # pixels: smaller polygons are not told apart
SQUARE = 5  # pixels
PLACES, ACROSS, FEW = 6, 3, 3  # maps of single places, how many of them side by side, footprints that need none
NEAR = 10  # sides of a footprint: what lies nearer belongs to one place
APART, LARGE = 40, 0.25  # of the width of all: nearer places cannot be marked one by one, wider ones need no zoom
CELLS = 20_000  # of the search for places
DPI, WIDE, WORLD, PLACE = 100, 11.0, 5.2, 3.4  # pixels per inch; inches: width, height of the map of all, of the others
KM = 111.195  # of a degree of latitude, on a sphere of the earth's mean radius

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Footprints:
    """Different footprints, on one side of the date line.

    `shapes` [P], `bounds` [P, 4] in degrees (west may exceed 180), `split` [P] as a number of `splits`, `count` [P] of
    samples, `group` [P].
    """

    shapes: NDArray[np.object_]
    bounds: Floats
    split: Ints
    count: Ints
    group: NDArray[np.object_]
    splits: tuple[str, ...]

    @staticmethod
    def of(rows: pa.Table) -> Footprints | None:
        """Of the columns `geometry`, `split` and `group` of a manifest; None where no row has a geometry."""
        rows = rows.filter(pc.is_valid(rows["geometry"]))
        if not rows.num_rows:
            return None
        encoded = [pc.dictionary_encode(rows[name].combine_chunks().fill_null("")) for name in ("split", "group")]
        splits = tuple(encoded[0].dictionary.to_pylist())
        prints = pc.dictionary_encode(rows["geometry"].combine_chunks())
        pairs = np.asarray(prints.indices, np.int64) * len(splits) + np.asarray(encoded[0].indices, np.int64)
        pairs, first, count = np.unique(pairs, return_index=True, return_counts=True)
        whole = shapely.from_wkb(prints.dictionary.to_numpy(zero_copy_only=False))[pairs // len(splits)]
        shapes, owner = shapely.get_parts(whole, return_index=True)
        shapes = _unrolled(shapes)
        groups = encoded[1].dictionary.to_numpy(zero_copy_only=False)[np.asarray(encoded[1].indices)[first]]
        bounds = shapely.bounds(shapes)
        return Footprints(shapes, bounds, (pairs % len(splits))[owner], count[owner], groups[owner], splits)

    def of_places(self, chosen: NDArray[np.bool_]) -> Footprints:
        """Only the `chosen` [P] of them."""
        shapes, bounds, split = self.shapes[chosen], self.bounds[chosen], self.split[chosen]
        return Footprints(shapes, bounds, split, self.count[chosen], self.group[chosen], self.splits)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """West, south, east, north of them all."""
        (west, south), (east, north) = self.bounds[:, :2].min(0), self.bounds[:, 2:].max(0)
        return float(west), float(south), float(east), float(north)


def _unrolled(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    """The same polygons; where all fit into half the world across the date line, those west of it beyond 180."""
    west = shapely.bounds(shapes)[:, 0]
    known = np.unique(west)
    gaps = np.diff(known)
    if not gaps.size or gaps.max() <= 180:
        return shapes
    beyond = west < known[gaps.argmax() + 1]
    moved = shapes.copy()
    moved[beyond] = shapely.transform(shapes[beyond], lambda points: points + np.array([360.0, 0.0]))
    return moved


def places(found: Footprints) -> Ints:
    """The place [P] of each footprint, 0 the one with most samples.

    What lies near each other is one place. How near is doubled until there are few places, and far enough apart to be
    marked on one map, but not so often that a place becomes a large part of it; then all is one.
    """
    west, south, east, north = found.bounds.T
    squeeze = _squeeze((south.min() + north.max()) / 2)
    points = np.stack([(west + east) / 2 * squeeze, (south + north) / 2])
    across = float(np.ptp(points, axis=1).max())
    side = NEAR * max(float(np.median(np.maximum((east - west) * squeeze, north - south))), 1e-7)
    cells, cell = _cells(np.floor(points / side))
    best = np.zeros(len(west), np.int64)
    while side <= across * LARGE:
        if cells.shape[1] <= CELLS:
            place, widest = _blocks(cells)
            if widest * side > across * LARGE:
                break
            best = place[cell]
            if place.max() < PLACES and side >= across / APART:
                break
        cells, coarser = _cells(cells // 2)
        side, cell = 2 * side, coarser[cell]
    samples = np.bincount(best, found.count)
    rank = np.empty(len(samples), np.int64)
    rank[np.argsort(-samples, kind="stable")] = np.arange(len(samples))
    return np.asarray(rank[best])


def _cells(corners: Floats) -> tuple[Floats, Ints]:
    """Different squares [2, N] of those given [2, P], and which of them each of these is."""
    number = (corners[0] - corners[0].min()) * (np.ptp(corners[1]) + 1) + corners[1] - corners[1].min()
    _, first, which = np.unique(number, return_index=True, return_inverse=True)
    return corners[:, first], which


def _blocks(cells: Floats) -> tuple[Ints, float]:
    """To which block squares of side 1 at `cells` [2, N] join, also over corners, and how wide the widest block is."""
    blocks = shapely.get_parts(shapely.union_all(shapely.box(*(cells - 0.01), *(cells + 1.01))))
    inside, block = shapely.STRtree(blocks).query(shapely.points(*(cells + 0.5)), predicate="within")
    number = np.empty(cells.shape[1], np.int64)
    number[inside] = block
    west, south, east, north = shapely.bounds(blocks).T
    return number, float(np.maximum(east - west, north - south).max())


def atlas(rows: pa.Table) -> Figure | None:
    """The map of a manifest's rows (columns `geometry`, `split`, `group`); None where none has a footprint."""
    found = Footprints.of(rows)
    if found is None:
        return None
    place = places(found)
    total = int(place.max()) + 1
    # A place of a few windows needs no map of its own.
    close = [found.of_places(place == number) for number in range(min(total, PLACES))] if total > 1 else []
    close = [one for one in close if len(one.shapes) > FEW]
    rows_of_maps = -(-len(close) // ACROSS)
    figure = Figure(figsize=(WIDE, WORLD + PLACE * rows_of_maps), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows_of_maps, ACROSS, height_ratios=[WORLD, *[PLACE] * rows_of_maps])
    axes = figure.add_subplot(grid[0, :])
    _draw(axes, found, WIDE / WORLD)
    for number, one in enumerate(close):
        letter = chr(ord("A") + number)
        _mark(axes, one, letter)
        small = figure.add_subplot(grid[1 + number // ACROSS, number % ACROSS])
        _draw(small, one, WIDE / ACROSS / PLACE)
        small.set_title(plain(f"{letter}  {_named(one)}"), fontsize=9, loc="left")
    if close and total > len(close):
        axes.set_title(f"{total} places, {len(close)} of them below", fontsize=9, loc="left")
    figure.legend(handles=_legend(found, rows), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return figure


def _squeeze(latitude: float) -> float:
    """Length of a degree of longitude, in degrees of latitude."""
    return float(np.cos(np.radians(min(abs(latitude), 85.0))))


def _colours(splits: Sequence[str]) -> list[tuple[float, float, float]]:
    strange = [split for split in splits if split not in COLOURS]
    table = {**COLOURS, **{split: OTHERS[number % len(OTHERS)] for number, split in enumerate(strange)}}
    return [to_rgb(table[split]) for split in splits]


def _legend(found: Footprints, rows: pa.Table) -> list[Patch]:
    counts = {item["values"] or "": item["counts"] for item in rows["split"].value_counts().to_pylist()}
    colours = dict(zip(found.splits, _colours(found.splits), strict=True))
    order = [split for split in (*COLOURS, *found.splits) if split in colours]
    names = {split: split or "no split" for split in order}
    return [Patch(color=colours[split], label=plain(f"{names[split]}: {counts[split]:,}")) for split in names]


def _named(one: Footprints) -> str:
    groups = np.unique(one.group[one.group != ""].astype(str))
    name = ", ".join(groups) if 1 <= len(groups) <= 2 else f"{len(groups)} groups" if len(groups) else ""
    return ", ".join(part for part in (name, f"{one.count.sum():,} samples") if part)


def _draw(axes: Axes, found: Footprints, ratio: float) -> None:
    """Footprints on a graticule, in a frame `ratio` times as wide as high."""
    west, south, east, north = _frame(found.extent, ratio)
    squeeze = _squeeze((south + north) / 2)
    pixel = (north - south) / (0.8 * DPI * (WORLD if ratio > 1.5 else PLACE))
    sides = np.maximum((found.bounds[:, 2] - found.bounds[:, 0]) * squeeze, found.bounds[:, 3] - found.bounds[:, 1])
    if len(sides) <= DRAWN and np.median(sides) >= LEAST * pixel:
        _polygons(axes, found)
    else:
        _squares(axes, found, (west, south, east, north), SQUARE * pixel)
    axes.set(xlim=(west, east), ylim=(south, north))
    axes.set_aspect(1 / squeeze, adjustable="box")
    most = 6 if ratio > 1.5 else 4
    axes.set_xticks(*_degrees(west, east, most, "EW"))
    axes.set_yticks(*_degrees(south, north, most, "NS"))
    axes.tick_params(labelsize=8)
    axes.grid(color="#c5ccd3", linewidth=0.6)
    axes.set_axisbelow(True)
    _scale(axes, (west, south, east, north), squeeze)


def _frame(extent: tuple[float, float, float, float], ratio: float) -> tuple[float, float, float, float]:
    """The extent with some space around it, widened or heightened to the shape of the map."""
    west, south, east, north = extent
    squeeze = _squeeze((south + north) / 2)
    height = max(1.12 * (north - south), 1.12 * (east - west) * squeeze / ratio, 1e-5)
    height = min(height, 180.0)
    width = max(min(height * ratio / squeeze, 360.0), east - west)
    x, y = (west + east) / 2, float(np.clip((south + north) / 2, -90 + height / 2, 90 - height / 2))
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _degrees(low: float, high: float, most: int, letters: str) -> tuple[list[float], list[str]]:
    """Round degrees between two, at most so many, and how they are written: all with the same number of decimals."""
    step = 30.0 if high - low <= 30 * most else 60.0
    wide, fine = np.arange(-180, 541, step).tolist(), MaxNLocator(most, steps=[1, 2, 3, 5, 10])
    ticks = [tick for tick in (wide if high - low > 90 else fine.tick_values(low, high)) if low <= tick <= high]
    decimals = max(len(f"{tick:.7f}".rstrip("0").partition(".")[2]) for tick in [0.0, *ticks])
    turned = [(tick + 180) % 360 - 180 if letters == "EW" else tick for tick in ticks]
    written = [f"{abs(tick):.{decimals}f}\N{DEGREE SIGN}" for tick in turned]
    sides = ["" if tick in (0, -180) else letters[int(tick < 0)] for tick in turned]
    return ticks, [text + side for text, side in zip(written, sides, strict=True)]


def _polygons(axes: Axes, found: Footprints) -> None:
    rings = [shapely.get_coordinates(shapely.get_exterior_ring(shape)) for shape in found.shapes]
    colours = np.array(_colours(found.splits))[found.split]
    faces = np.column_stack([colours, np.full(len(colours), 0.35)])
    axes.add_collection(PolyCollection(rings, facecolors=faces, edgecolors=colours, linewidths=0.5))


def _squares(axes: Axes, found: Footprints, frame: tuple[float, float, float, float], side: float) -> None:
    """Squares of ground, `side` degrees of latitude wide, in the colour of one sample; more opaque for more samples."""
    west, south, east, north = frame
    across = side / _squeeze((south + north) / 2)
    shape = int(np.ceil((north - south) / side)), int(np.ceil((east - west) / across))
    row = ((found.bounds[:, 1] + found.bounds[:, 3]) / 2 - south) / side
    col = ((found.bounds[:, 0] + found.bounds[:, 2]) / 2 - west) / across
    cell = np.ravel_multi_index((row.astype(np.int64), col.astype(np.int64)), shape, mode="clip")
    size = shape[0] * shape[1]
    counts = np.stack([np.bincount(cell, found.count * (found.split == k), size) for k in range(len(found.splits))])
    total = counts.sum(0)
    opaque = np.where(total > 0, 0.45 + 0.55 * np.log1p(total) / np.log1p(max(total.max(), 2)), 0)
    # One of its samples stands for each square, so that a rare split shows as often as it occurs.
    drawn = (hash64(0, Use.LIMIT, np.arange(size)) >> np.uint64(11)) * 2.0**-53 * total
    split = (counts.cumsum(0) <= drawn).sum(0).clip(max=len(found.splits) - 1)
    image = np.column_stack([np.array(_colours(found.splits))[split], opaque]).reshape(*shape, 4)
    extent = (west, west + shape[1] * across, south, south + shape[0] * side)
    axes.imshow(image, origin="lower", extent=extent, interpolation="nearest", aspect="auto", zorder=2)


def _mark(axes: Axes, one: Footprints, letter: str) -> None:
    """A frame around a place on the map of all, and its letter."""
    west, south, east, north = one.extent
    low, high = axes.get_ylim()
    pad = 0.012 * (high - low)
    wide = pad / _squeeze((low + high) / 2)
    corner, width, height = (west - wide, south - pad), east - west + 2 * wide, north - south + 2 * pad
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=0.8, zorder=3))
    spot = east + wide, north + pad
    axes.annotate(letter, spot, (2, 1), textcoords="offset points", fontsize=9, weight="bold", zorder=4)


def _scale(axes: Axes, frame: tuple[float, float, float, float], squeeze: float) -> None:
    """A bar of a round number of kilometres; none on maps so wide that it would hold in the middle only."""
    west, south, east, north = frame
    if north - south > 40:
        return
    width = (east - west) * squeeze * KM
    power = 10.0 ** np.floor(np.log10(width / 4))
    length = max(step * power for step in (1, 2, 5) if step * power <= width / 4)
    x, y = west + 0.04 * (east - west), south + 0.05 * (north - south)
    end = x + length / KM / squeeze
    halo: list[AbstractPathEffect] = [withStroke(linewidth=4, foreground="white")]
    axes.plot([x, end], [y, y], color="black", linewidth=2.5, solid_capstyle="butt", zorder=4, path_effects=halo)
    text = f"{length:g} km" if length >= 1 else f"{1000 * length:g} m"
    said = axes.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8, zorder=4)
    said.set_path_effects(halo)
