"""Complementary masked self-supervision (CMSS): what is hidden from whom, and the loss on what was hidden.

Letters: B batch, H W pixels, h = ceil(H / 4) and w = ceil(W / 4) tokens, b pixels of a block's side, Y = ceil(H
/ b) and X = ceil(W / b) blocks, P = Y X, M bands of a modality, N modalities, k of them present in a block.

The network must reconstruct each modality where it is hidden, from its own surroundings and from the other
modalities. Blocks of b x b pixels are the unit, 32 x 32 in the paper: hidden in one modality, a block is visible
in another (Liu et al. 2025, JAG 145:104960, section 3.3). Masks are True where hidden.

Real data have holes, so the rule looks at what is there. Modality m is *present* in a block if at least half
of the block's pixels in the image are valid. Then, with everything decided by (seed, position of the sample)
alone:

    k = 0    nothing is there: ignored
    k = 1    visible, and so not scored
    k = 2    of the sample's n blocks with the same pair (i, j), ceil(ratio n) hide i and the others hide j,
             which is the paper's rule when all pixels are valid
    k >= 3   floor(ratio k + u) of them are hidden, u uniform in [0, 1), at least 1 and at most k - 1

so every block with k >= 2 is hidden in at least one modality and visible in at least one. A model with a
single modality, and the strategy "independent" with any number, hide ceil(ratio n) of each modality's n
present blocks.

A sample may also lose one of its modalities whole (`drop`), as real samples do. That one is hidden wherever it is
present, and the rule is applied to the others as if it were not there. The promise for k >= 2 holds as before; with
k = 1, the block of a dropped modality is hidden and scored. Of two modalities, the one that stays is visible
everywhere ("independent" aside).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.keyed import hash64, uniform

TOKEN = 4
BLOCK = 32
USE_MASK, USE_RATIO, USE_DROP = 1, 2, 4  # `Use.MASK`, `.RATIO` and `.MODALITY_DROP` of shards/order.py
VARIANCE_FLOOR = 1e-6  # added to a block's variance, as in MAE: a flat block has no scale of its own
Strategy = Literal["complementary", "independent"]
Profile = Literal["paper", "default"]
Target = Literal["contract", "block"]


def presence(valid: Mapping[str, Tensor], block: int = BLOCK) -> dict[str, Tensor]:
    """Where each modality has something to show: valid bool [B, H, W] -> bool [B, Y, X].

    A block at the edge counts only its pixels inside the image.

    Args:
        valid: by modality.
        block: side of a block in pixels, a multiple of 4.

    Raises:
        ValueError: `block` is not a positive multiple of 4.
    """
    _check_block(block)
    return {name: _blocks_of(mask, block) for name, mask in valid.items()}


def _check_block(block: int) -> None:
    if block < TOKEN or block % TOKEN:
        raise ValueError(
            f"block: {block} pixels given; a block is whole tokens, so {TOKEN}, {2 * TOKEN}, ... {BLOCK}, ..."
        )


def _blocks_of(valid: Tensor, block: int) -> Tensor:
    counts, pixels = _pool(valid, block), _pool(torch.ones_like(valid[:1]), block)  # [B, Y, X], [1, Y, X]
    return torch.ge(counts * 2, pixels)


def _pool(mask: Tensor, size: int) -> Tensor:
    """Count True in cells of size x size pixels: [B, H, W] -> int64 [B, ceil(H / size), ceil(W / size)]."""
    return _cells(mask, size).sum((2, 4))


def _cells(image: Tensor, size: int) -> Tensor:
    """Cells of size x size pixels: [..., H, W] -> [..., ceil(H / size), size, ceil(W / size), size], 0 outside."""
    padded = F.pad(image, (0, -image.shape[-1] % size, 0, -image.shape[-2] % size))
    *leading, height, width = padded.shape
    return padded.view(*leading, height // size, size, width // size, size)


def drop(there: Mapping[str, Tensor], positions: Tensor, seed: int, probability: float) -> dict[str, Tensor]:
    """Choose the samples that lose a modality, and which: one of those that are there, each as likely.

    A sample with fewer than two modalities loses none. After ModDrop (Neverova et al. 2016, TPAMI 38:1692), where
    each modality is lost for itself; here at most one is, so that something is always left.

    Args:
        there: bool [B] by modality, whether the sample has anything of it; their order decides who is chosen.
        positions: int64 [B], the samples' positions in the order of training.
        seed: of the run.
        probability: of losing one, in [0, 1].

    Returns:
        bool [B] by modality, for `hide` and `hidden_tokens`; the same bits on every device.

    Raises:
        ValueError: probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: {probability} is outside [0, 1]; 0 drops nothing")
    some = torch.stack(list(there.values()), 1)  # [B, N]
    modality = torch.arange(1, len(there) + 1, device=some.device)
    keys = hash64(seed, positions[:, None], USE_DROP, modality)  # [B, N]
    loses = (uniform(seed, positions, USE_DROP).double() < probability) & (some.sum(1) >= 2)  # [B]
    chosen = some & (_rank(keys, some, 1) == 0) & loses[:, None]
    return dict(zip(there, chosen.unbind(1), strict=True))


