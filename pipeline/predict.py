"""Stage predict: a finetuned checkpoint and the scenes of places to land-cover maps.

A map is made block by block. The windows that touch a block are read and classified, their overlapping probabilities
are blended in integers (`mosaic.py`), and the block is written into a work folder beside the map. Blocks do not depend
on each other, so several processes can share them, and a killed one goes on with those that are not there. When all
are, they are joined (`map_products.py`). Memory is that of one block, whatever the size of the scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline import checkpoint, ranks
from pipeline.batch import Batch
from pipeline.checkpoint import Checkpoint
from pipeline.dataset import micro_batches, read_ahead
from pipeline.map_plan import Plan, Request, begun, opened, proposed, requests, settle
from pipeline.map_products import Products
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.mosaic import ONE, Seen, blend
from pipeline.predict_config import PredictConfig
from pipeline.provenance import code_version
from pipeline.scoring import classify
from pipeline.signals import Stopped, StopRequest
from shards.contract import Classes, Contract, ContractError
from shards.grid import Grid, Window
from shards.sample import Sample, Tile
from shards.tile import OpenScene, read_tile

ON_CPU = 4  # windows per forward
LARGEST = 64  # windows per forward on a GPU
THREADS = 2  # that normalise windows
AHEAD = 2  # batches that are read and normalised while the model computes

# Axes along which a window is mirrored before the model, and its probabilities after it.
Views = tuple[tuple[int, ...], ...]
PLAIN: Views = ((),)
TURNED: Views = ((-2, -1),)
FLIPS: Views = ((), (-1,), (-2,), (-2, -1))


def predict(config: PredictConfig) -> Path | str:
    """Map the scenes as configured, or this part of the work. Several ranks share it.

    Returns:
        `config.out`: the map, or with a catalog the folder of maps. Of a part the map need not be there yet: when all
        parts are done, the same config with part=1/1 joins them.

    Raises:
        ContractError: the checkpoint has no classes, the scenes are not what it is made for, or a work folder holds
            blocks of another map.
        SceneError: a file cannot be used, or the scenes do not overlap.
        ConfigError: no scene is given, or outlines are wanted that cannot be.
        SensorError: a scene of a sensor that the model does not know.
        ArchiveError: the catalog cannot be used.
        Stopped: a signal asked for it; blocks that are finished stay.
    """
    place = ranks.from_environment()
    ranks.init(place)
    network = Network(_source(config), config)
    part, parts = map(int, config.part.split("/"))
    share = Portion(part, parts, place.rank, place.world)
    with StopRequest() as stop:
        for request in requests(config, network.source.contract):
            with opened(request) as scenes:
                plan = proposed(request, scenes, network.source, config)
                products = Products(request, plan, network.classes, config)
                if products.finished():
                    continue
                plan = settle(request, scenes, plan, network.source, config, lambda: network.fitting)
                products = replace(products, plan=plan)
                whole = _blocks(products, scenes, network, share, stop)
            if ranks.agree(not whole):
                raise Stopped(f"{request.out}: stopped; its finished blocks stay, the same command goes on with them")
            if parts == 1 and place.rank == 0:
                products.write(_facts(request, network.source))
    return config.out if "://" in config.out else Path(config.out)


def unfinished_parts(config: PredictConfig, count: int) -> list[int]:
    """Which of the parts k = 1 ... `count` have something left to do. Reads the headers of all scenes.

    Raises:
        As `predict`.
    """
    network = Network(_source(config), config)
    left: set[int] = set()
    for request in requests(config, network.source.contract):
        with opened(request) as scenes:
            plan = proposed(request, scenes, network.source, config)
        products = Products(request, plan, network.classes, config)
        if not products.finished():
            begun(request, plan, config)
            numbers = range(len(plan.layout.blocks()))
            left |= {part_of(request, number, count) for number in numbers if not products.block(number).exists()}
    return sorted(left)


def part_of(request: Request, block: int, parts: int) -> int:
    """The part, from 1, that makes a block; maps begin at different parts, since small ones have a single block."""
    return (request.number + block) % parts + 1


@dataclass(frozen=True)
class Portion:
    """What one rank makes: every `world`-th block of a part."""

    part: int
    parts: int
    rank: int
    world: int

    def takes(self, request: Request, block: int) -> bool:
        """Whether a block of a map is in this share."""
        mine = block // self.parts % self.world == self.rank
        return mine and part_of(request, block, self.parts) == self.part


def _source(config: PredictConfig) -> Checkpoint:
    source = checkpoint.find(config.checkpoint)
    if source.contract.classes is None:
        raise ContractError(f"{source.address} has no classes: finetune it first")
    return source


def _facts(request: Request, source: Checkpoint) -> dict[str, Any]:
    """Where a map comes from, for MAP.json."""
    scenes = {scene.sensor: [asset.path for asset in scene.assets] for scene in request.place.scenes}
    return {"checkpoint": source.address, "scenes": scenes, "version": code_version()}


def _blocks(
    products: Products, scenes: Mapping[str, OpenScene], network: Network, share: Portion, stop: StopRequest
) -> bool:
    """Makes the blocks of this share that are not there; whether it came to its end."""
    todo = [
        (number, block)
        for number, block in enumerate(products.plan.layout.blocks())
        if share.takes(products.request, number) and not products.block(number).exists()
    ]
    pixels = sum(block.height * block.width for _, block in todo)
    done = 0
    with tqdm(total=pixels, desc=products.request.place.name, unit="px", unit_scale=True, disable=None) as bar:
        for number, block in todo:
            windows = len(products.plan.layout.windows(block))
            seen = _told(_seen(products.plan, block, scenes, network), stop, bar, block.height * block.width / windows)
            values = blend(block, products.plan.layout, seen, len(network.classes.names), network.one)
            if stop.requested:
                return False
            products.keep(number, block, values)
            done += block.height * block.width
            bar.update(done - bar.n)
    return True


def _told(seen: Iterable[Seen], stop: StopRequest, bar: Any, pixels: float) -> Iterator[Seen]:
    """The windows up to a request to stop; moves the bar by so many pixels for each."""
    for item in seen:
        if stop.requested:
            return
        bar.update(pixels)
        yield item


def _seen(plan: Plan, block: Window, scenes: Mapping[str, OpenScene], network: Network) -> Iterator[Seen]:
    """What the model says of the windows of a block, in their order; those without a valid pixel are left out."""
    windows = plan.layout.windows(block)
    contract = network.source.contract.restrict(list(scenes))
    samples = _samples(scenes, plan.layout.grid, windows)
    for batch in read_ahead(micro_batches(samples, plan.micro_batch, contract, threads=THREADS), AHEAD):
        probabilities = network(batch)  # [B, K, S, S]
        coverage = [valid.numpy().astype(np.uint8) << bit for bit, valid in enumerate(batch.valid.values())]
        bits = np.bitwise_or.reduce(coverage)  # [B, S, S]
        for number, values, seen in zip(batch.positions.tolist(), probabilities, bits, strict=True):
            yield windows[number], values, seen


def _samples(scenes: Mapping[str, OpenScene], grid: Grid, windows: Sequence[Window]) -> Iterator[tuple[Sample, int]]:
    """The windows with a valid pixel, and their numbers. A row of windows is read as one piece."""
    rows: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        rows.setdefault(window.row, []).append(number)
    for numbers in rows.values():
        outer = Window.around([windows[number] for number in numbers])
        read = {name: read_tile(scene, grid.window(outer)) for name, scene in scenes.items()}
        for number in numbers:
            cut = windows[number].within(outer)
            tiles = {name: Tile(tile.values[:, *cut], tile.valid[cut]) for name, tile in read.items()}
            if any(tile.valid.any() for tile in tiles.values()):
                yield Sample(f"window-{number}", tiles), number


class Network:
    """The model of a checkpoint, built when it is first asked.

    Args:
        source: the checkpoint, which has classes.
        config: how it is asked.
    """

    def __init__(self, source: Checkpoint, config: PredictConfig) -> None:
        self.source, self._config = source, config
        self._views = FLIPS if config.flips else TURNED if config.turn else PLAIN
        self._device = ranks.device(ranks.from_environment())
        self.one = ONE * len(self._views)  # what stands for a probability of 1

    @property
    def classes(self) -> Classes:
        """Of the map."""
        assert self.source.contract.classes is not None
        return self.source.contract.classes

    @cached_property
    def _model(self) -> MCFMamba:
        return self.source.build().to(self._device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> NDArray[np.int32]:
        """Probabilities [B, K, S, S] of a batch as integers of which `one` is 1."""
        batch = batch.to(self._device)
        total: Tensor | int = 0
        for axes in self._views:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
                logits = classify(self._model, _mirrored(batch, axes))
            total = total + (logits.float().softmax(1) * ONE).round().to(torch.int32).flip(axes)
        assert isinstance(total, Tensor)
        return total.cpu().numpy()

    @cached_property
    def fitting(self) -> int:
        """Windows per forward that the device has memory for."""
        if self._device.type != "cuda":
            return ON_CPU
        size = LARGEST
        while size > 1:
            try:
                self(_blank(self.source.contract, size, self._config.window))
                return size
            except torch.OutOfMemoryError:
                size //= 2
                torch.cuda.empty_cache()
        return size


def _mirrored(batch: Batch, axes: tuple[int, ...]) -> Batch:
    if not axes:
        return batch
    values, valid = ({name: t.flip(axes) for name, t in part.items()} for part in (batch.values, batch.valid))
    return replace(batch, values=values, valid=valid)


def _blank(contract: Contract, count: int, side: int) -> Batch:
    """A batch of the model's largest input."""
    values = {name: torch.zeros(count, bands, side, side) for name, bands in contract.channels.items()}
    valid = {name: torch.ones(count, side, side, dtype=torch.bool) for name in contract.sensors}
    return Batch(values, valid, None, torch.arange(count), [str(number) for number in range(count)])
