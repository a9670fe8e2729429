"""Checkpoints: a folder that can rebuild a run, by parameter name, without pickle.

    RUN/checkpoints/step-000123/model.safetensors        fp32 parameters by name
                                optimizer.safetensors    NAME.exp_avg, NAME.exp_avg_sq
                                state.json               everything else, and the sha256 of the two files above
    RUN/latest                                           name of the newest checkpoint, for people and other programs

A checkpoint is written into a temporary folder, flushed to disk, and renamed: a folder called `step-*` is whole or was
damaged later, which the hashes find out. It does not depend on the ZeRO stage or the number of ranks that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import State
from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from shards.contract import Contract

FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged, of a newer format or does not fit; the message says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes were right.

    Attributes:
        folder: where it lies.
        facts: state.json; of a release: its model, contract and hash only.
        state: parameters, moments (empty for a release) and updates.
    """

    folder: Path
    facts: Mapping[str, Any]
    state: State

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.facts["step"])

    @property
    def contract(self) -> Contract:
        """What the model's inputs and classes mean."""
        return Contract.from_json(self.facts["contract"])

    @property
    def model_config(self) -> ModelConfig:
        """The structure of the model."""
        return TypeAdapter(ModelConfig).validate_python(self.facts["model"])

    @property
    def sha256(self) -> str:
        """Hash of the parameters' file."""
        return str(self.facts["files"][MODEL])

    def build(self, scan: str | None = None) -> MCFMamba:
        """The model with these parameters, in evaluation mode."""
        outputs = self.state.parameters["head.weight"].shape[0]
        model = MCFMamba(self.model_config, self.contract.channels, outputs, scan)
        model.load_state_dict(dict(self.state.parameters))
        return model.eval()


def save(run: Path, state: State, facts: Mapping[str, Any], keep: int) -> Path:
    """Write `RUN/checkpoints/step-STEP`, point `latest` to it and drop all but the newest `keep`.

    Args:
        run: run folder.
        state: from `Engine.gather`.
        facts: for state.json; `step` is among them.
        keep: how many checkpoints stay.
    """
    folder = run / "checkpoints" / f"step-{facts['step']:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while saving
    temporary.mkdir(parents=True)
    save_file(_contiguous(state.parameters), temporary / MODEL)
    save_file(_contiguous(state.moments), temporary / OPTIMIZER)
    files = {name: sha256(temporary / name) for name in (MODEL, OPTIMIZER)}
    record = {"format_version": FORMAT_VERSION, **facts, "updates": state.updates, "files": files}
    (temporary / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, passed over at the start of this run
    temporary.rename(folder)
    _flush(folder.parent)
    write_text(run / "latest", folder.name + "\n")
    for _, old in list(_numbered(run))[keep:]:
        shutil.rmtree(old)
    return folder


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint folder and verify it.

    Raises:
        CheckpointError: not a checkpoint, damaged, or written by a newer release.
    """
    try:
        facts = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version = facts["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{folder}: format_version {version}; this release reads up to {FORMAT_VERSION}")
        for name, expected in facts["files"].items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the one in {STATE}")
        state = State(load_file(folder / MODEL), load_file(folder / OPTIMIZER), facts["updates"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is not a whole checkpoint: {type(error).__name__}: {error}") from None
    return Checkpoint(folder, facts, state)


def newest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over. None: there is none.

    Raises:
        CheckpointError: checkpoints exist and none of them can be read.
    """
    problems = []
    for _, folder in _numbered(run):
        try:
            return load(folder)
        except CheckpointError as error:
            log.warning("%s; taking the checkpoint before it", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no checkpoint of {run} can be read: {'; '.join(problems)}. Remove {run / 'checkpoints'} to begin again"
        )
    return None


def find(where: str | Path) -> Checkpoint:
    """A checkpoint from a run folder (its newest), a checkpoint folder or a release folder.

    Raises:
        CheckpointError: it is none of these.
    """
    folder = Path(where)
    if (folder / STATE).is_file():
        return load(folder)
    if (folder / "checkpoints").is_dir() and (found := newest(folder)):
        return found
    if (folder / "config.json").is_file() and (folder / MODEL).is_file():
        return _from_release(folder)
    raise CheckpointError(
        f"{where}: no checkpoint there; give a run folder (holding checkpoints/), a folder step-NNNNNN, or a release "
        f"folder (holding {MODEL} and config.json)"
    )


def sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _from_release(folder: Path) -> Checkpoint:
    model = MCFMamba.from_pretrained(folder)
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    facts = {"model": asdict(model.config), "contract": contract, "files": {MODEL: sha256(folder / MODEL)}}
    return Checkpoint(folder, facts, State(model.state_dict(), {}, 0))


def _numbered(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, newest first."""
    folders = (run / "checkpoints").glob("step-*")
    numbered = [(int(folder.name[5:]), folder) for folder in folders if folder.name[5:].isdigit()]
    yield from sorted(numbered, reverse=True)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Make a file's or folder's contents survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
