"""Stage pretrain: CMSS pretraining of MCF-Mamba on unlabelled samples.

The network sees every modality with blocks missing and reconstructs what it was not shown; `pipeline.model.cmss` holds
the rule and the loss. What is reconstructed is the normalised image of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import PretrainConfig
from pipeline.dataset import training_batches
from pipeline.loop import Objective, train
from pipeline.model import cmss
from pipeline.model.keyed import hash64
from pipeline.ranks import from_environment, init
from pipeline.run import build_engine, build_model, open_run
from shards.contract import Contract
from shards.manifest import select
from shards.order import Use
from shards.stream import Share, Stream


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain as configured; an unfinished run goes on. Collective over the ranks of the environment.

    Returns:
        The run folder.

    Raises:
        Stopped: a signal asked for it, after saving.
        ValueError: config, data and what is in the run folder do not fit; the message says how.
    """
    ranks = from_environment()
    init(ranks)
    selection = select(config.data, modalities=config.sensors, where=config.where)
    # A pretrained model has no classes, whatever labels lie beside its samples.
    selection = replace(selection, contract=replace(selection.contract, classes=None))
    run, start = open_run(config, selection, ranks, config.start)
    model = build_model(run, start, sum(run.contract.channels.values()))
    engine = build_engine(run, start, model)
    share = Share(config.batch.global_batch, ranks.world, ranks.rank)
    stream = Stream(selection, config.seed, config.lanes, share, start.step * config.batch.global_batch)
    batches = training_batches(stream, engine.micro_batch, run.contract, config.seed if config.augment else None)
    train(run, engine, objective(config, run.contract), batches, start.step, [lambda _: {"io": stream.ledger}])
    return run.folder


def objective(config: PretrainConfig, contract: Contract) -> Objective:
    """The loss of CMSS on a batch, and its part of every modality.

    Raises:
        ValueError: a weight names a modality that is not there.
    """
    weights, settings, seed = config.cmss.weights, config.cmss, config.seed
    if unknown := [name for name in weights if name not in contract.sensors]:
        raise ValueError(f"cmss.weights: no modality {', '.join(unknown)}; there are {', '.join(contract.sensors)}")

    def losses(model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        blocks = cmss.hide(cmss.presence(batch.valid), batch.positions, seed, settings.ratio, settings.strategy)
        keys = hash64(seed, batch.positions, int(Use.DROP_PATH))
        recon = model(batch.values, cmss.hidden_tokens(blocks, batch.valid), keys)
        return cmss.loss(recon, batch.values, blocks, batch.valid, weights, config.model.profile)

    return losses
