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


def cut(lons: Floats, lats: Floats) -> shapely.Geometry:
    """The polygon through points on the globe, cut in two at the date line (RFC 7946, section 3.1.9).

    Args:
        lons: degrees, any turn; the first point is also the last. Between two points the way is the short one.
        lats: degrees.

    Returns:
        A Polygon, or a MultiPolygon with parts on both sides. A ring around a pole contains the pole.
    """
    lons = np.unwrap(lons, period=360)
    turns = [turn for turn in range(-720, 721, 360) if lons.min() < turn + 180 and lons.max() > turn - 180]
    around = lons[-1] - lons[0]
    if abs(around) > 180:
        # Two turns around the pole hold a whole one from date line to date line.
        lons, lats = np.append(lons, lons[1:] + around), np.append(lats, lats[1:])
        pole = np.copysign(90.0, lats.mean())
        lons, lats = np.append(lons, [lons[-1], lons[0], lons[0]]), np.append(lats, [pole, pole, lats[0]])
        turns = [int(np.copysign(360, around))]
    whole = shapely.Polygon(np.stack([lons, lats], axis=1))
    if turns == [0]:
        return whole
    parts = [_moved(whole.intersection(shapely.box(turn - 180, -90, turn + 180, 90)), -turn) for turn in turns]
    polygons = [part for part in shapely.get_parts(parts) if part.area > 1e-9 * whole.area]
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def _moved(geometry: shapely.Geometry, degrees: float) -> shapely.Geometry:
    return shapely.transform(geometry, lambda points: points + np.array([degrees, 0.0]))


@dataclass(frozen=True)
class Footprints:
    """Polygons in degrees, numbered from 0; one that was cut at the date line has two parts.

    Attributes:
        corners: [P, 2] longitude and latitude of the corners of all parts, one after the other.
        starts: [N + 1] where each part begins in them.
        owner: [N] number of the footprint that a part belongs to.
        bounds: [N, 4] west, south, east, north of each part.
        bend: [N] metres by which edges may bend away from the straight line between their corners.
    """

    corners: Floats
    starts: Ints
    owner: Ints
    bounds: Floats
    bend: Floats

    @staticmethod
    def of(polygons: NDArray[np.object_]) -> Footprints:
        """Footprints of Polygons and MultiPolygons in OGC:CRS84."""
        parts, owner = shapely.get_parts(polygons, return_index=True)
        corners, part = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
        starts = np.searchsorted(part, np.arange(len(parts) + 1))
        if not len(parts):
            return Footprints(corners, starts, owner, np.zeros((0, 4)), np.zeros(0))
        low, high = (extreme.reduceat(corners, starts[:-1]) for extreme in (np.minimum, np.maximum))
        bend = np.maximum.reduceat(_bend(corners, part), starts[:-1])
        return Footprints(corners, starts, owner, np.hstack([low, high]), bend)

    def middles(self) -> tuple[Floats, Floats]:
        """Longitude and latitude of a point amid each footprint (of its first part)."""
        west, south, east, north = self.bounds[np.unique(self.owner, return_index=True)[1]].T
        return (west + east) / 2, (south + north) / 2

    def near(self, mine: Ints, others: Ints, metres: float) -> Bools:
        """Which of the footprints `mine` touch one of `others`, or lie nearer to one than `metres` (up to 100 km).

        In doubt the answer is yes: edges are taken to bend, and a margin of one metre and half a thousandth is added.
        """
        limit = metres * (1 + RELATIVE_MARGIN) + MARGIN
        theirs = self._parts(others)
        hit = np.zeros(self._count, np.bool_)
        if theirs.size:
            tree = shapely.STRtree(shapely.box(*self.bounds[theirs].T))
            bend = self.bend[theirs].max()
            for cell in self._cells(self._parts(mine)):
                reach = limit + bend + self.bend[cell].max()
                around = theirs[np.unique(tree.query(_boxes(self.bounds[cell], reach))[1])]
                if around.size:
                    within = self._within(cell, around, limit + self.bend[cell].max() + self.bend[around].max())
                    hit[self.owner[cell[within]]] = True
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


def _bend(corners: Floats, part: Ints) -> Floats:
    """Metres [P] by which the edge from each corner to the next, straight in degrees, strays from a straight line.

    A parallel's curvature is tan(latitude) / radius, so an edge that runs L metres east bends by L^2 / 8 times that.
    """
    lon, lat = np.radians(corners.T)
    low, high = np.minimum(np.abs(lat[1:]), np.abs(lat[:-1])), np.maximum(np.abs(lat[1:]), np.abs(lat[:-1]))
    east = RADIUS * np.abs(np.diff(lon)) * np.cos(low)
    bend = np.minimum(east**2 * np.tan(high) / (8 * RADIUS), east / 2)
    return np.append(np.where(part[1:] == part[:-1], bend, 0.0), 0.0)


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
