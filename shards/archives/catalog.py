"""Any scenes, listed in a table (CSV or Parquet): one row per file.

Columns: `place` (scenes of one place are tiled together), `sensor` (a name of the sensor table, or `label`), `href`
(a path relative to the table, absolute, s3:// or https://), and optionally

- `time` (ISO 8601), `group` (city, region) and `split`;
- `band`, when a file holds one band of the sensor. SCL, QA60 and CLOUD are cloud masks (`rows.MASKS`) of the scene with
  the same place, sensor and time;
- `scale` and `offset`: number * scale + offset is the value in the sensor's unit (1 and 0 when empty);
- `quantity`, of radar: `dB` (when empty), or `power` or `amplitude` on a linear scale;
- `nodata`: the number that means "nothing measured", instead of what the file says.

Rows of one place, sensor and time are one scene. A Sentinel-2 row without `scale` and `offset` has the offset -1000 of
processing baseline 04.00 if a product's name in its href says so (N0400 and later), or else if its time is 2022-01-25
or later. Write 0 as `offset` where the files have lost it already.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from shards.archives import About, ArchiveError
from shards.archives.rows import Row, address, assemble, band_name, mask_names, radiometry
from shards.scene import LABEL, Asset, Place, Radiometry
from shards.sensors import SENSORS
from shards.tables import read_table

ABOUT = About(
    title="own scenes, listed in a table", licence="", attribution="", source="the catalog given as archive.root"
)
NEEDED = ("place", "sensor", "href")
NUMBERS = ("scale", "offset", "nodata")
OPTIONAL = ("time", "band", "group", "split", "quantity", *NUMBERS)
QUANTITIES = {"": "value", "value": "value", "dB": "value", "power": "power", "amplitude": "amplitude"}


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
    yield from assemble(_row(row, table.parent) for row in rows)


def _find(root: Path) -> Path:
    found = [root] if root.is_file() else [root / f"catalog{end}" for end in (".parquet", ".csv")]
    for table in found:
        if table.is_file():
            return table
    raise ArchiveError(f"{root}: no table there; give a CSV or Parquet file, or a folder with catalog.csv")


def _read(table: Path) -> list[dict[str, str]]:
    if table.suffix == ".parquet":
        raw: list[dict[str, Any]] = read_table(table).to_pylist()
    else:
        with table.open(newline="", encoding="utf-8-sig") as file:
            raw = list(csv.DictReader(file))
    columns = set().union(*raw) if raw else set(NEEDED)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ArchiveError(f"{table}: missing columns {missing}; needed {NEEDED}, optional {OPTIONAL}")
    known = (*NEEDED, *OPTIONAL)
    return [{key: _text(row.get(key)) for key in known} for row in raw]


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return "" if value is None else str(value).strip()


def _mistake(row: Mapping[str, str]) -> str:
    sensor = row["sensor"]
    if missing := [name for name in NEEDED if not row[name]]:
        return f"empty {', '.join(missing)}"
    if sensor not in SENSORS and sensor != LABEL:
        return f"unknown sensor {sensor!r} (known: {', '.join(SENSORS)}, {LABEL})"
    if row["band"] and not band_name(sensor, row["band"]):
        known = (*SENSORS[sensor].band_names, *mask_names(sensor)) if sensor != LABEL else ("none",)
        return f"unknown band {row['band']!r} ({sensor} has {', '.join(known)})"
    return _mistaken_number(row) or _mistaken_quantity(row)


def _mistaken_number(row: Mapping[str, str]) -> str:
    try:
        _time(row["time"])
    except ValueError:
        return f"time {row['time']!r} is not ISO 8601"
    for name in NUMBERS:
        try:
            value = float(row[name] or 1)
        except ValueError:
            return f"{name} {row[name]!r} is not a number"
        if name != "nodata" and (not math.isfinite(value) or (name == "scale" and value == 0)):
            return f"{name} {row[name]!r} makes no values"
    return ""


def _mistaken_quantity(row: Mapping[str, str]) -> str:
    quantity, sensor = row["quantity"], row["sensor"]
    if quantity not in QUANTITIES:
        return f"unknown quantity {quantity!r} (value, dB, power or amplitude)"
    if quantity not in ("", "value") and (sensor == LABEL or SENSORS[sensor].kind != "sar"):
        return f"quantity {quantity!r} is for radar, not for {sensor}"
    return ""


def _time(text: str) -> datetime | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _row(row: Mapping[str, str], base: Path) -> Row:
    sensor, time = row["sensor"], _time(row["time"])
    bands = (band_name(sensor, row["band"]),) if row["band"] else ()
    nodata = float(row["nodata"]) if row["nodata"] else None
    asset = Asset(address(row["href"], base), bands, radiometry=_radiometry(row, time), nodata=nodata)
    return Row(row["place"], sensor, asset, time, row["group"], row["split"])


def _radiometry(row: Mapping[str, str], time: datetime | None) -> Radiometry:
    if not row["scale"] and not row["offset"] and not row["quantity"]:
        return radiometry(row["sensor"], row["href"], time)
    quantity = cast("Literal['value', 'power', 'amplitude']", QUANTITIES[row["quantity"]])
    return Radiometry(float(row["scale"] or 1), float(row["offset"] or 0), quantity)
