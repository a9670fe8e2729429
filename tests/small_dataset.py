"""A labelled dataset of a few small samples, written in a fraction of a second by the real writer, for other tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from shards.contract import Classes, Contract, Modality
from shards.manifest import write_manifest
from shards.sample import Encoding, Sample, Tile
from shards.store import open_store
from shards.write import finish_shard, read_record, write_shard
from tests.fake_stages import quietly

CLASSES = Classes(names=("water", "field", "town"), palette=((0, 0, 200), (0, 200, 0), (200, 0, 0)))
CONTRACT = Contract(
    modalities=(
        Modality(
            sensor="s1", bands=("VV", "VH"), unit="dB", dtype="float32", clip=(-25.0, 0.0),
            offset=(-25.0, -25.0), scale=(25.0, 25.0), mean=(-12.0, -14.0), std=(5.0, 5.0),
        ),
        Modality(
            sensor="dem", bands=("DEM",), unit="m", dtype="float32", clip=(-500.0, 9000.0),
            offset=(-500.0,), scale=(9500.0,), mean=(100.0,), std=(50.0,),
        ),
    ),
    classes=CLASSES,
    resolution=10.0,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that train in their own process: no threads to fight over cores, and the environment restored."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        yield


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """For modules of many small runs."""
    with quietly():
        yield


def make_sample(number: int, size: int = 32, labelled: bool = True) -> Sample:
    """Three covers in stripes: s1 tells them apart, the DEM only the third; one corner invalid, one unlabelled."""
    rng = np.random.default_rng(number)
    label = ((np.arange(size)[:, None] + np.arange(size) + 8 * number) // 12 % 3).astype(np.uint8)
    valid = np.ones((size, size), bool)
    valid[:6, :6] = False
    vv = np.array([-22.0, -13.0, -4.0], np.float32)[label] + rng.normal(0, 1, label.shape)
    vh = np.array([-24.0, -12.0, -9.0], np.float32)[label] + rng.normal(0, 1, label.shape)
    dem = 100.0 + 80.0 * (label == 2) + rng.normal(0, 3, label.shape)
    s1 = np.where(valid, np.stack([vv, vh]), np.nan).astype(np.float32)
    tiles = {"s1": Tile(s1, valid), "dem": Tile(dem[None].astype(np.float32), np.ones_like(valid))}
    label[-5:, -5:] = CLASSES.ignore
    split = ("train", "val", "test")[0 if number % 4 < 2 else number % 4 - 1]
    meta = {"group": f"g{number % 3}", "split": split}
    return Sample(f"sample-{number:03d}", tiles, label if labelled else None, meta)


def write_dataset(
    folder: Path | str,
    samples: int = 16,
    size: int = 32,
    contract: Contract = CONTRACT,
    encoding: Encoding = "npy",
) -> str:
    """A dataset of two shards, here or on S3, half of it split train, a quarter val, a quarter test; its address."""
    store, tables = open_store(str(folder)), []
    for index in range(2):
        name = f"small-{index:06d}"
        numbers = range(index, samples, 2)
        record = write_shard((make_sample(number, size) for number in numbers), store, name, encoding)
        finish_shard(record, store, "plan", contract.sensors)
        tables.append(read_record(store, name)[2].replace_schema_metadata(None))
    facts = {"format_version": 1, "contract": contract.to_json(), "fingerprint": f"{samples}-{size}"}
    write_manifest(store, pa.concat_tables(tables), facts)
    return str(folder)
