"""Outlines: the pixels of chosen classes as polygons in degrees, GeoJSON (RFC 7946) or GeoParquet 1.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from shapely.geometry import mapping, shape

from shards.contract import Classes
from shards.raster_io import is_geographic, polygons, to_lonlat
from shards.tables import GEOPARQUET

TOGETHER = 10_000  # polygons that are turned into degrees at once

Groups = Iterator[list[tuple[dict[str, Any], Any]]]

SCHEMA = pa.schema([("class", pa.string()), ("code", pa.uint8()), ("area_m2", pa.float64()), ("geometry", pa.binary())])


def write_outlines(codes: Path, target: Path, crs: str, classes: Classes) -> int:
    """Outline connected pixels (side by side, not corner to corner) of one class.

    Args:
        codes: raster of uint8: 0 where nothing is to be outlined, 1 + class elsewhere.
        target: ends in .geojson or .parquet. Properties: class, code (its index), area_m2 (null where pixels are
            degrees).
        crs: of the raster.
        classes: for the names.

    Returns:
        Number of polygons.
    """
    write = _write_geojson if target.suffix == ".geojson" else _write_parquet
    return write(target, _groups(codes, crs, classes))


def _groups(codes: Path, crs: str, classes: Classes) -> Groups:
    """Properties and polygon, its outer ring counter-clockwise, of some outlines at once."""
    degrees, found = is_geographic(crs), polygons(codes)
    while group := list(islice(found, TOGETHER)):
        placed = to_lonlat(crs, [polygon for _, polygon in group])
        areas = [None if degrees else shape(polygon).area for _, polygon in group]
        facts = [
            {"class": classes.names[code - 1], "code": code - 1, "area_m2": area}
            for (code, _), area in zip(group, areas, strict=True)
        ]
        yield list(zip(facts, (shapely.orient_polygons(shape(lonlat)) for lonlat in placed), strict=True))


def _write_geojson(target: Path, groups: Groups) -> int:
    number = 0
    with target.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for facts, polygon in (item for group in groups for item in group):
            feature = {"type": "Feature", "properties": facts, "geometry": mapping(polygon)}
            file.write((",\n" if number else "\n") + json.dumps(feature))
            number += 1
        file.write("\n]}\n")
    return number


def _write_parquet(target: Path, groups: Groups) -> int:
    number = 0
    with pq.ParquetWriter(target, SCHEMA.with_metadata(GEOPARQUET), compression="zstd") as writer:
        for group in groups:
            rows = [{**facts, "geometry": polygon.wkb} for facts, polygon in group]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            number += len(rows)
    return number
