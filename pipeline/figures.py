"""Pictures for reports and run folders, each as the bytes of a PNG file. No torch, no pyplot, no global state.

Letters in the comments: C bands; H, W pixels; K classes; S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from shards.contract import Classes, Contract, Modality
from shards.pictures import GREY, Picture, Stretch, coloured, picture, plain, png

LARGEST = 1024  # pixels along a side of a map; larger ones are thinned out
POINTS = 2000  # of a curve; longer ones are drawn as means of bins
FEW = 50  # points of a curve that are drawn as such
OUTLIER = 20.0  # times the median: a value that makes an axis logarithmic where that is left open


def loss_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str] = ("loss",), title: str = "Loss"
) -> bytes:
    """One line per run and key over the steps.

    Args:
        runs: name of a run -> its lines of metrics.jsonl, each with `step`; lines without a key are passed over.
        keys: which numbers to draw, such as `loss` and `loss/s1`.
        title: of the picture.
    """
    figure, axes = _figure(8, 3.6)
    for name, rows in runs.items():
        for key in keys:
            label = " ".join(part for part in (name, key if len(keys) > 1 else "") if part)
            _curve(axes, _points(rows, key), plain(label))
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return png(figure)


@dataclass(frozen=True)
class Panel:
    """One of several curve pictures above each other.

    `title` of the vertical axis; `keys` of metrics.jsonl to draw; `scale`: `linear` from 0 on, `percent` of shares 0 to
    1, `log`, or `auto`, which is logarithmic where single values would hide all others. `marks`: name -> steps to mark.
    `smooth`: with a running median over the values.
    """

    title: str
    keys: Sequence[str]
    scale: str = "linear"
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    smooth: bool = True


def panels(rows: Sequence[Mapping[str, Any]], wanted: Sequence[Panel]) -> bytes:
    """Curves over a common axis of steps, a panel above the other.

    Args:
        rows: at least one line of metrics.jsonl; lines without a key, or with null for it, are passed over.
        wanted: at least one.
    """
    figure = Figure(figsize=(9, 0.5 + 2.7 * len(wanted)), layout="constrained")
    grid = figure.subplots(len(wanted), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, wanted, strict=True):
        curves = {key: _points(rows, key) for key in panel.keys}
        for key, points in curves.items():
            _curve(axes, points, plain(key), panel.smooth)
        axes.set_ylabel(panel.title)
        _scale(axes, panel.scale, np.concatenate([points[:, 1] for points in curves.values()]))
        for number, (name, steps) in enumerate(panel.marks.items()):
            if steps:
                place, colour = axes.get_xaxis_transform(), ("tab:red", "black")[number % 2]
                heights = np.full(len(steps), 0.03 + 0.05 * number)
                axes.plot(steps, heights, "|^"[number % 2], color=colour, transform=place, label=plain(name))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1] and (len(panel.keys) > 1 or any(panel.marks.values())):
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    grid[-1].set(xlabel="step", xlim=(0, 1.03 * rows[-1]["step"]))
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(figure)


def _scale(axes: Axes, scale: str, values: NDArray[np.float64]) -> None:
    """Sets the vertical axis of what shows `values` [N]."""
    positive = len(values) > 0 and bool((values > 0).all())
    if positive and (scale == "log" or (scale == "auto" and values.max() > OUTLIER * np.median(values))):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if values.max() < 30 * values.min():  # where powers of ten alone would be too few
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale in ("linear", "percent"):
        axes.set_ylim(bottom=0)
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """Step and value of the lines that have a finite number for a key: [N, 2]."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])]


def thinned(points: NDArray[np.float64], most: int = POINTS) -> NDArray[np.float64]:
    """At most `most` bins of `points` [N, 2] (step, value): [M, 4] of mean step, mean, least and largest value.

    Bins hold as many points each, but for one; so a single spike still is the largest value of its bin.
    """
    edges = np.linspace(0, len(points), min(most, len(points)), endpoint=False).astype(np.int64)
    if not len(edges):
        return np.empty((0, 4))
    counts = np.diff([*edges, len(points)])[:, None]
    least, largest = (over.reduceat(points[:, 1], edges) for over in (np.minimum, np.maximum))
    return np.column_stack([np.add.reduceat(points, edges) / counts, least, largest])


