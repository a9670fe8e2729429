"""Names of the bands of a GeoTIFF that ESA's SNAP wrote.

SNAP describes bands in a private TIFF tag, 65000, that holds a DIMAP document as text (SNAP, snap-geotiff, `Utils`);
GDAL shows them without names. TIFF: TIFF 6.0, section 2; BigTIFF: libtiff's design.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO

DIMAP_TAG = 65000
TEXT_LIMIT = 256 << 20  # bytes; SNAP copies all of the product's metadata into the tag
_BAND = re.compile(r"<Spectral_Band_Info>(.*?)</Spectral_Band_Info>", re.DOTALL)


def band_names(path: Path) -> tuple[str, ...]:
    """Names of the bands in their order; empty when SNAP did not write the file, or it is no TIFF."""
    try:
        with path.open("rb") as file:
            text = _text(file)
    except (OSError, struct.error):
        return ()
    found = {}
    for block in _BAND.findall(text):
        index, name = (re.search(rf"<{tag}>\s*([^<]*?)\s*</{tag}>", block) for tag in ("BAND_INDEX", "BAND_NAME"))
        if index and name and index[1].isdigit() and "<VIRTUAL_BAND>true" not in block:
            found[int(index[1])] = name[1]
    return tuple(found[index] for index in sorted(found))


def _text(file: BinaryIO) -> str:
    """What the tag holds; "" when there is none."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) == 16 else 0
    if version not in (42, 43):
        return ""
    big = version == 43
    # Of both kinds: where the first directory is, how its length is written, an entry, and how much of it is the value.
    start, length, entry, offset = ("Q", "Q", "HHQQ", 8) if big else ("I", "H", "HHII", 4)
    (position,) = struct.unpack(order + start, head[8:16] if big else head[4:8])
    file.seek(position)
    (entries,) = struct.unpack(order + length, file.read(struct.calcsize(order + length)))
    directory = file.read(min(entries, 10_000) * struct.calcsize(order + entry))
    for tag, _, count, where in struct.iter_unpack(order + entry, directory):
        if tag == DIMAP_TAG and offset < count <= TEXT_LIMIT:
            file.seek(where)
            return file.read(count).decode("utf-8", "replace")
    return ""
