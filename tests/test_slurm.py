"""Jobs on a real Slurm of virtual nodes; and, without one, what would be handed to it."""

import dataclasses
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from launchers.config import SlurmConfig
from launchers.slurm import SlurmError, Task, script, submit, submit_job, submit_parts
from pipeline.signals import StopRequest
from tests.fake_stages import Hangs, Notes, Refuses
from tests.scenes import make_archive, north_up, shards_config, write_scene
from tests.services.cluster import Cluster

TWO_NODES = SlurmConfig(nodes=2, time_min=10)


def pretrain_config() -> Any:
    """Returns the config of a stage that is only to be submitted."""
    return configs.parse({"stage": "pretrain", "run": "run", "data": "data", "steps": 1})


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("nodes", 3, "#SBATCH --nodes=3"),
        ("gpus_per_node", 2, "#SBATCH --gpus-per-node=2"),
        ("gpus_per_node", 2, "#SBATCH --ntasks-per-node=2"),
        ("gpus_per_node", 0, "#SBATCH --ntasks-per-node=1"),
        ("tasks_per_node", 3, "#SBATCH --ntasks-per-node=3"),
        ("cpus_per_task", 6, "#SBATCH --cpus-per-task=6"),
        ("cpus_per_task", 6, "--kill-on-bad-exit=1 --cpus-per-task=6 "),
        ("mem_gb", 1.5, "#SBATCH --mem=1536MB"),
        ("time_min", 90, "#SBATCH --time=90"),
        ("partition", "long", "#SBATCH --partition=long"),
        ("account", "eo", "#SBATCH --account=eo"),
        ("qos", "long", "#SBATCH --qos=long"),
        ("constraint", "a100|h100", "#SBATCH --constraint='a100|h100'"),
        ("exclude", "node[3-4]", "#SBATCH --exclude='node[3-4]'"),
        ("reservation", "maintenance", "#SBATCH --reservation=maintenance"),
        ("nice", 100, "#SBATCH --nice=100"),
        ("comment", "first try", "#SBATCH --comment='first try'"),
        ("environment", {"NCCL_SOCKET_IFNAME": "ib0", "X": "a b; c"}, "\nexport NCCL_SOCKET_IFNAME=ib0\n"),
        ("environment", {"X": "a b; $c"}, "\nexport X='a b; $c'\n"),
        ("container", "/images/mcf.sif", "apptainer exec --bind "),
        ("container", "/images/mcf.sif", " /images/mcf.sif python3 -P -u -m submitit.core._submit"),
        ("signal_delay_s", 33, "#SBATCH --signal=USR2@33"),
        ("signal_delay_s", 33, "\nexport MCF_SIGNAL_DELAY_S=33\n"),
        ("max_requeues", 7, '[ "$n" -lt 7 ]'),
        ("setup", ("module load cuda",), "\nmodule load cuda\n"),
    ],
)
def test_every_key_arrives_in_the_script(key: str, value: Any, line: str, tmp_path: Path) -> None:
    assert line in script(pretrain_config(), configs.parse({"stage": "slurm", key: value}), tmp_path)


def test_the_script_by_default(tmp_path: Path) -> None:
    """What is not asked for is left to the cluster. A change of submitit's text shows here."""
    text = script(pretrain_config(), SlurmConfig(), tmp_path)
    flags = re.findall(r"^#SBATCH --([\w-]+)", text, flags=re.MULTILINE)
    expected = "cpus-per-task error job-name nodes ntasks-per-node open-mode output requeue signal time wckey"
    assert flags == expected.split()
    assert f"--output={tmp_path}/%j_0_log.out" in text
    assert text.rstrip().endswith(f"-P -u -m submitit.core._submit {tmp_path}")
    assert "unset RANK WORLD_SIZE" in text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"node": 2}, r"node: unknown key; did you mean 'nodes'\?"),
        ({"nodes": 0}, "nodes: 0 given"),
        ({"partition": "long\nrm -rf x"}, "partition: "),
        ({"account": ""}, "account: "),
        ({"comment": 'a" b'}, "comment: "),
        ({"environment": {"A B": "c"}}, "environment"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "AWS_SECRET_ACCESS_KEY: would be written into the batch"),
    ],
)
def test_mistakes_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message):
        configs.parse({"stage": "slurm", **raw})


