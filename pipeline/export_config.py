"""What `mcf export` can be told. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """`mcf export`: a checkpoint as a release."""

    stage: Literal["export"] = "export"
    checkpoint: str = Field(description="run (its newest checkpoint), RUN/best, or checkpoint; local or s3://")
    out: str = Field(description="the release, a folder that is absent or empty, or s3:// likewise")
    evaluations: tuple[str, ...] = Field(
        default=(), description="folders of mcf evaluate, of this checkpoint, for eval/ and the card"
    )
    licence: str = Field(default="unspecified", description="of the weights, as an SPDX identifier")
    hub: str = Field(
        default="",
        description="also push to the Hugging Face Hub: ORG/NAME, absent or empty (made private), or a new branch "
        "ORG/NAME@REVISION; empty = no",
    )
    program: int = Field(
        default=0, ge=0, multiple_of=32, description="also model.pt2 of torch.export for images of this side; 0 = no"
    )
