"""A dataset with known colours at known places, for the tests of its pictures."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.contract import Classes, Contract, Modality
from shards.manifest import write_manifest
from shards.raster_io import footprint
from shards.sample import Sample, Tile
from shards.sensors import SENSORS
from shards.statistics import merge
from shards.store import open_store
from shards.write import finish_shard, read_record, write_shard
from tests.test_report import HOSTILE, Page, chromium, probe  # noqa: F401

SIZE = 64
CLASSES = Classes(names=("water", HOSTILE), palette=((10, 60, 200), (200, 120, 0)))
SPLITS = ("train", "train", "train", "val", "test", None)


def modality(name: str) -> Modality:
    sensor = SENSORS[name]
    count = len(sensor.bands)
    return Modality(
        sensor=name, bands=sensor.band_names, unit=sensor.unit, dtype="float32", clip=sensor.clip,
        offset=(0.0,) * count, scale=(1.0,) * count,
    )  # fmt: skip


CONTRACT = Contract(modalities=tuple(map(modality, ("s2-l2a", "s1", "dem"))), classes=CLASSES, resolution=10.0)


def make_sample(number: int) -> Sample:
    """Left half red, right half blue; sea in the lower half of the radar; a slope; a hole at the upper left."""
    row, col = np.mgrid[:SIZE, :SIZE]
    right = col >= SIZE // 2
    optical = np.full((12, SIZE, SIZE), 500.0, np.float32)
    optical[3] = np.where(right, 500, 3000)  # B4
    optical[1] = np.where(right, 3000, 500)  # B2
    radar = np.stack([np.where(row < SIZE // 2, -6.0, -20.0), np.where(row < SIZE // 2, -12.0, -24.0)])
    valid = np.ones((SIZE, SIZE), bool)
    valid[:16, :16] = False
    time = datetime(2021, 5, number + 1, tzinfo=UTC)
    tiles = {
        "s2-l2a": Tile(np.where(valid, optical, 0).astype(np.float32), valid, time),
        "s1": Tile(radar.astype(np.float32), np.full((SIZE, SIZE), number != 1), time),
        "dem": Tile((100.0 * number + 5 * col)[None].astype(np.float32), np.ones((SIZE, SIZE), bool)),
    }
    label = right.astype(np.uint8)
    label[-8:] = CLASSES.ignore
    instances = np.zeros((SIZE, SIZE), np.uint16)
    instances[20:30, 40:50] = 7
    x, y = 500_000.0 + 640 * number, 5_300_000.0
    corners = [(x, y), (x + 640, y), (x + 640, y - 640), (x, y - 640)]
    meta = {
        "group": f"g{number % 2}", "split": SPLITS[number], "cloud": 0.1 * number, "crs": "EPSG:32633",
        "transform": (10.0, 0.0, x, 0.0, -10.0, y), "footprint": footprint("EPSG:32633", corners),
        "shift": {"s2-l2a": None, "s1": [0.5, -1.25] if number else None, "dem": None}, "sources": ["a.tif"],
    }  # fmt: skip
    return Sample(f"place-{number:03d}", tiles, label, meta, instances if number == 2 else None)


def write(folder: Path, samples: list[Sample], contract: Contract = CONTRACT) -> str:
    """A dataset of two shards, its facts as the merge writes them."""
    store, tables, statistics, shards = open_store(str(folder)), [], {}, {}
    for number, part in enumerate((samples[::2], samples[1::2])):
        record = write_shard(part, store, name := f"shard-{number:06d}", "npy")
        finish_shard(record, store, "plan", contract.sensors)
        tables.append(read_record(store, name)[2].replace_schema_metadata(None))
        statistics = merge(statistics, record.statistics)
        shards[name] = {"sha256": record.sha256, "bytes": record.bytes}
    archive = {"name": "catalog", "title": HOSTILE, "licence": "CC-BY-4.0", "attribution": "", "source": "a table"}
    facts = {
        "format_version": 1, "contract": contract.to_json(), "fingerprint": "abc", "samples": len(samples),
        "statistics": {name: found.to_json() for name, found in statistics.items()}, "shards": shards,
        "left_out": {"too cloudy": 3}, "left_out_examples": {"too cloudy": ["place-100"]}, 
        "skipped": ["b.tif: damaged"], "planned": 9,
        "builds": {"shard": {"archive": archive}}, "encoding": "npy", "written_by": "a test",
    }  # fmt: skip
    write_manifest(store, pa.concat_tables(tables), facts)
    return str(folder)
