"""TerraMesh: nine million places as tars of zarr groups.

    {train,val}/{S1GRD,S1RTC,S2L1C,S2L2A,DEM,...}/{majortom,ssl4eos12}_shard_000001.tar     members <key>.zarr.zip
    {train,val}_metadata.parquet    optional: tar, zarr, sample_id, S1_time, S2_time

Shards of one name hold the same keys. With the tables of metadata no group is opened for its time, which at full size
is the difference between minutes and hours. A sample of Major TOM has S1RTC, one of SSL4EO-S12 S1GRD; both are `s1`.

Sources: README.md and terramesh.py of ibm-esa-geospatial/TerraMesh; Blumenstiel et al. 2025 (arXiv:2504.11172). See
zarr_groups.py for what the groups hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.archives import About, ArchiveError
from shards.archives.tree import base
from shards.archives.walk import nothing
from shards.archives.zarr_groups import END, Told, moment, tar_places
from shards.scene import LeftOut, Place
from shards.tables import read_table

ABOUT = About(
    title="TerraMesh",
    licence="CC-BY-SA-4.0",
    attribution=(
        "Blumenstiel et al. 2025, TerraMesh; made of Major TOM Core and SSL4EO-S12 v1.1; contains modified Copernicus "
        "Sentinel data; Copernicus DEM: DLR e.V. 2010-2014 and Airbus Defence and Space GmbH 2014-2018, provided under "
        "COPERNICUS by the European Union and ESA"
    ),
    source="Hugging Face: ibm-esa-geospatial/TerraMesh",
    notes={
        "s1": "dB; keys majortom_*: RTC (gamma0, terrain corrected), keys ssl4eos12_*: GRD (no terrain correction)",
        "s2-l1c": (
            "numbers as published. The offset of 1000 of baseline 04.00 is still in products of Major TOM from before "
            "2022 that ESA processed again (one of 2021 at hand has it; the published mean of B10, 506, says: half)"
        ),
        "s2-l2a": "numbers as published; three samples at hand (2020, 2021, 2023) are without the offset of 1000",
        "dem": "Copernicus DEM GLO-30, metres above EGM2008, whole numbers; sea is 0",
    },
    broken={
        "ssl4eos12_*": "S1GRD downloaded before 2026-03-05 is not sorted by date (README of the dataset, News)",
    },
)

LAYOUT = "{train,val}/S2L2A/majortom_shard_000001.tar"
SPLITS = ("train", "val")


def places(root: str) -> Iterator[Place | LeftOut]:
    """Places in the order of splits, shards and keys.

    Args:
        root: the folder that holds train or val.

    Raises:
        ArchiveError: neither, or no tar in them.
    """
    top, empty = base(root, SPLITS, LAYOUT), True
    for split in SPLITS:
        if (top / split).is_dir():
            for place in tar_places(top / split, _table(top / f"{split}_metadata.parquet")):
                empty = empty and isinstance(place, LeftOut)
                yield place
    if empty:
        raise nothing(str(top), "no tar of zarr groups", LAYOUT)


def _table(path: Path) -> Mapping[str, Mapping[str, Told]]:
    """What the metadata tell, by tar and key."""
    if not path.is_file():
        return {}
    columns = ["tar", "zarr", "sample_id", "S1_time", "S2_time"]
    if missing := set(columns) - set(pq.read_schema(path).names):
        raise ArchiveError(f"{path}: lacks the columns {sorted(missing)}; load it again, or remove it to do without")
    return _Table(read_table(path, columns))


class _Table(Mapping[str, Mapping[str, Told]]):
    """Rows by tar, made into objects when a tar is asked for: there are nine million."""

    def __init__(self, rows: Any) -> None:
        tars = rows["tar"].combine_chunks().dictionary_encode()
        self._rows = rows.drop_columns(["tar"])
        self._codes = {name: code for code, name in enumerate(tars.dictionary.to_pylist())}
        self._indices = tars.indices.to_numpy()

    def __getitem__(self, tar: str) -> Mapping[str, Told]:
        rows = self._rows.take((self._indices == self._codes[tar]).nonzero()[0])
        s1, s2 = (rows[name].to_numpy().astype("datetime64[s]") for name in ("S1_time", "S2_time"))
        return {
            Path(zarr).name.removesuffix(END): Told({"S1": moment(radar), "S2": moment(optical)}, sample)
            for zarr, sample, radar, optical in zip(
                rows["zarr"].to_pylist(), rows["sample_id"].to_pylist(), s1, s2, strict=True
            )
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)
