"""Boundary F1: whether the outlines of classes lie where they should, within a tolerance.

After Csurka et al. 2013 (BMVC, "What is a good evaluation measure for semantic segmentation?"): of a class, precision
is the share of predicted boundary pixels within `tolerance` of a true one, recall the share of true ones within it of a
predicted one. Both are pooled over the set here, as all our metrics are, where the paper averages over images.

A boundary pixel of a class has it, and a labelled pixel of another class beside, above or below it. So neither the
image's edge nor that of an unlabelled area is a boundary.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.metrics import Numbers, mean_over_classes, percent, share


def boundary_counts(predicted: Tensor, label: Tensor, classes: int, ignore: int, tolerance: int) -> Tensor:
    """Boundary pixels by class: int64 [B, H, W] both -> int64 [K, 4].

    The columns are predicted ones, of these the ones near a true one, true ones, of these the ones near a predicted
    one; near is at most `tolerance` pixels away, from middle to middle.
    """
    counted = (label != ignore)[:, None]
    guess, truth = (_edges(_each(image, classes) & counted, counted) for image in (predicted, label))
    pairs = (guess, guess & _near(truth, tolerance), truth, truth & _near(guess, tolerance))
    return torch.stack([pixels.sum((0, 2, 3)) for pixels in pairs], 1)


def boundary_scores(counts: NDArray[np.int64], names: Sequence[str]) -> Numbers:
    """Boundary F1 of `boundary_counts`, in percent: `mean`, over the classes that have a boundary, and by class.

    None for a class without a boundary in truth and prediction; 0 where it has one in one of the two alone.
    """
    guess, near_truth, truth, near_guess = counts.astype(np.float64).T
    pairs = ((near_truth, guess), (near_guess, truth))
    precision, recall = (np.nan_to_num(share(part, whole)) for part, whole in pairs)
    f1 = np.nan_to_num(share(2 * precision * recall, precision + recall))
    f1 = np.where(guess + truth > 0, f1, np.nan)
    return {"mean": percent(float(mean_over_classes(f1))), **{n: percent(v) for n, v in zip(names, f1, strict=True)}}


def _each(image: Tensor, classes: int) -> Tensor:
    """Where each class is: [B, H, W] -> bool [B, K, H, W]."""
    return image[:, None] == torch.arange(classes, device=image.device)[:, None, None]


def _edges(inside: Tensor, counted: Tensor) -> Tensor:
    """Pixels of `inside` [B, K, H, W] with a counted [B, 1, H, W] one beside them that is not."""
    outside = F.pad(counted & ~inside, (1, 1, 1, 1))
    up, down = outside[..., :-2, 1:-1], outside[..., 2:, 1:-1]
    left, right = outside[..., 1:-1, :-2], outside[..., 1:-1, 2:]
    return inside & (up | down | left | right)


def _near(pixels: Tensor, distance: int) -> Tensor:
    """Pixels at most `distance` away from one of `pixels` [B, K, H, W]."""
    reach = torch.arange(-distance, distance + 1, device=pixels.device)
    disk = (reach[:, None] ** 2 + reach**2 <= distance**2).float()[None, None]
    flat = pixels.flatten(0, 1)[:, None].float()
    return (F.conv2d(flat, disk, padding=distance) > 0.5).reshape(pixels.shape)
