"""Saving a run: gathered between two steps, written behind the next ones, and old checkpoints removed.

All ranks gather, which ends when rank 0 has a copy in its memory. A thread of rank 0 then writes it, with the config
and metrics.jsonl where the run's store is elsewhere; the next save waits for it. What fails there is raised at the next
step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import torch

from pipeline import checkpoint
from pipeline.engine import Engine, State
from pipeline.log import METRICS
from pipeline.ranks import notice, share
from pipeline.run import CONFIG, STALE, Run, facts

if TYPE_CHECKING:
    from pipeline.model.mcf_mamba import MCFMamba

log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints.

    `seconds` counts how long training was held up, all in all; `slowest` is the longest from the beginning of a save
    to its end on the disk, on rank 0. `stale` counts the values of the metric `keep_best` since the best one.
    """

    def __init__(self, run: Run, engine: Engine, start: int = 0) -> None:
        """For a run that begins after step `start`, which a checkpoint of its own holds. Collective."""
        self.run, self.engine, self.seconds, self.slowest = run, engine, 0.0, 0.0
        self._longest, self._warned = 0.0, False
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        metric = run.config.keep_best
        first = metric and run.ranks.rank == 0
        self._best = share(checkpoint.best(run.store, metric) if first else None)
        self.stale = int(share(_stale(run, start) if first and start and run.config.patience else 0))

    def improves(self, numbers: Mapping[str, Any]) -> bool:
        """Whether the step's numbers are the best so far by the metric of the config, and so are to be saved.

        Rank 0's numbers count, since speeds differ from rank to rank. Collective where there is a metric.
        """
        metric = self.run.config.keep_best
        value = share(numbers.get(metric)) if metric else None
        if value is None:
            return False
        lower = self.run.config.keep_best.startswith("loss")
        if self._best is not None and (value >= self._best if lower else value <= self._best):
            self.stale += 1
            return False
        self._best, self.stale = float(value), 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` values in a row were no better than the best, so that the run ends here."""
        return 0 < self.run.config.patience <= self.stale

    def save(self, step: int, numbers: Mapping[str, Any], best: bool) -> None:
        """Save the state after `step`; returns when it may change again. Collective."""
        began = time.monotonic()
        self.wait()
        state = self.engine.gather()
        if state:
            record = facts(self.run, step, cast("MCFMamba", self.engine.module)) | {"metrics": dict(numbers)}
            self._writing = self._pool.submit(self._write, state, record, best, began)
        self.seconds += time.monotonic() - began

    def budget(self, seconds: float) -> dict[str, float]:
        """What metrics.jsonl says of saving after a step that took so many seconds, all that comes with it included.

        `saving`: see `seconds`. `stale`, where the run has patience: see there. `save_budget`: how long before the end
        a signal must come, so that the longest step, a checkpoint under way and the one of the stop still fit; once a
        checkpoint was written. A shorter notice (`ranks.notice`) is warned of.
        """
        self._longest = max(self._longest, seconds)
        told = {"saving": self.seconds} | ({STALE: self.stale} if self.run.config.patience else {})
        if not self.slowest:
            return told
        budget = self._longest + 2 * self.slowest
        given = notice()
        if given is not None and budget > given and not self._warned:
            self._warned = True
            log.warning(
                "stopping may take %.3g s (a step %.3g s, a checkpoint %.3g s), but the signal comes %g s before the "
                "end: write signal_delay_s: %d", budget, self._longest, self.slowest, given, math.ceil(2 * budget),
            )  # fmt: skip
        return told | {"save_budget": budget}

    def written(self) -> bool:
        """Whether nothing is being written now; what a write has failed with is raised."""
        if self._writing and self._writing.done():
            self.wait()
        return self._writing is None

    def wait(self) -> None:
        """Return when the last checkpoint is written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Wait, on all ranks, until rank 0 has written. Collective."""
        began = time.monotonic()
        self.wait()
        self._pool.shutdown()
        torch.distributed.barrier()
        self.seconds += time.monotonic() - began
        metric = self.run.config.keep_best
        if metric and self._best is None and self.run.ranks.rank == 0:
            log.warning("keep_best: no step of this run had the metric %r", metric)

    def _write(self, state: State, record: Mapping[str, Any], best: bool, began: float) -> None:
        config, store = self.run.config, self.run.store
        if config.store:
            for name in (CONFIG, METRICS):
                store.put(name, (self.run.folder / name).read_bytes())
        checkpoint.save(store, state, record)
        if best:
            checkpoint.point(store, checkpoint.BEST, record["step"])
        checkpoint.prune(store, config.keep, config.keep_every)
        self.slowest = max(self.slowest, time.monotonic() - began)


def _stale(run: Run, step: int) -> int:
    """What the run's own checkpoint of a step has counted."""
    facts = checkpoint.load(f"{run.store.url}/{checkpoint.name_of(step)}", tensors=False).facts
    return int(facts.get("metrics", {}).get(STALE, 0))
