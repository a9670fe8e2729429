from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import configs
from configs import ConfigError
from launchers.command import main
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.finetune import finetune
from pipeline.leaks import in_words
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import ReleaseError, read_contract
from pipeline.pretrain import pretrain
from shards.contract import Contract
from shards.store import FolderStore
from tests import test_finetune
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config as pretraining


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned run, its evaluation and its release."""
    folder = tmp_path_factory.mktemp("export")
    write_dataset(folder / "data")
    finetune(test_finetune.config(folder, "run", steps=2, seed=4))
    assess(folder, "run", "test-places")
    release(folder, "run", "release", evaluations=[str(folder / "test-places")], licence="apache-2.0")
    return folder


def release(folder: Path, run: str, out: str, **changes: Any) -> Path:
    """`mcf export` of a run below the folder."""
    where = {"checkpoint": str(folder / run), "out": out if "://" in out else str(folder / out)}
    return Path(export(configs.parse({"stage": "export", **where, **changes})))


def assess(folder: Path, model: str, name: str) -> Any:
    raw = {"stage": "evaluate", "checkpoint": str(folder / model), "data": str(folder / "data")}
    return json.loads((evaluate(configs.parse({**raw, "run": str(folder / name)})) / "metrics.json").read_text())


def test_a_release_holds_weights_contract_card_and_evaluations(folder: Path) -> None:
    names = sorted(str(path.relative_to(folder / "release")) for path in (folder / "release").rglob("*.*"))
    assert names == ["README.md", "config.json", "contract.json", "eval/test-places.json", "model.safetensors"]
    source = checkpoint.find(folder / "run")
    assert Contract.from_json(read_contract(folder / "release")) == source.contract
    for name, tensor in MCFMamba.from_pretrained(folder / "release").state_dict().items():
        assert torch.equal(tensor, source.state.parameters[name]), name


def test_the_card_says_what_a_user_must_know(folder: Path) -> None:
    card = (folder / "release" / "README.md").read_text()
    report = json.loads((folder / "test-places" / "metrics.json").read_text())
    source = checkpoint.find(folder / "run")
    for words in (
        "license: apache-2.0", "| s1 | VV, VH | dB | -25 to 0 | -12, -14 | 5, 5 |", "0 water, 1 field, 2 town",
        "about 10 m per pixel", source.facts["fingerprint"], "2 steps, 8 samples, seed 4", "started from scratch",
        f"| finetune | {folder / 'data'} | split: train | s1, dem | `{source.facts['fingerprint']}` |",
        f"| test-places | none | 4 | {report['mIoU']} |",
    ):  # fmt: skip
        assert words in card, words


def test_a_release_scores_like_its_run_and_can_be_finetuned(folder: Path) -> None:
    before, after = assess(folder, "run", "run-again"), assess(folder, "release", "release-again")
    same = ("mIoU", "OA", "Kappa", "pixels")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    run = finetune(test_finetune.config(folder, "again", steps=1, checkpoint=str(folder / "release")))
    assert checkpoint.find(run).contract.modality("s1").offset == (-12.0, -14.0)
    first, found = (checkpoint.find(folder / name).facts["lineage"] for name in ("run", "again"))
    assert checkpoint.find(folder / "release").facts["lineage"] == first and len(first) == 1
    assert found[:1] == first and [each["stage"] for each in found] == ["finetune", "finetune"]


def test_protocol_leaks_and_what_was_forced_stand_on_the_card(folder: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "test-places" / "metrics.json").read_text())
    protocol = {"name": "dfc2020/paper-random", "version": 2, "hash": "0123456789abcdef"}
    report |= {"protocol": protocol, "forced": ["s1.unit: dB against power"]}
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "metrics.json").write_text(json.dumps(report))
    out = release(folder, "run", "named", evaluations=[str(tmp_path / "named")])
    text = (out / "README.md").read_text()
    assert "| named | dfc2020/paper-random, version 2, `0123456789ab` | 4 |" in text
    assert all(f"- {line}" in text for line in in_words(report["leaks"])) and len(in_words(report["leaks"])) > 2
    assert "named was forced in spite of: s1.unit: dB against power." in text
    assert json.loads((out / "eval" / "named.json").read_text()) == report


def test_a_checkpoint_or_the_best_one_is_taken_by_name(folder: Path) -> None:
    (folder / "run" / "best").write_text("step-000002\n")
    for name in ("run/best", "run/latest", "run/checkpoints/step-000002"):
        out = release(folder, name, f"by-name/{name.replace('/', '-')}")
        assert checkpoint.find(out).sha256 == checkpoint.find(folder / "release").sha256


def test_of_a_folder_of_seeds_one_must_be_chosen(folder: Path) -> None:
    for seed in (0, 1):
        (folder / "seeds" / f"seed-{seed}").mkdir(parents=True)
        (folder / "seeds" / f"seed-{seed}" / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="several seeds; give one of them: seed-0, seed-1"):
        release(folder, "seeds", "never")


@pytest.mark.parametrize("given", ["none", "empty"])
def test_what_is_no_evaluation_is_named(folder: Path, given: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{given} is no evaluation"):
        release(folder, "run", "never", evaluations=[str(tmp_path / given)])


def test_two_evaluations_of_one_name_are_refused(folder: Path) -> None:
    same = [str(folder / "test-places"), str(folder / "elsewhere" / "test-places")]
    with pytest.raises(ConfigError, match="two are called 'test-places'"):
        release(folder, "run", "never", evaluations=same)


def test_a_killed_export_leaves_no_release(folder: Path) -> None:
    kill = mock.patch("pipeline.export._same_logits", lambda *_: os._exit(9))
    child = os.fork()
    if child == 0:
        try:
            with kill:
                release(folder, "run", "killed")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (folder / "killed").exists()
    assert release(folder, "run", "killed").is_dir(), "and is in nobody's way"


def test_a_release_goes_to_s3_and_to_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[list[str]] = []
    stand_in = lambda url: FolderStore(folder / str(url).removeprefix("s3://"))  # noqa: E731
    monkeypatch.setattr("shards.store.open_store", stand_in)
    monkeypatch.setattr("pipeline.model.remote.check_free", lambda address: None)
    push = lambda part, address: pushed.append([address, *sorted(os.listdir(part))])  # noqa: E731
    monkeypatch.setattr("pipeline.model.remote.push", push)
    release(folder, "run", "s3://bucket/release", hub="org/name", evaluations=[str(folder / "test-places")])
    assert pushed == [["org/name", "README.md", "config.json", "contract.json", "eval", "model.safetensors"]]
    names = sorted(path.name for path in (folder / "bucket/release").iterdir())
    assert names == ["README.md", "config.json", "contract.json", "eval", "model.safetensors"]


def test_a_place_on_the_hub_that_is_taken_stops_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(address: str) -> None:
        raise ReleaseError(f"{address} is not empty")

    monkeypatch.setattr("pipeline.model.remote.check_free", taken)
    with pytest.raises(ReleaseError, match="org/name is not empty"):
        release(folder, "run", "never", hub="org/name")
    assert not (folder / "never").exists()


def test_the_command_takes_the_fields_of_its_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"evaluations=[{folder / 'test-places'}]", "licence=MIT"]
    assert main(["export", str(folder / "run"), str(folder / "by-command"), *given]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "by-command")
    assert (folder / "by-command" / "eval" / "test-places.json").exists()
    assert "license: mit" in (folder / "by-command" / "README.md").read_text()
    assert main(["export", str(folder / "run"), str(folder / "never"), "licence=MIT", "evaluation=[a]"]) == 1
    assert "did you mean 'evaluations'" in capsys.readouterr().err


def test_of_a_pretrained_run_the_average_is_released(folder: Path) -> None:
    """More ranks, and the other ZeRO stages: tests/test_engine.py."""
    run = pretrain(pretraining(folder, "pretrained", steps=2, engine={"zero": 3}))
    out, source = release(folder, run.name, "pretrained-release"), checkpoint.find(run)
    card = (out / "README.md").read_text()
    assert "reconstruction" in card and "## Classes" not in card and "None was given" in card
    average = MCFMamba.from_pretrained(out).head.weight
    assert "moving average" in card and torch.equal(average, source.state.average["head.weight"])
    assert not torch.equal(average, source.state.parameters["head.weight"])


def test_an_evaluation_of_other_weights_is_refused(folder: Path) -> None:
    finetune(test_finetune.config(folder, "other", steps=1))
    with pytest.raises(CheckpointError, match="evaluate this checkpoint first"):
        release(folder, "other", "never", evaluations=[str(folder / "test-places")])
    assert not (folder / "never").exists()


def test_a_folder_that_holds_something_is_left_alone(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="not empty"):
        release(folder, "run", "data")


def test_other_logits_after_opening_again_are_an_error(folder: Path) -> None:
    def other(address: Path) -> MCFMamba:
        model = checkpoint.find(folder / "run").build()
        with torch.no_grad():
            model.head.weight[0] += 1e-3
        return model

    with mock.patch.object(MCFMamba, "from_pretrained", other), pytest.raises(CheckpointError, match="other logits"):
        release(folder, "run", "broken")
    assert not list(folder.glob("*broken*"))
