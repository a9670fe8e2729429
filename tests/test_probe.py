from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

import configs
from configs import ConfigError
from pipeline.batch import collate
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.model import MCFMamba
from pipeline.probe import Linear, features, fit, probe, products
from pipeline.ranks import Ranks, init
from pipeline.run import Run
from pipeline.scoring import classify
from shards.contract import Contract, ContractError
from shards.manifest import select
from tests.small_dataset import CLASSES, CONTRACT, make_sample, one_thread, write_dataset  # noqa: F401

CPU = torch.device("cpu")
LABELLED = CONTRACT.normalised("statistics")
RUN_CONTRACT = replace(LABELLED, classes=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Any, Engine]:
    """What the probe finds of drawn parameters, and an engine that has learned to copy its input since."""
    init(Ranks())
    torch.manual_seed(0)
    settings = config(folder)
    model = MCFMamba(settings.model, RUN_CONTRACT.channels, sum(RUN_CONTRACT.channels.values()))
    engine = Engine(model, settings.optim, settings.engine, settings.batch, Ranks())
    before = hook(folder, engine)({"step": 4})
    batch = collate([(make_sample(number), number) for number in (0, 4, 8)], RUN_CONTRACT)
    for _ in range(20):
        engine.backward((engine(batch.values, {}) - pixels(batch.values, {})).square().mean())
        engine.step(1e-2)
    return before, engine


@pytest.fixture(scope="module")
def engine(trained: tuple[Any, Engine]) -> Engine:
    return trained[1]


def config(folder: Path, **changes: Any) -> PretrainConfig:
    raw = {
        "stage": "pretrain",
        "run": str(folder / "run"),
        "data": str(folder / "data"),
        "model": {"dims": [16, 32], "depths": [1, 1]},
        "batch": {"global_batch": 3},
        "steps": 10,
        "probe": {"data": str(folder / "data"), "every": 4, **changes},
    }
    settings: PretrainConfig = configs.parse(raw)
    return settings


def hook(folder: Path, engine: Engine, contract: Contract = RUN_CONTRACT, **changes: Any) -> Any:
    settings = config(folder, **changes)
    return probe(Run(folder / "run", settings, contract, "data", Ranks()), engine, settings)


def test_trained_features_tell_the_classes_apart(folder: Path, trained: tuple[Any, Engine]) -> None:
    before, engine = trained
    found = hook(folder, engine)({"step": 4})
    assert list(found) == ["probe/mIoU", "probe/OA", *(f"probe/IoU/{name}" for name in CLASSES.names)]
    assert found["probe/mIoU"] > 80 and found["probe/OA"] > 90  # one class everywhere: 11 and 33
    assert before["probe/mIoU"] < 60
    assert found["probe/mIoU"] == pytest.approx(
        np.mean([found[f"probe/IoU/{name}"] for name in CLASSES.names]), abs=0.02
    )


def test_it_is_made_every_so_many_steps_and_at_the_last(folder: Path, engine: Engine) -> None:
    score = hook(folder, engine, limit=1)
    assert [step for step in range(1, 11) if score({"step": step})] == [4, 8, 10]


def test_nothing_without_data(folder: Path, engine: Engine) -> None:
    assert hook(folder, engine, data=None)({"step": 10}) == {}


def test_the_training_goes_on_as_if_nothing_had_been(folder: Path, engine: Engine) -> None:
    batch = collate([(make_sample(number), number) for number in range(3)], RUN_CONTRACT)
    before = classify(engine, batch)
    engine.backward(before.square().mean())
    state = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    grads = {
        name: parameter.grad.clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is not None
    }
    random = torch.get_rng_state()
    score = hook(folder, engine)
    first, second = score({"step": 4}), score({"step": 8})
    assert first == second
    assert engine.module.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), random)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, state[name]), name
        assert (parameter.grad is None) == (name not in grads)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name]), name
    again = classify(engine, batch)
    assert torch.equal(again, before) and again.requires_grad
    assert not any(module._forward_pre_hooks for module in engine.module.head.modules())  # type: ignore[union-attr]


def test_features_are_what_the_head_is_given(engine: Engine) -> None:
    batch = collate([(make_sample(number), number) for number in range(2)], RUN_CONTRACT)
    found = features(engine, batch.values, {})
    assert found.shape == (2, 16, 32, 32) and not found.requires_grad
    with torch.no_grad():
        head: Any = engine.module.head
        assert torch.equal(head(found), engine(batch.values, {}))


def test_few_samples_are_chosen_by_the_seed(folder: Path, engine: Engine) -> None:
    one, all_ = (hook(folder, engine, limit=limit)({"step": 4}) for limit in (1, 64))
    assert one != all_
    with pytest.raises(ContractError, match="no labelled pixel"):
        fit(torch.zeros(5, 5, dtype=torch.float64), 3)


def pixels(values: Any, _: Any) -> torch.Tensor:
    """Features for tests: the bands themselves."""
    return torch.cat(list(values.values()), 1)


def of(folder: Path, rank: int, world: int, size: int = 2) -> torch.Tensor:
    selection = select(str(folder / "data"), where={"split": ["train"], "labelled": [True]}).some(5)
    return products(pixels, selection, LABELLED, size, Ranks(rank, world), CPU)


