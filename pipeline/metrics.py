"""Segmentation metrics, all from one confusion matrix pooled over the whole set (never averaged over batches).

Rows are the truth, columns the prediction. A class that occurs in neither is excluded from means; one that is predicted
but never true counts in mIoU and mF1 (its IoU is 0) and not in mAcc (its recall is undefined).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.contract import ContractError

Numbers = dict[str, float | list[str] | int | None]
Floats = NDArray[np.float64]


def confusion_matrix(predicted: Tensor, label: Tensor, classes: int, ignore: int) -> Tensor:
    """Count pixels: predicted and label int64 of one shape -> int64 [classes, classes]; `ignore` pixels are left out.

    Raises:
        ContractError: a label code that is neither a class nor `ignore`.
    """
    return confusion_matrices(predicted[None], label[None], classes, ignore)[0]


def confusion_matrices(predicted: Tensor, label: Tensor, classes: int, ignore: int) -> Tensor:
    """The confusion matrix of each sample: predicted and label int64 [B, ...] -> int64 [B, classes, classes].

    Raises:
        ContractError: a label code that is neither a class nor `ignore`.
    """
    counted = label != ignore
    truth, guess = label[counted], predicted[counted]
    if truth.numel() and (int(truth.min()) < 0 or int(truth.max()) >= classes):
        codes = f"{int(truth.min())}..{int(truth.max())}"
        raise ContractError(f"label codes {codes}; classes are 0..{classes - 1}, or {ignore}")
    number = torch.arange(len(label), device=label.device).reshape(-1, *[1] * (label.dim() - 1))
    sample = number.expand_as(label)[counted]
    cells = (sample * classes + truth) * classes + guess
    return torch.bincount(cells, minlength=len(label) * classes**2).reshape(-1, classes, classes)


def scores(matrix: NDArray[np.int64], names: Sequence[str]) -> Numbers:
    """All metrics of a confusion matrix [K, K], in percent with two decimals; None where undefined.

    OA, mAcc, mIoU, mF1, Kappa, FWIoU (weighted by the true frequency), IoU/<class>, F1/<class>, and the names of the
    classes that are absent from truth and prediction.

    Raises:
        ContractError: the matrix is empty.
    """
    counts = matrix.astype(np.float64)
    total, hits = counts.sum(), np.diag(counts)
    truth, guess = counts.sum(1), counts.sum(0)
    if total == 0:
        raise ContractError("no labelled pixel was counted; check `where` and the label's ignore value")
    iou, recall = intersection_over_union(counts), share(hits, truth)
    f1, chance = share(2 * hits, truth + guess), float(truth @ guess) / total**2
    accuracy = hits.sum() / total
    found: Numbers = {
        "OA": percent(accuracy),
        "mAcc": percent(np.nanmean(recall)),
        "mIoU": percent(np.nanmean(iou)),
        "mF1": percent(np.nanmean(f1)),
        "Kappa": percent((accuracy - chance) / (1 - chance) if chance < 1 else np.nan),
        "FWIoU": percent(np.nansum(truth / total * iou)),
        "pixels": int(total),
        "absent": [name for name, there in zip(names, truth + guess > 0, strict=True) if not there],
    }
    found.update({f"IoU/{name}": percent(value) for name, value in zip(names, iou, strict=True)})
    found.update({f"F1/{name}": percent(value) for name, value in zip(names, f1, strict=True)})
    return found


def intersection_over_union(counts: NDArray[np.generic]) -> Floats:
    """IoU of each class, 0 to 1: confusion matrices [..., K, K] -> [..., K]; NaN where a class is absent."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    return share(hits, counts.sum(-1) + counts.sum(-2) - hits)


def mean_over_classes(values: Floats) -> Floats:
    """Mean of the classes that have a value: [..., K] -> [...]; NaN where none has."""
    there = ~np.isnan(values)
    return share(np.where(there, values, 0).sum(-1), there.sum(-1).astype(np.float64))


def accuracy(counts: NDArray[np.generic]) -> Floats:
    """Share of the pixels that are right, 0 to 1: confusion matrices [..., K, K] -> [...]; NaN without a pixel."""
    hits = np.trace(counts, axis1=-2, axis2=-1).astype(np.float64)
    return share(hits, counts.sum((-2, -1)).astype(np.float64))


def share(part: Floats, whole: Floats) -> Floats:
    """Share of the whole, NaN where that is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def percent(value: float | np.floating) -> float | None:
    """A share in percent with two decimals; None of NaN."""
    return None if np.isnan(value) else round(100.0 * float(value), 2)
