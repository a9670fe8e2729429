"""The contact sheet: some samples of a dataset, one picture per modality, all in the same colours.

A pixel of a tile is a square of whole pixels of the sheet, or one of those is the mean of a square of these; nothing
is resampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shards.contract import Contract
from shards.pictures import Picture, coloured, plain, terrain
from shards.show.small import CELL, Shown, sample_shape
from shards.show.style import Style, channel_names
from shards.statistics import BandStatistics

WIDTH = 1240  # pixels of the sheet, unless one sample is wider
MARGIN, GAP, BETWEEN = 16, 4, 22  # around the sheet, between pictures, between samples
LEAST = 220  # width of a sample, so that its text fits
LINE, SIZE = 14, 10.5  # height of a line, size of its letters
LETTER = 0.6 * SIZE  # width of a letter, about
HEADINGS = 2 * LINE + 4
SWATCH, RAMP = 12, 60  # of the legend
DPI = 72  # so that a point is a pixel
OUTLINE = (1.0, 0.92, 0.1)
HATCH = np.array([(0.95, 0.95, 0.95), (0.74, 0.74, 0.74)], np.float32)
INK, SOFT = "#16191c", "#4a525c"


@dataclass(frozen=True)
class Layout:
    """Where things are on a sheet, in its pixels from the upper left.

    `samples` with `columns` pictures each, at most `side` pixels wide and high, and up to `notes` lines of text under a
    picture; `legend` lines at the end.
    """

    samples: int
    columns: int
    side: int
    notes: int = 0
    legend: int = 0

    @staticmethod
    def of(contract: Contract, samples: Sequence[Shown], legend: int = 0) -> Layout:
        """That of the sheet of these samples: a column per modality, and one for the label where there is one."""
        sides = [_zoom(shown) * max(sample_shape(shown.sample)) for shown in samples]
        notes = max(len(lines) for shown in samples for lines in shown.notes.values())
        return Layout(len(samples), len(contract.sensors) + _labelled(samples), max(sides), notes, legend)

    @property
    def sample_width(self) -> int:
        """Of a sample with its text."""
        return max(LEAST, self.columns * (self.side + GAP) - GAP)

    @property
    def sample_height(self) -> int:
        """Of a sample with its text and the space below it."""
        return self.side + (2 + self.notes) * LINE + 16

    @property
    def across(self) -> int:
        """Samples side by side."""
        fits = (WIDTH - 2 * MARGIN + BETWEEN) // (self.sample_width + BETWEEN)
        return max(1, min(fits, self.samples))

    @property
    def width(self) -> int:
        """Of the sheet."""
        return 2 * MARGIN + self.across * (self.sample_width + BETWEEN) - BETWEEN

    @property
    def foot(self) -> int:
        """Where the legend begins."""
        return MARGIN + HEADINGS + -(-self.samples // self.across) * self.sample_height

    @property
    def height(self) -> int:
        """Of the sheet."""
        return self.foot + self.legend * (LINE + 5) + MARGIN

    def corner(self, sample: int, column: int = 0) -> tuple[int, int]:
        """Left and upper edge of a picture."""
        row, place = divmod(sample, self.across)
        x = MARGIN + place * (self.sample_width + BETWEEN) + column * (self.side + GAP)
        return x, MARGIN + HEADINGS + row * self.sample_height + 2 * LINE + 3


@dataclass(frozen=True)
class Text:
    """A line of text whose upper left is at (x, y)."""

    x: float
    y: float
    text: str
    bold: bool = False
    colour: str = INK


def sheet(contract: Contract, statistics: Mapping[str, BandStatistics], samples: Sequence[Shown]) -> Figure:
    """The contact sheet of at least one sample.

    Args:
        contract: of the dataset: modalities in their order, and the palette of the label.
        statistics: of the dataset by sensor, for the stretch.
        samples: from `shrink`.
    """
    style = Style.of(contract, statistics, samples)
    entries = list(_legend(contract, style, samples))
    places = list(_flow(entries, Layout.of(contract, samples).width - 2 * MARGIN))
    layout = Layout.of(contract, samples, 1 + max(line for _, line in places))
    canvas = np.ones((layout.height, layout.width, 3), np.float32)
    for number, shown in enumerate(samples):
        for column, image in enumerate(_pictures(contract, style, shown)):
            _paste(canvas, image, layout.corner(number, column))
    texts = [*_headings(contract, layout, samples), *_texts(contract, layout, samples)]
    for entry, (x, line) in zip(entries, places, strict=True):
        left, top = MARGIN + x, layout.foot + line * (LINE + 5)
        _paste(canvas, entry.swatch, (left, top))
        texts.append(Text(left + entry.indent, top, entry.text))
    return _figure(canvas, texts)


def _figure(canvas: Picture, texts: Sequence[Text]) -> Figure:
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(np.round(255 * canvas).astype(np.uint8), origin="upper")
    for item in texts:
        x, y, weight = item.x / width, 1 - item.y / height, "bold" if item.bold else "normal"
        figure.text(x, y, plain(item.text), fontsize=SIZE, va="top", color=item.colour, weight=weight)
    return figure


def _labelled(samples: Sequence[Shown]) -> bool:
    return any(shown.sample.label is not None for shown in samples)


def _zoom(shown: Shown) -> int:
    """Pixels of the sheet along a side of a pixel of the small sample."""
    return max(1, round(CELL / int(max(sample_shape(shown.sample)))))


def _pictures(contract: Contract, style: Style, shown: Shown) -> Iterator[Picture]:
    """The pictures of one sample, as they stand on the sheet."""
    zoom, sample = _zoom(shown), shown.sample
    edges = None if sample.instances is None else _edges(_enlarge(sample.instances, zoom))
    for modality in contract.modalities:
        tile = sample.tiles[modality.sensor]
        yield _outlined(_hatched(_enlarge(style.draw(modality, tile), zoom), _enlarge(tile.valid, zoom)), edges)
    if sample.label is not None and contract.classes is not None:
        known = sample.label < len(contract.classes.names)
        image = _enlarge(coloured(sample.label, contract.classes), zoom)
        yield _outlined(_hatched(image, _enlarge(known, zoom)), edges)


def _enlarge(image: NDArray[Any], zoom: int) -> NDArray[Any]:
    return image.repeat(zoom, 0).repeat(zoom, 1)


def _hatched(image: Picture, valid: NDArray[np.bool_]) -> Picture:
    """`image` [H, W, 3] with stripes where not `valid` [H, W]."""
    return np.where(valid[..., None], image, hatch(*valid.shape))


def hatch(height: int, width: int) -> Picture:
    """Stripes [height, width, 3] that stand for what was not measured, or not labelled."""
    rows, cols = np.ogrid[:height, :width]
    return np.asarray(HATCH[(rows + cols) // 3 % 2])


def _edges(instances: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels [H, W] of polygons that have another polygon, or none, above or to the left, or below or to the right."""
    padded = np.pad(instances, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray((instances > 0) & np.any([other != instances for other in around], axis=0))


def _outlined(image: Picture, edges: NDArray[np.bool_] | None) -> Picture:
    return image if edges is None else np.where(edges[..., None], np.array(OUTLINE, np.float32), image)


def _paste(canvas: Picture, image: Picture, corner: tuple[int, int]) -> None:
    (left, top), (height, width) = corner, image.shape[:2]
    canvas[top : top + height, left : left + width] = image


def _headings(contract: Contract, layout: Layout, samples: Sequence[Shown]) -> Iterator[Text]:
    """What the columns show, above the first row of samples."""
    names = [(modality.sensor, " ".join(channel_names(modality))) for modality in contract.modalities]
    names += [("label", "")] * _labelled(samples)
    for place in range(layout.across):
        for column, (name, bands) in enumerate(names):
            x, _ = layout.corner(place, column)
            yield Text(x, MARGIN, name, bold=True)
            yield Text(x, MARGIN + LINE, bands, colour=SOFT)


def _texts(contract: Contract, layout: Layout, samples: Sequence[Shown]) -> Iterator[Text]:
    """What is written above and under the pictures."""
    for number, shown in enumerate(samples):
        x, y = layout.corner(number)
        key, facts = (_shorten(line, layout.sample_width) for line in shown.lines)
        yield Text(x, y - 2 * LINE - 2, key, bold=True)
        yield Text(x, y - LINE - 2, facts, colour=SOFT)
        for column, name in enumerate(contract.sensors):
            left, _ = layout.corner(number, column)
            for line, text in enumerate(shown.notes[name]):
                yield Text(left, y + layout.side + 2 + line * LINE, _shorten(text, layout.side), colour=SOFT)


def _shorten(text: str, width: int) -> str:
    """`text` without its middle where it is wider than `width` pixels; ends of keys tell samples apart."""
    fits = int(width / LETTER)
    if len(text) <= fits:
        return text
    half = max(1, (fits - 1) // 2)
    return f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


@dataclass(frozen=True)
class Entry:
    """Of the legend: a `swatch` [SWATCH, w, 3], maybe 0 wide, and a text; `first` in a line, or where it fits."""

    swatch: Picture
    text: str
    first: bool = False

    @property
    def indent(self) -> int:
        """Where the text begins."""
        return self.swatch.shape[1] + 5 if self.swatch.shape[1] else 0

    @property
    def width(self) -> int:
        """With the space after it."""
        return self.indent + round(len(self.text) * LETTER) + 18


def _legend(contract: Contract, style: Style, samples: Sequence[Shown]) -> Iterator[Entry]:
    """What the colours of each modality mean, a line each; then the classes and stripes."""
    heights = np.broadcast_to(np.linspace(0, 1, RAMP), (SWATCH, RAMP))
    ramp = terrain(heights, np.ones(heights.shape, np.bool_), (0.0, 1.0), steep=np.inf)  # of flat ground
    for modality in contract.modalities:
        swatch = ramp if modality.sensor in style.limits else ramp[:, :0]
        yield Entry(swatch, style.describe(modality), first=True)
    if any(len(lines) > 2 for shown in samples for lines in shown.notes.values()):
        yield Entry(
            ramp[:, :0], f"shift: rows down and columns right of where {contract.sensors[0]} has the same", True
        )
    yield Entry(hatch(SWATCH, SWATCH), "no measurement, or no label", first=True)
    if any(shown.sample.instances is not None for shown in samples):
        yield Entry(np.full((SWATCH, SWATCH, 3), OUTLINE, np.float32), "outlines of polygons")
    if _labelled(samples) and contract.classes is not None:
        for number, name in enumerate(contract.classes.names):
            yield Entry(coloured(np.full((SWATCH, SWATCH), number), contract.classes), name)


def _flow(entries: Sequence[Entry], width: int) -> Iterator[tuple[int, int]]:
    """Where each entry stands: x, and the line."""
    x = line = 0
    for number, entry in enumerate(entries):
        if number and (entry.first or x + entry.width > width):
            x, line = 0, line + 1
        yield x, line
        x += entry.width
