"""Pictures of an evaluation's page, each as the bytes of a PNG file. No torch, no pyplot, no global state.

Letters in the comments: C bands; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.figures import legend, physical, shortened
from shards.contract import Contract
from shards.pictures import Picture, coloured, picture, plain, png

RIGHT, WRONG, UNLABELLED = (0.85, 0.9, 0.95), (0.8, 0.1, 0.1), (0.6, 0.6, 0.6)
SIDE, GAP = 204, 4  # pixels of a cell in the picture of maps, and of these between two cells
OUTCOMES = {"right": RIGHT, "wrong": WRONG, "not labelled": UNLABELLED}


@dataclass(frozen=True)
class Shown:
    """One sample as the network saw and classified it.

    `values` float [C, H, W] by modality as the network has them (normalised by the contract), `valid` bool [H, W];
    `label` and `predicted` class numbers [H, W].
    """

    title: str
    values: Mapping[str, NDArray[Any]]
    valid: Mapping[str, NDArray[np.bool_]]
    label: NDArray[Any]
    predicted: NDArray[Any]


def maps(contract: Contract, samples: Sequence[Shown]) -> bytes:
    """A row per sample: its modalities, label, prediction, and where that is wrong; below, what the colours mean.

    One picture of all: an axis for each would take ten times as long.
    """
    assert contract.classes is not None
    columns, patches = [*contract.sensors, "label", "prediction", "errors"], legend(contract.classes, OUTCOMES)
    lines = -(-len(patches) // len(columns))
    figure = Figure(figsize=(2.1 * len(columns) + 0.4, 2.1 * len(samples) + 0.6 + 0.25 * lines), layout="constrained")
    axes = figure.subplots()
    rows = [np.concatenate([_cell(image) for image in _images(contract, sample)], 1) for sample in samples]
    axes.imshow(np.concatenate(rows), interpolation="nearest")
    middles = SIDE / 2 + SIDE * np.arange(max(len(columns), len(samples)))
    axes.set_xticks(middles[: len(columns)], [plain(name) for name in columns], fontsize=9)
    titles = [plain(sample.title) for sample in samples]
    axes.set_yticks(middles[: len(samples)], titles, fontsize=7, rotation=90, va="center")
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.legend(handles=patches, loc="outside lower center", ncols=len(columns), frameon=False, fontsize=8)
    return png(figure)


def _cell(image: Picture) -> Picture:
    """A picture [H, W, 3] as one of SIDE x SIDE pixels, the last of them white, so that neighbours are apart."""
    cell = np.ones((SIDE, SIDE, 3), np.float32)
    places = [np.arange(SIDE - GAP) * size // (SIDE - GAP) for size in image.shape[:2]]
    cell[: SIDE - GAP, : SIDE - GAP] = image[np.ix_(*places)]
    return cell


def _images(contract: Contract, sample: Shown) -> list[Picture]:
    assert contract.classes is not None
    found = []
    for name in contract.sensors:
        modality = contract.modality(name)
        found.append(picture(modality, physical(modality, sample.values[name]), sample.valid[name]))
    outcome = np.where(sample.label == sample.predicted, 0, 1)
    outcome[sample.label == contract.classes.ignore] = 2
    errors = np.array([RIGHT, WRONG, UNLABELLED], np.float32)[outcome]
    return [*found, coloured(sample.label, contract.classes), coloured(sample.predicted, contract.classes), errors]


def reliability(bins: Sequence[Mapping[str, Any]]) -> bytes:
    """Accuracy over confidence of `pipeline.calibration.calibration`, above the share of pixels in each bin."""
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 100 / len(bins)
    middles = width * (np.arange(len(bins)) + 0.5)
    filled = [number for number, each in enumerate(bins) if each["pixels"]]
    upper.bar(middles[filled], [bins[number]["accuracy"] for number in filled], 0.9 * width, label="accuracy of a bin")
    sure, right = ([bins[number][name] for number in filled] for name in ("confidence", "accuracy"))
    upper.plot(sure, right, "k.", label="at its mean confidence")
    upper.plot([0, 100], [0, 100], "--", color="tab:red", label="well calibrated")
    upper.set(ylabel="pixels that are right (%)", xlim=(0, 100), ylim=(0, 100))
    upper.legend(frameon=False, loc="upper left", fontsize=8)
    pixels = np.array([each["pixels"] for each in bins], np.float64)
    lower.bar(middles, 100 * pixels / max(pixels.sum(), 1), 0.9 * width, color="tab:grey")
    lower.set(xlabel="confidence in the predicted class (%)", ylabel="pixels (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return png(figure)


def class_bars(values: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> bytes:
    """Horizontal bars in percent for each class, one a measure, with their numbers; `absent` where it is None."""
    figure = Figure(figsize=(8, 1.0 + (0.25 + 0.2 * len(values)) * len(names)), layout="constrained")
    axes = figure.subplots()
    places, width = np.arange(len(names)), 0.8 / len(values)
    for number, (name, row) in enumerate(values.items()):
        heights = [0.0 if value is None else value for value in row]
        bars = axes.barh(places + (number - (len(values) - 1) / 2) * width, heights, width, label=plain(name))
        axes.bar_label(bars, ["absent" if v is None else f"{v:.1f}" for v in row], padding=2, fontsize=7)
    axes.set_yticks(places, [plain(shortened(name)) for name in names])
    axes.set(xlabel="percent", xlim=(0, 112), ylim=(len(names) - 0.45, -0.55))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return png(figure)


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str) -> bytes:
    """Numbers with their intervals, (name, value, low, high) each, around a line at 0; the first on top."""
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, value, low, high) in enumerate(rows):
        sure = low > 0 or high < 0
        axes.plot([low, high], [place, place], color="tab:blue" if sure else "tab:grey", linewidth=2)
        axes.plot(value, place, "o", color="tab:blue" if sure else "tab:grey")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [plain(shortened(name, 32)) for name, *_ in rows])
    axes.set(xlabel=plain(title), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    return png(figure)
