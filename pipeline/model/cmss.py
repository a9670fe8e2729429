"""Complementary masked self-supervision (CMSS): what is hidden from whom, and the loss on what was hidden.

Letters: B batch, H W pixels, h = ceil(H / 4) and w = ceil(W / 4) tokens, Y = ceil(H / 32) and X = ceil(W /
32) blocks, P = Y X, M bands of a modality, k modalities present in a block.

The network must reconstruct each modality where it is hidden, from its own surroundings and from the other
modalities. Blocks of 32 x 32 pixels are the unit: hidden in one modality, a block is visible in another (Liu
et al. 2025, JAG 145:104960, section 3.3). Masks are True where hidden.

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
USE_MASK, USE_RATIO = 1, 2  # `Use.MASK` and `Use.RATIO` of shards/order.py
Strategy = Literal["complementary", "independent"]
Profile = Literal["paper", "default"]


def presence(valid: Mapping[str, Tensor], block: int = BLOCK) -> dict[str, Tensor]:
    """Where each modality has something to show: valid bool [B, H, W] -> bool [B, Y, X].

    A block at the edge counts only its pixels inside the image.
    """
    return {name: _blocks_of(mask, block) for name, mask in valid.items()}


def _blocks_of(valid: Tensor, block: int) -> Tensor:
    counts, pixels = _pool(valid, block), _pool(torch.ones_like(valid[:1]), block)  # [B, Y, X], [1, Y, X]
    return torch.ge(counts * 2, pixels)


def _pool(mask: Tensor, size: int) -> Tensor:
    """Count True in cells of size x size pixels: [B, H, W] -> int64 [B, ceil(H / size), ceil(W / size)]."""
    padded = F.pad(mask, (0, -mask.shape[2] % size, 0, -mask.shape[1] % size))
    batch, height, width = padded.shape
    return padded.view(batch, height // size, size, width // size, size).sum((2, 4))


def hide(
    present: Mapping[str, Tensor],
    positions: Tensor,
    seed: int,
    ratio: float,
    strategy: Strategy = "complementary",
) -> dict[str, Tensor]:
    """Choose the hidden blocks by the rule in this module's text.

    Args:
        present: from `presence`, bool [B, Y, X] by modality; their order decides which of a pair comes first.
        positions: int64 [B], the samples' positions in the order of training.
        seed: of the run.
        ratio: share hidden, in (0, 1); of two modalities the first is hidden in this share, the second in the
            rest.
        strategy: "complementary", or "independent": every modality for itself.

    Returns:
        bool [B, Y, X] by modality, True only where the modality is present.

    Raises:
        ValueError: ratio outside (0, 1), or an unknown strategy.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} is outside (0, 1); 0.5 is the paper's")
    if strategy not in ("complementary", "independent"):
        raise ValueError(f"strategy: {strategy!r} is not one of complementary, independent")
    shape = next(iter(present.values())).shape
    there = torch.stack([mask.flatten(1) for mask in present.values()], 2)  # [B, P, modalities]
    block = torch.arange(there.shape[1], device=there.device)  # [P]
    key = hash64(seed, positions[:, None], USE_MASK, block)  # [B, P]
    modality = torch.arange(1, there.shape[2] + 1, device=there.device)
    keys = hash64(seed, positions[:, None, None], USE_MASK, block[:, None], modality)  # [B, P, modalities]
    if strategy == "independent" or len(present) == 1:
        hidden = _share(keys, there, ratio, dim=1)
    else:
        u = uniform(seed, positions[:, None], USE_RATIO, block)  # [B, P]
        hidden = _pairs(key, there, ratio) | _several(keys, there, ratio, u)
    return {name: hidden[..., index].reshape(shape) for index, name in enumerate(present)}


def _rank(keys: Tensor, among: Tensor, dim: int) -> Tensor:
    """Place of each entry in ascending order of the keys, along `dim`, those in `among` first."""
    last = torch.iinfo(torch.int64).max
    return keys.masked_fill(~among, last).argsort(stable=True, dim=dim).argsort(dim)


def _share(keys: Tensor, among: Tensor, ratio: float, dim: int) -> Tensor:
    """The ceil(ratio n) of the n entries in `among` that come first by their keys."""
    count = (among.sum(dim, keepdim=True).double() * ratio).ceil()
    return among & (_rank(keys, among, dim) < count)


