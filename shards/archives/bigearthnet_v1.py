"""BigEarthNet v1: 590,326 pairs of Sentinel-2 Level-2A and Sentinel-1 patches of 1.2 km with the land cover's names.

    BigEarthNet-v1.0/S2A_MSIL2A_20170613T101031_87_48/S2A_MSIL2A_20170613T101031_87_48_B02.tif     12 files, no B10
                                                     S2A_MSIL2A_20170613T101031_87_48_labels_metadata.json
    BigEarthNet-S1-v1.0/S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48/..._VV.tif, ..._VH.tif in dB, and a JSON file that
                                                     names the Sentinel-2 patch

The folders of patches may lie at any of three levels below the root. Bands have 10, 20 or 60 m. There is no label per
pixel; the names of the classes that occur are in the samples' facts (`labels`), and the groups are Sentinel-2's tiles.

If they are in the root: the split lists train.csv, val.csv and test.csv (or bigearthnet-train.csv ...) give splits, and
patches of patches_with_seasonal_snow.csv and patches_with_cloud_and_shadow.csv are left out, as the authors suggest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shards.archives import About
from shards.archives.bigearthnet import S1, folders, scene
from shards.archives.walk import folder, lines, nothing
from shards.scene import LeftOut, Place, Scene

ABOUT = About(
    title="BigEarthNet v1.0",
    licence="CDLA-Permissive-1.0 (as listed by torchgeo's documentation; see https://bigearth.net/v1.0.html)",
    attribution="G. Sumbul et al.: BigEarthNet-MM, IEEE Geoscience and Remote Sensing Magazine, 2021, "
    "doi:10.1109/MGRS.2021.3089174; contains modified Copernicus Sentinel data",
    source="https://bigearth.net/v1.0.html",
    notes=MappingProxyType(
        {
            "s1": "GRD in dB; processing in the archive's description document",
            "s2-l2a": "sen2cor, acquired June 2017 to May 2018, before the offset of baseline 04.00",
        }
    ),
)
LAYOUT = """\
  BigEarthNet-v1.0/S2A_MSIL2A_20170613T101031_87_48/S2A_MSIL2A_20170613T101031_87_48_B02.tif
  BigEarthNet-S1-v1.0/S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48/..._VV.tif, ..._labels_metadata.json"""
LISTS = {
    "patches_with_seasonal_snow.csv": "seasonal snow",
    "patches_with_cloud_and_shadow.csv": "cloud or its shadow",
}
SECOND = "a second patch beside the one that is used"
_S2 = re.compile(r"S2[AB]_MSIL2A_\d{8}T\d{5,6}_\d+_\d+")
_TILE = re.compile(r"_T(\d{2}[A-Z]{3})_")


def places(root: str) -> Iterator[Place | LeftOut]:
    """Patches sorted by the name of their Sentinel-2 patch, with the Sentinel-1 patch that belongs to it, if any.

    Raises:
        ArchiveError: no patch below `root`.
    """
    home = folder(root)
    optical: dict[str, Path] = {}
    radar: dict[str, Path] = {}
    for path in folders(home, _S2):
        if optical.setdefault(path.name, path) != path:
            yield LeftOut(path.relative_to(home).as_posix(), SECOND)
    for path in folders(home, S1):
        partner = _metadata(path).get("corresponding_s2_patch")
        if not isinstance(partner, str):
            yield LeftOut(path.name, "no JSON file names its Sentinel-2 patch")
        elif radar.setdefault(partner, path) != path:
            yield LeftOut(path.relative_to(home).as_posix(), SECOND)
    names = sorted({*optical, *radar})
    if not names:
        raise nothing(root, "no patch of BigEarthNet v1 was", LAYOUT)
    splits, unwanted = _splits(home), _unwanted(home)
    for name in names:
        if name in unwanted:
            yield LeftOut(name, unwanted[name])
        else:
            yield from _place(name, optical.get(name), radar.get(name), splits.get(name, ""))


def _place(name: str, optical: Path | None, radar: Path | None, split: str) -> Iterator[Place | LeftOut]:
    found = [scene(sensor, path) for sensor, path in (("s2-l2a", optical), ("s1", radar)) if path is not None]
    yield from (LeftOut(name, reason) for reason in found if isinstance(reason, str))
    if scenes := tuple(part for part in found if isinstance(part, Scene)):
        known = _metadata(radar or optical)
        tile = S1.fullmatch(radar.name) if radar else _TILE.search(str(known.get("tile_source")))
        group = tile[1] if tile else ""
        yield Place(name, scenes, group=group, split=split, facts={"labels": list(known.get("labels", []))})


def _metadata(patch: Path | None) -> Mapping[str, Any]:
    """What the JSON file of a patch says; nothing where it is missing or damaged."""
    try:
        known = json.loads((patch / f"{patch.name}_labels_metadata.json").read_text()) if patch else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _splits(root: Path) -> dict[str, str]:
    """Split by Sentinel-2 patch, from the lists in the root: a line each, followed by the Sentinel-1 patch or not."""
    return {
        line.split(",")[0]: split
        for split in ("train", "val", "test")
        for prefix in ("", "bigearthnet-")
        for line in lines(root / f"{prefix}{split}.csv")
    }


def _unwanted(root: Path) -> dict[str, str]:
    return {line.split(",")[0]: reason for name, reason in LISTS.items() for line in lines(root / name)}
