"""What every training stage tells of itself, around what it alone has to tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from pipeline.average import full_shape
from pipeline.dataset import traffic
from pipeline.engine import Engine
from pipeline.flops import utilisation
from pipeline.profiling import profiler
from pipeline.provenance import code_version
from pipeline.report import reporter
from pipeline.run import Run
from shards.stream import Stream

if TYPE_CHECKING:
    from pipeline.loop import Hook
    from pipeline.model.mcf_mamba import MCFMamba


def observed(run: Run, engine: Engine, stream: Stream, start: int, hooks: Sequence[Hook]) -> list[Hook]:
    """A stage's own hooks, after the profiler, before I/O, MFU and, last, the page that shows them all. Collective."""
    config = run.config
    height, width = next(iter(stream.row(0).tiles.values())).valid.shape
    pixels = (config.crop, config.crop) if config.crop else (height, width)
    return [
        profiler(run, start),
        *hooks,
        traffic(stream),
        utilisation(engine, pixels, config.engine.precision),
        reporter(run, about(run, engine, len(stream.selection))),
    ]


def about(run: Run, engine: Engine, samples: int) -> dict[str, object]:
    """What the page of a run says of it as a whole."""
    config, model = run.config, cast("MCFMamba", engine.module)
    numbers = sum(full_shape(parameter).numel() for parameter in model.parameters())
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    batch = f"{config.batch.global_batch} = {run.ranks.world} x {engine.micro_batch} x {engine.accumulation}"
    return {
        "run": config.run,
        "data": config.data,
        "samples": samples,
        "modalities": ", ".join(f"{name} ({bands})" for name, bands in model.channels.items()),
        "parameters": numbers,
        "device": device,
        "batch = ranks x micro-batch x accumulation": batch,
        "engine": f"ZeRO {config.engine.zero}, {config.engine.precision}, scan {model.scan_backend}",
        "version": code_version(),
    }
