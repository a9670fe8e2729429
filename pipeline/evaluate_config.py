"""What `mcf evaluate` can be told. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT, ProtocolChoice, Where


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """`mcf evaluate`: score a finetuned checkpoint on labelled samples."""

    stage: Literal["evaluate"] = "evaluate"
    run: str = Field(description="folder for metrics.json and confusion.csv")
    checkpoint: str = Field(description="finetuned run, checkpoint or release")
    data: str = Field(description="dataset: a folder that holds manifest.parquet, local or s3://")
    protocol: ProtocolChoice = Field(
        default_factory=ProtocolChoice, description="named split of a benchmark; where narrows it"
    )
    sensors: tuple[str, ...] = Field(default=(), description="modalities to show the model; empty = all it knows")
    where: Where = Field(
        default_factory=lambda: {"split": ["test"]}, description="{column: allowed values} of the manifest"
    )
    micro_batch: int = Field(default=8, ge=1, description="samples per forward")
    limit: int | None = Field(default=None, ge=1, description="number of samples, chosen by the manifest's own rule")
