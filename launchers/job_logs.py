"""What RUN/logs tells of a run's jobs without asking Slurm: which there were, what they said, who died first.

JOB_RANK_log.out, .err     of a job on Slurm; JOB is NUMBER, of an array NUMBER_TASK
JOB_submission.sh          its batch script
JOB.requeues               how often it requeued itself
rank-RANK.log              of `--on local`
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.signals import EXIT_HUNG, EXIT_STOPPED

JOB_ID = r"\d+(?:_\d+)?"
TAIL = 1 << 17  # bytes read at the end of a log
FIRST_LINES, OTHER_LINES = 200, 10  # shown of the log of rank 0, and of another's
STAMP = r"\(([\d-]+ [\d:,]+)\)"  # of submitit
STARTED = re.compile(rf"^submitit INFO {STAMP} - Starting with", re.MULTILINE)
RAISED = re.compile(rf"^submitit ERROR {STAMP} - Submitted job triggered an exception\n", re.MULTILINE)
# srun tells of the task that ended a job, and ends the others.
DIED = re.compile(
    r"^srun: error: \S+: tasks? (\d+)\S*: (.+)\n(?:slurmstepd.*\n)*srun: .*Terminating StepId", re.MULTILINE
)
CANCELLED = re.compile(r"\*\*\* .* CANCELLED AT ([\d-]+T[\d:]+)")
RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)  # torch's, before each line of a rank's traceback
SLURM = ("srun: ", "slurmstepd", "submitit ")


@dataclass(frozen=True)
class Failure:
    """A task that died on its own: its rank, the last line of its error, and its traceback where it left one."""

    rank: int
    error: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"task {self.rank} failed: {self.error}", *self.lines])


@dataclass(frozen=True)
class Logs:
    """The logs of one job, or of `--on local`, whose `job` is empty."""

    folder: Path
    job: str

    def of(self, rank: int) -> list[Path]:
        """Files of a rank, stdout first; none before it has begun."""
        names = [f"{self.job}_{rank}_log.{kind}" for kind in ("out", "err")] if self.job else [f"rank-{rank}.log"]
        return [path for name in names if (path := self.folder / name).exists()]

    def ranks(self) -> list[int]:
        """Who has begun."""
        pattern = rf"{self.job}_(\d+)_log\.(?:out|err)" if self.job else r"rank-(\d+)\.log"
        return sorted({int(match[1]) for name in _names(self.folder) if (match := re.fullmatch(pattern, name))})

    def show(self) -> Iterator[str]:
        """The end of each log, rank 0 first, a text per file that says anything."""
        for rank in self.ranks():
            for path in self.of(rank):
                if lines := tail(path).splitlines()[-(OTHER_LINES if rank else FIRST_LINES) :]:
                    yield "\n".join([f"--- {path}", *lines])

    def failure(self) -> Failure | None:
        """The task that died on its own in the last attempt, before others died of that; None: none is known."""
        return self._slurm_failure() if self.job else self._local_failure()

    def last_words(self) -> str:
        """The last line of rank 0's stderr, one of Slurm's only where there is no other."""
        lines = [line for path in self.of(0)[-1:] for line in RANK.sub("", tail(path)).splitlines() if line.strip()]
        own = [line for line in lines if not line.startswith(SLURM) and "slurm_script: " not in line]
        return (own or lines or [""])[-1]

    def _slurm_failure(self) -> Failure | None:
        """By the time of its exception: whom it takes along fails later. A task that a signal killed leaves none."""
        out, err = ((self.folder / f"{self.job}_0_log.{kind}") for kind in ("out", "err"))
        began = (STARTED.findall(out.read_text(errors="replace")) if out.exists() else []) or [""]
        died = _died(tail(err) if err.exists() else "", began[-1])
        if died and not died.error.startswith("Exited"):
            return died
        raised = []
        for rank in self.ranks():
            text = tail(self.folder / f"{self.job}_{rank}_log.err")
            if (found := list(RAISED.finditer(text))) and found[-1][1] >= began[-1]:
                raised.append((found[-1][1], rank, _traceback(text[found[-1].end() :])))
        if not raised:
            return died
        _, rank, lines = min(raised)
        return Failure(rank, _error(lines), tuple(lines))

    def _local_failure(self) -> Failure | None:
        """The log that ends with a traceback, and of several the one that was ended first."""
        for rank in sorted(self.ranks(), key=lambda rank: self.of(rank)[0].stat().st_mtime):
            lines = _traceback(tail(self.of(rank)[0]))
            if lines and sum(not line.startswith(" ") for line in lines) < 20:
                return Failure(rank, _error(lines), tuple(lines))
        return None


def newest(folder: Path) -> Logs | None:
    """The logs of the newest job in a folder, which may not have begun; None where there was none."""
    jobs = submitted(folder)
    local = Logs(folder, "")
    last = Logs(folder, max(jobs, key=order)) if jobs else local
    if jobs and local.of(0) and _written(local) > _written(last):
        last = local
    return last if jobs or local.of(0) else None


def submitted(folder: Path) -> set[str]:
    """Ids of the jobs on Slurm whose scripts and logs are in a folder."""
    pattern = rf"({JOB_ID})_(?:submission\.sh|\d+_log\.(?:out|err))"
    return {match[1] for name in _names(folder) if (match := re.fullmatch(pattern, name))}


def order(job: str) -> list[int]:
    """A key by which job ids are in the order of submission."""
    return [int(number) for number in job.split("_")]


def requeues(folder: Path, job: str) -> int:
    """How often a job requeued itself."""
    path = folder / f"{job}.requeues"
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else 0


def tail(path: Path, size: int = TAIL) -> str:
    """The whole lines within the last bytes of a file, and a last one that is not whole; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        data = file.read()
    return data[data.find(b"\n") + 1 if start else 0 :].decode(errors="replace")


