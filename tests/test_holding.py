"""One run at a time in a run folder, wherever it was started from."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import local
from pipeline.holding import RunHeld, check_free, held
from pipeline.pretrain import pretrain
from pipeline.ranks import Ranks, child_environment
from tests.small_dataset import one_thread  # noqa: F401
from tests.training_scenarios import config

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.holding import held
with held(Path(sys.argv[1]), 0):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    """Refused before it has written anything or was counted as a start."""
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, env=child_environment(Ranks()), text=True
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "holds\n"
        for begin in (pretrain, lambda settings: local.run(settings, 2, run / "logs")):
            with pytest.raises(RunHeld, match=rf"run is in use by process {holder.pid} on \S+, since .*choose another"):
                begin(config(tmp_path, "run"))
        assert {path.name for path in run.iterdir()} == {".lock"}
        with held(run, 1):  # other ranks leave it to rank 0
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    check_free(run)
    with held(run, 0), pytest.raises(RunHeld, match=f"in use by process {os.getpid()} on"):
        check_free(run)


def test_a_requeued_job_waits_for_what_is_left_of_it_and_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locks of a node that is lost stay until the server notices; Slurm is faster."""
    free = threading.Event()

    def hold() -> None:
        with held(tmp_path, 0):
            free.wait(30)

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    thread = threading.Thread(target=hold)
    thread.start()
    while not (tmp_path / ".lock").exists() or "job 12, attempt 1, " not in (tmp_path / ".lock").read_text():
        time.sleep(0.01)
    try:
        for job, restarts in (("12", "0"), ("1", "1"), ("123", "1")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            with pytest.raises(RunHeld, match=r"by job 12, attempt 1, .*mcf jobs cancel"), held(tmp_path, 0):
                pass
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        threading.Timer(0.3, free.set).start()
        with held(tmp_path, 0):
            assert free.is_set()
    finally:
        free.set()
        thread.join()


def test_where_the_file_system_has_no_locks_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, 0):
        assert "its file system has no locks" in caplog.text
