"""What a protocol is: everything that a number depends on beside the model, under a name, a version and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.protocols.splits import Ids, Rule

Codes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How labels become classes.

    Attributes:
        names: of the classes, in the order of their indices.
        codes: of the label rasters, a tuple per class; empty where labels are polygons (outside, inside).
        ignored: codes whose pixels count nowhere. Other codes stop a build.
        min_area: polygons under so many square metres are no labels.
    """

    names: tuple[str, ...]
    codes: Codes = ()
    ignored: tuple[int, ...] = ()
    min_area: float = 0


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to train and test on a benchmark.

    Attributes:
        name: BENCHMARK/SPLIT.
        version: raised with every change of a rule; numbers of two versions are not comparable.
        archive: layout that the dataset must have been built from.
        inputs: bands of each sensor that may be shown to the model, in their order.
        labels: label map and ignore rule.
        split: which places train, validate and test.
        tile: pixels on a side of a sample.
        metrics: that are reported, by their names in metrics.json.
        sizes: places of a role, or of `all` roles together, in the complete dataset; roles of unknown size are absent.
    """

    name: str
    version: int
    archive: str
    inputs: Mapping[str, tuple[str, ...]]
    labels: Labels
    split: Rule
    tile: int
    metrics: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def hash(self, ids: Ids | None = None) -> str:
        """sha256 of the canonical JSON of all but `sizes`, and of the user's ids where the split reads lists."""
        rules: dict[str, Any] = {**asdict(self), "split": {"rule": type(self.split).__name__, **asdict(self.split)}}
        del rules["sizes"]  # what follows from the rules, to check with
        if ids is not None:
            rules["ids"] = {role: sorted(names) for role, names in ids.items()}
        return hashlib.sha256(json.dumps(rules, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
