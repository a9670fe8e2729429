"""What the page of a dataset says in tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.contract import Classes, Contract
from shards.report import Section, Table, Text
from shards.shifts import LIMITS, Shifts

LONGEST = 40  # rows of a table; what is beyond is counted
CLOUDS = np.array([0.0, 0.05, 0.2, 0.5], np.float32)  # upper ends of the classes but the last


def samples(rows: pa.Table) -> Table:
    """Samples per split, how many of them are labelled, and over how many groups they are spread."""
    frame = {"labelled": pc.cast(pc.is_valid(rows["classes"]), pa.int64()), "split": _named(rows["split"])}
    counts = pa.table({**frame, "group": rows["group"]}).group_by("split", use_threads=False)
    found = counts.aggregate([("labelled", "count"), ("labelled", "sum"), ("group", "count_distinct")]).to_pylist()
    body: list[list[object]] = []
    for row in sorted(found, key=lambda row: _place(row["split"])):
        count = row["labelled_count"]
        share = round(100 * count / rows.num_rows, 1)
        body.append([row["split"], count, share, row["labelled_sum"], row["group_count_distinct"]])
    return Table("Samples per split", ["split", "samples", "%", "labelled", "groups"], body)


def _place(split: str) -> tuple[int, str]:
    """By which splits are sorted: the usual ones first."""
    usual = ("train", "val", "test", "buffer")
    return usual.index(split) if split in usual else len(usual), split


def groups(rows: pa.Table) -> Iterator[Table]:
    """Samples per group and split, largest first; nothing where samples have no groups."""
    if rows["group"].null_count == rows.num_rows:
        return
    table = pa.table({"group": _named(rows["group"]), "split": _named(rows["split"])})
    found = table.group_by(["group", "split"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
    counts: dict[str, dict[str, int]] = {}
    for row in found:
        counts.setdefault(row["group"], {})[row["split"]] = row["count_all"]
    splits = sorted({row["split"] for row in found}, key=_place)
    order = sorted(counts, key=lambda group: (-sum(counts[group].values()), group))
    body = [
        [group, sum(counts[group].values()), *(counts[group].get(split, 0) for split in splits)]
        for group in order[:LONGEST]
    ]
    yield Table("Samples per group", ["group", "samples", *splits], body, _rest(len(order), "groups"))


def _named(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(pc.fill_null(column, ""), ""), "(none)", column)


def _rest(count: int, what: str) -> str:
    return f"The {LONGEST} largest of {count} {what}." if count > LONGEST else ""


def modalities(rows: pa.Table, contract: Contract) -> Table:
    """Per modality: what its numbers are, how much of it is valid, and over which time it was acquired."""
    body: list[list[object]] = []
    for modality in contract.modalities:
        name = modality.sensor
        valid = pc.struct_field(rows["valid"], name)
        times = pc.min_max(pc.struct_field(rows["times"], name)).as_py()
        first, last = (f"{time:%Y-%m-%d}" if time else None for time in (times["min"], times["max"]))
        mean = pc.mean(valid).as_py()
        absent = pc.sum(pc.equal(valid, 0)).as_py()
        share = None if mean is None else round(100 * mean, 1)
        kind = f"{modality.dtype}, {modality.unit}" + (f"; {modality.note}" if modality.note else "")
        body.append([name, len(modality.bands), kind, share, absent, first, last])
    columns = ["modality", "bands", "numbers", "valid %", "absent in", "first", "last"]
    caption = "Valid: mean share of valid pixels. A dash: not known, or not measured (an index does not read pixels)."
    return Table("Modalities", columns, body, caption)


def shifts(rows: pa.Table, contract: Contract) -> Section:
    """How far each modality lies off the first one."""
    first, *others = contract.sensors
    found = {name: Shifts.of(rows["shift"], name) for name in others}
    title = "Shifts between modalities"
    if not any(shift.measured for shift in found.values()):
        return Text(title, "None were measured." if others else "There is one modality only.")
    body = [
        [name, shift.measured, *_numbers(shift), *shift.over] for name, shift in found.items()
    ]  # fmt: skip
    columns = ["modality", "measured in", "median px", "90 % within px", "rows", "columns"]
    columns += [f"over {limit} px" for limit in LIMITS]
    caption = f"Against {first}. Rows and columns: the medians, which are common to most samples."
    return Table(title, columns, body, caption)


def _numbers(shift: Shifts) -> list[float | None]:
    return [round(value, 2) if shift.measured else None for value in (shift.median, shift.most, shift.rows, shift.cols)]


def clouds(rows: pa.Table) -> Section:
    """How many samples lie under how much cloud."""
    known = np.asarray(rows["cloud"].drop_null(), np.float32)
    title = "Cloud"
    if not len(known):
        return Text(title, "No cloud fraction is known: the products of this archive have no cloud mask that is read.")
    which = np.searchsorted(CLOUDS, known)  # the first class whose upper end is not exceeded
    counts = np.bincount(which, minlength=len(CLOUDS) + 1)
    ends = [f"{100 * end:.0f} %" for end in (*CLOUDS, 1)]
    names = ["none", *(f"to {end}" for end in ends[1:])]
    body: list[list[object]] = [
        [name, int(count), round(100 * int(count) / len(known), 1)] for name, count in zip(names, counts, strict=True)
    ]
    body += [["not known", rows["cloud"].null_count, None]] * bool(rows["cloud"].null_count)
    caption = f"Share of a sample's valid pixels under cloud, by the product's own mask; {known.mean():.1%} on average."
    return Table(title, ["cloud", "samples", "%"], body, caption)


def classes(rows: pa.Table, names: Classes, labels: Sequence[np.ndarray[Any, Any]]) -> Table:
    """In how many samples of each split a class occurs, and its share of the labelled pixels of some `labels`.

    Args:
        rows: of the manifest.
        names: the classes.
        labels: rasters uint8 [H, W] of the samples that are shown.
    """
    labelled = rows.filter(pc.is_valid(rows["classes"]))
    split = _named(labelled["split"]).combine_chunks()
    lists = labelled["classes"].combine_chunks()
    occurring = pa.table({"class": pc.list_flatten(lists), "split": split.take(pc.list_parent_indices(lists))})
    found = occurring.group_by(["class", "split"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
    counts = {(row["class"], row["split"]): row["count_all"] for row in found}
    splits = sorted({row["split"] for row in found}, key=_place)
    pixels = sum((np.bincount(label.ravel(), minlength=256) for label in labels), np.zeros(256, np.int64))
    pixels = pixels[: len(names.names)]
    body: list[list[object]] = []
    for number, name in enumerate(names.names):
        per_split = [counts.get((number, one), 0) for one in splits]
        share = round(100 * sum(per_split) / max(1, labelled.num_rows), 1)
        body.append([name, *per_split, share, round(100 * float(pixels[number]) / max(1, pixels.sum()), 1)])
    columns = ["class", *(f"{one} samples" for one in splits), "% of labelled samples", "% of pixels shown"]
    caption = (
        f"{labelled.num_rows:,} labelled samples; a sample counts for every class in it. Pixels: of the "
        f"{len(labels)} labels on the contact sheet only."
    )
    return Table("Classes", columns, body, caption)


def left_out(facts: Mapping[str, Any]) -> Iterator[Section]:
    """What is not in the dataset, and why."""
    examples = facts.get("left_out_examples", {})
    counts = sorted(facts.get("left_out", {}).items(), key=lambda item: -item[1])
    body = [[reason, count, ", ".join(examples.get(reason, [])[:3]) or None] for reason, count in counts]
    planned, there = facts.get("planned"), facts.get("samples")
    caption = f"{there:,} of {planned:,} planned samples are in the dataset." if planned and there else ""
    if body:
        yield Table("Left out, and why", ["reason", "how many", "such as"], body[:LONGEST], caption)
    else:
        yield Text("Left out, and why", f"Nothing was left out. {caption}")
    if skipped := facts.get("skipped", []):
        caption = _rest(len(skipped), "problems").replace("largest", "first")
        yield Table("Skipped", ["problem"], [[problem] for problem in skipped[:LONGEST]], caption)


def archives(facts: Mapping[str, Any]) -> Table:
    """Where the data come from and under which licence; a dataset that has grown may have several."""
    found = [build["archive"] for build in facts.get("builds", {}).values()] or [facts.get("archive", {})]
    fields = ("title", "licence", "attribution", "source", "name")
    distinct = list(dict.fromkeys(tuple(archive.get(field) or None for field in fields) for archive in found))
    names = ["archive", "licence", "attribution", "source", "layout"]
    body = [[name, *(archive[number] or "not said" for archive in distinct)] for number, name in enumerate(names)]
    return Table("Licence and attribution", ["", *([""] * len(distinct))], body)
