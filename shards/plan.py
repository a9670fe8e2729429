"""The plan of a dataset: which samples, in which shard, decided from headers without reading a pixel.

Every place is opened once for its grids. Each acquisition of the reference sensor is a view: one scene per sensor and
the grid on which all of them will be read, cut into windows. The windows of all views, in order, are dealt into shards
of a fixed number. So a shard is a fixed list of (view, window) whatever is found in the pixels later, any builder can
make any shard, and two builders of one plan write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import shapely
from shapely.geometry import shape
from tqdm import tqdm

from configs import to_dict
from shards.archives import ArchiveError, open_archive
from shards.config import ShardsConfig
from shards.duplicates import Outline, duplicates
from shards.grid import Grid, Window
from shards.labels import VECTORS
from shards.raster_io import footprint, utm_grid
from shards.scene import LABEL, Asset, LeftOut, Place, SceneError
from shards.tile import OpenScene, open_scene, overlaps

NAMED = 20  # of what was left out for one reason


class BuildError(ValueError):
    """A build cannot go on; the message lists the reasons, a line each."""


@dataclass(frozen=True)
class View:
    """A place with one scene per sensor, the grid on which they are read, and its windows.

    `dropped` are numbers of windows that another view shows already.
    """

    stem: str
    place: Place
    grid: Grid
    size: int
    stride: int
    dropped: frozenset[int] = frozenset()

    @property
    def windows(self) -> int:
        """How many windows there are, dropped ones included."""
        return self.grid.count(self.size, self.stride)

    def window(self, number: int) -> Window:
        """The window called `number`, row by row."""
        return self.grid.nth(number, self.size, self.stride)

    def __len__(self) -> int:
        return self.windows - len(self.dropped)


@dataclass(frozen=True)
class Item:
    """One planned sample."""

    view: View
    window: Window

    @property
    def key(self) -> str:
        """The sample's key."""
        return f"{self.view.stem}-{self.window.row:05d}-{self.window.col:05d}"


@dataclass(frozen=True)
class Plan:
    """Views in order; `problems` are places that could not be opened, `left_out` what makes no sample by its nature."""

    views: tuple[View, ...]
    samples_per_shard: int
    problems: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    fingerprint: str

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(view) for view in self.views))

    @property
    def items(self) -> int:
        """Number of planned samples."""
        return self._ends[-1] if self.views else 0

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return -(-self.items // self.samples_per_shard)

    def shard(self, index: int) -> list[Item]:
        """The samples of one shard, in order."""
        first = index * self.samples_per_shard
        last = min(first + self.samples_per_shard, self.items)
        found: list[Item] = []
        while first < last:
            number = bisect_right(self._ends, first)
            view = self.views[number]
            start = first - (self._ends[number] - len(view))
            kept = [i for i in range(view.windows) if i not in view.dropped][start : start + last - first]
            found += [Item(view, view.window(i)) for i in kept]
            first += len(kept)
        return found

    def reasons(self) -> dict[str, int]:
        """How many things were left out for which reason."""
        dropped = sum(len(view.dropped) for view in self.views)
        counts = _counts(self.left_out)
        return dict(counts) | ({"shown by another scene of the same time": dropped} if dropped else {})

    def examples(self) -> dict[str, list[str]]:
        """Names of some of what was left out, by reason."""
        names: dict[str, list[str]] = {}
        for item in self.left_out:
            names.setdefault(item.reason, []).append(item.name)
        return {reason: found[:NAMED] for reason, found in names.items()}


def _counts(left_out: Sequence[LeftOut]) -> Counter[str]:
    return Counter(item.reason for item in left_out)


def shard_name(config: ShardsConfig, index: int) -> str:
    """Name of a shard's files without extension."""
    return f"{config.name}-{index:06d}"


def plan(config: ShardsConfig) -> Plan:
    """Decide every shard's content from headers alone.

    Raises:
        ArchiveError: the archive is empty or unreadable.
        BuildError: places that cannot be opened, under `on_error=fail` (all of them are listed); or none is left.
    """
    views: list[View] = []
    problems: list[str] = []
    left_out: list[LeftOut] = []
    archive = config.archive
    places = 0
    for place in tqdm(open_archive(archive.name, archive.root, archive.pattern), "plan", disable=None, leave=False):
        if isinstance(place, LeftOut):
            left_out.append(place)
            continue
        places += 1
        try:
            for view in _views(place, config):
                (left_out if isinstance(view, LeftOut) else views).append(view)  # type: ignore[arg-type]
        except SceneError as error:
            problems.append(str(error))
    if problems and (config.on_error == "fail" or not views):
        raise BuildError(_refusal(problems, places))
    if config.label and views and not any(view.place.of(LABEL) for view in views):
        raise BuildError(
            f"{archive.root}: no place has a label, but the config names classes; left out: {dict(_counts(left_out))}. "
            "Put the labels beside the images, or write label=null for images alone"
        )
    _unique(views)
    views = _without_duplicates(views)
    found = Plan(tuple(views), config.samples_per_shard, tuple(problems), tuple(left_out), _fingerprint(config, views))
    if not views:
        raise ArchiveError(f"{archive.root}: no place with {', '.join(config.sensors)}; left out: {found.reasons()}")
    return found


def _refusal(problems: Sequence[str], places: int) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{len(problems)} of {places} places cannot be used (on_error=skip leaves such places out):\n{lines}"


def _views(place: Place, config: ShardsConfig) -> Iterator[View | LeftOut]:
    views = list(place.views(config.sensors, config.tile.max_days))
    for view in views:
        if isinstance(view, LeftOut):
            yield view
            continue
        time = view.scenes[0].time
        stem = place.name if time is None or len(views) == 1 else f"{place.name}-{time:%Y%m%dT%H%M%S}"
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:64]  # a member's name in the tar has at most 100 characters
        size = config.tile.size
        yield View(stem, view, _grid(view, config.tile.metres), size, config.tile.stride or size)


