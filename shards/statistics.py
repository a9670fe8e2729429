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
        """Value per band below which `share` (0..1) of the pixels lie, to the width of a histogram bin."""
        edges = np.linspace(*clip, BINS + 1)
        below = np.cumsum(self.histogram, axis=1) / max(self.count, 1)
        return np.asarray([edges[1:][min(int(np.searchsorted(row, share)), BINS - 1)] for row in below])


def measure(sample: Sample) -> dict[str, BandStatistics]:
    """Statistics of one sample, by sensor; sensors without a valid pixel are left out."""
    found = {}
    for name, tile in sample.tiles.items():
        pixels = np.clip(tile.values[:, tile.valid].astype(np.float64), *SENSORS[name].clip)  # [C, pixels]
        if pixels.size:
            found[name] = _of_pixels(pixels, SENSORS[name].clip)
    return found


def _of_pixels(pixels: Floats, clip: tuple[float, float]) -> BandStatistics:
    mean = pixels.mean(axis=1)
    histogram = np.stack([np.histogram(band, BINS, clip)[0] for band in pixels]).astype(np.float64)
    squares = ((pixels - mean[:, None]) ** 2).sum(axis=1)
    return BandStatistics(pixels.shape[1], mean, squares, pixels.min(axis=1), pixels.max(axis=1), histogram)


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
