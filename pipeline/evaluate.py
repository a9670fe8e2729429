"""Stage evaluate: the metrics of a finetuned checkpoint on labelled samples it has not seen.

Writes into its run folder metrics.json (every number with where it comes from: selection, checkpoint, seed),
confusion.csv (rows: truth, columns: prediction, in pixels) and config.yaml.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import configs
from pipeline.checkpoint import Checkpoint, find, write_text
from pipeline.evaluate_config import EvaluateConfig
from pipeline.metrics import scores
from pipeline.ranks import device, from_environment, init
from pipeline.run import CONFIG, adopt, code_version
from pipeline.scoring import METRICS, confusion
from shards.contract import Contract, ContractError
from shards.manifest import select

CONFUSION = "confusion.csv"


def evaluate(config: EvaluateConfig) -> Path:
    """Score as configured. Collective over the ranks of the environment; rank 0 writes.

    Returns:
        The run folder.

    Raises:
        ValueError: no labelled sample is selected, or checkpoint and data do not fit.
    """
    ranks = from_environment()
    init(ranks)
    checkpoint = find(config.checkpoint)
    sensors = config.sensors or checkpoint.contract.sensors
    selection = select(config.data, modalities=sensors, where={**config.where, "labelled": [True]}, limit=config.limit)
    contract = fitting(checkpoint, selection.contract)
    model = checkpoint.build().to(device(ranks))
    matrix = confusion(model, selection, contract, config.micro_batch, ranks, device(ranks))
    folder = Path(config.run)
    if ranks.rank == 0 and contract.classes:
        names = contract.classes.names
        facts = {**scores(matrix, names), **provenance(checkpoint), "samples": len(selection), "sensors": list(sensors)}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, configs.dump(config))
        write_text(folder / CONFUSION, confusion_csv(matrix, names))
        write_text(folder / METRICS, json.dumps({**facts, "fingerprint": selection.fingerprint}, indent=1))
    return folder


def fitting(checkpoint: Checkpoint, data: Contract) -> Contract:
    """The data's contract as the checkpoint normalises it.

    Raises:
        ContractError: the checkpoint does not know a modality, or has other classes (a pretrained one has none).
    """
    model = checkpoint.contract
    if model.classes is None or data.classes is None or model.classes.names != data.classes.names:
        names = [contract.classes.names if contract.classes else None for contract in (model, data)]
        raise ContractError(f"classes: the checkpoint {checkpoint.address} has {names[0]}, the data have {names[1]}")
    return adopt(model, data).restrict(data.sensors)


def provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a number comes from: checkpoint, its hash, its seed and the data it was trained on; None of a release."""
    known = {f"checkpoint_{name}": checkpoint.facts.get(name) for name in ("step", "seed", "fingerprint")}
    found = {"checkpoint": str(checkpoint.address), "checkpoint_sha256": checkpoint.sha256}
    return {**found, **known, "version": code_version()}


def confusion_csv(matrix: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """The matrix as CSV, class names in the first row and column."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["truth \\ predicted", *names])
    rows.writerows([name, *counts] for name, counts in zip(names, matrix.tolist(), strict=True))
    return text.getvalue()
