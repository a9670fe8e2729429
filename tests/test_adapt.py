"""A checkpoint of some modalities as the start of a network for others."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import ConfigError
from pipeline import checkpoint
from pipeline.adapt import Adaptation, Choices, adaptation, sources
from pipeline.engine import State
from pipeline.finetune import finetune
from pipeline.model import MCFMamba, ModelConfig
from pipeline.model.config import Profile
from shards.contract import Contract, ContractError, Modality
from shards.sensors import SENSORS
from shards.store import open_store
from tests.small_dataset import CONTRACT, one_thread, quiet, write_dataset  # noqa: F401
from tests.test_finetune import config

SMALL: dict[str, Any] = {"dims": (8, 16), "depths": (1, 1), "d_state": 2}
OPTICAL = ("B4", "B3", "B2", "B8")


def modality(name: str, bands: tuple[str, ...] = (), **changes: Any) -> Modality:
    """Of a sensor's bands, or of others under any name; with statistics."""
    sensor = SENSORS.get(name)
    bands = bands or (sensor.band_names if sensor else ())
    numbers = tuple(float(i) for i in range(len(bands)))
    facts: dict[str, Any] = {"unit": sensor.unit if sensor else "1", "clip": sensor.clip if sensor else (0.0, 1.0)}
    facts |= {"sensor": name, "bands": bands, "dtype": "float32", "mean": numbers, "std": tuple(1 + n for n in numbers)}
    facts |= {"offset": (0.0,) * len(bands), "scale": (1.0,) * len(bands)}
    return Modality(**{**facts, **changes})


def contract(*names: str | Modality) -> Contract:
    return Contract(modalities=tuple(name if isinstance(name, Modality) else modality(name) for name in names))


def adapted(known: Contract, data: Contract, choices: Choices | None = None) -> Adaptation:
    by_hand = choices or {}
    found = adaptation(known, data, sources(known, data, by_hand), by_hand, "statistics")
    assert found is not None
    return found


def network(channels: dict[str, int], seed: int, profile: Profile = "default") -> MCFMamba:
    torch.manual_seed(seed)
    return MCFMamba(ModelConfig(profile=profile, **SMALL), channels, 3, "reference").eval()


def begun(change: Adaptation, old: MCFMamba, new: MCFMamba) -> None:
    """Give `new` the parameters of `old`."""
    given, drawn = dict(old.named_parameters()), dict(new.named_parameters())
    found = change.parameters(given, drawn, old.config.profile != "paper")
    with torch.no_grad():
        for name, tensor in found.items():
            drawn[name].copy_(tensor)


