"""A job on Slurm, through submitit: one task per rank, requeued at its time limit, going on where it was.

What submitit does by itself is replaced in one point. Its handler of USR2 (sent before the time limit)
requeues from inside of the signal handler, on rank 0 alone, while the other ranks are in the middle of a
step; and TERM (sent by `scontrol requeue` and by preemption) it ignores. Here signals are only remembered
(pipeline.signals): the ranks agree on a step, save, and end; then rank 0 requeues the job if USR2 was the
cause. After TERM, Slurm itself knows what it wants. Ranks that hung have ended themselves with EXIT_HUNG;
then the batch script requeues.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launchers.config import SlurmConfig
from launchers.job import Job, Merge, PreflightError
from launchers.slurm_queue import JobsError, of_folder, take_over
from pipeline import ranks
from pipeline.signals import EXIT_HUNG, EXIT_STOPPED, Stopped, StopRequest

PYTHON = f"{shlex.quote(sys.executable)} -P"
# On a disk of the node: compiled kernels on a network file system are a known trouble (Triton's issue 11512).
NODE_LOCAL = (
    'export TMPDIR="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"',
    'export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$TMPDIR/triton-$USER}"',
)


class SlurmError(RuntimeError):
    """Slurm is absent or refused the job; the message is Slurm's own."""


