"""Checkpoints: what can rebuild a run, by parameter name, without pickle, in a folder or on S3.

    STORE/checkpoints/step-000123/model.safetensors        fp32 parameters by name
                                  optimizer.safetensors    NAME.exp_avg, NAME.exp_avg_sq
                                  average.safetensors      the parameters' moving average, where the run keeps one
                                  state.json               everything else, and the sha256 of the files above
    STORE/latest, STORE/best                               names of two checkpoints, for people and other programs

state.json is put last and is what makes a checkpoint: whatever a killed writer leaves has none, and is not seen. Each
file appears whole (in a folder: written aside, flushed to disk, renamed). What is damaged later, the hashes find out.
It does not depend on the ZeRO stage or the number of ranks that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import State
from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import CONFIG, opened, read_contract, read_lineage
from pipeline.model.remote import is_hub
from shards.contract import Contract
from shards.store import FolderStore, Store, StoreError, open_store

FORMAT_VERSION = 1
MODEL, OPTIMIZER, AVERAGE, STATE = "model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"
FOLDER = "checkpoints"
LATEST, BEST = "latest", "best"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged, of a newer format or does not fit; the message says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have the right hashes, or its state.json alone.

    Attributes:
        address: of its folder, local or s3://.
        facts: state.json; of a release: its model, contract, hash and lineage only.
        state: what the engine remembers; of a release parameters alone, and no tensors where none were asked for.
    """

    address: str
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
    def parameters(self) -> Mapping[str, Tensor]:
        """What other stages use: the average where there is one, the last parameters otherwise."""
        return self.state.average or self.state.parameters

    @property
    def sha256(self) -> str:
        """Hash of the file that holds `parameters`."""
        files = self.facts["files"]
        return str(files.get(AVERAGE, files[MODEL]))

    def build(self, scan: str | None = None) -> MCFMamba:
        """The model with `parameters`, in evaluation mode."""
        outputs = self.parameters["head.weight"].shape[0]
        model = MCFMamba(self.model_config, self.contract.channels, outputs, scan)
        model.load_state_dict(dict(self.parameters))
        return model.eval()


def save(store: Store, state: State, facts: Mapping[str, Any]) -> str:
    """Write the checkpoint of step `facts["step"]` and point `latest` to it.

    Returns:
        Its name, `checkpoints/step-STEP`.

    Raises:
        StoreError: it cannot be written; the checkpoints before it are untouched.
    """
    name = name_of(int(facts["step"]))
    store.remove(f"{name}/{STATE}")  # of a damaged one, passed over at the start of this run
    parts = {MODEL: state.parameters, OPTIMIZER: state.moments, AVERAGE: state.average}
    files = {file: _write(store, f"{name}/{file}", tensors) for file, tensors in parts.items() if tensors}
    record = {"format_version": FORMAT_VERSION, **facts, "updates": state.updates, "files": files}
    store.put(f"{name}/{STATE}", json.dumps(record, indent=1).encode())
    point(store, LATEST, int(facts["step"]))
    return name


def name_of(step: int) -> str:
    """Name of the checkpoint of a step in its store."""
    return f"{FOLDER}/step-{step:06d}"


