from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import configs
from configs import ConfigError
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError
from pipeline.engine import State
from pipeline.model.config import ModelConfig
from pipeline.ranks import Ranks
from pipeline.run import adopt, own_checkpoint, transfer
from shards.contract import ContractError
from shards.store import FolderStore, StoreError
from tests.small_dataset import CONTRACT
from tests.training_scenarios import config

FACTS = {
    "position": 0,
    "fingerprint": "data",
    "model": {"dims": [8, 16], "depths": [1, 1]},
    "contract": CONTRACT.to_json(),
}


def state(value: float = 1.0) -> State:
    moments = {"layer.weight.exp_avg": torch.full((2, 3), value / 3), "layer.weight.exp_avg_sq": torch.ones(2, 3)}
    return State({"layer.weight": torch.full((2, 3), value).T.contiguous().T}, moments, updates=int(value))


def save(run: Path, step: int, keep: int = 9, **facts: Any) -> Path:
    store = FolderStore(run)
    name = checkpoint.save(store, state(step), {**FACTS, "step": step, **facts})
    checkpoint.prune(store, keep)
    return run / name


def newest(run: Path) -> Any:
    return checkpoint.newest(FolderStore(run))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert (tmp_path / "latest").read_text().strip() == "step-000007"
    found = checkpoint.load(folder)
    assert found.step == 7 and found.state.updates == 7 and found.contract == CONTRACT
    assert found.model_config == ModelConfig(dims=(8, 16), depths=(1, 1))
    assert torch.equal(found.state.parameters["layer.weight"], torch.full((2, 3), 7.0))
    assert torch.equal(found.state.moments["layer.weight.exp_avg"], state(7).moments["layer.weight.exp_avg"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100000, 1000000):
        save(tmp_path, step, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-1000000", "step-100000"] or names == ["step-100000", "step-1000000"]
    found = newest(tmp_path)
    assert found is not None and found.step == 1000000


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / file
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = newest(tmp_path)
    assert found is not None and found.step == 1
    assert f"{damaged} is damaged" in caplog.text
    # The run reaches the same step again and writes over the damaged one.
    assert checkpoint.load(save(tmp_path, 2)).step == 2


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_or_cut_file_is_no_checkpoint(tmp_path: Path, file: str) -> None:
    folder = save(tmp_path, 1)
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged|not a whole checkpoint"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* Remove .* to begin again"):
        newest(tmp_path)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.load(folder)


def test_killed_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    put = FolderStore.put

    def killed(store: FolderStore, name: str, source: Any) -> None:
        if name.endswith("step-000002/state.json"):
            raise KeyboardInterrupt
        put(store, name, source)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert (tmp_path / "checkpoints/step-000002/model.safetensors").exists()
    assert newest(tmp_path).step == 1 and checkpoint.find(tmp_path).step == 1
    assert (tmp_path / "latest").read_text().strip() == "step-000001"
    save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]


def test_nothing_but_an_unfinished_checkpoint_begins_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) is None
    assert "without state.json" in caplog.text and "step-000001" in caplog.text


def test_a_full_disk_is_told_and_the_checkpoint_before_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StoreError, match=r"step-000002/model.safetensors: not written: .*No space left"):
        save(tmp_path, 2)
    assert newest(tmp_path).step == 1


