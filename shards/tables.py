"""Parquet files to tables, in one way; and rows of one that is too large to hold.

All in this thread, without Arrow's pools: one of their workers that is still ending when the process exits ends it with
SIGABRT (seen with Arrow 26 in one of five short commands).
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.store import FolderStore, Store, StoreError

# Metadata that make a table with WKB in `geometry` GeoParquet 1.1; without a "crs", which is its default, OGC:CRS84.
_COLUMN = {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}
GEOPARQUET: Mapping[str, str] = MappingProxyType(
    {"geo": json.dumps({"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": _COLUMN}})}
)
GROUPS = 128  # row groups that are kept: some 0.5 MB each in a manifest


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a Parquet file or of its bytes; only these columns where they are given.

    Raises:
        pyarrow.ArrowInvalid: not Parquet.
    """
    file = pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source, pre_buffer=False)
    with file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


class Table:
    """A Parquet object of a store, read by row groups when rows are asked for; usable from several threads.

    Args:
        store: a folder's file is read where it lies, another object is copied into a temporary file first.
        name: of the object.
        columns: that `row` reads.

    Raises:
        AbsentError, StoreError: the object cannot be read, or is damaged.
    """

    def __init__(self, store: Store, name: str, columns: Sequence[str]) -> None:
        self._store, self._name = store, name
        with self._readable():
            self._file = pq.ParquetFile(_local(store, name), pre_buffer=False)
        self._columns = list(columns)
        facts = self._file.metadata
        sizes = [facts.row_group(index).num_rows for index in range(facts.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._lock = threading.RLock()
        self._group = lru_cache(GROUPS)(self._read_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Table], tuple[Store, str, list[str]]]:
        """A copy, in this process or another, opens the file anew."""
        return Table, (self._store, self._name, self._columns)

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self._file.schema_arrow.names)

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """Of these columns."""
        return pa.schema([self._file.schema_arrow.field(name) for name in columns])

    def row(self, number: int) -> tuple[pa.Table, int]:
        """A row group with `columns`, and which of its rows this is."""
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:
            return self._group(group), number - int(self._starts[group])

    def scan(self, columns: Sequence[str], rows: int = 1 << 16) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows, so many rows at a time."""
        with self._lock, self._readable():
            yield from self._file.iter_batches(rows, columns=list(columns), use_threads=False)

    def _read_group(self, index: int) -> pa.Table:
        with self._readable():
            return self._file.read_row_group(index, columns=self._columns, use_threads=False).combine_chunks()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowInvalid as error:
            raise StoreError(f"{self._store.url}/{self._name}: damaged, merge the build again: {error}") from None


def _local(store: Store, name: str) -> IO[bytes]:
    """The object as a local file, which goes when it is closed."""
    if isinstance(store, FolderStore):
        with store.reading(name):  # its errors are clear
            return (store.root / name).open("rb")
    copy: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    with store.reading(name) as file:
        shutil.copyfileobj(file, copy, 16 << 20)
    return copy
