"""What surviving and seeing cost: steps of the training loop against a bare one, on the same batches in memory.

Bare: forward, loss, backward, update, nothing else. The loop adds what every run has: the judgement of each loss by all
ranks before its backward, digests, sums over ranks, watchdog, metrics.jsonl, TensorBoard, console, I/O ledger, MFU, the
agreement on signals, the profiler's marks. Each way is timed step by step, eight at a time and in turn. The report page
is not in it: it takes a hundredth of the time by its own rule.

`python -m benchmarks.overhead FOLDER --parent PID` is a rank.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import configs
from benchmarks.reading_data import tiles, write_dataset

PIXELS, STEPS = 128, 8
SIZES = {"nano": (16, 6), "tiny": (2, 3)}  # global batch and rounds
PROCESSES = (1, 2)


def run() -> None:
    """A table."""
    from launchers.local import launch

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", tiles(), "blosc2-lz4", 32)
        print(f"\nA step of {PIXELS} x {PIXELS}, medians of single steps, the two ways in turn")
        for size, (count, rounds) in SIZES.items():
            for processes in PROCESSES:
                work = folder / f"{size}-{processes}"
                work.mkdir()
                raw = {"stage": "pretrain", "run": str(work / "run"), "data": str(folder / "data"), "crop": PIXELS}
                raw |= {"model": {"size": size}, "batch": {"global_batch": count}, "steps": STEPS}
                (work / "config.yaml").write_text(configs.dump(configs.parse(raw)))
                (work / "rounds").write_text(str(rounds))
                threads = {"OMP_NUM_THREADS": str(2 // processes)}
                quiet = io.StringIO()
                with mock.patch.dict(os.environ, threads), redirect_stdout(quiet), redirect_stderr(quiet):
                    code = launch(["benchmarks.overhead", str(work)], processes, work / "logs")
                if code:
                    raise RuntimeError(f"{work.name} failed: {(work / 'logs/rank-0.log').read_text()[-2000:]}")
                _print(f"{size}, batch {count}, {processes} process{'es' * (processes > 1)}", work)


def _print(what: str, work: Path) -> None:
    bare, whole = (json.loads((work / "seconds.json").read_text())[way] for way in ("bare", "whole"))
    medians = statistics.median(bare), statistics.median(whole)
    spread = f"{min(bare) * 1e3:.1f} to {max(bare) * 1e3:.1f}"
    print(
        f"  {what:<30} bare {medians[0] * 1e3:8.1f} ms ({spread})  loop {medians[1] * 1e3:8.1f} ms  "
        f"overhead {100 * (medians[1] / medians[0] - 1):5.1f} %  load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def rank(work: Path) -> None:
    """Time both ways; rank 0 writes what it found."""
    from pipeline import loop, pretrain

    config, rounds = configs.load(work / "config.yaml"), int((work / "rounds").read_text())
    train, seconds = loop.train, {"bare": list[float](), "whole": list[float]()}

    def both(made: Any, engine: Any, objective: Any, batches: Any, start: int, hooks: Any) -> None:
        kept = list(itertools.islice(batches, 4 * engine.accumulation))
        _bare(engine, objective, kept)
        for number in range(rounds):
            folder = work / f"run-{number}"
            folder.mkdir(exist_ok=True)
            again = replace(made, folder=folder, config=replace(made.config, run=str(folder)))
            moments: list[float] = []
            watch = [lambda line, moments=moments: moments.append(time.perf_counter()) or {}, *hooks[2:-1]]
            train(again, engine, objective, itertools.cycle(kept), start, watch)
            # From hook to hook; not the last, after which a checkpoint is written.
            seconds["whole"] += [after - before for before, after in itertools.pairwise(moments)]
            seconds["bare"] += _bare(engine, objective, kept)

    with mock.patch.object(pretrain, "train", both):
        pretrain.pretrain(config)
    if os.environ["RANK"] == "0":
        (work / "seconds.json").write_text(json.dumps(seconds))


def _bare(engine: Any, objective: Any, batches: list[Any]) -> list[float]:
    """Seconds of each of so many steps."""
    seconds = []
    for _, batch in zip(range(STEPS - 1), itertools.cycle(batches), strict=False):
        began = time.perf_counter()
        engine.backward(objective(engine, batch.to(engine.device)).total.mean())
        engine.step(1e-4)
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent")
    rank(parser.parse_args().folder)
