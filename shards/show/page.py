"""The page that puts pictures and tables of a dataset together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shards.manifest import Selection
from shards.report import Figure, Section, Text
from shards.show import tables
from shards.show.small import Shown


@dataclass(frozen=True)
class Look:
    """What is looked at: a dataset by its address, its `dataset.json`, the samples of a filter, and some of them."""

    data: str
    facts: Mapping[str, Any]
    selection: Selection
    rows: pa.Table
    where: Mapping[str, Sequence[Any]]
    chosen: Sequence[Shown]


def sections(look: Look, pictures: Mapping[str, bytes], missing: Mapping[str, str]) -> Iterator[Section]:
    """The sections of the page in their order.

    Args:
        look: what is shown.
        pictures: PNG files by name: `samples`, `map`, `histograms`.
        missing: why one of them was not made.
    """
    rows, contract = look.rows, look.selection.contract
    yield Text("The dataset", _introduction(look))
    for title, name, caption in _captions(look):
        yield Figure(title, pictures[name], caption) if name in pictures else Text(title, f"There is {missing[name]}.")
    yield tables.samples(rows)
    yield from tables.groups(rows)
    yield tables.modalities(rows, contract)
    yield tables.shifts(rows, contract)
    yield tables.clouds(rows)
    labels = [shown.sample.label for shown in look.chosen if shown.sample.label is not None]
    if contract.classes is not None and labels:
        yield tables.classes(rows, contract.classes, labels)
    yield from tables.left_out(look.facts)
    yield tables.archives(look.facts)


def _introduction(look: Look) -> str:
    facts, contract = look.facts, look.selection.contract
    tars = facts.get("shards", {})
    size = sum(tar["bytes"] for tar in tars.values()) / 1e6
    samples = facts.get("samples", len(look.selection))
    said = [f"{look.data}: {samples:,} samples of {', '.join(contract.sensors)} in {len(tars):,} tars, {size:,.1f} MB."]
    if contract.resolution:
        said.append(f"{contract.resolution:g} m per pixel.")
    said.append(f"Encoding: {facts.get('encoding', 'not said')}; written by {facts.get('written_by', 'not said')}.")
    if look.where:
        chosen = ", ".join(f"{column} {' or '.join(map(str, values))}" for column, values in look.where.items())
        said.append(f"\n\nOn this page only those with {chosen}: {len(look.selection):,}.")
    return " ".join(said) + f"\n\nFingerprint {facts['fingerprint']}"


def _captions(look: Look) -> Iterator[tuple[str, str, str]]:
    """Title, name and caption of each picture."""
    selection, lost = look.selection, look.rows["geometry"].null_count
    samples = (
        f"{len(look.chosen)} of {len(selection):,} samples, chosen by a hash of their row. A colour means the same "
        "values in all of them; striped where nothing was measured or labelled."
    )
    yield "Samples", "samples", samples
    where = (
        "Footprints, coloured by split. Where they are too small or too many to be told apart, squares of ground, "
        "each in the colour of one of its samples and more opaque where there are more."
    )
    yield "Where they are", "map", where + f" {lost:,} samples without CRS are not on it." * bool(lost)
    part = (
        "some samples (an index does not read all pixels)"
        if selection.parts[0].foreign
        else "all samples of the dataset"
    )
    yield "Histograms", "histograms", f"How many of the valid pixels have which value, over {part}."
