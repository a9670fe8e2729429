"""The places of a selection: tiles of one file of the archive are one place, and play one role."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from pipeline.protocols.splits import Places
from shards.manifest import Selection

_KEY = re.compile(r"(.+)-(\d{5,})-(\d{5,})")  # of shards.plan: place, row and column of the tile's first pixel


def places_of(selection: Selection) -> tuple[Places, NDArray[np.int64]]:
    """The places of a selection's samples, sorted by name, and which of them each sample belongs to."""
    rows = selection.rows(["key", "group", "crs", "transform"])
    found = [_KEY.fullmatch(key) for key in rows["key"].to_pylist()]
    names = [match[1] if match else key for match, key in zip(found, rows["key"].to_pylist(), strict=True)]
    corners = [(int(match[2]), int(match[3])) if match else (0, 0) for match in found]
    unique, number_of_first, number = np.unique(np.array(names, np.str_), return_index=True, return_inverse=True)
    some = rows.take(number_of_first)
    west = [
        transform[2] - corners[i][1] * transform[0] - corners[i][0] * transform[1] if transform else np.nan
        for i, transform in zip(number_of_first.tolist(), some["transform"].to_pylist(), strict=True)
    ]
    groups, crs = (np.array(some[name].fill_null("").to_pylist(), np.str_) for name in ("group", "crs"))
    return Places(unique, groups, np.array(west, np.float64), crs), number.astype(np.int64)
