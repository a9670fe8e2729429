"""A lost rank and a full disk: real processes end clearly, and the last checkpoint is intact."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from pipeline import checkpoint, log
from pipeline.pretrain import pretrain
from pipeline.ranks import Ranks, child_environment
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config, stop_after

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    write_dataset(folder / "data")
    return folder


def start(settings: Any, *options: str, **how: Any) -> subprocess.Popen[str]:
    """`mcf pretrain` as a process."""
    path = Path(settings.run).with_suffix(".yaml")
    path.write_text(configs.dump(settings))
    command = [sys.executable, "-m", "launchers.command", "pretrain", str(path), *options]
    environment = {**child_environment(Ranks()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **how)


def rank_of(launcher: int) -> Iterator[tuple[int, int]]:
    """Rank and process id of the launcher's ranks."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            yield from ((int(word[5:]), int(path.parent.name)) for word in words if word.startswith(b"RANK="))


def until_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(log.read(run)) >= step):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_a_lost_rank_ends_the_run_and_the_same_command_goes_on(folder: Path) -> None:
    settings = config(folder, "lost-rank", steps=STEPS, checkpoint_every=2, track=[])
    first = start(settings, "--on", "local")
    until_step(folder / "lost-rank", 6)
    os.kill(dict(rank_of(first.pid))[1], signal.SIGKILL)
    _, said = first.communicate(timeout=90)
    assert first.returncode == 128 + signal.SIGKILL and "rank 1 failed (SIGKILL); its log:" in said
    reached = checkpoint.find(folder / "lost-rank").step
    assert 4 <= reached < STEPS
    pretrain(settings)
    lines = log.read(folder / "lost-rank")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_a_full_disk_is_told_in_a_line_and_costs_no_checkpoint(folder: Path) -> None:
    """No file may grow beyond 30 kB, which a checkpoint needs; then beyond 1 kB, so that nothing can be written."""
    settings = config(folder, "full", steps=STEPS, checkpoint_every=2, track=[], keep=9)
    stop_after(settings, 5)
    reached = checkpoint.find(folder / "full").step
    for limit, file in ((30_000, "model.safetensors: not written: "), (1000, "config.yaml: not written: ")):

        def full(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        again = start(settings, preexec_fn=full)
        _, said = again.communicate(timeout=90)
        assert again.returncode == 1 and "Traceback" not in said
        assert file in said.splitlines()[-1] and "File too large" in said.splitlines()[-1]
        assert checkpoint.find(folder / "full").step == reached
    pretrain(settings)
    assert checkpoint.find(folder / "full").step == STEPS
