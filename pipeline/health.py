"""Whether a step may be trained on, judged by all ranks alike before any gradient is made of it.

A loss that is not finite, or far above those before it, is passed over: no backward, no update, counted, and named with
the samples it came from. Too many in a row mean that the parameters are what is wrong (`pipeline.rollback`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import Guard
from pipeline.log import METRICS
from pipeline.ranks import Ranks, everyone, share

WINDOW = 64  # losses that the median is of
LEAST = 16  # below so many, nothing is said of spikes
NAMED = 8  # samples of a rank


class Health:
    """The losses of the last steps that were trained on, and counts of what was not. The same on every rank."""

    def __init__(self, config: Guard, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """After the steps of these lines of metrics.jsonl."""
        self.config, self.skips, self.in_row, self.rollbacks = config, 0, 0, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        for line in lines:
            self.note(line)
            self.skips, self.rollbacks = line.get("skips", 0), line.get("rollbacks", 0)

    def note(self, line: Mapping[str, Any]) -> None:
        """Take in a step."""
        skipped = "skipped" in line
        self.skips, self.in_row = self.skips + skipped, self.in_row + 1 if skipped else 0
        if "rolled_back_to" in line:  # what follows are other parameters
            self.in_row = 0
        elif not skipped:
            self._losses.append(line["loss"])

    def verdict(self, loss: float, complete: bool = True) -> str | None:
        """Why this loss is not to be trained on; None: it may be.

        Args:
            loss: mean over the samples so far, of all ranks.
            complete: whether these are the whole global batch; a part of one is no spike.
        """
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not complete or not self.config.spike or len(self._losses) < LEAST:
            return None
        usual = statistics.median(self._losses)
        if loss > self.config.spike * abs(usual):
            return f"loss {loss:.4g}, {loss / usual:.3g} times the last {len(self._losses)} steps' median {usual:.4g}"
        return None

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were passed over that going on is useless."""
        return self.in_row >= self.config.skips


def recall(config: Guard, run: Path, ranks: Ranks) -> Health:
    """The health of a run that goes on, from its metrics.jsonl. Collective."""
    lines: list[dict[str, Any]] = []
    if ranks.rank == 0 and (run / METRICS).exists():
        with (run / METRICS).open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in deque(file, maxlen=2 * WINDOW)]
    return Health(config, share(lines))


def suspects(losses: Sequence[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """By rank the keys of the samples that made a loss bad, at most `NAMED` of each. Collective.

    Args:
        losses: keys and losses of this rank's samples; not finite or, where all are finite, the largest are named.
    """
    values = [(key, float(loss)) for key, loss in losses]
    infinite = [key for key, value in values if not math.isfinite(value)]
    found: dict[str, list[str]] = {}
    everywhere = everyone((infinite, [key for key, _ in sorted(values, key=lambda each: -each[1])]))
    for rank, (broken, largest) in enumerate(everywhere):
        if named := broken if any(each for each, _ in everywhere) else largest[:1]:
            found[str(rank)] = named[:NAMED]
    return found
