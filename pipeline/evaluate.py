"""Stage evaluate: what a finetuned checkpoint is worth on labelled samples it has not seen, and which of two is better.

Writes into its run folder

    metrics.json      every number with where it comes from: protocol, data, checkpoint, seed, leak certificate
    metrics.csv       the same numbers, `name,value` a line
    confusion.csv     rows: truth, columns: prediction, in pixels
    samples.parquet   the confusion matrix of every sample, which `compare` resamples
    buildings.csv     outlines of predicted buildings, of data with instances (SpaceNet's columns)
    config.yaml, report.html

Of a checkpoint that is a folder of seeds (RUN/seed-0, ...) each is evaluated into a folder of its own, and
summary.json tells their spread. With `compare` nothing is evaluated: compare.json and compare.html are written.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import configs
from pipeline import evaluation_page as page
from pipeline.boundaries import boundary_scores
from pipeline.calibration import calibration
from pipeline.checkpoint import Checkpoint, find, write_text
from pipeline.comparing import SAMPLES, compare, write_samples
from pipeline.evaluate_config import EvaluateConfig
from pipeline.instances import instance_scores, part, write_buildings
from pipeline.leaks import certificate
from pipeline.measuring import Counts, Pass, look, measure, modality_matrix, picked, unused
from pipeline.metrics import scores
from pipeline.protocols import described, samples
from pipeline.provenance import code_version
from pipeline.ranks import Ranks, device, from_environment, init
from pipeline.report import REPORT
from pipeline.run import CONFIG
from pipeline.scoring import METRICS
from pipeline.spread import spread
from shards.contract import Contract, ContractError, check_fit
from shards.report import write_report
from shards.store import open_store

CONFUSION, TABLE, BUILDINGS = "confusion.csv", "metrics.csv", "buildings.csv"
SUMMARY, COMPARISON, COMPARISON_PAGE = "summary.json", "compare.json", "compare.html"

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> Path:
    """Score, or compare, as configured. Collective over the ranks of the environment; rank 0 writes.

    Returns:
        The run folder.

    Raises:
        ValueError: no labelled sample is selected, checkpoint and data do not fit, or evaluations cannot be compared.
    """
    ranks = from_environment()
    init(ranks)
    folder = Path(config.run)
    if config.compare:
        if ranks.rank == 0:
            _compare(config, folder)
        return folder
    seeds = seeds_of(config.checkpoint)
    for name, address in seeds.items():
        _evaluate(replace(config, checkpoint=address, run=str(folder / name)), ranks)
    if not seeds:
        _evaluate(config, ranks)
    elif ranks.rank == 0:
        _summarise(folder, list(seeds))
    return folder


def seeds_of(checkpoint: str) -> dict[str, str]:
    """Runs `seed-N` below an address, local or s3://, by name in the order of N; empty if there is none."""
    address = checkpoint.rstrip("/")
    names = {name.partition("/")[0] for name in open_store(address).list("seed-") if "/" in name}
    found = sorted((name for name in names if re.fullmatch(r"seed-\d+", name)), key=lambda name: int(name[5:]))
    return {name: f"{address}/{name}" for name in found}


def _evaluate(config: EvaluateConfig, ranks: Ranks) -> None:
    """One checkpoint."""
    checkpoint, folder, on = find(config.checkpoint), Path(config.run), device(ranks)
    sensors = config.sensors or checkpoint.contract.sensors
    where = config.where
    if where is None:
        where = {} if config.protocol.name else {"split": [config.role]}
    selection = samples(config.protocol, config.data, config.role, sensors=sensors, where=where)
    selection = selection if config.limit is None else selection.some(config.limit)
    contract, forced = fitting(checkpoint, selection.contract, config.force)
    over = Pass(selection, contract, config, folder)
    model = checkpoint.build().to(on)
    counts = measure(model, over, ranks, on)
    if ranks.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**_numbers(counts, over, forced), **_origin(config, checkpoint, over)}
    pooled, classes = counts["samples"].sum(0), over.contract.classes
    assert classes is not None
    write_text(folder / CONFIG, configs.dump(config))
    write_text(folder / CONFUSION, confusion_csv(pooled, classes.names))
    rows = selection.rows(["key", "group"])
    write_samples(folder / SAMPLES, rows["key"].to_pylist(), rows["group"].to_pylist(), counts["samples"])
    _buildings(folder, ranks.world, "instances" in facts)
    chosen = picked(counts["samples"], config.maps)
    looks = look(model, over, [number for _, number, _ in chosen], on)
    sections = page.sections(facts, pooled, over.contract, page.shown(over.contract, chosen, *looks))
    write_report(folder / REPORT, sections, title=f"Evaluation {folder}")
    write_text(folder / TABLE, metrics_csv(facts))
    write_text(folder / METRICS, json.dumps(facts, indent=1))  # the last: with it the evaluation is done


