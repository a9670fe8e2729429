"""Raw scenes: a folder of Sentinel-2 products as downloaded, and of calibrated Sentinel-1 images on a map grid.

Sentinel-2: .SAFE folders and zips of them, Level-1C and Level-2A (`sentinel2_product`). A zip is read in place; as its
files are packed, tiles take longer than from a folder. A tile of the Military Grid
Reference System is a place, and every acquisition of it a scene; of several processings of one acquisition the newest
is used. Sentinel-1: GeoTIFFs (`sentinel1_product`), which belong to every tile that they overlap; without any
Sentinel-2 product each is a place of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from shards.archives import About, ArchiveError
from shards.archives import sentinel1_product as s1
from shards.archives import sentinel2_product as s2
from shards.archives.safe import Product, ProductError, in_folder, in_zip
from shards.raster import open_raster
from shards.raster_io import footprint
from shards.scene import LeftOut, Place, Scene, SceneError

ABOUT = About(
    title="Copernicus Sentinel-1 and Sentinel-2 products",
    licence="free, full and open: Legal Notice on the use of Copernicus Sentinel Data and Service Information",
    attribution="Contains modified Copernicus Sentinel data",
    source="https://dataspace.copernicus.eu",
    notes={
        "s1": "sigma0 or gamma0 as the products say; each sample's facts name it",
        "s2-l1c": "reflectance at the top of the atmosphere, without the offset of processing baseline 04.00",
        "s2-l2a": "reflectance at the ground, without the offset of processing baseline 04.00",
    },
)
LAYOUT = (
    "S2B_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T124759.SAFE/MTD_MSIL2A.xml, the same in a .zip, "
    "or S1A_IW_20181102T155531_DVP_RTC30_G_gpuned_5685/..._VV.tif with ..._VH.tif"
)
UNKNOWN_ZIP = "a zip without a Sentinel-2 product"
ZIPPED_RADAR = "Sentinel-1 in a zip: unpack it"
DIMAP = "BEAM-DIMAP of SNAP: write it as GeoTIFF"
LOOSE = "bands of Sentinel-2 without their product's metadata: keep the .SAFE folder whole"


def places(root: str) -> Iterator[Place | LeftOut]:
    """Tiles (or Sentinel-1 products) in the order of their names, then what was left out.

    Args:
        root: the folder; products may lie in folders below it. Or one product.

    Raises:
        ArchiveError: no folder, or nothing usable in it.
    """
    found = _search(Path(root))
    granules, left_out = _granules(found)
    radars: list[s1.Radar] = []
    for radar in s1.radars(found.root, found.images):
        (left_out if isinstance(radar, LeftOut) else radars).append(radar)  # type: ignore[arg-type]
    left_out += found.left_out
    if not granules and not radars:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in Counter(item.reason for item in left_out).items())
        raise ArchiveError(f"{root}: no Sentinel product to use; expected {LAYOUT}. Left out: {reasons or 'nothing'}")
    yield from _tiles(granules, radars) if granules else _radar_places(radars)
    yield from sorted(left_out, key=lambda item: (item.name, item.reason))


@dataclass
class _Found:
    """What lies below the root: products, GeoTIFFs outside of them, and the rest."""

    root: Path
    products: list[Product] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave(self, path: Path, reason: str) -> None:
        self.left_out.append(LeftOut(path.relative_to(self.root).as_posix(), reason))


def _search(root: Path) -> _Found:
    if root.is_file() and root.suffix == ".zip":
        found = _Found(root.parent)
        _file(found, root)
        return found
    if not root.is_dir():
        raise ArchiveError(f"{root}: no such folder; expected one with {LAYOUT}")
    found = _Found(root)
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__MACOSX")
        if _is_product(found, folder, [*folders, *files]):
            folders.clear()
            continue
        for file in sorted(files):
            if not file.startswith("."):
                _file(found, folder / file)
        if any(file.lower().endswith(".jp2") for file in files):
            found.leave(folder, LOOSE)
    return found


def _is_product(found: _Found, folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder is a product (or rests of one); it is then taken or left out as a whole."""
    if any(s2.METADATA.fullmatch(name) for name in names):
        found.products.append(in_folder(folder))
    elif s1.RAW_PRODUCT.fullmatch(folder.name):
        found.leave(folder, s1.STEPS)
    elif folder.suffix == ".SAFE" and folder.name[:2] == "S2" and not any(name.endswith(".SAFE") for name in names):
        found.products.append(in_folder(folder))  # whose missing metadata will be told
    elif folder.suffix == ".data" and folder.with_suffix(".dim").exists():
        found.leave(folder, DIMAP)
    else:
        return False
    return True


