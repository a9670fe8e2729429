"""`mcf doctor`: what it finds on this machine, and what it says of one that lacks things."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launchers import doctor as doctors
from launchers.config import SlurmConfig
from launchers.doctor import doctor
from launchers.node_checks import call
from launchers.preflight import asked, table
from pipeline.model import scan_cpp
from tests.services.cluster import Cluster
from tests.test_preflight import CHECKS, config_of, fake_smi


def test_doctor_of_this_machine(tmp_path: Path) -> None:
    found = {finding.check: finding for finding in doctor(config_of(tmp_path), None)}
    assert found.keys() == {"versions", "deepspeed", "compiler", "extras", "shm", "slurm", *CHECKS}
    assert all(found[name].ok for name in {*found} - {"slurm"}), table([*found.values()])
    assert f"torch {torch.__version__}" in found["versions"].said
    assert found["deepspeed"].said.startswith("DeepSpeed 0.")
    assert "gpu" in found and not (tmp_path / "run").exists()


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors, "find_spec", lambda name: None if name in ("wandb", "h5py") else object())
    ok, said = doctors.extras(("tensorboard",))
    assert ok and said == "installed: zarr, stac; not: h5, wandb (pip install 'mcf-mamba[h5,wandb]')"
    assert not doctors.extras(("wandb",))[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20))
    assert doctors.shared_memory() == (
        False,
        "/dev/shm has 0.07 GB, 0.54 are needed; docker run --shm-size=8g",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(scan_cpp, "_library", lambda: None)
    ok, said = doctors.compiler()
    assert not ok and said.startswith("no C++ compiler; the scan runs in 'torch' on cpu, several times slower")
    fake_smi(tmp_path, monkeypatch, "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in doctors.versions()[1]
    (tmp_path / "deepspeed.py").write_text("raise ImportError('no ops')")
    monkeypatch.setattr(doctors, "child_environment", lambda _: {"PYTHONPATH": str(tmp_path)})
    ok, said = doctors.deepspeed()
    assert not ok and "ImportError: no ops); pip install" in said


def test_doctor_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctors.slurm_answers(None, None) == (True, "no sbatch on PATH: --on here and --on local work")
    ok, said = doctors.slurm_answers(None, SlurmConfig())
    assert not ok and "go to a login node" in said


@pytest.mark.slurm
def test_doctor_asks_slurm_whether_it_would_take_the_job(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    assert doctors.slurm_answers(config, None)[1].endswith("sbatch, scontrol and sacct answer")
    assert doctors.slurm_answers(config, SlurmConfig(nodes=2))[1].endswith("would take this job")
    ok, said = doctors.slurm_answers(config, SlurmConfig(partition="nowhere"))
    assert not ok and "Invalid partition" in said
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'sacct: error: Problem talking to the database' >&2; exit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    ok, said = doctors.slurm_answers(config, SlurmConfig())
    assert not ok and said.startswith("sacct: error: Problem talking to the database; without sacct")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    assert "FileNotFoundError" in asked("tool", lambda: call([str(tmp_path / "nothing")], 1)).said
