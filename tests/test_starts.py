from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs import ConfigError
from pipeline import log, pretrain
from pipeline.starts import FORGIVEN, STARTS, StaysDown, count_start, note_end
from shards.store import StoreError, open_store
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config, stop_after


def test_so_many_starts_from_one_step_and_no_more(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for _ in range(3):
        count_start(store, 100, allowed=3)
    note_end(store, "rank 1: RuntimeError: out of luck")
    note_end(store, "rank 0: RuntimeError: Connection closed by peer")
    with pytest.raises(
        StaysDown, match="started 3 times from step 100.*rank 1: RuntimeError: out of luck.*remove .*json"
    ):
        count_start(store, 100, allowed=3)
    count_start(store, 100, allowed=4)
    count_start(store, 100, allowed=0)
    count_start(store, 150, allowed=1)
    assert json.loads((tmp_path / STARTS).read_text()) == {"step": 150, "count": 1}


def test_a_start_that_left_no_word_was_killed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    count_start(store, 0, 1)
    with pytest.raises(StaysDown, match="was killed, or its machine was lost"):
        count_start(store, 0, 1)


def test_half_a_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text('{"step": 3, "cou')
    note_end(open_store(str(tmp_path)), "rank 0: Error")
    count_start(open_store(str(tmp_path)), 3, 1)
    assert json.loads((tmp_path / STARTS).read_text())["count"] == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    write_dataset(folder / "data")
    return folder


def test_a_run_that_fails_again_and_again_stays_down_until_told_otherwise(data: Path) -> None:
    settings = config(data, "loop", checkpoint_every=2, guard={"starts": 2}, track=[])

    def attempt(error: BaseException, step: int) -> None:
        """Fail in the step after so many."""

        def fails(*_: Any) -> Any:
            def hook(line: Any) -> Any:
                if line["step"] == step + 1:
                    raise error
                return {}

            return hook

        with mock.patch.object(pretrain, "pictures", fails), pytest.raises(type(error)):
            pretrain.pretrain(settings)

    attempt(RuntimeError("first"), 0)
    attempt(KeyboardInterrupt(), 0)  # a person is not a loop
    attempt(ConfigError("a mistake that was mended"), 0)
    attempt(RuntimeError("second"), 0)
    attempt(RuntimeError("third\nwith details"), 0)
    with pytest.raises(StaysDown, match=r"started 2 times from step 0 .*The last start: rank 0: RuntimeError: third\."):
        pretrain.pretrain(settings)
    assert not log.read(data / "loop")[1:]
    (data / "loop" / STARTS).unlink()
    attempt(RuntimeError("later"), 3)
    for _ in range(2):  # a checkpoint was reached, so that these are the first two of another count
        attempt(RuntimeError("later"), 2)
    (data / "loop" / STARTS).unlink()
    with mock.patch.object(pretrain, "pictures", lambda *_: lambda line: {}):
        assert len(log.read(pretrain.pretrain(settings))) == settings.steps


def test_stops_that_were_asked_for_are_no_failures(data: Path) -> None:
    with mock.patch.object(pretrain, "pictures", lambda *_: lambda line: {}):
        for step in (1, 1, 1):
            stop_after(config(data, "stopped", guard={"starts": 1}, track=[]), step)
    assert "ended" not in json.loads((data / "stopped" / STARTS).read_text())


def test_what_ended_it_is_not_hidden_by_a_store_that_is_gone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    count_start(store, 0, 1)
    with mock.patch.object(type(store), "put", side_effect=StoreError("gone")):
        note_end(store, "rank 0: Error")
        note_end(store, FORGIVEN)
    assert json.loads((tmp_path / STARTS).read_text()) == {"step": 0, "count": 1}
