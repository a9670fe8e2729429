from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import augment as module
from pipeline.augment import Augmentation
from pipeline.batch import Batch
from shards.contract import ContractError
from shards.sample import Sample, Tile


def augment(batch: Batch, how: Augmentation) -> Batch:
    """Every sample of a batch augmented, stacked again."""
    found = []
    for i, position in enumerate(batch.positions.tolist()):
        tiles = {n: Tile(v[i].numpy(), batch.valid[n][i].numpy()) for n, v in batch.values.items()}
        sample = Sample(str(position), tiles, None if batch.label is None else batch.label[i].numpy())
        found.append(module.augment(sample, position, how))

    def stack(arrays: Iterable[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(arrays)))

    return replace(
        batch,
        values={name: stack(sample.tiles[name].values for sample in found) for name in batch.values},
        valid={name: stack(sample.tiles[name].valid for sample in found) for name in batch.valid},
        label=None if batch.label is None else stack(sample.label for sample in found),
    )


def symmetry(image: torch.Tensor, code: int) -> torch.Tensor:
    return torch.from_numpy(module.symmetry(image.numpy(), code).copy())


def batch(count: int, height: int, width: int) -> Batch:
    """Every pixel of every array holds its own number, the same in values and label."""
    numbers = torch.arange(height * width).reshape(height, width).expand(count, height, width).clone()
    return Batch(
        {"a": numbers[:, None].float(), "b": torch.cat([numbers[:, None], -numbers[:, None]], 1).float()},
        {"a": numbers % 3 > 0, "b": numbers % 5 > 0},
        numbers,
        torch.arange(count),
        [str(i) for i in range(count)],
    )


def test_symmetries_are_the_eight_of_the_square() -> None:
    image = torch.arange(9).reshape(3, 3)
    found = {tuple(symmetry(image, code).flatten().tolist()) for code in range(8)}
    assert len(found) == 8
    assert torch.equal(symmetry(image, 0), image)
    quarter_turns = {tuple(torch.rot90(image, k).flatten().tolist()) for k in range(4)}
    assert quarter_turns < found


def test_everything_of_a_sample_turns_alike() -> None:
    turned = augment(batch(64, 8, 8), Augmentation(1, "all"))
    assert turned.label is not None
    assert torch.equal(turned.values["a"][:, 0].long(), turned.label)
    assert torch.equal(turned.values["b"][:, 1].long(), -turned.label)
    assert torch.equal(turned.valid["a"], turned.label % 3 > 0)
    assert torch.equal(turned.valid["b"], turned.label % 5 > 0)
    assert len({tuple(item.flatten().tolist()) for item in turned.label}) == 8


def test_oblong_samples_keep_their_shape() -> None:
    turned = augment(batch(64, 4, 6), Augmentation(1, "all"))
    assert turned.label is not None and turned.label.shape == (64, 4, 6)
    assert len({tuple(item.flatten().tolist()) for item in turned.label}) == 4


def test_keyed_by_seed_and_position_not_by_place_in_the_batch() -> None:
    whole = batch(16, 8, 8)
    assert whole.label is not None
    one = replace(
        whole,
        values={name: tensor[5:6] for name, tensor in whole.values.items()},
        valid={name: tensor[5:6] for name, tensor in whole.valid.items()},
        label=whole.label[5:6],
        positions=whole.positions[5:6],
        keys=["5"],
    )
    assert torch.equal(
        augment(one, Augmentation(3, "all")).values["b"], augment(whole, Augmentation(3, "all")).values["b"][5:6]
    )
    assert not torch.equal(
        augment(whole, Augmentation(3, "all")).values["b"], augment(whole, Augmentation(4, "all")).values["b"]
    )


def test_without_label() -> None:
    assert augment(replace(batch(2, 4, 4), label=None), Augmentation(0, "all")).label is None


def corner(image: torch.Tensor, width: int) -> tuple[int, int]:
    """Row and column of the first pixel of a crop of `batch`, whose pixels hold their own numbers."""
    return divmod(int(image[0, 0]), width)


def test_crops_cut_values_validity_and_label_alike() -> None:
    cut = augment(batch(500, 9, 12), Augmentation(1, crop=4))
    assert cut.label is not None and cut.label.shape == (500, 4, 4)
    assert torch.equal(cut.values["a"][:, 0].long(), cut.label)
    assert torch.equal(cut.values["b"][:, 0].long(), cut.label) and cut.values["b"].shape == (500, 2, 4, 4)
    assert torch.equal(cut.valid["a"], cut.label % 3 > 0) and torch.equal(cut.valid["b"], cut.label % 5 > 0)
    corners = [corner(image, 12) for image in cut.label]
    assert set(corners) == {(row, col) for row in range(6) for col in range(9)}  # all places, each whole
    for image, (row, col) in zip(cut.label, corners, strict=True):
        assert torch.equal(image, (torch.arange(row, row + 4)[:, None] * 12 + torch.arange(col, col + 4)))


def test_crops_are_keyed_by_seed_and_position_not_by_place_in_the_batch() -> None:
    whole = batch(32, 16, 16)
    assert whole.label is not None
    order = torch.arange(31, -1, -1)
    turned = replace(
        whole,
        values={name: tensor[order] for name, tensor in whole.values.items()},
        valid={name: tensor[order] for name, tensor in whole.valid.items()},
        label=whole.label[order],
        positions=whole.positions[order],
    )
    for how in (Augmentation(3, "none", 5), Augmentation(3, "all", 5)):
        one, two = augment(whole, how), augment(turned, how)
        assert torch.equal(one.values["b"][order], two.values["b"])
        assert torch.equal(one.valid["a"][order], two.valid["a"])
    elsewhere = augment(replace(whole, positions=whole.positions + 1000), Augmentation(3, crop=5))
    otherwise = augment(whole, Augmentation(4, crop=5))
    for other in (elsewhere, otherwise):
        assert not torch.equal(augment(whole, Augmentation(3, crop=5)).values["a"], other.values["a"])


def test_a_crop_is_taken_then_turned() -> None:
    both = augment(batch(64, 8, 6), Augmentation(2, "all", 6))
    cut = augment(batch(64, 8, 6), Augmentation(2, crop=6))
    assert both.label is not None and cut.label is not None
    found = set()
    for turned, plain in zip(both.label, cut.label, strict=True):
        (code,) = (code for code in range(8) if torch.equal(symmetry(plain, code), turned))
        found.add(code)
    assert found == set(range(8))  # the crop is square though the samples are not


def test_a_crop_of_the_whole_changes_nothing_and_a_larger_one_is_refused() -> None:
    whole = batch(3, 6, 6)
    assert torch.equal(augment(whole, Augmentation(1, crop=6)).values["b"], whole.values["b"])
    for shape in ((6, 9), (9, 6), (6, 6)):
        with pytest.raises(ContractError, match=r"crop: 7 pixels of samples of \d x \d; choose at most 6"):
            augment(batch(2, *shape), Augmentation(1, crop=7))


def test_crops_without_label() -> None:
    found = augment(replace(batch(2, 8, 8), label=None), Augmentation(0, "all", 4))
    assert found.label is None and found.values["a"].shape == (2, 1, 4, 4)
