from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from configs import ConfigError
from pipeline import checkpoint, log
from pipeline.batch import Batch, collate
from pipeline.engine import Engine
from pipeline.model import cmss
from pipeline.pretrain import hidden, objective, pretrain, reconstruct
from pipeline.signals import Stopped
from shards.stream import Stream
from tests.fake_stages import quietly
from tests.small_dataset import CONTRACT, make_sample, one_thread, write_dataset  # noqa: F401
from tests.training_scenarios import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_dataset(folder / "data")
    return folder


def batch(size: int = 96) -> Batch:
    return collate([(make_sample(number, size), number) for number in range(4)], CONTRACT)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return pretrain(config(folder, "trained", steps=12, pictures_every=5))


def test_the_loss_falls_and_has_a_part_per_modality(trained: Path) -> None:
    lines = log.read(trained)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/s1"] + line["loss/dem"], rel=1e-5)
    assert sum(line["io"]["samples"] for line in lines) >= 48
    assert all(0 < line["mfu"] < 5 and 0 < line["memory"] < 100 for line in lines)


def test_a_run_leaves_a_page_and_tensorboards_file(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert "12 of 12 (100.0%)" in page and "Reconstructions" in page and "s1 (2), dem (1)" in page
    assert len(list((trained / "tensorboard").iterdir())) == 1


def test_a_run_says_what_it_was_made_by(trained: Path) -> None:
    found = json.loads((trained / "environment.json").read_text())
    assert f"torch=={torch.__version__}" in found["packages"] and len(found["code"]) == 64
    assert found["python"].startswith("3.") and "AWS" not in (trained / "environment.json").read_text()


def test_a_probe_on_labelled_samples_joins_the_metrics(folder: Path) -> None:
    probe = {"data": str(folder / "data"), "every": 2, "limit": 4}
    lines = log.read(pretrain(config(folder, "probed", steps=5, probe=probe, keep_best="probe/mIoU", track=[])))
    assert [line["step"] for line in lines if "probe/mIoU" in line] == [2, 4, 5]
    assert checkpoint.find(folder / "probed/best").step in (2, 4, 5)


def test_a_pretrained_checkpoint_has_no_classes_and_reconstructs_every_band(trained: Path) -> None:
    found = checkpoint.find(trained)
    assert found.contract.classes is None and found.contract.sensors == ("s1", "dem")
    assert found.contract.modality("s1").offset == (-12.0, -14.0)  # normalise: statistics
    assert found.build().outputs == 3


def test_pictures_are_drawn_on_the_way_and_at_the_end(trained: Path) -> None:
    pictures = sorted((trained / "pictures").iterdir())
    assert [path.name for path in pictures] == ["step-000005.png", "step-000010.png", "step-000012.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_finished_run_is_left_as_it_is(folder: Path, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    with mock.patch.object(Engine, "step", side_effect=AssertionError("a step was made")):
        assert pretrain(config(folder, "trained", steps=12, pictures_every=5)) == trained
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_grown_dataset_needs_stream_restart_and_then_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretrain(config(folder, "growing", steps=3, checkpoint_every=2))
    (folder / "growing/checkpoints/step-000003").rename(folder / "step-3-gone")
    write_dataset(folder / "more", samples=24)
    grown = config(folder, "growing", steps=3, checkpoint_every=2, data=str(folder / "more"))
    with pytest.raises(ConfigError, match="has changed since run .*until step 2.*write stream=restart to go on"):
        pretrain(grown)
    run = pretrain(replace(grown, stream="restart"))
    assert "the selection has changed" in caplog.text and "position 8 of the new order" in caplog.text
    assert [line["step"] for line in log.read(run)] == [1, 2, 3]
    (found,) = {checkpoint.find(run).facts["fingerprint"]}
    assert found != checkpoint.find(folder / "growing/checkpoints/step-000002").facts["fingerprint"]


def test_start_takes_the_parameters_and_not_the_steps(folder: Path, trained: Path) -> None:
    run = pretrain(config(folder, "started", start=str(trained), steps=2, optim={"lr": 1e-9}))
    lines = log.read(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] < 0.7 * log.read(trained)[0]["loss"]
    old, new = checkpoint.find(trained).parameters, checkpoint.find(run).state.parameters
    assert all(torch.allclose(new[name], old[name], atol=1e-7) for name in old)


def test_a_killed_run_goes_on_with_the_samples_it_would_have_had(folder: Path) -> None:
    whole = log.read(pretrain(config(folder, "whole")))
    seen: list[int] = []
    original = Stream.__iter__

    def watched(self: Stream) -> Any:
        for sample, position in original(self):
            seen.append(position)
            yield sample, position

    settings = config(folder, "killed", checkpoint_every=2)
    save = checkpoint.save

    def shoot(*arguments: Any) -> str:
        found = save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with mock.patch.object(checkpoint, "save", shoot), pytest.raises(Stopped):
        pretrain(settings)
    with mock.patch.object(Stream, "__iter__", watched):
        pretrain(settings)
    done = checkpoint.find(folder / "killed")
    assert [line["loss"] for line in log.read(folder / "killed")] == [line["loss"] for line in whole]
    assert min(seen) in (8, 12)  # nothing before the checkpoint of the stop was read again
    assert done.step == len(whole)


@pytest.fixture(scope="module")
def first_loss(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loss of the first step of a run with changes to its config; samples of four blocks."""
    folder = tmp_path_factory.mktemp("fields")
    write_dataset(folder / "data", size=64)

    def measure(**changes: Any) -> float:
        name = str(len(list(folder.iterdir())))
        with quietly(), mock.patch("pipeline.pretrain.pictures", lambda *_: lambda step: {}):
            run = pretrain(config(folder, name, steps=1, batch={"global_batch": 2}, **changes))
        return float(log.read(run)[0]["loss"])

    return measure


def test_every_field_has_an_effect(first_loss: Any) -> None:
    plain = first_loss()
    assert first_loss() == plain
    deep = {"dims": [8, 16], "depths": [1, 1]}
    for change in (
        {"augment": "none"}, {"lanes": 1}, {"seed": 1}, {"normalise": "range"}, {"sensors": ["s1"]},
        {"where": {"split": ["test"]}}, {"cmss": {"ratio": 0.75}}, {"cmss": {"strategy": "independent"}},
        {"cmss": {"weights": {"s1": 2}}}, {"model": {**deep, "drop_path": 0.9}},
        {"model": {**deep, "profile": "paper"}},
    ):  # fmt: skip
        assert first_loss(**change) != plain, change


@pytest.mark.parametrize("scan", ["torch", "reference"])
def test_the_scan_can_be_chosen_and_is_recorded(folder: Path, scan: str) -> None:
    settings = config(folder, f"scan-{scan}", steps=1, engine={"scan": scan})
    found = checkpoint.find(pretrain(settings))
    assert found.facts["scan"] == scan
    assert torch.isfinite(found.state.parameters["head.weight"]).all()


def test_masks_follow_seed_and_position_not_the_batch() -> None:
    settings, samples = config(Path(), "run", seed=5), batch()
    whole, _ = hidden(settings, samples)
    alone, _ = hidden(settings, collate([(make_sample(2, 96), 2)], CONTRACT))
    assert torch.equal(alone["s1"], whole["s1"][2:3])
    other, _ = hidden(replace(settings, seed=6), samples)
    assert not torch.equal(other["s1"], whole["s1"])
    assert torch.equal(whole["s1"], ~whole["dem"])  # two modalities, all present: complementary


class Perfect:
    """A model that returns its target with an error only where nothing was hidden."""

    def __init__(self, target: Batch, blocks: dict[str, torch.Tensor]) -> None:
        self.parts = []
        for name, image in target.values.items():
            where = blocks[name].repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
            self.parts.append(image + 5.0 * ~where)

    def __call__(self, *_: Any) -> torch.Tensor:
        return torch.cat(self.parts, 1)


def test_only_what_was_hidden_is_scored() -> None:
    settings, samples = config(Path(), "run"), batch()
    model = Perfect(samples, hidden(settings, samples)[0])
    losses, parts, _ = objective(settings, CONTRACT)(model, samples)
    assert losses.shape == (4,) and float(losses.abs().max()) < 1e-10 and set(parts) == {"s1", "dem"}


def test_weights_scale_a_modality_and_unknown_ones_are_refused() -> None:
    samples = batch()
    model = lambda *_: torch.zeros(4, 3, 96, 96)  # noqa: E731
    plain, parts, _ = objective(config(Path(), "run"), CONTRACT)(model, samples)
    weighted = objective(config(Path(), "run", cmss={"weights": {"dem": 3.0}}), CONTRACT)(model, samples).total
    assert torch.allclose(weighted - plain, 2 * parts["dem"])
    with pytest.raises(ConfigError, match=r"no modality s2; there are s1, dem"):
        objective(config(Path(), "run", cmss={"weights": {"s2": 1.0}}), CONTRACT)


def test_reconstructions_of_blocks_are_shown_in_the_contracts_numbers() -> None:
    settings, samples = config(Path(), "run", cmss={"target": "block", "block": 16}), batch()
    wanted = cmss.targets(samples.values, samples.valid, "block", 16)
    found = reconstruct(lambda *_: torch.cat(list(wanted.values()), 1), settings, samples)
    for i, item in enumerate(found):
        for name, valid in item.valid.items():
            np.testing.assert_allclose(item.output[name][:, valid], item.values[name][:, valid], atol=1e-4)
        assert item.cell == 16 and item.key == samples.keys[i]


def test_reconstructions_are_cut_by_modality() -> None:
    settings, samples = config(Path(), "run"), batch()
    found = reconstruct(Perfect(samples, hidden(settings, samples)[0]), settings, samples)
    assert [item.key for item in found] == samples.keys
    assert found[1].output["s1"].shape == (2, 96, 96) and found[1].output["dem"].shape == (1, 96, 96)
    where = found[1].hidden["dem"].repeat(32, 0).repeat(32, 1)
    assert (found[1].output["dem"][0] == found[1].values["dem"][0])[where].all()
