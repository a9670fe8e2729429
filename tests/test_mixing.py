"""Several datasets in one stream: shares by weight, each in its own epochs, one meaning of the numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs import ConfigError
from pipeline import checkpoint, log
from pipeline.pretrain import pretrain
from shards.contract import Classes, Contract, ContractError
from shards.manifest import ManifestError, select
from shards.order import CYCLE, Mix, Order
from shards.stream import Share, Stream, order_of
from tests.small_dataset import CONTRACT, one_thread, quiet, write_dataset  # noqa: F401
from tests.streams import all_ranks, keys, write_rows
from tests.training_scenarios import config

weights = st.lists(st.integers(1, 40), min_size=2, max_size=4)


@settings(max_examples=40)
@given(weights, st.lists(st.integers(1, 60), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 5))
def test_every_cycle_has_the_weights_and_every_dataset_its_own_epochs(
    weights: list[int], sizes: list[int], seed: int, cycle: int
) -> None:
    orders = [Order([size], seed, 3) for size in sizes[: len(weights)]]
    mix = Mix(orders, weights, seed)
    dealt = [mix.own(position) for position in range(cycle * CYCLE, (cycle + 1) * CYCLE)]
    counts = Counter(which for which, _ in dealt)
    for which, weight in enumerate(weights):
        assert abs(counts[which] - CYCLE * weight / sum(weights)) < 1
        own = [place for number, place in dealt if number == which]
        assert own == list(range(cycle * counts[which], (cycle + 1) * counts[which]))  # no gap, none twice
    for position in range(cycle * CYCLE, cycle * CYCLE + 50):
        which, own = mix.own(position)
        assert mix.sample(position) == sum(sizes[:which]) + orders[which].sample(own)


def test_the_slots_of_a_cycle_are_mixed_by_seed_and_cycle() -> None:
    orders = [Order([10], 0), Order([10], 0)]
    cycles = [
        [Mix(orders, [3, 1], seed).own(cycle * CYCLE + slot)[0] for slot in range(CYCLE)]
        for seed, cycle in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(sum(cycle) == CYCLE // 4 for cycle in cycles)
    assert cycles[0] != cycles[1] and cycles[0] != cycles[2]
    # Every stretch is mixed, not the cycle as a whole: 128 slots hold 32 of the second, give or take 4 deviations.
    assert all(12 <= sum(cycles[0][first : first + 128]) <= 52 for first in range(0, CYCLE, 128))


def test_one_dataset_alone_has_the_order_it_always_has() -> None:
    order = Order([20, 3], 1, 4)
    assert [Mix([order], [7], 1).sample(p) for p in range(60)] == [order.sample(p) for p in range(60)]


def test_weights_that_give_no_slot_are_refused() -> None:
    orders = [Order([5], 0), Order([5], 0)]
    with pytest.raises(ValueError, match="each must be 1 or more"):
        Mix(orders, [1, 0], 0)
    with pytest.raises(ValueError, match="the smallest has less than one slot of 1024"):
        Mix(orders, [5000, 1], 0)


@pytest.mark.parametrize("weight", [0, -1, 1.5, "x", None, True])
def test_a_weight_that_is_no_whole_number_is_refused(weight: Any) -> None:
    with pytest.raises(ManifestError, match="data: a: .*; a weight is a whole number of 1 or more"):
        select({"a": weight})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mixing")
    sizes = {"a": [12, 7], "b": [5], "c": [9, 9, 9]}
    return {name: write_rows(folder / name, shards, name=name) for name, shards in sizes.items()}


def test_mixed_streams_give_every_sample_of_each_dataset_once_per_epoch_of_its_own(data: dict[str, str]) -> None:
    selection = select({data["a"]: 3, data["b"]: 1, data["c"]: 4})
    shares = [Share(8, 4, rank) for rank in range(4)]
    seen = [key for _, key in all_ranks(lambda share: Stream(selection, 2, 5, share), shares, 256)]
    assert len(seen) == 2 * CYCLE
    for part, name, weight in zip(selection.parts, "abc", (3, 1, 4), strict=True):
        own = [key for key in seen if key.startswith(name)]
        assert len(own) == 2 * CYCLE * weight // 8
        every = sorted(part.rows(["key"])["key"].to_pylist())
        for first in range(0, len(own) - len(every) + 1, len(every)):
            assert sorted(own[first : first + len(every)]) == every


@settings(max_examples=10)
@given(st.integers(0, 60), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_a_mixed_run_resumes_on_another_world_size(
    data: dict[str, str], stop: int, ranks: int, then: int, workers: int
) -> None:
    selection = select({data["a"]: 3, data["b"]: 1}, where={"split": ["train"]})
    order = order_of(selection, 1, 4)
    state = json.loads(json.dumps(Stream(selection, 1, 4, Share(4)).state(4 * stop)))
    shares = [Share(4, then, rank, 1, workers, worker) for rank in range(then) for worker in range(workers)]

    def resumed(share: Share) -> Stream:
        stream = Stream(selection, 1, 4, share)
        stream.load(state)
        return stream

    seen = all_ranks(lambda s: Stream(selection, 1, 4, s), [Share(4, ranks, rank) for rank in range(ranks)], stop)
    seen += all_ranks(resumed, shares, 6 * workers)
    assert seen == [(p, selection.row(order.sample(p)).key) for p in range(4 * stop + 24 * workers)]


def test_rows_of_a_mixture_are_those_of_its_datasets_one_after_the_other(data: dict[str, str]) -> None:
    selection = select({data["a"]: 1, data["b"]: 1}, limit=4)
    assert len(selection) == 8 and [len(part) for part in selection.parts] == [4, 4]
    found = selection.rows(["key"])["key"].to_pylist()
    assert [selection.row(number).key for number in range(8)] == found
    assert [key[0] for key in found] == list("aaaabbbb") and selection.row_of_key[found[6]] == 6
    with pytest.raises(IndexError, match="row 8"):
        selection.row(8)


def test_weights_order_and_datasets_are_in_the_fingerprint(data: dict[str, str]) -> None:
    a, b, c = (data[name] for name in "abc")
    mixtures: list[Any] = [a, {a: 2}, {a: 1, b: 1}, {a: 2, b: 1}, {b: 1, a: 2}, {a: 2, c: 1}]
    assert len({select(mixture).fingerprint for mixture in mixtures}) == len(mixtures)
    assert select(a).fingerprint == select({a: 1}).fingerprint
    with pytest.raises(ManifestError, match="no dataset is named"):
        select({})


# Contracts


def changed(sensor: str = "s1", **facts: Any) -> Contract:
    modalities = [replace(m, **facts) if m.sensor == sensor else m for m in CONTRACT.modalities]
    return replace(CONTRACT, modalities=tuple(modalities))


@pytest.mark.parametrize(
    ("contract", "said"),
    [
        (changed(bands=("VH", "VV")), r"s1\.bands"),
        (changed(unit="linear"), r"s1\.unit: dB against linear"),
        (changed(clip=(-30.0, 0.0)), r"s1\.clip"),
        (replace(CONTRACT, resolution=20.0), r"resolution: 10\.0 m against 20\.0 m"),
        (replace(CONTRACT, classes=Classes(names=("a",), palette=((0, 0, 0),))), "classes"),
    ],
)
def test_datasets_whose_numbers_mean_different_things_are_not_mixed(
    data: dict[str, str], tmp_path: Path, contract: Contract, said: str
) -> None:
    other = write_rows(tmp_path / "other", [4], contract=contract)
    with pytest.raises(ContractError, match=f"/a .left. and .*/other .right. cannot be mixed: .*{said}"):
        select({data["a"]: 1, other: 1})


def test_a_dataset_without_a_modality_is_not_mixed_unless_the_rest_is_enough(
    data: dict[str, str], tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other", [4], contract=CONTRACT.restrict(["s1"]))
    with pytest.raises(ContractError, match="no modality 'dem' here"):
        select({data["a"]: 1, other: 1})
    assert select({data["a"]: 1, other: 1}, modalities=["s1"]).contract.sensors == ("s1",)
    assert select({other: 1, data["a"]: 1}).contract.sensors == ("s1",)  # those of the first


def test_the_statistics_of_a_mixture_are_those_of_all_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.normal(mean, std, (2, 10_000)) for mean, std in ((-12, 5), (-8, 2), (-15, 1))]
    shares = (3, 1, 2)
    addresses = {}
    for number, (values, weight) in enumerate(zip(pixels, shares, strict=True)):
        facts = {"mean": tuple(values.mean(1)), "std": tuple(values.std(1))}
        addresses[write_rows(tmp_path / str(number), [4], contract=changed(**facts))] = weight
    found = select(addresses).contract.modality("s1")
    every = np.concatenate([np.tile(values, weight) for values, weight in zip(pixels, shares, strict=True)], 1)
    assert found.mean == pytest.approx(every.mean(1)) and found.std == pytest.approx(every.std(1))
    alone = select(next(iter(addresses))).contract.modality("s1")
    assert alone.mean == pytest.approx(pixels[0].mean(1))


def test_without_statistics_of_one_there_are_none_of_the_mixture(data: dict[str, str], tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other", [4], contract=changed(mean=None, std=None))
    contract = select({data["a"]: 1, other: 1}).contract
    assert contract.modality("s1").mean is None and contract.modality("dem").mean is not None
    with pytest.raises(ContractError, match="s1: normalise=statistics needs"):
        contract.normalised("statistics")


# Training


def test_training_on_a_mixture_and_going_on_with_other_weights(tmp_path: Path) -> None:
    a, b = write_dataset(tmp_path / "A"), write_dataset(tmp_path / "B", samples=12)
    (tmp_path / "config.yaml").write_text(configs.dump(config(tmp_path, "run", steps=2)))
    given = configs.load(tmp_path / "config.yaml", [f"data={{{a}: 3, {b}: 1}}"])
    assert given.data == {a: 3, b: 1}
    assert [line["step"] for line in log.read(pretrain(given))] == [1, 2]
    found = checkpoint.find(tmp_path / "run").facts
    assert [(part["dataset"], part["weight"]) for part in found["data"]] == [("16-32", 3), ("12-32", 1)]
    assert found["fingerprint"] == select({a: 3, b: 1}).fingerprint
    with pytest.raises(ConfigError, match=r"data\.weight: 3 in the state, 2 here.*stream=restart"):
        pretrain(replace(given, data={a: 2, b: 1}))
    with pytest.raises(ConfigError, match="2 datasets in the state, 1 here"):
        pretrain(replace(given, data=a))
    with pytest.raises(ConfigError, match=r"data"):
        configs.load(tmp_path / "config.yaml", [f"data={{{a}: 0}}"])


def test_the_samples_of_a_training_step_are_those_of_the_mixture(data: dict[str, str]) -> None:
    selection = select({data["a"]: 1, data["b"]: 3})
    found = Counter(key[0] for _, key in keys(Stream(selection, 0, 16, Share(1)), CYCLE))
    assert found == {"a": 256, "b": 768}
