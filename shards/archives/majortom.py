"""Major TOM Core: Sentinel-2 (L1C, L2A), Sentinel-1 (RTC) and elevation on one grid of cells of 10 km.

As on Hugging Face, any part of the images:

    {Core-S2L1C,Core-S2L2A,Core-S1RTC,Core-DEM}/metadata.parquet     grid_cell, product_id, parquet_url, parquet_row...
    .../images/part_00001.parquet                                    one GeoTIFF per band and row: B01, vv, DEM...

or as `filter_download` of the MajorTOM package unpacks it, in folders of any name:

    <source>/<row of cells>/<cell>/<product>/<column>.tif            S2L2A/433D/433D_629L/S2A_MSIL2A_.../B01.tif

Bands of Sentinel-2 are in native resolution, a file each.

Sources: ESA-PhiLab/Major-TOM, MajorTOM/metadata_helpers.py (one row per row group), docs/evidence/*.jsonl (real rows),
extras/thumbnail_s1rtc.py (linear values, nodata); the datasets' cards; Francis and Czerkawski 2024 (arXiv:2402.12095).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from shards.archives import About, ArchiveError
from shards.archives.baseline import offset
from shards.archives.tree import placed, visible
from shards.archives.walk import nothing
from shards.scene import Asset, CloudMask, LeftOut, Place, Radiometry, Scene
from shards.sensors import SENSORS
from shards.tables import read_table

MASK = "Cloud by SEnSeI, whose codes 1 and 2 are taken for thick and thin cloud (0 clear, 3 shadow)"
ABOUT = About(
    title="Major TOM Core",
    licence="CC-BY-SA-4.0",
    attribution=(
        "Francis and Czerkawski 2024, Major TOM; contains modified Copernicus Sentinel data; Copernicus DEM: DLR e.V. "
        "2010-2014 and Airbus Defence and Space GmbH 2014-2018, provided under COPERNICUS by the European Union and ESA"
    ),
    source="Hugging Face: Major-TOM",
    notes={
        "s1": "RTC (gamma0, terrain corrected), linear power in the files; dB are made of it",
        "s2-l1c": "the offset of baseline 04.00 is removed by the product's name, as of N0500 of before 2022. " + MASK,
        "s2-l2a": "the offset of baseline 04.00 is removed by the product's name. " + MASK,
        "dem": "Copernicus DEM GLO-30, metres above EGM2008",
    },
)

LAYOUT = """\
{Core-S2L1C,Core-S2L2A,Core-S1RTC,Core-DEM}/{metadata.parquet,images/part_00001.parquet}
or SOURCE/433D/433D_629L/PRODUCT/{B01.tif,...}"""
METADATA, IMAGES = "metadata.parquet", "images"
CELL = r"\d+[UD]_\d+[LR]"
ROW = r"\d+[UD]"
NODATA = -32768.0
CLOUD = (1, 2)
# A column of each sensor that no other has, beside which products of Sentinel-2 are told apart by their level.
TELLING = {"vv": "s1", "DEM": "dem"}
LEVEL = {"MSIL1C": "s2-l1c", "MSIL2A": "s2-l2a"}


class Product(NamedTuple):
    """One image of a cell: its name, its sensor, and where its columns are (a folder, or a row of a parquet file)."""

    name: str
    sensor: str
    columns: frozenset[str]
    path: Path
    row: int | None = None


def places(root: str) -> Iterator[Place | LeftOut]:
    """Cells by name, each with all products that are there.

    Args:
        root: the folder that holds the sources, or one source.

    Raises:
        ArchiveError: neither layout, or no image.
    """
    cells: dict[str, list[Product]] = {}
    for source in _sources(Path(root)):
        for found in _table(source) if (source / IMAGES).is_dir() else _unpacked(source):
            if isinstance(found, LeftOut):
                yield found
            else:
                cells.setdefault(found[0], []).append(found[1])
    if not cells:
        raise nothing(root, "no image of a cell", LAYOUT)
    for cell in sorted(cells):
        yield from placed(cell, (_scene(product) for product in cells.pop(cell)), group=cell)


def _sources(root: Path) -> list[Path]:
    """Folders of one source each: `root` itself, or those in it."""
    if not root.is_dir():
        raise nothing(str(root), "no folder", LAYOUT)
    return [root] if _is_source(root) else [path for path in visible(root) if path.is_dir() and _is_source(path)]


def _is_source(folder: Path) -> bool:
    return (folder / IMAGES).is_dir() or any(re.fullmatch(ROW, path.name) for path in visible(folder))


def _table(source: Path) -> Iterator[LeftOut | tuple[str, Product]]:
    """The rows of a source's metadata whose part of the images is there."""
    if not (source / METADATA).is_file():
        raise ArchiveError(f"{source}: {METADATA}, which tells what the images show, is missing; load it too")
    names = set(pq.read_schema(source / METADATA).names)
    if missing := {"grid_cell", "parquet_url", "parquet_row"} - names:
        raise ArchiveError(f"{source / METADATA}: lacks the columns {sorted(missing)}; load it again")
    parts = {path.name: path for path in visible(source / IMAGES)}
    columns = [name for name in ("grid_cell", "product_id", "parquet_url", "parquet_row") if name in names]
    rows = read_table(source / METADATA, columns).to_pydict()
    products = rows.get("product_id") or [source.name] * len(rows["grid_cell"])  # elevation has none
    held: dict[str, frozenset[str]] = {}
    for cell, product, url, row in zip(
        rows["grid_cell"], products, rows["parquet_url"], rows["parquet_row"], strict=True
    ):
        part = Path(url).name
        if part not in held:
            held[part] = frozenset(pq.read_schema(parts[part]).names if part in parts else ())
            if part not in parts:
                yield LeftOut(f"{source.name}/{IMAGES}/{part}", "part of the images that is not there")
        if part in parts:
            yield _product(cell, product, held[part], parts[part], int(row))