def test_every_field_is_tested_to_arrive() -> None:
    (cases,) = (mark.args[1] for mark in test_every_key_arrives_in_the_script.pytestmark)  # type: ignore[attr-defined]
    fields = {field.name for field in dataclasses.fields(SlurmConfig)} - {"stage"}
    assert fields == {key for key, _, _ in cases}


def test_what_is_compiled_lies_on_the_node_itself(tmp_path: Path) -> None:
    lines = script(pretrain_config(), SlurmConfig(setup=("export TMPDIR=/scratch",)), tmp_path).splitlines()
    setup = lines[lines.index("# setup") + 1 : lines.index("# command") - 1]
    said = subprocess.run(
        ["bash", "-c", "\n".join([*setup, "echo $TMPDIR $TRITON_CACHE_DIR $MCF_SIGNAL_DELAY_S"])],
        env={"PATH": os.environ["PATH"], "USER": "me", "RANK": "3"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said == "/scratch /scratch/triton-me 90\n"


@pytest.mark.parametrize(("code", "counted", "again"), [(86, 0, True), (86, 2, False), (1, 0, False), (0, 0, False)])
def test_the_batch_script_requeues_what_hung_and_nothing_else(
    tmp_path: Path, code: int, counted: int, again: bool
) -> None:
    """Run with an srun and an scontrol that only note that they were called."""
    for name, does in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >>{tmp_path}/called')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    if counted:
        (tmp_path / "7.requeues").write_text(str(counted))
    text = script(pretrain_config(), SlurmConfig(max_requeues=2), tmp_path)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "USER": "me"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr == ""
    assert (tmp_path / "called").exists() == again
    if again:
        assert (tmp_path / "called").read_text() == "requeue 7\n" and (tmp_path / "7.requeues").read_text() == "1\n"


def test_a_time_limit_requeues_so_often_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an scontrol that only notes that it was called; TERM is Slurm's own matter."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    task = Task(Notes(tmp_path), tmp_path, SlurmConfig(max_requeues=2))
    for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR2, signal.SIGUSR2):
        with StopRequest() as stop:
            os.kill(os.getpid(), name)
            task._requeue("7", stop)
    assert (tmp_path / "called").read_text() == "requeue 7\n" * 2
    assert capsys.readouterr().out == "not requeued: 2 times is max_requeues. Submit again to go on\n"


def test_the_preset_loads() -> None:
    assert isinstance(configs.load("slurm"), SlurmConfig)


def test_a_folder_that_slurm_would_rename_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without %"):
        script(pretrain_config(), SlurmConfig(), tmp_path / "%j")


def test_without_slurm_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no sbatch"):
        submit(pretrain_config(), SlurmConfig(), tmp_path)


@pytest.mark.slurm
def test_the_script_shown_is_the_script_submitted(slurm: Cluster, tmp_path: Path) -> None:
    job_id = submit(pretrain_config(), TWO_NODES, tmp_path)
    slurm.cancel(job_id)
    submitted = (tmp_path / f"{job_id}_submission.sh").read_text()
    assert submitted == script(pretrain_config(), TWO_NODES, tmp_path)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"partition": "nowhere"}, "invalid partition"),
        ({"account": "nobody"}, "Invalid account"),
        ({"qos": "gold"}, "Invalid qos"),
    ],
)
def test_a_refusal_carries_slurms_own_words(
    slurm: Cluster, asked: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SlurmError, match=message):
        submit(pretrain_config(), SlurmConfig(**asked), tmp_path)  # type: ignore[arg-type]


