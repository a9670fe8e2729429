"""Slurm's queue and accounting, asked through its own commands: standard library only, no JSON plugins."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launchers import job_logs
from launchers.job_logs import JOB_ID
from pipeline.signals import EXIT_HUNG, EXIT_STOPPED

BETWEEN = "\x1f"  # fields; a character that no path, name or reason holds
TIMEOUT_S = 60.0  # for one of Slurm's commands
ENDING = ("RUNNING", "COMPLETING")
LIVE: tuple[str, ...] = (*ENDING, "PENDING", "CONFIGURING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING")
LIVE += ("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "others come first",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "the job it waits for did not end as asked; cancel it",
    "BeginTime": "starts in a while, as requeued jobs do",
    "JobArrayTaskLimit": "waits for other tasks of its array",
    "JobHeldUser": "held by you; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than its partition allows",
    "PartitionNodeLimit": "asks for more nodes than its partition allows",
    "PartitionDown": "its partition is down",
    "QOSMaxJobsPerUserLimit": "you may not run more jobs at once",
}
MORE_REASONS = {  # by how they begin
    "ReqNodeNotAvail": "nodes it needs are down or reserved",
    "QOS": "at a limit of its quality of service",
    "Assoc": "at a limit of its account",
}


class JobsError(ValueError):
    """There is no Slurm or no such job, it is another's, or Slurm refused; the message says which and what to do."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as Slurm tells of it.

    Attributes:
        id: its number; of an array NUMBER_TASK.
        state: Slurm's word.
        reason: why it waits, in Slurm's word; of an ended one its exit code, CODE:SIGNAL, where it is known.
        nodes: how many.
        left: seconds until its limit, infinity where it has none; of an ended one, what it had at the start.
        uid: of its user.
        name: mcf-STAGE.
        logs: folder of its batch script and its logs.
        requeues: how often it was started again.
    """

    id: str
    state: str
    reason: str
    nodes: str
    left: float
    uid: str
    name: str
    logs: Path
    requeues: int = 0

    @property
    def live(self) -> bool:
        """Whether it is in the queue."""
        return self.state in LIVE

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.logs.parent

    @property
    def words(self) -> str:
        """The state in plain words; `stopped` where the ranks were told to, saved and ended."""
        ours = {f"{EXIT_STOPPED}:0": "stopped", f"{EXIT_HUNG}:0": "hung"}
        return ours.get(self.reason if self.state == "FAILED" else "", self.state.lower().replace("_", " "))

    @property
    def waits_for(self) -> str:
        """Why it waits, in plain words and Slurm's; empty where Slurm gives no reason."""
        reason = self.reason
        begins = (text for begin, text in MORE_REASONS.items() if reason.startswith(begin))
        known = REASONS.get(reason) or next(begins, "")
        return "" if reason in ("", "None") else f"{known} ({reason})" if known else reason


def call(*command: str) -> str:
    """What one of Slurm's commands prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except OSError:
        raise JobsError(
            f"there is no {command[0]} here; ask where Slurm's commands are, such as a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise JobsError(f"{command[0]}: no answer within {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise JobsError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def look(*ids: str) -> tuple[list[SlurmJob], list[str]]:
    """Jobs by id, or this user's of today; newest first. With it what could not be asked."""
    which = ["--jobs", ",".join(ids)] if ids else ["--user", str(os.getuid())]
    queue, trouble, jobs = _queue(which, "%i %T %r %D %L %U %j %o"), list[str](), dict[str, SlurmJob]()
    counted = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--delimiter={BETWEEN}", *which]
    counted += ["--format", "JobID,State,ExitCode,NNodes,Timelimit,UID,JobName,SubmitLine"]
    try:
        past = call(*counted, *([] if ids else ["--starttime", "now-1days"])).splitlines()
    except JobsError as error:
        past, trouble = [], [f"which jobs ended a while ago is not known: {error}"]
    for line in past:
        if (job := _parsed(line)) and not job.live:  # what lives is in the queue; else accounting has lost its end
            jobs[job.id] = job
    codes = {job.id: job.reason for job in jobs.values()}
    for line in queue:
        if job := _parsed(line):
            jobs[job.id] = job if job.live else replace(job, reason=codes.get(job.id, ""))
    starts = [line.partition(BETWEEN)[0] for line in past]
    found = [
        replace(job, requeues=max(job_logs.requeues(job.logs, job.id), starts.count(job.id) - 1))
        for job in jobs.values()
    ]
    return sorted(found, key=lambda job: job_logs.order(job.id), reverse=True), trouble


def of_folder(logs: Path) -> list[SlurmJob]:
    """Jobs that Slurm knows, whose scripts and logs are in a folder; newest first."""
    ids = {job.split("_")[0] for job in job_logs.submitted(logs)}
    # A folder that was copied from elsewhere names jobs that are others here.
    place = os.path.realpath(logs)
    return [job for job in look(*sorted(ids))[0] if os.path.realpath(job.logs) == place] if ids else []


def take_over(old: str, new: str) -> list[str]:
    """Let this user's jobs that wait for one job wait for another instead; their ids.

    Raises:
        JobsError: Slurm does not answer, or refused.
    """
    moved = []
    for line in _queue(["--user", str(os.getuid())], "%i %T %E"):
        job, state, waits = line.split(BETWEEN)
        words = re.sub(r"\(\w+\)", "", waits)  # afterok:12(unfulfilled)
        changed = re.sub(rf"\b{old}\b", new, words)
        if state == "PENDING" and changed != words:
            call("scontrol", "update", f"JobId={job}", f"Dependency={changed}")
            moved.append(job)
    return moved


def _queue(which: Sequence[str], fields: str) -> list[str]:
    """A line of fields for each job in the queue, or ended so lately that the controller remembers it."""
    try:
        asked = ("--noheader", "--array", "--states=all", "--format", BETWEEN.join(fields.split()))
        return call("squeue", *asked, *which).splitlines()
    except JobsError as error:
        if "Invalid job id" in str(error):  # how it says that none of these is remembered
            return []
        raise


def _parsed(line: str) -> SlurmJob | None:
    """A job from a line of squeue or sacct; None for what no batch script began, or a whole array."""
    fields = line.split(BETWEEN)
    script = re.search(r"(?:^|\s)(/.*)$", fields[-1])  # sacct: after `sbatch` and its options
    if len(fields) != 8 or not script or not re.fullmatch(JOB_ID, fields[0]):
        return None
    job, state, reason, nodes, left, uid, name, _ = fields
    # sacct: CANCELLED by UID
    return SlurmJob(job, state.split()[0], reason, nodes, _seconds(left), uid, name, Path(script[1]).parent)


def states(ids: Collection[str]) -> dict[str, str]:
    """State of each job that the controller remembers."""
    lines = _queue(["--jobs", ",".join(ids)], "%i %T") if ids else []
    return dict(line.split(BETWEEN)[:2] for line in lines)


def _seconds(text: str) -> float:
    """Seconds of [DAYS-][HOURS:]MINUTES:SECONDS; infinity of UNLIMITED and other words."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+)+", clock):
        return float("inf")
    parts = [float(part) for part in reversed(clock.split(":"))]
    return 86400.0 * int(days or 0) + sum(part * size for part, size in zip(parts, (1, 60, 3600), strict=False))
