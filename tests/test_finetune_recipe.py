"""How finetuning is told to learn: rates by layer, frozen encoders, class weights, epochs, patience, seeds, labels."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch

import configs
from configs import ConfigError
from launchers import chain
from launchers.plan import plan
from pipeline import checkpoint, log, loop
from pipeline.class_weights import class_weights, count_pixels
from pipeline.config import Optim
from pipeline.engine import State
from pipeline.finetune import cross_entropy, finetune, labelled, objective
from pipeline.finetune_config import resolved
from pipeline.model import MCFMamba, ModelConfig
from pipeline.model.ss2d import DropPath
from pipeline.optim import layer_numbers, parameter_groups, rate_scales
from pipeline.provenance import lineage
from pipeline.ranks import Ranks
from pipeline.run import Run
from pipeline.seeds import per_seed
from pipeline.signals import Stopped
from pipeline.stratified import stratified
from shards.manifest import Selection, select
from shards.store import open_store
from tests.small_dataset import CLASSES, CONTRACT, one_thread, quiet, write_dataset  # noqa: F401
from tests.test_finetune import config as finetuning


def config(folder: Path, run: str, **changes: Any) -> Any:
    return finetuning(folder, run, **{"track": [], **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a checkpoint of its modalities with drop path."""
    folder = tmp_path_factory.mktemp("recipe")
    write_dataset(folder / "data")
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), drop_path=0.5), CONTRACT.channels, 3)
    contract = replace(CONTRACT.normalised("range"), classes=None).to_json()
    facts = {"step": 1, "model": asdict(model.config), "contract": contract}
    checkpoint.save(open_store(folder / "start"), State(model.state_dict(), {}, 1), facts)
    return folder


def test_layers_are_numbered_from_the_pixels_to_the_head() -> None:
    model = MCFMamba(ModelConfig(size="nano", d_state=2), {"s1": 2, "dem": 1}, 3)
    found = layer_numbers([name for name, _ in model.named_parameters()])
    assert [name for name, _ in model.named_parameters() if name not in found] == ["head.weight"]
    numbers = {
        "encoders.dem.patch_embed.proj.weight": 0,
        "encoders.s1.stages.0.blocks.0.norm.weight": 1,
        "encoders.s1.stages.0.downsample.norm.weight": 1,
        "encoders.s1.stages.2.blocks.0.norm.weight": 3,  # nano has 1, 1, 2, 1 blocks
        "encoders.s1.stages.2.blocks.1.norm.weight": 4,
        "encoders.s1.stages.2.out_norm.weight": 4,
        "fusion.2.norm.weight": 4,
        "fusion.3.branches.s1.norm.weight": 5,
        "decoder.levels.0.merge.weight": 6,
        "decoder.levels.2.merge.weight": 8,
        "decoder.expand.norm.weight": 8,
    }
    assert {name: found[name] for name in numbers} == numbers


def test_rates_fall_towards_the_pixels() -> None:
    model = MCFMamba(ModelConfig(size="nano", d_state=2), {"s1": 2}, 3)
    optim = Optim(lr=1e-3, layer_decay=0.5, head_lr=1e-2)
    scales = rate_scales(model, optim)
    assert scales["head.weight"] == pytest.approx(10)
    assert scales["decoder.levels.2.merge.weight"] == 0.5
    assert scales["encoders.s1.patch_embed.proj.weight"] == 0.5**9
    assert set(rate_scales(model, Optim()).values()) == {1.0}
    groups = parameter_groups(model, optim)
    assert len(groups) == 2 * 9 + 1  # the head has no bias
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        assert {scales[names[id(parameter)]] for parameter in group["params"]} == {group["lr_scale"]}


def frozen(folder: Path, run: str, **changes: Any) -> Any:
    optim = {"lr": 1e-2, "layer_decay": 0.5, "head_lr": 3e-2, "ema": 0.5}
    start = {"checkpoint": str(folder / "start"), "freeze": "encoders", "steps": 3, "checkpoint_every": 1}
    return config(folder, run, optim=optim, **start, **changes)