def hide(
    present: Mapping[str, Tensor],
    positions: Tensor,
    seed: int,
    ratio: float,
    strategy: Strategy = "complementary",
    dropped: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Choose the hidden blocks by the rule in this module's text.

    Args:
        present: from `presence`, bool [B, Y, X] by modality; their order decides which of a pair comes first.
        positions: int64 [B], the samples' positions in the order of training.
        seed: of the run.
        ratio: share hidden, in (0, 1); of two modalities the first is hidden in this share, the second in the
            rest.
        strategy: "complementary", or "independent": every modality for itself.
        dropped: from `drop`, bool [B] by modality, what a sample loses whole; None, or a modality that is left out,
            loses nothing.

    Returns:
        bool [B, Y, X] by modality, True only where the modality is present.

    Raises:
        ValueError: ratio outside (0, 1), an unknown strategy, or `dropped` names a modality that `present` does not.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} is outside (0, 1); 0.5 is the paper's")
    if strategy not in ("complementary", "independent"):
        raise ValueError(f"strategy: {strategy!r} is not one of complementary, independent")
    shape = next(iter(present.values())).shape
    there = torch.stack([mask.flatten(1) for mask in present.values()], 2)  # [B, P, N]
    lost = torch.stack(list(_by_name(dropped, present).values()), 1)[:, None]  # [B, 1, N]
    hidden = _rule(there & ~lost, positions, seed, ratio, strategy) | (there & lost)
    return {name: hidden[..., index].reshape(shape) for index, name in enumerate(present)}