@dataclass(frozen=True)
class Task:
    """What every task of a Slurm job runs, each time it is started.

    Attributes:
        job: the work; raises Stopped after a signal and a save.
        folder: of the job's logs, where requeues are counted.
        slurm: what was asked of Slurm.
        name: of the Slurm job.
    """

    job: Callable[[], object]
    folder: Path
    slurm: SlurmConfig
    name: str = "mcf"

    def __call__(self) -> str:
        """Runs the job to its end, or to where it was told to stop.

        Returns:
            What the job returned, as text.

        Raises:
            SystemExit: after a stop, or where a node is not fit. Only rank 0 exits with another code than 0: srun ends
                a job at the first task that does, and would do so while rank 0 still asks Slurm for something.
        """
        with StopRequest() as stop:
            try:
                if isinstance(self.job, Job):
                    _preflight(self.job.config)
                result = self.job()
            except (Stopped, PreflightError) as cause:
                ranks.close()
                print(cause, flush=True)
                environment = submitit.JobEnvironment()
                if environment.global_rank > 0:
                    raise SystemExit(0) from None
                if isinstance(cause, PreflightError):
                    self._go_elsewhere(cause.nodes)
                    raise SystemExit(1) from None
                self._requeue(environment.job_id, stop)
                raise SystemExit(EXIT_STOPPED) from None
        ranks.close()
        return str(result)

    def _go_elsewhere(self, nodes: Sequence[str]) -> None:
        """Submits the same job without nodes that failed; a job cannot change its own list."""
        if not nodes:
            return
        without = ",".join([*([self.slurm.exclude] if self.slurm.exclude else []), *nodes])
        old = submitit.JobEnvironment().job_id
        with ranks.as_outside_of_a_job():
            job_id = submit_job(self.job, replace(self.slurm, exclude=without), self.folder, self.name)
        print(f"submitted again as {job_id} without {', '.join(nodes)}", flush=True)
        try:  # before this job fails, and what waits for it is cancelled
            for waiting in take_over(old, job_id):
                print(f"job {waiting}, which waited for this one, now waits for {job_id}", flush=True)
        except JobsError as error:
            print(f"what waits for this job is cancelled with it: {error}", flush=True)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Returns what to run next, for a USR2 that comes before `__call__` has begun: the same."""
        return submitit.helpers.DelayedSubmission(self)

    def _requeue(self, job_id: str, stop: StopRequest) -> None:
        """Puts the job back into the queue if its time limit stopped it, unless too often already."""
        deadline = time.monotonic() + 5  # another rank may have heard of it first
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.1)
        if signal.SIGUSR2 not in stop.signals:
            return
        counter = self.folder / f"{job_id}.requeues"
        done = int(counter.read_text()) if counter.exists() else 0
        if done >= self.slurm.max_requeues:
            print(f"not requeued: {done} times is max_requeues. Submit again to go on", flush=True)
            return
        counter.write_text(str(done + 1))
        subprocess.run(["scontrol", "requeue", job_id], check=True)


def _preflight(config: Any) -> None:
    """Looks at the nodes before a training stage begins.

    Raises:
        PreflightError: one is not fit.
    """
    from pipeline.config import Training

    if isinstance(config, Training):
        from launchers.preflight import preflight  # with torch, which a part of a build need not load

        place = ranks.from_environment()
        ranks.init(place)
        preflight(config, place)


def submit(config: Any, slurm: SlurmConfig, folder: Path, after: str | None = None) -> str:
    """Submits a stage to Slurm.

    Args:
        config: of the stage.
        slurm: what to ask Slurm for.
        folder: for the batch script and the logs; must be visible to all nodes.
        after: id of a job that must have succeeded before; if it does not, this one is cancelled.

    Returns:
        The job id.

    Raises:
        SlurmError: there is no Slurm here, it refused the job, or an earlier one of the same folder waits or runs.
        JobsError: its queue does not answer.
        ValueError: the folder's name holds a pattern of Slurm's.
    """
    if live := next((job for job in of_folder(_checked(folder)) if job.live), None):
        raise SlurmError(
            f"{folder}: job {live.id} is there and {live.words} (user {live.uid}), and a run has one job at a time; "
            f"wait for its end, or end it with `mcf jobs cancel {live.id}`, or choose another folder"
        )
    return submit_job(Job(config), slurm, folder, f"mcf-{config.stage}", after)


def submit_job(
    job: Callable[[], object], slurm: SlurmConfig, folder: Path, name: str = "mcf", after: str | None = None
) -> str:
    """Submits any picklable job; otherwise like `submit`."""
    folder = _checked(folder)
    with _slurms_words():
        return str(_executor(slurm, name, folder, after).submit(Task(job, folder, slurm, name)).job_id)


def _executor(
    slurm: SlurmConfig, name: str, folder: Path, after: str | None = None, throttle: int = 1
) -> submitit.SlurmExecutor:
    """Returns what submits jobs with these settings, after another job, and so many tasks of an array at once."""
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=slurm.max_requeues, python=_python(slurm))
    asked = _parameters(slurm, name, folder) | {"array_parallelism": throttle}
    if after:
        asked["dependency"] = f"afterok:{after}"
        asked["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    executor.update_parameters(**asked)
    return executor


def submit_parts(
    config: Any, slurm: SlurmConfig, parts: int, throttle: int, after: str | None = None, verify: bool = False
) -> tuple[str | None, str]:
    """Submits a build as an array of parts, with a merge after it that begins only when all of them succeeded.

    Parts that are complete already are left out, so that the same call repeats those alone that failed.

    Args:
        config: of stage shards.
        slurm: what to ask Slurm for, for each part.
        parts: into how many the build is divided; the same number each time.
        throttle: how many run at once.
        after: id of a job that must have succeeded before.
        verify: whether the merge checks the dataset, too.

    Returns:
        Job ids of the array (None where no part is left) and of the merge.

    Raises:
        SlurmError: there is no Slurm here, or it refused the job.
        BuildError: the archive or the dataset's folder is not what the config says.
    """
    from shards.build import unfinished_parts

    folder, left = _checked(logs_of(config)), unfinished_parts(config, parts)
    slurm = replace(slurm, nodes=1, tasks_per_node=1)  # a part is the work of one process
    jobs = [Job(replace(config, part=f"{part}/{parts}")) for part in left]
    return submit_array(jobs, Merge(config, verify), slurm, folder, throttle, "mcf-shards", after)


def submit_array(
    jobs: Sequence[Callable[[], object]], last: Callable[[], object], slurm: SlurmConfig, folder: Path, throttle: int,
    name: str, after: str | None = None,
) -> tuple[str | None, str]:  # fmt: skip
    """Submits an array of jobs and a last one, which begins in one process when all of them succeeded.

    Args:
        jobs: picklable; there may be none.
        last: picklable.
        slurm: what to ask Slurm for, for each of them.
        folder: for the batch scripts and the logs; must be visible to all nodes.
        throttle: how many run at once.
        name: of the array.
        after: id of a job that must have succeeded before.

    Returns:
        Job ids of the array (None without jobs) and of the last job.

    Raises:
        SlurmError: there is no Slurm here, or it refused a job.
    """
    folder, submitted = _checked(folder), []
    with _slurms_words():
        if jobs:
            executor = _executor(slurm, name, folder, after, throttle)
            with executor.batch():
                submitted = [executor.submit(Task(job, folder, slurm)) for job in jobs]
        array = _array(submitted[0].job_id) if submitted else None
        single = replace(slurm, nodes=1, tasks_per_node=1)
        return array, submit_job(last, single, folder, "mcf-merge", array or after)


def logs_of(config: Any) -> Path:
    """Returns the folder for batch scripts and logs of a stage; it must be visible to all nodes.

    Of a run it is inside; beside a dataset or a map, of which logs are no part, and here where that is on S3.
    """
    if hasattr(config, "run"):
        return Path(config.run) / "logs"
    name = config.out.rstrip("/")
    return Path(f"{name.rpartition('/')[2] if '://' in name else name}-logs")


def _array(job_id: str) -> str:
    """Returns the id of the array that a task belongs to: 12 of 12_3."""
    return job_id.partition("_")[0]


@contextmanager
def _slurms_words() -> Iterator[None]:
    """What Slurm says when it refuses, as our error; and a word where there is none."""
    if shutil.which("sbatch") is None:
        raise SlurmError("there is no sbatch here; submit where Slurm's commands are, such as a login node")
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"Slurm refused the job: {error}") from error


def script(config: Any, slurm: SlurmConfig, folder: Path) -> str:
    """Returns the batch script that `submit` would hand to sbatch; needs no Slurm."""
    command = f"{_python(slurm)} -u -m submitit.core._submit {shlex.quote(str(_checked(folder)))}"
    parameters = _parameters(slurm, f"mcf-{config.stage}", _checked(folder))
    return _make_sbatch_string(command=command, folder=_checked(folder), **parameters)


def _checked(folder: Path) -> Path:
    """Returns the folder, absolute; ValueError where Slurm would replace a part of it, such as %j."""
    if "%" in str(folder):
        raise ValueError(f"{folder}: Slurm replaces patterns that begin with %; give a folder without %")
    return folder.expanduser().absolute()


def _parameters(slurm: SlurmConfig, name: str, folder: Path) -> dict[str, Any]:
    """Returns submitit's parameters; what is None is left to the cluster."""
    own = {"reservation": slurm.reservation, "nice": slurm.nice}  # which submitit does not know
    asked = {
        "job_name": name,
        "nodes": slurm.nodes,
        "ntasks_per_node": slurm.ranks_per_node,
        "gpus_per_node": slurm.gpus_per_node or None,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": f"{round(slurm.mem_gb * 1024)}MB" if slurm.mem_gb else None,
        "time": slurm.time_min,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "comment": slurm.comment,
        "signal_delay_s": slurm.signal_delay_s,
        "setup": [*_environment(slurm), _requeue_when_hung(slurm, folder), *slurm.setup, *NODE_LOCAL],
        # srun does not inherit sbatch's cores per task since Slurm 22.05.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={slurm.cpus_per_task}"],
        "additional_parameters": {"requeue": True} | {name: value for name, value in own.items() if value is not None},
    }
    return {key: value for key, value in asked.items() if value is not None}


