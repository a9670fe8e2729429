"""Pretraining on a real Slurm: what a run meets there, and that it ends with the numbers of one that met nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launchers.config import SlurmConfig
from launchers.job import Job
from pipeline import checkpoint, log
from pipeline.pretrain import pretrain
from tests.services.cluster import Cluster
from tests.services.slurm import lose_node, return_node
from tests.small_dataset import one_thread, write_dataset  # noqa: F401
from tests.training_scenarios import config

STEPS = 36
HOW = {"steps": STEPS, "checkpoint_every": 2, "batch": {"global_batch": 4}, "track": []}


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_requeue_a_time_limit_and_a_lost_node_change_no_number(slurm: Cluster, tmp_path: Path) -> None:
    """Two nodes against this process alone; TERM, USR2 and a power cut on the way."""
    write_dataset(tmp_path / "data")
    pretrain(config(tmp_path, "here", **HOW))
    settings = SlurmConfig(nodes=2, time_min=10)
    run = tmp_path / "there"
    job_id = slurm.submit(Job(config(tmp_path, "there", **HOW)), settings, run / "logs")

    def reached(step: int) -> None:
        done = run / "metrics.jsonl"
        slurm.wait_until(lambda: done.exists() and len(log.read(run)) >= step, job_id, 120)

    reached(5)
    slurm.requeue(job_id)
    slurm.wait_until(lambda: slurm.facts(job_id)["Restarts"] == "1", job_id)
    reached(12)
    slurm.signal(job_id, "USR2")
    slurm.wait_until(lambda: slurm.facts(job_id)["Restarts"] == "2", job_id)
    reached(20)
    nodes = re.findall(r"\d+", slurm.facts(job_id)["NodeList"])
    lost = f"node{nodes[-1]}"
    before = checkpoint.find(run).step
    lose_node(lost)
    try:
        slurm.wait_until(lambda: slurm.facts(job_id)["Restarts"] == "3", job_id, 120)
        slurm.wait(job_id, "COMPLETED", 180)
    finally:
        return_node(lost)
    assert lost.removeprefix("node") not in re.findall(r"\d+", slurm.facts(job_id)["NodeList"]) and before >= 18
    here, there = log.read(tmp_path / "here"), log.read(run)
    assert [line["step"] for line in there] == list(range(1, STEPS + 1))
    assert [line["digest"] for line in there] == [line["digest"] for line in here]
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in here], rel=1e-6)