def _by_name(dropped: Mapping[str, Tensor] | None, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is dropped, bool [B], for every name in `masks` [B, ...]: nothing where it is not said."""
    dropped = dropped or {}
    if unknown := [name for name in dropped if name not in masks]:
        raise ValueError(f"dropped: no modality {', '.join(unknown)}; there are {', '.join(masks)}")
    return {name: dropped.get(name, mask.new_zeros(len(mask))) for name, mask in masks.items()}


def _rule(there: Tensor, positions: Tensor, seed: int, ratio: float, strategy: Strategy) -> Tensor:
    """The rule in this module's text: there [B, P, N], positions [B] -> hidden [B, P, N]."""
    block = torch.arange(there.shape[1], device=there.device)  # [P]
    modality = torch.arange(1, there.shape[2] + 1, device=there.device)
    keys = hash64(seed, positions[:, None, None], USE_MASK, block[:, None], modality)  # [B, P, N]
    if strategy == "independent" or there.shape[2] == 1:
        return _share(keys, there, ratio, dim=1)
    key = hash64(seed, positions[:, None], USE_MASK, block)  # [B, P]
    u = uniform(seed, positions[:, None], USE_RATIO, block)  # [B, P]
    return _pairs(key, there, ratio) | _several(keys, there, ratio, u)


def _rank(keys: Tensor, among: Tensor, dim: int) -> Tensor:
    """Place of each entry in ascending order of the keys, along `dim`, those in `among` first."""
    last = torch.iinfo(torch.int64).max
    return keys.masked_fill(~among, last).argsort(stable=True, dim=dim).argsort(dim)


def _share(keys: Tensor, among: Tensor, ratio: float, dim: int) -> Tensor:
    """The ceil(ratio n) of the n entries in `among` that come first by their keys."""
    count = (among.sum(dim, keepdim=True).double() * ratio).ceil()
    return among & (_rank(keys, among, dim) < count)


def _pairs(key: Tensor, there: Tensor, ratio: float) -> Tensor:
    """Blocks with two modalities: key [B, P], there [B, P, N] -> hidden [B, P, N]."""
    hidden = torch.zeros_like(there)
    two = there.sum(2) == 2
    for first, second in itertools.combinations(range(there.shape[2]), 2):
        pair = two & there[..., first] & there[..., second]  # [B, P]
        hides_first = _share(key, pair, ratio, dim=1)
        hidden[..., first] |= hides_first
        hidden[..., second] |= pair & ~hides_first
    return hidden


def _several(keys: Tensor, there: Tensor, ratio: float, u: Tensor) -> Tensor:
    """Blocks with three or more: keys and there [B, P, N], u [B, P] -> hidden [B, P, N]."""
    k = there.sum(2)  # [B, P]
    count = (k.double() * ratio + u.double()).floor().long()
    count = torch.minimum(count.clamp(min=1), k - 1)
    return there & (_rank(keys, there, 2) < count[..., None]) & (k >= 3)[..., None]


def hidden_tokens(
    blocks: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    dropped: Mapping[str, Tensor] | None = None,
    block: int = BLOCK,
) -> dict[str, Tensor]:
    """What the network must not see: tokens of hidden blocks or dropped modalities, and those without a valid pixel.

    Args:
        blocks: from `hide`, bool [B, Y, X] by modality; a modality that is left out hides nothing.
        valid: bool [B, H, W] by modality.
        dropped: as given to `hide`, bool [B] by modality. It hides also what counts as not present: the few valid
            pixels of a block are visible unless the block is hidden, and those of a dropped modality must not be.
        block: side of a block in pixels, a multiple of 4.

    Returns:
        bool [B, h, w] for every modality in `valid`.

    Raises:
        ValueError: `block` is not a positive multiple of 4, `blocks` are of another size, or `dropped` names a
            modality that `valid` does not.
    """
    _check_block(block)
    lost = _by_name(dropped, valid)
    return {name: _tokens(blocks.get(name), mask, block) | lost[name][:, None, None] for name, mask in valid.items()}


def _tokens(blocks: Tensor | None, valid: Tensor, block: int) -> Tensor:
    empty = _pool(valid, TOKEN) == 0  # [B, h, w]
    return empty if blocks is None else empty | _enlarge(blocks, block // TOKEN, empty.shape)


def _enlarge(blocks: Tensor, factor: int, shape: torch.Size) -> Tensor:
    """Every block as factor x factor cells, cut to the rows and columns of `shape` [B, rows, columns]."""
    expected = [-(-size // factor) for size in shape[1:]]
    if list(blocks.shape[1:]) != expected:
        raise ValueError(
            f"blocks: {list(blocks.shape[1:])} given where the image has {expected}; hidden with another size of block?"
        )
    return blocks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : shape[1], : shape[2]]


def digest(blocks: Mapping[str, Tensor]) -> Tensor:
    """One number per sample for all that is hidden in it, to compare two runs: bool [B, Y, X] by modality -> int64 [B].

    Any block that differs changes it, and so does the modalities' order; their names do not count. It is a sum of
    keyed hashes modulo 2^64, so neither the order of summation nor the device changes a bit.
    """
    hidden = torch.stack(list(blocks.values()), 1)  # [B, N, Y, X]
    modality, row, column = (torch.arange(size, device=hidden.device) for size in hidden.shape[1:])
    words = hash64(modality[:, None, None], row[:, None], column)  # [N, Y, X]
    return hash64((words * hidden).sum((1, 2, 3)))


def targets(
    images: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    target: Target = "contract",
    block: int = BLOCK,
    profile: Profile = "default",
) -> dict[str, Tensor]:
    """What is to be reconstructed.

    "contract" is the images as they are, normalised by the contract. "block" is (x - mean) / sqrt(variance + 1e-6)
    of each block and band by itself, after `norm_pix_loss` of MAE (He et al. 2022, CVPR, "Reconstruction target").
    Mean and variance are over the block's valid pixels inside the image, all pixels with `profile: paper`. The
    variance divides by their number n, not by n - 1, so that one pixel has one (0). MAE normalises the bands of a
    patch together; bands here are as far apart as VV and VH, or visible and infrared, so each has its own.

    Args:
        images: [B, M, H, W] by modality.
        valid: bool [B, H, W] by modality.
        target: "contract" or "block".
        block: side of a block in pixels, a multiple of 4.
        profile: "paper" does not ask what is valid.

    Returns:
        float32 [B, M, H, W] by modality. With "block", 0 where a pixel does not count, whatever stands there.

    Raises:
        ValueError: an unknown target, or `block` is not a positive multiple of 4.
    """
    _check_block(block)
    if target not in ("contract", "block"):
        raise ValueError(f"target: {target!r} is not one of contract, block")
    if target == "contract":
        return {name: image.float() for name, image in images.items()}
    every = profile == "paper"
    counted = {name: torch.ones_like(valid[name]) if every else valid[name] for name in images}
    return {name: _standardised(image.float(), counted[name], block) for name, image in images.items()}


def _standardised(image: Tensor, counted: Tensor, block: int) -> Tensor:
    """Each block and band by its own mean and deviation: [B, M, H, W] and bool [B, H, W] -> [B, M, H, W]."""
    mean, deviation = _scale(image, counted, block)
    return ((image - mean) / deviation).masked_fill(~counted[:, None], 0)


def _scale(image: Tensor, counted: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each block and band, at every pixel of it: both [B, M, H, W]."""
    ignored = ~_cells(counted, block)[:, None]  # [B, 1, Y, b, X, b], True also outside the image
    pixels = (~ignored).sum((3, 5), keepdim=True).clamp(min=1)

    def mean(x: Tensor) -> Tensor:  # of cells that are 0 where ignored; [B, M, Y, 1, X, 1]
        return x.sum((3, 5), keepdim=True) / pixels

    cells = _cells(image, block).masked_fill(ignored, 0)
    middle = mean(cells)
    variance = mean((cells - middle).masked_fill(ignored, 0).square())
    spread = [
        _enlarge(x[:, :, :, 0, :, 0].flatten(0, 1), block, image.flatten(0, 1).shape).view_as(image)
        for x in (middle, (variance + VARIANCE_FLOOR).sqrt())
    ]
    return spread[0], spread[1]


def restored(
    outputs: Mapping[str, Tensor],
    images: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    target: Target = "contract",
    block: int = BLOCK,
) -> dict[str, Tensor]:
    """Reconstructions in the contract's numbers, for pictures: the inverse of `targets` on [B, M, H, W] by modality.

    With the target "block" mean and deviation are those of the true block, which the network is not asked for.
    """
    if target == "contract":
        return dict(outputs)
    scales = {name: _scale(image.float(), valid[name], block) for name, image in images.items()}
    return {name: output * scales[name][1] + scales[name][0] for name, output in outputs.items()}


def loss(
    recon: Tensor,
    images: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
    profile: Profile = "default",
    target: Target = "contract",
    block: int = BLOCK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the reconstruction where it was hidden, per sample.

    A modality's part is the mean over bands and over the pixels that are hidden and valid, 0 where there are
    none. `profile: paper` divides by all pixels instead and does not ask whether they are valid.

    Args:
        recon: [B, sum of bands, H, W], the modalities in the order of `images`.
        images: [B, M, H, W] by modality.
        blocks: hidden blocks, bool [B, Y, X] by modality.
        valid: bool [B, H, W] by modality.
        weights: factor of each modality's part; 1 where it is not named.
        profile: which average.
        target: what of the images is to be reconstructed, see `targets`.
        block: side of a block in pixels, a multiple of 4.

    Returns:
        The weighted sum of the parts [B] and the unweighted parts [B] by modality, float32. The loss of a
        batch is the mean of the first.

    Raises:
        ValueError: the reconstruction has not as many channels as the images together, an unknown target, `block` is
            not a positive multiple of 4, or `blocks` are of another size.
    """
    bands = [image.shape[1] for image in images.values()]
    if recon.shape[1] != sum(bands):
        raise ValueError(f"the reconstruction has {recon.shape[1]} channels, the images {bands} in sum {sum(bands)}")
    wanted = targets(images, valid, target, block, profile)
    parts = {}
    for (name, image), predicted in zip(wanted.items(), torch.split_with_sizes(recon.float(), bands, 1), strict=True):
        counted = _enlarge(blocks[name], block, valid[name].shape)  # [B, H, W]
        if profile == "default":
            counted = counted & valid[name]
        parts[name] = _mean_square(predicted - image, counted, every_pixel=profile == "paper")
    total = sum((weights or {}).get(name, 1.0) * part for name, part in parts.items())
    return torch.as_tensor(total), parts


def _mean_square(error: Tensor, counted: Tensor, every_pixel: bool) -> Tensor:
    """Mean over the bands and the counted (or all) pixels of error^2 at the counted ones.

    Error [B, M, H, W], counted bool [B, H, W] -> [B].
    """
    # Masked before it is squared: the gradient of a square that is masked later is 0 times the error, NaN if infinite.
    squares = error.masked_fill(~counted[:, None], 0).square().sum((1, 2, 3))  # [B]
    pixels = counted[0].numel() if every_pixel else counted.sum((1, 2)).clamp(min=1)
    return squares / (pixels * error.shape[1])
