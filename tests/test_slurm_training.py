"""Pretraining on a real Slurm: what a run meets there, and that it ends with the numbers of one that met nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.config import SlurmConfig
from launchers.job import Job
from launchers.slurm import SlurmError, submit
from pipeline import checkpoint, log
from pipeline.holding import RunHeld
from pipeline.pretrain import pretrain
from tests.fake_stages import Waits
from tests.services.cluster import Cluster
from tests.services.slurm import lose_node, return_node
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config

STEPS = 10
HOW = {"steps": STEPS, "checkpoint_every": 2, "batch": {"global_batch": 4}, "track": []}
AT = (3, 5, 7, 9)  # where the attempts are caught
SPARE = SlurmConfig(nodes=2, partition="spare", time_min=10, signal_delay_s=25)  # which makes room for `urgent`
LOOKS_S = 30  # how often Slurm looks at time limits


@pytest.mark.slurm
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_whatever_slurm_does_to_a_run_changes_no_number(
    slurm: Cluster, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit, a preemption, a requeue and a lost node, on two nodes that read from S3, against this process alone
    and a folder; and meanwhile nobody else gets into the run folder."""
    monkeypatch.setenv("RANK", "0")  # who submits may be a rank of something else
    monkeypatch.setenv("WORLD_SIZE", "1")
    write_dataset(tmp_path / "data")
    write_dataset(f"{s3_url}/data")
    run, settings = tmp_path / "there", config(tmp_path, "there", data=f"{s3_url}/data", **HOW)
    job_id = slurm.submit(Waits(settings, AT), SPARE, run / "logs")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    def caught(attempt: int) -> None:
        slurm.wait_until((run / f"waits-{attempt}").exists, job_id, 120)

    def started_again(times: int) -> None:
        slurm.wait_until(lambda: slurm.facts(job_id)["Restarts"] == str(times), job_id, 120)

    caught(1)
    _nobody_else_begins(settings, run, job_id)
    _soon_over(slurm, job_id)
    pretrain(config(tmp_path, "here", **HOW))
    started_again(1)
    assert checkpoint.find(run).step == 3, "not saved before the time limit"
    assert (run / "logs" / f"{job_id}.requeues").read_text() == "1"
    slurm.update(job_id, "TimeLimit=10")
    caught(2)
    urgent = slurm.preempt(job_id)
    slurm.wait(urgent, "COMPLETED")
    started_again(2)
    caught(3)
    slurm.requeue(job_id)
    started_again(3)
    caught(4)
    lost = f"node{re.findall(r'[0-9]+', slurm.facts(job_id)['NodeList'])[-1]}"
    lose_node(lost)
    try:
        started_again(4)
        assert checkpoint.find(run).step == 8, "the last checkpoint before the node was lost"
        slurm.wait(job_id, "COMPLETED")
    finally:
        return_node(lost)
    assert lost.removeprefix("node") not in re.findall(r"\d+", slurm.facts(job_id)["NodeList"])
    assert slurm.logs(job_id).count("stopped as asked after step") == 6, "both ranks, each time, in logs that go on"
    assert (run / "logs" / f"{job_id}.requeues").read_text() == "2", "those after USR2 are counted, by the job itself"
    here, there = log.read(tmp_path / "here"), log.read(run)
    alone, whole = (checkpoint.find(folder).build().state_dict() for folder in (tmp_path / "here", run))
    assert alone.keys() == whole.keys(), "the parameters of two ranks make a whole model"
    assert all(torch.allclose(whole[name], alone[name], rtol=1e-4, atol=1e-6) for name in alone)
    assert [line["step"] for line in there] == list(range(1, STEPS + 1))
    assert [line["digest"] for line in there] == [line["digest"] for line in here]
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in here], rel=1e-6)


@pytest.mark.slurm
def test_two_nodes_of_two_tasks_have_the_losses_of_this_process_alone(slurm: Cluster, tmp_path: Path) -> None:
    """As four local processes have (tests/test_engine.py)."""
    write_dataset(tmp_path / "data")
    there, here = (config(tmp_path, name, **{**HOW, "steps": 4}) for name in ("there", "here"))
    wanted = SlurmConfig(nodes=2, tasks_per_node=2, time_min=10)
    job_id = slurm.submit(Job(there), wanted, tmp_path / "there/logs")
    pretrain(here)
    slurm.wait(job_id, "COMPLETED", 240)
    found, expected = (log.read(tmp_path / name) for name in ("there", "here"))
    assert [line["digest"] for line in found] == [line["digest"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert len(found) == 4


def _soon_over(slurm: Cluster, job_id: str) -> None:
    """Gives a job as few minutes as let Slurm look before they are over: one, unless it was slow to begin."""
    minutes, seconds = slurm.facts(job_id)["RunTime"].split(":")[1:]
    slurm.update(job_id, f"TimeLimit={int(minutes) + 1 + (int(seconds) + LOOKS_S >= 58)}")


def _nobody_else_begins(settings: Any, run: Path, job_id: str) -> None:
    """Neither as another job nor here, while the run is a job's."""
    with pytest.raises(SlurmError, match=rf"job {job_id} is there and running .*mcf jobs cancel {job_id}"):
        submit(settings, SPARE, run / "logs")
    with pytest.raises(RunHeld, match=rf"job {job_id}, attempt 1, process \d+ on node\d"):
        pretrain(settings)
