"""Jobs on Slurm, looked at and told to stop or to go on: `mcf jobs [logs|cancel|requeue RUN]`.

RUN is a run folder or a job id. Slurm is asked through its own commands; what a run has reached is read in its folder.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from launchers import job_logs
from launchers.job_logs import JOB_ID, Logs
from launchers.slurm_queue import ENDING, LIVE, JobsError, SlurmJob, call, look, of_folder, states
from pipeline.log import METRICS

SAVE_S = 300.0  # for a job to save when it is to end
KILLED_S = 60.0  # for Slurm to end a job; its KillWait is less as a rule
AGAIN_S = 10.0  # between two TERMs: one that comes while Python starts is lost
RECENT = 100  # steps whose median time counts
NOTE = 240  # characters; room for the folder's name in what keeps a run down, and for the cause
HEADER = ["job", "state", "nodes", "run", "stage", "step", "loss", "left", "job has", "requeues", "checkpoint", "note"]


def table() -> str:
    """This user's jobs in the queue and those that ended in the last day, newest first, with what they have reached.

    Of a run that was submitted again after its job had ended, the newer job only.

    Raises:
        JobsError: no Slurm here, or it does not answer.
    """
    found, trouble = look()
    rows, seen = [HEADER], set()
    for job in found:
        place = (job.logs, job.id.partition("_")[2])
        if re.fullmatch("mcf(-.*)?", job.name) and (job.live or place not in seen):
            rows.append(_row(job))
        seen.add(place)
    if len(rows) == 1:
        return "\n".join(["no jobs in the queue, and none that ended in the last day", *trouble])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + trouble)


def logs(run: str) -> str:
    """The end of what the newest job of a run said: rank 0, the others, and the error of the task that died on its own.

    Raises:
        JobsError: no such run or job, or it has not said anything.
    """
    found = _logs(run)
    if not (parts := list(found.show())):
        raise JobsError(f"{found.folder}: job {found.job} has not said anything; `mcf jobs` tells what it waits for")
    return "\n".join([*parts, *_explained(found)])


def follow(run: str, out: TextIO | None = None, every_s: float = 0.5) -> None:
    """Print what rank 0 of the newest job says, as it comes, until the job ends; then why, where a task died.

    Args:
        run: run folder or job id.
        out: where to; None is stdout.
        every_s: seconds between looks at the files; every tenth time Slurm is asked.

    Raises:
        JobsError: no such run or job.
    """
    found, out, places, going = _logs(run), out or sys.stdout, dict[Path, int](), True
    for tick in itertools.count():
        going = _goes_on(found) if tick % 10 == 0 else going
        for path in found.of(0):
            places[path] = job_logs.copy_new(path, places.get(path), out, whole=not going)
        if not going:
            break
        time.sleep(every_s)
    for text in _explained(found):
        print(text, file=out)


def cancel(run: str, wait_s: float = SAVE_S) -> str:
    """End the jobs of a run so that it can be resumed; what became of each, a line per job.

    After `scancel` alone the ranks have Slurm's KillWait, 30 s by default, to finish a step and save. So they are sent
    TERM first, and the batch script is not: they save and end, and the job with them. What has not ended after `wait_s`
    seconds is cancelled by Slurm.

    Raises:
        JobsError: no job of that run is in the queue, it is another user's, or Slurm refused.
    """
    found = _jobs(run)
    live = [job for job in found if job.live]
    if not live:
        raise JobsError(
            f"{run}: none of its jobs is in the queue; the newest, {found[0].id}, has ended: {found[0].words}"
        )
    _check_own(live)
    # What waits must not start because the job before it ends.
    if waiting := [job.id for job in live if job.state not in ENDING]:
        _scancel(*waiting)
    before = {job.id: _reached(job) for job in live}
    _save([job.id for job in live if job.id not in waiting], wait_s)
    if rest := [job for job, state in states([job.id for job in live]).items() if state in LIVE]:
        _scancel(*rest)
        _save(rest, KILLED_S)
    return "\n".join(
        f"{job.id}: cancelled while it waited" if job.id in waiting else f"{_ended(job, before[job.id])}; {_again(job)}"
        for job in live
    )


def requeue(run: str, wait_s: float = SAVE_S) -> str:
    """Start the newest job of a run again, running or ended; what happened. One that runs saves first, as in `cancel`.

    Raises:
        JobsError: no job of that run, another user's, waiting already, or Slurm does not requeue it.
    """
    job = _jobs(run)[0]
    _check_own([job])
    if job.live and job.state not in ENDING:
        raise JobsError(f"{job.id} is in the queue already: {job.words} {job.waits_for}")
    before, how = _reached(job), f"{job.id}: had ended ({job.words})"
    if job.live:
        _save([job.id], wait_s)
        how = _ended(job, before)
    try:
        call("scontrol", "requeue", job.id)
    except JobsError as error:
        raise JobsError(f"{how}. {error}; submit it again: {_command(job.run)}") from None
    return f"{how}; requeued, and started again once Slurm lets it, by default after two minutes"


def _jobs(run: str) -> list[SlurmJob]:
    """The jobs of a run, or of a job id, that Slurm knows, newest first; one at least."""
    folder = Path(run) / "logs"
    if _is_id(run):
        found = look(run)[0]
    elif job_logs.submitted(folder):
        found = of_folder(folder)
    else:
        raise JobsError(f"{run}: neither the id of a job, nor a run folder whose logs/ names one")
    if not found:
        raise JobsError(
            f"{run}: Slurm knows no job of it" + ("" if _is_id(run) else f"; submit: {_command(Path(run))}")
        )
    return found


def _is_id(run: str) -> bool:
    return re.fullmatch(JOB_ID, run) is not None and not Path(run).is_dir()


def _check_own(jobs: Sequence[SlurmJob]) -> None:
    if other := next((job for job in jobs if job.uid != str(os.getuid())), None):
        raise JobsError(f"{other.id} is a job of another user, whose id is {other.uid}")


def _save(ids: Sequence[str], wait_s: float) -> None:
    """Let running jobs save and end; back when none of them runs, or after `wait_s` seconds."""
    deadline, told = time.monotonic() + wait_s, float("-inf")
    while ids and time.monotonic() < deadline:
        now = states(ids)
        if not any(now.get(job) in ENDING for job in ids):
            return
        running = [job for job in ids if now.get(job) == "RUNNING"]
        if running and time.monotonic() - told >= AGAIN_S:
            _scancel("--signal=TERM", *running)
            told = time.monotonic()
        time.sleep(1)


def _scancel(*arguments: str) -> None:
    """Cancel or signal jobs; no matter if one has ended meanwhile."""
    try:
        call("scancel", *arguments)
    except JobsError as error:
        if "already complet" not in str(error):
            raise


def _reached(job: SlurmJob) -> tuple[tuple[int, float] | None, int]:
    """The checkpoint of a job's run, and how much its rank 0 has said, in bytes."""
    out = job.logs / f"{job.id}_0_log.out"
    return _checkpoint(job.run), out.stat().st_size if out.exists() else 0


