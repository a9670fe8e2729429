"""The leak certificate: how much of a test set's ground the parameters have seen in training, and what is not known.

Every training that the parameters went through is looked up in the checkpoint's lineage, its samples are chosen once
more by the same rules, and their footprints are laid over the test's. What cannot be looked up is unknown, never clean:
files without georeference, datasets that are gone or have changed, trainings that were not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from pipeline.checkpoint import Checkpoint
from pipeline.config import ProtocolChoice
from pipeline.protocols import samples
from pipeline.provenance import lineage
from shards.ground import Ints
from shards.manifest import ManifestError, Selection, select
from shards.overlap import Geometries, shared, square_km

NAMED = "named"  # stage of datasets that were given by hand
NO_GROUND = "have no georeference"

Record = Mapping[str, Any]


class _UnknownError(ValueError):
    """What a training has seen cannot be told; the message says why."""


def certificate(test: Selection, checkpoint: Checkpoint, trained_on: Sequence[str] = ()) -> dict[str, Any]:
    """Lay the footprints of a test set over those of all samples that a checkpoint was trained and validated on.

    Of a training that took a share of its samples (`fraction`, `limit`), all that it chose from are looked at.

    Args:
        test: what is to be scored.
        checkpoint: its record says what its parameters have seen.
        trained_on: further datasets that they have seen, of which all samples count.

    Returns:
        In JSON's types, `test`: samples, those `located` on the ground, `km2`. `trainings`, each with stage, role
        (train or val), data, protocol, samples, located; test samples `overlapping` or `adjoining` its ground (less
        than a metre away), `km2` that both show, test samples that have `same_keys`; and `unknown`, the reason why the
        ground is not known, in which case what was not counted is None. `verdict`: "overlap" where test ground or keys
        were seen, else "unknown" where anything is, else "none".
    """
    ground = _Ground.of(test)
    found = [training for record in _records(checkpoint, trained_on) for training in _trainings(record, ground)]
    return {
        "test": {"samples": ground.samples, "located": ground.located, "km2": round(square_km(ground.footprints), 3)},
        "trainings": found,
        "verdict": _verdict(found, ground),
    }


def _verdict(found: Sequence[Record], ground: _Ground) -> str:
    if any(training["overlapping"] or training["same_keys"] for training in found):
        return "overlap"
    partly = any(training["unknown"] or training["located"] != training["samples"] for training in found)
    return "unknown" if partly or ground.located < ground.samples else "none"


@dataclass(frozen=True)
class _Ground:
    """Keys of a test set, its different footprints, and which of them each sample has (-1: none)."""

    keys: pa.Array
    footprints: Geometries
    number: Ints

    @staticmethod
    def of(test: Selection) -> _Ground:
        rows = test.rows(["key", "geometry"])
        encoded = pc.dictionary_encode(rows["geometry"].combine_chunks())
        number = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return _Ground(rows["key"].combine_chunks(), _polygons(encoded.dictionary), number)

    @property
    def samples(self) -> int:
        return len(self.number)

    @property
    def located(self) -> int:
        return int((self.number >= 0).sum())

    def count(self, which: NDArray[np.bool_]) -> int:
        """Samples whose footprints are among these."""
        return int(which[self.number[self.number >= 0]].sum())


def _records(checkpoint: Checkpoint, trained_on: Sequence[str]) -> Iterator[Record]:
    """The lineage, with a gap where it must have one, and the datasets that were named."""
    known = lineage(checkpoint.facts)
    config = checkpoint.facts.get("config") or {}
    if not known or (len(known) == 1 and (config.get("checkpoint") or config.get("start"))):
        yield {}  # parameters come from somewhere, and a run that starts from another has at least two trainings
    for number, record in enumerate(known):
        own = config if number == len(known) - 1 else {}
        yield {**record, "val_where": own.get("val_where"), "validated": own.get("validate_every", True)}
    yield from ({"stage": NAMED, "data": data, "datasets": None} for data in trained_on)


def _trainings(record: Record, ground: _Ground) -> Iterator[dict[str, Any]]:
    """What is known of one training: of the samples it trained on, and of those it was validated on."""
    protocol = (record.get("protocol") or {}).get("name")
    base = {"stage": record.get("stage"), "data": record.get("data"), "protocol": protocol}
    numbers = ("samples", "located", "overlapping", "adjoining", "km2", "same_keys")
    role = "train"
    try:
        for role, selection in _selections(record):
            yield {**base, "role": role, **_compared(selection, ground)}
            role = "val"
    except (ValueError, OSError) as error:
        yield {**base, "role": role, **dict.fromkeys(numbers), "unknown": str(error)}


def _selections(record: Record) -> Iterator[tuple[str, Selection]]:
    """The samples of a training by role, chosen anew.

    Raises:
        _UnknownError, ValueError, StoreError: they cannot be.
    """
    stage, data = record.get("stage"), record.get("data")
    if stage is None or not data:
        raise _UnknownError("the training was not recorded (weights from elsewhere, or of an older version); name what "
                            "it has seen: trained_on=[DATA]")  # fmt: skip
    if stage == NAMED:
        yield "train", select(data)
        return
    if stage == "pretrain":
        found = select(data, modalities=record["sensors"], where=record["where"])
        _check_unchanged(record, found)
        yield "train", found
        return
    choice, sensors = ProtocolChoice(**(record.get("protocol") or {})), record["sensors"]
    found = samples(choice, data, "train", sensors=sensors, where=record["where"])
    _check_unchanged(record, found)
    yield "train", found
    if not record.get("validated"):
        return
    default = {} if choice.name else {"split": ["val"]}
    where = default if record.get("val_where") is None else record["val_where"]
    if choice.name or record.get("val_where") is not None or _has_val(data):
        yield "val", samples(choice, data, "val", sensors=sensors, where=where)


def _has_val(data: str | Mapping[str, int]) -> bool:
    try:
        select(data, where={"split": ["val"], "labelled": [True]})
    except ManifestError:
        return False
    return True


def _check_unchanged(record: Record, found: Selection) -> None:
    """Refuse a dataset that is another than was trained on."""
    then, now = record.get("datasets"), [part.identity["dataset"] for part in found.parts]
    same = then == now if then else record["fingerprint"] == found.fingerprint
    if not same:
        data = record["data"] if isinstance(record["data"], str) else ", ".join(record["data"])
        raise _UnknownError(f"{data} has changed since that training")


@dataclass
class _Seen:
    """Counts over the samples of a training while they are streamed."""

    samples: int = 0
    located: int = 0
    keys: set[str] = field(default_factory=set)
    footprints: set[int] = field(default_factory=set)  # hashes, so that one shown on many dates is looked at once


def _compared(selection: Selection, ground: _Ground) -> dict[str, Any]:
    seen = _Seen()
    found = shared(ground.footprints, _footprints(selection, ground.keys, seen))
    facts = {"samples": seen.samples, "located": seen.located, "same_keys": len(seen.keys)}
    if not ground.located or not seen.located:
        whose = "the test's files" if not ground.located else "the training's files"
        return {**facts, **dict.fromkeys(("overlapping", "adjoining", "km2")), "unknown": f"{whose} {NO_GROUND}"}
    counts = {name: ground.count(getattr(found, name)) for name in ("overlapping", "adjoining")}
    return {**facts, **counts, "km2": round(found.km2, 3), "unknown": None}


def _footprints(selection: Selection, keys: pa.Array, seen: _Seen) -> Iterator[Geometries]:
    """Different footprints of a selection in batches; counts samples, and which of `keys` are among them."""
    for part in selection.parts:
        first = 0
        for batch in part.table.scan(["key", "geometry"]):
            rows = batch
            if part.chosen is not None:
                inside = np.searchsorted(part.chosen, [first, first + batch.num_rows])
                rows = batch.take(pa.array(part.chosen[slice(*inside)] - first))
            first += batch.num_rows
            seen.samples += rows.num_rows
            seen.keys.update(rows["key"].filter(pc.is_in(rows["key"], value_set=keys)).to_pylist())
            located = rows["geometry"].drop_null()
            seen.located += len(located)
            yield _polygons(_new(located, seen.footprints))


def _new(column: pa.Array, seen: set[int]) -> pa.Array:
    """Different values that were not seen before."""
    distinct = pc.unique(column)
    hashes = [hash(value) for value in distinct.to_pylist()]
    fresh = [number for number, value in enumerate(hashes) if value not in seen]
    seen.update(hashes)
    return distinct.take(pa.array(fresh, pa.int64()))


def _polygons(column: pa.Array) -> Geometries:
    return np.asarray(shapely.from_wkb(column.to_numpy(zero_copy_only=False)), np.object_)


def in_words(found: Record) -> list[str]:
    """A certificate for people, a sentence or two per line."""
    test = found["test"]
    lines = [
        {
            "overlap": "The test set is not unseen: its ground or its samples were trained or validated on.",
            "unknown": "It is not known whether the test set's ground was trained on.",
            "none": "No ground of the test set was trained or validated on, as far as the record goes.",
        }[found["verdict"]],
        f"Test: {test['samples']:,} samples on {test['km2']:,} km2."
        + (f" {test['samples'] - test['located']:,} {NO_GROUND}." if test["located"] < test["samples"] else ""),
    ]
    return lines + [_line(training, test) for training in found["trainings"]]


def _line(training: Record, test: Record) -> str:
    data = training["data"] if isinstance(training["data"], str) else ", ".join(training["data"] or ())
    title = " ".join(filter(None, [training["stage"] or "A training", training["role"], data and f"on {data}"]))
    title += f" by {training['protocol']}" if training["protocol"] else ""
    keys = ""
    if training["same_keys"] is not None:
        keys = f"{training['same_keys']:,} of {test['samples']:,} test samples are in it by their keys."
    if training["unknown"]:
        return f"{title}: unknown: {training['unknown']}. {keys}".rstrip()
    lost = training["samples"] - training["located"]
    return (
        f"{title} ({training['samples']:,} samples{f', {lost:,} of them without georeference' if lost else ''}): "
        f"{training['overlapping']:,} of {test['samples']:,} test samples overlap it ({training['km2']:,} km2), "
        f"{training['adjoining']:,} more adjoin it. {keys}"
    )
