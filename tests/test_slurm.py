"""Jobs on a real Slurm of virtual nodes; and, without one, what would be handed to it."""

import re
from pathlib import Path
from typing import Any

import pytest

import configs
from launchers.config import SlurmConfig
from launchers.slurm import SlurmError, script, submit
from tests.fake_stages import AddUp, Fails, Hangs, steps
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
        ("cpus_per_task", 6, "#SBATCH --cpus-per-task=6"),
        ("cpus_per_task", 6, "--kill-on-bad-exit=1 --cpus-per-task=6 "),
        ("mem_gb", 1.5, "#SBATCH --mem=1536MB"),
        ("time_min", 90, "#SBATCH --time=90"),
        ("partition", "long", "#SBATCH --partition=long"),
        ("account", "eo", "#SBATCH --account=eo"),
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
    ],
)
def test_mistakes_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message):
        configs.parse({"stage": "slurm", **raw})


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
    [({"partition": "nowhere"}, "invalid partition"), ({"account": "nobody"}, "Invalid account")],
)
def test_a_refusal_carries_slurms_own_words(
    slurm: Cluster, asked: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SlurmError, match=message):
        submit(pretrain_config(), SlurmConfig(**asked), tmp_path)  # type: ignore[arg-type]


@pytest.mark.slurm
def test_requeued_by_slurm_it_goes_on(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol requeue` sends TERM: the ranks save at one step, end, are started again and finish."""
    monkeypatch.setenv("RANK", "0")  # who submits may be a rank of something else
    monkeypatch.setenv("WORLD_SIZE", "1")
    job_id = slurm.submit(AddUp(tmp_path, steps=50, seconds=0.1), TWO_NODES, tmp_path / "logs")
    slurm.wait_until(lambda: len(steps(tmp_path)) >= 3, job_id)
    slurm.requeue(job_id)
    slurm.wait(job_id, "COMPLETED")
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(50))
    assert {line["world"] for line in lines} == {2}
    assert {line["sum"] for line in lines} == {3}
    assert len({line["from"] for line in lines}) == 2, "it was not resumed"
    assert slurm.facts(job_id)["Restarts"] == "1"
    assert slurm.facts(job_id)["NumNodes"] == "2"
    assert slurm.logs(job_id).count("stopped after step") == 2, "both ranks say so, and logs are appended"


@pytest.mark.slurm
def test_before_its_time_limit_it_requeues_itself(slurm: Cluster, tmp_path: Path) -> None:
    """USR2 is what Slurm sends then. After `max_requeues` times the job ends, and can be submitted again."""
    job = AddUp(tmp_path, steps=80, seconds=0.1)
    settings = SlurmConfig(nodes=2, time_min=10, max_requeues=1)
    job_id = slurm.submit(job, settings, tmp_path / "logs")
    slurm.wait_until(lambda: len(steps(tmp_path)) >= 3, job_id)
    slurm.signal(job_id, "USR2")
    slurm.wait_until(lambda: len({line["from"] for line in steps(tmp_path)}) == 2, job_id)
    assert slurm.facts(job_id)["Restarts"] == "1"
    slurm.signal(job_id, "USR2")
    slurm.wait(job_id, "FAILED")
    assert "not requeued: 1 times is max_requeues" in slurm.logs(job_id)
    again = slurm.submit(job, settings, tmp_path / "logs")
    slurm.wait(again, "COMPLETED")
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(80))
    assert len({line["from"] for line in lines}) == 3


@pytest.mark.slurm
def test_a_failing_rank_ends_the_job(slurm: Cluster, tmp_path: Path) -> None:
    job_id = slurm.submit(Fails(tmp_path), TWO_NODES, tmp_path / "logs")
    slurm.wait(job_id, "FAILED")
    assert "RuntimeError: no such luck" in slurm.logs(job_id)


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
