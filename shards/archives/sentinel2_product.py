"""Sentinel-2 products as downloaded: Level-1C and Level-2A, in the naming before and since December 2016.

Everything is read from the product's own metadata (ESA, Sentinel-2 Products Specification Document,
S2-PDGS-TAS-DI-PSD): which files are which bands, when the tile was seen, and reflectance = (number + offset) /
quantification value, where the offset exists since processing baseline 04.00. Products of Sen2Cor call some of the
elements by other names. Of the copies of a Level-2A band at 10, 20 and 60 m, the one at the instrument's own resolution
is taken.

Cloud masks: of Level-2A the scene classification (SCL) at 20 m, codes 8 and 9 (cloud of medium and high probability)
and 10 (thin cirrus); cloud shadow (3) is not counted, as the ground is seen there. Of Level-1C since baseline 04.00 the
band of opaque clouds of MSK_CLASSI_B00 at 60 m (its bands: opaque clouds, cirrus, snow and ice). Older Level-1C
products have vectors instead (MSK_CLOUDS_B00.gml), which are not read.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from shards.archives.baseline import of_baseline
from shards.archives.rows import MASKS, band_name
from shards.archives.safe import Product, ProductError, local
from shards.scene import Asset, CloudMask, Radiometry, Scene
from shards.sensors import SENSORS

METADATA = re.compile(r"(?i)MTD_MSIL(1C|2A)\.xml|S2[A-D]_(OPER|USER)_MTD_SAFL(1C|2A)\w*\.xml")
_TILE_METADATA = re.compile(r"(?i)MTD_TL\.xml|S2[A-D]_(OPER|USER)_MTD_L(1C|2A)_T\w*\.xml")
_IMAGES = ("IMAGE_FILE", "IMAGE_ID", "IMAGE_FILE_2A", "IMAGE_ID_2A")
_BAND = re.compile(r"_(B\d\d|B8A|SCL)(?:_L2A\w*?)?(?:_(10|20|60)m)?$")
_SENSORS = {"Level-1C": "s2-l1c", "Level-2A": "s2-l2a", "Level-2Ap": "s2-l2a"}
NO_MASK, CLASSES = "none", "MSK_CLASSI opaque clouds"
OLDER = "another processing of an acquisition whose newest is used"


@dataclass(frozen=True)
class Granule:
    """One acquisition of one tile of the Military Grid Reference System.

    Args:
        tile: such as 34UCF.
        scene: its files.
        product: the product's name.
        acquisition: the same for all products made of this acquisition at this level.
        rank: newer processings have greater ones.
        mask: what its cloud mask is made of.
    """

    tile: str
    scene: Scene
    product: str
    acquisition: tuple[str, ...]
    rank: tuple[str, str, bool, str]
    mask: str


def metadata_file(product: Product) -> str | None:
    """The name of the file that describes the product; None when it is no Sentinel-2 product (or incomplete)."""
    return next((name for name in sorted(product.sizes) if METADATA.fullmatch(name)), None)


def granules(product: Product) -> Iterator[Granule | ProductError]:
    """The tiles of a product; products of 2015 and 2016 have many. In place of what cannot be used comes the error."""
    try:
        for tile, root, numbers in _described(product):
            try:
                yield _granule(product, root, tile, numbers)
            except ProductError as error:
                yield error
    except ProductError as error:
        yield error


def _described(product: Product) -> Iterator[tuple[_Tile, ET.Element, Mapping[str, Radiometry]]]:
    """The tiles that the metadata name, with the metadata and what the bands' numbers mean.

    Raises:
        ProductError: there are no metadata, or they cannot be understood.
    """
    file = metadata_file(product)
    if file is None:
        raise ProductError("no metadata (MTD_MSIL1C.xml or MTD_MSIL2A.xml); download the product again")
    root = product.xml(file)
    sensor = _SENSORS.get(_text(root, "PROCESSING_LEVEL"), "")
    if not sensor:
        raise ProductError("of another level than 1C and 2A", _text(root, "PROCESSING_LEVEL"))
    numbers = _radiometry(root, sensor)
    for granule, (strip, images) in sorted(_granules(root).items()):
        yield _Tile(granule, strip, sensor, tuple(images)), root, numbers


@dataclass(frozen=True)
class _Tile:
    """What the product's metadata say of one granule."""

    granule: str
    strip: str
    sensor: str
    images: tuple[str, ...]


def _granule(product: Product, root: ET.Element, tile: _Tile, numbers: Mapping[str, Radiometry]) -> Granule:
    name = re.search(r"_T(\d\d[A-Z]{3})(?:_|$)", tile.granule)
    if name is None:
        raise ProductError("metadata without the tile's name", tile.granule)
    files = _files(product, tile)
    if missing := [band for band in SENSORS[tile.sensor].band_names if band not in files]:
        raise ProductError("incomplete, bands are missing; download it again", f"{tile.granule} has no {missing}")
    mask, said = _mask(product, tile.sensor, files)
    if short := product.truncated([*files.values(), *([_classes(files)] if said == CLASSES else [])]):
        raise ProductError("truncated files; download it again", ", ".join(short))
    assets = tuple(
        Asset(product.address(files[band]), (band,), radiometry=numbers[band])
        for band in SENSORS[tile.sensor].band_names
    )
    scene = Scene(tile.sensor, assets, _time(product, root, files["B2"]), mask)
    start = re.search(r"_S(\d{8}T\d{6})", tile.strip)
    taken = (tile.sensor, name[1], _text(root, "DATATAKE_SENSING_START"), start[1] if start else tile.strip)
    rank = (_text(root, "PROCESSING_BASELINE"), _text(root, "GENERATION_TIME"), not product.zipped, product.location)
    return Granule(name[1], scene, product.name, taken, rank, said)


