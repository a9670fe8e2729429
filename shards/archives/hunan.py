"""Hunan: yearly composites of 2017 of Sentinel-2, Sentinel-1 and elevation with land cover (DKDFN).

    Hunan_Dataset/train/s2/s2_2604.tif      13 bands
    Hunan_Dataset/train/s1/s1_2604.tif      VV, VH
    Hunan_Dataset/train/topo/topo_2604.tif  elevation in metres, and a second channel that is not used
    Hunan_Dataset/train/lc/lc_2604.tif      land cover codes 0..11, 255
    Hunan_Dataset/train/tri/tri_2604.tif    (train only) terrain ruggedness; not used

400 tiles of 256 x 256 px for training, 50 for validation, 50 for testing; ids have gaps. The tiles say nothing of where
they lie, so they are taken as co-registered, and neighbours cannot be told: all tiles of one split are one group.

Thirteen bands with B10 are Level-1C's. That the first channel of `topo` is elevation in metres (18..1892) is how
AMM-FuseNet (https://github.com/oktaykarakus/ReSIF) scales it. The authors' README does not say what the numbers of `s2`
and `s1` are: reflectance x 10000 and dB are assumed here, and a build stops where they cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from shards.archives import About
from shards.archives.walk import JUNK, files, is_junk, nothing
from shards.scene import LABEL, Asset, LeftOut, Place, Scene
from shards.sensors import SENSORS

_HOME = "https://github.com/LauraChow/HunanMultimodalDataset"
ABOUT = About(
    title="Hunan multimodal dataset (DKDFN)",
    licence=f"none stated; ask its authors ({_HOME})",
    attribution="DKDFN: Domain Knowledge-Guided Deep Collaborative Fusion Network for Multimodal Remote Sensing Yearly "
    "Composite Land Cover Classification; contains modified Copernicus Sentinel data",
    source=_HOME,
    notes=MappingProxyType(
        {
            "s2-l1c": "yearly composite of 2017; level and unit are not stated by its authors",
            "s1": "yearly composite of 2017; taken as dB, not stated by its authors",
            "dem": "SRTM, metres",
        }
    ),
)
LAYOUT = """\
  train/s2/s2_2604.tif, train/s1/s1_2604.tif, train/topo/topo_2604.tif, train/lc/lc_2604.tif
  and the same below val and test"""
SPLITS = ("train", "val", "test")
BANDS = {
    "s2": ("s2-l1c", SENSORS["s2-l1c"].band_names),
    "s1": ("s1", SENSORS["s1"].band_names),
    "topo": ("dem", ("DEM", "")),
    "lc": (LABEL, ()),
}
_NAME = re.compile(r"(?:(s2|s1|topo|lc|tri)_)?(\d+)\.tif")


def places(root: str) -> Iterator[Place | LeftOut]:
    """Tiles in the order of split and id, with what there is of each.

    Raises:
        ArchiveError: no tile below `root`.
    """
    tiles: dict[tuple[int, int], dict[str, Path]] = {}
    for path in files(root, ".tif"):
        kind, split, number = _facts(path.relative_to(root))
        reason = "" if kind in BANDS and split else _reason(path, kind)
        if not reason and tiles.setdefault((SPLITS.index(split), number), {}).setdefault(kind, path) != path:
            reason = "a second file of the same tile"
        if reason:
            yield LeftOut(path.relative_to(root).as_posix(), reason)
    if not tiles:
        raise nothing(root, "no tile of the Hunan dataset was", LAYOUT)
    for (index, number), paths in sorted(tiles.items()):
        scenes = (Scene(BANDS[kind][0], (Asset(str(paths[kind]), BANDS[kind][1]),)) for kind in BANDS if kind in paths)
        split = SPLITS[index]
        yield Place(
            f"{split}_{number}", tuple(scenes), group=split, split=split, coregistered=True, facts={"year": 2017}
        )


def _facts(path: Path) -> tuple[str, str, int]:
    """Kind (from the file's name, or its folder's where the name is only an id), split and id."""
    match = _NAME.fullmatch(path.name)
    if match is None or is_junk(path):
        return "", "", 0
    split = next((part for part in reversed(path.parts) if part in SPLITS), "")
    return match[1] or path.parent.name, split, int(match[2])


def _reason(path: Path, kind: str) -> str:
    if is_junk(path):
        return JUNK
    return "terrain ruggedness, made from the elevation" if kind == "tri" else "not a name of this archive"
