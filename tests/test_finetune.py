from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import configs
from configs import ConfigError
from pipeline import checkpoint, log
from pipeline.batch import collate
from pipeline.evaluate import evaluate
from pipeline.finetune import cross_entropy, dice, finetune, labelled
from pipeline.metrics import scores
from pipeline.pretrain import pretrain
from pipeline.ranks import Ranks
from pipeline.scoring import confusion
from shards.contract import ContractError
from shards.manifest import ManifestError, select
from tests.golden import Golden
from tests.small_dataset import CLASSES, CONTRACT, make_sample, one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config as pretraining


def config(folder: Path, run: str, **changes: Any) -> Any:
    raw = {
        "stage": "finetune",
        "run": str(folder / run),
        "data": str(folder / "data"),
        "model": {"dims": [8, 16], "depths": [1, 1]},
        "batch": {"global_batch": 4},
        "optim": {"lr": 5e-3},
        "where": {"split": ["train"]},
        "steps": 30,
    }
    return configs.parse({**raw, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def scratch(folder: Path) -> Path:
    return finetune(config(folder, "scratch", validate_every=20))


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    return pretrain(pretraining(folder, "pretrained", steps=2, normalise="range"))


def test_finetuning_learns(scratch: Path) -> None:
    lines = log.read(scratch)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/ce"] + lines[0]["loss/dice"], rel=1e-5)
    scored = [line["step"] for line in lines if "val/mIoU" in line]
    assert scored == [20, 30]
    assert lines[-1]["val/mIoU"] > 60  # three equally frequent classes: a constant map has 11


def test_validation_is_what_evaluate_finds(folder: Path, scratch: Path) -> None:
    where = {"where": {"split": ["val"]}}
    settings = {"stage": "evaluate", "checkpoint": str(scratch), "data": str(folder / "data"), **where}
    run = evaluate(configs.parse({**settings, "run": str(folder / "evaluated"), "micro_batch": 3}))
    found = json.loads((run / "metrics.json").read_text())
    last = log.read(scratch)[-1]
    assert {name: found[name] for name in ("mIoU", "OA", "IoU/town")} == {
        name: last[f"val/{name}"] for name in ("mIoU", "OA", "IoU/town")
    }
    assert found["samples"] == 4 and found["sensors"] == ["s1", "dem"] and found["checkpoint_seed"] == 0
    assert found["checkpoint_sha256"] == checkpoint.find(scratch).sha256
    assert found["checkpoint_fingerprint"] != found["fingerprint"]
    rows = [line.split(",") for line in (run / "confusion.csv").read_text().splitlines()]
    assert rows[0][1:] == list(CLASSES.names) and [row[0] for row in rows[1:]] == list(CLASSES.names)
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows[1:]])
    assert matrix.sum() == found["pixels"] == 4 * (32 * 32 - 25)
    assert scores(matrix, CLASSES.names)["mIoU"] == found["mIoU"]


def test_a_modality_can_be_kept_from_the_model(folder: Path, scratch: Path) -> None:
    settings = {"stage": "evaluate", "checkpoint": str(scratch), "data": str(folder / "data"), "sensors": ["dem"]}
    run = evaluate(configs.parse({**settings, "run": str(folder / "dem-only")}))
    found = json.loads((run / "metrics.json").read_text())
    assert found["sensors"] == ["dem"]
    assert found["mIoU"] < log.read(scratch)[-1]["val/mIoU"] - 10


def test_evaluation_can_be_limited(folder: Path, scratch: Path) -> None:
    settings = {"stage": "evaluate", "checkpoint": str(scratch), "data": str(folder / "data"), "limit": 2}
    run = evaluate(configs.parse({**settings, "run": str(folder / "limited")}))
    assert json.loads((run / "metrics.json").read_text())["samples"] == 2


