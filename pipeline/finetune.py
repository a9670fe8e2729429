"""Stage finetune: semantic segmentation with MCF-Mamba, from pretrained parameters or from scratch.

The loss of a sample is cross entropy + Dice, 1:1 (Liu et al. 2025, section 4.2), both over its labelled pixels only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from configs import ConfigError
from pipeline.augment import augmentation
from pipeline.batch import Batch, drop_modality
from pipeline.dataset import training_batches
from pipeline.engine import Engine
from pipeline.finetune_config import FinetuneConfig
from pipeline.loop import Hook, Losses, Objective, train
from pipeline.metrics import scores
from pipeline.model.cmss import hidden_tokens
from pipeline.model.keyed import hash64
from pipeline.observing import observed
from pipeline.ranks import Ranks, from_environment, init
from pipeline.rollback import until_done
from pipeline.run import Run, build_engine, build_model, open_run
from pipeline.scoring import confusion
from shards.manifest import Selection, select
from shards.order import Use
from shards.stream import Share, Stream

HEAD = "head."


def finetune(config: FinetuneConfig) -> Path:
    """Finetune as configured; an unfinished run goes on. Collective over the ranks of the environment.

    Returns:
        The run folder.

    Raises:
        Stopped: a signal asked for it, after saving.
        ValueError: config, data and what is in the run folder do not fit; the message says how.
        NotTraining: losses or gradients are not finite, also after going back and on past their data.
    """
    ranks = from_environment()
    init(ranks)
    return until_done(lambda config: _finetune(config, ranks), config, ranks.rank)


def _finetune(config: FinetuneConfig, ranks: Ranks) -> Path:
    selection = labelled(config)
    run, start = open_run(config, selection, ranks, config.checkpoint)
    if start.step == config.steps:
        return run.folder
    classes = selection.contract.classes
    if classes is None:
        raise ConfigError(f"data: {config.data} has no classes; finetuning needs labelled samples")
    engine = build_engine(run, start, build_model(run, start, len(classes.names), new=HEAD))
    share = Share(config.batch.global_batch, ranks.world, ranks.rank)
    stream = Stream(selection, config.seed, config.lanes, share, start.step * config.batch.global_batch, config.reading)
    inputs = run.contract.restrict(selection.contract.sensors)
    batches = training_batches(stream, engine.micro_batch, inputs, augmentation(config), config.reading.threads)
    hooks = observed(run, engine, stream, start.step, [validation(run, engine, config)])
    train(run, engine, objective(classes.ignore, config.seed, config.modality_dropout), batches, start.step, hooks)
    return run.folder


def labelled(config: FinetuneConfig) -> Selection:
    """The labelled samples to train on: `fraction` or `limit` of those that `where` allows, chosen by the seed.

    Raises:
        ManifestError: there is none.
        ConfigError: `fraction` or `limit` with several datasets.
    """
    where = {**config.where, "labelled": [True]}
    everything = select(config.data, modalities=config.sensors, where=where)
    count = max(1, round(config.fraction * len(everything)))
    count = min(count, config.limit or count)
    if count == len(everything):
        return everything
    if len(everything.parts) > 1:
        raise ConfigError("fraction, limit: they choose among the samples of one dataset; data names several")
    return everything.some(count, config.seed)


def objective(ignore: int, seed: int, modality_dropout: float = 0.0) -> Objective:
    """Cross entropy + Dice of a batch, per sample."""

    def losses(model: Callable[..., Tensor], batch: Batch) -> Losses:
        if batch.label is None:
            raise ConfigError(f"no label in some of {', '.join(batch.keys)}")
        keys = hash64(seed, batch.positions, int(Use.DROP_PATH))
        dropped = drop_modality(batch, seed, modality_dropout)
        logits = model(batch.values, hidden_tokens({}, batch.valid, dropped), keys)
        parts = {"ce": cross_entropy(logits, batch.label, ignore), "dice": dice(logits, batch.label, ignore)}
        return Losses(parts["ce"] + parts["dice"], parts)

    return losses


def cross_entropy(logits: Tensor, label: Tensor, ignore: int) -> Tensor:
    """Mean over each sample's labelled pixels: logits [B, K, H, W], label [B, H, W] -> [B]; 0 without labels."""
    pixels = F.cross_entropy(logits.float(), label, ignore_index=ignore, reduction="none")  # [B, H, W]
    return pixels.sum((1, 2)) / (label != ignore).sum((1, 2)).clamp(min=1)


def dice(logits: Tensor, label: Tensor, ignore: int) -> Tensor:
    """1 - soft Dice, mean over the classes that occur in a sample: [B, K, H, W], [B, H, W] -> [B]; 0 without labels.

    Dice of a class is 2 sum(p y) / sum(p + y) over labelled pixels (Milletari, Navab & Ahmadi 2016, V-Net, with plain
    sums as in the paper's code).
    """
    counted = (label != ignore)[:, None]  # [B, 1, H, W]
    shares = logits.float().softmax(1) * counted
    truth = F.one_hot(label.masked_fill(label == ignore, 0), logits.shape[1]).permute(0, 3, 1, 2) * counted
    overlap, mass = (shares * truth).sum((2, 3)), (shares + truth).sum((2, 3))  # [B, K]
    occurs = truth.sum((2, 3)) > 0
    losses = (1 - 2 * overlap / mass.clamp(min=1e-7)) * occurs
    return losses.sum(1) / occurs.sum(1).clamp(min=1)


def validation(run: Run, engine: Engine, config: FinetuneConfig) -> Hook:
    """A hook that scores the validation samples every `validate_every` steps and at the end; nothing if that is 0."""
    if not config.validate_every:
        return lambda numbers: {}
    where = {**config.val_where, "labelled": [True]}
    selection = select(config.data, modalities=config.sensors, where=where)
    inputs = run.contract.restrict(selection.contract.sensors)

    def score(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        if numbers["step"] % config.validate_every and numbers["step"] != config.steps:
            return {}
        matrix = confusion(engine, selection, inputs, engine.micro_batch, run.ranks, engine.device)
        names = run.contract.classes.names if run.contract.classes else ()
        return {f"val/{name}": value for name, value in scores(matrix, names).items()}

    return score
