from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import configs
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.finetune import finetune
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import ReleaseError, read_contract
from pipeline.pretrain import pretrain
from shards.contract import Contract
from tests import test_finetune
from tests.small_dataset import one_thread, write_dataset  # noqa: F401
from tests.training_scenarios import config as pretraining


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned run, its evaluation and its release."""
    folder = tmp_path_factory.mktemp("export")
    write_dataset(folder / "data")
    finetune(test_finetune.config(folder, "run", steps=2, seed=4))
    assess(folder, "run", "test-places")
    export(folder / "run", folder / "release", evaluations=[folder / "test-places"], licence="apache-2.0")
    return folder


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
        f"| test-places | 4 | {report['mIoU']} |",
    ):  # fmt: skip
        assert words in card, words


def test_a_release_scores_like_its_run_and_can_be_finetuned(folder: Path) -> None:
    before, after = assess(folder, "run", "run-again"), assess(folder, "release", "release-again")
    same = ("mIoU", "OA", "Kappa", "pixels")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    run = finetune(test_finetune.config(folder, "again", steps=1, checkpoint=str(folder / "release")))
    assert checkpoint.find(run).contract.modality("s1").offset == (-12.0, -14.0)


def test_a_pretrained_run_can_be_released(folder: Path) -> None:
    run = pretrain(pretraining(folder, "pretrained", steps=1))
    card = (export(run, folder / "pretrained-release") / "README.md").read_text()
    assert "reconstruction" in card and "## Classes" not in card and "None was given" in card


def test_an_evaluation_of_other_weights_is_refused(folder: Path) -> None:
    finetune(test_finetune.config(folder, "other", steps=1))
    with pytest.raises(CheckpointError, match="evaluate this checkpoint first"):
        export(folder / "other", folder / "never", evaluations=[folder / "test-places"])
    assert not (folder / "never").exists()


def test_a_folder_that_holds_something_is_left_alone(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="not empty"):
        export(folder / "run", folder / "data")


def test_other_logits_after_opening_again_are_an_error(folder: Path) -> None:
    def other(path: Path) -> MCFMamba:
        model = checkpoint.find(folder / "run").build()
        with torch.no_grad():
            model.head.weight[0] += 1e-3
        return model

    with mock.patch.object(MCFMamba, "from_pretrained", other), pytest.raises(CheckpointError, match="other logits"):
        export(folder / "run", folder / "broken")
    assert not (folder / "broken").exists()
