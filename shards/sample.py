"""Sample: what is learned from. A key and the tiles of one place and window, all on one grid.

On disk a sample is a few consecutive members of a tar (docs/format.md): `KEY.<sensor>.<ext>` (values),
`KEY.<sensor>.valid.<ext>`, `KEY.label.<ext>`, `KEY.instances.<ext>` and `KEY.json`.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import blosc2
import crc32c
import numpy as np
from numpy.typing import NDArray

# Blosc2 starts eight threads for every frame that it writes, whatever its parameters say; samples are encoded and
# decoded by many processes and threads already, which these would only hold up.
os.putenv("BLOSC_NTHREADS", "1")
blosc2.set_releasegil(True)

FORMAT_VERSION = 1

# Facts of a sample that only the manifest holds: they may be found anew without touching the shards.
ONLY_IN_MANIFEST = ("shift", "split")

Encoding = Literal["blosc2-zstd", "blosc2-lz4", "npy", "geotiff"]
EXTENSIONS: Mapping[Encoding, str] = MappingProxyType(
    {"blosc2-zstd": "b2nd", "blosc2-lz4": "b2nd", "npy": "npy", "geotiff": "tif"}
)

UNIFORM = 512  # bytes of a frame at most, of an array that holds little but one value

Buffer = bytes | memoryview
Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
# The header that NumPy 1 and 2 write for numbers in rows, format version 1.0.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][a-z]\d+)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)
_CODECS = {"blosc2-zstd": blosc2.Codec.ZSTD, "blosc2-lz4": blosc2.Codec.LZ4}


@dataclass(frozen=True)
class Tile:
    """One modality of one window: `values` [C, H, W] in the contract's unit, `valid` bool [H, W], 0 where invalid."""

    values: NDArray[Any]
    valid: NDArray[np.bool_]
    time: datetime | None = None

    @property
    def fraction(self) -> float:
        """Share of valid pixels, 0 to 1."""
        return float(self.valid.mean())


@dataclass(frozen=True)
class Sample:
    """Tiles of equal H x W by sensor name, an optional label uint8 [H, W], and facts about where they are from.

    `instances` uint16 [H, W] comes with labels made of polygons: the number of each pixel's polygon, 0 outside.

    An absent modality is zeros with `valid` all False, never a missing name.
    """

    key: str
    tiles: Mapping[str, Tile]
    label: NDArray[np.uint8] | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    instances: NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        """Refuse keys that a tar or a WebDataset reader would take apart, and tiles of unequal size."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,120}", self.key):
            raise ValueError(f"sample key {self.key!r}: only letters, digits, _ and -, at most 120")
        shapes = {tile.valid.shape for tile in self.tiles.values()}
        shapes |= {tile.values.shape[1:] for tile in self.tiles.values()}
        shapes |= {self.label.shape} if self.label is not None else set()
        if len(shapes) != 1:
            raise ValueError(f"sample {self.key}: one H x W expected, given {sorted(shapes)}")


def encode_array(values: NDArray[Any], encoding: Encoding, meta: Mapping[str, Any] | None = None) -> bytes:
    """An array as self-describing bytes: a Blosc2 frame (byte shuffle, level 1), NumPy's .npy format 1.0, or GeoTIFF.

    Args:
        values: [C, H, W] or [H, W].
        encoding: of the config.
        meta: for GeoTIFF, which carries them: `crs` and `transform`.
    """
    if encoding == "geotiff":
        from shards.raster_io import to_geotiff_bytes  # GDAL, which no other encoding needs

        bands = values.reshape(-1, *values.shape[-2:])
        known = meta or {}
        transform = tuple(known.get("transform") or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        return to_geotiff_bytes(bands.astype(np.uint8) if bands.dtype == bool else bands, known.get("crs"), transform)
    if encoding == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
        return buffer.getvalue()
    if values.dtype == bool and values.size and values.all():
        return _all_valid(values.shape, encoding)
    return _to_b2nd(values, encoding)


@lru_cache(32)
def _all_valid(shape: tuple[int, ...], encoding: Encoding) -> bytes:
    """The frame of a tile's validity without holes, which is most tiles'."""
    return _to_b2nd(np.ones(shape, bool), encoding)


def _to_b2nd(values: NDArray[Any], encoding: Encoding) -> bytes:
    params = {"codec": _CODECS[encoding], "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    # One chunk per array, as a sample is decoded whole; a block per band, as the default depends on the CPU's caches.
    blocks = (1,) * (values.ndim - 2) + values.shape[-2:]
    array = blosc2.asarray(np.ascontiguousarray(values), chunks=values.shape, blocks=blocks, cparams=params)
    return bytes(array.to_cframe())


def decode_array(data: Buffer, extension: str, empty: Empty = np.empty) -> NDArray[Any]:
    """The array of a member whose name ends in `extension` (b2nd, npy or tif; the last always [C, H, W]).

    Args:
        data: the member; if it can be written to, an .npy array lies in it, otherwise the array is a copy.
        extension: of its name.
        empty: gives the memory of a b2nd array.

    Raises:
        ValueError: another extension, or bytes that are not such an array.
    """
    if extension == "npy":
        return _from_npy(data)
    if extension == "tif":
        from shards.raster_io import from_geotiff_bytes

        return from_geotiff_bytes(bytes(data))
    if extension != "b2nd":
        raise ValueError(f"a member ending in .{extension}; arrays end in .b2nd, .npy or .tif")
    try:
        return _copy(_uniform(bytes(data)), empty) if len(data) <= UNIFORM else _from_b2nd(data, empty)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"not a readable b2nd array ({len(data)} bytes): {error}") from None


def _from_npy(data: Buffer) -> NDArray[Any]:
    """The array, copied at most once, where NumPy's own reader copies twice and parses the header as Python."""
    if found := _NPY.match(data):
        kind, shape = found[1].decode(), tuple(int(size) for size in found[2].split(b",") if size.strip())
        array = np.frombuffer(data, kind, math.prod(shape), found.end()).reshape(shape)
        return array if array.flags.writeable else array.copy()
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


