"""Data that mean something else than a model expects are refused, with what to do; what is forced is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shards.contract import Classes, Contract, ContractError, Modality, check_fit, compare, disguised
from tests.small_dataset import CLASSES, CONTRACT

BANDS = ("B2", "B3", "B4")
S2 = Modality(
    sensor="s2-l2a", bands=BANDS, unit="reflectance x 10000", dtype="uint16", clip=(0.0, 10000.0),
    offset=(0.0,) * 3, scale=(10000.0,) * 3, mean=(400.0, 700.0, 600.0), std=(300.0, 350.0, 500.0),
)  # fmt: skip
OPTICAL = Contract(modalities=(S2,), resolution=10.0)


def other(contract: Contract, sensor: str, **changes: object) -> Contract:
    """The contract with one modality changed."""
    changed = replace(contract.modality(sensor), **changes)  # type: ignore[arg-type]
    return replace(contract, modalities=tuple(changed if m.sensor == sensor else m for m in contract.modalities))


def shifted(by: float, times: float = 1.0, wider: float = 1.0) -> Contract:
    assert S2.mean and S2.std
    mean, std = (mean * times + by for mean in S2.mean), (std * times * wider for std in S2.std)
    return other(OPTICAL, "s2-l2a", mean=tuple(mean), std=tuple(std))


@pytest.mark.parametrize(
    ("model", "data", "advice"),
    [
        (CONTRACT, other(CONTRACT, "s1", unit="linear power"), "s1.unit: dB against linear power: 10 log10(x)"),
        (CONTRACT, other(CONTRACT, "s1", unit="amplitude"), "20 log10(x)"),
        (OPTICAL, other(OPTICAL, "s2-l2a", unit="reflectance"), "x * 10000, written scale=10000"),
        (CONTRACT, other(CONTRACT, "dem", unit="feet"), "dem.unit: m against feet: build the right again in m"),
        (CONTRACT, other(CONTRACT, "s1", bands=("VH", "VV")), "take the bands [1, 0] of the right"),
        (OPTICAL, other(OPTICAL, "s2-l2a", bands=("B4", "B2", "B3")), "take the bands [1, 2, 0] of the right"),
        (OPTICAL, other(OPTICAL, "s2-l2a", bands=("B2", "B3", "B5")), "the right lacks B4"),
        (CONTRACT, other(CONTRACT, "s1", clip=(-30.0, 5.0)), "cut the right off at -25 and 0"),
        (CONTRACT, replace(CONTRACT, resolution=20.0), "build the right again at 10.0 m"),
        (OPTICAL, shifted(1000.0), "x - 1000, written offset=-1000"),
        (OPTICAL, shifted(-1000.0), "x + 1000, written offset=0"),
        (OPTICAL, shifted(0.0, times=1e-4), "x * 10000, written scale=10000"),
        (CONTRACT, other(CONTRACT, "s1", mean=(0.06, 0.02), std=(0.05, 0.02)), "looks linear: 10 log10(x)"),
    ],
)  # fmt: skip
def test_a_difference_is_refused_with_the_way_to_convert(model: Contract, data: Contract, advice: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_fit(model, data)
    assert advice in str(caught.value) and "force=true to go on" in str(caught.value)
    (overruled,) = check_fit(model, data, force=True)
    assert advice in overruled


def test_data_that_fit_are_not_remarked_upon() -> None:
    assert check_fit(CONTRACT, CONTRACT.normalised("statistics")) == []
    assert check_fit(CONTRACT, CONTRACT.restrict(["dem"])) == [], "an absent modality is hidden"
    assert check_fit(replace(CONTRACT, classes=None), CONTRACT) == [], "a pretrained network learns new classes"


@pytest.mark.parametrize("data", [shifted(500.0), shifted(1000.0, wider=2.0), shifted(0.0, times=3.0)])
def test_brighter_scenes_are_not_taken_for_another_unit(data: Contract) -> None:
    assert disguised(OPTICAL, data) == []


def test_one_band_that_stays_where_it_was_rules_an_offset_out() -> None:
    assert disguised(OPTICAL, other(OPTICAL, "s2-l2a", mean=(1400.0, 1700.0, 620.0))) == []


def test_unknown_statistics_are_no_evidence() -> None:
    assert disguised(OPTICAL, other(OPTICAL, "s2-l2a", mean=None, std=None)) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (other(CONTRACT, "s1", bands=("VV",)), "the right lacks VH"),
        (replace(CONTRACT, classes=Classes(names=("x",), palette=((1, 2, 3),))), "classes"),
        (replace(CONTRACT, modalities=(*CONTRACT.modalities, S2)), "the checkpoint knows s1, dem, not s2-l2a"),
    ],
)
def test_what_no_network_could_read_cannot_be_forced(data: Contract, words: str) -> None:
    with pytest.raises(ContractError, match=words) as caught:
        check_fit(CONTRACT, data, force=True)
    assert "write force=true" not in str(caught.value)


def test_as_many_classes_of_other_names_can_be_forced() -> None:
    renamed = replace(CONTRACT, classes=replace(CLASSES, names=("sea", "field", "town")))
    with pytest.raises(ContractError, match="classes"):
        check_fit(CONTRACT, renamed)
    assert check_fit(CONTRACT, renamed, force=True) == compare(CONTRACT, renamed) != []
