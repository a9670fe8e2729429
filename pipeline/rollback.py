"""Going back to the last good checkpoint, and on past the data that were met on the way.

The parameters, moments and average of that checkpoint become the state of the step that failed: positions, learning
rate and masks go on from there as if its samples had been trained on. Where that checkpoint is such a state itself, no
step since has come to a checkpoint of its own, and the run stops for good.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from configs import ConfigError
from pipeline import checkpoint
from pipeline.config import Training
from pipeline.holding import held
from pipeline.run import Run, store_of
from pipeline.signals import Stopped
from pipeline.starts import FORGIVEN, StaysDown, note_end
from shards.store import StoreError

BACK = "rolled_back_to"

T = TypeVar("T", bound=Training)

log = logging.getLogger(__name__)


class RolledBack(Exception):
    """The run has been put back; enter the stage again and it goes on."""


class NotTraining(ArithmeticError):
    """The run meets values that it cannot be trained on, again and again; the last good checkpoint is untouched."""


def last_good(run: Run) -> tuple[int, bool] | None:
    """The step of the newest checkpoint written while steps were trained on, and whether it is one put back already."""
    for found in checkpoint.facts_of_all(run.store):
        line = found.get("metrics", {})
        if "skipped" not in line or BACK in line:
            return int(found["step"]), BACK in line
    return None


def put_back(run: Run, to: int, line: Mapping[str, Any]) -> None:
    """Write the state of checkpoint `to` as that of the step of this line of metrics.jsonl. On rank 0."""
    store = run.store
    good = checkpoint.load(f"{store.url}/{checkpoint.name_of(to)}")
    batch = run.config.batch.global_batch
    facts = {**good.facts, "step": line["step"], "position": line["step"] * batch, "metrics": dict(line)}
    checkpoint.save(store, good.state, facts)


def until_done(stage: Callable[[T], Path], config: T, rank: int) -> Path:
    """Run a stage, again after each roll back; how it ends otherwise is noted for the next start.

    Raises:
        RunHeld: another is at work in the run folder.
        Exception: what the stage raises.
    """
    with held(Path(config.run), rank):
        while True:
            try:
                return stage(config)
            except RolledBack as back:
                if rank == 0:
                    log.warning("%s", back)
            except (Stopped, StaysDown, StoreError):  # where the store is gone, nothing can be noted in it
                raise
            except (ConfigError, KeyboardInterrupt):
                note_end(store_of(config), FORGIVEN)
                raise
            except Exception as error:
                first = str(error).partition("\n")[0]
                note_end(store_of(config), f"rank {rank}: {type(error).__name__}: {first}")
                raise
            gc.collect()  # the engine that was left, before another is built
