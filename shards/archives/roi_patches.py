"""Patches of SEN12MS and of the contest built on it, DFC2020: every fact of a patch is in the name of its files.

A name is ROIs<seed>_<season>_<kind>_<scene>_p<patch>.tif, so that the folders they lie in need not be known: trees
that were unpacked one level deeper, or flat ones, are read alike. Names: the loader that the organisers ship with the
DFC2020 bundle (dfc_sen12ms_dataset.py, L. Hughes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from shards.archives.walk import JUNK, files, is_junk
from shards.scene import LABEL, Asset, LeftOut, Place, Scene
from shards.sensors import SENSORS

CONTEST = "ROIs0000"
_NAME = re.compile(
    r"(?P<roi>ROIs\d+)_(?P<season>[a-z]+)_(?P<kind>s1|s2|s2_cloudy|lc|dfc)_(?P<scene>[A-Za-z0-9]+)_p(?P<patch>\d+)\.tiff?"
)


class Patch(NamedTuple):
    """One patch: (ROIs1158, spring, 124, 30). In DFC2020 the scene may be a city: (ROIs0000, autumn, Mumbai, 741)."""

    roi: str
    season: str
    scene: str
    number: int

    @property
    def group(self) -> str:
        """The scene that it was cut from; patches of one scene overlap."""
        return f"{self.roi}_{self.season}_{self.scene}"

    @property
    def name(self) -> str:
        """As its files are called, without the kind."""
        return f"{self.group}_p{self.number}"


@dataclass
class Found:
    """The files of each patch by kind, and what is none."""

    patches: dict[Patch, dict[str, Path]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def sorted(self) -> Iterator[tuple[Patch, dict[str, Path]]]:
        """Patches in the order of seed, season, scene and number."""
        for patch in sorted(self.patches):
            yield patch, self.patches[patch]


def find(root: str, contest: bool, unused: Mapping[str, str]) -> Found:
    """All patches below `root` of the contest, or all others.

    Args:
        root: folder of the archive.
        contest: whether those of DFC2020 are wanted or those of SEN12MS; both may lie in one folder.
        unused: why files are not used, by kind (`lc`) or by file name.

    Raises:
        ArchiveError: `root` is no folder.
    """
    found, others = Found(), set[str]()
    for path in files(root, ".tif", ".tiff"):
        match = _NAME.fullmatch(path.name)
        shown = path.relative_to(root).as_posix()
        if is_junk(path):
            found.left_out.append(LeftOut(shown, JUNK))
        elif match is None:
            found.left_out.append(LeftOut(shown, "not a name of this archive"))
        elif (match["roi"] == CONTEST) != contest:
            others.add(f"{match['roi']}_{match['season']}")
        elif reason := unused.get(path.name, unused.get(match["kind"], "")):
            found.left_out.append(LeftOut(shown, reason))
        else:
            patch = Patch(match["roi"], match["season"], match["scene"], int(match["patch"]))
            if found.patches.setdefault(patch, {}).setdefault(match["kind"], path) != path:
                found.left_out.append(LeftOut(shown, "a second file of the same name"))
    other = "SEN12MS: archive.name=sen12ms" if contest else "DFC2020: archive.name=dfc2020"
    found.left_out += [LeftOut(name, other) for name in sorted(others)]
    return found


def place(patch: Patch, paths: Mapping[str, Path], label: Asset | None, split: str, facts: Mapping[str, str]) -> Place:
    """A patch as a place. The archives tell seasons but no dates, so its scenes have no time."""
    scenes = [
        Scene(sensor, (Asset(str(paths[kind]), SENSORS[sensor].band_names),))
        for sensor, kind in (("s2-l1c", "s2"), ("s1", "s1"))
        if kind in paths
    ]
    if label is not None:
        scenes.append(Scene(LABEL, (label,)))
    return Place(patch.name, tuple(scenes), group=patch.group, split=split, facts=facts)
