"""SEN12MS: 180,662 triplets of Sentinel-1, Sentinel-2 and MODIS land cover (Schmitt et al. 2019).

    ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif    VV, VH in dB
    ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p30.tif    13 bands of Level-1C, reflectance x 10000
    ROIs1158_spring/lc_1/ROIs1158_spring_lc_1_p30.tif    4 land cover schemes; the first, IGBP, is the label

The other three bands of `lc` (LCCS land cover, land use and surface hydrology) are not used. The land cover is MODIS's
of about 500 m, resampled: coarse for pixels of 10 m. Of SEN12MS-CR, which has the same names, the cloudy images are
left out.

Splits, when the lists of https://github.com/schmitt-muc/SEN12MS/tree/master/splits are in the root or in its folder
`splits`: train_list.txt, val_list.txt and test_list.txt name patches, SEN12MS_holdOutScenes.txt names the scenes of the
test set (all others are then train).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from shards.archives import About
from shards.archives.roi_patches import Patch, find, place
from shards.archives.walk import lines, nothing
from shards.scene import Asset, LeftOut, Place

_INDEX_ERROR = "skipped by loaders derived from the authors' for an index error; not confirmed by the authors"
ABOUT = About(
    title="SEN12MS",
    licence="CC-BY-4.0 (as listed by torchgeo's documentation; see https://mediatum.ub.tum.de/1474000)",
    attribution="M. Schmitt, L. H. Hughes, C. Qiu, X. X. Zhu: SEN12MS, ISPRS Annals IV-2/W7, 153-160, 2019, "
    "doi:10.5194/isprs-annals-IV-2-W7-153-2019; contains modified Copernicus Sentinel data",
    source="https://mediatum.ub.tum.de/1474000",
    notes=MappingProxyType(
        {
            "s1": "sigma nought in dB (SupportingDocument.txt of the release)",
            "s2-l1c": "cloud-free images of one season; no dates",
        }
    ),
    broken=MappingProxyType(
        {
            "ROIs1868_summer_s1_146_p202.tif": "damaged: holds NaN (README of github.com/schmitt-muc/SEN12MS)",
            **{f"ROIs1158_spring_s2_1_p{number}.tif": _INDEX_ERROR for number in (127, 132, 219)},
            "ROIs2017_winter_s2_59_p318.tif": "skipped by one loader without a reason; not confirmed by the authors",
        }
    ),
)
LAYOUT = """\
  ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif
  ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p30.tif
  ROIs1158_spring/lc_1/ROIs1158_spring_lc_1_p30.tif"""
UNUSED = {
    "s2_cloudy": "cloudy image of SEN12MS-CR",
    "dfc": "labels of DFC2020: archive.name=dfc2020",
    **ABOUT.broken,
}
_IGBP = ("label", "", "", "")
_HELD_OUT = "SEN12MS_holdOutScenes.txt"


def places(root: str) -> Iterator[Place | LeftOut]:
    """Patches in the order of seed, season, scene and number; a patch that lacks a file has what there is.

    Raises:
        ArchiveError: no patch below `root`.
    """
    found = find(root, contest=False, unused=UNUSED)
    if not found.patches:
        raise nothing(root, "no file of SEN12MS was", LAYOUT)
    yield from found.left_out
    split = _splits(Path(root))
    for patch, paths in found.sorted():
        label = Asset(str(paths["lc"]), _IGBP) if "lc" in paths else None
        yield place(patch, paths, label, split(patch), {"season": patch.season})


def _splits(root: Path) -> Callable[[Patch], str]:
    """What the lists beside the archive say of a patch; "" where they do not name it."""
    folders = (root, root / "splits")
    patches: Mapping[str, str] = {
        re.sub(r"_s[12]_", "_", line.removesuffix(".tif")): name
        for name in ("train", "val", "test")  # val_list.txt names a part of the training patches: it comes later
        for folder in folders
        for line in lines(folder / f"{name}_list.txt")
    }
    held_out = {re.sub(r"/s[12]_", "_", line) for folder in folders for line in lines(folder / _HELD_OUT)}
    if patches or not held_out:
        return lambda patch: patches.get(patch.name, "")
    return lambda patch: "test" if patch.group in held_out else "train"