@pytest.mark.slurm
def test_a_job_that_hangs_is_requeued_so_often_and_no_more(slurm: Cluster, tmp_path: Path) -> None:
    settings = SlurmConfig(nodes=2, time_min=10, max_requeues=1)
    once, always = tmp_path / "once", tmp_path / "always"
    jobs = {}
    for folder, attempts in ((once, 1), (always, 99)):
        folder.mkdir()
        jobs[folder] = slurm.submit(Hangs(folder, attempts), settings, folder / "logs")
    slurm.wait(jobs[once], "COMPLETED")
    assert (once / "starts").read_text() == (once / "ended").read_text() == "2"
    assert "in all_reduce" in (once / "stacks-0").read_text()
    slurm.wait(jobs[always], "FAILED")
    assert (always / "starts").read_text() == "2"


@pytest.mark.slurm
def test_a_build_as_an_array_stops_at_a_bad_part_and_repeats_that_part_alone(slurm: Cluster, tmp_path: Path) -> None:
    """The merge waits for all parts; the manifest of the array is that of a build in one go, byte for byte."""
    from shards.build import build

    make_archive(tmp_path / "archive", places=8)
    places = (tmp_path / "archive", "samples_per_shard=9")  # a shard for each
    whole, config = (shards_config(places[0], tmp_path / name, places[1]) for name in ("whole", "parts"))
    build(whole)
    label = tmp_path / "archive" / "place5" / "label.tif"
    good = label.read_bytes()
    where = north_up(10, 500_000 + 5 * 5000)
    write_scene(label, "label", values=np.full((1, 96, 96), 77, np.uint8), transform=where)  # no class
    settings, logs = SlurmConfig(time_min=10), tmp_path / "parts-logs"
    array, merge = submit_parts(config, settings, parts=8, throttle=4)
    assert array is not None
    slurm.watch(merge, logs)
    slurm.wait(merge, "CANCELLED")
    states = slurm.array(array)
    assert sorted(states.values()) == ["COMPLETED"] * 7 + ["FAILED"]
    assert not (tmp_path / "parts" / "manifest.parquet").exists()
    label.write_bytes(good)
    again, merge = submit_parts(config, settings, parts=8, throttle=4)
    slurm.watch(merge, logs)
    slurm.wait(merge, "COMPLETED")
    assert again is not None and list(slurm.array(again).values()) == ["COMPLETED"], "one part, the one that failed"
    for name in ("manifest.parquet", "dataset.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert submit_parts(config, settings, parts=8, throttle=4)[0] is None, "nothing is left but the merge"


@pytest.mark.slurm
def test_a_node_that_is_not_fit_is_left_out_by_a_job_after_this_one(slurm: Cluster, tmp_path: Path) -> None:
    """A job cannot change its own list of nodes. What waited for it, as a chain's next stage, waits for the other."""
    settings, logs = SlurmConfig(time_min=10), tmp_path / "logs"
    job_id = slurm.submit(Refuses(tmp_path), settings, logs)
    slurm.update(job_id, "StartTime=now+60")  # until another waits for it
    waiting = submit_job(Notes(tmp_path), settings, logs, after=job_id)
    slurm.watch(waiting, logs)
    slurm.update(job_id, "StartTime=now")
    slurm.wait(job_id, "FAILED")
    said, unfit = slurm.logs(job_id), (tmp_path / "unfit").read_text()
    assert f"gpu on {unfit}: hot" in said
    (successor,) = re.findall(rf"submitted again as (\d+) without {unfit}", said)
    assert f"job {waiting}, which waited for this one, now waits for {successor}" in said
    slurm.watch(successor, logs)
    slurm.wait(waiting, "COMPLETED")
    assert (tmp_path / "notes").read_text() == (tmp_path / "ended").read_text() != unfit
    assert slurm.state(successor) == "COMPLETED" and slurm.facts(successor)["ExcNodeList"] == unfit
