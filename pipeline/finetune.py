"""Stage finetune: semantic segmentation with MCF-Mamba, from pretrained parameters or from scratch.

The loss of a sample is cross entropy + Dice, 1:1 (Liu et al. 2025, section 4.2), both over its labelled pixels only.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from configs import ConfigError
from pipeline.augment import augmentation
from pipeline.batch import Batch, drop_modality
from pipeline.class_weights import class_weights
from pipeline.dataset import training_batches
from pipeline.engine import Engine
from pipeline.finetune_config import FinetuneConfig, resolved
from pipeline.loop import Hook, Losses, Objective, train
from pipeline.metrics import scores
from pipeline.model.cmss import hidden_tokens
from pipeline.model.keyed import hash64
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.ss2d import DropPath
from pipeline.observing import observed
from pipeline.protocols import samples
from pipeline.ranks import Ranks, from_environment, init
from pipeline.rollback import until_done
from pipeline.run import Run, Start, build_engine, build_model, open_run
from pipeline.scoring import confusion
from pipeline.seeds import per_seed, summarise
from pipeline.stratified import stratified
from shards.manifest import Selection
from shards.order import Use
from shards.stream import Share, Stream

HEAD = "head."


def finetune(config: FinetuneConfig) -> Path:
    """Finetune as configured; an unfinished run goes on. Collective over the ranks of the environment.

    Returns:
        The run folder; with `seeds`, the one that holds their runs.

    Raises:
        Stopped: a signal asked for it, after saving.
        ValueError: config, data and what is in the run folder do not fit; the message says how.
        NotTraining: losses or gradients are not finite, also after going back and on past their data.
    """
    ranks = from_environment()
    init(ranks)
    for each in per_seed(config):
        until_done(lambda config: _finetune(config, ranks), each, ranks.rank)
        if config.seeds:
            gc.collect()  # its engine, before another is built
    if config.seeds and ranks.rank == 0:
        print("\n".join(summarise(config)), file=sys.stderr)
    return Path(config.run)


def _finetune(config: FinetuneConfig, ranks: Ranks) -> Path:
    selection = labelled(config)
    config = resolved(config, len(selection))
    classes = selection.contract.classes
    if classes is None:
        raise ConfigError(f"data: {config.data} has no classes; finetuning needs labelled samples")
    run, start = open_run(config, selection, ranks, config.checkpoint, config.adapt)
    if start.finished(config):
        return run.folder
    weights = class_weights(config, run, selection, classes)
    model = build_model(run, start, len(classes.names), new=HEAD)
    if config.freeze == "encoders":
        freeze(model, start)
    engine = build_engine(run, start, model)
    share = Share(config.batch.global_batch, ranks.world, ranks.rank)
    stream = Stream(selection, config.seed, config.lanes, share, start.step * config.batch.global_batch, config.reading)
    inputs = run.contract.restrict(selection.contract.sensors)
    batches = training_batches(stream, engine.micro_batch, inputs, augmentation(config), config.reading.threads)
    hooks = observed(run, engine, stream, start.step, [validation(run, engine, config)])
    losses = objective(classes.ignore, config.seed, config.modality_dropout, weights)
    train(run, engine, losses, batches, start.step, hooks)
    return run.folder


def labelled(config: FinetuneConfig) -> Selection:
    """The labelled samples to train on: `fraction` or `limit` of those that protocol and `where` allow.

    Chosen by the seed, so that the classes are mixed as in all of them (`pipeline.stratified`).

    Raises:
        ManifestError: there is none.
        ConfigError: `fraction` or `limit` with several datasets.
    """
    everything = samples(config.protocol, config.data, "train", sensors=config.sensors, where=config.where)
    if config.fraction == 1 and config.limit is None:
        return everything
    if len(everything.parts) > 1:
        raise ConfigError("fraction, limit: they choose among the samples of one dataset; data names several")
    count = max(1, round(config.fraction * len(everything)))
    chosen = stratified(everything, min(count, config.limit or count), config.seed)
    return everything.only(chosen, fraction=config.fraction, limit=config.limit, seed=config.seed)


def freeze(model: MCFMamba, start: Start) -> None:
    """Keep the encoders as the checkpoint has them: no gradient, no state of the optimiser, no drop path.

    Their norms are layer norms, which remember nothing of a batch.

    Raises:
        ConfigError: an encoder does not come from the checkpoint, and would stay as it was drawn.
    """
    change = start.adaptation
    if change and (drawn := [name for name in change.contract.sensors if name not in change.begun]):
        raise ConfigError(
            f"freeze=encoders: the checkpoint has no encoder for {', '.join(drawn)}, which must be trained; write "
            f"freeze=none, or adapt={{{drawn[0]}: ONE OF {', '.join(change.known.sensors)}}}"
        )
    model.encoders.requires_grad_(False)
    for module in model.encoders.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0


def objective(ignore: int, seed: int, modality_dropout: float = 0.0, weights: Tensor | None = None) -> Objective:
    """Cross entropy, its pixels weighted by class where there are weights [K], + Dice of a batch, per sample."""

    def losses(model: Callable[..., Tensor], batch: Batch) -> Losses:
        if batch.label is None:
            raise ConfigError(f"no label in some of {', '.join(batch.keys)}")
        keys = hash64(seed, batch.positions, int(Use.DROP_PATH))
        dropped = drop_modality(batch, seed, modality_dropout)
        logits = model(batch.values, hidden_tokens({}, batch.valid, dropped), keys)
        parts = {"ce": cross_entropy(logits, batch.label, ignore, weights), "dice": dice(logits, batch.label, ignore)}
        return Losses(parts["ce"] + parts["dice"], parts)

    return losses


def cross_entropy(logits: Tensor, label: Tensor, ignore: int, weights: Tensor | None = None) -> Tensor:
    """Mean over each sample's labelled pixels: logits [B, K, H, W], label [B, H, W] -> [B]; 0 without labels.

    With weights [K] each pixel's loss is multiplied by its class's. The sum is divided by the number of pixels, not by
    the sum of their weights: a sample all of one class would not feel them.
    """
    weights = None if weights is None else weights.to(logits.device)
    pixels = F.cross_entropy(logits.float(), label, weights, ignore_index=ignore, reduction="none")  # [B, H, W]
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
    every = cast("int", config.validate_every)  # in a resolved config
    where = config.validation_where
    selection = samples(config.protocol, config.data, "val", sensors=config.sensors, where=where)
    inputs = run.contract.restrict(selection.contract.sensors)

    def score(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        if numbers["step"] % every and numbers["step"] != config.steps:
            return {}
        matrix = confusion(engine, selection, inputs, engine.micro_batch, run.ranks, engine.device)
        names = run.contract.classes.names if run.contract.classes else ()
        return {f"val/{name}": value for name, value in scores(matrix, names).items()}

    return score
