"""Any scenes, listed as STAC items: an ItemCollection (what a search is saved as), or a folder of items.

Place: the item's property `place`, or its tile of the Military Grid Reference System (`grid:code`, `s2:mgrs_tile`,
`mgrs:*`). Items without either (radar, elevation) belong to every place whose ground they overlap, by the items'
geometries; where no item names a place, each is one. Properties `group` and `split` are taken over.

Sensor: the property `sensor` (a name of the sensor table, or `label`), or else Sentinel-2 with its level, Sentinel-1
that is terrain-corrected (RTC), or elevation (a collection with `dem` in its name).

Assets: bands by the names or common names of `bands` (STAC 1.1) or `eo:bands`, or by the asset's key; of several
resolutions the one nearest to the instrument's, GeoTIFF before JPEG 2000. SCL is the cloud mask. `raster:bands` scale
and offset give reflectance; without them the offset of the processing baseline is taken off (`baseline`), and where
`earthsearch:boa_offset_applied` is true nothing is, whatever the item's offset says: it then describes numbers that
are gone. Addresses: files beside the item, s3:// and, read in place, https://; signed ones are refused (`rows`).

STAC 1.1.0; extensions eo 2.0, raster 2.0, grid 1.1, processing 1.2, sar 1.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapely import make_valid
from shapely.errors import ShapelyError
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from shards.archives import About, ArchiveError
from shards.archives.baseline import of_baseline, offset
from shards.archives.rows import MASKS, Row, address, assemble, band_name
from shards.archives.sentinel1_product import STEPS, UNTOLD, quantity
from shards.archives.sentinel2_product import OLDER
from shards.scene import LABEL, Asset, LeftOut, Place, Radiometry
from shards.sensors import SENSORS

if TYPE_CHECKING:
    import pystac

ABOUT = About(title="own scenes, listed as STAC items", licence="", attribution="", source="the items of archive.root")
# Common names of the eo extension that are one band of Sentinel-2; "rededge" alone may be any of three.
COMMON = {
    "coastal": "B1", "blue": "B2", "green": "B3", "red": "B4", "rededge1": "B5", "rededge2": "B6", "rededge3": "B7",
    "rededge071": "B5", "rededge075": "B6", "rededge078": "B7", "nir": "B8", "nir08": "B8A", "nir09": "B9",
    "cirrus": "B10", "swir16": "B11", "swir22": "B12",
}  # fmt: skip
ELEVATION = {"data": "DEM", "elevation": "DEM"}
PICTURES = {"visual", "overview", "thumbnail", "preview", "metadata"}  # roles
NO_SENSOR = "no sensor of the table fits; write one into the item's property `sensor`"
NO_GROUND = "an item without place and geometry"
NOWHERE = "overlaps no place"
NO_BANDS = "no asset with a band of its sensor"


def places(root: str) -> Iterator[Place | LeftOut]:
    """Places in the order in which the items name them, then the items that were left out.

    Args:
        root: a file with an ItemCollection or one item, or a folder with such files (JSON or GeoJSON) in any depth.

    Raises:
        ArchiveError: pystac is missing, there is no item, or none can be used.
    """
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for found in _rows(_items(Path(root))):
        (left_out if isinstance(found, LeftOut) else rows).append(found)  # type: ignore[arg-type]
    if not rows:
        reasons = sorted({item.reason for item in left_out})
        raise ArchiveError(f"{root}: none of {len(left_out)} STAC items can be used: {'; '.join(reasons)}")
    yield from assemble(rows)
    yield from dict.fromkeys(left_out)


@dataclass(frozen=True)
class _Item:
    """An item, the folder that its relative addresses begin at, and its sensor."""

    item: pystac.Item
    base: Path
    sensor: str
    place: str

    @property
    def area(self) -> BaseGeometry | None:
        """The ground it shows, in OGC:CRS84."""
        try:
            return make_valid(shape(self.item.geometry)) if self.item.geometry else None
        except (ShapelyError, ValueError, TypeError, AttributeError):
            return None


def _items(root: Path) -> Iterator[tuple[pystac.Item, Path]]:
    """Items, each with the folder of its file, in the order of the files' names."""
    try:
        import pystac
    except ImportError:
        raise ArchiveError("STAC items need pystac: pip install 'mcf-mamba[stac]'") from None
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".json", ".geojson"))
    count = 0
    for file in files:
        for raw in _features(file):
            count += 1
            try:
                yield pystac.Item.from_dict(raw), file.parent
            except (pystac.STACError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise ArchiveError(f"{file}: item {raw.get('id', '?')!r} is no STAC item: {error!r}") from None
    if not count:
        raise ArchiveError(f"{root}: no STAC item there; give an ItemCollection as a file, or a folder of items")


def _features(file: Path) -> list[dict[str, Any]]:
    """The items of a file; none when it is a catalog, a collection or another JSON."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArchiveError(f"{file}: no JSON: {error}") from None
    if not isinstance(raw, dict):
        return []
    found = raw.get("features", []) if raw.get("type") == "FeatureCollection" else [raw]
    return [item for item in found if item.get("type") == "Feature" and "stac_version" in item]


def _rows(items: Iterator[tuple[pystac.Item, Path]]) -> Iterator[Row | LeftOut]:
    """A row per asset, first of the items that name a place, then of those that overlap one."""
    known: list[_Item] = []
    loose: list[_Item] = []
    for item, base in items:
        sensor = _sensor(item)
        if sensor is None:
            yield LeftOut(item.id, NO_SENSOR)
        elif sensor == "s1" and not _calibrated(item):
            yield LeftOut(item.id, STEPS)
        else:
            place = _place(item)
            (known if place else loose).append(_Item(item, base, sensor, place))
    known, older = _newest(known)
    for one in known:
        yield from _assets(one, one.place)
    yield from (LeftOut(one.item.id, OLDER) for one in older)
    areas = [(one.place, one.area) for one in known]
    for one in loose:
        yield from _loose(one, areas)


def _newest(items: Sequence[_Item]) -> tuple[list[_Item], list[_Item]]:
    """One item per place, sensor and time, of Sentinel-2's newest processing, and the others."""
    best: dict[tuple[Any, ...], tuple[tuple[str, ...], _Item]] = {}
    for number, one in enumerate(items):
        told = tuple(str(one.item.properties.get(name, "")) for name in ("s2:processing_baseline", "updated"))
        key = (one.place, one.sensor, one.item.datetime) if one.sensor.startswith("s2-") else (number,)
        if key not in best or told > best[key][0]:
            best[key] = told, one
    kept = {id(one) for _, one in best.values()}
    return [one for one in items if id(one) in kept], [one for one in items if id(one) not in kept]


def _loose(one: _Item, areas: Sequence[tuple[str, BaseGeometry | None]]) -> Iterator[Row | LeftOut]:
    """Rows of an item without a place, once for each place that it overlaps."""
    area = one.area
    if not areas:
        yield from _assets(one, one.item.id)
    elif area is None:
        yield LeftOut(one.item.id, NO_GROUND)
    else:
        over = [place for place, other in areas if other is not None and area.intersection(other).area > 0]
        for place in dict.fromkeys(over):
            yield from _assets(one, place)
        if not over:
            yield LeftOut(one.item.id, NOWHERE)


def _sensor(item: pystac.Item) -> str | None:
    told = str(item.properties.get("sensor", ""))
    if told in SENSORS or told == LABEL:
        return told
    names = ("constellation", "platform", "s2:product_type", "processing:level", "product:type")
    text = " ".join(
        [item.collection_id or "", *(str(item.properties.get(name, "")) for name in names), item.id]
    ).lower()
    if re.search(r"sentinel-?2|\bs2[a-d]_", text):
        return "s2-l1c" if re.search(r"l1c|msi1c", text) else "s2-l2a" if re.search(r"l2a|msi2a", text) else None
    if re.search(r"sentinel-?1|\bs1[a-d]_", text):
        return "s1"
    return "dem" if re.search(r"dem(?![a-z])", (item.collection_id or "").lower()) else None


def _calibrated(item: pystac.Item) -> bool:
    """Whether a Sentinel-1 item is terrain-corrected; Level-1 products as downloaded are not."""
    names = ("sar:product_type", "processing:level", "product:type")
    text = " ".join([item.collection_id or "", *(str(item.properties.get(name, "")) for name in names), item.id])
    return item.properties.get("sensor") == "s1" or re.search(r"(?i)rtc|nrb|gamma0|sigma0", text) is not None


def _place(item: pystac.Item) -> str:
    """The place that an item names; "" when it names none."""
    properties = item.properties
    if place := properties.get("place"):
        return str(place)
    code = str(properties.get("grid:code", ""))
    tile = code.removeprefix("MGRS-") if code.startswith("MGRS-") else str(properties.get("s2:mgrs_tile", ""))
    parts = [str(properties.get(f"mgrs:{name}", "")) for name in ("utm_zone", "latitude_band", "grid_square")]
    tile = tile or "".join(parts)
    return f"T{tile.zfill(5)}" if re.fullmatch(r"\d{1,2}[A-Z]{3}", tile) else code


def _assets(one: _Item, place: str) -> Iterator[Row | LeftOut]:
    item = one.item
    time = item.datetime or item.common_metadata.start_datetime
    if time is not None and time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    best: dict[tuple[str, ...], tuple[tuple[Any, ...], str]] = {}
    for key in sorted(item.assets):
        bands = _bands(one.sensor, key, item.assets[key])
        rank = _rank(one.sensor, bands, item.assets[key])
        if bands is not None and (bands not in best or rank < best[bands][0]):
            best[bands] = rank, key
    if not best:
        yield LeftOut(item.id, NO_BANDS)
    whole = [bands for bands in best if len(bands) > 1]
    for bands, (_, key) in best.items():
        if len(bands) == 1 and any(bands[0] in others for others in whole):
            continue  # a file with all bands holds it too
        numbers = _radiometry(one, item.assets[key], bands, time)
        if numbers is None:
            yield LeftOut(f"{item.id} ({key})", UNTOLD)
            continue
        path = _address(one, item.assets[key])
        asset = Asset(path, bands, radiometry=numbers, nodata=_nodata(item.assets[key]))
        group, split = (str(item.properties.get(name, "")) for name in ("group", "split"))
        yield Row(place, one.sensor, asset, time, group, split)


def _band_facts(asset: pystac.Asset) -> list[Mapping[str, Any]]:
    """What is said of each band of an asset: STAC 1.1's `bands`, or 1.0's `eo:bands` with `raster:bands`."""
    fields = asset.extra_fields
    optical, raster = fields.get("bands") or fields.get("eo:bands") or [], fields.get("raster:bands") or []
    count = max(len(optical), len(raster))
    pairs = zip([*optical, *[{}] * count], [*raster, *[{}] * count], range(count), strict=False)
    return [{**{k.removeprefix("raster:").removeprefix("eo:"): v for k, v in o.items()}, **r} for o, r, _ in pairs]


def _bands(sensor: str, key: str, asset: pystac.Asset) -> tuple[str, ...] | None:
    """The sensor's bands in an asset; None when it holds none, or is a picture. Labels have no bands: ()."""
    if PICTURES & set(asset.roles or ()):
        return None
    if sensor == LABEL:
        return ()
    plain = re.sub(r"[-_]?(\d\dm|jp2)\b", "", key.lower())
    named = [[str(facts.get(name, "")) for name in ("name", "common_name")] for facts in _band_facts(asset)]
    if len(named) > 1:
        found = tuple(_one(sensor, names) for names in named)
        return found if set(SENSORS[sensor].band_names) <= set(found) else None
    band = _one(sensor, [*(named[0][:1] if named else ()), plain, *(named[0][1:] if named else ())])
    return (band,) if band else None


def _one(sensor: str, names: Sequence[str]) -> str:
    """The band that the first fitting name stands for; "" when none fits."""
    other = COMMON if sensor.startswith("s2-") else ELEVATION if sensor == "dem" else {}
    for name in names:
        band = band_name(sensor, other.get(name.lower(), name))
        if band == "SCL" or (band and band not in MASKS):  # assets called `cloud` are probabilities
            return band
    return ""


def _rank(sensor: str, bands: tuple[str, ...] | None, asset: pystac.Asset) -> tuple[Any, ...]:
    """How far an asset is from what is wanted: by resolution, then by format."""
    wanted = {band.name: band.resolution for band in SENSORS[sensor].bands} if sensor in SENSORS else {}
    native = wanted.get(bands[0], 20.0) if bands else 0.0
    fields = asset.extra_fields
    facts = next(iter(_band_facts(asset)), {})
    transform = fields.get("proj:transform") or [0.0]
    found = facts.get("spatial_resolution") or abs(transform[0]) or facts.get("gsd") or fields.get("gsd") or native
    return abs(float(found) - native), asset.href.lower().endswith(".jp2")


def _radiometry(one: _Item, asset: pystac.Asset, bands: tuple[str, ...], time: datetime | None) -> Radiometry | None:
    """What an asset's numbers mean; None when it cannot be told."""
    facts = {
        **{k.removeprefix("raster:"): v for k, v in asset.extra_fields.items()},
        **next(iter(_band_facts(asset)), {}),
    }
    if one.sensor == "s1":
        return _backscatter(one.item, asset, str(facts.get("unit", "")))
    scale = float(facts.get("scale") or 1)
    if not one.sensor.startswith("s2-"):
        return Radiometry(scale, float(facts.get("offset") or 0))
    # A scale of 1 says nothing of reflectance; such numbers are reflectance x 10000 as in the products.
    factor = 1.0 if scale == 1 else 10000.0
    return Radiometry(round(scale * factor, 9), round(_reflectance_offset(one, asset, facts, time) * factor, 6))


def _reflectance_offset(one: _Item, asset: pystac.Asset, facts: Mapping[str, Any], time: datetime | None) -> float:
    """Of Sentinel-2, in the unit that the scale leads to."""
    properties, scale = one.item.properties, float(facts.get("scale") or 1)
    if properties.get("earthsearch:boa_offset_applied") is True and not asset.href.lower().endswith(".jp2"):
        return 0.0
    if facts.get("offset") is not None and scale != 1:
        return float(facts["offset"])
    told = str(properties.get("s2:processing_baseline") or properties.get("processing:version") or "")
    if re.fullmatch(r"\d\d?\.\d\d", told):
        return of_baseline(told) * scale
    return offset(f"{properties.get('s2:product_uri', one.item.id)}", time) * scale


def _backscatter(item: pystac.Item, asset: pystac.Asset, unit: str) -> Radiometry | None:
    if unit.lower() in ("db", "decibel"):
        return Radiometry()
    told = quantity([asset.href, asset.title or "", item.id, item.collection_id or ""])
    if told is None and item.collection_id == "sentinel-1-rtc":  # Planetary Computer: linear gamma0
        told = "power"
    return Radiometry(quantity=told) if told else None


def _nodata(asset: pystac.Asset) -> float | None:
    value = next(iter(_band_facts(asset)), {}).get("nodata", asset.extra_fields.get("nodata"))
    return None if value is None else float(value)


def _address(one: _Item, asset: pystac.Asset) -> str:
    """A file beside the item when there is one, or else where the item says."""
    relative = "://" not in asset.href and not asset.href.startswith("/")
    if relative and not (one.base / asset.href).exists():
        return address(asset.get_absolute_href() or asset.href, one.base)
    return address(asset.href, one.base)