def _unpacked(source: Path) -> Iterator[LeftOut | tuple[str, Product]]:
    for row in (path for path in visible(source) if re.fullmatch(ROW, path.name)):
        for cell in (path for path in visible(row) if path.is_dir()):
            for product in (path for path in visible(cell) if path.is_dir()):
                columns = frozenset(path.stem for path in visible(product) if path.suffix == ".tif")
                yield _product(cell.name, product.name, columns, product)


def _product(
    cell: str, name: str, columns: frozenset[str], path: Path, row: int | None = None
) -> LeftOut | tuple[str, Product]:
    sensor = _sensor(columns, name)
    if not re.fullmatch(CELL, cell):
        return LeftOut(f"{cell}/{name}", "not the name of a cell")
    return (cell, Product(name, sensor, columns, path, row)) if sensor else LeftOut(f"{cell}/{name}", "sensor unknown")


def _sensor(columns: Collection[str], product: str) -> str | None:
    told = [sensor for column, sensor in TELLING.items() if column in columns]
    return told[0] if told else next((sensor for level, sensor in LEVEL.items() if level in product), None)


def _scene(product: Product) -> Scene | LeftOut:
    columns = _columns(product.sensor)
    if not product.columns >= set(columns):
        return LeftOut(product.name, "bands are missing")
    found = re.search(r"_(\d{8}T\d{6})", product.name)
    time = datetime.strptime(found[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC) if found else None
    if product.sensor in LEVEL.values():
        numbers, nodata = Radiometry(offset=offset(product.name, time)), None
    else:
        numbers, nodata = Radiometry(quantity="power" if product.sensor == "s1" else "value"), NODATA
    assets = tuple(
        _asset(product, column, bands=(band,), radiometry=numbers, nodata=nodata) for column, band in columns.items()
    )
    return Scene(product.sensor, assets, time, _cloud(product))


def _columns(sensor: str) -> Mapping[str, str]:
    """The column of each of the sensor's bands."""
    bands = SENSORS[sensor].band_names
    if sensor == "s1":
        return {band.lower(): band for band in bands}
    return {re.sub(r"^B(\d)$", r"B0\1", band): band for band in bands}


def _asset(product: Product, column: str, **options: Any) -> Asset:
    if product.row is None:
        return Asset(str(product.path / f"{column}.tif"), **options)
    return Asset(str(product.path), item=f"{product.row}:{column}", **options)


def _cloud(product: Product) -> CloudMask | None:
    return CloudMask(_asset(product, "cloud_mask"), CLOUD) if "cloud_mask" in product.columns else None
