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


def confusion_matrix(predicted: Tensor, label: Tensor, classes: int, ignore: int) -> Tensor:
    """Count pixels: predicted and label int64 of one shape -> int64 [classes, classes]; `ignore` pixels are left out.

    Raises:
        ContractError: a label code that is neither a class nor `ignore`.
    """
    counted = label != ignore
    truth, guess = label[counted], predicted[counted]
    if truth.numel() and (int(truth.min()) < 0 or int(truth.max()) >= classes):
        codes = f"{int(truth.min())}..{int(truth.max())}"
        raise ContractError(f"label codes {codes}; classes are 0..{classes - 1}, or {ignore}")
    return torch.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes)


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
    iou, recall = _share(hits, truth + guess - hits), _share(hits, truth)
    f1, chance = _share(2 * hits, truth + guess), float(truth @ guess) / total**2
    accuracy = hits.sum() / total
    found: Numbers = {
        "OA": _percent(accuracy),
        "mAcc": _percent(np.nanmean(recall)),
        "mIoU": _percent(np.nanmean(iou)),
        "mF1": _percent(np.nanmean(f1)),
        "Kappa": _percent((accuracy - chance) / (1 - chance) if chance < 1 else np.nan),
        "FWIoU": _percent(np.nansum(truth / total * iou)),
        "pixels": int(total),
        "absent": [name for name, there in zip(names, truth + guess > 0, strict=True) if not there],
    }
    found.update({f"IoU/{name}": _percent(value) for name, value in zip(names, iou, strict=True)})
    found.update({f"F1/{name}": _percent(value) for name, value in zip(names, f1, strict=True)})
    return found


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the whole, NaN where that is 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _percent(value: float | np.floating) -> float | None:
    return None if np.isnan(value) else round(100.0 * float(value), 2)
