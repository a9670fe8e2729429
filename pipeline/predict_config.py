"""What `mcf predict` can be told. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictConfig:
    """`mcf predict`: maps of whole scenes."""

    stage: Literal["predict"] = "predict"
    checkpoint: str = Field(description="finetuned run, checkpoint or release")
    scene: dict[str, str] = Field(
        default_factory=dict, description="{sensor: raster} of one place, one or more of the sensors the model knows"
    )
    catalog: str = Field(
        default="", description="instead of scene: table of places as for shards, one map for each; empty = none"
    )
    out: str = Field(description="the map, a GeoTIFF, or with catalog the folder for maps; local or s3://")
    work: str = Field(default="", description="local folder for unfinished blocks; empty = beside the map")
    part: str = Field(default="1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", description="k/n: only the k-th of n shares")
    extent: Literal["first", "union"] = Field(
        default="first", description="ground of the map: that of the model's first sensor here, or of all of them"
    )
    window: int = Field(default=256, ge=32, multiple_of=32, description="side of a window in pixels")
    overlap: int = Field(default=64, ge=0, description="pixels that neighbouring windows share")
    block: int = Field(default=4096, ge=64, multiple_of=16, description="side of what is finished and kept at once")
    micro_batch: int | None = Field(
        default=None, ge=1, description="windows per forward; null = as many as fit on the GPU, 4 on a CPU"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of matrix products")
    flips: bool = Field(default=False, description="mean over four mirrored views, for four times the work")
    turn: bool = Field(default=False, description="show the model each window turned by 180 degrees")
    probabilities: bool = Field(default=False, description="also a band of percent for each class")
    polygons: Literal["none", "geojson", "parquet"] = Field(
        default="none", description="also the outlines of polygon_classes, in degrees (OGC:CRS84)"
    )
    polygon_classes: tuple[str, ...] = Field(default=(), description="classes to outline; empty = all but the first")
    force: bool = Field(
        default=False, description="go on with data the model is not made for; the map says so in its tags"
    )

    @field_validator("part")
    @classmethod
    def _part_is_one_of_its_number(cls, value: str) -> str:
        """Refuse 3/2."""
        part, parts = map(int, value.split("/"))
        if part > parts:
            raise ValueError(f"{value!r} given; the first number is at most the second")
        return value

    @model_validator(mode="after")
    def _windows_advance(self) -> Any:
        """Refuse an overlap that leaves no step from one window to the next, and what is to be mapped given twice."""
        if self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap} must be smaller than window={self.window}")
        if self.scene and self.catalog:
            raise ValueError("scene and catalog given; write one of them")
        if self.work.startswith("s3://"):
            raise ValueError(f"work={self.work} is not a local folder")
        return self
