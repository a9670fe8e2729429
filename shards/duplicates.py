"""Duplicates: ground that two scenes of one sensor show at the same moment, under two names.

Sentinel-2 tiles of one datatake overlap their neighbours by some 10 km with the same pixels, and scenes get listed
twice. Such windows would be learned from twice, and may end up on two sides of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

COVERED, SECONDS = 0.5, 60.0
ROUNDING = 1e-6  # of a window's area

Geometries = NDArray[np.object_]


@dataclass(frozen=True)
class Outline:
    """Where a planned view and its windows lie.

    Args:
        footprint: polygon of the whole scene in OGC:CRS84, cut at the date line; None without CRS.
        time: of the reference scene; None when it is not known.
        windows: makes the polygons of its windows, in their order. Called at most once, and only when the scene
            overlaps another of the same time. Windows may reach over the scene's edge; what lies beyond is not counted.
    """

    footprint: shapely.Geometry | None
    time: datetime | None
    windows: Callable[[], Sequence[Any] | Geometries]


def duplicates(views: Sequence[Outline], covered: float = COVERED, seconds: float = SECONDS) -> dict[int, list[int]]:
    """Windows that earlier views show already: view number -> window numbers, both in order.

    A window goes when at least `covered` of its part inside the scene lies under windows that stay, of earlier views
    (by their place in `views`) whose times differ by at most `seconds`. Views without time or footprint are never
    compared, and windows of one view never with each other.
    """
    dropped: dict[int, list[int]] = {}
    for run in _runs(views, seconds):
        kept: dict[int, Geometries] = {}
        for number, earlier in _overlapping(views, run, seconds):
            windows = _inside(views[number])
            under = np.concatenate([kept[other] for other in earlier]) if earlier else np.empty(0, object)
            gone = _covered(windows, under, covered)
            kept[number] = windows[~gone]
            if gone.any():
                dropped[number] = np.flatnonzero(gone).tolist()
    return dict(sorted(dropped.items()))


def _runs(views: Sequence[Outline], seconds: float) -> Iterator[list[int]]:
    """Numbers of views that follow each other in time without a longer gap, in the order of `views`."""
    known = [(view.time.timestamp(), i) for i, view in enumerate(views) if view.time and view.footprint is not None]
    times = np.array([time for time, _ in sorted(known)])
    numbers = np.array([number for _, number in sorted(known)], np.int64)
    yield from (sorted(run.tolist()) for run in np.split(numbers, np.flatnonzero(np.diff(times) > seconds) + 1))


def _overlapping(views: Sequence[Outline], run: Sequence[int], seconds: float) -> Iterator[tuple[int, list[int]]]:
    """Views of a run that share ground with another at the same time, each with the earlier ones that it shares."""
    prints = np.array([views[number].footprint for number in run], object)
    times = np.array([views[number].time.timestamp() for number in run])  # type: ignore[union-attr]
    a, b = shapely.STRtree(prints).query(prints, predicate="intersects")
    same = (a > b) & (np.abs(times[a] - times[b]) <= seconds)
    a, b = a[same], b[same]
    share = shapely.area(shapely.intersection(prints[a], prints[b])) > 0  # neighbours only touch
    earlier: dict[int, list[int]] = {number: [] for number in np.union1d(a[share], b[share]).tolist()}
    for later, before in zip(a[share].tolist(), b[share].tolist(), strict=True):
        earlier[later].append(run[before])
    yield from ((run[number], sorted(found)) for number, found in earlier.items())


def _inside(view: Outline) -> Geometries:
    """The parts of a view's windows inside its scene."""
    return np.asarray(shapely.intersection(np.asarray(view.windows(), object), view.footprint))


def _covered(windows: Geometries, under: Geometries, least: float) -> NDArray[np.bool_]:
    """Windows of which at least the share `least` lies under the polygons `under`, taken together."""
    gone = np.zeros(len(windows), np.bool_)
    number, other = shapely.STRtree(under).query(windows, predicate="intersects")
    areas = shapely.area(windows)
    for i in np.unique(number):
        seen = shapely.union_all(shapely.intersection(windows[i], under[other[number == i]]))
        gone[i] = 0 < (least - ROUNDING) * areas[i] <= shapely.area(seen)
    return gone
