"""Archives: one file per layout, each with `ABOUT` and one function `places(root) -> Iterator[Place | LeftOut]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import cast

from shards.scene import LeftOut, Place

ARCHIVES = (
    "catalog", "stac", "folder", "sentinel", "sen12ms", "ssl4eo-s12", "ssl4eo-s12-v1.1", "bigearthnet-v1",
    "bigearthnet-v2", "majortom", "mmearth", "terramesh", "dfc2020", "spacenet6", "hunan",
)  # fmt: skip


class ArchiveError(ValueError):
    """An archive as a whole cannot be read; the message says what was looked for and where."""


@dataclass(frozen=True)
class About:
    """Where an archive comes from, for `dataset.json` and the cards of models.

    `notes` says per sensor what its numbers are where the sensor table leaves it open (datum of heights, sigma0 or
    gamma0, processing level); `broken` names files known to be bad, each with what is wrong and who found it.
    """

    title: str
    licence: str
    attribution: str
    source: str
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    broken: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def open_archive(name: str, root: str, pattern: str = "") -> Iterator[Place | LeftOut]:
    """The places of the archive at `root` in the layout called `name`, in a fixed order, and what was left out of it.

    Args:
        name: one of ARCHIVES.
        root: its folder (or table, or product).
        pattern: of file names, for the layout `folder` only.

    Raises:
        ArchiveError: no such layout, or nothing usable is there.
    """
    module = _module(name)
    if pattern and name != "folder":
        raise ArchiveError(f"archive.pattern is for archive.name=folder; {name} knows its own names")
    places = cast("Callable[..., Iterator[Place | LeftOut]]", module.places)
    yield from places(root, pattern) if name == "folder" else places(root)


def about(name: str) -> About:
    """What is known of the layout called `name`."""
    return cast("About", _module(name).ABOUT)


def _module(name: str) -> ModuleType:
    if name not in ARCHIVES:
        raise ArchiveError(f"unknown archive {name!r}; known: {', '.join(ARCHIVES)}")
    return import_module(f"shards.archives.{name.replace('-', '_').replace('.', '_')}")
