"""A run folder has one run at a time: two would write over each other's checkpoints and metrics.

Rank 0 locks RUN/.lock (flock) for as long as a training stage runs, wherever that was started: here, by the local
launcher, as a job. The kernel lets go of the lock when the process ends, however it ends, so that a run that was killed
or requeued gets its folder again. The file says who holds it, for whoever is refused.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import ranks

LOCK = ".lock"
LEASE_S = 180.0  # an NFS server keeps the locks of a machine that is lost for its lease, 90 s as a rule
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


class RunHeld(ValueError):
    """Another process is at work in the run folder; the message says which and what to do."""


@contextmanager
def held(run: Path, rank: int) -> Iterator[None]:
    """While this is open, no other run can begin in the folder. Rank 0 sees to it; of other ranks nothing is asked.

    Raises:
        RunHeld: another holds it. An earlier attempt of the same Slurm job, on a node that was lost, is waited for.
    """
    if rank > 0:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    file, job, deadline = _open(run), ranks.slurm_job(), time.monotonic() + LEASE_S
    try:
        while not _locked(file, run):
            holder = _text(file)
            if not _is_left_over(holder, job) or time.monotonic() > deadline:
                raise RunHeld(_refusal(run, holder))
            time.sleep(1)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{_me(job)}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
        yield
    finally:
        os.close(file)


def check_free(run: Path) -> None:
    """Look whether a run could begin now, for a launcher that is about to start its ranks.

    Raises:
        RunHeld: another is at work in the folder.
    """
    if not (run / LOCK).exists():
        return
    file = _open(run)
    try:
        if not _locked(file, run):
            raise RunHeld(_refusal(run, _text(file)))
    finally:
        os.close(file)


def _open(run: Path) -> int:
    return os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)


def _locked(file: int, run: Path) -> bool:
    """Whether the lock is ours now; with a warning also where the file system knows none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("%s: its file system has no locks, so that a second run in this folder would not be noticed", run)
    return True


def _text(file: int) -> str:
    return os.pread(file, 4096, 0).decode(errors="replace")


def _me(job: tuple[int, int] | None) -> str:
    """This process in words: `job 12, attempt 1, process 4711 on node1`."""
    return f"{f'job {job[0]}, attempt {job[1]}, ' if job else ''}process {os.getpid()} on {ranks.node_name()}"


def _is_left_over(holder: str, job: tuple[int, int] | None) -> bool:
    """Whether an earlier attempt of this very job holds the folder: Slurm runs no two of them side by side."""
    if job is None:
        return False
    return holder.startswith(f"job {job[0]}, ") and not holder.startswith(f"job {job[0]}, attempt {job[1]}, ")


def _refusal(run: Path, holder: str) -> str:
    end = f"`mcf jobs cancel {run}`" if holder.startswith("job ") else "stop it"
    return (
        f"run: {run} is in use by {holder or 'a process that has just begun'}; wait for its end, or end it "
        f"({end}), or choose another folder with run="
    )
