"""`mcf jobs`: made-up outputs of Slurm's commands, and jobs on the real one."""

import io
import json
import os
import re
import shlex
import threading
import time
from pathlib import Path

import pytest

from launchers import jobs
from launchers.config import SlurmConfig
from launchers.job_logs import Logs
from launchers.slurm import submit_job
from launchers.slurm_queue import BETWEEN, JobsError
from tests.fake_stages import Tells, Waits, steps
from tests.services.cluster import Cluster
from tests.small_dataset import one_thread, write_dataset  # noqa: F401
from tests.training_scenarios import config

ME = str(os.getuid())
ONE_NODE, TWO_NODES = (SlurmConfig(nodes=nodes, time_min=10) for nodes in (1, 2))
BEGAN = "submitit INFO (2026-11-29 02:46:33,119) - Starting with JobEnvironment(job_id=7)\n"
ENDS_OTHERS = "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
KILLED = "srun: error: node2: task 1: Killed\n"


class FakeSlurm:
    """Slurm's commands as scripts that print what a test says, alone on PATH; `calls` is what they were given."""

    def __init__(self, folder: Path) -> None:
        """Writes none yet."""
        self._folder = folder
        folder.mkdir()

    def command(self, name: str, lines: list[str] | None = None, error: str = "") -> None:
        """Writes one; it fails if there is an error."""
        calls, output = self._folder / "calls", self._folder / f"{name}.output"
        output.write_text("".join(line + "\n" for line in lines or []))
        fail = f"echo {shlex.quote(error)} >&2; exit 1" if error else "exit 0"
        text = f'#!/bin/sh\necho "{name} $*" >>{calls}\n/bin/cat {output}\n{fail}\n'
        (self._folder / name).write_text(text)
        (self._folder / name).chmod(0o755)

    def calls(self) -> str:
        """Returns what was called, a line each."""
        return (self._folder / "calls").read_text()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return fake


def queued(job: str, run: Path, state: str, reason: str = "None", name: str = "mcf-pretrain", uid: str = ME) -> str:
    """Returns a line of squeue."""
    return BETWEEN.join([job, state, reason, "2", "9:45", uid, name, f"{run}/logs/.submission_file_ab.sh"])


def past(job: str, run: Path, state: str, code: str = "0:0", name: str = "mcf-pretrain") -> str:
    """Returns a line of sacct."""
    script = f"sbatch --dependency=afterany:3 {run}/logs/.submission_file_ab.sh"
    return BETWEEN.join([job, state, code, "2", "1-00:00:00", ME, name, script])


def log(run: Path, name: str, text: str) -> Path:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "logs" / name).write_text(text)
    return run / "logs" / name


def row(job: str) -> str:
    """Returns a job's line of the table."""
    return next((line for line in jobs.table().splitlines() if line.startswith(f"{job} ")), "")