def _grid(view: Place, metres: float | None) -> Grid:
    """The reference's own grid, or one in its UTM zone, after checking that all scenes open and meet."""
    with ExitStack() as stack:
        scenes = [scene for scene in view.scenes if not scene.path.endswith(VECTORS)]
        first, *others = (stack.enter_context(open_scene(scene, view.coregistered)) for scene in scenes)
        for other in others:
            _check(view, first, other)
        if metres is None:
            return first.grid
        if first.grid.crs is None:
            raise SceneError(first.scene.path, "has no CRS, so tile.metres cannot place it in a UTM zone; leave it out")
        return utm_grid(first.grid, metres)


def _check(view: Place, first: OpenScene, other: OpenScene) -> None:
    a, b = first.grid, other.grid
    if (a.crs is None or b.crs is None) and (a.crs, a.height, a.width) != (b.crs, b.height, b.width):
        raise SceneError(
            other.scene.path,
            f"{b.height} x {b.width} pixels with CRS {b.crs} beside {first.scene.path} with {a.height} x {a.width} and "
            f"{a.crs}: without CRS only files of equal size can be laid on each other",
        )
    if not overlaps(a, b):
        raise SceneError(other.scene.path, f"does not overlap {first.scene.path} (place {view.name})")


def _without_duplicates(views: Sequence[View]) -> list[View]:
    """The views, each without the windows that an earlier one of the same time shows already."""
    outlines = [Outline(_footprint(view), view.place.scenes[0].time, partial(_polygons, view)) for view in views]
    dropped = duplicates(outlines)
    return [replace(v, dropped=frozenset(dropped[i])) if i in dropped else v for i, v in enumerate(views)]


def _footprint(view: View) -> shapely.Geometry | None:
    grid, time = view.grid, view.place.scenes[0].time
    return None if grid.crs is None or time is None else shape(footprint(grid.crs, grid.corners()))


def _polygons(view: View) -> list[shapely.Geometry]:
    assert view.grid.crs is not None  # a view without has no footprint, and is not asked
    grids = (view.grid.window(view.window(number)) for number in range(view.windows))
    return [shape(footprint(view.grid.crs, grid.corners())) for grid in grids]


def _unique(views: Sequence[View]) -> None:
    stems = Counter(view.stem for view in views)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise BuildError(f"{len(twice)} names stand for several places, so samples would share keys: {twice[:5]}")


def _fingerprint(config: ShardsConfig, views: Sequence[View]) -> str:
    """Of the settings that change what is written, and of every view's files, grid and windows."""
    settings = to_dict(config)
    for key in ("part", "workers", "out", "archive", "split"):
        settings.pop(key, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for view in views:
        scenes = [
            (s.sensor, str(s.time), [_identity(a) for a in s.assets], s.cloud and s.cloud.codes)
            for s in view.place.scenes
        ]
        digest.update(repr((view.stem, view.grid, sorted(view.dropped), scenes)).encode())
    return digest.hexdigest()


def _identity(asset: Asset) -> Asset:
    """Without the folder, which differs between machines."""
    return replace(asset, path=Path(asset.path).name)
