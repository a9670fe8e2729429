"""A release: a trained network that opens with torch and safetensors alone.

    model.safetensors   parameters by name, fp32
    config.json         format_version, ModelConfig, bands of each modality in order, outputs, lineage
    contract.json       what the numbers going in and coming out mean (shards/contract.py)
    README.md           the model card

`mcf export` adds evaluations (eval/NAME.json) and, if asked to, a program of torch.export (model.pt2). Nothing that is
opened here is code or pickle. A folder is written beside its place and renamed, so it is whole or absent; on S3
config.json is put last, and what has none is no release.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CONTRACT, CARD = "model.safetensors", "config.json", "contract.json", "README.md"
PROGRAM = "model.pt2"  # by option, and never opened here
LISTED = 20  # names in an error message


class ReleaseError(ValueError):
    """A release folder that cannot be written or opened; the message names the file and what to do."""


def save(
    folder: str | Path,
    model: MCFMamba,
    contract: Mapping[str, Any],
    card: str,
    lineage: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write a release folder.

    Args:
        folder: where; must not exist, or be empty.
        model: the network; its parameters are written as float32.
        contract: `Contract.to_json()`.
        card: text of the README.
        lineage: the trainings that the parameters went through, oldest first, in JSON's types.

    Returns:
        The folder.

    Raises:
        ReleaseError: the folder holds something.
    """
    with making(folder) as part:
        write(part, model, contract, card, lineage)
    return Path(folder)


@contextmanager
def making(address: str | Path) -> Iterator[Path]:
    """An empty folder, which becomes the release when the block ends without an error.

    Args:
        address: where; a folder that must not exist, or be empty, or s3://BUCKET/PREFIX likewise.

    Raises:
        ReleaseError: something is there.
        StoreError: S3 refuses.
    """
    if str(address).startswith("s3://"):
        with _making_on_s3(str(address)) as part:
            yield part
        return
    folder = Path(address)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ReleaseError(f"{folder} exists and is not empty; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def _making_on_s3(address: str) -> Iterator[Path]:
    from pipeline.model import remote

    if reason := remote.occupied(address):
        raise ReleaseError(reason)
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        remote.put(Path(folder), address)


def write(
    folder: Path,
    model: MCFMamba,
    contract: Mapping[str, Any],
    card: str,
    lineage: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The four files of a release into a folder that `making` has given; arguments as of `save`."""
    config = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model.config),
        "channels": [[name, bands] for name, bands in model.channels.items()],
        "outputs": model.outputs,
        "lineage": list(lineage),
    }
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


@contextmanager
def opened(address: str | Path) -> Iterator[Path]:
    """A release as a local folder while the block lasts.

    Args:
        address: a folder, which costs nothing and never touches the network; s3://BUCKET/PREFIX; or ORG/NAME or
            ORG/NAME@REVISION on the Hugging Face Hub, where no such folder is here.

    Raises:
        ReleaseError: it cannot be fetched.
    """
    from pipeline.model import remote

    if remote.is_s3(address) or remote.is_hub(address):
        with remote.fetched(str(address)) as folder:
            yield folder
    elif (folder := Path(address)).is_dir():
        yield folder
    else:
        raise ReleaseError(
            f"{address}: no such folder; a release is a folder, s3://BUCKET/PREFIX, or ORG/NAME or ORG/NAME@REVISION "
            "on the Hugging Face Hub"
        )


def from_pretrained(address: str | Path, scan: str | None = None) -> MCFMamba:
    """Open a release, in evaluation mode and on the CPU.

    Args:
        address: as of `opened`.
        scan: scan backend; None chooses.

    Raises:
        ReleaseError: it cannot be fetched, a missing or damaged file, a newer format, or parameters that do not fit.
    """
    with opened(address) as folder:
        config = _read_json(folder / CONFIG)
        model = _build(folder / CONFIG, config, scan)
        load_parameters(model, _read_weights(folder / WEIGHTS), source=folder / WEIGHTS)
    return model.eval()


def read_contract(address: str | Path) -> dict[str, Any]:
    """The contract of a release, for `Contract.from_json`, which checks its version.

    Raises:
        ReleaseError: it cannot be fetched, or the file is missing or damaged.
    """
    with opened(address) as folder:
        return _read_json(folder / CONTRACT)


def read_lineage(folder: Path) -> list[Mapping[str, Any]]:
    """The trainings behind a release, oldest first; empty where it does not say.

    Raises:
        ReleaseError: the file is missing or damaged.
    """
    return list(_read_json(folder / CONFIG).get("lineage", []))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a release folder; ReleaseError if it is missing or damaged."""
    if not path.is_file():
        raise ReleaseError(f"{path} is missing; a release folder holds {WEIGHTS}, {CONFIG} and {CONTRACT}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReleaseError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ReleaseError(f"{path} is damaged: an object is needed, not {type(content).__name__}")
    return content


def _build(path: Path, config: Mapping[str, Any], scan: str | None) -> MCFMamba:
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ReleaseError(f"{path} has format_version {version!r}, this program reads up to {FORMAT_VERSION}")
    try:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config["model"].items()
        }
        channels = {str(name): int(bands) for name, bands in config["channels"]}
        outputs, structure = int(config["outputs"]), ModelConfig(**fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ReleaseError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return MCFMamba(structure, channels, outputs, scan)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ReleaseError(f"{path} is missing; a release folder holds {WEIGHTS}, {CONFIG} and {CONTRACT}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ReleaseError(f"{path} is damaged: {error}") from error


def load_parameters(model: MCFMamba, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into the network; every name and shape must fit.

    Raises:
        ReleaseError: lists what is missing, unexpected and of another shape.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join([*problems[:LISTED], *(["..."] if len(problems) > LISTED else [])])
        raise ReleaseError(f"{source} does not fit this model, {len(problems)} differences: {shown}")
    with torch.no_grad():
        model.load_state_dict(dict(state))
