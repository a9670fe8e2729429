"""Histograms of every band of a dataset, from the statistics that were counted when it was built."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from shards.contract import Contract, Modality
from shards.pictures import plain
from shards.sensors import SENSORS
from shards.statistics import BINS, BandStatistics

ACROSS = 5
TAIL = 0.1  # percent of the pixels at either end that the axis need not reach
WIDE, HIGH, TITLE = 11.0, 1.75, 0.45  # inches: of the figure, of a row of bands, of a sensor's title
COLOUR, CHANNELS = "#6b7c8c", ("#c0392b", "#2e8b57", "#2c6fbb")
PERCENTILE, CLIP = "#c26a00", "#111111"


def histograms(contract: Contract, statistics: Mapping[str, BandStatistics]) -> Figure | None:
    """A histogram per band, sensor by sensor: valid pixels only, clip range and 2nd and 98th percentiles marked.

    Args:
        contract: which bands, their units and clip ranges.
        statistics: by sensor.

    Returns:
        None where nothing was measured.
    """
    shown = [modality for modality in contract.modalities if modality.sensor in statistics]
    if not shown:
        return None
    heights = [TITLE + HIGH * -(-len(modality.bands) // ACROSS) for modality in shown]
    figure = Figure(figsize=(WIDE, sum(heights) + 0.3), dpi=100, layout="constrained")
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)
    for part, modality in zip(parts[:, 0], shown, strict=True):
        found = statistics[modality.sensor]
        low, high = modality.clip
        title = f"{modality.sensor}: {found.count:,} valid pixels; {modality.unit}, clipped to {low:g} to {high:g}"
        part.suptitle(plain(title), fontsize=10, x=0.01, ha="left")
        across = min(ACROSS, len(modality.bands))
        grid = part.subplots(-(-len(modality.bands) // across), across, squeeze=False).ravel()
        for band, axes in enumerate(grid):
            if band < len(modality.bands):
                _band(axes, modality, found, band)
            else:
                axes.set_visible(False)
    lines = [Line2D([], [], color=PERCENTILE, linestyle="--", label="2nd and 98th percentile")]
    lines.append(Line2D([], [], color=CLIP, label="clip range, where the axis reaches it"))
    figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def _band(axes: Axes, modality: Modality, found: BandStatistics, band: int) -> None:
    """Share of the valid pixels per bin, over the range in which there are any."""
    name, clip = modality.bands[band], modality.clip
    edges = np.linspace(*clip, BINS + 1)
    share = 100 * found.histogram[band] / max(found.count, 1)
    axes.stairs(share, edges, fill=True, color=_colour(modality, name))
    low, high = (float(found.percentile(part, clip)[band]) for part in (0.02, 0.98))
    for value in (low, high):
        axes.axvline(value, color=PERCENTILE, linestyle="--", linewidth=1)
    for value in clip:
        axes.axvline(value, color=CLIP, linewidth=1.2)
    first, last = np.searchsorted(np.cumsum(share), (TAIL, 100 - TAIL)).clip(0, BINS - 1)
    margin = max(0.04 * (edges[last + 1] - edges[first]), edges[1] - edges[0])
    axes.set_xlim(edges[first] - margin, edges[last + 1] + margin)
    axes.set_ylim(0, 1.08 * _highest(share))
    axes.set_title(plain(f"{name}: {low:.4g} to {high:.4g}"), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_yticks([])
    ends = {"first": share[0], "last": share[-1]}
    piled = [f"{part:.0f} % in the {end} bin" for end, part in ends.items() if part >= 0.5]
    axes.text(0.98, 0.95, "\n".join(piled), transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _highest(share: NDArray[np.float64]) -> float:
    """The top of the axis: the first and the last bin, where clipped pixels pile up, may stand out of it."""
    inner = float(share[1:-1].max())
    return min(float(share.max()), 2 * inner) if inner > 0 else float(share.max())


def _colour(modality: Modality, band: str) -> str:
    """That of the channel of the colour picture which shows the band of an optical sensor."""
    sensor = SENSORS[modality.sensor]
    if sensor.kind == "optical" and band in sensor.rgb and len(sensor.rgb) == 3:
        return CHANNELS[sensor.rgb.index(band)]
    return COLOUR
