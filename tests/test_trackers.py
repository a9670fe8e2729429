"""TensorBoard and Weights & Biases, each by its own library; wandb offline, as nothing here may reach a network."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs import ConfigError
from pipeline.loop import train
from pipeline.run import Run
from pipeline.trackers import scalars, trackers
from tests.small_dataset import one_thread  # noqa: F401
from tests.test_loop import batches, objective, prepare


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each name, as TensorBoard shows them: a restart hides later steps from before it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        for record in records(path.read_bytes()):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                found = {name: [each for each in values if each[0] < event.step] for name, values in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Records of a TFRecord file: length, checksum of it, data, checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_numbers_of_mappings_get_names_of_their_own() -> None:
    line = {"step": 3, "loss": 1.5, "digest": "ab", "io": {"bytes": 7}, "lr": None, "skipped": {"why": "loss nan"}}
    assert dict(scalars(line)) == {"step": 3.0, "loss": 1.5, "io/bytes": 7.0}


def test_tensorboard_shows_each_step_once_also_after_a_kill(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, track=["tensorboard"], checkpoint_every=2)

    def fails(line: Any) -> Any:
        if line["step"] == 4:
            raise RuntimeError("killed")
        return {"io": {"bytes": 5}}

    with pytest.raises(RuntimeError):
        train(run, engine, objective, batches(), 0, [fails])
    train(run, engine, objective, batches(2), 2, [lambda line: {"io": {"bytes": 6}}])
    found = shown(run.folder / "tensorboard")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["io/bytes"]] == [5, 5, 6, 6]
    assert {"lr", "grad_norm", "loss/a", "samples_per_second", "data_wait", "memory", "saving"} <= found.keys()
    assert "step" not in found and "digest" not in found


def test_a_run_that_goes_on_is_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, engine = prepare(tmp_path, track=["wandb"], checkpoint_every=2)
    train(run, engine, objective, batches(), 0)
    first = (run.folder / "wandb-id").read_text()
    train(run, engine, objective, batches(2), 2)
    assert (run.folder / "wandb-id").read_text() == first
    kept = [path.name for path in (run.folder / "wandb").glob("offline-run-*")]
    assert len(kept) == 2 and all(name.endswith(f"-{first}") for name in kept)


def test_wandb_is_asked_for_by_name_and_then_must_be_there(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, track=["wandb"])
    message = r"pip install 'mcf-mamba\[wandb\]'"
    with mock.patch.dict(sys.modules, wandb=None), pytest.raises(ConfigError, match=message):
        trackers(run, 0)


def test_nothing_is_tracked_where_nothing_is_named(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, track=[])
    assert isinstance(run, Run) and trackers(run, 0) == []
    train(run, engine, objective, batches(), 0)
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints", "latest", "metrics.jsonl"}
