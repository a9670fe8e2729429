"""Samples made small enough for a contact sheet: only what is shown, with its text.

Letters in the comments: C bands shown; h, w pixels of the sheet's picture before it is enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.contract import Contract, Modality
from shards.sample import Sample, Tile
from shards.sensors import SENSORS

CELL = 160  # pixels of the sheet along a side of a picture, about


@dataclass(frozen=True)
class Shown:
    """A sample made small: only the bands that are shown, and its text.

    `tiles` float32 [C, h, w]; `lines` of text above all pictures; `notes` by modality, lines of text under it.
    """

    sample: Sample
    lines: tuple[str, str]
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def shrink(sample: Sample, contract: Contract, row: Mapping[str, Any]) -> Shown:
    """What the sheet needs of a sample, in little memory.

    Args:
        sample: as read.
        contract: of the dataset.
        row: its row of the manifest: `group`, `split`, `cloud`, and by sensor `times` and `shift`.
    """
    step = _step(max(sample_shape(sample)))
    tiles = {name: _small(tile, bands_shown(contract.modality(name)), step) for name, tile in sample.tiles.items()}
    middles = tuple(slice(step // 2, step * (side // step), step) for side in sample_shape(sample))
    label = None if sample.label is None else sample.label[middles]
    instances = None if sample.instances is None else sample.instances[middles]
    notes = {name: _notes(name, tile, row) for name, tile in sample.tiles.items()}
    return Shown(Sample(sample.key, tiles, label, {}, instances), (sample.key, _facts(row)), notes)


def sample_shape(sample: Sample) -> tuple[int, ...]:
    """Height and width."""
    return next(iter(sample.tiles.values())).valid.shape


def _step(side: int) -> int:
    """Pixels of a tile per pixel of the sheet, along a side."""
    return 1 if side <= 1.5 * CELL else round(side / CELL)


def _small(tile: Tile, bands: Sequence[int], step: int) -> Tile:
    """Means over the valid pixels of squares of `step` pixels; a square is valid where half of it is."""
    height, width = (max(1, side // step) for side in tile.valid.shape)
    valid = tile.valid[: height * step, : width * step]
    values = np.where(valid, tile.values[list(bands), : height * step, : width * step], 0).astype(np.float32)
    squares = (height, step, width, step)
    count = valid.reshape(squares).sum((1, 3))  # [h, w]
    sums = values.reshape(len(values), *squares).sum((2, 4))  # [C, h, w]
    return Tile((sums / np.maximum(count, 1)).astype(np.float32), 2 * count >= step * step)


def bands_shown(modality: Modality) -> list[int]:
    """Indices of the bands of its colour picture; the first band where there is none."""
    return [modality.bands.index(band) for band in SENSORS[modality.sensor].rgb if band in modality.bands] or [0]


def _facts(row: Mapping[str, Any]) -> str:
    parts = [row.get("split") or "no split", f"group {row['group']}" if row.get("group") else ""]
    parts += ["" if row.get("cloud") is None else f"cloud {100 * row['cloud']:.0f} %"]
    return " \N{MIDDLE DOT} ".join(part for part in parts if part)


def _notes(name: str, tile: Tile, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines of text under a picture: date, valid fraction, and the shift in rows and columns, where they are known."""
    if not tile.valid.any():
        return ("absent",)
    time = (row.get("times") or {}).get(name)
    # Rounded down, so that 100 % means all of them.
    lines = [f"{time:%Y-%m-%d}" if time else "", f"valid {math.floor(1000 * tile.fraction) / 10:g} %"]
    shift = (row.get("shift") or {}).get(name)
    lines.append(f"shift {shift[0]:+z.1f}, {shift[1]:+z.1f} px" if shift else "")  # z: no "-0.0"
    return tuple(line for line in lines if line)
