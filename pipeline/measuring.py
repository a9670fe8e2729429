"""All that an evaluation counts, in one pass over its samples: each is read once and shown to the model several times.

Whatever is counted is an integer, and is added up over samples, batches and ranks: sums of integers do not depend on
their order, so neither do the numbers on how many ranks took part. What grows with the samples is one confusion matrix
for each, which is what comparisons resample.

Letters: B batch, H W pixels, K classes, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch
from pipeline.boundaries import boundary_counts
from pipeline.calibration import BINS, reliability
from pipeline.dataset import micro_batches, read_ahead
from pipeline.evaluate_config import EvaluateConfig
from pipeline.instances import BUILDING, Outlines, buildings, matched, origin
from pipeline.metrics import (
    Numbers,
    confusion_matrices,
    confusion_matrix,
    intersection_over_union,
    mean_over_classes,
    percent,
    scores,
)
from pipeline.ranks import Ranks
from pipeline.scoring import classify
from shards.contract import Contract, ContractError
from shards.manifest import Selection
from shards.stream import Share, Stream

SILENT = 0.001  # share of the pixels whose class must change without a modality, or it counts as not used

Counts = dict[str, NDArray[np.int64]]
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Pass:
    """What is counted of which samples.

    Attributes:
        selection: labelled samples.
        contract: how to normalise them, and the classes.
        config: which measures are wanted.
        folder: where outlines of buildings are written, one part for each rank.
    """

    selection: Selection
    contract: Contract
    config: EvaluateConfig
    folder: Path

    @property
    def classes(self) -> int:
        """K."""
        return len(self.contract.classes.names) if self.contract.classes else 0

    @property
    def ignore(self) -> int:
        """The label of pixels that count nowhere."""
        return self.contract.classes.ignore if self.contract.classes else -1

    @property
    def outlined(self) -> bool:
        """Whether predictions may be buildings; the samples say whether they have true ones."""
        return self.classes == 2

    @property
    def views(self) -> dict[str, tuple[str, ...]]:
        """What is hidden in each view beside that of all modalities: every one alone, and all but one.

        Of two modalities these are the same, named by the one that is seen.
        """
        names = self.contract.sensors
        if not self.config.modalities or len(names) < 2:
            return {}
        alone = {name: tuple(other for other in names if other != name) for name in names}
        return alone if len(names) == 2 else {**alone, **{without(name): (name,) for name in names}}

    def hiding(self, name: str) -> str:
        """The view in which this modality alone is hidden."""
        return next(view for view, hidden in self.views.items() if hidden == (name,))


def without(name: str) -> str:
    """What the view of all modalities but one is called."""
    return f"without {name}"


@torch.no_grad()
def measure(model: Model, over: Pass, ranks: Ranks, device: torch.device) -> Counts:
    """Count over all samples. Collective; each sample is measured by one rank, and all ranks get the sums.

    Returns:
        `samples` [N, K, K] confusion matrices in the selection's order (rows: truth); `reliability` [15, 3];
        `boundary` [K, 4]; `instances` [4] (found, wrong, missed, samples that have instances); for each view
        `view/NAME` [K, K] and `changed/NAME` [], the labelled pixels whose class is another than with all modalities;
        and `there` [modalities], the samples with a valid pixel of each.

    Raises:
        ContractError: a sample without a label, or with codes that are no class.
    """
    kinds, count = over.classes, len(over.selection)
    shapes: dict[str, tuple[int, ...]] = {"samples": (count, kinds, kinds), "reliability": (BINS, 3)}
    shapes |= {"boundary": (kinds, 4), "instances": (4,), "there": (len(over.contract.sensors),)}
    for view in over.views:
        shapes |= {f"view/{view}": (kinds, kinds), f"changed/{view}": ()}
    counts = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
    stream = Stream(over.selection, 0, 1, Share(ranks.world, ranks.world, ranks.rank))
    batches = micro_batches(stream.once(), over.config.micro_batch, over.contract)
    with closing(Outlines(over.folder, ranks.rank)) if over.outlined else nullcontext() as outlines:
        for batch in read_ahead(batches):
            _count(counts, model, batch.to(device), over, outlines)
    for tensor in counts.values():
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(tensor)
    return {name: tensor.cpu().numpy() for name, tensor in counts.items()}


def _count(counts: dict[str, Tensor], model: Model, batch: Batch, over: Pass, outlines: Outlines | None) -> None:
    """Add one batch."""
    if batch.label is None:
        raise ContractError(f"samples without a label among {', '.join(batch.keys)}; write where.labelled=[true]")
    label, kinds, ignore = batch.label, over.classes, over.ignore
    shares = classify(model, batch).float().softmax(1)
    predicted = shares.argmax(1)
    counts["samples"][batch.positions] = confusion_matrices(predicted, label, kinds, ignore)
    counts["reliability"] += reliability(shares, label, ignore)
    counts["there"] += torch.stack([batch.valid[name].flatten(1).any(1).sum() for name in over.contract.sensors])
    if over.config.boundary:
        counts["boundary"] += boundary_counts(predicted, label, kinds, ignore, over.config.boundary)
    for view, hidden in over.views.items():
        seen = classify(model, batch, hidden).argmax(1)
        counts[f"view/{view}"] += confusion_matrix(seen, label, kinds, ignore)
        counts[f"changed/{view}"] += ((seen != predicted) & (label != ignore)).sum()
    if outlines is not None and batch.instances is not None:
        found = _instances(batch, predicted == BUILDING, shares[:, BUILDING], over, outlines)
        counts["instances"] += torch.tensor(found, device=counts["instances"].device)


def _instances(batch: Batch, mask: Tensor, shares: Tensor, over: Pass, outlines: Outlines) -> list[int]:
    """Found, wrong and missed buildings of a batch, and its samples; outlines are written as the images lie."""
    assert batch.label is not None and batch.instances is not None
    total = np.zeros(4, np.int64)
    seen = batch.label != over.ignore
    images = [each.cpu().numpy() for each in (mask & seen, shares.float(), seen)]
    for b, (key, facts) in enumerate(zip(batch.keys, batch.facts, strict=True)):
        turn = slice(None, None, -1 if facts.get("orientation") == 1 else 1)  # what `upright` has done, undone
        here, probability, labelled, truth = (image[b][turn, turn] for image in (*images, batch.instances.numpy()))
        image, corner = origin(key, facts)
        found, numbers = buildings(here, probability, over.config.min_area, corner)
        outlines.add(int(batch.positions[b]), image, found)
        total += (*matched(numbers, np.where(labelled, truth, 0)), 1)
    return [int(count) for count in total]


def modality_matrix(counts: Mapping[str, NDArray[np.int64]], over: Pass) -> dict[str, Any]:
    """What each modality is worth: `alone` and `without` by name; the scores of all but one are those of the other two.

    Per modality `alone`: scores with it alone; `without`: scores with it hidden; `changed`: percent of the labelled
    pixels whose class changes when it is hidden; `drop`: points of mIoU that are lost then; `samples`: how many have a
    valid pixel of it.
    """
    names = over.contract.classes.names if over.contract.classes else ()
    pooled = counts["samples"].sum(0)
    all_together = scores(pooled, names)["mIoU"]
    found = {}
    for number, name in enumerate(over.contract.sensors if over.views else ()):
        view = over.hiding(name)
        hidden = scores(counts[f"view/{view}"], names)
        found[name] = {
            "alone": _main(scores(counts[f"view/{name}"], names)),
            "without": _main(hidden),
            "changed": percent(counts[f"changed/{view}"] / pooled.sum()),
            "drop": _difference(all_together, hidden["mIoU"]),
            "samples": int(counts["there"][number]),
        }
    return found


def unused(counts: Mapping[str, NDArray[np.int64]], over: Pass) -> list[str]:
    """A warning for each modality that changes the class of next to no pixel."""
    found = []
    pixels = int(counts["samples"].sum())
    for number, name in enumerate(over.contract.sensors if over.views else ()):
        changed, there = int(counts[f"changed/{over.hiding(name)}"]), int(counts["there"][number])
        if changed < SILENT * pixels:
            why = f"it is valid in {there} of {len(over.selection)} samples"
            found.append(
                f"modality {name} is not used: without it {changed:,} of {pixels:,} labelled pixels get another class "
                f"({why}); a result of this checkpoint is not one of {' and '.join(over.contract.sensors)}"
            )
    return found


def _main(found: Numbers) -> Numbers:
    return {name: value for name, value in found.items() if "/" not in name and name not in ("pixels", "absent")}


def _difference(one: Any, other: Any) -> float | None:
    return None if one is None or other is None else round(one - other, 2)


def mean_iou_by_sample(samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each sample by itself, over the classes that it has, 0 to 1: [N, K, K] -> [N]; NaN where unlabelled."""
    return mean_over_classes(intersection_over_union(samples))


def picked(samples: NDArray[np.int64], count: int) -> list[tuple[str, int, float]]:
    """The `count` samples to look at, worst to best: what each is, its number and its mIoU, 0 to 1."""
    values = mean_iou_by_sample(samples)
    order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())].tolist()
    each, rest = divmod(min(count, len(order)), 3)
    worst, middle = each + (rest > 0), each + (rest > 1)
    start = max(worst, (len(order) - middle) // 2)
    parts: dict[str, Collection[int]] = {"worst": order[:worst], "median": order[start : start + middle]}
    parts["best"] = order[len(order) - each :] if each else ()
    return [(kind, number, float(values[number])) for kind, numbers in parts.items() for number in numbers]


@torch.no_grad()
def look(model: Model, over: Pass, numbers: Sequence[int], device: torch.device) -> tuple[list[Batch], list[Any]]:
    """These samples as the model saw them, and its class of each pixel [H, W]; not collective."""
    stream = Stream(over.selection, 0, 1, Share(1))
    batches = list(micro_batches(((stream.row(number), number) for number in numbers), 1, over.contract))
    return batches, [classify(model, batch.to(device)).argmax(1)[0].cpu().numpy() for batch in batches]
