"""`mcf predict` from the command line, and as an array on a real Slurm."""

import re
from pathlib import Path

import numpy as np
import pytest

import configs
from launchers import slurm as launcher
from launchers.command import main
from launchers.config import SlurmConfig
from launchers.job import Job
from pipeline import predict as stage
from pipeline.finetune import finetune
from tests import test_finetune
from tests.scenes import write_scene
from tests.services.cluster import Cluster
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401

SMALL = ["window=64", "overlap=16", "block=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned run and a scene of four blocks."""
    folder = tmp_path_factory.mktemp("predict")
    write_dataset(folder / "data")
    finetune(test_finetune.config(folder, "run", steps=1))
    values = np.random.default_rng(0).normal(-12, 3, (2, 100, 90)).astype(np.float32)
    write_scene(folder / "s1.tif", "s1", values=values)
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    scene = f"s1={folder / 's1.tif'}"
    return ["predict", str(folder / "run"), "--scene", scene, "--out", str(out), *SMALL, *more]


def test_the_command_maps_part_by_part(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    out = tmp_path / "map.tif"
    assert main(arguments(folder, out, "--dry-run", "--force", "flips=true")) == 0
    config = configs.yaml.safe_load(capsys.readouterr().out)
    assert config["scene"] == {"s1": str(folder / "s1.tif")} and config["out"] == str(out)
    assert config["flips"] and config["force"] and config["block"] == 64
    assert main(arguments(folder, out, "part=1/2")) == 0
    assert "part 1/2 is done" in capsys.readouterr().out and not out.exists()
    assert main(arguments(folder, out)) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.exists()


def test_an_array_is_of_the_parts_that_are_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Slurm: what would be handed to it."""
    asked: list[tuple[list[str], Job, SlurmConfig, Path]] = []

    def submit_array(jobs: list[Job], last: Job, where: SlurmConfig, logs: Path, *_: object) -> tuple[str, str]:
        asked.append(([job.config.part for job in jobs], last, where, logs))
        return "7", "8"

    monkeypatch.setattr(launcher, "submit_array", submit_array)
    out = tmp_path / "map.tif"
    stage.predict(configs.parse({**vars(_config(folder, out)), "part": "2/4"}))
    assert main(arguments(folder, out, "--on", "slurm", "--parts", "4")) == 0
    said = capsys.readouterr().out
    assert said.startswith("array 7 of 3, then 8 joins them")
    ((parts, last, where, logs),) = asked
    assert parts == ["1/4", "3/4", "4/4"] and last.config.part == "1/1" and last.config.out == str(out)
    assert where.gpus_per_node == 4 and logs == Path(f"{out}-logs")
    assert main(arguments(folder, out, "--on", "slurm", "part=1/2")) == 1
    assert "leave part= away" in capsys.readouterr().err


def _config(folder: Path, out: Path) -> stage.PredictConfig:
    raw = {"stage": "predict", "checkpoint": str(folder / "run"), "scene": {"s1": str(folder / "s1.tif")}}
    return configs.parse(
        {**configs.to_dict(configs.load("predict", SMALL)), **raw, "out": str(out), "window": 64, "block": 64}
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scene", "s1=a.tif", "--scene", "s1=b.tif"], "mcf: --scene: a sensor twice in s1=a.tif, s1=b.tif"),
        ([], "mcf: no scene: write --scene SENSOR=PATH"),
        (["--scene", "s1=a.tif", "--catalog", "b.csv"], "mcf: config: scene and catalog given; write one of them"),
        (["--scene", "s1=a.tif", "part=3/2"], "mcf: part: '3/2' given; the first number is at most the second"),
    ],
)
def test_mistakes_are_one_line(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "nowhere", "--out", "map.tif", *more]) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slurm
def test_a_map_made_by_an_array_is_the_same_bytes(
    slurm: Cluster, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs, and one that joins their blocks."""
    settings = tmp_path / "cpu.yaml"
    settings.write_text("stage: slurm\ntime_min: 10\n")
    out, here = tmp_path / "slurm" / "map.tif", tmp_path / "here" / "map.tif"
    assert main(arguments(folder, out, "--on", "slurm", "--parts", "2", "--slurm", str(settings))) == 0
    found = re.match(r"array (\d+) of 2, then (\d+) joins", capsys.readouterr().out)
    assert found
    array, join = found.groups()
    slurm.watch(join, launcher.logs_of(_config(folder, out)))
    stage.predict(_config(folder, here))
    slurm.wait(join, "COMPLETED")
    assert sorted(slurm.array(array).values()) == ["COMPLETED"] * 2
    for path in here.parent.iterdir():
        assert (out.parent / path.name).read_bytes() == path.read_bytes(), path.name