def _ended(job: SlurmJob, before: tuple[tuple[int, float] | None, int]) -> str:
    """What became of a job that was told to end, by what it had reached until then."""
    now, out = _checkpoint(job.run), job.logs / f"{job.id}_0_log.out"
    new = out.read_bytes()[before[1] :].decode(errors="replace") if out.exists() else ""
    if now and now != before[0]:
        return f"{job.id}: saved at step {now[0]} and ended"
    if words := re.search(r"^stopped.*", new, re.MULTILINE):  # its checkpoints are in another store
        return f"{job.id}: saved and ended, saying {words[0]!r}"
    last = (
        f"the last checkpoint is of step {now[0]}, {_span(time.time() - now[1])} ago" if now else "no checkpoint here"
    )
    return f"{job.id}: ended without saving; {last}"


def _again(job: SlurmJob) -> str:
    return f"the same command resumes it: {_command(job.run)}"


def _command(run: Path) -> str:
    """What submits a run again."""
    stage, _ = _configured(run)
    return f"mcf {stage} {run}/config.yaml --on slurm" if stage else "as it was submitted"


def _configured(run: Path) -> tuple[str, int]:
    """Stage and steps of a run's config, which `configs.dump` wrote; "" and 0 where there are none."""
    path = run / "config.yaml"
    text = path.read_text(errors="replace") if path.exists() else ""
    stage, steps = (re.search(pattern, text, re.MULTILINE) for pattern in (r"^stage: (\w+)$", r"^steps: (\d+)$"))
    return stage[1] if stage else "", int(steps[1]) if steps else 0