def images(channels: dict[str, int]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {name: torch.randn(2, bands, 16, 16) for name, bands in channels.items()}


@pytest.mark.parametrize(
    ("known", "data", "expected"),
    [
        (["s2-l2a", "s1"], ["s1", "s2-l2a"], {"s1": "s1", "s2-l2a": "s2-l2a"}),
        (["s2-l2a", "s1"], ["sar-quadpol", "rgbnir"], {"sar-quadpol": "s1", "rgbnir": "s2-l2a"}),
        (["s2-l2a", "s1"], ["s2-l2a", "dem"], {"s2-l2a": "s2-l2a", "dem": None}),
        (["s2-l2a", "s1"], ["s2-l1c"], {"s2-l1c": "s2-l2a"}),
        # The one with more bands in common takes it, though the other comes first.
        (["s2-l2a"], ["rgbnir", "s2-l1c"], {"rgbnir": None, "s2-l1c": "s2-l2a"}),
        # Used by its own name already.
        (["s2-l2a", "s1"], ["s2-l2a", "rgbnir"], {"s2-l2a": "s2-l2a", "rgbnir": None}),
    ],
)
def test_what_begins_from_what(known: list[str], data: list[str], expected: dict[str, str | None]) -> None:
    assert sources(contract(*known), contract(*data), {}) == expected


def test_a_choice_by_hand_comes_first() -> None:
    known, data = contract("s2-l2a", "s1"), contract("s2-l2a", "dem")
    assert sources(known, data, {"dem": "s1", "s2-l2a": None}) == {"s2-l2a": None, "dem": "s1"}
    with pytest.raises(ContractError, match=r"adapt.dem: s3: there is no s3; .* the checkpoint s2-l2a, s1"):
        sources(known, data, {"dem": "s3"})
    with pytest.raises(ContractError, match=r"adapt.rgbnir: s1: there is no rgbnir; the data have s2-l2a, dem"):
        sources(known, data, {"rgbnir": "s1"})
    with pytest.raises(ContractError, match=r"no bands of theirs mean the same; choose with adapt="):
        sources(contract("s1"), contract("dem"), {})


def test_what_is_done_is_said() -> None:
    lines = list(adapted(contract("s2-l2a", "s1"), contract("sar-quadpol", "rgbnir")).lines())
    assert lines == [
        "rgbnir: encoder of s2-l2a; R<-B4, G<-B3, B<-B2, NIR<-B8",
        "sar-quadpol: encoder of s1; HH<-VV, HV<-VH, VH<-VH, VV<-VV",
    ]
    lines = list(adapted(contract("s2-l2a", "s1"), contract("s2-l1c", "dem")).lines())
    assert lines[0].startswith("s2-l1c: encoder of s2-l2a; B1<-B1, ") and "B10<-mean of all" in lines[0]
    assert lines[1:] == ["dem: drawn from the seed, as nothing in the checkpoint is like it", "not used: s1"]


@pytest.mark.parametrize("profile", ["default", "paper"])
def test_another_name_changes_nothing(profile: Profile) -> None:
    known = contract(modality("optical", OPTICAL), "s1")
    data = contract("s1", modality("rgbnir"))  # also in another order
    change = adapted(known, data)
    assert change.contract.sensors == ("rgbnir", "s1")
    old, new = network(known.channels, 0, profile), network(change.contract.channels, 1, profile)
    begun(change, old, new)
    given = images(known.channels)
    renamed = {"s1": given["s1"], "rgbnir": given["optical"]}
    assert torch.equal(new(renamed), old(given))


def test_bands_in_another_order_find_their_filters() -> None:
    known, data = (
        contract(modality("optical", OPTICAL), "s1"),
        contract("s1", modality("nirrgb", ("NIR", "R", "G", "B"))),
    )
    change = adapted(known, data)
    old, new = network(known.channels, 0), network(change.contract.channels, 1)
    begun(change, old, new)
    given = images(known.channels)
    moved = {"s1": given["s1"], "nirrgb": given["optical"][:, [3, 0, 1, 2]]}
    assert torch.allclose(new(moved), old(given), atol=1e-5)


def test_new_bands_get_the_mean_and_the_response_keeps_its_size() -> None:
    known, data = (
        contract("s1", modality("optical", OPTICAL)),
        contract(modality("sar-quadpol"), modality("other", ("R", "X"))),
    )
    change = adapted(known, data)
    old, new = network(known.channels, 0), network(change.contract.channels, 1)
    begun(change, old, new)

    def filters(net: MCFMamba, name: str) -> Tensor:
        return net.get_parameter(f"encoders.{name}.patch_embed.proj.weight")

    vv, vh = filters(old, "s1").unbind(1)
    assert torch.allclose(filters(new, "sar-quadpol"), torch.stack([vv, vh, vh, vv], 1) / 2)
    optical = filters(old, "optical")
    assert torch.allclose(filters(new, "other"), 2 * torch.stack([optical[:, 0], optical.mean(1)], 1))
    # What is the same in both polarisations gives the same response.
    assert torch.allclose(filters(new, "sar-quadpol").sum(1), filters(old, "s1").sum(1), atol=1e-6)


def test_what_is_drawn_and_what_is_left_out() -> None:
    known, data = contract("s2-l2a", "s1", modality("sar-x", ("X",))), contract("dem", "s1")
    change = adapted(known, data)
    assert change.contract.sensors == ("s1", "dem")
    old, new = network(known.channels, 0), network(change.contract.channels, 1)
    fresh = network(change.contract.channels, 1)
    begun(change, old, new)
    after, before, drawn = (dict(net.named_parameters()) for net in (new, old, fresh))
    grouped = "fusion.0.mix.grouped.weight"
    assert torch.equal(after[grouped][:, 0], before[grouped][:, 1]) and torch.equal(
        after[grouped][:, 1], drawn[grouped][:, 1]
    )
    for name, tensor in after.items():
        if ".dem." in name:
            assert torch.equal(tensor, drawn[name]), name
        elif name != grouped and ".grouped.weight" not in name:
            assert torch.equal(tensor, before[name]), name


def test_the_published_mix_is_drawn_where_modalities_moved() -> None:
    known, data = contract("s2-l2a", "s1"), contract("s1", "dem")
    change = adapted(known, data)
    old, new = network(known.channels, 0, "paper"), network(change.contract.channels, 1, "paper")
    fresh = network(change.contract.channels, 1, "paper")
    begun(change, old, new)
    for name, tensor in new.named_parameters():
        origin = fresh if ".mix." in name or ".dem." in name else old
        assert torch.equal(tensor, origin.get_parameter(name)), name


def test_numbers_are_normalised_as_the_source_was() -> None:
    ranged = contract("s2-l2a", "s1").normalised("range")
    change = adapted(ranged, contract("rgbnir", "s1"))
    assert change.contract.modality("rgbnir").scale == (2047.0,) * 4
    assert change.contract.modality("s1") == ranged.modality("s1")
    change = adapted(contract("s2-l2a", "s1").normalised("statistics"), contract("rgbnir", "s1"))
    assert change.contract.modality("rgbnir").offset == (0.0, 1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of s1 and dem, and a checkpoint that knows s1 alone."""
    folder = tmp_path_factory.mktemp("adapt")
    write_dataset(folder / "data")
    known = CONTRACT.restrict(["s1"]).normalised("range")
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1)), known.channels, 2)
    facts = {"step": 1, "model": asdict(model.config), "contract": replace(known, classes=None).to_json()}
    checkpoint.save(open_store(folder / "s1-alone"), State(model.state_dict(), {}, 1), facts)
    return folder


def test_a_finetuned_start_is_an_ordinary_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = str(folder / "s1-alone")
    settings = config(folder, "with-dem", checkpoint=start, steps=2, checkpoint_every=1, optim={"lr": 1e-9})
    run = finetune(settings)
    assert "dem: drawn from the seed" in capfd.readouterr().err
    found, before = checkpoint.find(run), checkpoint.find(start)
    assert found.build().channels == {"s1": 2, "dem": 1}
    assert found.contract.modality("s1") == before.contract.modality("s1")
    name = "encoders.s1.stages.0.blocks.0.ss2d.gated.in_proj.weight"
    assert torch.allclose(found.parameters[name], before.parameters[name], atol=1e-7)
    # It goes on by itself, as a network of these modalities.
    shutil.rmtree(run / "checkpoints" / "step-000002")
    assert checkpoint.find(finetune(settings)).step == 2


def test_a_frozen_encoder_must_come_from_the_checkpoint(folder: Path) -> None:
    start = str(folder / "s1-alone")
    with pytest.raises(ConfigError, match=r"no encoder for dem, .* or adapt=\{dem: ONE OF s1\}"):
        finetune(config(folder, "frozen-dem", checkpoint=start, steps=1, freeze="encoders"))


def test_other_units_of_the_same_name_are_refused(folder: Path) -> None:
    linear = replace(CONTRACT.modality("s1"), unit="linear power")
    other = replace(CONTRACT, modalities=(linear, CONTRACT.modality("dem")))
    write_dataset(folder / "linear", contract=other)
    settings = {"data": str(folder / "linear"), "checkpoint": str(folder / "s1-alone"), "steps": 1}
    with pytest.raises(ContractError, match=r"s1.unit: dB against linear power"):
        finetune(config(folder, "never", **settings))
