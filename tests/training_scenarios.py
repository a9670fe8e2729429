"""Short pretraining runs under one launch of several ranks; tests/test_engine.py starts it and compares the losses.

`python -m tests.training_scenarios FOLDER` expects FOLDER/data; each run lands in FOLDER/NAME. With two ranks most of
them are made, with four the rest.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed

import configs
from pipeline import loop
from pipeline import pretrain as pretrain_stage
from pipeline.pretrain import pretrain
from pipeline.ranks import from_environment
from pipeline.signals import Stopped
from tests.fake_stages import quietly

STEPS, STOP, GLOBAL_BATCH = 5, 3, 4
EMA = 0.9
POISON = 11


def config(folder: Path, run: str, **changes: Any) -> Any:
    """Pretraining of the smallest network on FOLDER/data."""
    raw = {
        "stage": "pretrain",
        "run": str(folder / run),
        "data": str(folder / "data"),
        "model": {"dims": [8, 16], "depths": [1, 1], "drop_path": 0.2},
        "batch": {"global_batch": GLOBAL_BATCH},
        "optim": {"lr": 3e-3, "warmup_samples": 8, "ema": EMA},
        "modality_dropout": 0.3,
        "steps": STEPS,
        "checkpoint_every": 100,
    }
    return configs.parse({**raw, **changes})


def stop_after(settings: Any, step: int) -> None:
    """Run until the ranks agree, after `step` steps, that a signal has come."""
    answers = iter([False] * (step - 1) + [True])
    with mock.patch.object(loop, "agree", lambda flag: next(answers)):
        try:
            pretrain(settings)
        except Stopped:
            return
    raise AssertionError("the run was not stopped")


def poisoned(original: Any, positions: set[int]) -> Any:
    """`pipeline.pretrain.objective`, with a loss of NaN for the samples at these positions."""

    def objective(*arguments: Any) -> Any:
        inner = original(*arguments)

        def losses(model: Any, batch: Any) -> Any:
            found = inner(model, batch)
            bad = torch.tensor([position in positions for position in batch.positions.tolist()])
            return found._replace(total=torch.where(bad, float("nan"), found.total))

        return losses

    return objective


def copy(source: Path, target: Path) -> None:
    """Copy a run folder once all ranks are done with it, before any goes on."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, target)
    torch.distributed.barrier()


def two(folder: Path) -> None:
    """Runs of two ranks."""
    pretrain(config(folder, "whole"))
    pretrain(config(folder, "accumulated", batch={"global_batch": GLOBAL_BATCH, "micro_batch": 1}))
    for zero in (0, 2, 3):
        pretrain(config(folder, f"zero{zero}", engine={"zero": zero, "recompute": zero != 2}))
    stop_after(config(folder, "resumed"), STOP)
    for name in ("zero0-from-1", "zero3-from-1", "alone-from-two", "four-from-two"):
        copy(folder / "resumed", folder / name)
    pretrain(config(folder, "resumed"))
    pretrain(config(folder, "zero0-from-1", engine={"zero": 0}))
    stop_after(config(folder, "zero3-from-1", engine={"zero": 3}), 1)  # once more, so that ZeRO 3 writes one too
    pretrain(config(folder, "zero3-from-1", engine={"zero": 3}))
    pretrain(config(folder, "bf16", engine={"precision": "bf16"}))
    # The second micro-batch of rank 1 in step 3, after two ranks have made gradients of the first.
    with mock.patch("pipeline.pretrain.objective", poisoned(pretrain_stage.objective, {POISON})):
        for zero in (0, 1, 2, 3):
            batch = {"global_batch": GLOBAL_BATCH, "micro_batch": 1}
            pretrain(config(folder, f"poisoned{zero}", engine={"zero": zero}, batch=batch))


def four(folder: Path) -> None:
    """Runs of four ranks."""
    pretrain(config(folder, "four"))
    pretrain(config(folder, "four-from-two", engine={"zero": 3}))


def main(folder: Path) -> None:
    """The runs for as many ranks as there are, without what would take longer than they do."""
    with quietly(), mock.patch("pipeline.pretrain.pictures", lambda *_: lambda line: {}):
        {2: two, 4: four}[from_environment().world](folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent")
    main(parser.parse_args().folder)