def _checkpoint(run: Path) -> tuple[int, float] | None:
    """Step of the newest checkpoint in a run's folder, and when it was written; None where there is none."""
    path = run / "latest"
    with suppress(OSError):
        if match := re.fullmatch(r"step-(\d+)\n", path.read_text(errors="replace")):
            return int(match[1]), path.stat().st_mtime
    return None


def _logs(run: str) -> Logs:
    """The logs of the newest job."""
    if _is_id(run):
        job = _jobs(run)[0]
        if not os.access(job.logs, os.R_OK):
            raise JobsError(f"{job.logs}: you may not read the logs of job {job.id}")
        return Logs(job.logs, job.id)
    if found := job_logs.newest(Path(run) / "logs"):
        return found
    raise JobsError(f"{run}: no logs there, so no run on Slurm or with --on local, and no job id")


def _explained(found: Logs) -> list[str]:
    failure = found.failure()
    return [f"--- {failure}"] if failure else []


def _goes_on(found: Logs) -> bool:
    """Whether a job will say more; where Slurm cannot tell, whether a process here has its log open."""
    if found.job and shutil.which("squeue"):
        try:
            return states([found.job]).get(found.job) in LIVE
        except JobsError:  # the controller may be busy
            return True
    files = {os.path.realpath(path) for path in found.of(0)}
    return any(target in files for target in _open_files())


def _open_files() -> Iterator[str]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            yield os.readlink(link)


def _row(job: SlurmJob) -> list[str]:
    """A job's line of the table."""
    run = _at_work(job.run)
    stage, steps = _configured(run)
    recent = list(_recent(run / METRICS))
    step, loss = (recent[-1].get("step"), recent[-1].get("loss")) if recent else (None, None)
    seconds = [line["samples"] / line["step"] / line["samples_per_second"] for line in recent]
    left = _span(statistics.median(seconds) * max(0, steps - step)) if job.live and steps and step else "-"
    saved = _checkpoint(run)
    return [
        job.id,
        job.words,
        job.nodes,
        os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run),
        job.name.partition("-")[2] or stage or "-",
        (f"{step}/{steps}" if steps else str(step)) if step else "-",
        f"{loss:.4f}" if isinstance(loss, float) else "-",
        left,
        _span(job.left) if job.live else "-",
        str(job.requeues),
        f"{_span(time.time() - saved[1])} ago" if saved else "-",
        _note(job),
    ]


def _at_work(run: Path) -> Path:
    """The run's folder; where it makes several seeds one after the other, that of the newest."""

    def written(folder: Path) -> float:
        with suppress(OSError):
            return (folder / METRICS).stat().st_mtime
        return 0.0

    return max([run, *run.glob("seed-*")], key=written)


def _recent(path: Path) -> Iterator[dict[str, Any]]:
    """The last whole lines of metrics.jsonl."""
    for line in job_logs.tail(path).splitlines()[-RECENT:]:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and all(found.get(key) for key in ("step", "samples", "samples_per_second")):
                yield found


def _note(job: SlurmJob) -> str:
    """Why a job waits, or what it died of."""
    if job.live:
        return job.waits_for if job.state != "RUNNING" else ""
    if job.state in ("COMPLETED", "CANCELLED") or job.words == "stopped":
        return ""
    found = Logs(job.logs, job.id)
    failure = found.failure()
    text = f"task {failure.rank}: {failure.error}" if failure else found.last_words()
    return text if len(text) <= NOTE else f"{text[: NOTE - 3]}..."


def _span(seconds: float) -> str:
    """A time span in the unit that suits it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return "no limit" if seconds == float("inf") else f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
