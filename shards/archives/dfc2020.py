"""DFC2020: Sentinel-1 and Sentinel-2 patches with land cover labels at 10 m, of the IEEE GRSS Data Fusion Contest 2020.

Either as the contest gave it out, where the scene is always called 0:

    ROIs0000_validation/s1_validation/ROIs0000_validation_s1_0_p30.tif     986 patches: s1, s2, dfc and lc
    ROIs0000_test/s1_0/ROIs0000_test_s1_0_p30.tif                        5,128 patches

or as the later bundle, DFC_Public_Dataset.zip, by season and city, without splits:

    ROIs0000_autumn/s1_CapeTown/ROIs0000_autumn_s1_CapeTown_p1277.tif

`s1` holds VV and VH in dB, `s2` the 13 bands of Level-1C as in SEN12MS. Only `dfc` is a label: `lc` is MODIS's
land cover of about 500 m, and a repackaging that took it for the label is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from shards.archives import About
from shards.archives.roi_patches import find, place
from shards.archives.walk import nothing
from shards.scene import Asset, LeftOut, Place

ABOUT = About(
    title="2020 IEEE GRSS Data Fusion Contest (DFC2020)",
    licence="CC-BY (https://ieee-dataport.org/competitions/2020-ieee-grss-data-fusion-contest)",
    attribution="M. Schmitt, L. Hughes, P. Ghamisi, N. Yokoya, R. Hänsch: 2020 IEEE GRSS Data Fusion Contest, "
    "IEEE DataPort, doi:10.21227/rha7-m332; contains modified Copernicus Sentinel data",
    source="https://ieee-dataport.org/competitions/2020-ieee-grss-data-fusion-contest",
    notes=MappingProxyType({"s1": "backscatter in dB, as SEN12MS", "s2-l1c": "no dates"}),
)
LAYOUT = """\
  ROIs0000_test/s1_0/ROIs0000_test_s1_0_p30.tif, s2_0, dfc_0                        (contest)
  ROIs0000_autumn/s1_CapeTown/ROIs0000_autumn_s1_CapeTown_p1277.tif, s2_, dfc_      (public bundle)"""
UNUSED = {"lc": "MODIS land cover of 500 m; the labels are dfc", "s2_cloudy": "cloudy image of SEN12MS-CR"}
SPLITS = {"validation": "val", "test": "test"}


def places(root: str) -> Iterator[Place | LeftOut]:
    """Patches in the order of season (or split), scene (or city) and number, with what there is of each.

    Raises:
        ArchiveError: no patch below `root`.
    """
    found = find(root, contest=True, unused=UNUSED)
    if not found.patches:
        raise nothing(root, "no file of DFC2020 was", LAYOUT)
    yield from found.left_out
    for patch, paths in found.sorted():
        label = Asset(str(paths["dfc"])) if "dfc" in paths else None
        split = SPLITS.get(patch.season, "")
        yield place(patch, paths, label, split, {} if split else {"season": patch.season, "city": patch.scene})
