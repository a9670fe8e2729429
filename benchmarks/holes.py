"""What validity in masks and loss is for, measured on the networks that benchmarks/corrections.py trained.

Letters: B tiles, H W pixels, M bands of a modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.corrections import RATIO, SEEDS, held_out_loss, tiles, trained
from benchmarks.mechanisms import together
from pipeline.batch import Batch
from pipeline.model import MCFMamba
from pipeline.model.cmss import hidden_tokens, hide, loss, presence
from pipeline.model.keyed import uniform

SHARES = (0.0, 0.2, 0.5, 0.8)
STEPS, BATCH, RATE = 200, 16, 1e-3  # of training with holes
HOLE_SEED, VAL_SEED = 11, 5
Images = Mapping[str, Tensor]


def run(out: Path) -> None:
    """The tables of (d)."""
    sizes(out)
    learning(out)


def holes(valid: Images, share: float, seed: int, alike: bool = False) -> dict[str, Tensor]:
    """Valid bool [B, H, W] less the `share` of pixels on one side of a line, as at the edge of a swath.

    Every tile has another line, and unless they are `alike` every modality too.
    """
    found = {}
    for number, (name, mask) in enumerate(valid.items()):
        batch, height, width = mask.shape
        line = uniform(HOLE_SEED, seed, torch.arange(batch), 0 if alike else number)  # [B]
        angle = line[:, None, None] * 2 * math.pi  # [B, 1, 1]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = (angle.cos() * rows + angle.sin() * columns).flatten(1).argsort(1).argsort(1)  # 0 .. H W - 1
        found[name] = mask & (place >= share * height * width).view_as(mask)
    return found


class View(NamedTuple):
    """What a network is shown and scored on."""

    values: dict[str, Tensor]
    valid: dict[str, Tensor]  # what counts as valid
    blocks: dict[str, Tensor]
    aware: bool  # of validity; else as published


def view(batch: Batch, real: Images, seed: int, aware: bool) -> View:
    """Tiles of which only `real` is valid; the rest is 0, as after normalisation. Unaware, all counts as valid."""
    values = {name: image * real[name][:, None] for name, image in batch.values.items()}
    known = dict(real) if aware else {name: torch.ones_like(mask) for name, mask in real.items()}
    return View(values, known, hide(presence(known), batch.positions, seed, RATIO), aware)


def score(model: MCFMamba, seen: View) -> tuple[Tensor, Tensor]:
    """Loss of every tile [B], and the reconstruction [B, sum of M, H, W]."""
    recon = model(seen.values, hidden_tokens(seen.blocks, seen.valid))
    return loss(recon, seen.values, seen.blocks, seen.valid, profile="default" if seen.aware else "paper")[0], recon


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some tiles of a batch."""
    values, valid = ({n: t[rows] for n, t in given.items()} for given in (batch.values, batch.valid))
    return replace(batch, values=values, valid=valid, label=None, positions=batch.positions[rows], keys=[])


def sizes(out: Path) -> None:
    """Loss and gradient of one image with more and more holes."""
    model, batch = trained(out, "default", SEEDS[0]), whole(tiles(out))
    print(
        f"\n(d) Images of 128 x 128 pixels with holes: CMSS loss and norm of its gradient, mean of {len(batch)} of val"
    )
    print("\n| nodata | ours: loss | gradient | published: loss | gradient | share of its error on nodata |")
    print("|---|---|---|---|---|---|")
    for share in SHARES:
        ours, published = size(model, batch, share, True), size(model, batch, share, False)
        cells = [
            f"{ours[0]:.3f}",
            f"{ours[1]:.2f}",
            f"{published[0]:.3f}",
            f"{published[1]:.2f}",
            f"{published[2]:.0%}",
        ]
        print(f"| {share:.0%} | {' | '.join(cells)} |", flush=True)


