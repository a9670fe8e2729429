"""The experiment that kills a run: what it says of one that goes on exactly, and of those that do not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from configs import ConfigError
from launchers import command, demo, local, resume_check
from launchers.resume_check import Part, check, experiment, make_demo_data
from pipeline.log import read
from pipeline.signals import EXIT_STOPPED
from tests.small_dataset import write_dataset

# A rank that trains nothing: a step takes a moment, has a digest and a loss, and a fault if FAULT says so.
FAKE = """
import os, sys, time
from pathlib import Path
import yaml
from pipeline.log import Journal
from pipeline.signals import EXIT_STOPPED, StopRequest

config = yaml.safe_load(Path(sys.argv[1]).read_text())
fault, rank = os.environ.get("FAULT", ""), int(os.environ["RANK"])
run = Path(config["run"])
(run / f"pid-{rank}").write_text(str(os.getpid()))
saved = run / "saved"
start = int(saved.read_text()) if saved.exists() and fault != "begins again" else 0
if fault == "breaks":
    sys.exit(3)
journal = Journal(run, start, config["steps"]) if rank == 0 else None
with StopRequest() as stop:
    for step in range(start + 1, config["steps"] + 1):
        time.sleep(0.03)
        position = step - start if fault == "forgets its position" else step
        loss = 1 / step + (1e-9 if fault == "forgets its moments" and start and step >= 33 else 0)
        loss *= 1 + 1e-6 * (os.environ["WORLD_SIZE"] == "1")
        line = {"step": step, "loss": loss, "digest": f"{position:016x}"}
        if journal:
            journal.write({**line, "samples_per_second": time.monotonic(), "data_wait": 0.0})
        if journal and step % config["checkpoint_every"] == 0:
            (run / "saving").write_text(str(step))
            (run / "saving").replace(saved)
        if stop.requested:
            sys.exit(EXIT_STOPPED)
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config whose ranks are fakes, and a run folder of the user's."""
    (tmp_path / "fake_training.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # nothing may appear beside the check's own folder
    launch = local.launch
    monkeypatch.setattr(local, "launch", lambda module, *rest: launch(["fake_training", *module[1:]], *rest))
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/metrics.jsonl").write_text("the user's\n")
    raw = {"stage": "pretrain", "run": str(tmp_path / "runs/mine"), "data": "nowhere", "steps": 1000}
    return configs.parse({**raw, "store": str(tmp_path / "store"), "keep_every": 10, "pictures_every": 5})


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_an_exact_run_passes_and_nothing_else_is_touched(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "runs/mine-resume-check"
    for name in ("whole/metrics.jsonl", "killed/saved", "notes.txt"):
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        (beside / name).write_text("39")
    before = files(tmp_path)
    monkeypatch.setattr(resume_check, "device", lambda ranks: torch.device("cpu"))
    assert check(settings, 2) == 0
    said = capsys.readouterr().out
    verdict = said.splitlines()[-1]
    assert re.fullmatch(
        r"resume-check: exact: killed after step \d\d, the same samples and masks at all 40 steps; 2 processes from "
        r"step \d\d, losses bit-equal; 1 process from step \d\d, losses within 1e-04 \(sums in another order\)",
        verdict,
    )
    rows = {line.split()[0]: line.split() for line in said.splitlines()[-4:-1]}
    at, start = int(rows["killed"][2]), int(rows["killed"][3])
    assert 17 <= at < 40 and 15 <= start <= at and start % 5 == 0
    assert rows["killed"][4:8] == ["40", "40/40", "40/40", "0.0e+00"]
    assert rows["fewer"][1:4] == ["1", str(at), str(start)] and rows["fewer"][5:7] == ["40/40", f"{start}/40"]
    assert float(rows["fewer"][7]) == pytest.approx(1e-6, rel=0.01)
    assert [name for name in files(tmp_path) - before if not name.startswith("runs/mine-resume-check/")] == []
    assert (tmp_path / "runs/mine/metrics.jsonl").read_text() == "the user's\n"
    assert (beside / "notes.txt").read_text() == "39"
    for name in ("whole", "killed", "fewer"):
        assert [line["step"] for line in read(beside / name)] == list(range(1, 41))


def test_what_the_runs_are(settings: Any) -> None:
    made = experiment(settings, "killed")
    changed = configs.differences(settings, made)
    assert changed.keys() == {"run", "store", "steps", "checkpoint_every", "keep", "keep_every", "pictures_every"}
    assert (made.steps, made.checkpoint_every, made.keep, made.store, made.pictures_every) == (40, 5, 2, "", 0)
    short = experiment(replace(settings, steps=10, run=f"{settings.run}/"), "whole")
    assert (short.steps, short.checkpoint_every) == (10, 1)
    assert short.run == f"{settings.run}-resume-check/whole"
    finetuning = configs.parse({"stage": "finetune", "run": "r", "data": "d", "steps": 80, "validate_every": 7})
    assert experiment(finetuning, "whole").validate_every == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "forgets its moments",
            r"FAILED: first difference at step 33: loss 0\.03\d+ against 0\.03\d+ \(run killed",
        ),
        ("forgets its position", r"FAILED: first difference at step \d\d: digest \w{16} against 0{15}1 \(run killed"),
        ("begins again", r"FAILED: .*killed began again at step 1 instead of going on"),
        ("is not watched", r"FAILED: .*killed was not killed in time: it had made all 40 steps"),
        ("breaks", r"FAILED: .*whole ended with code 3 after step 0; its logs: .*whole/logs"),
    ],
)
def test_a_run_that_is_not_exact_fails(
    settings: Any, fault: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULT", fault)
    if fault == "is not watched":
        monkeypatch.setattr(local, "POLL_S", 60.0)
    assert check(settings, 1) == 1
    assert re.match(f"resume-check: {message}", last_line(capsys))


def part(name: str, *losses: float, digest: str = "d", processes: int = 2) -> Part:
    lines = [{"step": step, "loss": loss, "digest": digest} for step, loss in enumerate(losses, 1)]
    return Part(name, processes, lines, 1.0, 2, 1)


def test_how_far_losses_may_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = part("whole", 1.0, 2.0, 3.0), part("killed", 1.0, 2.0001, 3.0)
    assert resume_check._compare(whole, other, 0.0).difference.startswith(
        "first difference at step 2: loss 2.0 against"
    )
    assert resume_check._compare(whole, other, 1e-4).difference == ""
    assert "step 3" in resume_check._compare(whole, part("killed", 1.0, 2.0, float("nan")), 1e-4).difference
    found = resume_check._compare(whole, part("killed", 1.0, 2.5, 3.0, digest="e"), 1e-4)
    assert found.digests == 0 and found.losses == 2 and "step 1: digest d against e (run" in found.difference
    raw = {"stage": "pretrain", "run": "r", "data": "d", "steps": 40}
    fp32, bf16 = configs.parse(raw), configs.parse({**raw, "engine": {"precision": "bf16"}})
    monkeypatch.setattr(resume_check, "device", lambda ranks: torch.device("cpu"))
    assert [resume_check._tolerance(fp32, other, ranks) for ranks in (2, 4)] == [0.0, 1e-4]
    assert [resume_check._tolerance(bf16, other, ranks) for ranks in (2, 4)] == [0.0, 5e-3]
    monkeypatch.setattr(resume_check, "device", lambda ranks: torch.device("cuda"))
    assert resume_check._tolerance(fp32, other, 2) == 1e-4


@pytest.mark.parametrize("fault", ["no digest", "a step twice"])
def test_metrics_that_prove_nothing_fail(settings: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": 1.0, "digest": "" if fault == "no digest" else "d"} for step in range(1, 41)]
    lines = lines if fault == "no digest" else [*lines, lines[-1]]
    monkeypatch.setattr(local, "run", lambda *_: 0)
    monkeypatch.setattr(resume_check, "read", lambda run: lines)
    with pytest.raises(resume_check.ResumeCheckError, match="no digest" if fault == "no digest" else "40, 40; every"):
        resume_check._finish("whole", experiment(settings, "whole"), 1)


def test_told_to_stop_it_ends_its_ranks(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(configs.dump(settings))
    code = (
        "import sys, configs\nfrom launchers import local, resume_check\nlaunch = local.launch\n"
        "local.launch = lambda module, *rest: launch(['fake_training', *module[1:]], *rest)\n"
        "from launchers.command import main\n"
        "sys.exit(main(['pretrain', sys.argv[1], '--resume-check', '--on', 'local', '--processes', '2']))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{tmp_path}"}
    command_line = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    run = subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [tmp_path / f"runs/mine-resume-check/whole/pid-{rank}" for rank in (0, 1)]
    metrics = pids[0].with_name("metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text() and all(path.exists() for path in pids)):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == EXIT_STOPPED and "the same command begins the check again" in err, err
    assert "[resume-check] whole" in out and "resume-check: " not in out
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_what_cannot_be_checked_is_refused_before_anything_runs(settings: Any, tmp_path: Path) -> None:
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="steps: 9 given; --resume-check needs at least 10"):
        check(replace(settings, steps=9), 1)
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        check(settings, 3)
    with pytest.raises(ConfigError, match="--processes 0 given"):
        check(settings, 0)
    assert files(tmp_path) == before


def test_the_demo_s_shards_are_made_only_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "fill_archive", lambda out, scale: made.append(out))
    monkeypatch.setattr(demo, "build_shards", made.append)
    preset = configs.load("demo-pretrain")
    (tmp_path / "own.yaml").write_text(configs.dump(preset))
    for source, data, expected in [
        ("demo-pretrain", preset.data, [Path("demo")] * 2),
        ("demo-finetune", "elsewhere/data", [Path("elsewhere")] * 2),
        ("own.yaml", preset.data, [Path("demo")] * 2),
        ("own.yaml", "elsewhere/data", []),
        ("demo-pretrain", "elsewhere/tiles", []),
        ("demo-pretrain", "s3://bucket/data", []),
        ("demo-pretrain", {"demo/data": 1, "more/data": 1}, []),
    ]:
        make_demo_data(source, replace(preset, data=data))
        assert made == expected, (source, data)
        made.clear()
    (tmp_path / "demo/data").mkdir(parents=True)
    (tmp_path / "demo/data/manifest.parquet").touch()
    make_demo_data("demo-pretrain", preset)
    assert made == []


def test_pretraining_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, nothing faked: the command, ranks, kill and DeepSpeed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = write_dataset(tmp_path / "data")
    raw = {"stage": "pretrain", "run": str(tmp_path / "run"), "data": data, "steps": 20, "batch": {"global_batch": 2}}
    model = {"dims": [8, 16], "depths": [1, 1], "drop_path": 0.2}
    (tmp_path / "config.yaml").write_text(configs.dump(configs.parse({**raw, "model": model})))
    assert command.main(["pretrain", str(tmp_path / "config.yaml"), "--resume-check"]) == 0
    assert not (tmp_path / "run").exists()
    whole, killed = (read(tmp_path / "run-resume-check" / name) for name in ("whole", "killed"))
    assert len(whole) == len(killed) == 20
    assert all((a["digest"], a["loss"]) == (b["digest"], b["loss"]) for a, b in zip(whole, killed, strict=True))
