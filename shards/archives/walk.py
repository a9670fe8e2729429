"""For archives whose files are known by their names alone: all of these in a fixed order, and lists beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shards.archives import ArchiveError

JUNK = "left behind by an unpacker"


def files(root: str, *suffixes: str) -> Iterator[Path]:
    """The files below a folder whose names end in one of `suffixes`, folder by folder in sorted order.

    Links to folders are followed. Nothing is opened.

    Raises:
        ArchiveError: `root` is no folder.
    """
    for where, below, names in os.walk(folder(root), followlinks=True):
        below.sort()
        for name in sorted(names):
            if name.lower().endswith(suffixes):
                yield Path(where, name)


def folder(root: str) -> Path:
    """`root`; ArchiveError when it is no folder."""
    if not os.path.isdir(root):
        raise ArchiveError(f"{root}: no such folder; give the archive's unpacked folder: archive.root=PATH")
    return Path(root)


def is_junk(path: Path) -> bool:
    """Whether it is a copy of metadata that macOS packs into zips beside each file: __MACOSX/..., ._NAME."""
    return path.name.startswith("._") or "__MACOSX" in path.parts


def nothing(root: str, wanted: str, layout: str) -> ArchiveError:
    """The error for a tree in which nothing usable was found: what was looked for, and the layout that is expected."""
    return ArchiveError(f"{root}: {wanted} found there. The layout is\n{layout}\nGive the folder that holds it.")


def lines(path: Path) -> list[str]:
    """The lines of a list file without blanks; none where there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
