"""Release folders: what is written opens again, what is damaged is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.model import MCFMamba, ModelConfig, ReleaseError, from_pretrained, save
from pipeline.model.release import read_contract
from pipeline.model.scan import BACKENDS

IMAGES = {"s2-l1c": torch.linspace(-1, 1, 13 * 32 * 40).view(1, 13, 32, 40), "s1": torch.ones(1, 2, 32, 40)}


@pytest.fixture
def model() -> MCFMamba:
    torch.manual_seed(0)
    config = ModelConfig(size="nano", dims=(8, 16), depths=(1, 1), profile="paper", drop_path=0.1)
    return MCFMamba(config, {"s2-l1c": 13, "s1": 2}, 5)


@pytest.fixture
def folder(model: MCFMamba, tmp_path: Path) -> Path:
    return save(tmp_path / "release", model, {"format_version": 1, "a": [1]}, "# card")


def test_round_trip(model: MCFMamba, folder: Path) -> None:
    opened = MCFMamba.from_pretrained(folder, scan="reference")
    assert (opened.config, opened.channels, opened.outputs) == (model.config, model.channels, model.outputs)
    assert list(opened.channels) == ["s2-l1c", "s1"], "the order of the modalities is part of the model"
    assert opened.scan_backend == "reference" and not opened.training
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder)(IMAGES), model(IMAGES))
    assert read_contract(folder) == {"format_version": 1, "a": [1]}
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "contract.json", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["release"], "nothing is left beside it"


@pytest.mark.parametrize("scan", BACKENDS)
def test_opens_whatever_scan_it_was_made_with(scan: str, model: MCFMamba, folder: Path) -> None:
    opened = MCFMamba.from_pretrained(folder, scan=scan)
    assert opened.scan_backend == scan
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in opened.state_dict().items())


def test_opens_with_torch_and_safetensors_alone(folder: Path) -> None:
    code = (
        "import sys; from pipeline.model import MCFMamba; MCFMamba.from_pretrained(sys.argv[1]);"
        "bad = {'pydantic', 'pyarrow', 'rasterio', 'deepspeed', 'boto3', 'yaml'} & set(sys.modules); print(sorted(bad))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_is_overwritten(model: MCFMamba, folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ReleaseError, match="exists and is not empty"):
        save(folder, model, {}, "")
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_save_leaves_nothing(model: MCFMamba, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path / "release", model, {"not json": object()}, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ReleaseError, match=f"{name} is missing"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("keep", [0, 100])
def test_truncated_files_are_named(folder: Path, name: str, keep: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    with pytest.raises(ReleaseError, match=f"{name} is damaged"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 3},
        {"channels": [["s1"]]},
        {"model": {"size": "huge"}},
        {"model": {"sizes": "tiny"}},
        {"outputs": None},
    ],
)
def test_nonsense_in_the_config_is_named(folder: Path, change: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReleaseError, match="config.json is damaged"):
        from_pretrained(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ReleaseError, match="format_version 2, this program reads up to 1"):
        from_pretrained(folder)


def test_parameters_that_do_not_fit_are_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state["head.weight"] = state["head.weight"][:3].clone()
    state["extra"] = state.pop("fusion.0.norm.bias")
    save_file(state, path)
    with pytest.raises(ReleaseError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert "3 differences" in message
    for part in (
        "missing fusion.0.norm.bias",
        "unexpected extra",
        "head.weight is (3, 8, 1, 1), the model has (5, 8, 1, 1)",
    ):
        assert part in message
