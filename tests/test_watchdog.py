"""A rank that hangs: in a process of its own, since it ends it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import local
from pipeline.signals import EXIT_HUNG
from pipeline.watchdog import Watchdog

HANGS = """
import sys, threading, time
from pathlib import Path
from pipeline.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

with Watchdog(0.3, Path(sys.argv[1])) as dog:
    for _ in range(10):
        time.sleep(0.1)
        dog.beat()
    waits_for_ever()
"""


def test_it_writes_the_stacks_of_all_threads_and_ends_the_process(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks-rank-0.txt"
    done = subprocess.run([sys.executable, "-c", HANGS, str(stacks)], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG
    for text in (done.stderr, stacks.read_text()):
        assert "no step for 0.3 s" in text and "waits_for_ever" in text and "in _watch" in text
    assert str(stacks) in done.stderr


def test_it_ends_the_process_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stacks = tmp_path / "file" / "stacks.txt"
    done = subprocess.run([sys.executable, "-c", HANGS, str(stacks)], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG and "no stacks: " in done.stderr and "waits_for_ever" in done.stderr


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_it_leaves_alone_what_goes_on_or_has_ended(tmp_path: Path, seconds: float) -> None:
    with Watchdog(seconds, tmp_path / "stacks") as dog:
        for _ in range(4):
            time.sleep(0.1)
            dog.beat()
    time.sleep(0.4)
    assert not (tmp_path / "stacks").exists()


def test_a_hung_rank_takes_all_down_with_stacks_and_the_launch_begins_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 does not come to the second sum the first time; both ranks write their stacks; the next attempt ends."""
    code = local.launch(["tests.fake_stages", "hangs-once", str(tmp_path)], 2, tmp_path / "logs")
    assert code == 0
    waiting, hung = ((tmp_path / f"stacks-{rank}").read_text() for rank in (0, 1))
    assert "in all_reduce" in waiting and "in all_reduce" not in hung and "fake_stages.py" in hung
    said = capfd.readouterr().err
    assert re.search(r"hung .*; starting again", said)
    assert (tmp_path / "ended").read_text() == "2"


def test_a_launch_that_hangs_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RESTARTS", 1)
    code = local.launch(["tests.fake_stages", "hangs", str(tmp_path)], 1, tmp_path / "logs")
    assert code == EXIT_HUNG
    assert (tmp_path / "starts").read_text() == "2"
