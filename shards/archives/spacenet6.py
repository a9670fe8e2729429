"""SpaceNet 6 (MSAW): quad-pol X-band SAR from an aircraft and WorldView-2 over Rotterdam, with building outlines.

Every fact of a tile is in the name of its files, so that `AOI_11_Rotterdam` may lie at any depth:

    train/AOI_11_Rotterdam/SAR-Intensity/SN6_Train_AOI_11_Rotterdam_SAR-Intensity_<start>_<stop>_tile_<n>.tif
    train/AOI_11_Rotterdam/{PS-RGBNIR,RGBNIR,PS-RGB,PAN}/...         the same name with the product's token
    train/AOI_11_Rotterdam/geojson_buildings/SN6_Train_AOI_11_Rotterdam_Buildings_<start>_<stop>_tile_<n>.geojson
    train/AOI_11_Rotterdam/SummaryData/SAR_orientations.txt          "<start>_<stop> <0|1>", a line per strip
    test_public/AOI_11_Rotterdam/SAR-Intensity/SN6_Test_Public_AOI_11_Rotterdam_SAR-Intensity_...   without the rest

`<start>` and `<stop>` (YYYYMMDDHHMMSS) bound the flight of a strip; strips overlap each other many times.

The optical image is PS-RGBNIR, which has the SAR's pixels of 0.5 m. RGBNIR, of coarser pixels that its own transform
tells, takes its place only in trees that hold no PS-RGBNIR at all, so that one dataset never mixes the two. PS-RGB
lacks the near infrared and PAN the colours: both are left out. All of it is one image of 31 August 2019, whatever
flight its tiles are named after (J. Shermeyer, "SpaceNet 6: Announcing the Winners", 4 June 2020).

Every tile of train was searched for buildings; one without any has a GeoJSON file without features, which means
background everywhere. A tile of train without file has lost it, and is not labelled.

Strips were flown looking south and north, and shadows and layover fall accordingly. Tiles whose strip has flag 1 are
turned by 180 degrees when samples are put together (`orientation` in the sample's facts), as in the challenge's own
baseline (CosmiQ_SN6_Baseline, baseline.py), so that all look one way. In the shards north is up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from shards.archives import About, ArchiveError
from shards.archives.walk import JUNK, files, is_junk, lines, nothing
from shards.scene import LABEL, Asset, LeftOut, Place, Scene
from shards.sensors import SENSORS

ABOUT = About(
    title="SpaceNet 6: Multi-Sensor All Weather Mapping (MSAW)",
    licence="CC-BY-SA-4.0",
    attribution="The SpaceNet Dataset by SpaceNet Partners. J. Shermeyer, D. Hogan, J. Brown, A. Van Etten, N. Weir, "
    "F. Pacifici, R. Hänsch, A. Bastidas, S. Soenen, T. Bacastow, R. Lewis: SpaceNet 6: Multi-Sensor All Weather "
    "Mapping Dataset, CVPR Workshops 2020, arXiv:2004.06500",
    source="https://spacenet.ai/sn6-challenge/",
    notes=MappingProxyType(
        {
            "sar-quadpol": "intensity of X band on a logarithmic scale as given out; its calibration is not told",
            "rgbnir": "WorldView-2, 31 August 2019, numbers of 11 bits as given out",
        }
    ),
)
LAYOUT = """\
  train/AOI_11_Rotterdam/SAR-Intensity/SN6_Train_AOI_11_Rotterdam_SAR-Intensity_<start>_<stop>_tile_<n>.tif
  train/AOI_11_Rotterdam/PS-RGBNIR/..., geojson_buildings/..., SummaryData/SAR_orientations.txt
  test_public/AOI_11_Rotterdam/SAR-Intensity/SN6_Test_Public_AOI_11_Rotterdam_SAR-Intensity_..._tile_<n>.tif
