"""Short pretraining runs under one launch of several ranks; tests/test_engine.py starts it and compares the losses.

`python -m tests.training_scenarios FOLDER` expects FOLDER/data; each run lands in FOLDER/NAME-<ranks>.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed

import configs
from pipeline import loop, ranks
from pipeline.pretrain import pretrain
from pipeline.signals import Stopped

STEPS, STOP, GLOBAL_BATCH = 6, 3, 4


def config(folder: Path, run: str, **changes: Any) -> Any:
    """Pretraining of the smallest network on FOLDER/data."""
    raw = {
        "stage": "pretrain",
        "run": str(folder / run),
        "data": str(folder / "data"),
        "model": {"dims": [8, 16], "depths": [1, 1], "drop_path": 0.2},
        "batch": {"global_batch": GLOBAL_BATCH},
        "optim": {"lr": 1e-2, "warmup_samples": 8},
        "steps": STEPS,
        "checkpoint_every": 100,
    }
    return configs.parse({**raw, **changes})


def stop_after(settings: Any, step: int) -> None:
    """Run until a signal would have been agreed upon after `step` steps."""
    answers = iter([False] * (step - 1) + [True])
    with mock.patch.object(loop, "agree", lambda flag: next(answers)):
        try:
            pretrain(settings)
        except Stopped:
            return
    raise AssertionError("the run was not stopped")


def copy(source: Path, target: Path) -> None:
    """Copy a run folder once all ranks are done with it, before any goes on."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, target)
    torch.distributed.barrier()


def main(folder: Path) -> None:
    """All runs of this number of ranks."""
    world = ranks.from_environment().world
    pretrain(config(folder, f"whole-{world}"))
    pretrain(config(folder, f"accumulated-{world}", batch={"global_batch": GLOBAL_BATCH, "micro_batch": 1}))
    for zero in (0, 2, 3):
        pretrain(config(folder, f"zero{zero}-{world}", engine={"zero": zero}))
    stop_after(config(folder, f"resumed-{world}"), STOP)
    for name, zero in (("zero1to3", 3), ("zero1to0", 0), ("other-world", 1)):
        copy(folder / f"resumed-{world}", folder / f"{name}-{world}")
        if name != "other-world":
            pretrain(config(folder, f"{name}-{world}", engine={"zero": zero}))
    pretrain(config(folder, f"resumed-{world}"))
    pretrain(config(folder, f"bf16-{world}", engine={"precision": "bf16"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent")
    main(parser.parse_args().folder)
