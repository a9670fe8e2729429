"""Resuming: time to the first batch at the beginning and at the end of an epoch of 10,000 shards, and planning.

The shards are links to one tar of tiny samples, so that only the manifest is large.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from benchmarks.reading_data import PER_SHARD, SEED
from benchmarks.timing import compare
from benchmarks.training import in_new_process, peak
from shards.manifest import Selection, select, write_manifest
from shards.order import LANES, Order
from shards.store import open_store
from shards.stream import Share, Stream
from shards.write import finish_shard, read_record, write_shard
from tests.small_dataset import CONTRACT, make_sample

SHARDS, BATCH, MANY = 10_000, 64, 10_000_000


def run() -> None:
    """Two tables of first batches, and what the plan of a long epoch takes."""
    with TemporaryDirectory() as folder:
        _write(Path(folder))
        last = SHARDS * PER_SHARD // BATCH - 1
        starts = {
            "position 0": 0,
            "the last batch of the epoch": last,
            "the last batch of epoch 1,000": 1000 * last + 999,
        }
        count = SHARDS * PER_SHARD
        compare(
            f"First batch of {BATCH} of {count} samples in {SHARDS} shards, dataset opened before",
            _starts(starts, partial(lambda selection: selection, select(folder))),
        )
        compare("The same with opening the dataset", _starts(starts, partial(select, folder)))
        print("\nIn a process of its own each: seconds, growth of the highest memory")
        _say(f"selecting all {count} samples", *in_new_process(_select, folder))
    _say(f"order of an epoch of {MANY} samples, one position", *in_new_process(_plan, 1))
    _say("the same, 10,000 positions spread over the epoch", *in_new_process(_plan, 10_000))


def _starts(starts: dict[str, int], opened: Callable[[], Selection]) -> dict[str, Callable[[], object]]:
    return {name: partial(_first_batch, opened, batch * BATCH) for name, batch in starts.items()}


def _first_batch(opened: Callable[[], Selection], position: int) -> None:
    stream = Stream(opened(), SEED, LANES, Share(BATCH), position)
    if [found for _, found in islice(iter(stream), BATCH)] != list(range(position, position + BATCH)):
        raise RuntimeError(f"not the batch at {position}")


def _write(folder: Path) -> None:
    store, name = open_store(folder), "shard-000000"
    samples = (make_sample(number, size=8) for number in range(PER_SHARD))
    record = write_shard(samples, store, name, "npy")
    finish_shard(record, store, "benchmark", CONTRACT.sensors)
    table = read_record(store, name)[2].replace_schema_metadata(None)
    names = [f"shard-{number:06d}" for number in range(SHARDS)]
    for other in names[1:]:
        os.symlink(folder / f"{name}.tar", folder / f"{other}.tar")
    rows = pa.concat_tables([table] * SHARDS).combine_chunks()
    keys = pa.array([f"sample-{number:07d}" for number in range(rows.num_rows)])
    tars = pa.array(np.repeat([f"{name}.tar" for name in names], PER_SHARD).tolist())
    rows = rows.set_column(0, "key", keys).set_column(1, "shard", tars)
    shards = {name: {"bytes": record.bytes, "sha256": record.sha256} for name in names}
    facts = {"format_version": 1, "contract": CONTRACT.to_json(), "fingerprint": "benchmark", "shards": shards}
    write_manifest(store, rows, facts)


def _select(folder: str) -> tuple[float, float]:
    before, start = peak(), time.perf_counter()
    select(folder)
    return time.perf_counter() - start, peak() - before


def _plan(positions: int) -> tuple[float, float]:
    before, start = peak(), time.perf_counter()
    order = Order([PER_SHARD] * (MANY // PER_SHARD), SEED, LANES)
    for position in np.linspace(0, len(order) - 1, positions).astype(int).tolist():
        order.sample(position)
    return time.perf_counter() - start, peak() - before


def _say(what: str, seconds: float, growth: float) -> None:
    print(f"  {what:<60} {seconds:7.2f} s  {growth:7.0f} MiB  load {os.getloadavg()[0]:.1f}", flush=True)