def test_frozen_encoders_and_rates_by_layer_at_any_zero_stage_and_after_a_resume(folder: Path) -> None:
    whole = finetune(frozen(folder, "whole", engine={"zero": 0}))
    stopped = frozen(folder, "stopped", engine={"zero": 3})
    answers = iter([True])
    with mock.patch.object(loop, "agree", lambda flag: next(answers)), pytest.raises(Stopped):
        finetune(stopped)
    finetune(replace(stopped, engine=replace(stopped.engine, zero=2)))
    losses = [[line["loss"] for line in log.read(run)] for run in (whole, folder / "stopped")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before, after = checkpoint.find(folder / "start"), checkpoint.find(whole)
    other = checkpoint.find(folder / "stopped")
    for name, tensor in after.state.parameters.items():
        assert torch.allclose(tensor, other.state.parameters[name], rtol=1e-4, atol=1e-6), name
        if name.startswith("encoders."):
            assert torch.equal(tensor, before.parameters[name]) and f"{name}.exp_avg" not in after.state.moments
            assert torch.equal(after.parameters[name], tensor)
    assert after.state.moments.keys() == other.state.moments.keys()
    moved = {
        name: float((after.state.parameters[name] - before.parameters[name]).abs().max()) for name in before.parameters
    }
    # AdamW moves by about its rate: 0.01, halved from layer to layer.
    assert moved["decoder.levels.0.merge.weight"] > 1.5 * moved["fusion.1.mix.project.weight"]
    assert moved["fusion.1.mix.project.weight"] > 1.5 * moved["fusion.0.mix.project.weight"]
    after.build()


def test_a_frozen_encoder_has_no_drop_path(folder: Path) -> None:
    seen: list[set[float]] = []

    def spy(run: Any, start: Any, model: MCFMamba) -> Any:
        seen.append({module.rate for module in model.encoders.modules() if isinstance(module, DropPath)})
        raise KeyboardInterrupt

    for changes in ({}, {"freeze": "none"}):
        settings = replace(frozen(folder, f"spied-{len(seen)}"), **changes)
        with mock.patch("pipeline.finetune.build_engine", spy), pytest.raises(KeyboardInterrupt):
            finetune(settings)
    assert seen == [{0.0}, {0.0, 0.5}]


def test_weights_multiply_a_pixels_loss_and_nothing_else() -> None:
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[0, 0], label[1] = 255, 2
    weights = torch.tensor([1.0, 2.0, 5.0])
    pixels = torch.nn.functional.cross_entropy(logits, label.clamp(max=2), reduction="none")
    expected = (pixels * weights[label.clamp(max=2)] * (label != 255)).sum((1, 2)) / (label != 255).sum((1, 2))
    assert torch.allclose(cross_entropy(logits, label, 255, weights), expected)
    # A sample all of one class feels its weight.
    assert torch.allclose(cross_entropy(logits, label, 255, weights)[1], 5 * cross_entropy(logits, label, 255)[1])
    from pipeline.batch import collate
    from tests.small_dataset import make_sample

    batch = collate([(make_sample(0), 0)], CONTRACT)
    plain, weighted = (objective(255, 0, 0, w)(lambda *_: torch.ones(1, 3, 32, 32), batch) for w in (None, weights))
    assert torch.equal(plain.parts["dice"], weighted.parts["dice"])
    assert not torch.equal(plain.parts["ce"], weighted.parts["ce"])


def test_balanced_weights_are_counted_once_and_leave_the_scale(folder: Path) -> None:
    settings = config(folder, "weighed", class_weights="balanced")
    selection = labelled(settings)
    run = Run(folder / "weighed", settings, CONTRACT, selection.fingerprint, Ranks())
    counts = count_pixels(selection, Ranks())
    assert counts.sum() == 8 * 32 * 32 and counts[255] == 8 * 25
    shares = sum(count_pixels(selection, Ranks(rank, 3, rank, 3, port=1)) for rank in range(3))
    assert np.array_equal(shares, counts)
    found = class_weights(settings, run, selection, CLASSES)
    assert found is not None
    assert torch.allclose(found, torch.tensor(counts[:3].sum() / (3 * counts[:3])).float())
    assert float((found * torch.tensor(counts[:3])).sum() / counts[:3].sum()) == pytest.approx(1)
    with mock.patch("pipeline.class_weights.count_pixels", side_effect=AssertionError):
        again = class_weights(settings, run, selection, CLASSES)
    assert again is not None and torch.equal(again, found)
    three = class_weights(replace(settings, class_weights=(1.0, 2.0, 0.5)), run, selection, CLASSES)
    assert three is not None and three.tolist() == [1, 2, 0.5]
    with pytest.raises(ConfigError, match="2 numbers given; the data have 3 classes: water, field, town"):
        class_weights(replace(settings, class_weights=(1.0, 2.0)), run, selection, CLASSES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "give one of them, steps=N or epochs=N"),
        ({"epochs": 2}, "steps=30, epochs=2.0: give one of them"),
        ({"seeds": [1, 1]}, "each may be there once"),
        ({"patience": 3}, "patience=3 needs the metric to watch; write keep_best="),
        ({"patience": 3, "keep_best": "val/OA"}, "write validate_every=STEPS or epoch"),
        ({"freeze": "encoders"}, "write checkpoint= or freeze=none"),
        ({"adapt": {"dem": "s1"}}, "write checkpoint="),
        ({"class_weights": [1, -1]}, "one number per class, 0 or more, not all 0"),
        ({"validate_every": -1}, "0 or more steps, or epoch"),
        ({"augment": "some"}, "'none', 'mirror' or 'all'"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        config(tmp_path, "never", **changes)


def test_epochs_are_counted_in_the_samples_that_are_left(folder: Path) -> None:
    settings = config(folder, "epochs", steps=0, epochs=2.5, validate_every="epoch")
    found = resolved(settings, 8)
    assert (found.steps, found.epochs, found.validate_every) == (5, None, 2)
    assert resolved(settings, 9).steps == 6  # 5.625
    assert resolved(replace(settings, epochs=0.1), 1).steps == 1
    assert resolved(config(folder, "epochs"), 8).steps == 30
    assert "5, 5 of them left" in plan(settings, 1).text()
    half = finetune(replace(settings, run=str(folder / "half"), fraction=0.5))
    assert [line["step"] for line in log.read(half)] == [1, 2, 3]
    assert [line["step"] for line in log.read(half) if "val/OA" in line] == [1, 2, 3]
    assert chain.finished(replace(settings, run=str(folder / "half"), fraction=0.5))
    assert not chain.finished(replace(settings, run=str(folder / "nothing")))


def test_patience_ends_a_run_and_more_of_it_lets_it_go_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = {1: 5.0, 2: 6.0, 3: 6.0, 4: 1.0, 5: 2.0, 6: 7.0}
    settings = config(
        folder, "patient", steps=6, validate_every=1, keep_best="val/OA", patience=2, store=str(folder / "kept")
    )
    hook = mock.patch("pipeline.finetune.validation", lambda *_: lambda line: {"val/OA": scores[line["step"]]})
    with hook:
        run = finetune(settings)
        lines = log.read(run)
        assert [line["stale"] for line in lines] == [0, 0, 1, 2]
        assert "ended after step 4: 2 values of val/OA without a better one" in caplog.text
        assert checkpoint.find(folder / "kept").step == 4 and checkpoint.find(folder / "kept/best").step == 2
        shutil.rmtree(run)  # as on another node
        assert finetune(settings) == run and len(log.read(run)) == 4 and chain.finished(settings)
        assert "patience ended it at 4" in plan(settings, 1).text()
        longer = replace(settings, patience=4)
        assert not chain.finished(longer)
        finetune(longer)
    assert [line["stale"] for line in log.read(run)] == [0, 0, 1, 2, 3, 0]
    assert checkpoint.find(folder / "kept/best").step == 6


def test_seeds_are_runs_of_their_own_with_a_summary(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = config(folder, "seeds", seeds=[3, 4], steps=2, validate_every=1, keep_best="val/mIoU")
    made = [Path(each.run).name for each in per_seed(settings)]
    assert made == ["seed-3", "seed-4"] and "2 runs, one after the other" in plan(settings, 1).text()
    finetune(per_seed(settings)[0])  # as if the call had been stopped after it
    first = (folder / "seeds/seed-3/metrics.jsonl").read_bytes()
    answers = iter([True])
    with mock.patch.object(loop, "agree", lambda flag: next(answers)), pytest.raises(Stopped):
        finetune(settings)
    assert not (folder / "seeds/summary.json").exists() and not chain.finished(settings)
    assert finetune(settings) == folder / "seeds" and chain.finished(settings)
    assert (folder / "seeds/seed-3/metrics.jsonl").read_bytes() == first
    found = json.loads((folder / "seeds/summary.json").read_text())
    last = [log.read(folder / "seeds" / name)[-1]["val/mIoU"] for name in made]
    assert found["seeds"] == [3, 4] and found["last"]["val/mIoU"]["values"] == last
    best = [max(line["val/mIoU"] for line in log.read(folder / "seeds" / name)) for name in made]
    assert found["best"]["val/mIoU"]["values"] == best
    half = 12.706 * np.std(last, ddof=1) / np.sqrt(2)
    assert found["last"]["val/mIoU"]["interval"] == pytest.approx(
        [np.mean(last) - half, np.mean(last) + half], abs=1e-3
    )
    assert "last val/mIoU: " in capfd.readouterr().err
    assert checkpoint.find(folder / "seeds/seed-4").facts["seed"] == 4


def rows(signatures: list[list[int]], order: list[int] | None = None) -> Any:
    """A stand-in for a selection with these classes, its rows in this order."""
    order = list(range(len(signatures))) if order is None else order
    table = pa.table({"key": [f"k{i}" for i in order], "classes": [signatures[i] for i in order]})
    return mock.Mock(spec=Selection, rows=lambda columns: table.select(columns))


def test_fractions_are_stratified_nested_and_know_no_order() -> None:
    signatures = [[0]] * 100 + [[0, 1]] * 60 + [[2, 1]] * 30 + [[3]] * 10
    chosen = {count: set(stratified(rows(signatures), count, 5).tolist()) for count in (20, 60, 120, 200)}
    assert [len(each) for each in chosen.values()] == [20, 60, 120, 200]
    assert chosen[20] < chosen[60] < chosen[120] < chosen[200]
    for count, each in chosen.items():
        found = Counter(str(signatures[i]) for i in each)
        for name, size in Counter(map(str, signatures)).items():
            assert abs(found[name] - size * count / 200) <= 1, (count, name)
    order = np.random.default_rng(0).permutation(200).tolist()
    again = {order[i] for i in stratified(rows(signatures, order), 60, 5).tolist()}
    assert again == chosen[60]
    assert set(stratified(rows(signatures), 60, 6).tolist()) != chosen[60]
    # Which of many signatures with one sample each is taken is drawn, too.
    singles = [[i] for i in range(50)]
    assert len({tuple(stratified(rows(singles), 5, seed)) for seed in range(4)}) > 1


def test_a_fraction_is_in_the_identity_of_the_data(folder: Path) -> None:
    prints = {labelled(config(folder, "some", **how)).fingerprint for how in ({}, {"fraction": 0.5}, {"limit": 4})}
    assert len(prints) == 3
    assert labelled(config(folder, "some", fraction=0.5)).identity[0]["fraction"] == 0.5
    with pytest.raises(ConfigError, match="data names several"):
        labelled(config(folder, "some", data={str(folder / "data"): 1, f"{folder}/./data": 1}, limit=2))


def test_a_checkpoint_says_all_that_its_parameters_went_through(folder: Path) -> None:
    protocol = {"name": "", "fold": 0, "lists": ""}
    first = finetune(config(folder, "line-1", checkpoint=str(folder / "start"), steps=2, checkpoint_every=1))
    found = lineage(checkpoint.find(first).facts)
    nothing = dict.fromkeys(("stage", "data", "where", "protocol", "sensors", "fingerprint"))
    trained = select(str(folder / "data"), where={"split": ["train"], "labelled": [True]})
    datasets = [part["dataset"] for part in trained.identity]
    own = {"stage": "finetune", "data": str(folder / "data"), "where": {"split": ["train"]}, "protocol": None}
    facts = {"sensors": ["s1", "dem"], "fingerprint": trained.fingerprint, "datasets": datasets}
    assert found == [nothing, {**own, **facts}]
    shutil.rmtree(first / "checkpoints/step-000002")
    finetune(config(folder, "line-1", checkpoint=str(folder / "start"), steps=2, checkpoint_every=1))
    assert lineage(checkpoint.find(first).facts) == found  # also after a resume
    # Of a checkpoint that does not hold it yet, its own training.
    older = {key: value for key, value in checkpoint.find(first).facts.items() if key != "lineage"}
    assert lineage(older) == found
    older["config"] = {**older["config"], "checkpoint": None, "protocol": {**protocol, "name": "a/b"}}
    assert [entry["protocol"] for entry in lineage(older)] == [{**protocol, "name": "a/b"}]


def test_presets_of_the_benchmarks_load() -> None:
    for name in ("dfc2020", "msaw", "hunan"):
        found = configs.load(f"finetune-{name}")
        assert found.protocol.name.startswith(f"{name}/") and found.keep_best and found.epochs
    assert configs.load("finetune-msaw").augment == "mirror"
