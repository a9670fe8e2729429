"""Stage pretrain: CMSS pretraining of MCF-Mamba on unlabelled samples.

The network sees every modality with blocks missing and reconstructs what it was not shown; `pipeline.model.cmss` holds
the rule and the loss. What is reconstructed is the normalised image of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import ConfigError
from pipeline.augment import augmentation
from pipeline.batch import Batch, collate, drop_modality
from pipeline.config import PretrainConfig
from pipeline.dataset import training_batches
from pipeline.engine import Engine
from pipeline.figures import Reconstruction, reconstructions
from pipeline.loop import Hook, Losses, Objective, train
from pipeline.model import cmss
from pipeline.model.keyed import hash64
from pipeline.observing import observed
from pipeline.probe import probe
from pipeline.ranks import Ranks, from_environment, init
from pipeline.rollback import until_done
from pipeline.run import Run, build_engine, build_model, open_run
from shards.contract import Contract
from shards.manifest import select
from shards.order import Use
from shards.stream import Share, Stream

PICTURES = 4  # samples drawn


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain as configured; an unfinished run goes on. Collective over the ranks of the environment.

    Returns:
        The run folder.

    Raises:
        Stopped: a signal asked for it, after saving.
        ValueError: config, data and what is in the run folder do not fit; the message says how.
        NotTraining: losses or gradients are not finite, also after going back and on past their data.
    """
    ranks = from_environment()
    init(ranks)
    return until_done(lambda config: _pretrain(config, ranks), config, ranks.rank)


def _pretrain(config: PretrainConfig, ranks: Ranks) -> Path:
    selection = select(config.data, modalities=config.sensors, where=config.where)
    # A pretrained model has no classes, whatever labels lie beside its samples.
    selection = replace(selection, contract=replace(selection.contract, classes=None))
    run, start = open_run(config, selection, ranks, config.start)
    if start.finished(config):
        return run.folder
    if missing := [name for name in run.contract.sensors if name not in selection.contract.sensors]:
        raise ConfigError(f"sensors: {config.start} was pretrained with {', '.join(missing)}, which the data lack")
    model = build_model(run, start, sum(run.contract.channels.values()))
    engine = build_engine(run, start, model)
    share = Share(config.batch.global_batch, ranks.world, ranks.rank)
    stream = Stream(selection, config.seed, config.lanes, share, start.step * config.batch.global_batch, config.reading)
    threads = config.reading.threads
    batches = training_batches(stream, engine.micro_batch, run.contract, augmentation(config), threads)
    hooks = [pictures(run, engine, config, stream), probe(run, engine, config)]
    hooks = observed(run, engine, stream, start.step, hooks)
    train(run, engine, objective(config, run.contract), batches, start.step, hooks)
    return run.folder


def objective(config: PretrainConfig, contract: Contract) -> Objective:
    """The loss of CMSS on a batch, and its part of every modality.

    Raises:
        ConfigError: a weight names a modality that is not there.
    """
    weights = config.cmss.weights
    if unknown := [name for name in weights if name not in contract.sensors]:
        raise ConfigError(f"cmss.weights: no modality {', '.join(unknown)}; there are {', '.join(contract.sensors)}")

    def losses(model: Callable[..., Tensor], batch: Batch) -> Losses:
        blocks, tokens = hidden(config, batch)
        keys = hash64(config.seed, batch.positions, int(Use.DROP_PATH))
        recon = model(batch.values, tokens, keys)
        how = config.cmss
        total, parts = cmss.loss(
            recon, batch.values, blocks, batch.valid, weights, config.model.profile, target=how.target, block=how.block
        )
        return Losses(total, parts, cmss.digest(blocks))

    return losses


def hidden(config: PretrainConfig, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The blocks to hide, bool [B, Y, X] by modality, and the tokens not to show, bool [B, h, w].

    A function of the seed, the samples' positions and what of them is valid.
    """
    how = config.cmss
    dropped = drop_modality(batch, config.seed, config.modality_dropout)
    present = cmss.presence(batch.valid, how.block)
    blocks = cmss.hide(present, batch.positions, config.seed, how.ratio, how.strategy, dropped)
    return blocks, cmss.hidden_tokens(blocks, batch.valid, dropped, how.block)


def pictures(run: Run, engine: Engine, config: PretrainConfig, stream: Stream) -> Hook:
    """A hook that draws RUN/pictures/step-NNNNNN.png every `pictures_every` steps and at the end.

    The same few samples each time, hidden in the same places: input, what was visible, and the reconstruction.
    """
    count = len(stream.selection)
    rows = sorted({count * i // PICTURES for i in range(PICTURES)})

    def draw(numbers: Mapping[str, Any]) -> Mapping[str, object]:
        step = numbers["step"]
        if step == config.steps or (config.pictures_every and step % config.pictures_every == 0):
            batch = collate([(stream.row(row), row) for row in rows], run.contract)
            # On every rank, since the forward is collective under ZeRO 3.
            drawn = reconstruct(engine, config, batch.to(engine.device))
            if run.ranks.rank == 0:
                path = run.folder / "pictures" / f"step-{step:06d}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(reconstructions(run.contract, drawn))
        return {}

    return draw


@torch.no_grad()
def reconstruct(model: Callable[..., Tensor], config: PretrainConfig, batch: Batch) -> list[Reconstruction]:
    """What the model makes of every sample of a batch, with blocks hidden as in training."""
    blocks, tokens = hidden(config, batch)
    recon = model(batch.values, tokens).float()
    bands, cell = [image.shape[1] for image in batch.values.values()], config.cmss.block
    outputs = dict(zip(batch.values, torch.split_with_sizes(recon, bands, 1), strict=True))
    outputs = cmss.restored(outputs, batch.values, batch.valid, config.cmss.target, cell)

    def sample(tensors: Mapping[str, Tensor], index: int) -> dict[str, NDArray[Any]]:
        return {name: tensor[index].cpu().numpy() for name, tensor in tensors.items()}

    return [
        Reconstruction(
            key,
            sample(batch.values, i),
            sample(batch.valid, i),
            sample(blocks, i),
            sample(outputs, i),
            cell=cell,
        )
        for i, key in enumerate(batch.keys)
    ]
