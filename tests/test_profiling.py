"""Where a step goes: intervals added up by hand, and a small run that is recorded."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import configs
from configs import ConfigError
from pipeline import pretrain as stage
from pipeline.profiling import Event, advice, clear, divide, page, phase, profiler, short, union
from pipeline.ranks import Ranks
from pipeline.run import Run
from tests.small_dataset import CONTRACT, one_thread, write_dataset  # noqa: F401
from tests.training_scenarios import config

PARTS = ["data", "forward", "backward", "communication", "optimiser", "other"]


def event(name: str, begin: float, end: float) -> Event:
    return Event(name, begin, end)


def test_intervals_that_overlap_touch_or_nest_are_one() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (7, 9), (7.5, 8)]) == [(0, 4), (5, 6), (7, 9)]
    assert union([]) == []


def test_a_step_is_divided_without_rest() -> None:
    found = divide([event("step 1", 0, 100), event("step/data", 0, 30), event("step/forward", 40, 90)])
    assert found == {"data": 30, "forward": 50, "backward": 0, "communication": 0, "optimiser": 0, "other": 20}


def test_communication_counts_once_and_is_taken_out_of_the_phase_that_it_lies_in() -> None:
    events = [
        event("step 1", 0, 100),
        event("step/backward", 0, 60),
        event("c10d::allreduce_", 10, 30),
        event("gloo:all_reduce", 12, 28),  # the same one, on a thread of its own
        event("ncclDevKernel_AllReduce_Sum_f32", 25, 40),
        event("step/communication", 60, 70),
        event("nccl:all_reduce", 62, 68),
        event("step/optimiser", 70, 90),
        event("c10d::allgather_", 85, 95),  # over the end of a phase
    ]
    found = divide(events)
    assert found == {"data": 0, "forward": 0, "backward": 30, "communication": 50, "optimiser": 15, "other": 5}
    assert list(found) == PARTS


def test_what_lies_outside_of_the_steps_does_not_count() -> None:
    events = [
        event("step 4", 10, 20),
        event("step 5", 20, 30),
        event("gloo:barrier", 0, 12),
        event("step/data", 28, 40),
    ]
    found = divide(events)
    assert (found["communication"], found["data"], found["other"]) == (2, 2, 16)


@pytest.mark.parametrize(("data", "named"), [(11.0, "data: 11%"), (9.0, "backward: 61%")])
def test_advice_is_on_the_data_from_a_tenth_on_and_else_on_the_largest_part(data: float, named: str) -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"data": data, "backward": 61.0, "forward": 39.0 - data}
    assert advice(parts).startswith(named)


def test_phases_are_marked_only_where_a_profiler_runs() -> None:
    with mock.patch("pipeline.profiling.record_function", side_effect=AssertionError), phase("data"):
        pass
    with torch.profiler.profile() as recording, phase("data"):
        torch.ones(2).sum()
    assert "step/data" in {item.key for item in recording.key_averages()}
    with pytest.raises(KeyError), phase("data"):
        raise KeyError


def run_of(folder: Path, steps: int, profile: int, rank: int = 0) -> Run:
    folder.mkdir(exist_ok=True)
    settings = config(folder.parent, folder.name, steps=steps, profile=profile)
    return Run(folder, settings, CONTRACT, "data", Ranks(rank, 2))


def drive(run: Run, start: int) -> None:
    """The hook after every step that is left, each with something to record."""
    hook = profiler(run, start)
    for step in range(start, run.config.steps):
        with phase("forward"):
            torch.ones(100).sum()
        assert hook({"step": step + 1}) == {}


def recorded(run: Run) -> list[str]:
    """The steps in the trace."""
    trace = json.loads(gzip.decompress((run.folder / "profile" / "trace.json.gz").read_bytes()))
    names = {item.get("name", "") for item in trace["traceEvents"]}
    return sorted(name for name in names if name.startswith("step "))


@pytest.mark.parametrize(
    ("start", "steps", "profile", "names", "said"),
    [
        (0, 8, 2, ["step 4", "step 5"], ""),
        (2, 8, 5, ["step 6", "step 7", "step 8"], ""),  # ends with the run
        (5, 8, 5, ["step 7", "step 8"], "only 3 steps left"),
        (7, 8, 5, [], "nothing to record, 1 of the run's steps left"),
    ],
)
def test_steps_are_recorded_after_three_or_as_many_as_there_are(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    start: int,
    steps: int,
    profile: int,
    names: list[str],
    said: str,
) -> None:
    run = run_of(tmp_path / "run", steps, profile)
    drive(run, start)
    assert said in capsys.readouterr().err
    assert (recorded(run) if names else list(run.folder.iterdir())) == names


def test_a_run_that_is_rolled_back_while_it_is_recorded_records_as_many_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 20, 3)
    hook = profiler(run, 0)
    for step in (1, 2, 3, 4, 2, 3, 4, 5):
        hook({"step": step})
    assert recorded(run) == ["step 3", "step 4", "step 5"]


def test_without_profile_and_on_other_ranks_nothing_is_written(tmp_path: Path) -> None:
    for run in (run_of(tmp_path / "run", 8, 0), run_of(tmp_path / "run", 8, 5, rank=1)):
        drive(run, 0)
        assert list(run.folder.iterdir()) == []


def test_a_small_run_is_profiled_and_adds_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data")
    settings = short(config(tmp_path, "run"))
    monkeypatch.setattr(stage, "pictures", lambda run, *_: profiler(replace(run, config=settings), 0))
    folder = stage.pretrain(replace(settings, profile=0))
    trace = json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))
    marked = {item["name"] for item in trace["traceEvents"] if item.get("name", "").startswith("step/")}
    assert marked == {f"step/{name}" for name in PARTS[:-1]}
    lines = capsys.readouterr().err.splitlines()
    at = lines.index("profile: mean of 5 steps")
    found = {line.split()[0]: (float(line.split()[1]), float(line.split()[3][:-1])) for line in lines[at + 1 : at + 8]}
    whole = found.pop("step")
    assert list(found) == PARTS and all(time >= 0 for time, _ in found.values())
    assert sum(time for time, _ in found.values()) == pytest.approx(whole[0], abs=0.4)
    assert sum(share for _, share in found.values()) == pytest.approx(100, abs=0.4)
    assert found["backward"][0] > 0 and found["communication"][0] > 0
    text = page(settings).read_text()
    assert "What to do" in text and "5 steps after step 3" in text and "aten::" in text
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000008"]


def test_the_run_to_be_profiled_is_short_and_has_a_folder_of_its_own() -> None:
    settings: Any = configs.load("demo-pretrain", ["run=mine", "probe.data=labelled", "store=s3://a/b", "seed=7"])
    found = short(settings)
    assert (found.run, found.steps, found.profile, found.seed) == ("mine-profile", 8, 5, 7)
    assert (found.store, found.probe.data, found.track) == ("", None, ())
    assert found.model == settings.model and found.batch == settings.batch
    assert short(configs.load("demo-finetune", ["run=mine"])).run == "mine-profile"


def test_only_what_is_a_run_is_removed(tmp_path: Path) -> None:
    for name in ("config.yaml", "logs"):  # the second where a run did not come to write the first
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("")
        clear(tmp_path / "run")
        assert not (tmp_path / "run").exists()
    clear(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no run"):
        clear(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").exists()