as unpacked by: tar xf SN6_buildings_AOI_11_Rotterdam_train.tar.gz (and ..._test_public.tar.gz)"""
ORIENTATIONS = "SAR_orientations.txt"
OPTICAL_DAY = datetime(2019, 8, 31, tzinfo=UTC)
SAR, OPTICAL, COARSE, BUILDINGS = "SAR-Intensity", "PS-RGBNIR", "RGBNIR", "Buildings"
UNUSED = {"PS-RGB": "no near infrared; PS-RGBNIR is used", "PAN": "panchromatic; PS-RGBNIR is used"}
SPLITS = {"Train": "train", "Test_Public": "test_public"}
_NAME = re.compile(
    r"SN6_(?P<split>Train|Test_Public)_AOI_11_Rotterdam_(?P<product>SAR-Intensity|PS-RGBNIR|RGBNIR|PS-RGB|PAN|Buildings)"
    r"_(?P<strip>(?P<start>\d{14})_\d{14})_tile_(?P<number>\d+)\.(?:tif|geojson)"
)


_Key = tuple[str, int, str]


@dataclass
class _Tile:
    """The files of a tile by product."""

    time: datetime
    paths: dict[str, Path] = field(default_factory=dict)


@dataclass
class _Found:
    """Tiles by (strip, number, split), files of orientations, and what is neither."""

    tiles: dict[_Key, _Tile] = field(default_factory=dict)
    orientations: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def places(root: str) -> Iterator[Place | LeftOut]:
    """Tiles in the order of strip and number, with what there is of each; `facts["orientation"]` is 0 or 1.

    Raises:
        ArchiveError: no tile below `root`, or files of orientations that contradict each other.
    """
    found = _find(root)
    if not found.tiles:
        raise nothing(root, "no image of SpaceNet 6 was", LAYOUT)
    yield from found.left_out
    flags, unread = _orientations(root, found.orientations)
    yield from unread
    if found.orientations:
        unknown = sorted({strip for strip, *_ in found.tiles} - set(flags))
        yield from (LeftOut(strip, "orientation of the strip is not known; not turned") for strip in unknown)
    sharp = any(OPTICAL in tile.paths for tile in found.tiles.values())
    for key in sorted(found.tiles):
        strip, number, split = key
        if split != "train" and (strip, number, "train") in found.tiles:
            yield LeftOut(f"{strip}_tile_{number} {split}", "the tile is in train, too")
        else:
            yield from _place(key, found.tiles[key], flags, OPTICAL if sharp else COARSE)


def _find(root: str) -> _Found:
    found = _Found()
    for path in files(root, ".tif", ".geojson", ".txt"):
        match = _NAME.fullmatch(path.name)
        if is_junk(path):
            reason = JUNK
        elif path.name == ORIENTATIONS:
            found.orientations.append(path)
            continue
        else:
            reason = _add(found.tiles, path, match) if match else "not a name of this archive"
        if reason:
            found.left_out.append(LeftOut(path.relative_to(root).as_posix(), reason))
    return found


def _add(tiles: dict[_Key, _Tile], path: Path, match: re.Match[str]) -> str:
    """Put a file to its tile; why not, otherwise."""
    product = match["product"]
    if product in UNUSED:
        return UNUSED[product]
    try:
        time = datetime.strptime(match["start"], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return "not a name of this archive"
    tile = tiles.setdefault((match["strip"], int(match["number"]), SPLITS[match["split"]]), _Tile(time))
    return "" if tile.paths.setdefault(product, path) == path else "a second file of the same name"


def _orientations(root: str, paths: list[Path]) -> tuple[dict[str, int], list[LeftOut]]:
    """The flag of each strip, and what could not be read."""
    flags, unread = dict[str, int](), [] if paths else [LeftOut(ORIENTATIONS, "not found; no tile is turned")]
    for path in paths:
        for line in lines(path):
            match = re.fullmatch(r"(\d{14}_\d{14})\s+([01])", line)
            if match is None:
                unread.append(LeftOut(f"{ORIENTATIONS}: {line[:60]}", "not '<start>_<stop> <0|1>'"))
            elif flags.setdefault(match[1], int(match[2])) != int(match[2]):
                raise ArchiveError(f"{root}: orientation of strip {match[1]} is 0 and 1; keep one {ORIENTATIONS}")
    return flags, unread


def _place(key: _Key, tile: _Tile, flags: Mapping[str, int], optical: str) -> Iterator[Place | LeftOut]:
    strip, number, split = key
    name, scenes = f"{strip}_tile_{number}", []
    for product, sensor, time in ((SAR, "sar-quadpol", tile.time), (optical, "rgbnir", OPTICAL_DAY)):
        if product in tile.paths:
            asset = Asset(str(tile.paths[product]), SENSORS[sensor].band_names)
            scenes.append(Scene(sensor, (asset,), time))
    if optical != COARSE and COARSE in tile.paths:
        yield LeftOut(tile.paths[COARSE].name, "coarser; PS-RGBNIR is used")
    if not scenes:
        yield LeftOut(name, "no image")
        return
    if BUILDINGS in tile.paths:
        scenes.append(Scene(LABEL, (Asset(str(tile.paths[BUILDINGS])),)))
    elif split == "train":
        yield LeftOut(f"{name} {LABEL}", "no GeoJSON file, so not labelled (a tile without buildings has an empty one)")
    facts = {"orientation": flags[strip]} if strip in flags else {}
    yield Place(name, tuple(scenes), group=strip, split=split, facts=facts)
