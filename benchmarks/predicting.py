"""Predicting: time and peak memory of a map by the size of its scene, with a network that costs next to nothing.

What is measured is all but the network: reading windows, normalising them, blending, blocks, overviews, picture. Every
row runs in a process of its own, so that its peak of memory is its own. Only by name: `python -m benchmarks predicting`
writes up to 2 GB of made-up scenes into the folder for temporary files and takes half an hour.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import configs
from benchmarks.training import in_new_process, peak
from pipeline.checkpoint import MODEL, Checkpoint
from pipeline.engine import State
from shards.contract import Classes, Contract, Modality
from shards.grid import Grid, Window
from shards.raster_io import write_parts

SIDES = (2_000, 5_000, 10_000, 20_000)
BANDS = ("R", "G", "B", "NIR")
CLASSES = Classes(names=("a", "b", "c", "d"), palette=((0, 0, 0), (90, 0, 0), (0, 90, 0), (0, 0, 90)))
PIECE = 1024  # pixels along a side of what is written of a scene at once


def run() -> None:
    """A row per size."""
    print("\nMaps of made-up scenes, 4 bands of uint8, blocks of 4,096 pixels, a network of one sum; a process each")
    for side in SIDES:
        seconds, computing, memory = in_new_process(_measure, side)
        speed = side**2 / computing / 1e6
        print(
            f"  {side:6,d} px on a side {seconds:8.1f} s, {computing:7.1f} s of a core ({speed:.2f} Mpx/s)"
            f" {memory:9.1f} MiB at most",
            flush=True,
        )


def _measure(side: int) -> tuple[float, float, float]:
    """Seconds, seconds of a core, and the highest memory of this process in MiB."""
    from pipeline.predict import predict

    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        scene = Path(name) / "scene.tif"
        grid = Grid((0.5, 0.0, 500000.0, 0.0, -0.5, 5300000.0), side, side, "EPSG:32633")
        write_parts(scene, grid, _pieces(side), descriptions=BANDS)
        raw = {"stage": "predict", "checkpoint": "none", "scene": {"rgbnir": str(scene)}, "out": f"{name}/map.tif"}
        with (
            mock.patch("pipeline.predict.checkpoint.find", return_value=_source()),
            mock.patch.object(Checkpoint, "build", return_value=Bands()),
        ):
            start, computed = time.perf_counter(), time.process_time()
            predict(configs.parse(raw))
            return time.perf_counter() - start, time.process_time() - computed, peak()


def _pieces(side: int) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
    """Fields of noise."""
    rng = np.random.default_rng(0)
    for row in range(0, side, PIECE):
        for col in range(0, side, PIECE):
            window = Window(row, col, min(PIECE, side - row), min(PIECE, side - col))
            fields = rng.integers(1, 200, (4, window.height // 64 + 1, window.width // 64 + 1), np.uint8)
            image = fields.repeat(64, 1).repeat(64, 2)[:, : window.height, : window.width]
            yield window, image + rng.integers(0, 40, image.shape, np.uint8)


def _source() -> Checkpoint:
    many = len(BANDS)
    modality = Modality(
        sensor="rgbnir", bands=BANDS, unit="digital number", dtype="uint8", clip=(0.0, 2047.0), offset=(0.0,) * many,
        scale=(255.0,) * many,
    )  # fmt: skip
    contract = Contract(modalities=(modality,), classes=CLASSES, resolution=0.5)
    return Checkpoint("none", {"contract": contract.to_json(), "files": {MODEL: "none"}}, State({}, {}, 0))


class Bands(nn.Module):
    """A network whose classes are the bands."""

    def forward(self, images: Mapping[str, Tensor], hidden: object) -> Tensor:
        """Logits [B, 4, H, W]."""
        return 10 * images["rgbnir"]
