from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Guard
from pipeline.health import LEAST, WINDOW, Health, recall, suspects
from pipeline.log import METRICS
from pipeline.ranks import Ranks


def lines(*losses: float | None) -> list[dict[str, Any]]:
    """Steps with these losses; None was passed over."""
    return [{"loss": loss} if loss is not None else {"loss": None, "skipped": {"why": "loss nan"}} for loss in losses]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_from_the_first_micro_batch_on(loss: float) -> None:
    assert Health(Guard()).verdict(loss, complete=False) == f"loss {loss}"


def test_a_spike_is_told_by_the_median_of_the_last_losses() -> None:
    health = Health(Guard(spike=3.0), lines(*[1.0, 100.0] * 2, *[2.0] * (WINDOW - 4)))
    assert health.verdict(5.9) is None
    assert health.verdict(6.1) == "loss 6.1, 3.05 times the last 64 steps' median 2"
    assert health.verdict(6.1, complete=False) is None, "a part of a batch may be worse than the whole"
    for line in lines(*[20.0] * WINDOW):
        health.note(line)
    assert health.verdict(59.0) is None and health.verdict(61.0)


def test_no_spike_is_seen_early_or_with_a_factor_of_0() -> None:
    assert Health(Guard(spike=3.0), lines(*[1.0] * (LEAST - 1))).verdict(1e6) is None
    assert Health(Guard(spike=3.0), lines(*[1.0] * LEAST)).verdict(1e6)
    assert Health(Guard(spike=0.0), lines(*[1.0] * LEAST)).verdict(1e6) is None


def test_passed_over_steps_are_counted_in_a_row_and_in_all_and_leave_the_median_alone() -> None:
    health = Health(Guard(spike=3.0, skips=2), lines(*[1.0] * LEAST))
    for line in lines(None, 1.0, None):
        health.note(line)
    assert (health.skips, health.in_row, health.exhausted) == (2, 1, False)
    health.note(lines(None)[0])
    assert (health.skips, health.in_row, health.exhausted) == (3, 2, True)
    assert health.verdict(2.9) is None and health.verdict(3.1)


def test_a_run_that_goes_on_remembers(tmp_path: Path) -> None:
    written = [{**line, "skips": 7, "rollbacks": 1} for line in lines(*[50.0] * 200, *[1.0] * WINDOW, None)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in written))
    health = recall(Guard(spike=3.0), tmp_path, Ranks())
    assert (health.skips, health.in_row, health.rollbacks) == (7, 1, 1)
    assert health.verdict(3.1) and not health.verdict(2.9)
    assert recall(Guard(), tmp_path / "new", Ranks()).skips == 0


def test_after_a_roll_back_the_row_is_over() -> None:
    health = Health(Guard(skips=1), [*lines(1.0), {**lines(None)[0], "rolled_back_to": 1}])
    assert health.in_row == 0 and not health.exhausted


def test_suspects_are_those_that_are_not_finite_and_else_the_largest() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    pairs = list(zip("abcd", values, strict=True))
    assert suspects(pairs) == {"0": ["b", "d"]}
    assert suspects([pair for pair in pairs if pair[0] in "ac"]) == {"0": ["c"]}