def test_the_row_of_a_running_job(fake: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    log(run, "7.requeues", "2\n")
    (run / "config.yaml").write_text("stage: pretrain\nrun: x\nsteps: 1000\n")
    lines = [
        {"step": step, "samples": 8 * step, "samples_per_second": 0.8 if step < 300 else 4, "loss": 1 / step}
        for step in range(1, 401)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 401, "lo')
    (run / "latest").write_text("step-000400\n")
    os.utime(run / "latest", (time.time() - 600,) * 2)
    fake.command("squeue", [queued("7", run, "RUNNING")])
    fake.command("sacct", [past("7", run, "REQUEUED"), past("7", run, "RUNNING")])
    cells = re.split(r"  +", row("7"))
    assert cells[:5] == ["7", "running", "2", str(run), "pretrain"]
    # 2 s a step in the last hundred, 600 steps to go; the job has 9:45.
    assert cells[5:] == ["400/1000", "0.0025", "20 min", "10 min", "2", "10 min ago"]


def test_a_run_of_several_seeds_shows_the_one_at_work(fake: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "several"
    log(run, "7.requeues", "0\n")
    for seed, done in ((0, 40), (1, 12)):
        (run / f"seed-{seed}").mkdir()
        (run / f"seed-{seed}/config.yaml").write_text("stage: finetune\nrun: x\nsteps: 40\n")
        line = {"step": done, "samples": 8 * done, "samples_per_second": 8, "loss": 0.5}
        (run / f"seed-{seed}/metrics.jsonl").write_text(json.dumps(line) + "\n")
    os.utime(run / "seed-0/metrics.jsonl", (time.time() - 600,) * 2)
    fake.command("squeue", [queued("7", run, "RUNNING")])
    cells = re.split(r"  +", row("7"))
    assert [cells[3], *cells[5:8]] == [str(run / "seed-1"), "12/40", "0.5000", "28 s"]


def test_a_run_has_one_row_and_live_jobs_have_all(fake: FakeSlurm, tmp_path: Path) -> None:
    ours, again, array = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    waiting = [queued("9", ours, "PENDING", "Dependency"), queued("8", ours, "RUNNING")]
    waiting += [queued(f"5_{task}", array, "PENDING", "JobArrayTaskLimit", "mcf-shards") for task in (1, 2)]
    fake.command("squeue", [*waiting, queued("99", ours, "RUNNING", name="jupyter")])
    ended = [past("4", again, "FAILED", "85:0"), past("6", again, "CANCELLED by 0"), past("7", ours, "FAILED", "1:0")]
    fake.command("sacct", [*ended, past("3", again, "RUNNING"), past("5_[1-2]", array, "PENDING")])
    lines = jobs.table().splitlines()
    assert [line.split()[0] for line in lines] == ["job", "9", "8", "6", "5_2", "5_1"]
    assert "waits for another job (Dependency)" in lines[1]
    assert "  cancelled  " in lines[3]
    assert "waits for other tasks of its array" in lines[4]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for free nodes (Resources)"),
        ("QOSMaxJobsPerUserLimit", "you may not run more jobs at once (QOSMaxJobsPerUserLimit)"),
        ("AssocGrpCpuLimit", "at a limit of its account (AssocGrpCpuLimit)"),
        ("ReqNodeNotAvail, UnavailableNodes:node1", "nodes it needs are down or reserved"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_why_a_job_waits(fake: FakeSlurm, tmp_path: Path, reason: str, words: str) -> None:
    fake.command("squeue", [queued("9", tmp_path, "PENDING", reason)])
    fake.command("sacct")
    assert words in row("9")


def test_without_accounting_the_queue_is_shown_and_that_is_said(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.command("squeue", [queued("9", tmp_path, "RUNNING")])
    fake.command("sacct", error="Slurm accounting storage is disabled")
    text = jobs.table()
    assert "running" in text
    assert "sacct: Slurm accounting storage is disabled" in text


def test_without_slurm_that_is_said(fake: FakeSlurm, tmp_path: Path) -> None:
    for ask in (jobs.table, lambda: jobs.cancel("12"), lambda: jobs.requeue("12"), lambda: jobs.logs("12")):
        with pytest.raises(JobsError, match="there is no squeue here"):
            ask()


def test_what_cannot_be_done_is_told(fake: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    log(run, "7_0_log.out", "hello\n")
    (run / "config.yaml").write_text("stage: pretrain\nsteps: 1000\n")
    fake.command("sacct")
    fake.command("squeue", error="slurm_load_jobs error: Invalid job id specified")
    with pytest.raises(JobsError, match=rf"knows no job of it; submit: mcf pretrain {run}/config.yaml --on slurm"):
        jobs.requeue(str(run))
    with pytest.raises(JobsError, match="12: Slurm knows no job"):
        jobs.cancel("12")
    with pytest.raises(JobsError, match="nowhere: neither the id of a job, nor a run folder"):
        jobs.cancel(str(tmp_path / "nowhere"))
    fake.command("squeue", error="Unable to contact slurm controller")
    with pytest.raises(JobsError, match="squeue: Unable to contact slurm controller"):
        jobs.table()
    fake.command("squeue", [queued("7", run, "RUNNING", uid="4711")])
    for verb in (jobs.cancel, jobs.requeue):
        with pytest.raises(JobsError, match="7 is a job of another user, whose id is 4711"):
            verb(str(run))
    fake.command("squeue", [queued("7", run, "CANCELLED")])
    with pytest.raises(JobsError, match="none of its jobs is in the queue; the newest, 7, has ended: cancelled"):
        jobs.cancel(str(run))
    fake.command("scontrol", error="Requested operation is presently disabled")
    with pytest.raises(JobsError, match="presently disabled; submit it again: mcf pretrain"):
        jobs.requeue(str(run))


def test_a_job_of_the_same_number_in_another_folder_is_left_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    """As after copying a run from another cluster."""
    copied = tmp_path / "copied"
    log(copied, "7_submission.sh", "")
    fake.command("squeue", [queued("7", tmp_path / "run", "RUNNING")])
    fake.command("sacct")
    with pytest.raises(JobsError, match="knows no job of it"):
        jobs.cancel(str(copied))
    assert "scancel" not in fake.calls()


def test_what_waits_is_cancelled_at_once(fake: FakeSlurm, tmp_path: Path) -> None:
    log(tmp_path, "7_submission.sh", "")
    fake.command("squeue", [queued("7", tmp_path, "PENDING", "Resources")])
    for name in ("sacct", "scancel"):
        fake.command(name)
    assert jobs.cancel(str(tmp_path), wait_s=0) == "7: cancelled while it waited"
    assert "scancel 7\n" in fake.calls()
    assert "TERM" not in fake.calls()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (KILLED + ENDS_OTHERS, "Killed"),
        ("srun: error: node2: tasks 1-3: Segmentation fault\n" + ENDS_OTHERS, "Segmentation fault"),
        ("srun: error: node2: task 1: Exited with exit code 86\n" + ENDS_OTHERS, "hung, and ended itself"),
        ("srun: error: node2: task 1: Exited with exit code 85\n" + ENDS_OTHERS, None),
        ("slurmstepd: error: *** STEP 7.0 ON a CANCELLED AT 2026-11-29T02:47:46 ***\n" + KILLED + ENDS_OTHERS, None),
        (KILLED + ENDS_OTHERS + "slurmstepd: error: *** STEP 7.0 ON a CANCELLED AT 2026-11-29T02:40:00 ***\n", None),
    ],
    ids=["killed", "crashed", "hung", "stopped", "cancelled", "an earlier attempt"],
)
def test_who_was_ended_by_a_signal_is_known_by_srun(tmp_path: Path, said: str, error: str | None) -> None:
    log(tmp_path, "7_0_log.out", BEGAN)
    log(tmp_path, "7_0_log.err", said)
    failure = Logs(tmp_path / "logs", "7").failure()
    assert (failure and (failure.rank, failure.error)) == (error and (1, error))


def test_the_first_to_fail_is_told_of_in_spite_of_those_it_took_along(tmp_path: Path) -> None:
    raised = "submitit ERROR (2026-11-29 02:4{}) - Submitted job triggered an exception\n"
    trace = "Traceback (most recent call last):\n"
    rank = "[rank1]: "  # as torch writes where ranks are connected
    log(tmp_path, "7_0_log.out", BEGAN + "step 1\n")
    exited = "srun: error: node1: task 0: Exited with exit code 1\n" + ENDS_OTHERS
    log(
        tmp_path,
        "7_0_log.err",
        raised.format("7:00,900") + trace + '  File "a"\nRuntimeError: Connection closed\n' + exited,
    )
    log(
        tmp_path,
        "7_1_log.err",
        raised.format("7:00,100") + f'{rank}{trace}{rank}  File "b"\n{rank}ValueError: no such luck\nat all\n',
    )
    log(tmp_path, "7_2_log.err", raised.format("5:00,000") + trace + '  File "c"\nOSError: in an earlier attempt\n')
    text = jobs.logs(str(tmp_path))
    assert text.startswith(f"--- {tmp_path}/logs/7_0_log.out\n")
    assert text.endswith(
        '--- task 1 failed: ValueError: no such luck\nTraceback (most recent call last):\n  File "b"\n'
        "ValueError: no such luck\nat all"
    )


def test_logs_of_local_ranks_need_no_slurm(fake: FakeSlurm, tmp_path: Path) -> None:
    trace = 'Traceback (most recent call last):\n  File "a"\n'
    first = log(tmp_path, "rank-1.log", "\n".join(map(str, range(30))) + f"\n{trace}RuntimeError: no such luck\n")
    os.utime(first, (time.time() - 5,) * 2)
    log(tmp_path, "rank-0.log", f"step 1\n{trace}RuntimeError: Connection closed\n")
    text = jobs.logs(str(tmp_path))
    assert text.index("rank-0.log\nstep 1") < text.index("rank-1.log\n23\n") < text.index("--- task 1 failed: Run")
    with pytest.raises(JobsError, match="no logs there"):
        jobs.logs(str(tmp_path / "logs"))


def test_a_log_is_followed_while_somebody_writes_it(fake: FakeSlurm, tmp_path: Path) -> None:
    path, out = log(tmp_path, "rank-0.log", "one\n"), io.StringIO()
    with path.open("a") as file:
        following = threading.Thread(target=jobs.follow, args=(str(tmp_path), out, 0.02))
        following.start()
        for word in ("two\n", "thr", "ee\n", "four"):
            file.write(word)
            file.flush()
            time.sleep(0.1)
        assert out.getvalue() == "one\ntwo\nthree\n"
        assert following.is_alive()
    following.join(timeout=30)
    assert out.getvalue() == "one\ntwo\nthree\nfour"


@pytest.mark.slurm
def test_requeued_and_cancelled_a_run_loses_nothing(slurm: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: pretrain\nsteps: 600\n")
    job = submit_job(Tells(folder, 600, 0.1), ONE_NODE, folder / "logs", "mcf-pretrain")
    try:
        slurm.wait_until(lambda: len(steps(folder)) >= 3, job)
        assert re.search(rf"^{job} +running +1 .* pretrain +\d+/600 +0\.\d+ +\d+ \w+ +\d+ min +0 +\d s ago", row(job))
        said = jobs.requeue(str(folder))
        saved = (folder / "saved").read_text()
        assert f"{job}: saved at step {saved} and ended; requeued" in said
        slurm.wait_until(lambda: steps(folder)[-1]["from"] == int(saved), job)
        assert re.search(rf"^{job} +running .* 1 +\d s ago", row(job)), row(job)
        said = jobs.cancel(str(folder))
        saved = (folder / "saved").read_text()
        assert said.startswith(f"{job}: saved at step {saved} and ended; the same command resumes it: mcf pretrain")
        assert " stopped " in row(job)
        again = submit_job(Tells(folder, int(saved) + 5, 0.1), ONE_NODE, folder / "logs", "mcf-pretrain")
        out = io.StringIO()
        jobs.follow(str(folder), out)
        assert "Job completed successfully" in out.getvalue()
        assert " completed " in row(again)
        assert not row(job), "replaced by the newer job of the run"
        assert [line["step"] for line in steps(folder)] == list(range(int(saved) + 5))
    finally:
        slurm.cancel(job)


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_a_failed_job_says_who_and_why_and_one_that_fails_always_stays_down(slurm: Cluster, tmp_path: Path) -> None:
    """A pretraining whose rank 1 raises in its first step; it may start once without getting further."""
    write_dataset(tmp_path / "data")
    settings, run = config(tmp_path, "run", guard={"starts": 1}, track=[]), tmp_path / "run"
    job = submit_job(Waits(settings, at=(1, 1), fails=True), TWO_NODES, run / "logs", "mcf-pretrain")
    slurm.watch(job, run / "logs")
    slurm.wait(job, "FAILED")
    assert "--- task 1 failed: RuntimeError: no such luck\nTraceback" in jobs.logs(job)
    assert re.search("failed .* task 1: RuntimeError: no such luck$", row(job))
    assert "had ended (failed); requeued" in jobs.requeue(str(run))
    slurm.wait_until(lambda: slurm.facts(job)["Restarts"] == "1", job)
    slurm.wait(job, "FAILED")
    down = "StaysDown: run: .* was started 1 times from step 0 .*The last start: rank 1: RuntimeError: no such luck"
    assert re.search(f"failed .* task 0: .*{down}", row(job)), row(job)
