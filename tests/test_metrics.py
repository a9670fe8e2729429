from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics as sk
import torch

from pipeline.metrics import confusion_matrix, scores
from shards.contract import ContractError
from tests.golden import FOLDER, Golden

NAMES = [f"c{i}" for i in range(6)]


def test_golden_matrix_and_scores() -> None:
    golden = Golden("units")
    matrix = confusion_matrix(golden["metric/pred"], golden["metric/label"], 6, ignore=-100)
    assert torch.equal(matrix.double(), golden["metric/matrix_rows_truth_cols_pred"])
    correct = json.loads((FOLDER / "units.json").read_text())["metrics"]["correct"]
    found = scores(matrix.numpy(), NAMES)
    for name in ("OA", "Kappa", "FWIoU"):
        assert found[name] == pytest.approx(100 * correct[name], abs=0.005)
    assert found["mIoU"] == pytest.approx(100 * correct["mIoU_present_classes"], abs=0.005)
    assert [found[f"IoU/c{i}"] for i in range(5)] == pytest.approx([100 * v for v in correct["IoU"][:5]], abs=0.005)
    assert found["absent"] == ["c5"] and found["IoU/c5"] is None


def test_scikit_learn_agrees() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 3000)
    guess = np.where(rng.random(3000) < 0.6, label, rng.integers(0, 5, 3000))
    found = scores(confusion_matrix(torch.tensor(guess), torch.tensor(label), 5, 255).numpy(), NAMES[:5])
    weighted = sk.jaccard_score(label, guess, average="weighted")
    expected = {
        "OA": sk.accuracy_score(label, guess),
        "mAcc": sk.balanced_accuracy_score(label, guess),
        "mIoU": sk.jaccard_score(label, guess, average="macro"),
        "mF1": sk.f1_score(label, guess, average="macro"),
        "Kappa": sk.cohen_kappa_score(label, guess),
        "FWIoU": weighted,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(100 * value, abs=0.005), name
    per_class = sk.f1_score(label, guess, average=None)
    assert [found[f"F1/c{i}"] for i in range(5)] == pytest.approx((100 * per_class).tolist(), abs=0.005)


def test_ignored_pixels_do_not_count() -> None:
    label = torch.tensor([[0, 1, 255], [255, 1, 0]])
    guess = torch.tensor([[0, 0, 1], [0, 1, 0]])
    assert confusion_matrix(guess, label, 2, 255).tolist() == [[2, 0], [1, 1]]


def test_pooled_is_not_the_mean_of_batches() -> None:
    one, two = np.array([[90, 0], [0, 10]]), np.array([[0, 50], [0, 50]])
    pooled = scores(one + two, ["a", "b"])["mIoU"]
    assert pooled == pytest.approx(100 * (90 / 140 + 60 / 110) / 2, abs=0.005)


def test_a_class_only_predicted_counts_in_iou_and_not_in_accuracy() -> None:
    found = scores(np.array([[8, 0, 2], [0, 0, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert found["absent"] == ["b"]
    assert found["IoU/c"] == 0 and found["IoU/b"] is None
    assert found["mIoU"] == 40.0 and found["mAcc"] == 80.0


def test_one_class_alone_has_no_kappa() -> None:
    found = scores(np.array([[5, 0], [0, 0]]), ["a", "b"])
    assert found["Kappa"] is None and found["OA"] == 100.0


def test_scores_are_json_in_percent_with_two_decimals() -> None:
    found = scores(np.array([[1, 2], [0, 0]]), ["a", "b"])
    assert json.loads(json.dumps(found))["OA"] == 33.33


def test_codes_out_of_range_and_an_empty_matrix_are_refused() -> None:
    with pytest.raises(ContractError, match=r"codes 0\.\.9; classes are 0\.\.2, or 255"):
        confusion_matrix(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 9]), 3, 255)
    with pytest.raises(ContractError, match="no labelled pixel"):
        scores(np.zeros((3, 3), np.int64), NAMES[:3])
