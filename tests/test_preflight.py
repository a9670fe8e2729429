"""What is checked before a run begins, each check in health and in trouble; and whom it blames."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import configs
from launchers import node_checks
from launchers import preflight as preflights
from launchers.config import SlurmConfig
from launchers.local import launch
from launchers.node_checks import GB, clock, disk, gpus, scan, smi_problems, store
from launchers.preflight import Finding, PreflightError, alone, asked, preflight, refusal, table
from pipeline import ranks
from pipeline.model import scan_cpp, scan_torch
from pipeline.ranks import Ranks
from shards.store import StoreError, open_store
from tests.fake_stages import Preflights
from tests.services.cluster import Cluster
from tests.services.s3 import shared
from tests.small_dataset import write_dataset

HERE = Ranks()
CHECKS = {"store", "clock", "disk", "scan", "gpu", "network"}


def config_of(folder: Path, **more: Any) -> Any:
    """The config of a run in a folder, on a dataset that lies there too."""
    if not (folder / "data").exists():
        write_dataset(folder / "data", 4)
    raw = {"stage": "pretrain", "run": str(folder / "run"), "data": str(folder / "data"), "steps": 1}
    return configs.parse({**raw, **more})


def refused(check: Callable[..., Any], config: Any) -> str:
    """What a check says that is not ok."""
    finding = asked("check", lambda: check(config, HERE))
    assert not finding.ok and "\n" not in finding.said
    return finding.said


def test_where_all_is_well_a_line_is_said_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = preflight(config_of(tmp_path), HERE)
    assert {finding.check for finding in findings} == CHECKS
    assert all(finding.ok and finding.node == ranks.node_name() for finding in findings)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("preflight: 6 checks on 1 node, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_rank_asks_for_its_node_only_if_it_is_its_first(tmp_path: Path) -> None:
    second = Ranks(1, 2, 1, 2, port=1)
    assert [check(config_of(tmp_path), second) for check in (store, clock, disk)] == [None] * 3
    assert [finding.check for finding in alone(config_of(tmp_path), second) if finding.said] == ["scan", "gpu"]


# The store


def test_data_that_are_not_there_or_no_dataset(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert "data/manifest.parquet: No such file" in refused(store, config_of(tmp_path, data="nowhere/data"))
    (tmp_path / "data/manifest.parquet").write_bytes(b"nothing")
    assert "manifest.parquet is not a Parquet file; restore it" in refused(store, config)
    config = config_of(tmp_path, data={str(tmp_path / "data"): 1, "elsewhere": 2}, probe={"data": "nowhere"})
    assert node_checks._datasets(config) == [str(tmp_path / "data"), "elsewhere", "nowhere"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert f"{tmp_path}/run is a file where a folder must be" in refused(store, config_of(tmp_path))
    assert "is a file where" in refused(
        store, config_of(tmp_path, run=str(tmp_path / "else"), store=f"{tmp_path}/run/a")
    )


def test_a_store_that_keeps_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr("shards.store.FolderStore.get", lambda *_: b"other")
    assert "holds other bytes than were written" in refused(store, config)
    assert not list(tmp_path.glob(".preflight*"))


@pytest.mark.s3
def test_on_s3_all_is_read_written_and_removed(s3_url: str, tmp_path: Path) -> None:
    config_of(tmp_path)
    for path in (tmp_path / "data").iterdir():
        open_store(f"{s3_url}/data").put(path.name, path)
    before = open_store(s3_url).list()
    config = config_of(tmp_path, data=f"{s3_url}/data", store=f"{s3_url}/run")
    findings = {finding.check: finding for finding in preflight(config, HERE)}
    assert f"{s3_url}/data can be read, {s3_url}/run" in findings["store"].said
    assert "s3://" in findings["clock"].said
    assert open_store(s3_url).list() == before


@pytest.mark.s3
def test_wrong_credentials_are_told_without_them(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, store=f"{s3_url}/run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-nobody-may-see")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-nobody-may-see")
    with pytest.raises(PreflightError) as caught:
        preflight(config, HERE)
    assert caught.value.nodes == ()
    assert "store on " in str(caught.value) and "access denied (403 SignatureDoesNotMatch)" in str(caught.value)
    said = str(caught.value) + capsys.readouterr().err
    assert "may-see" not in said and shared().environment()["AWS_SECRET_ACCESS_KEY"] not in said
    assert said.count("SignatureDoesNotMatch") == 2, "one cause, one finding, in the table and in the error"


# The clock


@pytest.mark.parametrize(("shift", "word"), [(90, "ahead of"), (-90, "behind")])
def test_a_clock_apart_from_the_stores(
    shift: float, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr(node_checks, "time", SimpleNamespace(time=lambda: time.time() + shift))
    said = refused(clock, config)
    assert f" s {word} {tmp_path}/run; at most 60 s are allowed: set the clock" in said
    assert 85 < float(said.split()[0]) < 95


@pytest.mark.s3
def test_a_clock_apart_from_s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = open_store(s3_url)
    with node_checks._probe(there, "test") as name:
        assert abs(node_checks._offset(there, name)) < 3
        monkeypatch.setattr(node_checks, "time", SimpleNamespace(time=lambda: time.time() - 100))
        assert 97 < node_checks._offset(there, name) < 103


# The disk


def free(bytes_: float) -> Callable[[object], Any]:
    return lambda _: shutil._ntuple_diskusage(10**15, 0, bytes_)  # type: ignore[attr-defined]


def test_room_for_two_checkpoints_or_a_gigabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", free(1.5 * GB))
    answer = disk(config, HERE)
    assert answer and answer[0] and answer[1].startswith("free: run 1.5 GB")
    for step, size in ((9, 100), (10, GB), (11, 5 * GB)):  # the last is not whole
        folder = tmp_path / f"run/checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size)
        if step != 11:
            facts = {"format_version": 1, "step": step, "updates": step, "files": {}}
            (folder / "state.json").write_text(json.dumps(facts))
    said = refused(disk, config)
    assert f"run: {tmp_path}/run has 1.50 GB free, 2.00 are needed; make room" in said and "temporary" not in said
    monkeypatch.setattr(shutil, "disk_usage", free(0.5 * GB))
    assert "temporary files: " in refused(disk, config) and "set TMPDIR" in refused(disk, config)


def test_room_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = {"cache_dir": str(tmp_path / "cache"), "cache_limit": 30 * GB}
    monkeypatch.setattr(shutil, "disk_usage", free(25 * GB))
    monkeypatch.setattr(node_checks, "_far", lambda _: 40.0 * GB)
    assert "25.00 GB free, 30.00 are needed; lower reading.cache_limit" in refused(
        disk, config_of(tmp_path, reading=reading)
    )
    kept = tmp_path / "cache/mcf-tars/dataset/a.tar"
    kept.parent.mkdir(parents=True)
    with kept.open("wb") as file:
        file.truncate(6 * GB)  # what is there already needs no more room
    assert disk(config_of(tmp_path, reading=reading), HERE)[0]  # type: ignore[index]
    kept.unlink()
    monkeypatch.setattr(node_checks, "_far", lambda _: 20.0 * GB)  # nor is a cache larger than the data
    assert disk(config_of(tmp_path, reading=reading), HERE)[0]  # type: ignore[index]


# The scan


@pytest.mark.parametrize("factor", [1.00001, float("nan")])
def test_a_scan_that_is_wrong(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, engine={"scan": "torch"})
    right = scan_torch.scan
    assert scan(config, HERE)[0]
    monkeypatch.setattr(scan_torch, "scan", lambda *given: right(*given) * factor)
    assert "torch: relative errors" in refused(scan, config) and "allowed are 5e-07" in refused(scan, config)


def test_a_scan_whose_gradient_alone_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scan_torch.scan
    monkeypatch.setattr(scan_torch, "scan", lambda x, *given: right(x.detach() + (x - x.detach()) * 2, *given))
    assert "of gradients; allowed" in refused(scan, config_of(tmp_path, engine={"scan": "torch"}))


def test_a_scan_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cpp, "_library", lambda: None)
    assert "'cpp' needs one of" in refused(scan, config_of(tmp_path, engine={"scan": "cpp"}))
    assert scan(config_of(tmp_path), HERE)[1].startswith("torch: ")


# The GPU


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0) -> None:
    """An nvidia-smi on PATH that says this, if it is asked as it must be."""
    program = folder / "bin/nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n[ $# = 2 ] || exit 9\ncat <<'E'\n{text}\nE\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("GPU-a, 3, 0, 0x0000000000000001, 600", None),
        ("GPU-a, 3, [N/A], [N/A], [N/A]", None),
        ("GPU-other, 3, 7, 0x0000000000000040, 90000", None),
        ("GPU-a, 3, 7, 0x0000000000000000, 600", "GPU 3: 7 uncorrected ECC errors; none are allowed"),
        ("GPU-a, 3, 0, 0x0000000000000048, 600", "GPU 3 is slowed down by its hardware, too hot; look at its cooling"),
        ("GPU-a, 3, 0, 0x0000000000000004, 70000", "GPU 3: 70000 MB are taken before the run, 4096 allowed"),
    ],
)
def test_what_nvidia_smi_tells(row: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, f"GPU-b, 0, 0, 0x0, 0\n{row}")
    found = smi_problems({"a", "b"})
    assert [text[: len(said or "")] for text in found] == ([said] if said else [])


def test_an_nvidia_smi_that_fails_hangs_or_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, 'Field "ecc" is not a valid field to query.', 2)
    assert smi_problems({"a"}) == []
    fake_smi(tmp_path, monkeypatch, "Unable to determine the device handle: GPU is lost", 15)
    assert "nvidia-smi: Unable to determine the device handle: GPU is lost; the GPU" in smi_problems({"a"})[0]
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(node_checks, "SMI_S", 0.2)
    assert "nvidia-smi gives no answer in 0.2 s; the GPU" in smi_problems({"a"})[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smi_problems({"a"}) == []


def test_gpus_as_cuda_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus(HERE) == (True, "no GPU: trains on the CPU")
    fake_smi(tmp_path, monkeypatch, "GPU-a, 0, 0, 0x0, 10")
    cuda = {"is_available": True, "device_count": 2, "get_device_name": "H200", "mem_get_info": (5 * GB, 0)}
    for name, value in {**cuda, "get_device_properties": SimpleNamespace(uuid="a")}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(ranks, "device", lambda _: torch.device("cpu"))
    assert gpus(Ranks(0, 2, 0, 2)) == (True, "H200, 5.0 GB free")
    assert gpus(Ranks(0, 3, 0, 3)) == (False, "3 ranks on 2 GPUs; start as many ranks as there are GPUs")


# How checks are asked, and what comes of it


def test_a_check_that_raises_is_a_finding_that_quotes_no_stranger() -> None:
    def raises(error: Exception) -> Finding:
        def check() -> tuple[bool, str]:
            raise error

        return asked("check", check)

    assert raises(StoreError("two\nlines")).said == "two lines"
    assert raises(RuntimeError("CUDA error:\n ECC")).said == "RuntimeError: CUDA error: ECC"
    assert "secret" not in raises(ValueError("Invalid header value b'secret'")).said
    assert not raises(KeyError("secret")).ok


def test_a_check_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflights, "ALONE_S", 0.2)
    checks = {"hangs": lambda *_: time.sleep(5), "quick": lambda *_: (True, "here")}
    found = {finding.check: finding for finding in alone(config_of(tmp_path), HERE, checks)}  # type: ignore[arg-type]
    assert found["quick"].ok and not found["hangs"].ok
    assert "no answer in 0.2 s" in found["hangs"].said


def findings(*bad: tuple[str, str]) -> list[Finding]:
    """Of two checks by two ranks on each of two nodes; (check, node) are not ok."""
    return [
        Finding(check, (check, node) not in bad, f"{check} of {node}", node, 0.1)
        for node in ("node1", "node2")
        for _ in range(2)
        for check in ("disk", "store")
    ]


def test_a_node_is_blamed_for_what_is_well_elsewhere() -> None:
    error = refusal(findings(("disk", "node2")))
    assert str(error) == "the run does not begin; disk on node2: disk of node2"
    assert error.nodes == ("node2",)
    error = refusal(findings(("store", "node1"), ("store", "node2"), ("disk", "node2")))
    assert "store on all 2 nodes: store of node1" in str(error)
    assert error.nodes == ("node2",)
    assert refusal(findings(("store", "node1"), ("store", "node2"))).nodes == ()
    assert refusal([Finding("store", False, "no", "node1", 0.1)]).nodes == ()
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.nodes) == (str(error), error.nodes)


def test_the_table() -> None:
    rows = table([Finding("store", True, "well", "a", 0.12), Finding("disk", False, "full", "node2", 3)]).splitlines()
    assert rows == ["ok      a      store  well (0.1 s)", "NOT OK  node2  disk   full (3.0 s)"]


# Ranks together


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that check one after the other with no trouble, with a clock apart, and with full disks."""
    folder = tmp_path_factory.mktemp("two")
    write_dataset(folder / "data", 4)
    assert launch(["tests.fake_stages", "preflights", str(folder)], 2, folder / "logs") == 1
    return folder