def whole(batch: Batch, limit: int = 64) -> Batch:
    """The first tiles without a hole, 2 x 2 as one image: 16 blocks of 32 pixels."""
    complete = torch.stack([mask.flatten(1).all(1) for mask in batch.valid.values()]).all(0).nonzero().flatten()
    some = rows_of(batch, complete[: min(limit, len(complete)) // 4 * 4])
    values, valid = together(some.values, 2), together(some.valid, 2)
    count = len(next(iter(values.values())))
    return Batch(values, valid, None, torch.arange(count), [str(i) for i in range(count)])


def size(model: MCFMamba, batch: Batch, share: float, aware: bool) -> tuple[float, float, float]:
    """Mean over images of the loss, of the norm of its gradient, and of the share of squared error on nodata."""
    found = []
    for index in range(len(batch)):
        one = rows_of(batch, torch.tensor([index]))
        real = holes(one.valid, share, index, alike=True)
        seen = view(one, real, index, aware)
        value, recon = score(model, seen)
        model.zero_grad()
        value.sum().backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((value.item(), norm.item(), (on_nodata(recon, seen, real) / value.clamp(min=1e-12)).item()))
    value, norm, nodata = (mean(column) for column in zip(*found, strict=True))
    return value, norm, nodata


def on_nodata(recon: Tensor, seen: View, real: Images) -> Tensor:
    """The part of every tile's loss [B] that comes from pixels that are not really valid: elsewhere, no error."""
    bands = [image.shape[1] for image in seen.values.values()]
    cut = zip(torch.split_with_sizes(recon, bands, 1), seen.values.items(), strict=True)
    only = torch.cat([torch.where(real[name][:, None], image, output) for output, (name, image) in cut], 1)
    return loss(only, seen.values, seen.blocks, seen.valid, profile="default" if seen.aware else "paper")[0]


def learning(out: Path) -> None:
    """Both ways, trained on tiles of which half is nodata, scored on what is really there."""
    train, val = tiles(out, "train"), tiles(out)
    print(
        f"\n(d) {STEPS} steps more on tiles with 50 % nodata put into them, 3 seeds: mean square error in hidden blocks"
    )
    print(
        "\n| | val tiles without holes | val tiles with 50 % nodata: valid pixels | nodata, to what is there | to 0 |"
    )
    print("|---|---|---|---|---|")
    for title, aware in (("before", None), ("hidden and valid pixels", True), ("all pixels, as published", False)):
        found = [learned(out, train, val, seed, aware) for seed in SEEDS]
        cells = [f"{mean(column):.3f} ± {stdev(column):.3f}" for column in zip(*found, strict=True)]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def learned(out: Path, train: Batch, val: Batch, seed: int, aware: bool | None) -> tuple[float, ...]:
    """Train the default's network on, and score it; `aware` None scores it as it is."""
    model = trained(out, "default", seed)
    if aware is not None:
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
        generator = torch.Generator().manual_seed(seed)
        for step in range(STEPS):
            some = rows_of(train, torch.randint(len(train), (BATCH,), generator=generator))
            optimiser.zero_grad()
            score(model, view(some, holes(some.valid, 0.5, step), step, aware))[0].mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return held_out_loss(model, val), *in_holes(model, val, aware is not False)


@torch.no_grad()
def in_holes(model: MCFMamba, val: Batch, aware: bool) -> tuple[float, float, float]:
    """Mean square error in hidden blocks of tiles with 50 % nodata: valid pixels; nodata to its true values, and to 0.

    Blocks are hidden without asking what is valid, so that holes are scored at all. The network is shown what its way
    shows it: `aware`, tokens without a valid pixel are hidden from it.
    """
    real = holes(val.valid, 0.5, VAL_SEED)
    seen = view(val, real, VAL_SEED, aware=False)
    recon = model(seen.values, hidden_tokens(seen.blocks, real if aware else seen.valid))
    made = {name: val.valid[name] & ~mask for name, mask in real.items()}
    zeros = {name: torch.zeros_like(image) for name, image in val.values.items()}
    cases = ((val.values, real), (val.values, made), (zeros, made))
    valid, truth, zero = (float(loss(recon, target, seen.blocks, where)[0].mean()) for target, where in cases)
    return valid, truth, zero
