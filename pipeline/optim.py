"""Which parameters decay, and the learning rate as a function of the samples seen."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pipeline.config import Optim

POLY_POWER = 0.9


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: what `weight_decay` applies to, and what the model's `no_weight_decay()` names."""
    spared = set(getattr(model, "no_weight_decay", set)())
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]


def learning_rate(optim: Optim, seen: int, total: int) -> float:
    """Learning rate of the step that begins after `seen` of `total` samples.

    It rises linearly from 0 over `warmup_samples`, then falls to 0: as (1 - progress)^0.9 ("poly", the paper's), or as
    half a cosine. Samples, not steps: another global batch keeps the same curve.
    """
    if seen < optim.warmup_samples:
        return optim.lr * seen / optim.warmup_samples
    progress = min(1.0, (seen - optim.warmup_samples) / max(1, total - optim.warmup_samples))
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * math.pow(1.0 - progress, POLY_POWER)
