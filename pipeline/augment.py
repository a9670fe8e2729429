"""Augmentation: crops, flips and quarter turns, chosen per sample by its position, alike for all its modalities.

Land has no up in a nadir image, so all eight symmetries of the square are natural; on a tile that is not square the
four that keep its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import Training
from pipeline.model import cmss
from pipeline.model.keyed import hash64
from shards.contract import ContractError
from shards.order import Use

ROWS, COLS = 1, 2  # what a number of a crop is for


@dataclass(frozen=True)
class Augmentation:
    """What is done to every sample: a square crop of `crop` pixels, then a flip or turn, both keyed by `seed`."""

    seed: int = 0
    turn: bool = False
    crop: int | None = None


def augmentation(config: Training) -> Augmentation:
    """What a training config asks for."""
    return Augmentation(config.seed, config.augment, config.crop)


def augment(batch: Batch, how: Augmentation) -> Batch:
    """Crop, turn and flip every sample, its validity and its label alike; keyed by (seed, position).

    Raises:
        ContractError: the crop is larger than the samples.
    """
    height, width = next(iter(batch.valid.values())).shape[1:]
    if how.crop is not None and (height, width) != (how.crop, how.crop):
        corners = _corners(batch.positions, how, height, width)
        batch = _mapped(batch, lambda image, i: _cut(image, *corners[i], how.crop or 0))
        height = width = how.crop
    if how.turn:
        bits = hash64(how.seed, batch.positions, int(Use.AUGMENT)) & (7 if height == width else 6)
        codes = bits.tolist()
        batch = _mapped(batch, lambda image, i: symmetry(image, codes[i]))
    return batch


def _corners(positions: Tensor, how: Augmentation, height: int, width: int) -> list[tuple[int, int]]:
    """First row and column of each sample's crop."""
    size = how.crop or 0
    if size > min(height, width):
        raise ContractError(
            f"crop: {size} pixels of samples of {height} x {width}; choose at most {min(height, width)}"
        )
    words = [hash64(how.seed, positions, int(Use.AUGMENT), which) >> 1 & (2**62 - 1) for which in (ROWS, COLS)]
    return list(zip(*((w % (n - size + 1)).tolist() for w, n in zip(words, (height, width), strict=True)), strict=True))


def _cut(image: Tensor, row: int, col: int, size: int) -> Tensor:
    return image[..., row : row + size, col : col + size]


def _mapped(batch: Batch, change: Callable[[Tensor, int], Tensor]) -> Batch:
    """The batch with `change(image, number in the batch)` done to every image."""

    def each(images: Tensor) -> Tensor:
        return torch.stack([change(image, i) for i, image in enumerate(images)])

    return replace(
        batch,
        values={name: each(tensor) for name, tensor in batch.values.items()},
        valid={name: each(tensor) for name, tensor in batch.valid.items()},
        label=None if batch.label is None else each(batch.label),
    )


def drop_modality(batch: Batch, seed: int, probability: float) -> dict[str, Tensor] | None:
    """Which samples are to be seen without which modality, bool [B] by modality, keyed by (seed, position)."""
    if not probability:
        return None
    there = {name: valid.flatten(1).any(1) for name, valid in batch.valid.items()}
    return cmss.drop(there, batch.positions, seed, probability)


def symmetry(image: Tensor, code: int) -> Tensor:
    """One of eight: bit 0 transposes the last two axes, bit 1 flips rows, bit 2 flips columns."""
    image = image.transpose(-1, -2) if code & 1 else image
    return image.flip([axis for axis, bit in ((-2, 2), (-1, 4)) if code & bit])
