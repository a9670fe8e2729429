"""Ranks on this machine: they meet, they stop together, they fail together."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import configs
from launchers import local
from launchers.job import STAGES, Job
from launchers.local import launch
from pipeline.ranks import Ranks, child_environment
from pipeline.signals import EXIT_STOPPED
from tests.fake_stages import steps

LAUNCHER = """
import sys
from pathlib import Path
from launchers import local
local.GRACE_S = 1.0
sys.exit(local.launch(["tests.fake_stages", sys.argv[1], sys.argv[2]], 2, Path(sys.argv[2]) / "logs"))
"""


def start(stage: str, folder: Path) -> subprocess.Popen[str]:
    """Starts a launcher of two ranks as a process of its own, to send signals to."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, stage, str(folder)],
        env=child_environment(Ranks()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something to become true."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Says whether a process has ended (a zombie, whose new parent does not look, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_usr2_is_a_requeue_a_signal_stops_all_and_a_second_launch_goes_on(tmp_path: Path) -> None:
    """USR2 is what a job on Slurm gets before its time limit: saved at one step, started again."""
    first = start("adds-up", tmp_path)
    until(lambda: len(steps(tmp_path)) >= 2)
    first.send_signal(signal.SIGUSR2)
    until(lambda: steps(tmp_path)[-1]["from"] > 0)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == EXIT_STOPPED, said
    assert "stopped by USR2, as before a time limit; starting again" in said
    assert said.count("stopped after step") == 2
    done = len(steps(tmp_path))
    assert done < 40
    second = start("adds-up", tmp_path)
    assert second.wait(timeout=60) == 0
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(40))
    assert len({line["from"] for line in lines}) == 3 and lines[-1]["from"] == done
    assert all(line["sum"] == 3 and line["world"] == 2 for line in lines)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}


def test_the_second_signal_means_now(tmp_path: Path) -> None:
    launcher = start("fails-stubbornly", tmp_path)
    until(lambda: (tmp_path / "pid-0").exists())
    launcher.send_signal(signal.SIGINT)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert gone(int((tmp_path / "pid-0").read_text())), said


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    launcher = start("idles", tmp_path)
    until(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("pid-*")) == 2)
    launcher.kill()
    launcher.wait()
    until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2)


def test_a_failing_rank_is_named_and_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-1.log").write_text("an earlier attempt\n")
    assert launch(["tests.fake_stages", "fails", str(tmp_path)], 3, logs) == 1
    out, err = capfd.readouterr()
    assert "hello from rank 0" in out
    assert "hello from rank 2" not in out + err
    assert "RuntimeError: no such luck" in err
    assert f"rank 1 failed (exit code 1); its log: {logs / 'rank-1.log'}" in err
    assert "an earlier attempt" not in err
    log = (logs / "rank-1.log").read_text()
    assert log.startswith("an earlier attempt\n")
    assert "RuntimeError: no such luck" in log
    assert "hello from rank 0" in (logs / "rank-0.log").read_text()
    assert all(gone(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(3))


def test_who_ignores_the_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    assert launch(["tests.fake_stages", "fails-stubbornly", str(tmp_path)], 2, tmp_path) == 1
    assert "rank 1 failed" in capfd.readouterr().err
    assert gone(int((tmp_path / "pid-0").read_text()))


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    launcher = start("idles", tmp_path)
    until(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("pid-*")) == 2)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    _, said = launcher.communicate(timeout=60)
    assert "rank 1 failed (SIGKILL)" in said
    assert launcher.returncode == 128 + signal.SIGKILL


def test_at_least_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 processes"):
        launch(["tests.fake_stages", "fails", str(tmp_path)], 0, tmp_path)


def test_a_config_becomes_a_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole way: config, file, rank, stage, and the stage's own error back on the console."""
    raw = {"stage": "shards", "archive": {"root": str(tmp_path / "nothing")}, "out": str(tmp_path), "sensors": ["dem"]}
    config = configs.parse(raw)
    logs = tmp_path / "run" / "logs"
    assert local.run(config, 1, logs) == 1
    assert configs.load(logs / "config.yaml") == config
    said = capfd.readouterr().err
    assert str(tmp_path / "nothing") in said
    assert "rank 0 failed" in said


def test_a_job_can_be_pickled() -> None:
    raw = {"stage": "pretrain", "run": "run", "data": "data", "steps": 1}
    job = Job(configs.parse(raw))
    assert pickle.loads(pickle.dumps(job)) == job


def test_the_stages_are_those_of_the_configs() -> None:
    assert set(STAGES) == set(configs.STAGES) - {"slurm", "chain", "export"}
