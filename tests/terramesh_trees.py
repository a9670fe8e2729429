"""TerraMesh, and the tars of zarr groups that SSL4EO-S12 v1.1 has as well, to the letter of their layout."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.sensors import SENSORS
from tests.benchmark_trees import SIZE
from tests.safe_trees import two_digits
from tests.scenes import ORIGIN
from tests.zarr_trees import Stored, write_group, write_tar

FILES = {"s1": ("vv", "vh")} | {
    name: tuple(two_digits(band) for band in SENSORS[name].band_names) for name in ("s2-l1c", "s2-l2a")
}
DATES = [datetime(2020, 11, 16, 2, 30, 1, tzinfo=UTC) + timedelta(days=90 * i) for i in range(4)]
SEASONS = [DATES[i] + timedelta(days=2) for i in range(4)]


def corner(number: int) -> tuple[float, float]:
    return ORIGIN[0] + 5000.0 * number, ORIGIN[1]


def values(modality: str, *shape: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(modality))
    if modality.startswith("S1"):
        return rng.normal(-13, 3, shape).astype(np.float16)
    return rng.integers(1100, 6000, shape).astype(np.float32 if modality == "DEM" else np.int16)


def band_names(modality: str) -> tuple[str, ...]:
    sensor = {"S1": "s1", "S2L1C": "s2-l1c", "S2L2A": "s2-l2a"}.get(modality[:2] if modality[1] == "1" else modality)
    return FILES[sensor] if sensor else (modality,)


def nanoseconds(dates: list[datetime]) -> np.ndarray[Any, Any]:
    return np.array([int(date.timestamp()) * 10**9 for date in dates])


def group(path: Path, modality: str, number: int, dates: list[datetime], sample: str, masked: bool = True) -> Path:
    """One sample as the tars hold it: bands [time, band, y, x] in a single chunk."""
    bands = band_names(modality)
    dated = [] if modality == "DEM" else dates
    pixels = 10.0 * np.arange(SIZE) + 5
    shape = (max(len(dated), 1), len(bands), SIZE, SIZE)
    arrays = {
        "bands": Stored(values(modality, *shape), ("time", "band", "y", "x")),
        "band": Stored(np.array(bands), ("band",)),
        "x": Stored(corner(number)[0] + pixels, ("x",)),
        "y": Stored(corner(number)[1] - pixels, ("y",)),
        "crs": Stored(np.int64(32633), ()),
        "time": Stored(nanoseconds(dated) if dated else np.zeros(1, np.int64), ("time",)),
        "sample": Stored(np.array(sample), ()),
    }
    if modality.startswith("S2") and masked:
        arrays["cloud_mask"] = Stored(np.full((shape[0], SIZE, SIZE), 4, np.uint8), ("time", "y", "x"))
    return write_group(path, arrays)


def shard(path: Path, samples: Mapping[str, tuple[int, str]], dates: list[datetime], masked: bool = True) -> Path:
    """A tar: key -> number of the place, and what its sample is called."""
    modality = path.parent.name
    when = [date + timedelta(days=2) for date in dates] if modality.startswith("S1") else dates
    files = {
        f"{key}.zarr.zip": group(
            path.parents[2] / f"tmp/{modality}-{key}.zarr.zip", modality, number, when, name, masked
        )
        for key, (number, name) in samples.items()
    }
    return write_tar(path, files)


TERRAMESH = {
    "majortom": {"majortom_train_0000001": (1, "282D_485L_3_3"), "majortom_train_0000009": (2, "38D_378R_2_3")},
    "ssl4eos12": {"ssl4eos12_train_0000003": (3, "0194630_1")},
}


def terramesh(root: Path, table: bool = False) -> Path:
    rows: list[dict[str, Any]] = []
    for source, samples in TERRAMESH.items():
        radio = "S1RTC" if source == "majortom" else "S1GRD"
        name = f"{source}_shard_00000{len(samples)}.tar"
        for modality in ("S2L1C", "S2L2A", radio, "DEM", "NDVI"):
            shard(root / f"train/{modality}/{name}", samples, DATES[:1])
        for key, (_, sample) in samples.items():
            times = {"S1_time": DATES[0] + timedelta(days=2), "S2_time": DATES[0]}
            rows.append({"tar": name, "zarr": f"{key}.zarr.zip", "sample_id": sample, "cloud_cover": 0.0, **times})
    if table:
        schema = pa.schema({"S1_time": pa.timestamp("ns"), "S2_time": pa.timestamp("ns")})
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        naive = {name: [time.replace(tzinfo=None) for time in columns[name]] for name in schema.names}
        arrays = {name: pa.array(column, pa.timestamp("ns")) for name, column in naive.items()}
        pq.write_table(pa.table({**columns, **arrays}), root / "train_metadata.parquet")
    return root
