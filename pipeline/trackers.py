"""The numbers of metrics.jsonl for TensorBoard and Weights & Biases; a run that goes on is the same run there.

Nothing here reaches a network unless `track` names wandb, whose own variables (WANDB_MODE=offline, WANDB_PROJECT, ...)
are honoured.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import configs
from configs import ConfigError
from pipeline.run import Run

TENSORBOARD = "tensorboard"  # folder of its files below the run folder
WANDB_ID = "wandb-id"  # beside the checkpoints


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def write(self, numbers: Mapping[str, Any]) -> None:
        """Record a line of metrics.jsonl."""

    def close(self) -> None:
        """Let go of files and connections."""


def trackers(run: Run, start: int) -> list[Tracker]:
    """Those that the config names, for a run that begins after step `start`.

    Raises:
        ConfigError: wandb is named and not installed.
    """
    kinds: Mapping[str, Callable[[Run, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    return [kinds[name](run, start) for name in run.config.track]


def scalars(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a line, those of a mapping in it by NAME/KEY."""
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


class _TensorBoard:
    def __init__(self, run: Run, start: int) -> None:
        from tensorboardX import SummaryWriter

        # What TensorBoard has of later steps, from before a kill, it will not show. Files are named by the second.
        folder, suffix = str(run.folder / TENSORBOARD), f".step-{start:08d}"
        self._writer = SummaryWriter(folder, purge_step=start + 1, filename_suffix=suffix)

    def write(self, numbers: Mapping[str, Any]) -> None:
        for name, value in scalars(numbers):
            if name != "step":
                self._writer.add_scalar(name, value, numbers["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Run, start: int) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "track: wandb is not installed here; pip install 'mcf-mamba[wandb]', or write track=[tensorboard]"
            ) from None
        settings = configs.to_dict(run.config)
        name = Path(run.config.run).name
        folder = str(run.folder)
        self._run = wandb.init(id=_identity(run), resume="allow", name=name, dir=folder, config=settings)

    def write(self, numbers: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(numbers)), step=numbers["step"])

    def close(self) -> None:
        self._run.finish()


def _identity(run: Run) -> str:
    """The id of this run, made when it first began."""
    if not run.store.exists(WANDB_ID):
        run.store.put(WANDB_ID, uuid.uuid4().hex[:12].encode())
    return run.store.get(WANDB_ID).decode()
