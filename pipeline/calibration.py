"""Calibration: whether pixels of which a model says 80 % are right in 80 % of the cases.

Expected calibration error and reliability diagram of Guo et al. 2017 (ICML, "On Calibration of Modern Neural
Networks"): confidence is the probability of the predicted class; the bins are equally wide, ((m - 1) / 15, m / 15].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.metrics import percent, share

BINS = 15
ONE = 1 << 24  # a confidence of 1: sums of integers do not depend on their order, so neither on the number of ranks


def reliability(probabilities: Tensor, label: Tensor, ignore: int) -> Tensor:
    """Counts by bin of confidence: float [B, K, H, W], int64 [B, H, W] -> int64 [15, 3].

    The columns are labelled pixels, those that are right, and the sum of their confidences in units of 1 / ONE.
    """
    confidence, predicted = probabilities.max(1)
    counted = label != ignore
    confidence, right = confidence[counted], (predicted == label)[counted]
    bins = (confidence.double() * BINS).ceil().long().clamp(1, BINS) - 1
    units = (confidence.double() * ONE).round()
    weights = (torch.ones_like(units), right.double(), units)
    return torch.stack([torch.bincount(bins, weight, BINS) for weight in weights], 1).long()


def calibration(table: NDArray[np.int64]) -> dict[str, Any]:
    """ECE and the bins of `reliability`, in percent.

    ECE is the mean over labelled pixels of |share that is right - mean confidence| of their bin. A bin has `confidence`
    (mean), `accuracy` and `pixels`; the first two are None where it is empty.
    """
    pixels, right, units = table.astype(np.float64).T
    accuracy, confidence = share(right, pixels), share(units / ONE, pixels)
    error = np.nansum(pixels * np.abs(accuracy - confidence)) / max(pixels.sum(), 1)
    rows = [
        {"confidence": percent(sure), "accuracy": percent(true), "pixels": int(count)}
        for sure, true, count in zip(confidence, accuracy, pixels, strict=True)
    ]
    return {"ECE": percent(error), "bins": rows}
