"""Streamed statistics of the valid pixels, per sensor and band: mean, standard deviation, range and a histogram."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.sample import Sample
from shards.sensors import SENSORS

BINS = 256
COUNTABLE = 1 << 17  # of a clip range: how many integers are counted one by one

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BandStatistics:
    """Of one sensor's bands, over pixels clipped to the sensor's range: arrays of shape [C], histogram [C, BINS].

    The sums of squares are about the mean (Welford 1962; merged as in Chan, Golub & LeVeque 1983), so that nothing
    cancels however many pixels there are.
    """

    count: int
    mean: Floats
    squares: Floats
    low: Floats
    high: Floats
    histogram: Floats

    @property
    def std(self) -> Floats:
        """Standard deviation per band [C]."""
        return np.sqrt(self.squares / max(self.count, 1))

    def merge(self, other: BandStatistics) -> BandStatistics:
        """Statistics of both sets of pixels together."""
        count = self.count + other.count
        delta, share = other.mean - self.mean, other.count / max(count, 1)
        return BandStatistics(
            count,
            self.mean + delta * share,
            self.squares + other.squares + delta**2 * self.count * share,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.histogram + other.histogram,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {key: value if key == "count" else value.tolist() for key, value in vars(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BandStatistics:
        """The inverse of `to_json`."""
        arrays = {key: np.asarray(value, np.float64) for key, value in data.items() if key != "count"}
        return BandStatistics(count=int(data["count"]), **arrays)

    def percentile(self, share: float, clip: tuple[float, float]) -> Floats:
        """Value per band below which `share` (0..1) of the pixels lie, taken as evenly spread in a histogram's bin."""
        edges = np.linspace(*clip, BINS + 1)
        below = np.pad(np.cumsum(self.histogram, axis=1), ((0, 0), (1, 0)))  # [C, BINS + 1], at the edges
        found = [np.interp(share * row[-1], row, edges) for row in below]
        return np.asarray(np.clip(found, self.low, self.high))


def measure(sample: Sample) -> dict[str, BandStatistics]:
    """Statistics of one sample, by sensor; sensors without a valid pixel are left out."""
    found = {}
    for name, tile in sample.tiles.items():
        if tile.valid.any():
            whole = tile.values.reshape(len(tile.values), -1)  # [C, pixels]
            pixels = whole if tile.valid.all() else whole[:, tile.valid.ravel()]
            found[name] = _of_pixels(pixels, SENSORS[name].clip)
    return found


def _of_pixels(pixels: NDArray[Any], clip: tuple[float, float]) -> BandStatistics:
    low, high = clip
    countable = pixels.dtype.kind in "iu" and low == int(low) and high == int(high) and high - low < COUNTABLE
    bands = [(_of_integers if countable else _of_floats)(band, clip) for band in pixels]
    return BandStatistics(pixels.shape[1], *(np.array(column, np.float64) for column in zip(*bands, strict=True)))


def _of_floats(pixels: NDArray[Any], clip: tuple[float, float]) -> tuple[float, float, float, float, Floats]:
    """Mean, squares about it, lowest, highest and histogram of one band."""
    values = np.clip(pixels, *np.asarray(clip, pixels.dtype if pixels.dtype.kind == "f" else np.float64))
    mean = float(values.mean(dtype=np.float64))
    away = values.astype(np.float64) - mean
    bins = ((values - clip[0]) * (BINS / (clip[1] - clip[0]))).astype(np.intp)
    histogram = np.bincount(np.minimum(bins, BINS - 1), minlength=BINS).astype(np.float64)
    return mean, float(away @ away), float(values.min()), float(values.max()), histogram


def _of_integers(pixels: NDArray[Any], clip: tuple[float, float]) -> tuple[float, float, float, float, Floats]:
    """The same of integers, by counting each value: exact, and several times faster."""
    low, high = int(clip[0]), int(clip[1])
    inside = np.clip(pixels, low, high)
    counts = np.bincount(inside.astype(np.int32) - low if low else inside)
    there = np.flatnonzero(counts)
    counts, values = counts[there], there + float(low)
    mean = float(counts @ values) / len(pixels)
    bins = np.minimum(there * (BINS / (high - low)), BINS - 1).astype(np.intp)
    histogram = np.bincount(bins, counts, BINS).astype(np.float64)
    return mean, float(counts @ (values - mean) ** 2), float(values[0]), float(values[-1]), histogram


def merge(a: Mapping[str, BandStatistics], b: Mapping[str, BandStatistics]) -> dict[str, BandStatistics]:
    """Statistics by sensor of two sets of samples together."""
    both = {name: a[name].merge(b[name]) for name in a if name in b}
    return {**a, **b, **both}


def table(facts: Mapping[str, Any]) -> list[list[str]]:
    """The statistics in `dataset.json` as rows of text, with a heading."""
    rows = [["sensor", "band", "unit", "pixels", "mean", "std", "min", "p2", "p98", "max"]]
    for modality in facts["contract"]["modalities"]:
        found = BandStatistics.from_json(facts["statistics"][modality["sensor"]])
        low, high = (found.percentile(share, tuple(modality["clip"])) for share in (0.02, 0.98))
        numbers = zip(found.mean, found.std, found.low, low, high, found.high, strict=True)
        for band, values in zip(modality["bands"], numbers, strict=True):
            first = [modality["sensor"], band, modality["unit"], f"{found.count:,}"]
            rows.append(first + [f"{value:.6g}" for value in values])
    return rows
