"""Fewer labels: some of the labelled samples, such that their classes are mixed as in all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Selection
from shards.order import Use, hash64, words_of

Ints = NDArray[np.int64]


def stratified(selection: Selection, count: int, seed: int) -> Ints:
    """Numbers of `count` rows of a labelled selection, spread over its signatures in proportion.

    A signature is the set of classes that occur in a sample. Within each, samples are ordered by a hash of (seed, key);
    number r of n stands at (r + u) / n of the way, with u in [0, 1) from the hash of (seed, signature), and the first
    `count` of all are taken. So fewer are always among more, of every signature there are its share but for one, and
    neither the shards nor the order of the manifest matter.
    """
    table = selection.rows(["key", "classes"])
    keys = np.array(table["key"].to_pylist())
    names = [" ".join(map(str, sorted(classes))) for classes in table["classes"].to_pylist()]
    signatures, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    drawn = hash64(seed, Use.LIMIT, words_of(keys))
    rows = np.lexsort((keys, drawn, group))  # one signature after the other
    rank = np.empty(len(keys), np.int64)
    rank[rows] = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = hash64(seed, Use.LIMIT, words_of(signatures)) / 2.0**64
    place = (rank + first[group]) / sizes[group]
    return np.lexsort((keys, drawn, place))[:count]
