"""Config of the shards stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from shards.contract import Classes
from shards.sample import Encoding
from shards.sensors import SENSORS

STRICT = ConfigDict(extra="forbid")
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Archive:
    """Where the scenes are and in which layout."""

    name: str = Field(default="catalog", description="layout of the archive")
    root: str = Field(description="folder or table of the archive")
    pattern: str = Field(default="", description="of file names, for archive.name=folder: {place}/{sensor}.tif")
    licence: str = Field(default="", description="licence of the data, where the layout does not imply it")
    attribution: str = Field(default="", description="whom to name, where the layout does not imply it")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Label:
    """What the codes of the label rasters mean."""

    names: tuple[str, ...] = Field(description="class names, in the order of their indices")
    palette: tuple[tuple[int, int, int], ...] = Field(description="a colour per class, 0..255")
    codes: tuple[int | tuple[int, ...], ...] | None = Field(
        default=None, description="the raster's code of each class, or a list of its codes; 0, 1, 2, ... when absent"
    )
    ignored: tuple[int, ...] = Field(default=(255,), description="codes that mean 'no label here'")
    min_area: float = Field(default=0, ge=0, description="of polygon labels: drop those below this many square metres")

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        self.classes()
        if self.codes is not None and len(self.codes) != len(self.names):
            raise ValueError(f"{len(self.names)} names but {len(self.codes)} codes; give one, or a list, per class")
        codes = [code for code, _ in self._pairs()]
        if twice := sorted({code for code in codes if [*codes, *self.ignored].count(code) > 1}):
            raise ValueError(f"codes {twice} stand for two classes, or for one and 'no label here'")
        return self

    def _pairs(self) -> list[tuple[int, int]]:
        codes = self.codes or tuple(range(len(self.names)))
        lists = [entry if isinstance(entry, tuple) else (entry,) for entry in codes]
        return [(code, index) for index, entry in enumerate(lists) for code in entry]

    def table(self) -> dict[int, int]:
        """Class index by code; several codes may be one class."""
        return dict(self._pairs())

    def classes(self) -> Classes:
        """The classes as the contract writes them down."""
        return Classes(names=self.names, palette=self.palette)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tiling:
    """How a place is cut into samples."""

    size: int = Field(default=256, ge=32, description="pixels on a side")
    stride: int | None = Field(default=None, ge=1, description="pixels from one tile to the next; the size when absent")
    min_valid: Fraction = Field(default=0.5, description="least share of valid pixels in every modality")
    max_days: float | None = Field(default=None, ge=0, description="how far apart in time scenes of one sample may be")
    metres: float | None = Field(
        default=None, gt=0, description="side of a pixel on a UTM grid; the reference's own grid when absent"
    )
    max_cloud: Fraction | None = Field(default=None, description="most cloud, by the product's own mask")
    max_shift: float | None = Field(default=None, gt=0, description="most pixels by which modalities may lie apart")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Split:
    """How samples are dealt to splits, and how far apart tiles of two splits stay."""

    by: Literal["group", "block", "archive"] = Field(
        description="what stays together: the archive's groups, squares of ground, or the archive's own splits"
    )
    fractions: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1}, description="share of the samples per split"
    )
    block_km: float = Field(default=25, gt=0, description="side of a square of ground, for by=block")
    buffer_m: float = Field(
        default=0, ge=0, le=100_000, description="tiles of two splits neither meet nor lie nearer than this"
    )
    enforce: bool = Field(default=True, description="move tiles that lie too near to split 'buffer'; else only count")
    seed: int = Field(default=0, description="of the order in which groups or blocks are dealt")

    @model_validator(mode="after")
    def _whole(self) -> Any:
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"split.fractions {self.fractions} sum to {sum(self.fractions.values()):g}; 1 is expected")
        if reserved := {"", "buffer"} & set(self.fractions):
            raise ValueError(f"split.fractions: {reserved.pop()!r} cannot name a split")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShardsConfig:
    """Scenes of an archive to shards in a store."""

    stage: Literal["shards"] = "shards"
    archive: Archive
    out: str = Field(description="dataset folder, local or s3://BUCKET/PREFIX")
    name: str = Field(
        default="shard",
        pattern=r"^[a-z][a-z0-9]{0,30}$",
        description="of this build's shards; another name adds its samples to the dataset that is in out",
    )
    sensors: tuple[str, ...] = Field(min_length=1, description="modalities; the first gives the grid")
    label: Label | None = Field(default=None, description="classes, when the archive is labelled")
    tile: Tiling = Tiling()
    split: Split | None = Field(default=None, description="splits by geography; the archive's own when absent")
    encoding: Encoding = Field(default="blosc2-zstd", description="of arrays: blosc2-zstd, blosc2-lz4, npy or geotiff")
    samples_per_shard: int = Field(default=512, ge=1, description="tiles planned per shard")
    on_error: Literal["fail", "skip"] = Field(default="fail", description="what an unusable place does")
    workers: int = Field(default=1, ge=1, description="processes")
    part: str = Field(
        default="1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", description="this builder's share of the shards, as k/n"
    )

    @model_validator(mode="after")
    def _known(self) -> Any:
        if unknown := [name for name in self.sensors if name not in SENSORS]:
            raise ValueError(f"unknown sensors {unknown}; known: {', '.join(SENSORS)}")
        if len(set(self.sensors)) != len(self.sensors):
            raise ValueError(f"sensors {self.sensors} name one twice")
        part, parts = map(int, self.part.split("/"))
        if part > parts:
            raise ValueError(f"part {self.part}: k/n with k between 1 and n")
        if self.tile.stride is not None and self.tile.stride > self.tile.size:
            raise ValueError(f"tile.stride {self.tile.stride} leaves gaps between tiles of {self.tile.size}")
        return self
