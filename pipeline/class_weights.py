"""Weights of the classes in the cross entropy."""

from __future__ import annotations

import json

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import ConfigError
from pipeline.finetune_config import FinetuneConfig
from pipeline.ranks import Ranks, added_up, share
from pipeline.run import Run
from shards.contract import Classes
from shards.manifest import Selection
from shards.stream import Share, Stream

COUNTS = "class-pixels.json"  # beside the checkpoints
CODES = 256


def class_weights(config: FinetuneConfig, run: Run, selection: Selection, classes: Classes) -> Tensor | None:
    """One weight per class, float32 [K]; None where all are 1. Collective.

    "balanced" is n / (K n_k), with n_k of n labelled pixels in class k and K classes that occur (King & Zeng 2001).
    Over the pixels of the selection the mean weight is 1, so that cross entropy and Dice keep their proportion.

    Raises:
        ConfigError: another number of weights than of classes.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        counts = _known(run, selection)[: len(classes.names)]
        occurs = counts > 0
        weights = np.divide(counts.sum(), occurs.sum() * counts, out=np.zeros(len(counts)), where=occurs)
        return torch.from_numpy(weights).float()
    if len(config.class_weights) != len(classes.names):
        raise ConfigError(
            f"class_weights: {len(config.class_weights)} numbers given; the data have {len(classes.names)} classes: "
            f"{', '.join(classes.names)}"
        )
    return torch.tensor(config.class_weights)


def _known(run: Run, selection: Selection) -> NDArray[np.float64]:
    """Pixels by label code, counted when the run begins and kept beside its checkpoints. Collective."""
    text = run.store.get(COUNTS) if run.ranks.rank == 0 and run.store.exists(COUNTS) else b"{}"
    kept = share(json.loads(text))
    if kept.get("fingerprint") == selection.fingerprint:
        return np.array(kept["pixels"], np.float64)
    counts = count_pixels(selection, run.ranks)
    if run.ranks.rank == 0:
        record = {"fingerprint": selection.fingerprint, "pixels": counts.astype(int).tolist()}
        run.store.put(COUNTS, json.dumps(record).encode())
    return counts


def count_pixels(selection: Selection, ranks: Ranks) -> NDArray[np.float64]:
    """Pixels by label code, [256], over whole samples, each read by one rank. Collective."""
    stream = Stream(selection, 0, 1, Share(ranks.world, ranks.world, ranks.rank))
    counts = np.zeros(CODES)
    for sample, _ in stream.once():
        if sample.label is not None:
            counts += np.bincount(sample.label.ravel(), minlength=CODES)
    stream.close()
    return np.array(list(added_up({str(code): count for code, count in enumerate(counts.tolist())}).values()))