def _text(root: ET.Element, *names: str) -> str:
    """The text of the first element with one of these names; "" when there is none."""
    return next(((e.text or "").strip() for e in root.iter() if local(e) in names), "")


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ProductError("metadata without a number that is needed", f"{name} is {text!r}") from None


def _radiometry(root: ET.Element, sensor: str) -> dict[str, Radiometry]:
    """What the numbers of each band mean: reflectance x 10000 = (number + offset) * 10000 / quantification value."""
    prefix = "RADIO" if sensor == "s2-l1c" else "BOA"
    named = {"RADIO": ("QUANTIFICATION_VALUE",), "BOA": ("BOA_QUANTIFICATION_VALUE", "L2A_BOA_QUANTIFICATION_VALUE")}
    scale = 10000.0 / _number(_text(root, *named[prefix]), named[prefix][0])
    # Bands are numbered in the order of the sensor table's Level-1C: B8A after B8.
    order = SENSORS["s2-l1c"].band_names
    element = f"{prefix}_ADD_OFFSET"
    found = {e.get("band_id", ""): _number(e.text or "", element) for e in root.iter() if local(e) == element}
    baseline = _number(_text(root, "PROCESSING_BASELINE"), "PROCESSING_BASELINE")
    if not found and of_baseline(str(baseline)):
        raise ProductError("metadata of baseline 04.00 or newer without the offset", f"no {element}")
    offsets = {band: found.get(str(number), 0.0) for number, band in enumerate(order)}
    return {band: Radiometry(scale, offset * scale) for band, offset in offsets.items()}


def _granules(root: ET.Element) -> dict[str, tuple[str, list[str]]]:
    """Data strip and images of each granule; some metadata name a granule once per resolution."""
    found: dict[str, tuple[str, list[str]]] = {}
    for element in root.iter():
        if name := element.get("granuleIdentifier"):
            _, images = found.setdefault(name, (element.get("datastripIdentifier", ""), []))
            images += [(e.text or "").strip() for e in element if local(e) in _IMAGES]
    if not found:
        raise ProductError("metadata without granules; download the product again")
    return found


def _files(product: Product, tile: _Tile) -> dict[str, str]:
    """The file of each band, and of SCL, at the instrument's own resolution (SCL at 20 m)."""
    # Older metadata name images without their folders.
    stems = {PurePosixPath(name).stem: name for name in sorted(product.sizes) if name.lower().endswith(".jp2")}
    native = {band.name: band.resolution for band in SENSORS[tile.sensor].bands} | {"SCL": 20.0}
    files: dict[str, str] = {}
    for image in tile.images:
        match = _BAND.search(image)
        if match is None:
            continue
        band, file = band_name(tile.sensor, match[1]), stems.get(PurePosixPath(image).name)
        if band in native and file and (match[2] is None or float(match[2]) == native[band]):
            files[band] = file
    return files


def _mask(product: Product, sensor: str, files: Mapping[str, str]) -> tuple[CloudMask | None, str]:
    """The cloud mask, and what it is."""
    if sensor == "s2-l2a":
        if "SCL" not in files:
            return None, NO_MASK
        return CloudMask(Asset(product.address(files["SCL"])), MASKS["SCL"]), "SCL codes 8, 9 and 10"
    if _classes(files) not in product.sizes:
        return None, NO_MASK
    return CloudMask(Asset(product.address(_classes(files)), ("CLOUD", "", ""))), CLASSES


def _classes(files: Mapping[str, str]) -> str:
    """Where the classification mask of Level-1C lies since baseline 04.00."""
    return str(PurePosixPath(files["B2"]).parents[1] / "QI_DATA" / "MSK_CLASSI_B00.jp2")


def _time(product: Product, root: ET.Element, file: str) -> datetime:
    """When the tile was seen; where the tile's own metadata are missing, when the product begins."""
    folder = next((path for path in PurePosixPath(file).parents if path.parent.name == "GRANULE"), None)
    files = [path for path in map(PurePosixPath, sorted(product.sizes)) if path.parent == folder]
    tile = next((str(path) for path in files if _TILE_METADATA.fullmatch(path.name)), None)
    text = (_text(product.xml(tile), "SENSING_TIME") if tile else "") or _text(root, "PRODUCT_START_TIME")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ProductError("metadata without the sensing time", text) from None


def newest(found: Sequence[Granule]) -> tuple[list[Granule], list[Granule]]:
    """One granule per acquisition, of its newest processing, and the others."""
    best: dict[tuple[str, ...], Granule] = {}
    for granule in found:
        other = best.get(granule.acquisition)
        if other is None or granule.rank > other.rank:
            best[granule.acquisition] = granule
    kept = sorted(best.values(), key=lambda granule: (granule.tile, granule.scene.path))
    return kept, [granule for granule in found if best[granule.acquisition] is not granule]