def _write(store: Store, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Put a file of tensors; its sha256."""
    with store.writing(name) as path:
        try:
            save_file({key: tensor.to(torch.float32).contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:  # how it tells of a full disk
            raise StoreError(f"{store.url}/{name}: not written: {error}") from error
        return sha256(path)


def point(store: Store, pointer: str, step: int) -> None:
    """Let `latest` or `best` name the checkpoint of a step."""
    store.put(pointer, f"{Path(name_of(step)).name}\n".encode())


def prune(store: Store, newest: int, every: int = 0) -> None:
    """Remove checkpoints but for the newest, the best and multiples of `every`; and what killed writers left."""
    names = store.list(f"{FOLDER}/")
    whole = _steps(names)
    best = _pointed(store, BEST)
    kept = {name_of(step) for step in whole if step in whole[:newest] or step == best or (every and step % every == 0)}
    # state.json first: half of a checkpoint is then none.
    for name in sorted(names, key=lambda name: not name.endswith(STATE)):
        if re.match(rf"{FOLDER}/step-\d+/", name) and name.rpartition("/")[0] not in kept:
            store.remove(name)


def _steps(names: list[str]) -> list[int]:
    """Steps of the checkpoints among a store's names, newest first."""
    found = (re.fullmatch(rf"{FOLDER}/step-(\d+)/{re.escape(STATE)}", name) for name in names)
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _pointed(store: Store, pointer: str) -> int | None:
    """The step that `latest` or `best` names; None where there is none."""
    if not store.exists(pointer):
        return None
    match = re.fullmatch(r"step-(\d+)\n", store.get(pointer).decode("utf-8", "replace"))
    return int(match[1]) if match else None


def load(address: str | Path, tensors: bool = True) -> Checkpoint:
    """Read one checkpoint folder and verify it.

    Args:
        address: of the folder, local or s3://.
        tensors: whether to read more than state.json.

    Raises:
        CheckpointError: not a checkpoint, damaged, or written by a newer release.
        StoreError: the store does not answer.
    """
    store = open_store(address)
    try:
        facts = json.loads(store.get(STATE))
        version = facts["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{address}: format_version {version}; this release reads up to {FORMAT_VERSION}")
        parts = {name: _read(store, name, wanted) for name, wanted in facts["files"].items() if tensors}
        state = State(parts.get(MODEL, {}), parts.get(OPTIMIZER, {}), facts["updates"], parts.get(AVERAGE, {}))
    except (StoreError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{address} is not a whole checkpoint: {type(error).__name__}: {error}") from None
    return Checkpoint(str(address), facts, state)


def _read(store: Store, name: str, wanted: str) -> dict[str, Tensor]:
    with _local(store, name) as path:
        if sha256(path) != wanted:
            raise CheckpointError(f"{store.url}/{name} is damaged: its sha256 is not the one in {STATE}")
        return load_file(path)


@contextmanager
def _local(store: Store, name: str) -> Iterator[Path]:
    """An object as a local file."""
    with store.reading(name) as source:
        if isinstance(store, FolderStore):
            yield store.root / name
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            with path.open("wb") as file:
                shutil.copyfileobj(source, file, 16 << 20)
            yield path


def newest(store: Store) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over. None: there is none.

    Raises:
        CheckpointError: checkpoints exist and none of them can be read.
    """
    problems, names = [], store.list(f"{FOLDER}/")
    if names and not _steps(names):
        log.warning("%s: only unfinished checkpoints, without %s, such as %s", store.url, STATE, names[0])
    for step in _steps(names):
        try:
            return load(f"{store.url}/{name_of(step)}")
        except CheckpointError as error:
            log.warning("%s; taking the checkpoint before it", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no checkpoint of {store.url} can be read: {'; '.join(problems)}. "
            f"Remove {store.url}/{FOLDER} to begin again"
        )
    return None


def facts_of_all(store: Store) -> Iterator[Mapping[str, Any]]:
    """state.json of every whole checkpoint of a run, newest first."""
    for step in _steps(store.list(f"{FOLDER}/")):
        yield load(f"{store.url}/{name_of(step)}", tensors=False).facts


def best(store: Store, metric: str) -> float | None:
    """What the best checkpoint so far has for `metric`; None where there is none."""
    step = _pointed(store, BEST)
    if step is None or not store.exists(f"{name_of(step)}/{STATE}"):
        return None
    value = load(f"{store.url}/{name_of(step)}", tensors=False).facts.get("metrics", {}).get(metric)
    return None if value is None else float(value)


def find(where: str | Path) -> Checkpoint:
    """The checkpoint at an address, local or s3://.

    Args:
        where: a run (its newest checkpoint is taken), RUN/latest or RUN/best, a checkpoint folder, or a release
            (also ORG/NAME@REVISION on the Hugging Face Hub).

    Raises:
        CheckpointError: it is none of these.
    """
    address = str(where).rstrip("/")
    store = open_store(address)
    if store.exists(STATE):
        return load(address)
    parent, _, pointer = address.rpartition("/")
    if pointer in (LATEST, BEST) and (step := _pointed(open_store(parent or "."), pointer)) is not None:
        return load(f"{parent or '.'}/{name_of(step)}")
    if found := newest(store):
        return found
    # Without @ it might be a run that is not there yet, and a stage asks the network for nothing unless it is told to.
    if ("@" in address and is_hub(address)) or (store.exists(CONFIG) and store.exists(MODEL)):
        return _from_release(address)
    if seeds := sorted({name.split("/")[0] for name in store.list("seed-")}):
        raise CheckpointError(f"{where} holds the runs of several seeds; give one of them: {', '.join(seeds)}")
    raise CheckpointError(
        f"{where}: no checkpoint there; give a run folder (holding {FOLDER}/), RUN/{LATEST} or RUN/{BEST}, "
        f"a folder step-NNNNNN, or a release folder (holding {MODEL} and {CONFIG}); or ORG/NAME@REVISION of "
        "the Hugging Face Hub"
    )


def sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old or the new one.

    Raises:
        StoreError: it cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: not written: {error}") from error


def _from_release(address: str) -> Checkpoint:
    with opened(address) as folder:
        model = MCFMamba.from_pretrained(folder)
        facts = {
            "model": asdict(model.config),
            "contract": read_contract(folder),
            "files": {MODEL: sha256(folder / MODEL)},
            "lineage": read_lineage(folder),
        }
    return Checkpoint(address, facts, State(model.state_dict(), {}, 0))
