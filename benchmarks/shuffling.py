"""How well a loader mixes: our order against plain webdataset with its usual buffers and against a full permutation.

Ours and the permutation are computed; webdataset reads small tars, as it has no order to compute. A group is a tenth of
the dataset that lies together in the manifest, such as a region or a season.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from shards.order import LANES, Order

SHARDS, PER_SHARD, GROUPS, WINDOWS, BATCH = 160, 64, 10, 20, 64
SEEDS = range(5)
BUFFER = 1000
Ints = NDArray[np.int64]


def run() -> None:
    """One table: means over seeds of one epoch each."""
    count = SHARDS * PER_SHARD
    print(f"\nShuffling {count} samples in {SHARDS} shards, {GROUPS} groups, mean of {len(SEEDS)} epochs")
    print(f"  {'':<52} neighbours:           a batch of {BATCH}:  group over {WINDOWS} windows:")
    print(f"  {'':<52} correlation  one shard  shards          coefficient of variation")
    with TemporaryDirectory() as folder:
        _write_tars(Path(folder))
        for name, epoch in _orders(Path(folder)).items():
            rows = np.array([_measures(epoch(seed)) for seed in SEEDS])
            correlation, same, shards, spread = rows.mean(0)
            print(f"  {name:<52} {correlation:11.3f} {same:10.3f} {shards:7.1f} {spread:33.2f}")


def _orders(folder: Path) -> dict[str, Callable[[int], Ints]]:
    """Manifest rows of an epoch in the order in which each loader gives them, by seed."""
    count = SHARDS * PER_SHARD
    return {
        "full permutation": lambda seed: np.random.default_rng(seed).permutation(count),
        f"ours, {LANES} lanes": lambda seed: _ours(seed, LANES),
        f"ours, {2 * LANES} lanes": lambda seed: _ours(seed, 2 * LANES),
        "webdataset, shardshuffle": lambda seed: _webdataset(folder, seed, 0),
        f"webdataset, shardshuffle and shuffle({BUFFER})": lambda seed: _webdataset(folder, seed, BUFFER),
        "webdataset, shardshuffle and shuffle(5000)": lambda seed: _webdataset(folder, seed, 5 * BUFFER),
    }


def _ours(seed: int, lanes: int) -> Ints:
    order = Order([PER_SHARD] * SHARDS, seed, lanes)
    return np.array([order.sample(position) for position in range(len(order))])


def _write_tars(folder: Path) -> None:
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for row in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                member = tarfile.TarInfo(f"{row:09d}.txt")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"0"))


def _webdataset(folder: Path, seed: int, buffer: int) -> Ints:
    import webdataset

    random.seed(seed)
    tars = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(tars, shardshuffle=SHARDS, seed=seed)
    if buffer:
        dataset = dataset.shuffle(buffer, initial=buffer)
    return np.array([int(item["__key__"]) for item in dataset])


def _measures(rows: Ints) -> tuple[float, float, float, float]:
    """Rank correlation of neighbours, share of them from one shard, shards in a batch, spread of a group."""
    if not np.array_equal(np.sort(rows), np.arange(SHARDS * PER_SHARD)):
        raise RuntimeError("this epoch does not hold every sample once")
    shards = rows // PER_SHARD
    same = float((shards[1:] == shards[:-1]).mean())
    batches = shards[: len(shards) // BATCH * BATCH].reshape(-1, BATCH)
    groups = rows * GROUPS // len(rows)
    counts = np.stack([np.bincount(window, minlength=GROUPS) for window in np.array_split(groups, WINDOWS)])
    spread = float((counts.std(0) / counts.mean(0)).mean())
    mixed = float(np.mean([len(np.unique(batch)) for batch in batches]))
    return float(np.corrcoef(rows[1:], rows[:-1])[0, 1]), same, mixed, spread