def test_ranks_share_the_samples_and_add_up_to_the_same(folder: Path) -> None:
    """Five samples on three ranks: one rank has fewer, and repeats one that does not count."""
    alone, parts = of(folder, 0, 1, size=5), [of(folder, rank, 3) for rank in range(3)]
    assert torch.allclose(sum(parts, torch.zeros(())), alone, rtol=1e-12)
    assert alone.diagonal()[-3:].sum() == 5 * (32 * 32 - 25)  # without the corner that has no label
    weights = [fit(total, 3).weight for total in (alone, sum(parts, torch.zeros(())))]
    assert torch.allclose(*weights, rtol=1e-9)


def test_the_fit_is_least_squares(folder: Path) -> None:
    selection = select(str(folder / "data"), where={"split": ["train"]}).some(5)
    linear = fit(of(folder, 0, 1), 3)
    keys = selection.rows(["key"])["key"].to_pylist()
    samples = [make_sample(int(key.rsplit("-")[-1])) for key in keys]
    batch = collate([(sample, 0) for sample in samples], LABELLED)
    assert batch.label is not None
    there = batch.label != CLASSES.ignore
    x, y = pixels(batch.values, None).permute(0, 2, 3, 1)[there].double(), batch.label[there]
    theirs = LinearRegression().fit(x.numpy(), np.eye(3)[y.numpy()])
    for ours, other in ((linear.weight, theirs.coef_), (linear.bias, theirs.intercept_)):
        assert np.allclose(ours, other, atol=1e-4)
    logits = linear(pixels(batch.values, None)).permute(0, 2, 3, 1)[there]
    assert np.allclose(logits, theirs.predict(x.numpy()), atol=1e-4)


def test_features_without_variance_give_the_most_frequent_class() -> None:
    total = torch.zeros(5, 5, dtype=torch.float64)
    total[2:, 2:] = torch.diag(torch.tensor([2.0, 5.0, 1.0]))
    assert torch.allclose(fit(total, 3)(torch.zeros(1, 2, 1, 1)).flatten(), torch.tensor([0.25, 0.625, 0.125]))
    total[0, 2:] = total[2:, 0] = torch.tensor([6.0, 15.0, 3.0])  # the first feature is always 3
    total[0, 0] = 8 * 9
    found = fit(total, 3)(torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)).flatten()
    assert torch.allclose(found, torch.tensor([0.25, 0.625, 0.125]))


def test_modalities_that_the_data_lack_count_as_hidden(folder: Path, engine: Engine, tmp_path: Path) -> None:
    shown = []

    class Watched(Engine):
        def __init__(self) -> None:
            self.__dict__.update(vars(engine))

        def __call__(self, images: Any, hidden: Any) -> Any:
            shown.append((list(images), list(hidden)))
            return engine(images, hidden)

    data = write_dataset(tmp_path / "s1", contract=CONTRACT.restrict(["s1"]))
    found = hook(folder, Watched(), data=data)({"step": 4})
    assert all(names == (["s1"], ["s1"]) for names in shown) and found["probe/mIoU"] > 50
    # And the other way round: a modality that the run does not know is not read.
    alone = replace(RUN_CONTRACT, modalities=RUN_CONTRACT.modalities[:1])
    assert hook(folder, Watched(), alone)({"step": 4}) == pytest.approx(found)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nowhere", {}, r"probe.data=.*nowhere, probe.train_where=.*: .*not a dataset .*probe.data=null"),
        ("data", {"test_where": {"split": ["other"]}}, r"probe.test_where=.*'other'.*: .*no sample fits .*holds 8 of"),
        ("unlabelled", {}, r"probe.data=.*unlabelled has no classes; name a labelled dataset"),
        ("linear", {}, r"probe.data=.*linear, .*s1.unit: dB against linear.*name a dataset .*probe.data=null"),
        ("other", {}, r"probe.data=.*other, .*it has s2-l2a, the run s1, dem"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(
    folder: Path, engine: Engine, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    first, *others = CONTRACT.modalities
    contracts = {
        "unlabelled": replace(CONTRACT, classes=None),
        "linear": replace(CONTRACT, modalities=(replace(first, unit="linear"), *others)),
        "other": replace(CONTRACT, modalities=(replace(first, sensor="s2-l2a"),)),
    }
    data = folder / "data"
    if name != "data":
        data = tmp_path / name
    if name in contracts:
        write_dataset(data, contract=contracts[name])
    with pytest.raises(ConfigError, match=message):
        hook(folder, engine, data=str(data), **changes)


def test_a_code_that_is_no_class_is_refused(folder: Path) -> None:
    two = replace(CONTRACT, classes=replace(CLASSES, names=CLASSES.names[:2], palette=CLASSES.palette[:2]))
    with pytest.raises(ContractError, match="label codes 0..2; classes are 0..1"):
        products(pixels, select(str(folder / "data")), two, 4, Ranks(), CPU)


def test_logits_are_those_of_the_classifier() -> None:
    linear = Linear(torch.tensor([[1.0, 2.0], [0.5, 0.0]], dtype=torch.float64), torch.tensor([0.0, 1.0]).double())
    found = linear(torch.tensor([3.0, -1.0], dtype=torch.bfloat16).view(1, 2, 1, 1))
    assert found.dtype == torch.float32 and found.flatten().tolist() == [1.0, 2.5]
