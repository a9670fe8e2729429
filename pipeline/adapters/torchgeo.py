"""A dataset folder as TorchGeo's datasets are (Stewart et al. 2022, arXiv 2111.08872): dicts of tensors by number.

TorchGeo's `NonGeoDataset` is what fits: pre-cut samples, of which neighbours may lie in different UTM zones, so that
they have no common grid to be cut anew from. Nothing here needs TorchGeo; where it is installed, our class counts as
one of its `NonGeoDataset`s.

Letters: B bands of all sensors, C bands of one, M sensors, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.batch import normalise
from shards.contract import Modality, Normalisation
from shards.grid import Grid
from shards.manifest import select
from shards.pictures import Picture, coloured, picture, plain
from shards.reader import Reader
from shards.reading import Reading
from shards.sample import Tile

Layout = Literal["concatenated", "separate", "nested"]
LAYOUTS = ("concatenated", "separate", "nested")
PIXELS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # transform of what has no georeference: coordinates are pixels


class ShardDataset(Dataset[dict[str, Any]]):
    """Samples by number, each read alone: for access in any order, `StreamDataset` being the one to train from S3.

    A sample holds `key`; `crs` ("EPSG:..." or WKT, "" if there is none), `transform` float64 [6] as of
    `shards.grid.Grid`, `bounds` float64 [4] (xmin, ymin, xmax, ymax in that CRS; in pixels if there is none); `mask`
    int64 [H, W] where the dataset has classes, their `ignore` where a pixel or the whole sample is not labelled;
    images float32 and validity bool:

        concatenated   image [B, H, W]            mask_valid [M, H, W]
        separate       image_SENSOR [C, H, W]     mask_valid_SENSOR [H, W]
        nested         image {SENSOR: [C, H, W]}  valid {SENSOR: [H, W]}

    kornia turns what is called image or mask together; nested is what TerraTorch's multimodal models take. Invalid
    pixels are 0; a sensor that a sample lacks is 0 and invalid everywhere. Samples lie as their georeference says.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        sensors: Sequence[str] = (),
        images: Layout = "concatenated",
        normalise: Normalisation | None = None,
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Open a dataset; where its samples lie takes some 60 bytes of memory for each.

        Args:
            root: folder with manifest.parquet and dataset.json, local or s3://.
            split: train, val or test of the manifest; None takes all samples.
            sensors: which, in this order; all when empty.
            images: how images are named, see above.
            normalise: by clip `range` or by `statistics` of the contract; None gives values in their units.
            transforms: of a sample, the last step.

        Raises:
            ValueError: another layout or normalisation.
            ManifestError: no dataset there, or nothing in this split.
            ContractError: an unknown sensor, or no statistics.
        """
        if images not in LAYOUTS:
            raise ValueError(f"images: {images!r} is not one of {', '.join(LAYOUTS)}")
        if normalise not in (None, "range", "statistics"):
            raise ValueError(f"normalise: {normalise!r} is not one of None, range, statistics")
        self.selection = select(str(root), modalities=sensors, where={"split": [split]} if split else None)
        self.contract = self.selection.contract
        if normalise:
            self.contract = self.contract.normalised(normalise)
        self.images, self.normalised, self.transforms = images, normalise is not None, transforms
        self._places = self.selection.rows(["crs", "transform"])
        self._own: tuple[int, Reader] | None = None

    def __len__(self) -> int:
        return len(self.selection)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: it opens its own files."""
        return self.__dict__ | {"_own": None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` of the manifest's order, 0 to len - 1.

        Raises:
            IndexError: there is none.
            StreamError: it cannot be read, or differs from its checksum.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}; they are counted from 0")
        found = self._reader().sample(0, index)
        sample = {"key": found.key, **self._place(index, *next(iter(found.tiles.values())).valid.shape)}
        sample |= self._images(found.tiles)
        if classes := self.contract.classes:
            size = next(iter(found.tiles.values())).valid.shape
            label = np.full(size, classes.ignore, np.uint8) if found.label is None else found.label
            sample["mask"] = torch.from_numpy(label.astype(np.int64))
        return self.transforms(sample) if self.transforms else sample

    def _reader(self) -> Reader:
        """This process's: processes that were forked share the position in an open file."""
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), Reader(deepcopy(self.selection), Reading())
        return self._own[1]

    def _place(self, index: int, height: int, width: int) -> dict[str, Any]:
        crs, transform = (self._places[name][index].as_py() for name in ("crs", "transform"))
        grid = Grid(tuple(transform or PIXELS), height, width, crs)
        x, y = zip(*grid.corners(), strict=True)
        bounds = torch.tensor([min(x), min(y), max(x), max(y)], dtype=torch.float64)
        return {"crs": crs or "", "transform": torch.tensor(grid.transform, dtype=torch.float64), "bounds": bounds}

    def _images(self, tiles: Mapping[str, Tile]) -> dict[str, Any]:
        values = {m.sensor: self._values(tiles[m.sensor], m) for m in self.contract.modalities}
        valid = {name: torch.from_numpy(tiles[name].valid) for name in values}
        if self.images == "nested":
            return {"image": values, "valid": valid}
        if self.images == "separate":
            named = {f"image_{name}": image for name, image in values.items()}
            return {**named, **{f"mask_valid_{name}": mask for name, mask in valid.items()}}
        return {"image": torch.cat([*values.values()]), "mask_valid": torch.stack([*valid.values()])}

    def _values(self, tile: Tile, modality: Modality) -> Tensor:
        """[C, H, W], 0 where invalid."""
        if self.normalised:
            return torch.from_numpy(normalise(tile, modality))
        return torch.from_numpy(np.where(tile.valid, tile.values, 0).astype(np.float32))

    def plot(self, sample: Mapping[str, Any], show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Every sensor of a sample in colour, its mask, and its `prediction` int [H, W] if it has one, side by side.

        A notebook shows the figure; `savefig` writes it. It is none of pyplot's, so none has to be closed.
        """
        panels = {m.sensor: self._picture(sample, m) for m in self.contract.modalities}
        if self.contract.classes:
            for name in ("mask", "prediction"):
                if name in sample:
                    panels[name] = coloured(sample[name].cpu().numpy(), self.contract.classes)
        figure = Figure(figsize=(3 * len(panels), 3.3), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (name, image) in zip(axes, panels.items(), strict=True):
            place.imshow(image, interpolation="nearest")
            place.axis("off")
            if show_titles:
                place.set_title(name)
        if suptitle is not None:
            figure.suptitle(plain(suptitle))
        return figure

    def _picture(self, sample: Mapping[str, Any], modality: Modality) -> Picture:
        values, valid = (part.cpu().numpy() for part in self._part(sample, modality.sensor))
        if self.normalised:
            offset, scale = (np.asarray(numbers)[:, None, None] for numbers in (modality.offset, modality.scale))
            values = values * scale + offset
        return picture(modality, values, valid.astype(np.bool_))

    def _part(self, sample: Mapping[str, Any], sensor: str) -> tuple[Tensor, Tensor]:
        """One sensor's image [C, H, W] and validity [H, W] out of a sample."""
        if self.images == "nested":
            return sample["image"][sensor], sample["valid"][sensor]
        if self.images == "separate":
            return sample[f"image_{sensor}"], sample[f"mask_valid_{sensor}"]
        number, channels = self.contract.sensors.index(sensor), list(self.contract.channels.values())
        return sample["image"].split(channels)[number], sample["mask_valid"][number]


try:
    from torchgeo.datasets import NonGeoDataset
except ModuleNotFoundError:
    pass
else:
    NonGeoDataset.register(ShardDataset)
