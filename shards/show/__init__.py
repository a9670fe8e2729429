"""show: pictures of a dataset where one would rather look than read, and one page that puts them together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.manifest import ManifestError, Selection, read_facts, select
from shards.pictures import png
from shards.report import Section, write_report
from shards.show.atlas import atlas
from shards.show.histograms import histograms
from shards.show.page import Look, sections
from shards.show.sheet import sheet
from shards.show.small import Shown, shrink
from shards.statistics import BandStatistics
from shards.store import open_store
from shards.stream import Share, Stream

SAMPLES, MOST = 24, 400
COLUMNS = ("group", "split", "classes", "valid", "cloud", "times", "shift", "geometry")  # that pages are made of
PAGE = "index.html"
FILES = {"samples": "samples.png", "map": "footprints.png", "histograms": "histograms.png"}
MISSING = {
    "map": "no map: the samples have no CRS, so no place on the ground",
    "histograms": "no histograms: dataset.json holds no statistics",
}


class ShowError(ValueError):
    """Pictures cannot be made or written as asked; the message says what to change."""


def show(
    data: str, out: Path, *, samples: int = SAMPLES, where: Mapping[str, Sequence[Any]] | None = None
) -> tuple[list[Path], list[str]]:
    """Write a contact sheet, a map of the footprints, histograms, and index.html that holds them and tables.

    Args:
        data: dataset folder, local or s3://; also an index over foreign tars.
        out: folder to write into; made where it is absent, files of these names are replaced.
        samples: on the contact sheet, chosen over the whole dataset by a hash of their row: the same every time.
        where: as in `select`; what dataset.json says (histograms, what was left out) is of the whole dataset still.

    Returns:
        The page and the pictures that were made, and why others were not.

    Raises:
        ShowError: `samples` out of range, or a folder that cannot be written.
        ManifestError: there is no dataset, or no sample fits.
        StoreError, StreamError, SceneError: samples cannot be read.
    """
    if not 1 <= samples <= MOST:
        raise ShowError(f"--samples {samples}: a contact sheet holds 1 to {MOST}")
    facts = read_facts(open_store(data))
    selection = select(data, where=where)
    statistics = {name: BandStatistics.from_json(found) for name, found in facts.get("statistics", {}).items()}
    rows = selection.rows(COLUMNS)
    chosen = list(_chosen(selection, samples))
    drawn = {
        "samples": sheet(selection.contract, statistics, chosen),
        "map": atlas(rows),
        "histograms": histograms(selection.contract, statistics),
    }
    pictures = {name: png(figure) for name, figure in drawn.items() if figure is not None}
    missing = {name: MISSING[name] for name in FILES if name not in pictures}
    look = Look(data, facts, selection, rows, where or {}, chosen)
    return _write(out, data, pictures, list(sections(look, pictures, missing))), list(missing.values())


def _chosen(selection: Selection, samples: int) -> Iterator[Shown]:
    few = selection.some(samples)
    rows = few.rows(["group", "split", "cloud", "times", "shift"]).to_pylist()
    for sample, number in Stream(few, 0, 1, Share(1)).once():
        yield shrink(sample, selection.contract, rows[number])


def _write(out: Path, data: str, pictures: Mapping[str, bytes], found: Sequence[Section]) -> list[Path]:
    """All files, each whole or not at all; a picture of an earlier call that this one has not goes."""
    paths = [out / PAGE]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, file in FILES.items():
            if name in pictures:
                temporary = out / f".{file}.{os.getpid()}.tmp"
                temporary.write_bytes(pictures[name])
                os.replace(temporary, out / file)
                paths.append(out / file)
            else:
                (out / file).unlink(missing_ok=True)
        write_report(out / PAGE, found, title=data)
    except OSError as error:
        raise ShowError(f"{out}: cannot be written ({error.strerror}); give another folder as --out") from None
    return paths


def parse_where(settings: Sequence[str]) -> dict[str, list[Any]]:
    """Filters written as `split=train,val` or `labelled=true`, as `select` takes them.

    Raises:
        ManifestError: not written so; unknown columns are refused by `select`.
    """
    found: dict[str, list[Any]] = {}
    for item in settings:
        column, equals, values = item.partition("=")
        if not equals or not values:
            raise ManifestError(f"{item!r}: write a filter as column=value,..., such as split=train,val")
        found[column] = values.split(",")
    if "labelled" in found:
        if not set(found["labelled"]) <= {"true", "false"}:
            raise ManifestError(f"labelled={','.join(found['labelled'])}: write labelled=true or labelled=false")
        found["labelled"] = [value == "true" for value in found["labelled"]]
    return found
