"""Every seam once, for real: shards on an S3 server, pretraining from there on two Slurm nodes, requeued on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import configs
from launchers.config import SlurmConfig
from launchers.job import Job
from pipeline.checkpoint import find
from shards.build import build
from shards.manifest import select
from shards.stream import Share, Stream
from shards.synthetic import make_archive
from shards.verify import verify
from tests.services.cluster import Cluster

STEPS = 5


def demo_shards(root: Path, out: str) -> None:
    """The demo's shards, of a smaller archive."""
    make_archive(root / "archive", places=3, size=128)
    build(configs.load("demo-shards", [f"archive.root={root / 'archive'}", f"out={out}", "workers=1"]))


@pytest.mark.s3
def test_the_demos_shards_on_s3_are_those_of_a_folder(tmp_path: Path, s3_url: str) -> None:
    for out in (str(tmp_path / "data"), f"{s3_url}/data"):
        demo_shards(tmp_path, out)
        assert verify(out) == []
    local, remote = select(str(tmp_path / "data")), select(f"{s3_url}/data")
    assert local.fingerprint == remote.fingerprint
    streams = (iter(Stream(selection, 1, 4, Share(4))) for selection in (local, remote))
    for _, (one, p), (two, q) in zip(range(len(local) + 8), *streams, strict=False):
        assert (one.key, p) == (two.key, q)
        np.testing.assert_array_equal(one.tiles["s2-l1c"].values, two.tiles["s2-l1c"].values)


@pytest.mark.s3
@pytest.mark.slurm
def test_pretraining_from_s3_on_two_nodes_survives_a_requeue(tmp_path: Path, s3_url: str, slurm: Cluster) -> None:
    demo_shards(tmp_path, f"{s3_url}/data")
    given = [f"run={tmp_path / 'run'}", f"data={s3_url}/data", "batch.global_batch=2", f"steps={STEPS}"]
    config = configs.load("demo-pretrain", [*given, "checkpoint_every=1", "where={}", "pictures_every=0"])
    job = slurm.submit(Job(config), SlurmConfig(nodes=2, time_min=10), tmp_path / "logs")
    latest = tmp_path / "run/latest"
    slurm.wait_until(latest.exists, job, 180)
    slurm.requeue(job)
    slurm.wait(job, seconds=240)
    assert int(slurm.facts(job)["Restarts"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    checkpoint = find(tmp_path / "run")
    assert checkpoint.step == STEPS
    # The parameters of two ranks make a whole model in this one process.
    assert sum(tensor.numel() for tensor in checkpoint.build().state_dict().values()) > 500_000
