"""Any scenes, listed in a table (CSV or Parquet): one row per file.

Columns: `place` (scenes of one place are tiled together), `sensor` (a name of the sensor table, or `label`), `href`
(a path relative to the table, absolute, or s3://), and optionally `time` (ISO 8601), `band` (when a file holds one band
of the sensor), `group` (city, region) and `split`. Rows of one place, sensor and time are one scene.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.archives import About, ArchiveError
from shards.scene import LABEL, Asset, Place, Scene
from shards.sensors import SENSORS

ABOUT = About(
    title="own scenes, listed in a table", licence="", attribution="", source="the catalog given as archive.root"
)
NEEDED = ("place", "sensor", "href")
OPTIONAL = ("time", "band", "group", "split")


def places(root: str) -> Iterator[Place]:
    """Places in the order in which the table first names them.

    Args:
        root: the table, or the folder that holds `catalog.csv` or `catalog.parquet`.

    Raises:
        ArchiveError: no table, missing columns, no rows, or rows that cannot be understood (all of them are named).
    """
    table = _find(Path(root))
    rows = _read(table)
    mistakes = [f"row {i}: {text}" for i, row in enumerate(rows, 1) if (text := _mistake(row))]
    if mistakes or not rows:
        raise ArchiveError(f"{table}: " + ("; ".join(mistakes[:10]) or "holds no rows"))
    by_place: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_place.setdefault(row["place"], []).append(row)
    for name, members in by_place.items():
        yield _place(name, members, table.parent)


def _find(root: Path) -> Path:
    found = [root] if root.is_file() else [root / f"catalog{end}" for end in (".parquet", ".csv")]
    for table in found:
        if table.is_file():
            return table
    raise ArchiveError(f"{root}: no table there; give a CSV or Parquet file, or a folder with catalog.csv")


def _read(table: Path) -> list[dict[str, str]]:
    if table.suffix == ".parquet":
        raw: list[dict[str, Any]] = pq.read_table(table).to_pylist()
    else:
        with table.open(newline="", encoding="utf-8") as file:
            raw = list(csv.DictReader(file))
    columns = set().union(*raw) if raw else set(NEEDED)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ArchiveError(f"{table}: missing columns {missing}; needed {NEEDED}, optional {OPTIONAL}")
    return [{key: _text(value) for key, value in row.items()} for row in raw]


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return "" if value is None else str(value).strip()


def _mistake(row: Mapping[str, str]) -> str:
    if missing := [name for name in NEEDED if not row[name]]:
        return f"empty {', '.join(missing)}"
    if row["sensor"] not in SENSORS and row["sensor"] != LABEL:
        return f"unknown sensor {row['sensor']!r} (known: {', '.join(SENSORS)}, {LABEL})"
    try:
        _time(row.get("time", ""))
    except ValueError:
        return f"time {row['time']!r} is not ISO 8601"
    return ""


def _time(text: str) -> datetime | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _place(name: str, rows: list[Mapping[str, str]], base: Path) -> Place:
    scenes: dict[tuple[str, str], list[Asset]] = {}
    for row in rows:
        href = row["href"]
        path = href if href.startswith("s3://") else str(base / href)
        bands = (row["band"],) if row.get("band") else ()
        scenes.setdefault((row["sensor"], row.get("time", "")), []).append(Asset(path, bands))
    return Place(
        name,
        tuple(Scene(sensor, tuple(assets), _time(time)) for (sensor, time), assets in scenes.items()),
        group=rows[0].get("group", "") or name,
        split=rows[0].get("split", ""),
    )
