"""Products: from the finished blocks of a map to the files that people open.

    MAP.tif                 class of every pixel, with palette and names
    MAP-confidence.tif      percent of that class
    MAP-coverage.tif        which sensors saw the pixel: bit i (from 0) is set for the i-th
    MAP-probabilities.tif   percent of every class, where asked for
    MAP-polygons.*          outlines, where asked for
    MAP.png, MAP.json       a quick look with legend; what the map was made of, and the area of each class

All rasters are Cloud-Optimised GeoTIFFs. MAP.json comes last and is what makes the map finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs import ConfigError
from pipeline import figures
from pipeline.map_plan import Plan, Request
from pipeline.mosaic import CLASS, CONFIDENCE, COVERAGE, NODATA, PROBABILITIES
from pipeline.outlines import write_outlines
from pipeline.predict_config import PredictConfig
from shards.contract import Classes
from shards.grid import Window
from shards.raster import open_file
from shards.raster_io import is_geographic, read_classes, to_cog, write_parts
from shards.store import Store, open_store

FORMAT_VERSION = 1  # of MAP.json
PICTURE = 1024  # pixels along a side of the quick look


@dataclass(frozen=True)
class Products:
    """The blocks and the files of one map.

    Args:
        request: the map.
        plan: what its blocks depend on.
        classes: of the model.
        config: which products are wanted.

    Raises:
        ConfigError: unknown classes to outline, or outlines of a map without CRS.
    """

    request: Request
    plan: Plan
    classes: Classes
    config: PredictConfig

    def __post_init__(self) -> None:
        """Refuse what cannot be made, before anything is."""
        unknown = [name for name in self.config.polygon_classes if name not in self.classes.names]
        if unknown:
            raise ConfigError(f"polygon_classes: {unknown[0]!r} given; the model has {', '.join(self.classes.names)}")
        if self.outlined and self.plan.layout.grid.crs is None:
            raise ConfigError(f"polygons={self.config.polygons}: {self.request.out} has no CRS, so no degrees")

    @property
    def names(self) -> dict[str, str]:
        """File names by kind, in the order in which they appear."""
        name = self.request.out.rpartition("/")[2]
        stem = name.rpartition(".")[0] or name
        found = {"confidence": f"{stem}-confidence.tif", "coverage": f"{stem}-coverage.tif"}
        if self.config.probabilities:
            found["probabilities"] = f"{stem}-probabilities.tif"
        if self.outlined:
            found["polygons"] = f"{stem}-polygons.{self.config.polygons}"
        return {**found, "picture": f"{stem}.png", "classes": name, "facts": f"{stem}.json"}

    @property
    def outlined(self) -> list[str]:
        """The classes to outline."""
        names = self.config.polygon_classes or self.classes.names[1:]
        return [] if self.config.polygons == "none" else list(names)

    @property
    def store(self) -> Store:
        """Where the files go."""
        out = self.request.out
        return open_store(out.rpartition("/")[0] if "://" in out else Path(out).parent)

    def finished(self) -> bool:
        """Whether this very map, with all that is wanted of it, is there."""
        store, plan = self.store, self.plan
        if not all(store.exists(name) for name in self.names.values()):
            return False
        found = json.loads(store.get(self.names["facts"]))
        same = found["format_version"] == FORMAT_VERSION and found["identity"] == plan.identity
        same = same and plan.micro_batch in (0, found["micro_batch"]) and found["outlined"] == self.outlined
        return same and (self.config.force or not found["forced"])

    def block(self, number: int) -> Path:
        """The file of a block; it is there when the block is finished."""
        return self.request.work / f"block-{number:06d}.tif"

    def keep(self, number: int, window: Window, values: NDArray[np.uint8]) -> None:
        """Write a finished block [3 + K, h, w]."""
        grid = self.plan.layout.grid.window(window)
        bands = values if self.config.probabilities else values[:PROBABILITIES]
        path, whole = self.block(number), Window(0, 0, window.height, window.width)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        write_parts(temporary, grid, [(whole, bands)], descriptions=[""] * len(bands))
        os.replace(temporary, path)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Make the files of all blocks, then put them in their places, then remove the blocks.

        Args:
            facts: where the map comes from, for MAP.json and the tags of MAP.tif.
        """
        made: dict[str, Path] = {
            "confidence": self._cog("confidence", [CONFIDENCE], ["percent"], "average"),
            "coverage": self._cog("coverage", [COVERAGE], [self._legend()], "nearest", nodata=0),
        }
        if "probabilities" in self.names:
            bands = [PROBABILITIES + index for index in range(len(self.classes.names))]
            made["probabilities"] = self._cog("probabilities", bands, self.classes.names, "average")
        if "polygons" in self.names:
            made["polygons"] = self._polygons()
        tags = {"classes": json.dumps(dict(enumerate(self.classes.names)))}
        tags |= {"checkpoint_sha256": str(self.plan.identity["checkpoint"])}
        tags |= {"forced": "; ".join(self.plan.notes)} if self.plan.notes else {}
        made["classes"] = self._cog("classes", [CLASS], ["class"], "mode", tags=tags)
        made["picture"] = self._picture(made["classes"])
        record = {"format_version": FORMAT_VERSION, **facts, **self._counted(), "outlined": self.outlined}
        record |= {"identity": dict(self.plan.identity), "micro_batch": self.plan.micro_batch}
        record |= {"forced": list(self.plan.notes)}
        store, content = self.store, json.dumps(record, indent=1).encode()
        for kind, name in self.names.items():
            store.put(name, made.get(kind, content))
        shutil.rmtree(self.request.work)

    def _made(self, kind: str) -> Path:
        """Where a product is made, in a folder of its own: a map may be called as one of our own files."""
        path = self.request.work / "made" / self.names[kind]
        path.parent.mkdir(exist_ok=True)
        return path

    def _legend(self) -> str:
        return ", ".join(f"{1 << bit}: {name}" for bit, name in enumerate(self.request.sensors))

    def _parts(self, bands: Sequence[int]) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
        """Each block's window and some of its bands [C, h, w]."""
        for number, window in enumerate(self.plan.layout.blocks()):
            with open_file(str(self.block(number))) as raster:
                whole = Window(0, 0, window.height, window.width)
                yield window, raster.read([band + 1 for band in bands], whole)

    def _cog(
        self, kind: str, bands: Sequence[int], names: Sequence[str], resampling: str, *, nodata: int = NODATA,
        tags: Mapping[str, str] | None = None,
    ) -> Path:  # fmt: skip
        """Bands of all blocks as one Cloud-Optimised GeoTIFF in the work folder."""
        plain, path = self.request.work / "plain.tif", self._made(kind)
        colours = dict(enumerate(self.classes.palette)) if kind == "classes" else None
        grid = self.plan.layout.grid
        write_parts(plain, grid, self._parts(bands), nodata=nodata, descriptions=names, colormap=colours)
        to_cog(plain, path, tags=tags, resampling=resampling)
        plain.unlink()
        return path

    def _polygons(self) -> Path:
        plain, path = self.request.work / "plain.tif", self._made("polygons")
        codes = np.zeros(256, np.uint8)  # 1 + class where it is outlined
        for index in map(self.classes.names.index, self.outlined):
            codes[index] = index + 1
        grid = self.plan.layout.grid
        write_parts(plain, grid, ((window, codes[values]) for window, values in self._parts([CLASS])))
        write_outlines(plain, path, str(grid.crs), self.classes)
        plain.unlink()
        return path

    def _picture(self, classes: Path) -> Path:
        path = self._made("picture")
        title = self.names["classes"]
        path.write_bytes(figures.maps({title: read_classes(classes, PICTURE)}, self.classes))
        return path

    def _counted(self) -> dict[str, Any]:
        """Pixels, and hectares where a pixel has a size in metres, by class; pixels seen by each sensor."""
        counts = np.zeros((2, 256), np.int64)
        for _, values in self._parts([CLASS, COVERAGE]):
            counts += [np.bincount(band.ravel(), minlength=256) for band in values]
        grid, codes = self.plan.layout.grid, np.arange(256)
        hectares = grid.resolution**2 / 1e4 if grid.crs and not is_geographic(grid.crs) else None
        classes = {
            name: {"pixels": int(count), "hectares": None if hectares is None else round(float(count) * hectares, 4)}
            for name, count in zip(self.classes.names, counts[0], strict=False)
        }
        seen = {name: int(counts[1, codes >> bit & 1 == 1].sum()) for bit, name in enumerate(self.request.sensors)}
        return {"classes": classes, "nodata": int(counts[0, NODATA]), "seen": seen}
