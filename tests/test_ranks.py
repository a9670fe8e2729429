"""Ranks from the environment, as srun, torchrun and nobody set it."""

import os
import subprocess
import sys
from typing import Any

import pytest

from pipeline import ranks
from pipeline.ranks import Ranks, child_environment, from_environment

# What srun (22.05) sets in a batch job of 3 nodes, in task 4 of 5, on the second of its nodes.
STEP = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_nobody_started_it() -> None:
    assert from_environment({}) == Ranks(rank=0, world=1, local_rank=0, local_world=1)


def test_torchrun() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place = from_environment({**given, "MASTER_ADDR": "host", "MASTER_PORT": "29500"})
    assert place == Ranks(5, 8, 1, 4, "host", 29500)


def test_srun() -> None:
    place = from_environment(STEP)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (3, 5, 1, 2)
    assert place.master == "10.0.0.7"
    assert 20000 <= place.port < 29000


def test_ranks_of_a_launcher_win_over_the_step_they_run_in() -> None:
    place = from_environment({**STEP, "RANK": "0", "WORLD_SIZE": "1"})
    assert place.world == 1


def test_a_batch_script_is_alone() -> None:
    """It is not a rank, though Slurm gives it SLURM_PROCID and the SLURM_NTASKS of the allocation."""
    assert from_environment({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world == 1


@pytest.mark.parametrize(
    ("change", "master"),
    [
        ({"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1"),
        ({"MASTER_ADDR": "chosen"}, "chosen"),
        # srun called on a login node: its address is not that of rank 0, unless no name resolves.
        ({"ENVIRONMENT": "", "SLURM_STEP_NODELIST": "localhost,gpu08"}, "localhost"),
        ({"ENVIRONMENT": "", "SLURM_STEP_NODELIST": "no.such.host.invalid,gpu08"}, "10.0.0.7"),
        # a step that leaves out the node of the batch script
        ({"SLURM_STEP_NODELIST": "localhost"}, "localhost"),
    ],
)
def test_master(change: dict[str, str], master: str) -> None:
    assert from_environment({**STEP, **change}).master == master


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12],cpu1", "gpu07"), ("a,b[1-2]", "a"), ("r[1-2]n[3,5]-ib", "r1n3-ib")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert ranks._first_host(nodes) == first


def test_ports_differ_between_jobs_and_attempts() -> None:
    changes: list[dict[str, str]] = [{}, {"SLURM_JOB_ID": "1235"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}]
    assert len({from_environment({**STEP, **change}).port for change in changes}) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "local rank 1 of 1"),
        ({**STEP, "SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
    ],
)
def test_bad_environment(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_environment(given)


def test_child_environment_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = Ranks(1, 2, 1, 2, "127.0.0.1", 4321)
    environment = child_environment(place)
    assert from_environment(environment) == place
    code, *others = environment["PYTHONPATH"].split(os.pathsep)
    assert os.path.samefile(code, os.path.join(os.path.dirname(__file__), ".."))
    assert others == ["/elsewhere"]
    assert environment["PATH"] == os.environ["PATH"]
    assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_threads_are_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert child_environment(Ranks(0, 2, 0, 2, port=1))["OMP_NUM_THREADS"] == "3"


def test_init_needs_a_port() -> None:
    with pytest.raises(ValueError, match="MASTER_PORT"):
        ranks.init(Ranks(0, 2, 0, 2))


def test_alone_agrees_with_itself() -> None:
    assert ranks.agree(True) is True
    assert ranks.agree(False) is False


TWO_RANKS = """
import json, torch
from pipeline import ranks
place = ranks.from_environment()
ranks.init(place)
ranks.init(place)  # harmless
answers = [ranks.agree(False), ranks.agree(place.rank == 1), ranks.agree(True)]
facts = {"answers": answers, "device": str(ranks.device(place)), "threads": torch.get_num_threads()}
facts["backend"] = torch.distributed.get_backend()
ranks.close()
print(json.dumps({**facts, "closed": not torch.distributed.is_initialized()}))
"""


def test_two_ranks_agree() -> None:
    import json

    from launchers.local import _free_port

    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env={
                **child_environment(Ranks(rank, 2, rank, 2, port=port)),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    facts: list[dict[str, Any]] = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert facts[0] == facts[1]
    assert facts[0] == {
        "answers": [False, True, True],
        "device": "cpu",
        "threads": 1,
        "backend": "gloo",
        "closed": True,
    }


def test_importing_is_cheap() -> None:
    code = "import sys, pipeline.ranks, pipeline.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(Ranks())).returncode == 0
