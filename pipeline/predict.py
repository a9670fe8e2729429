"""Stage predict: a finetuned checkpoint and the scenes of one place to a land-cover map on the scene's own grid.

The scene is read in overlapping windows, row by row. The probabilities of a window are rounded to integers and added,
with integer weights that fall towards the window's edge, into a strip as high as one window; when the windows move on,
the rows that no later window touches are finished. Sums of integers do not depend on their order, so neither does the
map, and a constant 1 blends to exactly 1. Memory grows with the width of the scene, not with its height.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from configs import ConfigError
from pipeline import checkpoint
from pipeline.batch import collate
from pipeline.checkpoint import Checkpoint
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.predict_config import PredictConfig
from pipeline.ranks import device, from_environment
from pipeline.scoring import classify
from shards.contract import Contract, ContractError
from shards.grid import Grid, Window
from shards.raster_io import to_cog, write_geotiff
from shards.sample import Sample, Tile
from shards.scene import Asset, Scene, SceneError
from shards.sensors import match
from shards.tile import OpenScene, open_scene, overlaps, read_tile

ONE = 1 << 16  # a probability of 1, as an integer
NODATA = 255

Ints = NDArray[np.int64]


def predict(config: PredictConfig) -> Path:
    """Map the scenes as configured.

    Returns:
        The map: uint8 Cloud-Optimised GeoTIFF on the grid of the model's first modality among the scenes, class
        indices with palette and names, 255 where no modality is valid.

    Raises:
        ContractError: the checkpoint has no classes, or the scene's pixels are of another size than it was trained on.
        SceneError: a file cannot be used, or the scenes do not overlap.
        ConfigError: no scene is given.
        SensorError: a scene of a sensor that the model does not know.
    """
    source = checkpoint.find(config.checkpoint)
    if source.contract.classes is None:
        raise ContractError(f"{source.address} has no classes: finetune it first")
    if not config.scene:
        raise ConfigError(f"scene: none given; the model takes {', '.join(source.contract.sensors)}")
    paths = {match(name, source.contract.sensors): path for name, path in config.scene.items()}
    contract = source.contract.restrict([name for name in source.contract.sensors if name in paths])
    target = Path(config.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scenes = {
            name: stack.enter_context(open_scene(Scene(name, (Asset(paths[name]),)))) for name in contract.sensors
        }
        grid = _common_grid(scenes, contract)
        classes = np.full((grid.height, grid.width), NODATA, np.uint8)
        for row, strip in _strips(source, scenes, contract, grid, config):
            classes[row : row + strip.shape[0]] = strip
    _write(target, classes, grid, source.contract)
    return target


def _common_grid(scenes: Mapping[str, OpenScene], contract: Contract) -> Grid:
    """The grid of the first scene, after checking that the others meet it and that its pixels are of the right size."""
    (_, first), *others = scenes.items()
    for name, other in others:
        if not overlaps(first.grid, other.grid):
            raise SceneError(other.scene.path, f"{name} does not overlap {first.scene.path}")
    metres = first.grid.resolution
    if contract.resolution and abs(metres / contract.resolution - 1) > 0.05:
        raise ContractError(
            f"{first.scene.path} has pixels of {metres:g}, the model was trained at {contract.resolution:g} m; "
            "warp the scene to that resolution first"
        )
    return first.grid


def _strips(
    source: Checkpoint, scenes: Mapping[str, OpenScene], contract: Contract, grid: Grid, config: PredictConfig
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Finished rows of the map from top to bottom, each with the row it begins at."""
    where = device(from_environment())
    model = source.build().to(where)
    size, stride = config.window, config.window - config.overlap
    weight = _weight(size)
    windows = list(grid.windows(size, stride))
    sums: Ints = np.zeros((model.outputs, size, windows[-1].col + size), np.int64)  # [K, window, width]
    seen = np.zeros(sums.shape[1:], np.bool_)
    with tqdm(total=len(windows), desc="predict", unit="window", disable=None) as bar:
        for row, line in groupby(windows, key=lambda window: window.row):
            for part in _chunks(list(line), config.micro_batch):
                for window, probabilities, valid in _classify(model, scenes, contract, grid, part):
                    columns = slice(window.col, window.col + size)
                    sums[:, :, columns] += probabilities * weight
                    seen[:, columns] |= valid
                bar.update(len(part))
            done = size if row == windows[-1].row else stride
            height = min(done, grid.height - row)
            strip = np.where(seen[:height], sums[:, :height].argmax(0), NODATA).astype(np.uint8)
            yield row, strip[:, : grid.width]
            sums = np.concatenate([sums[:, done:], np.zeros_like(sums[:, :done])], axis=1)
            seen = np.concatenate([seen[done:], np.zeros_like(seen[:done])])


def _chunks(windows: list[Window], size: int) -> Iterator[list[Window]]:
    return (windows[i : i + size] for i in range(0, len(windows), size))


def _weight(size: int) -> Ints:
    """Integer weights [size, size]: 1 at the window's edge, rising linearly to its middle."""
    ramp = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1
    return np.asarray(np.outer(ramp, ramp), np.int64)


@torch.no_grad()
def _classify(
    model: MCFMamba, scenes: Mapping[str, OpenScene], contract: Contract, grid: Grid, windows: list[Window]
) -> Iterator[tuple[Window, Ints, NDArray[np.bool_]]]:
    """Per window its probabilities in units of 1 / ONE [K, size, size], and where any modality is valid."""
    samples = []
    for number, window in enumerate(windows):
        tiles: dict[str, Tile] = {name: read_tile(scene, grid.window(window)) for name, scene in scenes.items()}
        samples.append((Sample(f"window-{number}", tiles), number))
    batch = collate(samples, contract).to(next(model.parameters()).device)
    probabilities = classify(model, batch).float().softmax(1)
    fixed = (probabilities * ONE).round().long().cpu().numpy()
    valid = torch.stack(list(batch.valid.values())).any(0).cpu().numpy()
    yield from zip(windows, fixed, valid, strict=True)


def _write(target: Path, values: NDArray[np.uint8], grid: Grid, contract: Contract) -> None:
    assert contract.classes is not None
    names = contract.classes.names
    tags = {"classes": json.dumps(dict(enumerate(names)))}
    with TemporaryDirectory(dir=target.parent) as folder:
        plain = Path(folder) / "map.tif"
        write_geotiff(
            plain, values[None], crs=grid.crs, transform=grid.transform, nodata=NODATA,
            descriptions=["class"], colormap=dict(enumerate(contract.classes.palette)),
        )  # fmt: skip
        to_cog(plain, target, tags=tags)
