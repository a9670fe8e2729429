"""BigEarthNet v2 (reBEN): pairs of Sentinel-2 Level-2A and Sentinel-1 patches of 1.2 km, with land cover per pixel.

    metadata.parquet     patch_id, s1_name, split, and labels, country ...
    BigEarthNet-S2/<tile>/<patch_id>/<patch_id>_B02.tif ...                     12 files, no B10; 10, 20 and 60 m
    BigEarthNet-S1/<scene>/<s1_name>/<s1_name>_VV.tif, ..._VH.tif               dB
    Reference_Maps/<tile>/<patch_id>/<patch_id>_reference_map.tif               codes of CORINE land cover 2018, 10 m

<tile> is the patch_id without its last two parts, S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP, and <scene> the s1_name
without its last three. The folders, with the table beside them, may lie one or two levels below the root. N9999 is the
processing baseline that sen2cor writes when run by users; no offset was added to the numbers. Groups are Sentinel-2's
tiles; the splits are the authors'.

Patches that `metadata.parquet` does not list are left out: its authors leave those with seasonal snow, clouds or their
shadow out of it (ben-metadata-finalizer.sql of https://github.com/kai-tub/bigearthnet-pipeline).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq

from shards.archives import About, ArchiveError
from shards.archives.bigearthnet import S1, scene
from shards.archives.tree import base, visible
from shards.archives.walk import nothing
from shards.scene import LABEL, Asset, LeftOut, Place, Scene
from shards.tables import read_table

ABOUT = About(
    title="BigEarthNet v2.0 (reBEN)",
    licence="CDLA-Permissive-1.0 (as a repackaging on Hugging Face states it; see https://bigearth.net)",
    attribution="K. N. Clasen, L. Hackel, T. Burgert, G. Sumbul, B. Demir, V. Markl: reBEN: Refined BigEarthNet "
    "Dataset for Remote Sensing Image Analysis, IGARSS 2025, doi:10.1109/IGARSS55030.2025.11242834; contains modified "
    "Copernicus Sentinel data and CORINE Land Cover 2018",
    source="https://bigearth.net",
    notes=MappingProxyType(
        {
            "s1": "GRD in dB, the patches of BigEarthNet v1",
            "s2-l2a": "sen2cor 2.11, baseline N9999: without the offset of baseline 04.00",
        }
    ),
)
LAYOUT = """\
  metadata.parquet
  BigEarthNet-S2/S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP/<patch_id>/<patch_id>_B02.tif
  BigEarthNet-S1/S1A_IW_GRDH_1SDV_20170613T165043/<s1_name>/<s1_name>_VV.tif
  Reference_Maps/S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP/<patch_id>/<patch_id>_reference_map.tif"""
SPLITS = {"train": "train", "validation": "val", "test": "test"}
FOLDERS = ("BigEarthNet-S2", "BigEarthNet-S1", "Reference_Maps")
NEEDED, FACTS = ("patch_id", "s1_name", "split"), ("labels", "country")
_S2 = re.compile(r"S2[AB]_MSIL2A_\w+_T(?P<tile>\d{2}[A-Z]{3})_\d+_\d+")


def places(root: str) -> Iterator[Place | LeftOut]:
    """Patches sorted by patch_id, with what there is of each.

    Raises:
        ArchiveError: no metadata.parquet, one that lacks columns, or no patch.
    """
    home = base(root, FOLDERS, LAYOUT)
    rows = _rows(home / "metadata.parquet")
    homes = {name: _folder(home, name) for name in FOLDERS}
    usable = False
    for name in sorted({*rows, *_patches(homes["BigEarthNet-S2"])}):
        if name not in rows:
            yield LeftOut(name, "not in metadata.parquet (seasonal snow, clouds or their shadow)")
            continue
        for item in _place(name, rows[name], homes):
            usable |= isinstance(item, Place)
            yield item
    if not usable:
        raise nothing(root, "no patch of BigEarthNet v2 was", LAYOUT)


def _folder(home: Path, name: str) -> Path:
    """The folder of this name: the inner one where a tar was unpacked into a folder of its own name."""
    return home / name / name if (home / name / name).is_dir() else home / name


def _rows(table: Path) -> dict[str, dict[str, Any]]:
    if not table.is_file():
        raise ArchiveError(f"{table} is missing; it says which patches of Sentinel-1 and Sentinel-2 belong together")
    there = pq.read_schema(table).names
    if missing := [name for name in NEEDED if name not in there]:
        raise ArchiveError(f"{table}: columns {missing} are missing; BigEarthNet v2's metadata.parquet has {NEEDED}")
    columns = [*NEEDED, *(name for name in FACTS if name in there)]
    return {row.pop("patch_id"): row for row in read_table(table, columns).to_pylist()}


def _patches(folder: Path) -> Iterator[str]:
    """Names of the patches on disk: <folder>/<tile>/<patch>."""
    for tile in visible(folder) if folder.is_dir() else ():
        if tile.is_dir():
            yield from (name for name in os.listdir(tile) if _S2.fullmatch(name))


def _place(name: str, row: Mapping[str, Any], homes: Mapping[str, Path]) -> Iterator[Place | LeftOut]:
    tile, radar, known = name.rsplit("_", 2)[0], str(row["s1_name"]), _S2.fullmatch(name)
    if known is None or S1.fullmatch(radar) is None:  # names become paths: nothing but names of patches may
        yield LeftOut(name, "metadata.parquet has no valid names for it")
        return
    found = [
        scene("s2-l2a", homes["BigEarthNet-S2"] / tile / name),
        scene("s1", homes["BigEarthNet-S1"] / radar.rsplit("_", 3)[0] / radar),
    ]
    yield from (LeftOut(name, reason) for reason in found if isinstance(reason, str))
    scenes = [part for part in found if isinstance(part, Scene)]
    if not scenes:
        return
    label = homes["Reference_Maps"] / tile / name / f"{name}_reference_map.tif"
    if label.is_file():
        scenes.append(Scene(LABEL, (Asset(str(label)),)))
    facts = {key: row[key] for key in FACTS if key in row}
    yield Place(name, tuple(scenes), group=known["tile"], split=SPLITS.get(row["split"], ""), facts=facts)
