"""What `mcf predict` can be told. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictConfig:
    """`mcf predict`: a map of whole scenes."""

    stage: Literal["predict"] = "predict"
    checkpoint: str = Field(description="finetuned run, checkpoint or release")
    scene: dict[str, str] = Field(description="{sensor: raster}, one or more of the sensors the model knows")
    out: str = Field(description="the map, a Cloud-Optimised GeoTIFF")
    window: int = Field(default=256, ge=32, multiple_of=32, description="side of a window in pixels")
    overlap: int = Field(default=64, ge=0, description="pixels that neighbouring windows share")
    micro_batch: int = Field(default=8, ge=1, description="windows per forward")

    @model_validator(mode="after")
    def _windows_advance(self) -> Any:
        """Refuse an overlap that leaves no step from one window to the next."""
        if self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap} must be smaller than window={self.window}")
        return self
