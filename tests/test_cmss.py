"""CMSS: the masks' promises for any number of modalities and any block, what is dropped, and the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.model import cmss, keyed
from shards import order

ratios = st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 1 - 1e-6])
sides = st.sampled_from([4, 8, 32])  # of a block
sizes = st.integers(4, 70)  # of an image
both_targets = pytest.mark.parametrize("target", ["contract", "block"])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
modalities = st.integers(1, 5)
seeds = st.integers(0, 2**62)


def some_presence(count: int, seed: int, rows: int = 4, columns: int = 3, batch: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed % 2**31)
    return {f"m{i}": torch.rand(batch, rows, columns, generator=g) < 0.7 for i in range(count)}


def some_valid(count: int, seed: int, height: int, width: int) -> dict[str, Tensor]:
    """Valid patches of 4 pixels with invalid pixels, from none to all, so that blocks are full, empty and between."""
    g = torch.Generator().manual_seed(seed % 2**31)
    share = torch.rand(3, count, 1, 1, generator=g) * 1.4 - 0.2
    patches = torch.rand(3, count, -(-height // 4), -(-width // 4), generator=g) < share
    valid = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
    valid = valid & (torch.rand(valid.shape, generator=g) < 0.9)
    return {f"m{i}": valid[:, i] for i in range(count)}


def anything(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.flatten(1).any(1) for name, mask in masks.items()}


def stack(masks: dict[str, Tensor]) -> Tensor:
    return torch.stack([mask.reshape(len(mask), -1) for mask in masks.values()], -1)  # [B, blocks, modalities]


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
        for i, j in itertools.combinations(range(count), 2):
            pair = [b for b, row in enumerate(there[sample]) if row.nonzero().flatten().tolist() == [i, j]]
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


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 4), height=sizes, width=sizes, block=sides, ratio=ratios, seed=seeds)
def test_a_dropped_modality(count: int, height: int, width: int, block: int, ratio: float, seed: int) -> None:
    """It is hidden whole, and every block with k >= 2 is still hidden somewhere and visible somewhere."""
    valid, positions = some_valid(count, seed, height, width), torch.tensor([3, 0, 2**40])
    present, some = cmss.presence(valid, block), anything(valid)
    dropped = cmss.drop(some, positions, seed, 1.0)
    lost = torch.stack(list(dropped.values()), 1)  # [B, modalities]
    assert lost.sum(1).tolist() == [int(n >= 2) for n in torch.stack(list(some.values())).sum(0)]
    assert not any((dropped[name] & ~some[name]).any() for name in some)
    blocks = cmss.hide(present, positions, seed, ratio, dropped=dropped)
    there, hidden, lost = stack(present), stack(blocks), lost[:, None]
    k = there.sum(-1)
    assert not (hidden & ~there).any() and torch.equal(hidden & lost, there & lost)
    assert (hidden.sum(-1)[k >= 2] >= 1).all() and (hidden.sum(-1) < k)[k >= 2].all()
    assert count == 1 or not (hidden & ~lost)[k == 1].any()
    tokens, plain = (stack(cmss.hidden_tokens(blocks, valid, given, block)) for given in (dropped, None))
    assert torch.equal(tokens, plain | lost), "also where it does not count as present"


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 4), ratio=ratios, seed=seeds, strategy=st.sampled_from(["complementary", "independent"]))
def test_the_rest_is_as_if_it_were_not_there(count: int, ratio: float, seed: int, strategy: cmss.Strategy) -> None:
    present = some_presence(count, seed)
    lost = torch.tensor([True, False, False])
    gone = {**present, "m1": present["m1"] & ~lost[:, None, None]}
    hidden, rest, plain = (
        cmss.hide(masks, torch.arange(3), seed, ratio, strategy, dropped)
        for masks, dropped in ((present, {"m1": lost}), (gone, None), (present, None))
    )
    assert all(torch.equal(hidden[name], rest[name]) for name in present if name != "m1")
    assert torch.equal(hidden["m1"][0], present["m1"][0]), "hidden whole"
    assert torch.equal(stack(hidden)[1:], stack(plain)[1:]), "nothing changes for those who lose nothing"


@pytest.mark.parametrize("there", ["abc", "ab", "bc", "c", ""])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_how_often_a_modality_is_dropped(there: str, probability: float) -> None:
    positions = torch.arange(20_000) + 14_190_368  # the first draws exactly 0, which a probability of 0 must not drop
    some = {name: torch.full((20_000,), name in there) for name in "abc"}
    dropped = torch.stack(list(cmss.drop(some, positions, 7, probability).values())).double()
    exactly = probability if len(there) >= 2 else 0.0
    fair = [exactly / len(there) if name in there else 0.0 for name in "abc"]
    assert dropped.mean(1).tolist() == pytest.approx(fair, abs=0.015), "each as likely"
    number, slack = dropped.sum(0), 0.01 if 0 < exactly < 1 else 0
    assert float(number.max()) <= 1 and float(number.mean()) == pytest.approx(exactly, abs=slack)


@devices
def test_drop_against_numpy(device: str) -> None:
    """By the numpy hash, so the same bits on every device."""
    seed, positions, use = 2**62 + 1, np.arange(-500, 500), order.Use.MODALITY_DROP
    some = np.random.default_rng(0).random((1000, 3)) < 0.7
    there = dict(zip("abc", torch.from_numpy(some).to(device).unbind(1), strict=True))
    dropped = cmss.drop(there, torch.from_numpy(positions).to(device), seed, 0.6)
    keys = order.hash64(seed, positions[:, None], use, np.arange(1, 4)).view(np.int64)
    chosen = np.where(some, keys, np.iinfo(np.int64).max).argmin(1)
    loses = ((order.hash64(seed, positions, use) >> np.uint64(40)) / 2**24 < 0.6) & (some.sum(1) >= 2)
    assert [mask.tolist() for mask in dropped.values()] == [(loses & (chosen == i)).tolist() for i in range(3)]


@devices
def test_digest_against_numpy(device: str) -> None:
    blocks = {name: mask.to(device) for name, mask in some_presence(3, 1, 5, 7).items()}
    words = order.hash64(np.arange(3)[:, None, None], np.arange(5)[:, None], np.arange(7))
    where = torch.stack(list(blocks.values()), 1).cpu().numpy()
    expected = order.hash64((words * where).sum((1, 2, 3))).view(np.int64)
    assert cmss.digest(blocks).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 5), seed=seeds, data=st.data())
def test_digest_sees_every_block_and_the_order(count: int, seed: int, data: st.DataObject) -> None:
    blocks = some_presence(count, seed)
    before = cmss.digest(blocks)
    assert torch.equal(before, cmss.digest({name.upper(): mask.clone() for name, mask in blocks.items()}))
    b, y, x = (data.draw(st.integers(0, size - 1)) for size in (3, 4, 3))
    blocks["m0"][b, y, x] ^= True
    assert (cmss.digest(blocks) != before).tolist() == [index == b for index in range(3)], "that sample and no other"
    blocks["m0"] = ~blocks["m1"]
    swapped = {**blocks, "m0": blocks["m1"], "m1": blocks["m0"]}
    assert (cmss.digest(blocks) != cmss.digest(swapped)).all()


@settings(max_examples=30, deadline=None)
@given(count=modalities, ratio=ratios, seed=seeds)
def test_independent_hides_the_ratio_of_each(count: int, ratio: float, seed: int) -> None:
    present = some_presence(count, seed)
    hidden = cmss.hide(present, torch.arange(3), seed, ratio, "independent")
    for name, there in present.items():
        assert hidden[name].sum((1, 2)).tolist() == [math.ceil(ratio * n) for n in there.sum((1, 2)).tolist()]


@pytest.mark.parametrize(("count", "ratio"), [(3, 0.5), (4, 0.6), (5, 0.3), (3, 0.9), (4, 1e-6), (4, 1 - 1e-6)])
def test_three_or_more_hide_the_ratio_on_average(count: int, ratio: float) -> None:
    present = {f"m{i}": torch.ones(64, 8, 8, dtype=torch.bool) for i in range(count)}
    hidden = stack(cmss.hide(present, torch.arange(64), 3, ratio)).float()
    number = hidden.sum(-1)
    allowed = {float(np.clip(math.floor(ratio * count) + more, 1, count - 1)) for more in (0, 1)}
    assert set(number.unique().tolist()) <= allowed
    fair = np.mean([np.clip(math.floor(ratio * count + u), 1, count - 1) for u in np.linspace(0, 1, 1000, False)])
    assert float(number.mean()) == pytest.approx(fair, abs=0.03)
    assert hidden.mean((0, 1)).tolist() == pytest.approx([fair / count] * count, abs=0.03), "no modality is favoured"


@both_targets
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_sample_does_not_depend_on_its_batch(count: int, target: cmss.Target) -> None:
    """Every step, to the last bit; sums of float32 to the last digits."""
    valid, g = some_valid(count, 5, 37, 50), torch.Generator().manual_seed(0)
    images = {name: torch.randn(3, 2, 37, 50, generator=g) for name in valid}
    recon = torch.randn(3, 2 * count, 37, 50, generator=g)

    def steps(at: slice) -> tuple[Tensor, Tensor]:
        mine, pictures = ({name: tensor[at] for name, tensor in all_.items()} for all_ in (valid, images))
        positions = torch.tensor([4, 5, 2**33])[at]
        dropped = cmss.drop(anything(mine), positions, 1, 0.5)
        blocks = cmss.hide(cmss.presence(mine, 8), positions, 1, 0.5, dropped=dropped)
        tokens = cmss.hidden_tokens(blocks, mine, dropped, 8)
        exact = torch.cat([stack(masks).flatten(1).long() for masks in (dropped, blocks, tokens)], 1)
        loss, _ = cmss.loss(recon[at], pictures, blocks, mine, target=target, block=8)
        return torch.cat([exact, cmss.digest(blocks)[:, None]], 1), loss

    whole, alone = steps(slice(0, 3)), [steps(slice(i, i + 1)) for i in range(3)]
    assert torch.equal(whole[0], torch.cat([exact for exact, _ in alone]))
    torch.testing.assert_close(whole[1], torch.cat([loss for _, loss in alone]), rtol=1e-5, atol=0)


def test_seeds_and_positions_change_the_masks() -> None:
    present = {name: torch.ones(2, 8, 8, dtype=torch.bool) for name in ("a", "b")}
    first = cmss.hide(present, torch.tensor([0, 1]), 1, 0.5)["a"]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, cmss.hide(present, torch.tensor([0, 1]), 2, 0.5)["a"])


def test_presence_is_half_of_the_pixels_inside_the_image() -> None:
    valid = torch.zeros(1, 64, 72, dtype=torch.bool)
    valid[:, :16, :32] = True  # exactly half of the first block
    valid[:, :15, 32:64] = True  # a row less
    valid[:, 32:48, 64:] = True  # the blocks at the edge are 8 pixels wide
    assert cmss.presence({"a": valid})["a"].tolist() == [[[True, False, False], [False, False, True]]]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(4, 100), width=st.integers(4, 100), block=sides, seed=seeds)
def test_tokens_against_pixels(height: int, width: int, block: int, seed: int) -> None:
    """A token is hidden exactly if its block is, or if not one of its pixels is valid; half of a block is present."""
    g = torch.Generator().manual_seed(seed % 2**31)
    valid = some_valid(1, seed, height, width)["m0"][:1]
    cut = [rows.split(block, 1) for rows in valid[0].split(block)]
    present = [[2 * int(piece.sum()) >= piece.numel() for piece in row] for row in cut]
    assert cmss.presence({"a": valid}, block)["a"].tolist() == [present]
    blocks = torch.rand(1, -(-height // block), -(-width // block), generator=g) < 0.5
    tokens = cmss.hidden_tokens({"a": blocks}, {"a": valid, "b": valid}, block=block)
    assert tokens["a"].shape == (1, -(-height // 4), -(-width // 4))
    for row in range(tokens["a"].shape[1]):
        for column in range(tokens["a"].shape[2]):
            empty = not valid[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].any()
            assert bool(tokens["b"][0, row, column]) == empty
            hidden = bool(blocks[0, 4 * row // block, 4 * column // block])
            assert bool(tokens["a"][0, row, column]) == (empty or hidden)


def loss_by_hand(
    recon: Tensor, wanted: Tensor, blocks: Tensor, counted: Tensor, block: int = 32, pixels: int | None = None
) -> NDArray[np.float64]:
    height, width = counted.shape[1:]
    hidden = np.kron(blocks, np.ones((1, block, block)))[:, :height, :width] * counted.numpy()
    squares = (recon - wanted).square().double().mean(1).numpy() * hidden
    return squares.sum((1, 2)) / (pixels or hidden.sum((1, 2)).clip(1))


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
        assert part.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert total.tolist() == pytest.approx((parts["a"] + 0.25 * parts["b"]).tolist())
    assert total[2] == 0
    total.mean().backward()
    assert recon.grad is not None and bool(recon.grad.isfinite().all()) and bool((recon.grad[2] == 0).all())


@both_targets
def test_invalid_pixels_cannot_reach_the_loss(target: cmss.Target) -> None:
    """Whatever stands there, NaN in the image and infinity in the reconstruction; nor the gradient."""
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[0, 3, 4] = False
    image, recon = torch.arange(1.0, 1025).view(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    image[0, 0, 3, 4], recon[0, 0, 3, 4] = math.nan, math.inf
    blocks = {"a": torch.ones(1, 1, 1, dtype=torch.bool)}
    loss, _ = cmss.loss(recon.requires_grad_(), {"a": image}, blocks, {"a": valid}, target=target)
    loss.sum().backward()
    assert bool(loss.isfinite()) and recon.grad is not None and bool(recon.grad.isfinite().all())
    assert torch.equal(recon.grad[:, 0] != 0, valid)


@both_targets
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_sample_without_a_valid_pixel(count: int, target: cmss.Target) -> None:
    """Nothing is seen, the loss is exactly 0 and moves nothing; the sample beside it goes on."""
    valid = {f"m{i}": torch.tensor([False, True])[:, None, None].expand(2, 20, 36) for i in range(count)}
    g = torch.Generator().manual_seed(count)
    images = {name: torch.randn(2, 2, 20, 36, generator=g) for name in valid}
    recon = torch.randn(2, 2 * count, 20, 36, generator=g, requires_grad=True)
    dropped = cmss.drop(anything(valid), torch.arange(2), 0, 1.0)
    blocks = cmss.hide(cmss.presence(valid, 8), torch.arange(2), 0, 0.5, dropped=dropped)
    tokens = stack(cmss.hidden_tokens(blocks, valid, dropped, 8))
    assert tokens[0].all() and not tokens[1].all() and not stack(blocks)[0].any() and not stack(dropped)[0].any()
    total, _ = cmss.loss(recon, images, blocks, valid, target=target, block=8)
    total.sum().backward()
    assert total[0] == 0 and total[1] > 0 and recon.grad is not None
    assert bool(recon.grad.isfinite().all()) and bool((recon.grad[0] == 0).all()) and bool((recon.grad[1] != 0).any())


def targets_by_hand(image: Tensor, counted: Tensor, block: int) -> NDArray[np.float64]:
    result = np.zeros(image.shape)
    starts = [range(0, size, block) for size in image.shape[2:]]
    for b, band, y, x in itertools.product(*map(range, image.shape[:2]), *starts):
        here = (b, slice(y, y + block), slice(x, x + block))
        values, chosen = image.double().numpy()[:, band][here], counted.numpy()[here]
        if chosen.any():
            scaled = (values - values[chosen].mean()) / np.sqrt(values[chosen].var() + 1e-6)
            result[:, band][here] = np.where(chosen, scaled, 0)
    return result


@settings(max_examples=25, deadline=None)
@given(height=sizes, width=sizes, block=sides, seed=seeds, profile=st.sampled_from(["default", "paper"]))
def test_targets_of_blocks(height: int, width: int, block: int, seed: int, profile: cmss.Profile) -> None:
    """Against numpy, block by block; numbers whose sums are exact, so that a flat block is flat in float32 too."""
    g, valid = torch.Generator().manual_seed(seed % 2**31), some_valid(1, seed, height, width)["m0"]
    image, recon = torch.randint(-8, 9, (2, 3, 2, height, width), generator=g).float()
    image[0, 0], image[1, 0] = 5, image[1, 0] / 8192  # flat, and almost
    counted = valid | (profile == "paper")
    wanted = cmss.targets({"a": image}, {"a": valid}, "block", block, profile)["a"]
    np.testing.assert_allclose(wanted, targets_by_hand(image, counted, block), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cmss.targets({"a": image.bfloat16()}, {"a": valid})["a"], image, rtol=0, atol=0)
    blocks = torch.rand(3, -(-height // block), -(-width // block), generator=g) < 0.5
    loss, _ = cmss.loss(recon, {"a": image}, {"a": blocks}, {"a": valid}, None, profile, "block", block)
    expected = loss_by_hand(recon, wanted, blocks, counted, block, height * width if profile == "paper" else None)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


ONES = {"a": torch.ones(1, 16, 16, dtype=torch.bool)}
IMAGE, LOST = {"a": torch.ones(1, 1, 16, 16)}, {"s2": torch.tensor([True])}
hide = partial(cmss.hide, ONES, torch.arange(1), 0, ratio=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda block=block: cmss.presence(ONES, block), f"block: {block} pixels") for block in (-4, 0, 2, 6)),
        (lambda: cmss.hidden_tokens({}, ONES, block=6), "block: 6 pixels"),
        (lambda: cmss.targets(IMAGE, ONES, block=6), "block: 6 pixels"),
        (lambda: cmss.loss(IMAGE["a"], IMAGE, ONES, ONES, block=6), "block: 6 pixels"),
        (lambda: cmss.hidden_tokens(ONES, ONES, block=8), r"blocks: \[16, 16\] given where the image has \[2, 2\]"),
        (lambda: cmss.loss(IMAGE["a"], IMAGE, ONES, ONES), r"blocks: \[16, 16\] given where the image has \[1, 1\]"),
        (lambda: cmss.targets(IMAGE, ONES, "patch"), "'patch' is not one of contract, block"),  # type: ignore[arg-type]
        *((lambda p=p: cmss.drop(ONES, torch.arange(1), 0, p), f"{p} is outside") for p in (-0.1, 1.1, math.nan)),
        *((lambda r=r: hide(ratio=r), rf"ratio: {r} is outside \(0, 1\)") for r in (0.0, 1.0, -0.1, 1.5, math.nan)),
        (lambda: hide(strategy="comp"), "'comp' is not one of complementary, independent"),
        (lambda: hide(dropped=LOST), "dropped: no modality s2; there are a"),
        (lambda: cmss.loss(IMAGE["a"].expand(1, 3, 16, 16), IMAGE, ONES, ONES), "3 channels, the images"),
        (lambda: cmss.hidden_tokens({}, ONES, LOST), "dropped: no modality s2; there are a"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


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
    assert (cmss.USE_MASK, cmss.USE_RATIO, cmss.USE_DROP) == (order.Use.MASK, order.Use.RATIO, order.Use.MODALITY_DROP)
