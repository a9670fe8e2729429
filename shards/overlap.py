"""How much ground some footprints share with others, of which there may be millions.

Areas are measured on Lambert's cylindrical equal-area projection of the WGS 84 ellipsoid (Snyder 1987, "Map
Projections: A Working Manual", section 10), in which footprints that were cut at the date line stay where they are. The
others are looked at batch by batch; of each only what lies within the footprints in question is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from shards.ground import FLATTENING, RADIUS, Bools, Floats, Footprints, Ints

Geometries = NDArray[np.object_]

LEAST = 1.5e-5  # of a footprint's area: less than a pixel of a tile of 256 x 256 is how neighbours meet
MARGIN = 10.0  # metres around a footprint in which neighbours are looked for
AROUND = 2 * np.pi * RADIUS


@dataclass(frozen=True)
class Shared:
    """What N footprints share with others.

    Attributes:
        overlapping: [N] those of which more than a pixel lies on the others' ground.
        adjoining: [N] those that do not overlap any, but touch one, or lie nearer than a metre.
        km2: ground that is both theirs and the others', counted once.
    """

    overlapping: Bools
    adjoining: Bools
    km2: float


def square_km(footprints: Geometries) -> float:
    """Ground under footprints (OGC:CRS84), counted once, in km2."""
    return _union_area(_flat(footprints))


def shared(mine: Geometries, others: Iterable[Geometries]) -> Shared:
    """What the footprints `mine` share with `others`, which come in batches; all in OGC:CRS84, cut at the date line."""
    flat = _flat(mine)
    areas, tree = shapely.area(flat), shapely.STRtree(flat)
    covered: Geometries = np.full(len(mine), shapely.Polygon(), np.object_)
    near = np.zeros(len(mine), np.bool_)
    for batch in others:
        theirs = _flat(batch)
        number, own = _candidates(tree, theirs)
        todo = shapely.area(covered[own]) < (1 - LEAST) * areas[own]  # the rest can be covered no further
        number, own = number[todo], own[todo]
        meet = shapely.intersects(theirs[number], flat[own])
        _cover(covered, own[meet], _common(theirs[number[meet]], flat[own[meet]]))
        free = (shapely.area(covered[own]) <= LEAST * areas[own]) & ~near[own]
        near |= _adjoining(mine, batch, own[free], number[free])
    overlapping = shapely.area(covered) > LEAST * areas
    return Shared(overlapping, near & ~overlapping, _union_area(covered[overlapping]))


def _candidates(tree: shapely.STRtree, theirs: Geometries) -> tuple[Ints, Ints]:
    """Pairs (number among theirs, among mine) whose boxes meet or nearly do, over the date line too."""
    west, south, east, north = shapely.bounds(theirs).T
    # The projection widens x by 1 / cos(latitude), and narrows y.
    wide = MARGIN / np.sqrt(np.maximum(1 - (np.maximum(np.abs(south), np.abs(north)) / RADIUS) ** 2, 1e-4))
    boxes = shapely.box(west - wide, south - MARGIN, east + wide, north + MARGIN)
    found = [tree.query(boxes)]
    for turn in (-AROUND, AROUND):
        at_the_line = np.flatnonzero((west - wide < -AROUND / 2) if turn > 0 else (east + wide > AROUND / 2))
        moved = shapely.transform(boxes[at_the_line], lambda points, turn=turn: points + np.array([turn, 0.0]))
        number, own = tree.query(moved)
        found.append(np.stack([at_the_line[number], own]))
    number, own = np.unique(np.concatenate(found, axis=1), axis=1)
    return number, own


def _common(a: Geometries, b: Geometries) -> Geometries:
    """Intersections, pair by pair; of equal footprints, as of one place on many dates, without looking further."""
    equal = shapely.equals_exact(a, b)
    found = a.copy()
    found[~equal] = shapely.intersection(a[~equal], b[~equal])
    return found


def _cover(covered: Geometries, own: Ints, pieces: Geometries) -> None:
    """Add pieces to what is covered of the footprints `own`."""
    order = np.argsort(own, kind="stable")
    own, pieces = own[order], pieces[order]
    unique, first, count = np.unique(own, return_index=True, return_counts=True)
    alone = count == 1
    covered[unique[alone]] = shapely.union(covered[unique[alone]], pieces[first[alone]])
    for footprint, start, many in zip(unique[~alone], first[~alone], count[~alone], strict=True):
        covered[footprint] = shapely.union_all([covered[footprint], *pieces[start : start + many]])


def _adjoining(mine: Geometries, theirs: Geometries, own: Ints, number: Ints) -> Bools:
    """Which of all of mine touch one of theirs; `own` and `number` say where to look."""
    found = np.zeros(len(mine), np.bool_)
    if len(own):
        ours, others = np.unique(own), np.unique(number)
        footprints = Footprints.of(np.concatenate([mine[ours], theirs[others]]))
        found[ours] = footprints.near(np.arange(len(ours)), np.arange(len(ours), len(ours) + len(others)), 0.0)
    return found


def _flat(footprints: Geometries) -> Geometries:
    """In metres on the projection, valid."""
    flat = np.asarray(shapely.transform(footprints, _project))
    broken = ~shapely.is_valid(flat)
    flat[broken] = shapely.make_valid(flat[broken])
    return flat


def _project(points: Floats) -> Floats:
    lon, lat = np.radians(points.T)
    e = np.sqrt(FLATTENING * (2 - FLATTENING))
    sine = np.sin(lat)
    q = (1 - e**2) * (sine / (1 - (e * sine) ** 2) + np.arctanh(e * sine) / e)
    return np.stack([RADIUS * lon, RADIUS * q / 2], axis=1)


def _union_area(flat: Geometries) -> float:
    # Not union_all: a hundred thousand footprints that lie apart take it a hundred times as long.
    return float(shapely.area(shapely.disjoint_subset_union_all(flat)) / 1e6) if len(flat) else 0.0
