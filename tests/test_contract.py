from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shards.contract import Classes, Contract, ContractError, Modality, apart, compare
from shards.sensors import SENSORS, match
from tests.small_dataset import CONTRACT


def test_json_round_trip() -> None:
    assert Contract.from_json(json.loads(json.dumps(CONTRACT.to_json()))) == CONTRACT


def test_newer_format_and_strange_keys_are_refused() -> None:
    data = CONTRACT.to_json()
    with pytest.raises(ContractError, match="format_version 99"):
        Contract.from_json({**data, "format_version": 99})
    data["modalities"][0]["colour"] = 1
    with pytest.raises(ContractError, match="colour"):
        Contract.from_json(data)


def test_normalisation_by_range_and_by_statistics() -> None:
    s1 = CONTRACT.normalised("range").modality("s1")
    assert (s1.offset, s1.scale) == ((-25.0, -25.0), (25.0, 25.0))
    s1 = CONTRACT.normalised("statistics").modality("s1")
    assert (s1.offset, s1.scale) == (s1.mean, s1.std)
    with pytest.raises(ContractError, match="s1: normalise=statistics needs"):
        replace(s1, mean=None).normalised("statistics")


def test_a_constant_band_does_not_divide_by_zero() -> None:
    s1 = replace(CONTRACT.modality("s1"), std=(0.0, 1.0)).normalised("statistics")
    assert min(s1.scale) > 0


def test_compare_names_what_differs_and_nothing_else() -> None:
    assert compare(CONTRACT, CONTRACT.normalised("statistics")) == []
    linear = replace(CONTRACT.modality("s1"), unit="linear power", bands=("VH", "VV"))
    other = replace(CONTRACT, modalities=(linear,), resolution=20.0)
    found = " | ".join(compare(CONTRACT, other))
    for word in ("dem is missing on the right", "s1.unit: dB against linear power", "s1.bands", "resolution: 10.0 m"):
        assert word in found
    classes = replace(CONTRACT, classes=Classes(names=("x",), palette=((1, 2, 3),)))
    assert "classes" in compare(CONTRACT, classes)[0]


def test_restrict_keeps_the_order_given_and_refuses_strangers() -> None:
    assert CONTRACT.restrict(["dem", "s1"]).sensors == ("dem", "s1")
    assert CONTRACT.restrict([]) == CONTRACT
    with pytest.raises(ContractError, match=r"no modality 's2'.*s1, dem"):
        CONTRACT.restrict(["s2"])


@pytest.mark.parametrize(
    "classes", [{"names": ("a",), "palette": ()}, {"names": ("a",), "palette": ((0, 0, 0),), "ignore": 0}]
)
def test_class_tables_that_cannot_be_indices_are_refused(classes: dict[str, object]) -> None:
    with pytest.raises(ContractError):
        Classes(**classes)  # type: ignore[arg-type]


def test_sensor_table_is_consistent() -> None:
    for name, row in SENSORS.items():
        assert row.name == name and row.clip[0] < row.clip[1]
        assert set(row.rgb) <= set(row.band_names) and len(set(row.band_names)) == len(row.bands)
    assert len(SENSORS["s2-l1c"].bands) == 13 and "B10" not in SENSORS["s2-l2a"].band_names


def test_short_sensor_names() -> None:
    assert match("s2", ["s1", "s2-l1c"]) == "s2-l1c"
    assert match("s1", ["s1", "s2-l1c"]) == "s1"
    with pytest.raises(ValueError, match="fits 2 of"):
        match("s2", ["s2-l1c", "s2-l2a"])


def test_modality_is_a_value() -> None:
    assert isinstance(hash(CONTRACT.modality("s1")), int) and isinstance(CONTRACT.modality("s1"), Modality)


def test_statistics_far_apart_are_named_and_near_ones_are_not() -> None:
    s1 = CONTRACT.modality("s1")
    assert s1.mean and s1.std
    assert apart(CONTRACT, CONTRACT) == []
    near = replace(s1, mean=tuple(mean + 0.4 * std for mean, std in zip(s1.mean, s1.std, strict=True)))
    far = replace(s1, mean=(s1.mean[0] + s1.std[0], s1.mean[1]), std=(s1.std[0], 2 * s1.std[1]))
    dem = CONTRACT.modality("dem")
    assert apart(CONTRACT, replace(CONTRACT, modalities=(near, dem))) == []
    found = apart(CONTRACT, replace(CONTRACT, modalities=(far, replace(dem, mean=None, std=None))))
    assert [line.split(":")[0] for line in found] == ["s1 VV", "s1 VH"]
