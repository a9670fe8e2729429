"""Slurm seen by a test: submit a job, look at it, interfere with it."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from launchers.config import SlurmConfig
from tests.services.daemon import run

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class Cluster:
    """The Slurm that SLURM_CONF names, and the jobs submitted through this object."""

    def __init__(self) -> None:
        """Nothing is submitted yet."""
        self._folders: dict[str, Path] = {}

    def submit(self, job: Callable[[], object], settings: SlurmConfig, folder: Path) -> str:
        """Submits a picklable job (such as `launchers.job.Job(config)`) as the launcher does; returns its id."""
        from launchers.slurm import submit_job

        job_id = submit_job(job, settings, folder)
        self._folders[job_id] = folder
        return job_id

    def watch(self, job_id: str, folder: Path) -> None:
        """Takes on a job that was submitted elsewhere, with its folder of logs."""
        self._folders[job_id] = folder

    def array(self, job_id: str) -> dict[str, str]:
        """Returns the states of an array's tasks by their number, from the accounting."""
        text = run(["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "JobID,State"], seconds=30)
        lines = (line.split("|") for line in text.split())
        return {name.partition("_")[2]: state for name, state in lines}

    def facts(self, job_id: str) -> dict[str, str]:
        """Returns what `scontrol show job` knows of a job: JobState, Restarts, NodeList, ExitCode, ..."""
        text = run(["scontrol", "show", "job", "--oneliner", job_id], seconds=30)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job_id: str) -> str:
        """Returns the state of a job, such as RUNNING."""
        return self.facts(job_id)["JobState"]

    def wait(self, job_id: str, state: str = "COMPLETED", seconds: float = 120) -> None:
        """Waits until a job is in a state.

        Raises:
            AssertionError: it ended in another, or too late; the message carries the job's logs.
        """
        self.wait_until(lambda: self.state(job_id) in (state, *ENDED), job_id, seconds)
        assert self.state(job_id) == state, f"{self.state(job_id)}, not {state}\n{self.logs(job_id)}"

    def wait_until(self, reached: Callable[[], bool], job_id: str, seconds: float = 60) -> None:
        """Waits for anything a job does; AssertionError with the job's logs when it takes too long."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s: {self.facts(job_id)}\n{self.logs(job_id)}"
            time.sleep(0.3)

    def logs(self, job_id: str) -> str:
        """Returns all that the tasks of a job have said."""
        files = sorted(self._folders[job_id].glob(f"{job_id}_*_log.*"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def requeue(self, job_id: str) -> None:
        """Puts a running job back into the queue, as an administrator or a preemption does (TERM to the tasks)."""
        run(["scontrol", "requeue", job_id], seconds=30)

    def signal(self, job_id: str, name: str) -> None:
        """Sends a signal to the tasks of a job, as Slurm does USR2 before the time limit."""
        run(["scancel", f"--signal={name}", job_id], seconds=30)

    def update(self, job_id: str, setting: str) -> None:
        """Changes a job as an administrator does, such as `TimeLimit=10`."""
        run(["scontrol", "update", f"JobId={job_id}", setting], seconds=30)

    def preempt(self, job_id: str) -> str:
        """Submits a short job of higher priority that needs all of a node of this one's; returns its id."""
        (node, *_) = run(["scontrol", "show", "hostnames", self.facts(job_id)["NodeList"]], seconds=30).split()
        folder = self._folders[job_id]
        options = ["--parsable", "--partition=urgent", "--exclusive", f"--nodelist={node}", "--time=1"]
        other = run(["sbatch", *options, f"--output={folder}/%j_0_log.out", "--wrap=sleep 1"], seconds=30).strip()
        self._folders[other] = folder
        return other

    def cancel(self, job_id: str) -> None:
        """Cancels a job; nothing happens when it has ended."""
        run(["scancel", job_id], seconds=30)

    def close(self) -> None:
        """Cancels all jobs submitted through this object."""
        for job_id in self._folders:
            self.cancel(job_id)
