"""How far the modalities of a dataset lie off the first one, from the manifest's column `shift`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LIMITS = (1, 2, 4)  # pixels


@dataclass(frozen=True)
class Shifts:
    """The shifts of one modality, in pixels: `measured` in so many of `samples`, the rest over those.

    `median` and `most` (90 % lie within it) are of their lengths, `over` says how many are longer than LIMITS;
    `rows` and `cols` are medians, the part that is common to all. NaN where nothing was measured.
    """

    measured: int
    samples: int
    median: float
    most: float
    over: tuple[int, ...]
    rows: float
    cols: float

    @staticmethod
    def of(column: pa.ChunkedArray, sensor: str) -> Shifts:
        """Of the struct column `shift` of a manifest, for one of its sensors."""
        found = pc.struct_field(column, sensor).drop_null()
        rows, cols = (np.asarray(pc.list_element(found, axis), np.float64) for axis in (0, 1))
        lengths = np.hypot(rows, cols)
        over = tuple(int((lengths > limit).sum()) for limit in LIMITS)
        if not len(found):
            return Shifts(0, len(column), np.nan, np.nan, over, np.nan, np.nan)
        median, most = np.percentile(lengths, [50, 90]).tolist()
        return Shifts(len(found), len(column), median, most, over, float(np.median(rows)), float(np.median(cols)))