@lru_cache(32)
def _uniform(data: bytes) -> NDArray[Any]:
    """The array of a short frame, most often the validity of a tile without holes: the same bytes for every sample."""
    return _from_b2nd(data, np.empty)


def _copy(array: NDArray[Any], empty: Empty) -> NDArray[Any]:
    out = empty(array.shape, array.dtype)
    out[...] = array
    return out


def _from_b2nd(data: Buffer, empty: Empty) -> NDArray[Any]:
    frame = blosc2.ndarray_from_cframe(data)
    if frame.chunks != frame.shape or frame.blocks != (1,) * (frame.ndim - 2) + frame.shape[-2:]:
        return np.asarray(frame[:])
    # As `encode_array` writes them, the one chunk is the array; taken so, other threads run meanwhile.
    out = empty(frame.shape, frame.dtype)
    blosc2.decompress2(frame.schunk.get_chunk(0), dst=out)
    return out


def encode(sample: Sample, encoding: Encoding) -> dict[str, bytes]:
    """The members of one sample, name -> bytes, in the order in which they are written."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, tile in sample.tiles.items():
        arrays |= {name: tile.values, f"{name}.valid": tile.valid}
    for name, plane in (("label", sample.label), ("instances", sample.instances)):
        if plane is not None:
            arrays[name] = plane
    ext = EXTENSIONS[encoding]
    members = {f"{sample.key}.{name}.{ext}": encode_array(a, encoding, sample.meta) for name, a in arrays.items()}
    times = {name: tile.time.isoformat() for name, tile in sample.tiles.items() if tile.time is not None}
    facts = {"format_version": FORMAT_VERSION, "key": sample.key, "times": times, **sample.meta}
    facts = {name: value for name, value in facts.items() if name not in ONLY_IN_MANIFEST}
    members[f"{sample.key}.json"] = json.dumps(facts, sort_keys=True).encode()
    return members


def checksum(members: Mapping[str, Buffer]) -> int:
    """crc32c of all members' bytes, one after the other."""
    found = 0
    for data in members.values():
        found = crc32c.crc32c(data, found)
    return found


def decode(members: Mapping[str, Buffer], sensors: tuple[str, ...] = (), empty: Empty = np.empty) -> Sample:
    """The sample that `encode` made; with `sensors`, only these modalities are decoded.

    `members` and `empty` as in `decode_array`.

    Raises:
        ValueError: no JSON member, a newer format, or a missing or unreadable array.
    """
    parts = {name.split(".", 1)[1]: data for name, data in members.items()}
    if "json" not in parts:
        raise ValueError(f"members {sorted(members)}: no .json among them, so this is not a sample of ours")
    facts = json.loads(bytes(parts.pop("json")))
    if facts.pop("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{facts['key']}: written by a newer release (this one reads version {FORMAT_VERSION})")
    arrays = {name.rsplit(".", 1)[0]: (data, name.rsplit(".", 1)[1]) for name, data in parts.items()}
    found = [name for name in arrays if name not in ("label", "instances") and not name.endswith(".valid")]
    if missing := [name for name in sensors if name not in found]:
        raise ValueError(f"{facts['key']}: no modality {missing}; there are {found}")
    times = facts.pop("times", {})
    tiles = {}
    for name in sensors or found:
        time = datetime.fromisoformat(times[name]) if name in times else None
        tiles[name] = Tile(
            decode_array(*arrays[name], empty),
            _plane(arrays[f"{name}.valid"], empty).astype(np.bool_, copy=False),
            time,
        )
    label, instances = (_plane(arrays[n], empty) if n in arrays else None for n in ("label", "instances"))
    return Sample(facts.pop("key"), tiles, label, facts, instances)


def decode_webdataset(item: Mapping[str, Any]) -> Sample:
    """One item of `webdataset.WebDataset`, undecoded, as a Sample: `WebDataset(urls).map(decode_webdataset)`."""
    key = item["__key__"]
    return decode({f"{key}.{name}": data for name, data in item.items() if not name.startswith("__")})


def _plane(member: tuple[Buffer, str], empty: Empty) -> NDArray[Any]:
    """An array [H, W]."""
    array = decode_array(*member, empty)
    return array.reshape(array.shape[-2:])
