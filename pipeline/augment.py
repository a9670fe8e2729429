"""Augmentation: crops, flips and quarter turns, chosen per sample by its position, alike for all its modalities.

Land has no up in a nadir image, so all eight symmetries of the square are natural; on a tile that is not square the
four that keep its shape; for a side-looking radar only the mirror image (`CODES`). Everything here is a view of the
sample's arrays: pixels move once, when they are normalised into their batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from numpy.typing import NDArray

from pipeline.config import Training
from shards.contract import ContractError
from shards.order import Use, hash64
from shards.sample import Sample

ROWS, COLS = 1, 2  # what a number of a crop is for
# Bits of `symmetry` that may be set. A side-looking radar sees every wall from one side and throws shadows to the
# other: turned or flipped along its line of sight, an image is one that it never takes. SpaceNet 6 was flown from east
# to west, and `batch.upright` turns what was seen from the other side, so that its line of sight is the columns' one
# way; a mirror from left to right keeps it.
CODES: Mapping[str, int] = MappingProxyType({"none": 0, "mirror": 4, "all": 7})

Image = NDArray[Any]


@dataclass(frozen=True)
class Augmentation:
    """What is done to every sample: a square crop of `crop` pixels, then a flip or turn, both keyed by `seed`."""

    seed: int = 0
    turn: Literal["none", "mirror", "all"] = "none"
    crop: int | None = None


def augmentation(config: Training) -> Augmentation:
    """What a training config asks for."""
    return Augmentation(config.seed, config.augment, config.crop)


def augment(sample: Sample, position: int, how: Augmentation) -> Sample:
    """Crop, turn and flip a sample's tiles, their validity, label and instances alike; keyed by (seed, position).

    Raises:
        ContractError: the crop is larger than the sample.
    """
    height, width = next(iter(sample.tiles.values())).valid.shape
    if how.crop is not None and (height, width) != (how.crop, how.crop):
        size = how.crop
        row, col = _corner(position, how.seed, size, height, width)
        sample = changed(sample, lambda image: image[..., row : row + size, col : col + size])
        height = width = size
    if how.turn != "none":
        code = int(hash64(how.seed, position, Use.AUGMENT)) & CODES[how.turn] & (7 if height == width else 6)
        sample = changed(sample, lambda image: symmetry(image, code))
    return sample


def _corner(position: int, seed: int, size: int, height: int, width: int) -> tuple[int, int]:
    """First row and column of a sample's crop."""
    if size > min(height, width):
        raise ContractError(
            f"crop: {size} pixels of samples of {height} x {width}; choose at most {min(height, width)}"
        )
    words = [int(hash64(seed, position, Use.AUGMENT, which)) >> 1 & (2**62 - 1) for which in (ROWS, COLS)]
    return words[0] % (height - size + 1), words[1] % (width - size + 1)


def changed(sample: Sample, change: Callable[[Image], Image]) -> Sample:
    """The sample with the same change done to every array of it."""
    tiles = {
        name: replace(tile, values=change(tile.values), valid=change(tile.valid)) for name, tile in sample.tiles.items()
    }
    label, instances = (None if plane is None else change(plane) for plane in (sample.label, sample.instances))
    return replace(sample, tiles=tiles, label=label, instances=instances)


def symmetry(image: Image, code: int) -> Image:
    """One of eight: bit 0 transposes the last two axes, bit 1 flips rows, bit 2 flips columns."""
    image = image.swapaxes(-1, -2) if code & 1 else image
    return image[..., :: -1 if code & 2 else 1, :: -1 if code & 4 else 1]