def _file(found: _Found, path: Path) -> None:
    """A file that belongs to no product's folder."""
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        found.images.append(path)
    elif suffix == ".zip":
        _zip(found, path)


def _zip(found: _Found, path: Path) -> None:
    try:
        products = in_zip(path)
    except ProductError as error:
        found.leave(path, error.reason)
        return
    for product in products:
        if s2.metadata_file(product) or (product.inside and product.name.startswith("S2")):
            found.products.append(product)
        elif s1.RAW_PRODUCT.fullmatch(f"{product.name}.SAFE"):
            found.leave(path, s1.STEPS)
        else:
            found.leave(path, ZIPPED_RADAR if product.name.startswith("S1") else UNKNOWN_ZIP)


def _granules(found: _Found) -> tuple[list[s2.Granule], list[LeftOut]]:
    granules: list[s2.Granule] = []
    left_out: list[LeftOut] = []
    for product in found.products:
        for granule in s2.granules(product):
            if isinstance(granule, s2.Granule):
                granules.append(granule)
            else:
                detail = f" ({granule.detail})" if granule.detail else ""
                left_out.append(LeftOut(f"{product.name}{detail}", granule.reason))
    kept, older = s2.newest(granules)
    return kept, left_out + [LeftOut(f"{granule.product} ({granule.tile})", s2.OLDER) for granule in older]


def _tiles(granules: Sequence[s2.Granule], radars: Sequence[s1.Radar]) -> Iterator[Place]:
    by_tile: dict[str, list[s2.Granule]] = {}
    for granule in granules:
        by_tile.setdefault(granule.tile, []).append(granule)
    for tile, members in sorted(by_tile.items()):
        area = _area([granule.scene for granule in members]) if radars else None
        over = [radar for radar in radars if area is not None and radar.area.intersection(area).area > 0]
        scenes = tuple(granule.scene for granule in members) + tuple(radar.scene for radar in over)
        yield Place(f"T{tile}", scenes, group=f"T{tile}", facts=_facts(members, over))


def _area(scenes: Sequence[Scene]) -> BaseGeometry | None:
    """The ground of a tile, by the first of its scenes that opens."""
    for scene in scenes:
        try:
            with open_raster(scene.assets[1]) as raster:
                if raster.grid.crs is not None:
                    return shape(footprint(raster.grid.crs, raster.grid.corners()))
        except SceneError:
            continue  # the build will name it
    return None


def _facts(granules: Sequence[s2.Granule], radars: Sequence[s1.Radar]) -> Mapping[str, Any]:
    """What the samples say of their products: kinds, not single products, as a place may have hundreds."""
    facts: dict[str, Any] = {"baselines": sorted({granule.rank[0] for granule in granules})}
    for sensor in sorted({granule.scene.sensor for granule in granules}):
        facts[f"cloud mask of {sensor}"] = sorted({g.mask for g in granules if g.scene.sensor == sensor})
    if radars:
        facts["s1"] = sorted({radar.kind for radar in radars})
    return facts


def _radar_places(radars: Sequence[s1.Radar]) -> Iterator[Place]:
    seen = Counter[str]()
    for radar in sorted(radars, key=lambda radar: (radar.name, radar.scene.path)):
        seen[radar.name] += 1
        name = radar.name if seen[radar.name] == 1 else f"{radar.name}-{seen[radar.name]}"
        yield Place(name, (radar.scene,), group=name, facts={"s1": [radar.kind]})
