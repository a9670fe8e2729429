"""Stages one after the other: here, and as dependent jobs on a real Slurm with shards on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import ConfigError
from launchers import chain, command
from launchers.chain import ChainError
from launchers.config import ChainConfig
from tests.scenes import make_archive
from tests.services.cluster import Cluster
from tests.small_dataset import one_thread, quiet  # noqa: F401

NAMES = ["shards", "pretrain", "finetune", "evaluate"]


def write_chain(folder: Path, data: str) -> Path:
    """Shards to an evaluation, small; as files, which is how a user has them."""
    make_archive(folder / "archive", places=4)
    model = {"dims": [8, 16], "depths": [1, 1]}
    training = {"data": data, "model": model, "batch": {"global_batch": 4}, "steps": 3, "track": []}
    files: dict[str, dict[str, Any]] = {
        "shards": {
            "stage": "shards", "archive": {"root": str(folder / "archive")}, "out": data,
            "sensors": ["s2-l2a", "s1"], "tile": {"size": 32}, "samples_per_shard": 9,
            "label": {"names": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]},
        },
        "pretrain": {"stage": "pretrain", "run": str(folder / "pretrain"), **training},
        "finetune": {
            "stage": "finetune", "run": str(folder / "finetune"), "checkpoint": str(folder / "pretrain"),
            "where": {"split": ["train"]}, **training,
        },
        "evaluate": {
            "stage": "evaluate", "run": str(folder / "evaluate"), "checkpoint": str(folder / "finetune"), "data": data,
        },
        "cluster": {"stage": "slurm", "time_min": 10},
        "two": {"stage": "slurm", "time_min": 10, "tasks_per_node": 2},
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    steps = [{"name": name, "config": f"{folder}/{name}.yaml", "slurm": f"{folder}/cluster.yaml"} for name in NAMES]
    steps[0]["parts"] = 2  # type: ignore[assignment]
    steps[1]["slurm"] = f"{folder}/two.yaml"
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"stage": "chain", "folder": str(folder / "chain"), "steps": steps}))
    return path


def test_a_chain_runs_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chain(tmp_path, str(tmp_path / "data"))
    assert command.main(["run", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["pretrain", "pretrain", "to", "do"]
    assert lines[2] == "    no plan before shards is done, whose results it reads"
    finetune = yaml.safe_load((tmp_path / "finetune.yaml").read_text())
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump({**finetune, "checkpoint": str(tmp_path / "nothing")}))
    assert command.main(["run", str(path)]) == 1
    assert "no checkpoint there" in capsys.readouterr().err
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump({**finetune, "batch": {"global_batch": 1000}}))
    assert command.main(["run", str(path)]) == 1
    assert "step finetune cannot be: batch.global_batch=1000: the selection has" in capsys.readouterr().err
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(finetune))
    assert command.main(["run", str(path), "--dry-run", "--on", "local", "--processes", "4"]) == 0
    text = capsys.readouterr().out
    assert "    global batch  4 = 4 ranks x 1 a micro-batch" in text and "no plan before finetune is done" in text
    assert command.main(["run", str(path)]) == 0
    said = capsys.readouterr().err
    assert "shards: done before\npretrain: done before\nfinetune: finetune\n" in said
    assert json.loads((tmp_path / "evaluate/metrics.json").read_text())["pixels"] > 0
    assert command.main(["run", str(path)]) == 0
    assert capsys.readouterr().err.count("done before") == 4


def test_damaged_shards_stop_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shards import build

    path, original = write_chain(tmp_path, str(tmp_path / "data")), build.build

    def damaging(config: Any) -> Any:
        tally = original(config)
        tar = next((tmp_path / "data").glob("*.tar"))
        tar.write_bytes(tar.read_bytes()[:-512] + b"x" * 512)
        return tally

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build", damaging)
        assert command.main(["run", str(path)]) == 1
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "pretrain").exists()


def test_all_configs_are_checked_before_anything_begins(tmp_path: Path) -> None:
    path = write_chain(tmp_path, str(tmp_path / "data"))
    (tmp_path / "evaluate.yaml").write_text("stage: evaluate\nrun: x\n")
    with pytest.raises(ConfigError, match="step evaluate: .*checkpoint"):
        chain.run(configs.load(path))
    assert not (tmp_path / "data").exists()
    raw = yaml.safe_load(path.read_text())
    raw["steps"][1]["name"] = "shards"
    with pytest.raises(ConfigError, match="two are named 'shards'"):
        chain.load(configs.parse(raw))


@pytest.mark.slurm
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_on_slurm_a_failing_stage_stops_it_and_the_same_command_goes_on(
    slurm: Cluster, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the logs of a build to S3 go
    path = write_chain(tmp_path, f"{s3_url}/data")
    config: ChainConfig = configs.load(path)
    finetune = (tmp_path / "finetune.yaml").read_text()
    (tmp_path / "finetune.yaml").write_text(finetune.replace(f"{tmp_path}/pretrain", f"{tmp_path}/nothing"))
    jobs = dict(chain.submit(config))
    for name in NAMES:
        slurm.watch(jobs[name], {"shards": tmp_path / "data-logs"}.get(name, tmp_path / name / "logs"))
    with pytest.raises(ChainError, match="of this chain wait or run; look with `mcf jobs`"):
        chain.submit(config)
    slurm.wait(jobs["evaluate"], "CANCELLED", 300)
    assert [slurm.state(jobs[name]) for name in NAMES[:3]] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "no checkpoint there" in slurm.logs(jobs["finetune"])
    (tmp_path / "finetune.yaml").write_text(finetune)
    again = dict(chain.submit(config))
    assert [again[name] for name in NAMES[:2]] == ["done before"] * 2
    slurm.watch(again["evaluate"], tmp_path / "evaluate/logs")
    slurm.wait(again["evaluate"], "COMPLETED", 300)
    assert json.loads((tmp_path / "evaluate/metrics.json").read_text())["pixels"] > 0
