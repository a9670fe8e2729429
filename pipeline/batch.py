"""Batch: samples as normalised tensors. Letters: B batch, C bands, H W pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import Augmentation, augment, changed
from pipeline.model import cmss
from shards.contract import Contract, ContractError, Modality
from shards.sample import Empty, Sample, Tile

PLAIN = Augmentation()


@dataclass(frozen=True)
class Batch:
    """Samples of one size, by modality.

    Attributes:
        values: float32 [B, C, H, W], normalised by the contract, 0 where invalid.
        valid: bool [B, H, W].
        label: int64 [B, H, W], the contract's `ignore` where unlabelled; None when a sample has no label.
        positions: int64 [B], the samples' positions in the order of training: the key of all randomness.
        keys: names of the samples.
        instances: int32 [B, H, W], the number of each pixel's polygon, 0 outside; None when a sample has none.
        facts: what each sample's record says of it.
    """

    values: dict[str, Tensor]
    valid: dict[str, Tensor]
    label: Tensor | None
    positions: Tensor
    keys: list[str]
    instances: Tensor | None = None
    facts: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; instances, which no network sees, stay where they are."""
        return replace(
            self,
            values={name: tensor.to(device, non_blocking=True) for name, tensor in self.values.items()},
            valid={name: tensor.to(device, non_blocking=True) for name, tensor in self.valid.items()},
            label=None if self.label is None else self.label.to(device, non_blocking=True),
            positions=self.positions.to(device),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(
            self,
            values={name: tensor.pin_memory() for name, tensor in self.values.items()},
            valid={name: tensor.pin_memory() for name, tensor in self.valid.items()},
            label=None if self.label is None else self.label.pin_memory(),
        )


def collate(
    items: Sequence[tuple[Sample, int]],
    contract: Contract,
    how: Augmentation = PLAIN,
    empty: Empty = np.empty,
    each: Callable[..., Iterable[object]] = map,
) -> Batch:
    """Augment, normalise and stack (sample, position) pairs for the modalities of `contract`.

    Args:
        items: samples, each of which is turned as its facts say before it is augmented.
        contract: how to normalise which modalities.
        how: augmentation.
        empty: gives the memory of the batch.
        each: `map`, or that of a pool of threads, over the samples to normalise.

    Raises:
        ContractError: samples of different sizes, or one that lacks a modality (absent data is a tile without a valid
            pixel, never a missing name); a crop larger than they are.
    """
    for sample, _ in items:
        if missing := [name for name in contract.sensors if name not in sample.tiles]:
            raise ContractError(f"sample {sample.key} has no {', '.join(missing)}; it has {', '.join(sample.tiles)}")
    samples = [augment(upright(sample), position, how) for sample, position in items]
    first = contract.sensors[0]
    sizes = {sample.tiles[first].valid.shape for sample in samples}
    if len(sizes) != 1:
        raise ContractError(
            f"samples of several sizes in one batch: {sorted(sizes)}; build the shards with one tile size"
        )
    labels = [sample.label for sample in samples if sample.label is not None]
    instances = [sample.instances for sample in samples if sample.instances is not None]
    return Batch(
        {m.sensor: _normalised([s.tiles[m.sensor] for s in samples], m, empty, each) for m in contract.modalities},
        {name: torch.from_numpy(np.stack([s.tiles[name].valid for s in samples])) for name in contract.sensors},
        torch.from_numpy(np.stack(labels).astype(np.int64)) if len(labels) == len(samples) else None,
        torch.tensor([position for _, position in items], dtype=torch.int64),
        [sample.key for sample in samples],
        torch.from_numpy(np.stack(instances).astype(np.int32)) if len(instances) == len(samples) else None,
        [sample.meta for sample in samples],
    )


def upright(sample: Sample) -> Sample:
    """The sample, turned by 180 degrees where its fact `orientation` is 1.

    A side-looking radar casts shadows away from itself. Turned, scenes from both sides look alike; in the shards they
    lie as their georeference says.
    """
    if sample.meta.get("orientation") != 1:
        return sample
    return changed(sample, lambda image: image[..., ::-1, ::-1])


def normalise(tile: Tile, modality: Modality, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """(clip(value) - offset) / scale per band, float32 [C, H, W]; exactly 0 where invalid, whatever stands there.

    Written into `out` where it is given: a batch is made in one piece of memory, which the pixels enter once.
    """
    normal = np.empty(tile.values.shape, np.float32) if out is None else out
    with np.errstate(all="ignore"):  # of what stands where nothing is valid
        np.copyto(normal, tile.values, casting="unsafe")
        np.clip(normal, *modality.clip, out=normal)
        normal -= np.asarray(modality.offset, np.float32)[:, None, None]
        normal /= np.asarray(modality.scale, np.float32)[:, None, None]
    np.copyto(normal, 0, where=~tile.valid)
    return normal


def _normalised(
    tiles: Sequence[Tile], modality: Modality, empty: Empty, each: Callable[..., Iterable[object]]
) -> Tensor:
    """[B, C, H, W]."""
    stacked = empty((len(tiles), *tiles[0].values.shape), np.dtype(np.float32))
    for _ in each(normalise, tiles, [modality] * len(tiles), stacked):
        pass
    return torch.from_numpy(stacked)


def drop_modality(batch: Batch, seed: int, probability: float) -> dict[str, Tensor] | None:
    """Which samples are to be seen without which modality, bool [B] by modality, keyed by (seed, position)."""
    if not probability:
        return None
    there = {name: valid.flatten(1).any(1) for name, valid in batch.valid.items()}
    return cmss.drop(there, batch.positions, seed, probability)
