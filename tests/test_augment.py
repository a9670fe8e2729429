from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.augment import Augmentation, augment, symmetry
from pipeline.batch import Batch


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
    turned = augment(batch(64, 8, 8), Augmentation(1, True))
    assert turned.label is not None
    assert torch.equal(turned.values["a"][:, 0].long(), turned.label)
    assert torch.equal(turned.values["b"][:, 1].long(), -turned.label)
    assert torch.equal(turned.valid["a"], turned.label % 3 > 0)
    assert torch.equal(turned.valid["b"], turned.label % 5 > 0)
    assert len({tuple(item.flatten().tolist()) for item in turned.label}) == 8


def test_oblong_samples_keep_their_shape() -> None:
    turned = augment(batch(64, 4, 6), Augmentation(1, True))
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
        augment(one, Augmentation(3, True)).values["b"], augment(whole, Augmentation(3, True)).values["b"][5:6]
    )
    assert not torch.equal(
        augment(whole, Augmentation(3, True)).values["b"], augment(whole, Augmentation(4, True)).values["b"]
    )


def test_without_label() -> None:
    assert augment(replace(batch(2, 4, 4), label=None), Augmentation(0, True)).label is None