def test_the_newest_the_best_and_every_so_many_are_kept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for step in range(1, 11):
        checkpoint.save(store, state(step), {**FACTS, "step": step, "metrics": {"loss": abs(step - 3)}})
        if step == 3:
            checkpoint.point(store, checkpoint.BEST, step)
        checkpoint.prune(store, 2, every=5)
    kept = [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == [3, 5, 9, 10]
    assert checkpoint.best(store, "loss") == 0.0 and checkpoint.best(store, "val/mIoU") is None
    assert checkpoint.find(tmp_path / "best").step == 3 and checkpoint.find(f"{tmp_path}/latest").step == 10


def test_later_stages_take_the_average_and_a_resumed_run_its_own_parameters(tmp_path: Path) -> None:
    average = {"layer.weight": torch.zeros(2, 3)}
    folder = checkpoint.save(FolderStore(tmp_path), replace(state(2), average=average), {**FACTS, "step": 2})
    found = checkpoint.find(tmp_path)
    assert torch.equal(found.parameters["layer.weight"], average["layer.weight"])
    assert torch.equal(found.state.parameters["layer.weight"], torch.full((2, 3), 2.0))
    assert found.sha256 == checkpoint.sha256(tmp_path / folder / "average.safetensors")


def test_state_json_alone_is_read_without_tensors(tmp_path: Path) -> None:
    found = checkpoint.load(save(tmp_path, 4), tensors=False)
    assert found.step == 4 and found.state.updates == 4 and not found.state.parameters


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format_version 99"):
        checkpoint.load(folder)


def test_find_takes_runs_and_checkpoints_and_says_what_it_takes(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    folder = save(tmp_path / "run", 2)
    assert checkpoint.find(tmp_path / "run").step == 2
    assert checkpoint.find(str(folder)).step == 2
    with pytest.raises(CheckpointError, match="give a run folder .* or a release folder"):
        checkpoint.find(tmp_path)


def open_own(settings: Any, fingerprint: str = "data") -> Any:
    return own_checkpoint(settings, fingerprint, Ranks())


def begin(settings: Any) -> None:
    """A run that has begun to write a checkpoint; before that, its config may still be mended."""
    open_own(settings)
    (Path(settings.run) / "checkpoints/step-000001").mkdir(parents=True)
    (Path(settings.run) / "checkpoints/step-000001/model.safetensors").touch()


def test_a_config_may_be_mended_until_there_is_something_to_lose(tmp_path: Path) -> None:
    open_own(config(tmp_path, "run", seed=1))
    open_own(config(tmp_path, "run", seed=2))
    assert configs.load(tmp_path / "run" / "config.yaml").seed == 2


def test_a_new_run_writes_its_config(tmp_path: Path) -> None:
    settings = config(tmp_path, "run")
    assert open_own(settings) is None
    assert configs.load(tmp_path / "run" / "config.yaml") == settings


def test_another_config_is_refused_with_the_keys_and_a_way_out(tmp_path: Path) -> None:
    begin(config(tmp_path, "run"))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_own(config(tmp_path, "run", seed=3, optim={"lr": 0.5, "warmup_samples": 8}))
    for words in ("optim.lr: 0.003 there, 0.5 now", "seed: 0 there, 3 now", "run=", "remove"):
        assert words in str(caught.value)
    assert "warmup_samples" not in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_what_computes_the_same_may_change_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(config(tmp_path, "run"))
    changed = {"engine": {"zero": 3}, "checkpoint_every": 7, "batch": {"global_batch": 4, "micro_batch": 1}}
    with caplog.at_level(logging.WARNING):
        open_own(config(tmp_path, "run", **changed))
    assert "going on with engine.zero: 3 instead of 1" in caplog.text
    assert configs.load(tmp_path / "run" / "config.yaml").engine.zero == 3


def test_a_run_of_another_stage_is_refused(tmp_path: Path) -> None:
    begin(config(tmp_path, "run"))
    other = configs.parse({"stage": "finetune", "run": str(tmp_path / "run"), "data": "x", "steps": 1})
    with pytest.raises(ConfigError, match="holds a run of stage pretrain"):
        open_own(other)


def test_other_data_are_refused(tmp_path: Path) -> None:
    open_own(config(tmp_path, "run"))
    save(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=r"fingerprint data until step 1, other from then on.*stream=restart"):
        open_own(config(tmp_path, "run"), "other")


def test_transfer_loads_by_name_and_lists_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING):
        transfer(model, {"weight": torch.ones(2, 3), "extra": torch.ones(1)}, "there")
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert "not loaded from there: bias" in caplog.text and "not used from there: extra" in caplog.text


def test_transfer_refuses_what_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"weight is \(2, 9\) there"):
        transfer(nn.Linear(3, 2), {"weight": torch.ones(2, 9)}, "there")
    with pytest.raises(CheckpointError, match="no name in common"):
        transfer(nn.Linear(3, 2), {"head": torch.ones(2, 9)}, "there")


@pytest.mark.parametrize("sensors", [["s1"], ["s1", "dem"]])
def test_a_start_keeps_its_modalities_and_normalisation_and_the_data_their_classes(sensors: list[str]) -> None:
    trained = replace(CONTRACT.restrict(["dem", "s1"]).normalised("range"), classes=None)
    found = adopt(trained, CONTRACT.restrict(sensors).normalised("statistics"))
    assert found.sensors == ("dem", "s1")
    assert found.modality("s1").offset == (-25.0, -25.0)
    assert found.classes == CONTRACT.classes


def test_other_units_are_refused() -> None:
    other = replace(CONTRACT, modalities=(replace(CONTRACT.modality("s1"), unit="linear"),))
    with pytest.raises(ContractError, match=r"s1\.unit: dB against linear"):
        adopt(CONTRACT, other)
    with pytest.raises(ContractError, match="the checkpoint knows s1, not dem; choose among them"):
        adopt(CONTRACT.restrict(["s1"]), CONTRACT)