def test_all_but_the_head_is_loaded_and_said(folder: Path, pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = finetune(config(folder, "tuned", checkpoint=str(pretrained), steps=1, optim={"lr": 1e-9}))
    assert "not loaded from" in caplog.text and "head.weight" in caplog.text
    before, after = checkpoint.find(pretrained), checkpoint.find(run)
    for name, tensor in after.state.parameters.items():
        if not name.startswith("head."):
            assert torch.allclose(tensor, before.parameters[name], atol=1e-7), name
    assert after.state.parameters["head.weight"].shape[0] == 3
    # The inputs stay as the pretrained network knew them, and the classes are those of the data.
    assert after.contract.modality("s1").offset == (-25.0, -25.0)
    assert after.contract.classes == CLASSES


def test_a_pretrained_checkpoint_cannot_be_evaluated(folder: Path, pretrained: Path) -> None:
    settings = {"stage": "evaluate", "checkpoint": str(pretrained), "data": str(folder / "data")}
    with pytest.raises(ContractError, match="classes: the checkpoint .* has None"):
        evaluate(configs.parse({**settings, "run": str(folder / "never")}))
    assert not (folder / "never").exists()


def test_the_modalities_are_those_of_the_config(folder: Path, pretrained: Path) -> None:
    run = finetune(config(folder, "dem", sensors=["dem"], steps=1))
    assert checkpoint.find(run).build().channels == {"dem": 1}
    # A start keeps all of its encoders; those without data go untrained.
    run = finetune(config(folder, "dem-of-both", checkpoint=str(pretrained), sensors=["dem"], steps=3))
    before, after = checkpoint.find(pretrained).parameters, checkpoint.find(run).state.parameters

    name = "patch_embed.proj.weight"
    assert not torch.equal(after[f"encoders.dem.{name}"], before[f"encoders.dem.{name}"])


def test_unlabelled_data_and_empty_selections_are_refused(folder: Path) -> None:
    with pytest.raises(ManifestError, match="no sample fits"):
        finetune(config(folder, "none", where={"split": ["nowhere"]}))
    with pytest.raises(ManifestError, match="no sample fits"):
        finetune(config(folder, "none", validate_every=5, val_where={"split": ["nowhere"]}))


def keys(settings: Any) -> list[str]:
    return sorted(labelled(settings).rows(["key"])["key"].to_pylist())


def test_few_labels_are_chosen_by_the_seed(folder: Path) -> None:
    everything = keys(config(folder, "few"))
    assert len(everything) == 8
    three = keys(config(folder, "few", limit=3))
    assert len(three) == 3 and set(three) < set(everything)
    assert three == keys(config(folder, "few", limit=3))
    assert len({tuple(keys(config(folder, "few", limit=3, seed=seed))) for seed in range(6)}) > 1
    assert set(three) < set(keys(config(folder, "few", limit=5)))
    assert len(keys(config(folder, "few", fraction=0.25))) == 2
    assert len(keys(config(folder, "few", fraction=0.01))) == 1
    assert len(keys(config(folder, "few", fraction=0.5, limit=100))) == 4


def as_one_sample(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ..., H, W] -> [1, ..., B H, W]: the published losses pool over the batch."""
    return torch.cat(list(tensor), -2)[None]


def test_losses_of_one_sample_are_the_published_ones() -> None:
    golden = Golden("units")
    logits, label = as_one_sample(golden["suploss/logits"]), as_one_sample(golden["suploss/target"])
    assert torch.allclose(cross_entropy(logits, label, 255), golden["suploss/ce"], rtol=1e-5)
    # They divide by all 5 classes; one of them does not occur, and ours is the mean over those that do.
    assert label.unique().tolist() == [0, 1, 2, 3]
    assert torch.allclose(dice(logits, label, 255) * 4 / 5, golden["suploss/dice"], rtol=1e-5)
    ignored = as_one_sample(golden["suploss/target_with_ignore"])
    code = int(ignored.min() if ignored.min() < 0 else ignored.max())
    assert torch.allclose(cross_entropy(logits, ignored, code), golden["suploss/ce_with_ignore"], rtol=1e-5)
    expected = golden["suploss/dice_with_ignore_index_-100"]
    assert torch.allclose(dice(logits, ignored, code) * 4 / 5, expected, rtol=1e-5)


@pytest.mark.parametrize("function", [cross_entropy, dice])
def test_ignored_pixels_have_no_gradient_and_samples_are_apart(function: Any) -> None:
    logits = torch.randn(3, 4, 5, 6, requires_grad=True)
    label = torch.randint(0, 4, (3, 5, 6))
    label[0, :2], label[2] = 255, 255
    losses = function(logits, label, 255)
    losses.sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, :, :2] == 0).all() and (logits.grad[0, :, 2:] != 0).any()
    assert losses[2] == 0 and (logits.grad[2] == 0).all()
    assert torch.allclose(losses[1:2], function(logits[1:2], label[1:2], 255))


def test_a_perfect_map_has_no_dice_loss_whatever_classes_it_lacks() -> None:
    label = torch.randint(0, 2, (1, 8, 8))
    logits = 50 * torch.nn.functional.one_hot(label, 5).permute(0, 3, 1, 2).float()
    assert float(dice(logits, label, 255)) < 1e-6


def test_every_sample_is_scored_once_however_few_there_are(folder: Path) -> None:
    selection = select(str(folder / "data"), where={"split": ["test"]})
    calls: list[int] = []

    def model(images: Any, hidden: Any) -> torch.Tensor:
        batch, _, height, width = images["s1"].shape
        calls.append(batch)
        return torch.zeros(batch, 3, height, width)

    parts = [
        confusion(model, selection, CONTRACT, 1, Ranks(rank, 6, rank, 6, port=1), torch.device("cpu"))
        for rank in range(6)
    ]
    assert sum(part.sum() for part in parts) == 4 * (32 * 32 - 25)
    assert calls == [1] * 6  # ranks 4 and 5 have no sample of their own and run one that does not count


def test_labels_are_needed(folder: Path) -> None:
    from dataclasses import replace

    selection = select(str(folder / "data"))
    with pytest.raises(ContractError, match="no classes"):
        confusion(lambda *_: None, selection, replace(CONTRACT, classes=None), 1, Ranks(), torch.device("cpu"))  # type: ignore[arg-type,return-value]
    from pipeline.finetune import objective

    batch = collate([(make_sample(0, labelled=False), 0)], CONTRACT)
    with pytest.raises(ConfigError, match="no label in some of sample-000"):
        objective(255, 0)(lambda *_: torch.zeros(1, 3, 32, 32), batch)
