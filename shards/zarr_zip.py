"""ZarrZip: arrays of a zarr group (format 2) in a zip file, which itself may lie in a tar; read one by one, in parts.

Chunks are decoded by numcodecs, which holds the codecs of zarr. Going through zarr's stores takes several times as long
for what archives of millions of small groups need most: a group's coordinates and one image of it.

Spec: zarr storage specification, version 2; names of dimensions as xarray writes them, in `_ARRAY_DIMENSIONS`.
"""

from __future__ import annotations

import itertools
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

# Decoded chunks that are kept per process, of those that are large and hold more than is asked for: one date of many
# samples, say. The samples that follow each other in an archive then find theirs decoded.
CHUNKS, LARGE = 16, 1 << 20


class ZarrError(ValueError):
    """A file is no zip of a zarr group of format 2, or lacks what is asked for; the message says which."""


class NoCodecsError(RuntimeError):
    """numcodecs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Source:
    """A file, or `size` bytes of one from `start`. `changed` tells contents under one path apart."""

    path: str
    start: int = 0
    size: int | None = None
    changed: int = 0

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes as a file that can be read and sought."""
        if self.size is None:
            with open(self.path, "rb") as file:
                yield file
            return
        member = tarfile.TarInfo(self.path)
        member.size, member.offset_data = self.size, self.start
        with tarfile.open(self.path, "r:") as tar:
            part = tar.extractfile(member)
            assert part is not None  # only of links and folders
            with part:
                yield part


@dataclass(frozen=True)
class Array:
    """What a group says of one array; `dims` are names of its dimensions, "" where it does not tell."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: np.dtype[Any]
    attrs: Mapping[str, Any]
    spec: Mapping[str, Any]


class ZarrZip:
    """An open group.

    Args:
        source: where the zip is.
        zipped: the zip, open.

    Raises:
        ZarrError: it holds no group, or one of another format.
    """

    def __init__(self, source: Source, zipped: zipfile.ZipFile) -> None:
        self._source, self._zip = source, zipped
        self._files = frozenset(zipped.namelist())
        self.arrays = tuple(sorted({n.removesuffix("/.zarray") for n in self._files if n.endswith("/.zarray")}))
        if not self.arrays:
            other = "zarr.json" in self._files
            raise ZarrError(
                "holds a zarr group of format 3; write it as format 2" if other else "holds no zarr group of format 2"
            )

    def __contains__(self, array: str) -> bool:
        return array in self.arrays

    @cached_property
    def _gathered(self) -> dict[str, Any]:
        return dict(json.loads(self._zip.read(".zmetadata"))["metadata"]) if ".zmetadata" in self._files else {}

    def _told(self, name: str) -> Mapping[str, Any]:
        if name in self._gathered:
            return dict(self._gathered[name])
        return dict(json.loads(self._zip.read(name))) if name in self._files else {}

    def array(self, name: str) -> Array:
        """Shape, dimensions and attributes of an array.

        Raises:
            ZarrError: there is no such array.
        """
        if name not in self:
            raise ZarrError(f"holds no array {name!r}; it has {', '.join(self.arrays)}")
        spec, attrs = self._told(f"{name}/.zarray"), self._told(f"{name}/.zattrs")
        shape = tuple(spec["shape"])
        dims = tuple(attrs.get("_ARRAY_DIMENSIONS", ("",) * len(shape)))
        return Array(shape, dims, np.dtype(spec["dtype"]).newbyteorder("="), attrs, spec)

    def read(self, name: str, at: Mapping[int, int] | None = None) -> NDArray[Any]:
        """An array, or the part of it where each dimension (by number) of `at` has the index that `at` gives.

        Raises:
            ZarrError: no such array, or an index outside of it.
        """
        array, at = self.array(name), at or {}
        for dim, index in at.items():
            if not (dim < len(array.shape) and 0 <= index < array.shape[dim]):
                raise ZarrError(f"{name} has the shape {array.shape}; index {index} of dimension {dim} is outside")
        chunks = array.spec["chunks"]
        rest = [dim for dim in range(len(chunks)) if dim not in at]
        out = np.empty([array.shape[dim] for dim in rest], array.dtype)
        grid = [[at[d] // chunks[d]] if d in at else range(-(-array.shape[d] // chunks[d])) for d in range(len(chunks))]
        for place in itertools.product(*grid):
            where: Any = (*(slice(place[d] * chunks[d], (place[d] + 1) * chunks[d]) for d in rest), ...)
            target = out[where]
            inside: Any = (*(at[d] % chunks[d] if d in at else slice(None) for d in range(len(chunks))), ...)
            part = self._chunk(name, array, place, at)[inside]
            target[...] = part[tuple(slice(size) for size in target.shape)]  # chunks at the edge are stored whole
        return out

    def _chunk(self, name: str, array: Array, place: tuple[int, ...], at: Mapping[int, int]) -> NDArray[Any]:
        file = f"{name}/" + (array.spec.get("dimension_separator", ".").join(map(str, place)) or "0")
        if file not in self._files:
            return np.full(array.spec["chunks"], _fill(array), array.dtype)
        chunks = array.spec["chunks"]
        if math.prod(chunks) * array.dtype.itemsize > LARGE and any(chunks[dim] > 1 for dim in at):
            return _remembered(self._source, file, json.dumps(array.spec, sort_keys=True))
        return _decoded(self._zip, file, array.spec)


@contextmanager
def open_zarr(source: Source) -> Iterator[ZarrZip]:
    """The group in a zip.

    Raises:
        ZarrError: it is damaged, holds no group, or one of another format.
        OSError: the file cannot be read.
        NoCodecsError: at the first look at an array, where numcodecs is missing.
    """
    with source.open() as file:
        try:
            zipped = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ZarrError(f"damaged: {error}") from error
        with zipped:
            yield ZarrZip(source, zipped)


@lru_cache(maxsize=CHUNKS)
def _remembered(source: Source, file: str, spec: str) -> NDArray[Any]:
    """A chunk, decoded; a function of its arguments alone, so that it can be kept."""
    with source.open() as whole, zipfile.ZipFile(whole) as zipped:
        return _decoded(zipped, file, json.loads(spec))


def _decoded(zipped: zipfile.ZipFile, file: str, spec: Mapping[str, Any]) -> NDArray[Any]:
    decoders = [_codec(codec) for codec in [spec["compressor"], *reversed(spec["filters"] or [])] if codec]
    try:
        data: Any = zipped.read(file)
        for decoder in decoders:
            data = decoder.decode(data)
        dtype = np.dtype(spec["dtype"])
        flat = data.view(dtype) if isinstance(data, np.ndarray) else np.frombuffer(data, dtype)
        chunk = flat.reshape(spec["chunks"], order=spec["order"])
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise ZarrError(f"damaged: chunk {file}: {error}") from error
    return np.asarray(chunk, dtype.newbyteorder("="))


def _codec(spec: Mapping[str, Any]) -> Any:
    try:
        from numcodecs import get_codec
    except ImportError:
        raise NoCodecsError("zarr groups need numcodecs: pip install 'mcf-mamba[zarr]'") from None
    return get_codec(dict(spec))


def _fill(array: Array) -> Any:
    value = array.spec["fill_value"]
    return np.zeros((), array.dtype) if value is None else np.array(value).astype(array.dtype)
