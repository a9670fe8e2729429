"""What `mcf finetune` can be told. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT, ProtocolChoice, Training, Where


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig(Training):
    """`mcf finetune`: segmentation with the labels of the dataset."""

    stage: Literal["finetune"] = "finetune"
    checkpoint: str | None = Field(
        default=None, description="run, checkpoint or release to start from (its model: is used); null = from scratch"
    )
    adapt: dict[str, str | None] = Field(
        default_factory=dict,
        description="{modality of the data: the checkpoint's to begin from, or null}; the rest is found by bands",
    )
    freeze: Literal["none", "encoders"] = Field(
        default="none", description="what of the checkpoint is not trained: its encoders, of which drop path is off"
    )
    steps: int = Field(default=0, ge=0, description="optimiser steps of the whole run; 0 = as epochs says")
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the labelled samples, in place of steps; the last step is whole"
    )
    seeds: tuple[int, ...] = Field(
        default=(), description="one run for each, in RUN/seed-N, and their spread in RUN/summary.json; empty = seed"
    )
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = Field(
        default="none", description="in the cross entropy: balanced = inverse to how frequent; or one per class"
    )
    protocol: ProtocolChoice = Field(
        default_factory=ProtocolChoice,
        description="named split of a benchmark; where and val_where narrow it",
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the labelled samples, chosen by seed")
    limit: int | None = Field(default=None, ge=1, description="number of labelled samples, chosen by seed")
    val_where: Where | None = Field(
        default=None,
        description="{column: allowed values} of the validation samples; null = split val, or what the protocol says",
    )
    validate_every: int | Literal["epoch"] = Field(
        default=0, description="steps between validations, or epoch; 0 = none"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Any:
        """Refuse fields that contradict each other."""
        if bool(self.steps) == (self.epochs is not None):
            raise ValueError(f"steps={self.steps}, epochs={self.epochs}: give one of them, steps=N or epochs=N")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: each may be there once")
        if isinstance(self.validate_every, int) and self.validate_every < 0:
            raise ValueError(f"validate_every={self.validate_every}: 0 or more steps, or epoch")
        if self.patience and not self.validate_every:
            raise ValueError(f"patience={self.patience} counts validations; write validate_every=STEPS or epoch")
        if self.freeze != "none" and self.checkpoint is None:
            raise ValueError(
                f"freeze={self.freeze} keeps what a checkpoint has learnt; write checkpoint= or freeze=none"
            )
        if self.adapt and self.checkpoint is None:
            raise ValueError("adapt chooses among the modalities of a checkpoint; write checkpoint=")
        if isinstance(self.class_weights, tuple) and not (
            min(self.class_weights, default=-1) >= 0 < max(self.class_weights)
        ):
            raise ValueError(f"class_weights={list(self.class_weights)}: one number per class, 0 or more, not all 0")
        return self

    @property
    def validation_where(self) -> Where:
        """`val_where`, where null stands for what it says."""
        default: Where = {} if self.protocol.name else {"split": ["val"]}
        return default if self.val_where is None else self.val_where


def resolved(config: FinetuneConfig, samples: int) -> FinetuneConfig:
    """The config with numbers of steps for `epochs` and `validate_every: epoch`.

    Args:
        config: of the stage.
        samples: that are trained on.
    """
    epoch = samples / config.batch.global_batch
    # What is a whole number but for rounding is not rounded up: 0.1 * 30 is more than 3.
    steps = config.steps if config.epochs is None else math.ceil(round(config.epochs * epoch, 6))
    every = math.ceil(epoch) if config.validate_every == "epoch" else config.validate_every
    return replace(config, steps=max(1, steps), epochs=None, validate_every=every)
