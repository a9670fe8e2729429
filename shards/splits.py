"""Splits by geography: which samples train, validate and test, so that no ground is seen from two sides.

Samples that belong together (a city, a strip, a square of ground) are dealt to the splits as one. Then tiles that lie
nearer to a tile of another split than the buffer go: those of the larger split, which can best do without them, become
the split `buffer`. They stay in the dataset, and no one selects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from shards.config import Split
from shards.ground import Bools, Footprints, Ints
from shards.order import Use, hash64, words_of
from shards.raster_io import transform_points

BUFFER = "buffer"
EQUAL_AREA = "EPSG:6933"  # so that blocks of all latitudes hold as much ground
ATTEMPTS, CLOSE = 64, 0.005  # orders tried until the shares are this close to the fractions


class SplitError(ValueError):
    """Samples cannot be split as asked; the message says what to change."""


def assign(rows: pa.Table, split: Split) -> tuple[pa.Table, dict[str, Any]]:
    """Give every sample its split.

    Args:
        rows: of a manifest: columns `group`, `split` and `geometry` (WKB in OGC:CRS84, cut at the date line, null where
            the files have no CRS).
        split: what stays together, in which shares, and how far apart.

    Returns:
        The rows with a new column `split`, and a report in JSON's types: `samples` per split; `groups` per split
        (groups or blocks as dealt; of the archive's own splits, groups that occur in them); `moved` to the buffer per
        split, or, when nothing was to be moved, `near`: samples per split that lie too near to another; `unchecked`
        samples, which have no footprint.

    Raises:
        SplitError: fewer groups than splits, samples without the group or footprint that is needed, an archive without
            splits of its own, or a split that loses all its samples to the buffer.
    """
    numbers, footprints = _footprints(rows["geometry"])
    groups = _groups(rows, split, numbers, footprints)
    if split.by == "archive":
        names, given = _own(rows)
    else:
        names = sorted(split.fractions, key=lambda name: -split.fractions[name])  # the largest gives way first
        given = _deal(groups, [split.fractions[name] for name in names], names, split.seed)
    report: dict[str, Any] = {"by": split.by, "buffer_m": split.buffer_m, "unchecked": int((numbers < 0).sum())}
    report["groups"] = {name: len(np.unique(groups[given == i])) for i, name in enumerate(names)}
    near = _near(given, len(names), numbers, footprints, split)
    counts = {name: int(near[given == i].sum()) for i, name in enumerate(names)}
    report["moved" if split.enforce else "near"] = counts
    if split.enforce:
        given = np.where(near, len(names), given)
    report["samples"] = _count(given, names, split)
    column = pa.array(np.array([*names, BUFFER, ""], np.object_)[given], pa.string())
    return rows.set_column(rows.column_names.index("split"), "split", column), report


def _footprints(column: pa.ChunkedArray) -> tuple[Ints, Footprints]:
    """Different footprints, and which of them each row has; -1 for none. Many dates of one place share one."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    numbers = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers, Footprints.of(shapely.from_wkb(encoded.dictionary.to_numpy(zero_copy_only=False)))


def _own(rows: pa.Table) -> tuple[list[str], Ints]:
    """The archive's splits, largest first, and each row's; -1 for rows without."""
    own = rows["split"].fill_null("").to_numpy().astype(str)
    names, firsts, sizes = np.unique(own, return_index=True, return_counts=True)
    order = [i for i in np.lexsort((firsts, -sizes)) if names[i]]
    if not order:
        raise SplitError("the archive has no splits of its own; write split.by=group or split.by=block")
    number = np.full(len(names), -1)
    number[order] = np.arange(len(order))
    return [str(names[i]) for i in order], number[np.searchsorted(names, own)]


def _groups(rows: pa.Table, split: Split, numbers: Ints, footprints: Footprints) -> NDArray[np.str_]:
    """What each row stays together with, by name."""
    if split.by != "block":
        groups = rows["group"].fill_null("").to_numpy().astype(str)
        if split.by == "group" and (lost := int((groups == "").sum())):
            raise SplitError(f"{lost} samples have no group; write split.by=block, or give the archive's places groups")
        return np.asarray(groups)
    if lost := int((numbers < 0).sum()):
        raise SplitError(f"{lost} samples have no CRS, so no place on the ground; write split.by=group")
    side = split.block_km * 1000
    x, y = transform_points("OGC:CRS84", EQUAL_AREA, *footprints.middles())
    names = [f"{col:.0f} {row:.0f}" for col, row in zip(np.floor(x / side), np.floor(y / side), strict=True)]
    return np.asarray(names, np.str_)[numbers]


def _deal(groups: NDArray[np.str_], fractions: Sequence[float], names: Sequence[str], seed: int) -> Ints:
    """The split of each row: whole groups, in the first of some keyed orders that comes close to the fractions."""
    known, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(known) < len(fractions):
        raise SplitError(
            f"{len(known)} groups for the splits {', '.join(names)}; each needs one: give split.fractions fewer "
            "splits, or split.by=block a smaller split.block_km"
        )
    words = words_of(known.tolist())
    target = np.asarray(fractions) * len(groups)
    best, least = np.zeros(len(known), np.int64), np.inf
    for attempt in range(ATTEMPTS):
        order = np.argsort(hash64(seed, Use.SPLIT, attempt, words), kind="stable")
        dealt = np.empty(len(known), np.int64)
        dealt[order] = _in_order(sizes[order].tolist(), target.tolist())
        off = np.abs(np.bincount(dealt, sizes, len(target)) - target).max()
        if off < least:
            best, least = dealt, off
        if least <= CLOSE * len(groups):
            break
    return np.asarray(best[group])


def _in_order(sizes: Sequence[int], target: Sequence[float]) -> list[int]:
    """Each group to the split that lacks most samples; the last groups to splits that have none yet."""
    lacking, empty, dealt = list(target), set(range(len(target))), []
    for number, size in enumerate(sizes):
        open_to = empty if len(sizes) - number <= len(empty) else range(len(target))
        chosen = max(open_to, key=lambda i: (lacking[i], -i))
        lacking[chosen] -= size
        empty.discard(chosen)
        dealt.append(chosen)
    return dealt


def _near(given: Ints, splits: int, numbers: Ints, footprints: Footprints, split: Split) -> Bools:
    """Rows that lie too near to another split: all of them, or with `enforce` those that have to go.

    The smaller splits are settled first: a tile goes only for the sake of one that stays.
    """
    near = np.zeros(len(given), np.bool_)
    for number in reversed(range(splits)):
        own = (given == number) & (numbers >= 0)
        others = (given > number) if split.enforce else (given >= 0) & (given != number)
        others &= (numbers >= 0) & ~(near & split.enforce)
        mine, row = np.unique(numbers[own], return_inverse=True)
        near[own] = footprints.near(mine, np.unique(numbers[others]), split.buffer_m)[row]
    return near


def _count(given: Ints, names: Sequence[str], split: Split) -> dict[str, int]:
    """Samples per split; SplitError for a split that holds none."""
    counts = {name: int((given == i).sum()) for i, name in enumerate([*names, BUFFER])}
    if without := int((given < 0).sum()):
        counts[""] = without
    if empty := [name for name in names if not counts[name]]:
        raise SplitError(
            f"all samples of split {', '.join(empty)} lie within {split.buffer_m:g} m of another split; write a "
            "smaller split.buffer_m, a larger split.block_km, or split.by=block where groups overlap"
        )
    return counts