def _environment(slurm: SlurmConfig) -> list[str]:
    """Returns shell lines: the ranks import this very code, inherit no place, and know how early their signal comes."""
    code = shlex.quote(str(Path(__file__).resolve().parents[1]))
    place = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    path = f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"
    given = [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]
    return [path, f"unset {place}", f"export {ranks.LEAD}={slurm.signal_delay_s}", *given]


def _python(slurm: SlurmConfig) -> str:
    """Returns the command that runs Python on a node: this very one, or that of the same place in a container."""
    if slurm.container is None:
        return PYTHON
    code = shlex.quote(str(Path(__file__).resolve().parents[1]))
    gpus = "--nv " if slurm.gpus_per_node else ""
    return f"apptainer exec {gpus}--bind {code} {shlex.quote(slurm.container)} python3 -P"


def _requeue_when_hung(slurm: SlurmConfig, folder: Path) -> str:
    """Returns a shell line: the batch script, which ends as srun does, requeues a job whose ranks hung."""
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"  # as submitit has it
    counter = f"{shlex.quote(str(folder))}/{job}.requeues"
    then = f'n=$(cat {counter} 2>/dev/null || echo 0) && [ "$n" -lt {slurm.max_requeues} ]'
    again = f'echo $((n + 1)) >{counter}; echo "the ranks hung; requeued"; scontrol requeue "$SLURM_JOB_ID"'
    return f"again() {{ if [ $? -eq {EXIT_HUNG} ] && {then}; then {again}; fi; }}; trap again EXIT"