def _numbers(counts: Counts, over: Pass, forced: list[str]) -> dict[str, Any]:
    """All that was measured, in JSON, with what must be said of it."""
    names = over.contract.classes.names if over.contract.classes else ()
    sure = calibration(counts["reliability"])
    found: dict[str, Any] = {**scores(counts["samples"].sum(0), names), "ECE": sure["ECE"], "calibration": sure["bins"]}
    warnings = [f"the data do not fit the checkpoint, as force=true allows: {line}" for line in forced]
    if over.views:
        found["modalities"] = modality_matrix(counts, over)
        warnings += unused(counts, over)
    found |= {"warnings": warnings, "forced": forced}
    for line in warnings:
        log.warning("%s", line)
    if over.config.boundary:
        edges = boundary_scores(counts["boundary"], names)
        found["boundary"] = {"tolerance": over.config.boundary, "F1": edges}
    *counted, with_instances = counts["instances"].tolist()
    if with_instances:
        found["instances"] = {**instance_scores(*counted), "min_area": over.config.min_area, "samples": with_instances}
    return found


def _origin(config: EvaluateConfig, checkpoint: Checkpoint, over: Pass) -> dict[str, Any]:
    """Where the numbers come from; step, seed and training data of a release are None."""
    assert over.contract.classes is not None
    return {
        "checkpoint": str(checkpoint.address),
        "checkpoint_sha256": checkpoint.sha256,
        **{f"checkpoint_{name}": checkpoint.facts.get(name) for name in ("step", "seed", "fingerprint")},
        "version": code_version(),
        "classes": list(over.contract.classes.names),
        "samples": len(over.selection),
        "sensors": list(over.contract.sensors),
        "role": config.role,
        "protocol": described(config.protocol),
        "data": over.selection.identity,
        "fingerprint": over.selection.fingerprint,
        "leaks": certificate(over.selection, checkpoint, config.trained_on),
    }


def fitting(checkpoint: Checkpoint, data: Contract, force: bool = False) -> tuple[Contract, list[str]]:
    """The data's contract as the checkpoint normalises it, and the differences that `force` overrules.

    Raises:
        ContractError: they do not fit, or one of them has no classes (a pretrained checkpoint has none).
    """
    model = checkpoint.contract
    if model.classes is None or data.classes is None:
        names = [contract.classes.names if contract.classes else None for contract in (model, data)]
        raise ContractError(f"classes: the checkpoint {checkpoint.address} has {names[0]}, the data have {names[1]}")
    forced = check_fit(model, data, force)
    return replace(model, classes=data.classes).restrict(data.sensors), forced


def _buildings(folder: Path, world: int, wanted: bool) -> None:
    """Put the ranks' outlines together, or away where no sample has true ones to compare them with."""
    if wanted:
        write_buildings(folder, world, BUILDINGS)
    else:
        for rank in range(world):
            part(folder, rank).unlink(missing_ok=True)


def confusion_csv(matrix: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """The matrix as CSV, class names in the first row and column."""
    return _csv(
        [["truth \\ predicted", *names], *([n, *counts] for n, counts in zip(names, matrix.tolist(), strict=True))]
    )


def metrics_csv(facts: Mapping[str, Any]) -> str:
    """All numbers of metrics.json as CSV, `name,value`; names of nested ones are joined by a slash, None is empty."""
    return _csv([["name", "value"], *numbers(facts)])


def numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | int | None]]:
    """Name and value of every measured number, nested ones with a slash between their names."""
    for name, value in facts.items():
        if name in ("protocol", "leaks") or name.startswith("checkpoint"):
            continue
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield prefix + name, value


def _csv(rows: list[list[Any]] | list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _summarise(folder: Path, seeds: list[str]) -> None:
    """The spread over seeds of every number that all of them have, as JSON and as a page."""
    found = {name: json.loads((folder / name / METRICS).read_text(encoding="utf-8")) for name in seeds}
    each = [dict(numbers(facts)) for facts in found.values()]
    values = {name: [one.get(name) for one in each] for name in each[0]}
    alike = {name: spread([v for v in row if v is not None]) for name, row in values.items() if None not in row}
    first = found[seeds[0]]
    kept = {name: first[name] for name in ("protocol", "fingerprint", "data", "sensors", "classes", "version")}
    sums = {name: facts["checkpoint_sha256"] for name, facts in found.items()}
    summary = {"seeds": seeds, **kept, "checkpoints": sums, "scores": alike}
    write_report(folder / REPORT, page.summary(summary), title=f"Evaluation {folder}: {len(seeds)} seeds")
    write_text(folder / SUMMARY, json.dumps(summary, indent=1))


def _compare(config: EvaluateConfig, folder: Path) -> None:
    """Evaluations side by side, as JSON and as a page."""
    found = compare(config.compare)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder / COMPARISON_PAGE, page.comparison(found), title=f"Comparison {folder}")
    write_text(folder / COMPARISON, json.dumps(found, indent=1))