def _curve(axes: Axes, points: NDArray[np.float64], label: str, smooth: bool = True) -> None:
    """A smooth line through the values of `points` [N, 2] over a faint one of them, or of bins and their band."""
    window = max(1, min(len(points), POINTS) // 40) if smooth else 1
    bins = thinned(points)
    faint, name = (0.3, None) if window > 1 else (1, label)
    marker = "." if len(points) < FEW else ""
    (line,) = axes.plot(bins[:, 0], bins[:, 1], alpha=faint, label=name, marker=marker)
    if len(points) > len(bins):
        axes.fill_between(bins[:, 0], bins[:, 2], bins[:, 3], color=line.get_color(), alpha=0.3, linewidth=0.5)
    if window > 1:
        # The median, since single values far off would be a plateau of the mean.
        middle = np.median(np.lib.stride_tricks.sliding_window_view(bins[:, 1], window), axis=1)
        steps = bins[(window - 1) // 2 :, 0][: len(middle)]
        axes.plot(steps, middle, color=line.get_color(), label=label)


def shares(parts: Mapping[str, float], unit: str) -> bytes:
    """A horizontal bar for each part of a whole, with its size and its share of all, the first on top."""
    figure, axes = _figure(8, 0.8 + 0.4 * len(parts))
    whole = sum(parts.values()) or 1.0
    bars = axes.barh([plain(name) for name in parts], list(parts.values()))
    axes.bar_label(bars, [f" {value:,.1f} {unit}, {value / whole:.0%}" for value in parts.values()])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.3)  # for the text beside the longest
    axes.grid(axis="x", alpha=0.3)
    return png(figure)


@dataclass(frozen=True)
class Reconstruction:
    """One sample as the network saw and completed it, by modality.

    `values` and `output` float [C, H, W] as the network has them (normalised by the contract); `valid` bool [H, W];
    `hidden` bool [ceil(H / cell), ceil(W / cell)], per block or token of `cell` pixels.
    """

    key: str
    values: Mapping[str, NDArray[Any]]
    valid: Mapping[str, NDArray[np.bool_]]
    hidden: Mapping[str, NDArray[np.bool_]]
    output: Mapping[str, NDArray[Any]]
    cell: int = 32


def reconstructions(contract: Contract, samples: Sequence[Reconstruction]) -> bytes:
    """A row per sample: for each modality its input, what was left of it, and that completed by the network.

    Only hidden parts are the network's: it is not trained to repeat what it sees.
    """
    names = contract.sensors
    figure = Figure(figsize=(2.1 * 3 * len(names), 2.25 * len(samples) + 0.3), layout="constrained")
    grid = figure.subplots(len(samples), 3 * len(names), squeeze=False)
    for number, (row, sample) in enumerate(zip(grid, samples, strict=True)):
        for column, name in enumerate(names):
            pictures = _before_and_after(contract.modality(name), sample, name)
            for axes, title, image in zip(row[3 * column :], ("input", "visible", "completed"), pictures, strict=False):
                _show(axes, image, f"{name} {title}" if number == 0 else "")
        row[0].set_ylabel(plain(sample.key), fontsize=7)
    return png(figure)


def _before_and_after(modality: Modality, sample: Reconstruction, name: str) -> tuple[Picture, Picture, Picture]:
    """Input, input without its hidden parts, and these filled with the output, of one modality in the same colours."""
    valid = sample.valid[name]
    before, after = (physical(modality, values) for values in (sample.values[name], sample.output[name]))
    stretch = Stretch.of(modality, before, valid)
    hidden = enlarge(sample.hidden[name], sample.cell, valid.shape)
    image = picture(modality, before, valid, stretch)
    visible = np.where(hidden[..., None], np.float32(GREY), image)
    completed = np.where(hidden[..., None], picture(modality, after, valid, stretch), image)
    return image, visible, completed


def physical(modality: Modality, values: NDArray[Any]) -> Picture:
    """Normalised `values` [C, H, W] in the unit of the modality."""
    scale, offset = (
        np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (modality.scale, modality.offset)
    )
    return np.asarray(values, dtype=np.float32) * scale + offset


def enlarge(mask: NDArray[np.bool_], cell: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """`mask` [h, w] with each entry drawn as `cell` x `cell` pixels, cut off at the border of `shape` (H, W).

    Raises:
        ValueError: so many cells do not cover the shape.
    """
    if mask.shape != tuple(-(-pixels // cell) for pixels in shape):
        raise ValueError(f"mask {mask.shape} in cells of {cell} pixels does not cover {shape}; give the right `cell`")
    return mask.repeat(cell, 0).repeat(cell, 1)[: shape[0], : shape[1]]


def confusion(matrix: NDArray[Any], classes: Classes) -> bytes:
    """The confusion matrix [K, K] (rows true, columns predicted), in percent of each true class over its pixels."""
    counts = np.asarray(matrix, dtype=np.float64)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.2 + 0.62 * len(counts)
    names = [plain(shortened(name)) for name in classes.names]
    room = 0.05 * max(map(len, names))  # beside the cells, for what stands there
    figure = Figure(figsize=(size + room, size + 0.7 * room), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if value > 60 else "black"
        how: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        axes.text(column, row - 0.14, f"{value:.0f}", **how)
        axes.text(column, row + 0.24, short(float(counts[row, column])), fontsize=6, **how)
    return png(figure)


def shortened(name: str, most: int = 26) -> str:
    """A name that fits in its column."""
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def short(count: float) -> str:
    """A count of pixels in at most six letters: 950, 1.2k, 340k, 5.1M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 10 * unit else 0}f}{name}"
    return f"{count:.0f}"


def class_bars(scores: Mapping[str, NDArray[Any]], classes: Classes, title: str = "IoU (%)") -> bytes:
    """Bars per class for each way of training: the mean over seeds, and the standard deviation as a line.

    Args:
        scores: name -> [S, K], NaN where a class is absent.
        classes: the K classes.
        title: what the numbers are.
    """
    figure, axes = _figure(9, 3.8)
    places, width = np.arange(len(classes.names)), 0.8 / max(1, len(scores))
    for number, (name, values) in enumerate(scores.items()):
        present = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
        mean, spread = present.mean(0).filled(0), present.std(0).filled(0)
        shift = (number - (len(scores) - 1) / 2) * width
        axes.bar(places + shift, mean, width, yerr=spread, capsize=2, label=plain(name))
    axes.set_xticks(places, [plain(name) for name in classes.names], rotation=30, ha="right")
    axes.set(ylabel=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return png(figure)


def maps(images: Mapping[str, NDArray[Any]], classes: Classes) -> bytes:
    """Maps and pictures of one area side by side, with a legend of the classes.

    Args:
        images: title -> class numbers [H, W], or a colour picture [H, W, 3].
        classes: names and colours; pixels that are no class are grey.
    """
    width, patches = 4.2 * len(images), legend(classes)
    entry = 0.8 + 0.09 * max(len(str(patch.get_label())) for patch in patches)  # inches, of the widest
    columns = max(1, min(len(patches), int(width / entry)))
    figure = Figure(figsize=(width, 4.6 + 0.25 * -(-len(patches) // columns)), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        step = -(-max(image.shape[:2]) // LARGEST)
        thin = image[::step, ::step]
        _show(axes, thin if image.ndim == 3 else coloured(thin, classes), title)
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)
    return png(figure)


def legend(classes: Classes, more: Mapping[str, Sequence[float]] | None = None) -> list[Patch]:
    """A patch for each class, and for whatever else has a colour (red, green, blue, 0 to 1)."""
    colours = dict(zip(classes.names, (np.array(classes.palette) / 255).tolist(), strict=True))
    return [Patch(color=colour, label=plain(shortened(name))) for name, colour in {**colours, **(more or {})}.items()]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _show(axes: Axes, image: NDArray[Any], title: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(plain(title), fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
