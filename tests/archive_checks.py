"""What is found in an archive and the samples that it becomes, for the tests of archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import configs
from shards.archives import open_archive
from shards.build import build
from shards.manifest import select
from shards.sample import Sample
from shards.scene import LeftOut, Place, Scene
from shards.stream import Share, Stream
from shards.verify import verify


def discover(name: str, root: Path, pattern: str = "") -> tuple[dict[str, Place], list[LeftOut]]:
    """Places by name, and what was left out."""
    items = list(open_archive(name, str(root), pattern))
    places = {item.name: item for item in items if isinstance(item, Place)}
    left_out = [item for item in items if isinstance(item, LeftOut)]
    assert len(places) + len(left_out) == len(items), "two places have one name"
    assert list(open_archive(name, str(root), pattern)) == items, "the order is not fixed"
    return places, left_out


def one(place: Place, sensor: str, number: int = 0) -> Scene:
    return place.of(sensor)[number]


def built_samples(config: Any) -> dict[str, Sample]:
    """The samples that are built by a config, by key."""
    build(config)
    assert verify(config.out) == []
    return {sample.key: sample for sample, _ in Stream(select(config.out), 0, 1, Share(1)).once()}


def samples(
    name: str, root: Path, sensors: list[str], pattern: str = "", out: Path | None = None, **tile: Any
) -> dict[str, Sample]:
    """The samples of 32 px that an archive becomes, by key; built in `out`, or hidden in the archive."""
    raw = {
        "stage": "shards", "archive": {"name": name, "root": str(root), "pattern": pattern}, "sensors": sensors,
        "out": str(out or root / ".data"), "tile": {"size": 32, **tile},
    }  # fmt: skip
    return built_samples(configs.parse(raw))
