"""Which parameters decay, how fast each learns, and the learning rate as a function of the samples seen."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.config import Optim

POLY_POWER = 0.9
HEAD = "head."  # how the names of the head's parameters begin
_BLOCK = re.compile(r"encoders\.[^.]+\.stages\.(\d+)\.blocks\.(\d+)\.")
_OF_STAGE = re.compile(r"encoders\.[^.]+\.stages\.(\d+)\.|fusion\.(\d+)\.")
_LEVEL = re.compile(r"decoder\.levels\.(\d+)\.")


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Groups for AdamW of the parameters to be trained, by learning rate and by whether they decay.

    What the model's `no_weight_decay()` names does not decay. `lr_scale` of a group is what its learning rate is a
    multiple of; `Engine.step` applies it.
    """
    spared = set(getattr(model, "no_weight_decay", set)())
    scales = rate_scales(model, optim)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[name], name not in spared), []).append(parameter)
    return [
        {"params": members, "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), members in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def rate_scales(model: nn.Module, optim: Optim) -> dict[str, float]:
    """By parameter name, the factor of its learning rate.

    `layer_decay` to the power of the layers between it and the head (layer-wise decay: Clark et al. 2020, ELECTRA, and
    Bao et al. 2022, BEiT): what lies near the pixels has learnt what holds for any task, and moves least. The head has
    the full rate, or `head_lr`.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = layer_numbers(names)
    top = 1 + max(layers.values(), default=0)
    scales = {name: optim.layer_decay ** (top - layers.get(name, top)) for name in names}
    if optim.head_lr is not None:
        scales |= {name: optim.head_lr / optim.lr for name in names if name.startswith(HEAD)}
    return scales


def layer_numbers(names: Sequence[str]) -> dict[str, int]:
    """Number of the layer that each parameter of an MCF-Mamba belongs to, but for the head's.

    0 is the patch embedding, then come the blocks of the encoders' stages one after the other and the levels of the
    decoder. What leads from a stage to the next, its output norm and its fusion count with its last block; the last
    expansion to pixels with the last level.
    """
    blocks, levels = _most(_BLOCK, names), _most(_LEVEL, names)
    ends = list(
        itertools.accumulate(blocks[stage] + 1 for stage in sorted(blocks))
    )  # number of each stage's last block
    found = {}
    for name in names:
        if block := _BLOCK.match(name):
            stage, number = int(block[1]), int(block[2])
            found[name] = ends[stage] - blocks[stage] + number
        elif stage_of := _OF_STAGE.match(name):
            found[name] = ends[int(stage_of[1] or stage_of[2])]
        elif level := _LEVEL.match(name):
            found[name] = ends[-1] + 1 + int(level[1])
        elif name.startswith("decoder."):
            found[name] = ends[-1] + 1 + levels[0]
        elif name.startswith("encoders."):
            found[name] = 0
    return found


def _most(pattern: re.Pattern[str], names: Sequence[str]) -> dict[int, int]:
    """Highest number by the group before it (0 where there is none), of what a pattern finds in names."""
    most: dict[int, int] = {}
    for match in filter(None, map(pattern.match, names)):
        *before, number = map(int, match.groups())
        group = before[0] if before else 0
        most[group] = max(most.get(group, 0), number)
    return most


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
