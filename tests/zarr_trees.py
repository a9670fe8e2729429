"""Zarr groups of format 2 in zips, written by zarr itself, and tars of them."""

from __future__ import annotations

import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import ZipStore


class Stored(NamedTuple):
    """An array with the names of its dimensions; one chunk where `chunks` is not given."""

    values: Any
    dims: tuple[str, ...]
    chunks: tuple[int, ...] | None = None
    attrs: Mapping[str, Any] = {}
    more: Mapping[str, Any] = {}


def write_group(path: Path, arrays: Mapping[str, Stored], consolidated: bool = True) -> Path:
    """A zip with one group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that zarr writes twice, and that zips are for writers
        store = ZipStore(path, mode="w")
        group = zarr.open_group(store, mode="w", zarr_format=2)
        for name, stored in arrays.items():
            values = np.asarray(stored.values)
            array = group.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=stored.chunks or values.shape,
                attributes={"_ARRAY_DIMENSIONS": list(stored.dims), **stored.attrs}, **stored.more,
            )  # fmt: skip
            array[...] = values
        if consolidated:
            zarr.consolidate_metadata(store, zarr_format=2)
        store.close()
    return path


def write_tar(path: Path, members: Mapping[str, Path]) -> Path:
    """A tar of files under other names, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, file in members.items():
            tar.add(file, name)
    return path
