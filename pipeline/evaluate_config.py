"""What `mcf evaluate` can be told. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT, ProtocolChoice, Where


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """`mcf evaluate`: score a finetuned checkpoint on labelled samples, or compare what was scored."""

    stage: Literal["evaluate"] = "evaluate"
    run: str = Field(description="folder for metrics.json, report.html and what they were made of")
    checkpoint: str = Field(default="", description="finetuned run, a folder of runs seed-*, checkpoint or release")
    data: str = Field(default="", description="dataset: a folder that holds manifest.parquet, local or s3://")
    protocol: ProtocolChoice = Field(
        default_factory=ProtocolChoice, description="named split of a benchmark; where narrows it"
    )
    role: Literal["train", "val", "test"] = Field(default="test", description="which samples of the split")
    sensors: tuple[str, ...] = Field(default=(), description="modalities to show the model; empty = all it knows")
    where: Where | None = Field(
        default=None, description="{column: allowed values} of the manifest; null = {split: [role]}, or the protocol's"
    )
    trained_on: tuple[str, ...] = Field(
        default=(), description="datasets that the weights have seen, where the checkpoint's record does not say"
    )
    micro_batch: int = Field(default=8, ge=1, description="samples per forward")
    limit: int | None = Field(default=None, ge=1, description="number of samples, chosen by the manifest's own rule")
    modalities: bool = Field(
        default=True, description="also with each modality alone and each hidden: more forwards, one reading"
    )
    boundary: int = Field(
        default=0, ge=0, le=32, description="pixels that a boundary may be off in the boundary F1; 0 = not counted"
    )
    min_area: int = Field(default=0, ge=0, description="pixels under which a predicted building does not count")
    force: bool = Field(
        default=False, description="go on with data the model is not made for; metrics.json says so under forced"
    )
    maps: int = Field(default=6, ge=0, le=24, description="samples that the page shows: the worst, middling and best")
    compare: tuple[str, ...] = Field(
        default=(), description="evaluation folders to put side by side; nothing is evaluated then"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> Any:
        """Refuse one folder to compare, and an evaluation of nothing."""
        if len(self.compare) == 1:
            raise ValueError(f"compare={list(self.compare)}: one folder given; write two or more, compare=[A,B]")
        missing = [name for name in ("checkpoint", "data") if not getattr(self, name)]
        if not self.compare and missing:
            raise ValueError(f"{' and '.join(missing)} not given; write {missing[0]}=..., or compare=[A,B]")
        return self
