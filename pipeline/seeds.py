"""Several seeds in one call: an ordinary run for each in RUN/seed-N, and how far their scores lie apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint import write_text
from pipeline.finetune_config import FinetuneConfig
from pipeline.log import read
from pipeline.spread import said, spread

SUMMARY = "summary.json"
HEADLINES = ("val/OA", "val/mIoU", "val/mF1")


def per_seed(config: FinetuneConfig) -> list[FinetuneConfig]:
    """The configs of the runs that `seeds` asks for; the config itself where it asks for none."""
    if not config.seeds:
        return [config]
    return [
        replace(
            config, seeds=(), seed=seed, run=_below(config.run, seed), store=config.store and _below(config.store, seed)
        )
        for seed in config.seeds
    ]


def _below(folder: str, seed: int) -> str:
    return f"{folder.rstrip('/')}/seed-{seed}"


def summarise(config: FinetuneConfig) -> list[str]:
    """Write RUN/summary.json of finished runs; returns it in lines.

    `last` has the spread of every validation score at each run's end, `best` at the step where `keep_best` was best
    (absent without one). A score that some run does not have, such as the IoU of a class that never occurred, is left
    out.
    """
    runs = [Path(each.run) for each in per_seed(config)]
    scored = [[line for line in read(run) if any(name.startswith("val/") for name in line)] for run in runs]
    found: dict[str, Any] = {"seeds": list(config.seeds), "runs": [run.name for run in runs]}
    if not all(scored):
        lines = ["no validation was made (validate_every=0), so there is nothing to summarise"]
    else:
        found["last"] = _spreads([lines[-1] for lines in scored])
        if metric := config.keep_best:
            watched = [[line for line in lines if line.get(metric) is not None] for lines in scored]
            if all(watched):
                found["best"] = _spreads([max(lines, key=lambda line: line[metric]) for lines in watched])
        lines = list(_said(found, config.keep_best))
    write_text(Path(config.run) / SUMMARY, json.dumps(found, indent=1))
    return [f"{config.run}: seeds {', '.join(map(str, config.seeds))}", *lines]


def _spreads(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By validation score, its spread over the runs' lines."""
    return {
        name: spread([float(line[name]) for line in lines])
        for name in lines[0]
        if name.startswith("val/") and all(isinstance(line.get(name), int | float) for line in lines)
    }


def _said(found: Mapping[str, Any], metric: str) -> Iterator[str]:
    for which in ("last", "best"):
        scores = found.get(which, {})
        for name in dict.fromkeys([*HEADLINES, metric]):
            if name in scores:
                yield f"  {which} {name}: {said(scores[name])}"