def said_by(folder: Path, trouble: str, processes: int = 2) -> list[dict[str, Any]]:
    """What each rank said; all the same."""
    said = [json.loads((folder / f"said-{trouble}-{rank}.json").read_text()) for rank in range(processes)]
    assert [one.get("message") for one in said] == [said[0].get("message")] * processes
    return said


def test_two_ranks_that_are_well(two: Path) -> None:
    said = said_by(two, "none")
    assert set(said[0]["checks"]) == CHECKS | {"clocks"} and "message" not in said[0]
    (first, *_) = (two / "logs/rank-0.log").read_text().splitlines()
    assert first.startswith("preflight: 7 checks on 2 nodes, ")


def test_a_slow_node_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three, since of two neither could be blamed."""
    write_dataset(tmp_path / "data", 4)
    assert launch(["tests.fake_stages", "preflight-slow", str(tmp_path)], 3, tmp_path / "logs") == 1
    said = said_by(tmp_path, "slow", 3)
    assert said[0]["nodes"] == ["node1"]
    assert "network on node1: 4 MB to another node and back take 3" in said[0]["message"]
    rows = [line for line in capfd.readouterr().err.splitlines() if line.startswith("NOT OK")]
    assert len(rows) == 1 and rows[0].split()[2:4] == ["node1", "network"]


def test_a_clock_apart_from_the_others(two: Path) -> None:
    """Of two clocks either may be wrong; the store's tells which."""
    said = said_by(two, "clock")
    assert said[0]["nodes"] == ["node1"]
    assert "; clock on node1: 100" in said[0]["message"]
    assert "; clocks on all 2 nodes: the nodes' clocks are 100" in said[0]["message"]


def test_of_disks_that_are_full_everywhere_no_node_is_blamed(two: Path) -> None:
    said = said_by(two, "full-everywhere")
    assert said[1]["nodes"] == []
    assert "disk on all 2 nodes: run: " in said[0]["message"]
    told = (two / "logs/rank-0.log").read_text()
    assert "Traceback" not in told and "the run does not begin" in told


@pytest.mark.slurm
def test_on_slurm_a_node_goes_by_its_name_there(slurm: Cluster, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 4)
    settings = SlurmConfig(nodes=2, time_min=10)
    job_id = slurm.submit(Preflights(tmp_path, ("full",), pretend=False), settings, tmp_path / "logs")
    slurm.wait(job_id, "FAILED")
    said = said_by(tmp_path, "full")
    assert said[0]["node"] != said[1]["node"] and said[1]["node"].startswith("node")
    assert said[0]["nodes"] == said[1]["nodes"] == [said[1]["node"]]
    assert f"disk on {said[1]['node']}: run: " in slurm.logs(job_id)
