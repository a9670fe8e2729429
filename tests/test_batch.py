from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.batch import collate, normalise, upright
from pipeline.dataset import micro_batches, read_ahead, traffic, training_batches
from shards.contract import ContractError
from shards.sample import Sample, Tile, decode, encode
from tests.small_dataset import CONTRACT, make_sample

PAIRS = [(make_sample(number), 10 + number) for number in range(5)]


def test_values_are_clipped_shifted_and_scaled_per_band() -> None:
    modality = replace(CONTRACT.modality("s1"), offset=(-20.0, -10.0), scale=(10.0, 5.0))
    values = np.array([[[-30.0, -15.0]], [[-5.0, 3.0]]], np.float32)
    found = normalise(Tile(values, np.ones((1, 2), bool)), modality)
    # -30 is clipped to -25, 3 to 0.
    assert found.tolist() == [[[-0.5, 0.5]], [[1.0, 2.0]]]
    assert found.dtype == np.float32


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, -9999.0, 1e30])
def test_invalid_pixels_are_zero_whatever_stands_there(hole: float) -> None:
    values = np.full((2, 2, 2), hole, np.float32)
    valid = np.array([[True, False], [False, False]])
    values[:, 0, 0] = -12.0
    found = normalise(Tile(values, valid), CONTRACT.modality("s1"))
    assert (found[:, ~valid] == 0).all()
    assert found[:, 0, 0] == pytest.approx(13 / 25)


def test_integers_are_not_wrapped() -> None:
    modality = replace(CONTRACT.modality("dem"), clip=(0.0, 10000.0), offset=(1000.0,), scale=(1000.0,))
    found = normalise(Tile(np.array([[[0, 65535]]], np.uint16), np.ones((1, 2), bool)), modality)
    assert found.tolist() == [[[-1.0, 9.0]]]


def test_collate_stacks_in_order() -> None:
    batch = collate(PAIRS, CONTRACT)
    assert list(batch.values) == ["s1", "dem"]
    assert batch.values["s1"].shape == (5, 2, 32, 32) and batch.values["s1"].dtype == torch.float32
    assert batch.valid["s1"].dtype == torch.bool and not batch.valid["s1"][:, :6, :6].any()
    assert batch.label is not None and batch.label.dtype == torch.int64
    assert batch.positions.tolist() == [10, 11, 12, 13, 14]
    assert batch.keys[2] == "sample-002"
    assert torch.isfinite(batch.values["s1"]).all()


def test_a_restricted_contract_takes_only_its_modalities() -> None:
    assert list(collate(PAIRS, CONTRACT.restrict(["dem"])).values) == ["dem"]


def test_one_sample_without_label_means_no_label() -> None:
    assert collate([*PAIRS, (make_sample(9, labelled=False), 1)], CONTRACT).label is None


def test_missing_modalities_and_mixed_sizes_are_refused() -> None:
    lacking = Sample("lacking", {"s1": PAIRS[0][0].tiles["s1"]})
    with pytest.raises(ContractError, match="lacking has no dem; it has s1"):
        collate([(lacking, 0)], CONTRACT)
    with pytest.raises(ContractError, match="several sizes"):
        collate([PAIRS[0], (make_sample(1, size=64), 1)], CONTRACT)


@pytest.mark.parametrize("encoding", ["npy", "blosc2-zstd"])
def test_scenes_seen_from_the_far_side_are_turned(encoding: Any) -> None:
    plain = [replace(sample, meta={**sample.meta, "orientation": 0}) for sample, _ in PAIRS]
    turned = [replace(sample, meta={**sample.meta, "orientation": number % 2}) for number, sample in enumerate(plain)]
    stored = [decode(encode(sample, encoding)) for sample in turned]  # the fact comes back from the shards
    a = collate([(sample, 0) for sample in plain], CONTRACT)
    b = collate([(sample, 0) for sample in stored], CONTRACT)
    assert a.label is not None and b.label is not None
    pairs = [(a.label, b.label)]
    for name in a.values:
        pairs += [(a.values[name], b.values[name]), (a.valid[name], b.valid[name])]
    for before, after in pairs:
        assert torch.equal(after[::2], before[::2])
        assert torch.equal(after[1::2], torch.rot90(before[1::2], 2, (-2, -1)))
    assert not b.valid["s1"][1, -6:, -6:].any() and b.valid["s1"][1, :6, :6].all()
    assert collate([(replace(turned[1], label=None), 0)], CONTRACT).label is None
    numbered = replace(turned[1], instances=np.arange(32 * 32, dtype=np.uint16).reshape(32, 32))
    assert upright(numbered).instances[0, 0] == 32 * 32 - 1  # type: ignore[index]


def test_micro_batches_keep_order_and_a_short_rest() -> None:
    found = list(micro_batches(PAIRS, 2, CONTRACT))
    assert [batch.positions.tolist() for batch in found] == [[10, 11], [12, 13], [14]]


def test_reading_ahead_keeps_order_runs_ahead_and_passes_errors_on() -> None:
    made: list[int] = []
    ready = threading.Event()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            if number == 3:
                ready.set()
            yield number
        raise OSError("the store is gone")

    ahead = read_ahead(items(), depth=4)
    assert next(ahead) == 0
    assert ready.wait(10) and made[:4] == [0, 1, 2, 3]
    found = [next(ahead) for _ in range(5)]
    assert found == [1, 2, 3, 4, 5]
    with pytest.raises(OSError, match="the store is gone"):
        next(ahead)


def test_reading_ahead_can_be_left_early() -> None:
    before = threading.active_count()
    ahead = read_ahead(iter(range(10**9)))
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_training_batches_are_augmented_by_position_alone() -> None:
    plain = next(training_batches(PAIRS, 5, CONTRACT, Augmentation()))
    turned = next(training_batches(PAIRS, 5, CONTRACT, Augmentation(7, "all")))
    one_by_one = list(training_batches(PAIRS, 1, CONTRACT, Augmentation(7, "all"), threads=3))
    assert not torch.equal(plain.values["s1"], turned.values["s1"])
    assert torch.equal(torch.cat([batch.values["s1"] for batch in one_by_one]), turned.values["s1"])


def test_traffic_is_told_step_by_step() -> None:
    stream: Any = SimpleNamespace(ledger={"samples": 4, "bytes": 100, "held": 7})
    tell = traffic(stream)
    assert tell(1) == {"io": {"samples": 4, "bytes": 100, "held": 7}}
    stream.ledger = {"samples": 9, "bytes": 250, "held": 6, "hits": 1}
    assert tell(2) == {"io": {"samples": 5, "bytes": 150, "held": 6, "hits": 1}}
