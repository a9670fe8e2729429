"""Footprints on the ground: which of many polygons lie nearer to some of the others than so many metres.

Footprints come in degrees (OGC:CRS84), where metres cannot be measured and the date line tears neighbours apart. So
they are looked at in cells of about one degree: corners become points of the WGS 84 ellipsoid in space, and these fall
straight down onto a plane that touches the earth in the cell. A fall onto a plane makes no distance longer, and a chord
is shorter than the way over the ground, so a distance found here is never more than the true one; over the few hundred
kilometres that one cell looks at it is less by at most a thousandth. The pole and the date line are places like others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CELL = 1.0  # degrees
METRES_PER_DEGREE = 110_500.0  # the least that a degree of latitude measures
RADIUS, FLATTENING = 6_378_137.0, 1 / 298.257223563  # of WGS 84
# A map projection may show a distance shorter than it is (UTM by 0.04 %), and the same edge read twice is not the same
# number: what is nearer by less than this counts as near.
RELATIVE_MARGIN, MARGIN = 5e-4, 1.0


@dataclass(frozen=True)
class Footprints:
    """Polygons in degrees, numbered from 0; one that was cut at the date line has two parts.

    Attributes:
        corners: [P, 2] longitude and latitude of the corners of all parts, one after the other.
        starts: [N + 1] where each part begins in them.
        owner: [N] number of the footprint that a part belongs to.
        bounds: [N, 4] west, south, east, north of each part.
        bend: metres by which an edge may bend away from the straight line between its corners.
    """

    corners: Floats
    starts: Ints
    owner: Ints
    bounds: Floats
    bend: float

    @staticmethod
    def of(polygons: NDArray[np.object_]) -> Footprints:
        """Footprints of Polygons and MultiPolygons in OGC:CRS84."""
        parts, owner = shapely.get_parts(polygons, return_index=True)
        corners, part = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
        starts = np.searchsorted(part, np.arange(len(parts) + 1))
        return Footprints(corners, starts, owner, shapely.bounds(parts).reshape(-1, 4), _bend(corners, part))

    def middles(self) -> tuple[Floats, Floats]:
        """Longitude and latitude of a point amid each footprint (of its first part)."""
        west, south, east, north = self.bounds[np.unique(self.owner, return_index=True)[1]].T
        return (west + east) / 2, (south + north) / 2

    def near(self, mine: Ints, others: Ints, metres: float) -> Bools:
        """Which of the footprints `mine` touch one of `others`, or lie nearer to one than `metres` (up to 100 km).

        In doubt the answer is yes: edges are taken to bend, and a margin of one metre and half a thousandth is added.
        """
        limit = metres * (1 + RELATIVE_MARGIN) + MARGIN + 2 * self.bend
        theirs = self._parts(others)
        hit = np.zeros(self._count, np.bool_)
        if theirs.size:
            tree = shapely.STRtree(shapely.box(*self.bounds[theirs].T))
            for cell in self._cells(self._parts(mine)):
                around = np.unique(tree.query(_boxes(self.bounds[cell], limit))[1])
                if around.size:
                    hit[self.owner[cell[self._within(cell, theirs[around], limit)]]] = True
        return np.asarray(hit[mine])

    @property
    def _count(self) -> int:
        return int(self.owner.max(initial=-1)) + 1

    def _parts(self, numbers: Ints) -> Ints:
        wanted = np.zeros(self._count, np.bool_)
        wanted[numbers] = True
        return np.flatnonzero(wanted[self.owner])

    def _cells(self, parts: Ints) -> Iterator[Ints]:
        """The parts, cell by cell; cells are as wide on the ground at every latitude."""
        west, south, east, north = self.bounds[parts].T
        row = np.floor((south + north) / 2 / CELL)
        width = CELL / np.cos(np.radians(np.clip((row + 0.5) * CELL, -89.5, 89.5)))
        col = np.floor((west + east) / 2 / width)
        order = np.lexsort((col, row))
        ends = np.flatnonzero(np.diff(row[order]) != 0) + 1, np.flatnonzero(np.diff(col[order]) != 0) + 1
        yield from (cell for cell in np.split(parts[order], np.union1d(*ends)) if cell.size)

    def _within(self, mine: Ints, theirs: Ints, limit: float) -> Bools:
        """Which of the parts `mine` lie within `limit` metres of one of `theirs`."""
        middle = _in_space(self._corners(mine)[0]).mean(axis=0)
        up = middle / np.linalg.norm(middle)
        across = np.cross(up, np.eye(3)[np.abs(up).argmin()])
        across /= np.linalg.norm(across)
        plane = np.stack([across, np.cross(up, across)], axis=1)
        tree = shapely.STRtree(self._fall(theirs, plane))
        found = tree.query_nearest(self._fall(mine, plane), max_distance=limit, all_matches=False)[0]
        return np.isin(np.arange(len(mine)), found)

    def _fall(self, parts: Ints, plane: Floats) -> NDArray[np.object_]:
        corners, part = self._corners(parts)
        return np.asarray(shapely.polygons(shapely.linearrings(_in_space(corners) @ plane, indices=part)))

    def _corners(self, parts: Ints) -> tuple[Floats, Ints]:
        """Corners of some parts, and which of them (from 0) each belongs to."""
        counts = self.starts[parts + 1] - self.starts[parts]
        part = np.repeat(np.arange(len(parts)), counts)
        firsts = np.cumsum(counts) - counts
        return self.corners[self.starts[parts][part] + np.arange(len(part)) - firsts[part]], part


def _in_space(corners: Floats) -> Floats:
    """Points [P, 2] in degrees as points [P, 3] of the ellipsoid, in metres from the earth's middle."""
    lon, lat = np.radians(corners.T)
    eccentricity2 = FLATTENING * (2 - FLATTENING)
    normal = RADIUS / np.sqrt(1 - eccentricity2 * np.sin(lat) ** 2)
    ring = normal * np.cos(lat)
    return np.stack([ring * np.cos(lon), ring * np.sin(lon), normal * (1 - eccentricity2) * np.sin(lat)], axis=1)


def _bend(corners: Floats, part: Ints) -> float:
    """The most metres between an edge that is straight in degrees and the straight line between its corners.

    A parallel's curvature is tan(latitude) / radius, so an edge of length L bends by L^2 / 8 times that.
    """
    lat = np.radians(corners[:, 1])
    lengths = np.linalg.norm(np.diff(_in_space(corners), axis=0), axis=1)[part[1:] == part[:-1]]
    steep = np.tan(np.maximum(np.abs(lat[1:]), np.abs(lat[:-1])))[part[1:] == part[:-1]]
    return float(np.minimum(lengths**2 * steep / (8 * RADIUS), lengths / 2).max(initial=0.0))


def _boxes(bounds: Floats, limit: float) -> NDArray[np.object_]:
    """The box in degrees around `bounds` [N, 4] and `limit` metres more, as it is and on either side of a full turn."""
    (west, south), (east, north) = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
    up = limit / METRES_PER_DEGREE
    highest = max(-south, north) + up
    turn = np.array([-360.0, 0.0, 360.0])
    if highest >= 89.9:  # around the pole
        return np.asarray(shapely.box(-180 + turn, south - up, 180 + turn, north + up))
    aside = up / np.cos(np.radians(highest))
    return np.asarray(shapely.box(west - aside + turn, south - up, east + aside + turn, north + up))
