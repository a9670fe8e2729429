"""Archives: one file per layout, each with one function `places(root) -> Iterator[Place]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import cast

from shards.scene import Place

ARCHIVES = ("catalog",)


def open_archive(name: str, root: str) -> Iterator[Place]:
    """The places of the archive at `root` in the layout called `name`, in a fixed order.

    Raises:
        ArchiveError: no such layout, or nothing usable is there.
    """
    if name not in ARCHIVES:
        raise ArchiveError(f"unknown archive {name!r}; known: {', '.join(ARCHIVES)}")
    places = cast("Callable[[str], Iterator[Place]]", import_module(f"shards.archives.{name}").places)
    yield from places(root)


class ArchiveError(ValueError):
    """An archive as a whole cannot be read; the message says what was looked for and where."""
