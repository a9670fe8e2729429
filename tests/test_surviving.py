"""Steps that go wrong: what the loop does about them, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline import checkpoint, log, pretrain
from pipeline.batch import Batch
from pipeline.config import Guard
from pipeline.loop import Losses, train
from pipeline.rollback import NotTraining, RolledBack
from pipeline.run import build_engine
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.test_loop import GLOBAL_BATCH, batches, objective, prepare
from tests.training_scenarios import config, poisoned

NAN = float("nan")


def worse(factor: float, *positions: int) -> Any:
    """The objective, with the losses of samples at these positions multiplied by `factor`."""

    def losses(model: Any, batch: Batch) -> Losses:
        found = objective(model, batch)
        bad = torch.isin(batch.positions, torch.tensor(positions))
        return found._replace(total=found.total * torch.where(bad, factor, 1.0))

    return losses


@pytest.mark.parametrize("position", [8, 9, 10, 11])
def test_a_loss_that_is_not_finite_is_passed_over_and_named(
    tmp_path: Path, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever of the accumulated micro-batches it is in: step 4 is computed from what step 2 left."""
    run, engine = prepare(tmp_path, checkpoint_every=1, keep=9)
    train(run, engine, worse(NAN, position), batches(), 0)
    lines = log.read(run.folder)
    assert [line["loss"] is None for line in lines] == [False, False, True, False]
    assert lines[2]["skipped"] == {"why": "loss nan", "samples": {"0": [f"s{position}"]}}
    assert lines[2]["grad_norm"] is None and [line["skips"] for line in lines] == [0, 0, 1, 1]
    assert f"step 3 passed over: loss nan; rank 0: s{position}" in caplog.text
    names = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert names == {"step-000001", "step-000002", "step-000004"}, "none while steps are passed over"

    before = checkpoint.load(run.folder / "checkpoints/step-000002")
    after = checkpoint.load(run.folder / "checkpoints/step-000004")
    assert after.facts["updates"] == before.facts["updates"] + 1
    (tmp_path / "other").mkdir()
    other, fresh = prepare(tmp_path / "other", keep=9)  # the same, but that steps 1, 2 and 4 are all there are
    kept = batches()
    chosen = [batch for number, batch in zip(range(8), kept, strict=False) if number not in (4, 5)]
    with mock.patch("pipeline.loop.learning_rate", side_effect=[line["lr"] for line in (*lines[:2], lines[3])] + [0.0]):
        train(other, fresh, objective, iter([*chosen, *chosen[:2]]), 0)
    for name, value in fresh.module.named_parameters():
        assert torch.equal(value, dict(engine.module.named_parameters())[name]), "the update of a step that was not"


def test_a_spike_is_passed_over(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, steps=20, guard={"spike": 4.0})
    position = 18 * GLOBAL_BATCH
    train(run, engine, worse(1e3, position), batches(), 0)
    lines = log.read(run.folder)
    assert [line["step"] for line in lines if "skipped" in line] == [19]
    assert lines[18]["skipped"]["samples"] == {"0": [f"s{position}"]}
    assert "times the last 18 steps' median" in lines[18]["skipped"]["why"] and lines[18]["loss"] > 10


def test_too_many_in_a_row_put_the_run_back_to_its_last_good_checkpoint(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, steps=8, checkpoint_every=2, keep=9, guard={"skips": 2})
    with pytest.raises(RolledBack, match=r"step 5: 2 steps in a row .*loss nan.*from the parameters of step 2"):
        train(run, engine, worse(NAN, 12, 16), batches(), 0)
    lines = log.read(run.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["rolled_back_to"] == 2 and (lines[-1]["skips"], lines[-1]["rollbacks"]) == (2, 1)
    put = checkpoint.find(run.folder)
    assert (put.step, put.facts["position"]) == (5, 20)
    good = checkpoint.load(run.folder / "checkpoints/step-000002")
    assert torch.equal(put.parameters["weight"], good.parameters["weight"])
    assert put.facts["updates"] == good.facts["updates"] == 2


def test_without_a_checkpoint_it_stops_and_says_where_the_first_nan_was(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, guard={"skips": 1})
    broken = batches()

    def with_hole() -> Any:
        first = next(broken)
        first.values["x"][1] = NAN
        yield first
        yield from broken

    with pytest.raises(NotTraining, match=r"rank 0: image x of sample s1\. there is no checkpoint.*Lower optim.lr"):
        train(run, engine, objective, with_hole(), 0)
    assert not (run.folder / "latest").exists()


def test_a_gradient_that_is_not_finite_goes_back_at_once(tmp_path: Path) -> None:
    run, engine = prepare(tmp_path, checkpoint_every=1, keep=9)

    def steep(model: Any, batch: Batch) -> Losses:
        """A finite loss whose derivative is infinite: the square root of 0."""
        found = objective(model, batch)
        root = (model(batch.values["x"]).mean(1) * 0).sqrt()
        return found._replace(total=found.total + root) if 9 in batch.positions else found

    with pytest.raises(RolledBack, match=r"step 3: the gradient's norm is (nan|inf), though the loss is \d") as caught:
        train(run, engine, steep, batches(), 0)
    assert "rank 0: gradient at the output of the whole" in str(caught.value)
    assert log.read(run.folder)[-1]["rolled_back_to"] == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surviving")
    write_dataset(folder / "data")
    return folder


def test_a_stage_goes_on_past_the_data_and_stops_the_second_time(data: Path) -> None:
    """Pretraining comes back by itself; a second failure before there is a new checkpoint ends it."""
    how = {"steps": 9, "checkpoint_every": 3, "keep": 9, "guard": {"skips": 2, "starts": 2}, "track": []}
    with mock.patch.object(pretrain, "objective", poisoned(pretrain.objective, {16, 20})):
        run = pretrain.pretrain(config(data, "back", **how))
    lines = log.read(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["step"] for line in lines if line.get("rolled_back_to") == 3] == [6]
    assert all(math.isfinite(line["loss"]) for line in lines[6:]) and lines[-1]["rollbacks"] == 1
    with (
        mock.patch.object(pretrain, "objective", poisoned(pretrain.objective, {16, 20, 24, 28})),
        pytest.raises(NotTraining, match=r"step 8: 2 steps in a row.*had gone on from step 6 already"),
    ):
        pretrain.pretrain(config(data, "back-twice", **how))
    assert checkpoint.find(data / "back-twice").step == 6
    ended = json.loads((data / "back-twice/starts.json").read_text())
    assert ended["ended"].startswith("rank 0: NotTraining: step 8")


def test_the_first_layer_is_named(data: Path) -> None:
    """A weight of a block becomes NaN, as after an overflow: every loss is, and the report says where it begins."""
    original = build_engine

    def spoiled(*arguments: Any) -> Any:
        engine = original(*arguments)
        module = dict(engine.module.named_modules())["encoders.dem.patch_embed.proj"]
        module.register_forward_hook(lambda _m, _i, out: out * NAN)
        return engine

    how = {"guard": {"skips": 1}, "track": []}
    with mock.patch.object(pretrain, "build_engine", spoiled), pytest.raises(NotTraining) as caught:
        pretrain.pretrain(config(data, "named", **how))
    assert "rank 0: output of encoders.dem.patch_embed.proj (Conv2d)" in str(caught.value)


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="skips"):
        Guard(skips=0)