def _pairs(key: Tensor, there: Tensor, ratio: float) -> Tensor:
    """Blocks with two modalities: key [B, P], there [B, P, modalities] -> hidden [B, P, modalities]."""
    hidden = torch.zeros_like(there)
    two = there.sum(2) == 2
    for first, second in itertools.combinations(range(there.shape[2]), 2):
        pair = two & there[..., first] & there[..., second]  # [B, P]
        hides_first = _share(key, pair, ratio, dim=1)
        hidden[..., first] |= hides_first
        hidden[..., second] |= pair & ~hides_first
    return hidden


def _several(keys: Tensor, there: Tensor, ratio: float, u: Tensor) -> Tensor:
    """Blocks with three or more: keys and there [B, P, modalities], u [B, P] -> hidden [B, P, modalities]."""
    k = there.sum(2)  # [B, P]
    count = (k.double() * ratio + u.double()).floor().long()
    count = torch.minimum(count.clamp(min=1), k - 1)
    return there & (_rank(keys, there, 2) < count[..., None]) & (k >= 3)[..., None]


def hidden_tokens(blocks: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the network must not see: tokens of hidden blocks and tokens without a valid pixel.

    Args:
        blocks: from `hide`, bool [B, Y, X] by modality; a modality that is left out hides nothing.
        valid: bool [B, H, W] by modality.

    Returns:
        bool [B, h, w] for every modality in `valid`.
    """
    return {name: _tokens(blocks.get(name), mask) for name, mask in valid.items()}


def _tokens(blocks: Tensor | None, valid: Tensor) -> Tensor:
    empty = _pool(valid, TOKEN) == 0  # [B, h, w]
    return empty if blocks is None else empty | _enlarge(blocks, BLOCK // TOKEN, empty.shape)


def _enlarge(blocks: Tensor, factor: int, shape: torch.Size) -> Tensor:
    """Every block as factor x factor cells, cut to the rows and columns of `shape`."""
    return blocks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : shape[1], : shape[2]]


def loss(
    recon: Tensor,
    images: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
    profile: Profile = "default",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the reconstruction where it was hidden, per sample.

    A modality's part is the mean over bands and over the pixels that are hidden and valid, 0 where there are
    none. `profile: paper` divides by all pixels instead and does not ask whether they are valid.

    Args:
        recon: [B, sum of bands, H, W], the modalities in the order of `images`.
        images: targets [B, M, H, W] by modality.
        blocks: hidden blocks, bool [B, Y, X] by modality.
        valid: bool [B, H, W] by modality.
        weights: factor of each modality's part; 1 where it is not named.
        profile: which average.

    Returns:
        The weighted sum of the parts [B] and the unweighted parts [B] by modality, float32. The loss of a
        batch is the mean of the first.

    Raises:
        ValueError: the reconstruction has not as many channels as the images together.
    """
    bands = [image.shape[1] for image in images.values()]
    if recon.shape[1] != sum(bands):
        raise ValueError(f"the reconstruction has {recon.shape[1]} channels, the images {bands} in sum {sum(bands)}")
    parts = {}
    for (name, image), predicted in zip(images.items(), torch.split_with_sizes(recon.float(), bands, 1), strict=True):
        counted = _enlarge(blocks[name], BLOCK, valid[name].shape)  # [B, H, W]
        if profile == "default":
            counted = counted & valid[name]
        parts[name] = _mean_square(predicted - image.float(), counted, every_pixel=profile == "paper")
    total = sum((weights or {}).get(name, 1.0) * part for name, part in parts.items())
    return torch.as_tensor(total), parts


def _mean_square(error: Tensor, counted: Tensor, every_pixel: bool) -> Tensor:
    """Mean over the bands and the counted (or all) pixels of error^2 at the counted ones.

    Error [B, M, H, W], counted bool [B, H, W] -> [B].
    """
    squares = error.square().masked_fill(~counted[:, None], 0).sum((1, 2, 3))  # [B]
    pixels = counted[0].numel() if every_pixel else counted.sum((1, 2)).clamp(min=1)
    return squares / (pixels * error.shape[1])
