"""For archives that are known by their folders, which zips and tars sometimes unpack a level or two too deep.

Also for what is found in them: scenes that are incomplete, or that show the same acquisition.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.archives import ArchiveError
from shards.archives.walk import is_junk, nothing
from shards.scene import LeftOut, Place, Scene

DEPTH = 2


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without hidden files and junk."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not is_junk(path))


def base(root: str, names: Collection[str], layout: str) -> Path:
    """The folder that holds at least one folder called as in `names`: `root`, or one up to two levels below.

    Args:
        root: where to look.
        names: of the folders that tell the archive.
        layout: what was expected, for the message.

    Raises:
        ArchiveError: there is none, or several.
    """
    level = [Path(root)] if Path(root).is_dir() else []
    for _ in range(DEPTH + 1):
        found = [folder for folder in level if any((folder / name).is_dir() for name in names)]
        if len(found) > 1:
            raise ArchiveError(f"{root}: several archives, {', '.join(map(str, found[:5]))}; give one as archive.root")
        if found:
            return found[0]
        level = [path for folder in level for path in visible(folder) if path.is_dir()]
    raise nothing(root, f"none of the folders {', '.join(names)}", layout)


def placed(name: str, scenes: Iterable[Scene | LeftOut], **options: Any) -> Iterator[Place | LeftOut]:
    """The place of these scenes, after what is left out of it: also scenes whose sensor and time another has.

    Args:
        name: of the place.
        scenes: in order; the first of several of one sensor and time is kept.
        options: of Place: group, split...
    """
    kept: dict[tuple[str, object], Scene] = {}
    for scene in scenes:
        if isinstance(scene, LeftOut):
            yield scene
        elif (scene.sensor, scene.time) in kept:
            yield LeftOut(f"{name} {scene.sensor} {scene.time}", "another scene has its sensor and time")
        else:
            kept[scene.sensor, scene.time] = scene
    yield Place(name, tuple(kept.values()), **options) if kept else LeftOut(name, "no complete scene")
