"""Batch: samples as normalised tensors. Letters: B batch, C bands, H W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.contract import Contract, ContractError, Modality
from shards.sample import Sample, Tile

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Batch:
    """Samples of one size, by modality.

    Attributes:
        values: float32 [B, C, H, W], normalised by the contract, 0 where invalid.
        valid: bool [B, H, W].
        label: int64 [B, H, W], the contract's `ignore` where unlabelled; None when a sample has no label.
        positions: int64 [B], the samples' positions in the order of training: the key of all randomness.
        keys: names of the samples.
    """

    values: dict[str, Tensor]
    valid: dict[str, Tensor]
    label: Tensor | None
    positions: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.values.items()},
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.valid.items()},
            None if self.label is None else self.label.to(device, non_blocking=True),
            self.positions.to(device),
            self.keys,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(
            self,
            values={name: tensor.pin_memory() for name, tensor in self.values.items()},
            valid={name: tensor.pin_memory() for name, tensor in self.valid.items()},
            label=None if self.label is None else self.label.pin_memory(),
        )


def collate(items: Sequence[tuple[Sample, int]], contract: Contract) -> Batch:
    """Stack and normalise (sample, position) pairs for the modalities of `contract`, each turned as its facts say.

    Raises:
        ContractError: samples of different sizes, or one that lacks a modality (absent data is a tile without a valid
            pixel, never a missing name).
    """
    samples = [upright(sample) for sample, _ in items]
    for sample in samples:
        if missing := [name for name in contract.sensors if name not in sample.tiles]:
            raise ContractError(f"sample {sample.key} has no {', '.join(missing)}; it has {', '.join(sample.tiles)}")
    first = contract.sensors[0]
    sizes = {sample.tiles[first].valid.shape for sample in samples}
    if len(sizes) != 1:
        raise ContractError(
            f"samples of several sizes in one batch: {sorted(sizes)}; build the shards with one tile size"
        )
    labels = [sample.label for sample in samples if sample.label is not None]
    whole = len(labels) == len(samples)
    return Batch(
        {m.sensor: _stack([normalise(s.tiles[m.sensor], m) for s in samples]) for m in contract.modalities},
        {name: _stack([s.tiles[name].valid for s in samples]) for name in contract.sensors},
        _stack([label.astype(np.int64) for label in labels]) if whole else None,
        torch.tensor([position for _, position in items], dtype=torch.int64),
        [sample.key for sample in samples],
    )


def upright(sample: Sample) -> Sample:
    """The sample, turned by 180 degrees where its fact `orientation` is 1.

    A side-looking radar casts shadows away from itself. Turned, scenes from both sides look alike; in the shards they
    lie as their georeference says.
    """
    if sample.meta.get("orientation") != 1:
        return sample
    tiles = {
        name: replace(tile, values=_half_turn(tile.values), valid=_half_turn(tile.valid))
        for name, tile in sample.tiles.items()
    }
    label = None if sample.label is None else _half_turn(sample.label)
    instances = None if sample.instances is None else _half_turn(sample.instances)
    return replace(sample, tiles=tiles, label=label, instances=instances)


def _half_turn(image: NDArray[T]) -> NDArray[T]:
    return image[..., ::-1, ::-1]


def normalise(tile: Tile, modality: Modality) -> NDArray[np.float32]:
    """(clip(value) - offset) / scale per band, float32 [C, H, W]; exactly 0 where invalid, whatever stands there."""
    low, high = modality.clip
    offset = np.asarray(modality.offset, np.float32)[:, None, None]
    scale = np.asarray(modality.scale, np.float32)[:, None, None]
    values = np.where(tile.valid, tile.values, low).astype(np.float32)
    normal = (np.clip(values, low, high) - offset) / scale
    return np.where(tile.valid, normal, np.float32(0))


def _stack(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
