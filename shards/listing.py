"""Which samples a rank sees at a step, from the manifest alone: what one needs to look into a loss spike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from shards.manifest import ManifestError, select
from shards.order import LANES
from shards.stream import Share, order_of

# Setting -> default; None must be given.
SETTINGS = {"global_batch": None, "seed": 0, "step": 0, "steps": 1, "world": 1, "rank": None, "lanes": LANES}


def listing(data: str | Mapping[str, int], settings: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The keys of each step and rank, as `{"step", "rank", "keys"}`.

    Args:
        data: dataset folder, or weights by folder.
        settings: `global_batch` and optionally `seed`, `step` (the first), `steps`, `world`, `rank` (all when absent),
            `lanes`, `split` (comma-separated), as text.

    Raises:
        ManifestError: an unknown or missing setting, or one that is not a number.
        OrderError: numbers that do not go together, such as a batch that the ranks cannot share.
    """
    where = {"split": settings["split"].split(",")} if "split" in settings else None
    numbers = _numbers({key: value for key, value in settings.items() if key != "split"})
    selection = select(data, where=where)
    first, ranks = numbers["step"], numbers["world"]
    order = order_of(selection, numbers["seed"], numbers["lanes"])
    wanted = range(max(ranks, 1)) if numbers["rank"] is None else [numbers["rank"]]
    shares = [Share(numbers["global_batch"], ranks, rank) for rank in wanted]
    for step in range(first, first + numbers["steps"]):
        for share in shares:
            keys = [selection.row(order.sample(position)).key for position in share.slots(step)]
            yield {"step": step, "rank": share.rank, "keys": keys}


def parse_data(text: str) -> str | dict[str, int]:
    """A dataset folder, or weights by folder from `{folder: weight, ...}`, as in a config.

    Raises:
        ManifestError: it begins like a mapping, but is none.
    """
    try:
        return yaml.safe_load(text) if text.startswith("{") else text
    except yaml.YAMLError:
        raise ManifestError(f"{text}: write a dataset folder, or {{folder: weight, ...}}") from None


def _numbers(settings: Mapping[str, str]) -> dict[str, Any]:
    if unknown := [key for key in settings if key not in SETTINGS]:
        raise ManifestError(f"unknown setting {unknown[0]!r}; allowed: {', '.join(SETTINGS)}, split")
    if wrong := [f"{key}={value}" for key, value in settings.items() if not value.isdecimal()]:
        raise ManifestError(f"{wrong[0]}: a whole number is expected")
    if "global_batch" not in settings:
        raise ManifestError("global_batch=N is missing")
    return {**SETTINGS, **{key: int(value) for key, value in settings.items()}}
