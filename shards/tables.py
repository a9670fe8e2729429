"""Parquet files to tables, in one way."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a Parquet file or of its bytes; only these columns where they are given.

    In this thread, without Arrow's pools: one of their workers that is still ending when the process exits ends it with
    SIGABRT (seen with Arrow 26 in one of five short commands).

    Raises:
        pyarrow.ArrowInvalid: not Parquet.
    """
    file = pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source, pre_buffer=False)
    with file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