def copy_new(path: Path, place: int | None, out: TextIO, whole: bool) -> int:
    """Copy lines from a place in a file (None: near its end) to another; the next place. `whole`: half lines too."""
    size = path.stat().st_size
    if place is None and size > TAIL:
        place = size - len(tail(path).encode())
    with path.open("rb") as file:
        file.seek(place or 0)
        data = file.read()
    data = data if whole else data[: data.rfind(b"\n") + 1]
    out.write(data.decode(errors="replace"))
    out.flush()
    return (place or 0) + len(data)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _written(logs: Logs) -> float:
    """When anything of a job was last written."""
    paths = [logs.folder / name for name in _names(logs.folder) if re.match(rf"{logs.job or 'rank-'}[_\d]", name)]
    return max((path.stat().st_mtime for path in paths), default=0.0)


def _traceback(text: str) -> list[str]:
    """The last traceback in a text and what follows it, without what Slurm says."""
    text = RANK.sub("", text)
    start = text.rfind("Traceback (most recent call last):")
    return [] if start < 0 else [line for line in text[start:].splitlines() if line and not line.startswith(SLURM)]


def _error(lines: list[str]) -> str:
    """The error's own line, after a traceback's frames."""
    return next((line for line in lines[1:] if not line[0].isspace()), lines[-1] if lines else "left no message")


def _died(text: str, began: str) -> Failure | None:
    """The task whose end was srun's reason to end the others, in the attempt that began then, unless told to end."""
    found, began = list(DIED.finditer(text)), began.replace(" ", "T").split(",")[0]
    if not found or f"exit code {EXIT_STOPPED}" in found[-1][2]:
        return None
    rank, how, at = int(found[-1][1]), found[-1][2], found[-1].start()
    told = [(match.start() < at, match[1] >= began) for match in CANCELLED.finditer(text)]
    earlier = not any(now for _, now in told) and any(not before for before, _ in told)
    if (True, True) in told or earlier:
        return None
    return Failure(rank, "hung, and ended itself" if f"exit code {EXIT_HUNG}" in how else how)
