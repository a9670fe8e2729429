"""Flips and quarter turns: the symmetries of the square, chosen per sample by its position.

Land has no up in a nadir image, so all eight are natural; on a tile that is not square the four that keep its shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.model.keyed import hash64
from shards.order import Use


def augment(batch: Batch, seed: int) -> Batch:
    """Turn and flip every sample, its validity and its label alike; keyed by (seed, position)."""
    height, width = next(iter(batch.valid.values())).shape[1:]
    bits = hash64(seed, batch.positions, int(Use.AUGMENT)) & (7 if height == width else 6)
    codes = [int(code) for code in bits]
    return replace(
        batch,
        values={name: _each(tensor, codes) for name, tensor in batch.values.items()},
        valid={name: _each(tensor, codes) for name, tensor in batch.valid.items()},
        label=None if batch.label is None else _each(batch.label, codes),
    )


def _each(tensor: Tensor, codes: list[int]) -> Tensor:
    return torch.stack([symmetry(item, code) for item, code in zip(tensor, codes, strict=True)])


def symmetry(image: Tensor, code: int) -> Tensor:
    """One of eight: bit 0 transposes the last two axes, bit 1 flips rows, bit 2 flips columns."""
    image = image.transpose(-1, -2) if code & 1 else image
    return image.flip([axis for axis, bit in ((-2, 2), (-1, 4)) if code & bit])
