"""What `mcf finetune` can be told. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT, ProtocolChoice, Training, Where


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig(Training):
    """`mcf finetune`: segmentation with the labels of the dataset."""

    stage: Literal["finetune"] = "finetune"
    checkpoint: str | None = Field(
        default=None, description="run, checkpoint or release to start from (its model: is used); null = from scratch"
    )
    protocol: ProtocolChoice = Field(
        default_factory=ProtocolChoice,
        description="named split of a benchmark; where and val_where narrow it",
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the labelled samples, chosen by seed")
    limit: int | None = Field(default=None, ge=1, description="number of labelled samples, chosen by seed")
    val_where: Where = Field(
        default_factory=lambda: {"split": ["val"]}, description="{column: allowed values} of the validation samples"
    )
    validate_every: int = Field(default=0, ge=0, description="steps between validations; 0 = none")
