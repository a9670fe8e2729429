"""The engine: what a checkpoint holds training up for, and one process against two on the same cores.

Tiny, CMSS, made-up images, DeepSpeed with ZeRO 1 and gloo. A checkpoint is its whole state (parameters and moments),
written to the folder for temporary files. "held up" is what training waits for; "written after" is when the file is
there, with its hash, flushed to disk; the steps in between share the cores with the thread that writes.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import configs
from benchmarks.reading_data import tiles, write_dataset
from benchmarks.training import in_new_process

PIXELS, STEPS, ROUNDS, GLOBAL_BATCH = 128, 3, 5, 2
SIZES = {"tiny": GLOBAL_BATCH, "nano": 16}  # and the global batch
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def run() -> None:
    """Two tables."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", tiles(), "blosc2-lz4", 32)
        rows = in_new_process(_stall, str(folder))
        print(f"\nA checkpoint of Tiny, 1 process, steps of {GLOBAL_BATCH} x {PIXELS} x {PIXELS} (medians of {ROUNDS})")
        for what, seconds in rows.items():
            print(f"  {what:<44} {seconds:8.2f} s  {seconds / rows['step']:6.2f} steps", flush=True)
        for size, count in SIZES.items():
            print(f"\n{size}, steps of {count} x {PIXELS} x {PIXELS} by processes (medians of {2 * STEPS})")
            rates = {way: _rate(folder, size, count, *WAYS[way]) for way in WAYS}
            for way, rate in rates.items():
                times = rate / rates["1 process, 1 thread"]
                print(f"  {way:<44} {rate:8.2f} samples/s  {times:5.2f} times the first", flush=True)


def _config(folder: Path, **changes: Any) -> Any:
    raw = {"stage": "pretrain", "run": str(folder / "run"), "data": str(folder / "data"), "model": {"size": "tiny"}}
    batch = {"global_batch": GLOBAL_BATCH}
    how = {"batch": batch, "crop": PIXELS, "steps": 2 * STEPS + 2, "checkpoint_every": 10**6, "keep": 1}
    return configs.parse({**raw, **how, **changes})


def _stall(name: str) -> dict[str, float]:
    """Medians in seconds of a step, and of what a checkpoint adds."""
    found: dict[str, list[float]] = {}

    def watch(step: Callable[[], object], saver: Any) -> None:
        for number in range(ROUNDS):
            _add(found, "step", step)
            _add(found, "held up by a checkpoint", lambda number=number: saver.save(number, {}, False))
            began = time.perf_counter()
            while not saver.written():
                _add(found, "step while one is written", step)
            found.setdefault("written after", []).append(time.perf_counter() - began)

    _train_with(_config(Path(name)), watch)
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def _add(found: dict[str, list[float]], what: str, function: Callable[[], object]) -> None:
    began = time.perf_counter()
    function()
    found.setdefault(what, []).append(time.perf_counter() - began)


def _train_with(config: Any, watch: Callable[[Callable[[], object], Any], None]) -> None:
    """Pretrain as configured, but for the loop, which is `watch`."""
    from pipeline import loop, pretrain
    from pipeline.health import Health
    from pipeline.saving import Saver

    def train(run: Any, engine: Any, objective: Any, batches: Any, start: int, hooks: object) -> None:
        work = loop.Work(run, engine, objective, batches, Health(config.guard))
        for _ in range(2):
            loop.take_step(work, 0)
        saver = Saver(run, engine)
        watch(lambda: loop.take_step(work, 0), saver)
        saver.close()

    with mock.patch.object(pretrain, "train", train):
        pretrain.pretrain(config)


def _rate(folder: Path, size: str, count: int, processes: int, threads: int) -> float:
    """Samples per second, the first two steps left out."""
    from launchers.local import launch

    run = folder / f"{size}-{processes}-{threads}"
    path = folder / f"{run.name}.yaml"
    how = {"model": {"size": size}, "batch": {"global_batch": count}}
    path.write_text(configs.dump(_config(folder, run=str(run), pictures_every=0, **how)))
    environment: Mapping[str, str] = {"OMP_NUM_THREADS": str(threads)}
    with mock.patch.dict(os.environ, environment):
        if launch(["launchers.job", str(path)], processes, run / "logs"):
            raise RuntimeError(f"{run.name} failed, see {run / 'logs'}")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["samples_per_second"] for line in lines[2:])
