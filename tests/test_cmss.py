"""CMSS: the masks' promises for any number of modalities, and the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.model import cmss, keyed
from shards import order

ratios = st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.9])
modalities = st.integers(1, 5)
seeds = st.integers(0, 2**62)


def some_presence(count: int, seed: int, rows: int = 4, columns: int = 3, batch: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed % 2**31)
    return {f"m{i}": torch.rand(batch, rows, columns, generator=g) < 0.7 for i in range(count)}


def stack(masks: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(masks.values()), -1).flatten(1, 2)  # [B, blocks, modalities]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 5), ratio=ratios, seed=seeds)
def test_a_block_is_hidden_somewhere_and_visible_somewhere(count: int, ratio: float, seed: int) -> None:
    present = some_presence(count, seed)
    there = stack(present)
    hidden = stack(cmss.hide(present, torch.tensor([0, 7, 2**40]), seed, ratio))
    k = there.sum(-1)
    assert not (hidden & ~there).any(), "hidden only where there is something"
    assert not hidden[k < 2].any(), "what only one modality shows stays visible"
    assert (hidden.sum(-1)[k >= 2] >= 1).all() and (hidden.sum(-1) < k)[k >= 2].all()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 4), ratio=ratios, seed=seeds)
def test_pairs_share_the_ratio_exactly(count: int, ratio: float, seed: int) -> None:
    present = some_presence(count, seed)
    there = stack(present)
    hidden = stack(cmss.hide(present, torch.arange(3), seed, ratio))
    for sample in range(3):
        for i in range(count):
            for j in range(i + 1, count):
                pair = [
                    b for b in range(there.shape[1])
                    if there[sample, b].nonzero().flatten().tolist() == [i, j]
                ]  # fmt: skip
                assert int(hidden[sample, pair, i].sum()) == math.ceil(ratio * len(pair))
                assert int(hidden[sample, pair, j].sum()) == len(pair) - math.ceil(ratio * len(pair))


@settings(max_examples=30, deadline=None)
@given(ratio=ratios, seed=seeds)
def test_one_modality_is_plain_masking(ratio: float, seed: int) -> None:
    present = some_presence(1, seed)
    hidden = cmss.hide(present, torch.arange(3), seed, ratio)["m0"]
    n = present["m0"].sum((1, 2)).tolist()
    assert hidden.sum((1, 2)).tolist() == [math.ceil(ratio * count) for count in n]
    assert not (hidden & ~present["m0"]).any()


@settings(max_examples=30, deadline=None)
@given(count=modalities, ratio=ratios, seed=seeds)
def test_independent_hides_the_ratio_of_each(count: int, ratio: float, seed: int) -> None:
    present = some_presence(count, seed)
    hidden = cmss.hide(present, torch.arange(3), seed, ratio, "independent")
    for name, there in present.items():
        assert hidden[name].sum((1, 2)).tolist() == [math.ceil(ratio * n) for n in there.sum((1, 2)).tolist()]


@pytest.mark.parametrize(("count", "ratio"), [(3, 0.5), (4, 0.6), (5, 0.3), (3, 0.9)])
def test_three_or_more_hide_the_ratio_on_average(count: int, ratio: float) -> None:
    present = {f"m{i}": torch.ones(64, 8, 8, dtype=torch.bool) for i in range(count)}
    hidden = stack(cmss.hide(present, torch.arange(64), 3, ratio)).float()
    number = hidden.sum(-1)
    assert set(number.unique().tolist()) <= {
        float(np.clip(value, 1, count - 1)) for value in (math.floor(ratio * count), math.floor(ratio * count) + 1)
    }
    fair = np.mean([np.clip(math.floor(ratio * count + u), 1, count - 1) for u in np.linspace(0, 1, 1000, False)])
    assert float(number.mean()) == pytest.approx(fair, abs=0.03)
    assert hidden.mean((0, 1)).tolist() == pytest.approx([fair / count] * count, abs=0.03), "no modality is favoured"


def test_a_sample_does_not_depend_on_its_batch() -> None:
    present = some_presence(3, 5)
    whole = cmss.hide(present, torch.tensor([4, 5, 6]), 1, 0.5)
    for index, position in enumerate((4, 5, 6)):
        alone = {name: mask[index : index + 1] for name, mask in present.items()}
        single = cmss.hide(alone, torch.tensor([position]), 1, 0.5)
        assert all(torch.equal(single[name][0], whole[name][index]) for name in whole)


def test_seeds_and_positions_change_the_masks() -> None:
    present = {name: torch.ones(2, 8, 8, dtype=torch.bool) for name in ("a", "b")}
    first = cmss.hide(present, torch.tensor([0, 1]), 1, 0.5)["a"]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, cmss.hide(present, torch.tensor([0, 1]), 2, 0.5)["a"])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_ratio_outside_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio: .* is outside \(0, 1\)"):
        cmss.hide(some_presence(2, 0), torch.arange(3), 0, ratio)


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="'comp' is not one of complementary, independent"):
        cmss.hide(some_presence(2, 0), torch.arange(3), 0, 0.5, "comp")  # type: ignore[arg-type]


def test_presence_is_half_of_the_pixels_inside_the_image() -> None:
    valid = torch.zeros(1, 64, 72, dtype=torch.bool)
    valid[:, :16, :32] = True  # exactly half of the first block
    valid[:, :15, 32:64] = True  # a row less
    valid[:, 32:48, 64:] = True  # the blocks at the edge are 8 pixels wide
    assert cmss.presence({"a": valid})["a"].tolist() == [[[True, False, False], [False, False, True]]]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(4, 100), width=st.integers(4, 100), seed=seeds)
def test_tokens_against_pixels(height: int, width: int, seed: int) -> None:
    """A token is hidden exactly if its block is, or if not one of its pixels is valid."""
    g = torch.Generator().manual_seed(seed % 2**31)
    valid = torch.rand(1, height, width, generator=g) < 0.15
    blocks = torch.rand(1, -(-height // 32), -(-width // 32), generator=g) < 0.5
    tokens = cmss.hidden_tokens({"a": blocks}, {"a": valid, "b": valid})
    assert tokens["a"].shape == (1, -(-height // 4), -(-width // 4))
    for row in range(tokens["a"].shape[1]):
        for column in range(tokens["a"].shape[2]):
            empty = not valid[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].any()
            assert bool(tokens["b"][0, row, column]) == empty
            assert bool(tokens["a"][0, row, column]) == (empty or bool(blocks[0, row // 8, column // 8]))


def loss_by_hand(recon: Tensor, image: Tensor, blocks: Tensor, valid: Tensor) -> list[float]:
    result = []
    for b in range(image.shape[0]):
        errors = [
            float((recon[b, :, y, x] - image[b, :, y, x]).square().mean())
            for y in range(image.shape[2])
            for x in range(image.shape[3])
            if blocks[b, y // 32, x // 32] and valid[b, y, x]
        ]
        result.append(sum(errors) / len(errors) if errors else 0.0)
    return result


def test_loss_is_a_mean_over_hidden_valid_pixels_per_sample() -> None:
    g = torch.Generator().manual_seed(0)
    images = {"a": torch.randn(3, 3, 40, 36, generator=g), "b": torch.randn(3, 1, 40, 36, generator=g)}
    valid = {name: torch.rand(3, 40, 36, generator=g) < 0.7 for name in images}
    valid["a"][2], valid["b"][2] = False, False  # nothing there: loss 0, not NaN
    blocks = {name: torch.rand(3, 2, 2, generator=g) < 0.5 for name in images}
    recon = torch.randn(3, 4, 40, 36, generator=g, requires_grad=True)
    total, parts = cmss.loss(recon, images, blocks, valid, weights={"b": 0.25})
    pieces = {"a": recon[:, :3], "b": recon[:, 3:]}
    for name, part in parts.items():
        expected = loss_by_hand(pieces[name].detach(), images[name], blocks[name], valid[name])
        assert part.tolist() == pytest.approx(expected, rel=1e-5)
    assert total.tolist() == pytest.approx((parts["a"] + 0.25 * parts["b"]).tolist())
    assert total[2] == 0
    total.mean().backward()
    assert recon.grad is not None and bool(recon.grad.isfinite().all()) and bool((recon.grad[2] == 0).all())


def test_invalid_pixels_cannot_reach_the_loss() -> None:
    images = {"a": torch.zeros(1, 1, 32, 32)}
    valid = {"a": torch.ones(1, 32, 32, dtype=torch.bool)}
    valid["a"][0, 3, 4] = False
    recon = torch.zeros(1, 1, 32, 32)
    recon[0, 0, 3, 4] = math.inf
    blocks = {"a": torch.ones(1, 1, 1, dtype=torch.bool)}
    assert cmss.loss(recon, images, blocks, valid)[0].tolist() == [0.0]


def test_wrong_number_of_channels_is_refused() -> None:
    image = torch.zeros(1, 2, 32, 32)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="3 channels, the images"):
        cmss.loss(torch.zeros(1, 3, 32, 32), {"a": image}, {"a": mask}, {"a": image[:, 0].bool()})


words = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=100, deadline=None)
@given(seed=words, positions=st.lists(words, min_size=1, max_size=5), use=st.integers(0, 20))
def test_keyed_numbers_are_those_of_the_stream(seed: int, positions: list[int], use: int) -> None:
    """The same bits as the numpy hash that orders the samples."""
    mine = keyed.hash64(seed, torch.tensor(positions), use).numpy().view(np.uint64)
    theirs = order.hash64(seed, np.array(positions, dtype=np.int64), use)
    assert mine.tolist() == theirs.tolist()
    u = keyed.uniform(seed, torch.tensor(positions), use)
    assert u.tolist() == [(word >> 40) / 2**24 for word in theirs.tolist()]


def test_keyed_numbers_are_uniform() -> None:
    u = keyed.uniform(1, torch.arange(100_000), 2)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.histc(u, 10, 0, 1).tolist() == pytest.approx([10_000] * 10, abs=400)


def test_hash_of_known_words() -> None:
    """splitmix64 seeded with 0 begins with these numbers (Vigna's reference implementation)."""
    assert int(keyed.hash64(0)) & (2**64 - 1) == 0xE220A8397B1DCDAF
    assert int(keyed.hash64(0x9E3779B97F4A7C15)) & (2**64 - 1) == 0x6E789E6AA1B965F4


def test_narrow_words_are_refused() -> None:
    with pytest.raises(TypeError, match=r"int64 tensors, got torch.int32"):
        keyed.hash64(1, torch.zeros(2, dtype=torch.int32))


def test_uses_agree_with_the_stream() -> None:
    assert (cmss.USE_MASK, cmss.USE_RATIO) == (order.Use.MASK, order.Use.RATIO)
