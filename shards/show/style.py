"""The colours of a contact sheet: the same for all of its samples, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract, Modality
from shards.pictures import Picture, Stretch, picture, slopes, terrain
from shards.sample import Tile
from shards.sensors import SENSORS
from shards.show.small import Shown, bands_shown
from shards.statistics import BandStatistics

MIDDLE, GAMMAS = 0.4, (0.35, 1.0)  # brightness of the median pixel, and how far one goes for it
GENTLE = 0.2  # metres per pixel: slopes are not drawn steeper than if this were 45 degrees


@dataclass(frozen=True)
class Style:
    """How each modality is coloured, the same for all samples.

    `stretches` by sensor; heights have `limits`, which get the lowest and the highest colour, and `steep`, the metres
    per pixel that are drawn as 45 degrees.
    """

    stretches: Mapping[str, Stretch]
    limits: Mapping[str, tuple[float, float]]
    steep: Mapping[str, float]

    @staticmethod
    def of(contract: Contract, statistics: Mapping[str, BandStatistics], samples: Sequence[Shown]) -> Style:
        """From the 2nd and 98th percentiles of the dataset; what these do not tell, of the samples together."""
        stretches, limits, steep = {}, {}, {}
        for modality in contract.modalities:
            name = modality.sensor
            tiles = [shown.sample.tiles[name] for shown in samples]
            low, high = _percentiles(modality, statistics.get(name))
            if SENSORS[name].kind == "elevation":
                limits[name] = float(low[0]), float(high[0])
                slope = [np.hypot(*slopes(tile.values[0], tile.valid))[tile.valid] for tile in tiles]
                steep[name] = max(GENTLE, float(np.percentile(np.concatenate([*slope, [0.0]]), 95)))
            else:
                stretches[name] = _with_ratio(Stretch(low, high, _gamma(modality, statistics.get(name))), tiles)
        return Style(stretches, limits, steep)

    def draw(self, modality: Modality, tile: Tile) -> Picture:
        """The picture [h, w, 3] of a tile of the bands shown."""
        name = modality.sensor
        if name in self.limits:
            return terrain(tile.values[0], tile.valid, self.limits[name], self.steep[name])
        bands = tuple(modality.bands[band] for band in bands_shown(modality))
        return picture(replace(modality, bands=bands), tile.values, tile.valid, self.stretches[name])

    def describe(self, modality: Modality) -> str:
        """What the colours of a modality mean, in words."""
        name, unit = modality.sensor, modality.unit
        if name in self.limits:
            low, high = self.limits[name]
            return f"{name}: light from the upper left, green at {low:,.0f} {unit} to white at {high:,.0f} {unit}"
        stretch, names = self.stretches[name], channel_names(modality)
        ranges = zip(names, stretch.low.tolist(), stretch.high.tolist(), strict=True)
        colours = ("red", "green", "blue") if len(names) == 3 else ("grey",)
        parts = [
            f"{colour} {band} {low:.4g} to {high:.4g}"
            for colour, (band, low, high) in zip(colours, ranges, strict=True)
        ]
        gamma = f"; gamma {stretch.gamma:.2f}" if stretch.gamma else ""
        return f"{name}: {', '.join(parts)} ({unit}{gamma})"


def _percentiles(modality: Modality, found: BandStatistics | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """2nd and 98th percentile of the bands shown; the clip range where nothing was measured."""
    bands, clip = bands_shown(modality), modality.clip
    if found is None or not found.count:
        return np.full(len(bands), clip[0], np.float32), np.full(len(bands), clip[1], np.float32)
    low, high = (found.percentile(share, clip)[bands] for share in (0.02, 0.98))
    return low.astype(np.float32), np.maximum(high, low + (clip[1] - clip[0]) / 256).astype(np.float32)


def _gamma(modality: Modality, found: BandStatistics | None) -> float | None:
    """For optical sensors that which makes the median of the dataset a middle grey: snow and clouds leave land dark."""
    if SENSORS[modality.sensor].kind != "optical" or found is None or not found.count:
        return None
    low, high = _percentiles(modality, found)
    middle = found.percentile(0.5, modality.clip)[bands_shown(modality)]
    share = float(np.clip((middle - low) / (high - low), 0.01, 0.99).mean())
    return float(np.clip(np.log(MIDDLE) / np.log(share), *GAMMAS))


def _with_ratio(stretch: Stretch, tiles: Sequence[Tile]) -> Stretch:
    """For two polarisations, the stretch of their difference too, over the samples shown."""
    if len(stretch.low) != 2:
        return stretch
    found = np.concatenate([(tile.values[0] - tile.values[1])[tile.valid] for tile in tiles] or [[]])
    low, high = np.percentile(found, (2, 98)) if found.size else (0.0, 1.0)
    lows, highs = np.append(stretch.low, low), np.append(stretch.high, max(high, low + 0.1))
    return Stretch(lows.astype(np.float32), highs.astype(np.float32), stretch.gamma)


def channel_names(modality: Modality) -> list[str]:
    """What red, green and blue (or grey) show; for two polarisations blue is their ratio, a difference in dB."""
    names = [modality.bands[band] for band in bands_shown(modality)]
    return [*names, "\N{MINUS SIGN}".join(names)] if len(names) == 2 else names
