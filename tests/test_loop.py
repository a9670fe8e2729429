from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import configs
from pipeline import log, loop
from pipeline.batch import Batch
from pipeline.config import BatchSize, Training
from pipeline.engine import Engine
from pipeline.log import Journal
from pipeline.loop import Losses, train
from pipeline.model.config import ModelConfig
from pipeline.ranks import Ranks, init
from pipeline.run import Run
from pipeline.signals import Stopped
from tests.small_dataset import CONTRACT, one_thread  # noqa: F401
from tests.training_scenarios import config

STEPS, GLOBAL_BATCH, MICRO = 4, 4, 2


class Linear(nn.Linear):
    """A model as the loop sees one."""

    config, scan_backend = ModelConfig(), "torch"


def batches(start: int = 0) -> Any:
    """Micro-batches of two whose values are their positions."""
    position = start * GLOBAL_BATCH
    while True:
        positions = torch.arange(position, position + MICRO)
        yield Batch({"x": positions.float()[:, None] / 10}, {}, None, positions, [f"s{p}" for p in positions.tolist()])
        position += MICRO


def objective(model: Any, batch: Batch) -> Losses:
    squares = (model(batch.values["x"]) - 1).square().mean(1)
    return Losses(squares * 2, {"a": squares, "b": squares})


def prepare(folder: Path, **changes: Any) -> tuple[Run, Engine]:
    init(Ranks())
    batch = {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO}
    settings: Training = config(folder, "run", **{"steps": STEPS, "batch": batch, "track": [], **changes})
    (folder / "run").mkdir()
    torch.manual_seed(0)
    engine = Engine(Linear(1, 3), settings.optim, settings.engine, BatchSize(**batch), Ranks())
    return Run(folder / "run", settings, CONTRACT, "data", Ranks()), engine


def test_every_step_is_a_line(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path)
    train(run, engine, objective, batches(), 0, [lambda numbers: {"twice": 2 * numbers["step"]}])
    lines = log.read(run.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["position"] for line in lines] == [4, 8, 12, 16]
    assert [line["lr"] for line in lines[:2]] == [0.0, pytest.approx(3e-3 * 4 / 8)]
    for line in lines:
        assert line["loss"] == pytest.approx(2 * line["loss/a"])
        assert line["twice"] == 2 * line["step"]
        assert line["grad_norm"] > 0 and line["samples_per_second"] > 0 and 0 <= line["data_wait"] <= 1
    assert (run.folder / "latest").read_text().strip() == "step-000004"


def test_the_loss_is_the_mean_over_the_samples_of_the_global_batch(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path)
    with torch.no_grad():
        values = torch.arange(4.0)[:, None] / 10
        expected = float(((engine.module(values) - 1).square().mean(1) * 2).mean())
    train(run, engine, objective, batches(), 0)
    assert log.read(run.folder)[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, checkpoint_every=3)
    train(run, engine, objective, batches(), 0)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]
    facts = json.loads((run.folder / "checkpoints" / "step-000003" / "state.json").read_text())
    assert (facts["step"], facts["position"], facts["seed"], facts["lanes"]) == (3, 12, 0, 32)
    assert facts["fingerprint"] == "data" and configs.parse(facts["config"]) == run.config


def test_old_checkpoints_go(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, checkpoint_every=1, keep=2)
    train(run, engine, objective, batches(), 0)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run, engine = prepare(tmp_path)

    def shoot(numbers: Any) -> dict[str, Any]:
        if numbers["step"] == 2:
            os.kill(os.getpid(), number)
        return {}

    with pytest.raises(Stopped, match="after step 2"):
        train(run, engine, objective, batches(), 0, [shoot])
    assert (run.folder / "latest").read_text().strip() == "step-000002"
    assert len(log.read(run.folder)) == 2


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, engine = prepare(tmp_path)
    answers = iter([False] * (STEPS - 1) + [True])
    monkeypatch.setattr(loop, "agree", lambda flag: next(answers))
    train(run, engine, objective, batches(), 0)
    assert (run.folder / "latest").read_text().strip() == "step-000004"


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "samples_per_second": 3.0, "data_wait": 0.25}


def test_resuming_drops_later_lines_and_half_a_line(tmp_path: Path) -> None:
    whole = "".join(json.dumps(line(step)) + "\n" for step in range(1, 6))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 6, "lo')
    assert [item["step"] for item in log.read(tmp_path)] == [1, 2, 3, 4, 5]
    journal = Journal(tmp_path, start=3, steps=9, console=io.StringIO())
    journal.write(line(4))
    journal.close()
    assert [item["step"] for item in log.read(tmp_path)] == [1, 2, 3, 4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_overwrites_itself_and_elsewhere_is_lines(tmp_path: Path) -> None:
    terminal, file = Terminal(), io.StringIO()
    for console in (terminal, file):
        journal = Journal(tmp_path, start=0, steps=3, console=console)
        for step in (1, 2, 3):
            journal.write(line(step))
        journal.close()
    assert terminal.getvalue().count("\r") == 3
    shown = file.getvalue().splitlines()
    assert len(shown) == 2 and "\r" not in file.getvalue()  # the first and the last; between them no seconds passed
    assert shown[1].startswith("step 3/3  loss 0.3333  3.0 samples/s  data-wait 25 %  ETA 0:00")
