"""Foreign tars: samples read where they lie, in the tars of the archive that they came in.

`mcf shards index` writes a manifest whose members are byte ranges of such tars, one zarr group per modality, in
different tars for different modalities; `dataset.json` says under `foreign` where the tars are and how a group is read.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shards.containers import readable, zarr_raster
from shards.sample import Buffer, Sample, Tile
from shards.scene import Asset, Scene
from shards.tile import open_rasters, read_tile
from shards.zarr_zip import Source, ZarrZip


@dataclass(frozen=True)
class Part:
    """How one modality's group is read: the array and its indices (`bands/0`), the bands' names, the nodata value."""

    item: str
    bands: tuple[str, ...]
    nodata: float | None = None


def parts_of(foreign: Mapping[str, Any]) -> dict[str, Part]:
    """The parts by sensor that `dataset.json` tells."""
    return {name: Part(**{**part, "bands": tuple(part["bands"])}) for name, part in foreign["parts"].items()}


def to_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The inverse of `parts_of`."""
    return {name: asdict(part) for name, part in parts.items()}


def decode(members: Mapping[str, Buffer], parts: Mapping[str, Part], sensors: Sequence[str]) -> Sample:
    """The sample whose groups are these members, named `KEY.<sensor>.zarr.zip`.

    Raises:
        SceneError: a group is damaged or is not what `parts` says.
    """
    key = next(iter(members)).split(".", 1)[0]
    return Sample(key, {name: _tile(members[f"{key}.{name}.zarr.zip"], key, name, parts[name]) for name in sensors})


def _tile(content: Buffer, key: str, sensor: str, part: Part) -> Tile:
    name = f"{key}.{sensor}"
    with readable(name), zipfile.ZipFile(io.BytesIO(content)) as zipped:
        raster = zarr_raster(ZarrZip(Source(name), zipped), part.item, name)
        asset = Asset(name, part.bands, nodata=part.nodata)
        opened = open_rasters(Scene(sensor, (asset,)), [(asset, raster)], coregistered=True)
        return read_tile(opened, opened.grid)
