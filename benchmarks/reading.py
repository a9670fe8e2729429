"""Reading: our stream against a raw read of the same tars, against bare decoding, and against plain webdataset."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import webdataset

from benchmarks.timing import compare
from shards.manifest import Selection, select, write_manifest
from shards.sample import Encoding, Sample, Tile, decode, decode_array
from shards.store import open_store
from shards.stream import Share, Stream
from shards.write import finish_shard, read_record, write_shard
from tests.small_dataset import CONTRACT

SAMPLES, SIZE = 96, 256


def run() -> None:
    """One table per encoding."""
    for encoding in ("npy", "blosc2-zstd"):
        with TemporaryDirectory() as folder:
            selection = _dataset(Path(folder), encoding)
            _compare(Path(folder), selection, encoding)


def _dataset(folder: Path, encoding: Encoding) -> Selection:
    """Samples like S1 and elevation: smooth fields with noise, so that compression has something to do."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(SAMPLES):
        field = np.add.outer(np.sin(np.arange(SIZE) / 40 + number), np.cos(np.arange(SIZE) / 30)).astype(np.float32)
        s1 = (-14 + 4 * field + rng.normal(0, 1, (2, SIZE, SIZE))).astype(np.float32)
        dem = np.rint(300 + 50 * field)[None].astype(np.float32)
        valid = np.ones((SIZE, SIZE), bool)
        samples.append(Sample(f"s{number:04d}", {"s1": Tile(s1, valid), "dem": Tile(dem, valid)}))
    store = open_store(folder)
    finish_shard(write_shard(samples, store, "shard-000000", encoding), store, "benchmark", CONTRACT.sensors)
    _, _, table = read_record(store, "shard-000000")
    contract = {**CONTRACT.to_json(), "classes": None}
    write_manifest(store, table, {"format_version": 1, "contract": contract, "fingerprint": encoding})
    return select(str(folder))


def _compare(folder: Path, selection: Selection, encoding: Encoding) -> None:
    tars = sorted(folder.glob("*.tar"))
    store = open_store(folder)
    raw = [
        {member["name"]: store.range(row["shard"], member["offset"], member["bytes"]) for member in row["members"]}
        for row in selection.rows.to_pylist()
    ]

    def read_raw() -> int:
        return sum(len(tar.read_bytes()) for tar in tars)

    def read_webdataset() -> int:
        dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
        arrays = (value for item in dataset for key, value in item.items() if key.endswith(("npy", "b2nd")))
        extension = "npy" if encoding == "npy" else "b2nd"
        return sum(decode_array(value, extension).size for value in arrays)

    compare(
        f"Reading {SAMPLES} samples of 3 x {SIZE} x {SIZE} float32, encoding {encoding}, page cache",
        {
            "raw read of the tars": read_raw,
            "bare decode of members in memory, one thread": lambda: [decode(members) for members in raw],
            "webdataset, sequential, decoded": read_webdataset,
            "our stream, shuffled, decoded, verified": lambda: list(
                islice(iter(Stream(selection, 0, 16, Share(1))), SAMPLES)
            ),
        },
    )
