"""Evaluations of the same samples side by side: does one really do better than another?

Paired bootstrap (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 13 and 16; for segmentation it
is what resampling images is): samples are drawn with replacement, the same ones for all evaluations, their confusion
matrices added up, and the metrics computed of the sums. The interval of a difference is that from the 2.5th to the
97.5th percentile over 2,000 draws.

Samples are drawn, not groups of them: benchmarks have few groups (DFC2020 seven cities, a fold of them one), of which
resampling tells nothing. Neighbouring tiles are alike, so for places of another kind the intervals are too narrow.

Letters: N samples, K classes, R draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs import ConfigError
from pipeline.metrics import accuracy, intersection_over_union, mean_over_classes
from pipeline.scoring import METRICS
from shards.order import Use, hash64
from shards.tables import read_table

SAMPLES = "samples.parquet"
DRAWS, AT_ONCE = 2000, 50
SEED = 0
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation folder holds: metrics.json, and the samples' keys and confusion matrices [N, K, K]."""

    folder: str
    facts: Mapping[str, Any]
    keys: tuple[str, ...]
    matrices: NDArray[np.int64]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return tuple(self.facts["classes"])


def write_samples(path: Path, keys: Sequence[str], groups: Sequence[str | None], matrices: NDArray[np.int64]) -> None:
    """One row a sample: `key`, `group`, and `confusion`, the K x K counts row by row (rows: truth)."""
    width = matrices.shape[1] * matrices.shape[2]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(matrices.reshape(-1), pa.int64()), width)
    table = pa.table({"key": pa.array(keys, pa.string()), "group": pa.array(groups, pa.string()), "confusion": flat})
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def read_evaluation(folder: str) -> Evaluation:
    """What `mcf evaluate` wrote there.

    Raises:
        ConfigError: it is no evaluation folder.
    """
    path = Path(folder)
    if not (path / METRICS).is_file() or not (path / SAMPLES).is_file():
        seeds = sorted(each.name for each in path.glob("seed-*"))
        hint = f"it holds {', '.join(seeds)}; name one of them" if seeds else "write the run= of an evaluation"
        raise ConfigError(f"compare: {folder} has no {METRICS} and {SAMPLES}; {hint}")
    facts = json.loads((path / METRICS).read_text(encoding="utf-8"))
    table = read_table(path / SAMPLES).combine_chunks()
    kinds = len(facts["classes"])
    flat = table["confusion"].combine_chunks().flatten().to_numpy()
    return Evaluation(folder, facts, tuple(table["key"].to_pylist()), flat.reshape(-1, kinds, kinds))


def compare(folders: Sequence[str], seed: int = SEED, draws: int = DRAWS) -> dict[str, Any]:
    """The first evaluation against each of the others.

    Returns:
        JSON: `folders`, `samples`, `draws`, `seed`, `protocol`; `scores` by folder; `differences`, one for each folder
        but the first: `folders` (the two), and for mIoU, OA and IoU/<class> `difference` (first - other, points of
        percent), `interval` (95 %) and `better` (share of the draws in which the first is higher). None where a class
        is absent.

    Raises:
        ConfigError: a folder is no evaluation, or they are not of the same labelled samples by the same protocol.
    """
    first, *others = (read_evaluation(folder) for folder in folders)
    for other in others:
        _same(first, other)
    every = [first, *others]
    drawn = [np.concatenate(parts) for parts in zip(*_resampled(every, seed, draws), strict=True)]  # [R, 2 + K] each
    whole = [_measures(each.matrices.sum(0)) for each in every]
    names = ("mIoU", "OA", *(f"IoU/{name}" for name in first.classes))
    differences = [
        {"folders": [first.folder, other.folder], **_differences(names, whole[0] - whole[n], drawn[0] - drawn[n])}
        for n, other in enumerate(others, 1)
    ]
    return {
        "folders": list(folders),
        "samples": len(first.keys),
        "draws": draws,
        "seed": seed,
        "protocol": first.facts.get("protocol"),
        "classes": list(first.classes),
        "scores": {each.folder: {name: each.facts.get(name) for name in (*names, "mF1", "ECE")} for each in every},
        "checkpoints": {each.folder: each.facts["checkpoint_sha256"] for each in every},
        "differences": differences,
    }


def _same(one: Evaluation, other: Evaluation) -> None:
    """Refuse to pair what is not the same.

    Modalities may differ: that is often the question. The pixels of each class in each sample may not.
    """
    pair = f"{one.folder} and {other.folder}"
    for name in ("protocol", "classes"):
        if one.facts.get(name) != other.facts.get(name):
            raise ConfigError(f"compare: {pair}: {name} {one.facts.get(name)} and {other.facts.get(name)}; must agree")
    if one.keys != other.keys:
        raise ConfigError(
            f"compare: {pair}: {len(one.keys)} and {len(other.keys)} samples, {len({*one.keys} & {*other.keys})} of "
            "them the same; evaluate both with the same data, protocol, role, where and limit"
        )
    if not np.array_equal(one.matrices.sum(2), other.matrices.sum(2)):
        raise ConfigError(f"compare: {pair}: the labels of some samples differ; evaluate both on the same dataset")


def _resampled(every: Sequence[Evaluation], seed: int, draws: int) -> Iterator[list[NDArray[np.float64]]]:
    """The measures [r, 2 + K] of each evaluation over draws of its samples, some at a time, the same for all."""
    count, stacks = len(every[0].keys), [each.matrices.astype(np.float64) for each in every]
    for begin in range(0, draws, AT_ONCE):
        numbers = np.arange(begin, min(begin + AT_ONCE, draws))
        chosen = hash64(seed, int(Use.BOOTSTRAP), numbers[:, None], np.arange(count)) % np.uint64(count)  # [r, N]
        times = np.stack([np.bincount(row.astype(np.int64), minlength=count) for row in chosen]).astype(np.float64)
        yield [_measures(np.tensordot(times, stack, 1)) for stack in stacks]


def _measures(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """The measures mIoU, OA and IoU of each class, 0 to 1: [..., K, K] -> [..., 2 + K]."""
    iou = intersection_over_union(matrices)
    return np.concatenate([mean_over_classes(iou)[..., None], accuracy(matrices)[..., None], iou], -1)


def _differences(names: Sequence[str], whole: NDArray[Any], drawn: NDArray[Any]) -> dict[str, Any]:
    """By name: difference of the whole, its interval and how often it is positive, over the draws where it exists."""
    found: dict[str, Any] = {}
    for name, value, values in zip(names, whole, drawn.T, strict=True):
        there = values[~np.isnan(values)]
        if np.isnan(value) or not len(there):
            found[name] = None
            continue
        low, high = np.percentile(100 * there, INTERVAL)
        found[name] = {
            "difference": round(100 * float(value), 2),
            "interval": [round(float(low), 2), round(float(high), 2)],
            "better": round(float((there > 0).mean()), 4),
        }
    return found
