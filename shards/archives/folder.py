"""A plain folder whose file names say what the files are, by a pattern such as `{place}/{sensor}_{time}.tif`.

Fields: `{place}` and `{sensor}` (needed), `{time}`, `{band}`, `{group}`, `{split}`; `*` is any text without a slash,
and a field that comes twice must read the same both times. A sensor is written as in the sensor table, in letters of
any size (`S1` for `s1`); a time as 20230823, 20230823T095559 or in ISO 8601; a band as `B02`, `B2`, `VV`, or SCL, QA60
and CLOUD for cloud masks. Numbers mean what they mean in a catalog without scale, offset and quantity: see `catalog`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter

from shards.archives import About, ArchiveError
from shards.archives.rows import MASKS, Row, assemble, band_name, radiometry
from shards.archives.walk import files, is_junk
from shards.scene import LABEL, Asset, LeftOut, Place
from shards.sensors import SENSORS

ABOUT = About(title="own scenes in a folder", licence="", attribution="", source="the folder given as archive.root")
EXAMPLES = "{place}/{sensor}.tif, {place}/{sensor}_{time}.tif or {group}/{sensor}/{place}_{band}.tif"
RASTERS = (".tif", ".tiff", ".jp2", ".img", ".vrt", ".geojson")
_BANDS = sorted({name for row in SENSORS.values() for name in row.band_names} | set(MASKS), key=len, reverse=True)
_SENSORS = sorted((*SENSORS, LABEL), key=len, reverse=True)
_FIELDS = {
    "place": r"[^/]+?",
    "sensor": "(?i:" + "|".join(map(re.escape, _SENSORS)) + ")",
    "time": r"\d{4}-?\d\d-?\d\d(?:T\d\d:?\d\d:?\d\d(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?)?",
    "band": "(?i:" + "|".join(re.sub(r"^B(?=\d$)", "B0?", name) for name in _BANDS) + ")",
    "group": r"[^/]+?",
    "split": r"[^/]+?",
}


def places(root: str, pattern: str) -> Iterator[Place | LeftOut]:
    """Places in the order of their first file's name, and the rasters that the pattern does not fit.

    Args:
        root: the folder.
        pattern: of the files' paths below it, with forward slashes.

    Raises:
        ArchiveError: no folder, a pattern that is none, or one that fits no file.
    """
    expression = compiled(pattern)
    base = Path(root)
    names = sorted(path.relative_to(base).as_posix() for path in files(root, "") if not is_junk(path))
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    found = {name: match for name in names if (match := expression.fullmatch(name))}
    if not found:
        seen = ", ".join([name for name in names if name.lower().endswith(RASTERS)][:3]) or "no raster at all"
        raise ArchiveError(
            f"{root}: no file fits archive.pattern={pattern!r}; there is {seen}; patterns look like {EXAMPLES}, "
            f"sensors are called {', '.join((*SENSORS, LABEL))}"
        )
    yield from assemble(_row(base, name, match) for name, match in found.items())
    for name in names:
        if name not in found and name.lower().endswith(RASTERS):
            yield LeftOut(name, "does not fit archive.pattern")


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression that a pattern stands for.

    Raises:
        ArchiveError: an unknown field, unpaired braces, or no place or sensor in it.
    """
    try:
        parts = [(text, field) for text, field, *_ in Formatter().parse(pattern)]
    except ValueError as error:
        raise ArchiveError(f"archive.pattern={pattern!r}: {error}; patterns look like {EXAMPLES}") from None
    fields = [field for _, field in parts if field is not None]
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise ArchiveError(f"archive.pattern={pattern!r}: unknown fields {unknown}; known: {', '.join(_FIELDS)}")
    if missing := [field for field in ("place", "sensor") if field not in fields]:
        raise ArchiveError(f"archive.pattern={pattern!r}: {missing} missing; patterns look like {EXAMPLES}")
    expression, seen = "", set[str]()
    for text, field in parts:
        expression += re.escape(text).replace(r"\*", "[^/]*")
        if field is not None:
            expression += f"(?P={field})" if field in seen else f"(?P<{field}>{_FIELDS[field]})"
            seen.add(field)
    return re.compile(expression)


def _row(base: Path, name: str, match: re.Match[str]) -> Row:
    fields = match.groupdict(default="")
    sensor, time = fields["sensor"].lower(), _time(name, fields.get("time", ""))
    bands: tuple[str, ...] = ()
    if text := fields.get("band", ""):
        bands = (band_name(sensor, text),)
        if not bands[0]:
            raise ArchiveError(f"{base / name}: {sensor} has no band {text}")
    asset = Asset(str(base / name), bands, radiometry=radiometry(sensor, name, time))
    return Row(fields["place"], sensor, asset, time, fields.get("group", ""), fields.get("split", ""))


def _time(name: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ArchiveError(f"{name}: {text!r} is no time: {error}") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
