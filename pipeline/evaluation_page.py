"""The pages of the stage evaluate: one checkpoint, several seeds of it, or evaluations side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import evaluation_figures as drawing
from pipeline import figures
from pipeline.batch import Batch
from pipeline.evaluation_figures import Shown
from pipeline.leaks import in_words
from pipeline.spread import said
from shards.contract import Contract
from shards.report import Figure, Section, Table, Text

HEADLINE = ("mIoU", "OA", "mAcc", "mF1", "Kappa", "FWIoU", "ECE")
POOLED = "In percent, of all labelled pixels of the set together."

Facts = Mapping[str, Any]


def sections(facts: Facts, matrix: NDArray[np.int64], contract: Contract, samples: Sequence[Shown]) -> list[Section]:
    """What the page of one checkpoint shows.

    Args:
        facts: metrics.json.
        matrix: confusion matrix [K, K].
        contract: of the data, with classes.
        samples: to be shown as maps; none is fine.
    """
    classes = contract.classes
    assert classes is not None
    absent = (
        f" Absent from labels and predictions, and in no mean: {', '.join(facts['absent'])}." if facts["absent"] else ""
    )
    result = [[name, facts[name]] for name in HEADLINE]
    counted = [["samples", facts["samples"]], ["labelled pixels", facts["pixels"]]]
    bars = {kind: [facts[f"{kind}/{name}"] for name in classes.names] for kind in ("IoU", "F1")}
    edges = facts.get("boundary")
    if edges:
        bars["boundary F1"] = [edges["F1"][name] for name in classes.names]
    return [
        *(Text("Warning", line[0].upper() + line[1:] + ".") for line in facts.get("warnings", ())),
        Table("Result", ["metric", "value"], [[n, _said(v)] for n, v in (*result, *counted)], POOLED + absent),
        _origin(facts),
        Text("Leak certificate", "\n\n".join(in_words(facts["leaks"]))),
        *_modalities(facts),
        Figure("Class by class", drawing.class_bars(bars, classes.names), f"{POOLED}{absent}"),
        Figure(
            "Confusion matrix",
            figures.confusion(matrix, classes),
            "Rows: truth, columns: prediction. Large: percent of the true class; small: pixels.",
        ),
        Figure("Reliability", drawing.reliability(facts["calibration"]), _reliability(facts)),
        *_instances(facts),
        *_boundary(edges),
        *_maps(contract, samples),
    ]


def shown(
    contract: Contract, chosen: Sequence[tuple[str, int, float]], batches: Sequence[Batch], predicted: Sequence[Any]
) -> list[Shown]:
    """Samples to look at: what each is, its number and mIoU; batches of one sample each; its classes [H, W]."""
    found = []
    for (kind, _, value), batch, classes in zip(chosen, batches, predicted, strict=True):
        assert batch.label is not None
        values, valid = (
            {name: each[name][0].numpy() for name in contract.sensors} for each in (batch.values, batch.valid)
        )
        title = f"{kind}, mIoU {100 * value:.1f}\n{figures.shortened(batch.keys[0], 36)}"
        found.append(Shown(title, values, valid, batch.label[0].numpy(), classes))
    return found


def _said(value: object) -> str | None:
    """A value as a text, so that all stand under each other."""
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else None if value is None else str(value)


def _origin(facts: Facts) -> Table:
    """Protocol, data and checkpoint."""
    rows: list[list[object]] = []
    if protocol := facts["protocol"]:
        rows += [[f"protocol {name}", _said(value)] for name, value in protocol.items()]
    else:
        rows += [["protocol", "none: samples chosen by `where`"]]
    rows += [[f"data, part {n}", _in_a_line(part)] for n, part in enumerate(facts["data"], 1)]
    names = ("role", "fingerprint", "checkpoint", "checkpoint_sha256", "checkpoint_step", "checkpoint_seed", "version")
    rows += [[name.replace("_", " "), _said(facts[name])] for name in names if name in facts]
    rows += [["modalities shown", ", ".join(facts["sensors"])]]
    return Table("Where it comes from", ["what", "value"], rows)


def _in_a_line(part: Facts) -> str:
    return "; ".join(f"{name}: {value}" for name, value in part.items())


def _modalities(facts: Facts) -> list[Section]:
    """With all, each alone, each hidden."""
    matrix = facts.get("modalities")
    if not matrix:
        return []
    rows: list[list[object]] = [[" + ".join(matrix), _said(facts["mIoU"]), _said(facts["OA"]), *[None] * 4]]
    for name, each in matrix.items():
        numbers = [each[view][metric] for view in ("alone", "without") for metric in ("mIoU", "OA")]
        rows.append([f"{name} alone", *map(_said, (*numbers, each["changed"], each["drop"]))])
    there = "; ".join(f"{name} in {each['samples']:,}" for name, each in matrix.items())
    caption = (
        "The same checkpoint with modalities hidden from it. Changed: percent of the labelled pixels that get another "
        "class when the modality is hidden; lost: points of mIoU. A modality that changes nothing is not used. Of "
        f"{facts['samples']:,} samples with a valid pixel: {there}."
    )
    head = ["seen", "mIoU", "OA", "mIoU without it", "OA without it", "changed (%)", "mIoU lost"]
    return [Table("Modality matrix", head, rows, caption)]


def _reliability(facts: Facts) -> str:
    return (
        f"Expected calibration error {facts['ECE']:.2f} %: the mean distance of bars and line, weighted by pixels. "
        "Bars under the line: the model is surer than it should be."
    )


def _instances(facts: Facts) -> list[Section]:
    found = facts.get("instances")
    if not found:
        return []
    rows = [[name, _said(found[name])] for name in ("F1", "precision", "recall", "TP", "FP", "FN", "samples")]
    caption = (
        f"In percent and in numbers of buildings. Found: IoU over {found['iou']}. Each sample by itself, so a building "
        f"cut by the edge of a tile counts in both. Predicted ones under {found['min_area']} pixels are dropped."
    )
    return [Table("Buildings one by one", ["measure", "value"], rows, caption)]


def _boundary(edges: Facts | None) -> list[Section]:
    if not edges:
        return []
    rows = [[name, _said(value)] for name, value in edges["F1"].items()]
    caption = f"In percent; outlines may be off by {edges['tolerance']} pixels."
    return [Table("Boundary F1", ["class", "F1"], rows, caption)]


def _maps(contract: Contract, samples: Sequence[Shown]) -> list[Section]:
    if not samples:
        return []
    caption = "The worst, middling and best samples by their own mIoU. Errors: where label and prediction differ."
    return [Figure("Maps", drawing.maps(contract, samples), caption)]


def summary(found: Facts) -> list[Section]:
    """What the page of several seeds shows: `found` is summary.json."""
    scores = found["scores"]
    rows = [[name, said(scores[name]), *map(_said, scores[name]["values"])] for name in scores if _is_result(name)]
    caption = f"{POOLED} Mean and standard deviation over seeds, and the 95 % t-interval of the mean."
    protocol = found["protocol"]
    about = f"Protocol {protocol['name']}, hash {protocol['hash']}." if protocol else "No named protocol."
    return [
        Text("What this is", f"{len(found['seeds'])} runs that differ by their seeds. {about} Their own pages: "
             + ", ".join(f"{name}/report.html" for name in found["seeds"]) + "."),
        Table("Over seeds", ["metric", "all", *found["seeds"]], rows, caption),
    ]  # fmt: skip


def _is_result(name: str) -> bool:
    """Whether a number is one that the page of several seeds shows: percents, and of the modalities the main ones."""
    *_, last = name.split("/")
    main = last in ("mIoU", "changed", "drop") or not name.startswith("modalities/")
    return main and last not in ("pixels", "samples", "tolerance", "min_area", "iou", "TP", "FP", "FN")


def comparison(found: Facts) -> list[Section]:
    """What the page of a comparison shows: `found` is compare.json."""
    folders = found["folders"]
    letters = {folder: chr(ord("A") + number) for number, folder in enumerate(folders)}
    names = list(found["scores"][folders[0]])
    rows = [[name, *(_said(found["scores"][folder].get(name)) for folder in folders)] for name in names]
    protocol = found["protocol"]
    which = f"protocol {protocol['name']}, hash {protocol['hash']}" if protocol else "no named protocol"
    about = "\n\n".join(f"{letter}: {folder}" for folder, letter in letters.items())
    text = f"{found['samples']:,} samples, {which}.\n\n{about}"
    parts: list[Section] = [Text("What is compared", text)]
    parts.append(Table("Side by side", ["metric", *letters.values()], rows, POOLED))
    for each in found["differences"]:
        parts += _difference(each, [letters[folder] for folder in each["folders"]], found)
    return parts


def _difference(each: Facts, letters: Sequence[str], found: Facts) -> Iterator[Section]:
    title = f"{letters[0]} - {letters[1]}"
    there = {name: value for name, value in each.items() if name != "folders" and value is not None}
    rows = [
        [name, f"{v['difference']:+.2f}", f"{v['interval'][0]:+.2f} to {v['interval'][1]:+.2f}", f"{v['better']:.1%}"]
        for name, v in there.items()
    ]
    caption = (
        f"Points of percent, with 95 % intervals of {found['draws']:,} paired bootstrap draws of samples; last, the "
        f"share of the draws in which {letters[0]} is higher. Grey in the picture: the interval holds 0."
    )
    yield Table(title, ["metric", "difference", "95 % interval", f"{letters[0]} higher"], rows, caption)
    points = [(name, v["difference"], *v["interval"]) for name, v in there.items()]
    yield Figure(f"{title} in a picture", drawing.intervals(points, f"{title} (points of percent)"), caption)
