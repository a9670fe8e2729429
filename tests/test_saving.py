"""Saving behind the training, what is kept, and runs whose checkpoints are kept elsewhere."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import configs
from configs import ConfigError
from pipeline import checkpoint, log, run
from pipeline.loop import train
from pipeline.pretrain import pretrain
from pipeline.ranks import LEAD, Ranks
from shards.store import StoreError, open_store
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.test_loop import STEPS, batches, objective, prepare
from tests.training_scenarios import config, stop_after

SAVE = checkpoint.save


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    made, engine = prepare(tmp_path, checkpoint_every=1)
    reached, writing = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> str:
        writing.set()
        assert reached.wait(30), "no further step was made while this was being written"
        return SAVE(*arguments)

    def hook(line: Any) -> dict[str, Any]:
        if line["step"] == 2 and writing.wait(30):
            reached.set()
        return {}

    with mock.patch.object(checkpoint, "save", slow):
        train(made, engine, objective, batches(), 0, [hook])
    assert checkpoint.find(made.folder).step == STEPS


def test_what_was_gathered_is_written_not_what_it_became(tmp_path: Path) -> None:
    made, engine = prepare(tmp_path, checkpoint_every=2, keep=9)
    seen: dict[int, torch.Tensor] = {}

    def hook(line: Any) -> dict[str, Any]:
        seen[line["step"]] = engine.module.weight.detach().clone()
        return {}

    train(made, engine, objective, batches(), 0, [hook])
    for step in (2, 4):
        found = checkpoint.find(made.folder / f"checkpoints/step-{step:06d}")
        assert torch.equal(found.state.parameters["weight"], seen[step])


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path: Path) -> None:
    made, engine = prepare(tmp_path, checkpoint_every=1, keep=9)

    def fails(store: Any, state: Any, facts: Any) -> str:
        if facts["step"] == 2:
            raise StoreError("no space left on device")
        return SAVE(store, state, facts)

    with mock.patch.object(checkpoint, "save", fails), pytest.raises(StoreError, match="no space left"):
        train(made, engine, objective, batches(), 0)
    assert checkpoint.find(made.folder).step == 1
    assert len(log.read(made.folder)) in (2, 3)  # it ends at the next step, or the one after


@pytest.mark.parametrize(("metric", "best"), [("score", 2), ("loss/score", 3), ("", None)])
def test_the_best_step_is_saved_and_kept(tmp_path: Path, metric: str, best: int | None) -> None:
    made, engine = prepare(tmp_path, keep_best=metric, keep=1)
    scores = {1: 0.3, 2: 0.9, 3: 0.1, 4: 0.5}
    train(
        made,
        engine,
        objective,
        batches(),
        0,
        [lambda line: {"score": scores[line["step"]], "loss/score": scores[line["step"]]}],
    )
    kept = {int(path.name[5:]) for path in (made.folder / "checkpoints").iterdir()}
    assert kept == {STEPS, *([best] if best else [])}
    if best:
        assert checkpoint.find(made.folder / "best").step == best
        assert checkpoint.best(made.store, metric) == scores[best]


def test_a_resumed_run_remembers_its_best(tmp_path: Path) -> None:
    made, engine = prepare(tmp_path, keep_best="score", keep=1)
    train(made, engine, objective, batches(), 0, [lambda line: {"score": 5.0 if line["step"] == 1 else 1.0}])
    train(made, engine, objective, batches(3), 3, [lambda line: {"score": 4.0}])
    assert checkpoint.find(made.folder / "best").step == 1


def test_a_metric_that_never_comes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, engine = prepare(tmp_path, keep_best="val/mIoU")
    train(made, engine, objective, batches(), 0)
    assert "no step of this run had the metric 'val/mIoU'" in caplog.text


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for checkpoints."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_url')}/kept"
    return str(tmp_path / "kept")


def test_a_run_goes_on_from_its_store_when_its_folder_is_gone(tmp_path: Path, elsewhere: str) -> None:
    write_dataset(tmp_path / "data")
    whole = log.read(pretrain(config(tmp_path, "whole", pictures_every=100)))
    settings = config(tmp_path, "moved", store=elsewhere, checkpoint_every=2)
    stop_after(settings, 3)
    assert not list((tmp_path / "moved").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "moved")  # as on another node
    moved = pretrain(settings)
    same = ("step", "loss", "digest", "grad_norm")
    assert [[line[name] for name in same] for line in log.read(moved)] == [[line[n] for n in same] for line in whole]
    found = checkpoint.find(elsewhere)
    assert found.step == 5 and found.address == f"{elsewhere}/checkpoints/step-000005"
    store = open_store(elsewhere)
    assert store.get("latest") == b"step-000005\n"
    assert {name.split("/")[-1] for name in store.list()} >= {"config.yaml", "metrics.jsonl", "average.safetensors"}
    last = json.loads(store.get("metrics.jsonl").splitlines()[-1])
    assert last["step"] == 5
    # A later stage starts from there.
    again = pretrain(config(tmp_path, "next", start=elsewhere, steps=1, optim={"lr": 1e-9}))
    new, old = checkpoint.find(again).state.parameters, found.parameters
    assert all(torch.allclose(new[name], old[name], atol=1e-7) for name in old)


def test_a_store_of_another_run_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    store = str(tmp_path / "kept")
    pretrain(config(tmp_path, "one", store=store, steps=1))
    with pytest.raises(ConfigError, match="holds a run of another config .*seed: 0 there, 7 now"):
        pretrain(config(tmp_path, "two", store=store, steps=1, seed=7))


def test_a_remote_run_folder_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"run: .*write run=FOLDER store=s3://bucket/run"):
        configs.load("demo-pretrain", ["run=s3://bucket/run"])


def test_other_ranks_read_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data")
    settings = config(tmp_path, "run", steps=1)
    address = checkpoint.find(pretrain(settings)).address
    told = iter([True, (address, False)])  # by rank 0
    monkeypatch.setattr(run, "share", lambda value: next(told))
    found = run.own_checkpoint(settings, "unread", Ranks(1, 2, 1, 2, port=1))
    assert found is not None and found.step == 1 and found.state.updates == 1
    assert not found.state.parameters and not found.state.moments


def test_the_time_that_a_stop_needs_is_measured_and_the_notice_checked_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(LEAD, "0.5")
    made, engine = prepare(tmp_path, checkpoint_every=1)

    def slow(*arguments: Any) -> str:
        time.sleep(0.3)
        return SAVE(*arguments)

    with mock.patch.object(checkpoint, "save", slow):
        train(made, engine, objective, batches(), 0, [lambda line: time.sleep(0.2) or {}])
    lines = log.read(made.folder)
    assert "save_budget" not in lines[0], "nothing has been saved yet"
    assert 0.8 < lines[-1]["save_budget"] < 10
    assert caplog.text.count("but the signal comes 0.5 s before the end: write signal_delay_s: ") == 1


def test_a_notice_long_enough_and_none_are_nothing_to_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, notice in enumerate(("600", "")):
        monkeypatch.setenv(LEAD, notice)
        (tmp_path / str(number)).mkdir()
        made, engine = prepare(tmp_path / str(number), checkpoint_every=1)
        train(made, engine, objective, batches(), 0)
    assert "signal_delay_s" not in caplog.text
