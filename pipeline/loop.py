"""The training loop of both stages.

A step consumes one global batch: `accumulation` micro-batches on every rank, one update. Its loss is the mean over
the batch's samples of per-sample means, so that ranks, micro-batches and accumulation are matters of speed alone.
Everything a step needs follows from its number: the learning rate, the positions of its samples, their keyed
randomness. So a run goes on exactly from parameters, moments and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.engine import Engine
from pipeline.log import Journal
from pipeline.optim import learning_rate
from pipeline.ranks import agree
from pipeline.run import Run, facts
from pipeline.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from pipeline.model.mcf_mamba import MCFMamba

# (model, batch) -> loss of every sample [B], and its named parts [B].
Objective = Callable[[Callable[..., Tensor], Batch], tuple[Tensor, Mapping[str, Tensor]]]
# Called by all ranks after a step with the number of steps done; what it returns joins the line of metrics.jsonl.
Hook = Callable[[int], Mapping[str, Any]]


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is not a finite number; the last checkpoint is untouched."""


def train(
    run: Run, engine: Engine, objective: Objective, batches: Iterator[Batch], start: int, hooks: Sequence[Hook] = ()
) -> None:
    """Train from step `start` to the last, writing metrics and checkpoints into the run folder. Collective.

    Args:
        run: what is trained.
        engine: holds the model, with the state of step `start`.
        objective: from a batch to losses per sample.
        batches: this rank's micro-batches from step `start` on.
        start: steps already done.
        hooks: what else happens after steps.

    Raises:
        Stopped: a signal asked for it; all ranks saved the same step.
        NonFiniteLoss: the loss became NaN or infinite.
    """
    config = run.config
    journal = Journal(run.folder, start, config.steps) if run.ranks.rank == 0 else None
    try:
        with StopRequest() as request:
            for step in range(start, config.steps):
                numbers = _step(run, engine, objective, batches, step)
                for hook in hooks:
                    numbers |= hook(step + 1)
                if journal:
                    journal.write(numbers)
                last, stop = step + 1 == config.steps, agree(request.requested)
                if last or stop or (step + 1) % config.checkpoint_every == 0:
                    save(run, engine, step + 1)
                if stop and not last:
                    raise Stopped(f"stopped as asked after step {step + 1}; start the same command again to go on")
    finally:
        if journal:
            journal.close()


def save(run: Run, engine: Engine, step: int) -> None:
    """Write a checkpoint. Collective; returns when it is on disk."""
    state = engine.gather()
    if state:
        checkpoint.save(run.folder, state, facts(run, step, cast("MCFMamba", engine.module)), run.config.keep)
    torch.distributed.barrier()


def _step(run: Run, engine: Engine, objective: Objective, batches: Iterator[Batch], step: int) -> dict[str, Any]:
    """One global batch and one update; the step's line for metrics.jsonl."""
    config, began, waited = run.config, time.monotonic(), 0.0
    sums: dict[str, Tensor] = {}
    keys: list[str] = []
    for _ in range(engine.accumulation):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        batch = batch.to(engine.device)
        losses, parts = objective(engine, batch)
        engine.backward(losses.mean())
        keys += batch.keys
        for name, values in {"loss": losses, **{f"loss/{name}": part for name, part in parts.items()}}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().double().sum()
    means = _mean_over_ranks(sums, config.batch.global_batch)
    if not math.isfinite(means["loss"]):
        raise NonFiniteLoss(
            f"step {step + 1}: loss {means['loss']}; on rank {run.ranks.rank} the loss of {', '.join(keys)} summed to "
            f"{float(sums['loss'])}. Lower optim.lr, or look at these samples with `mcf shards show`"
        )
    seen = step * config.batch.global_batch
    lr = learning_rate(config.optim, seen, config.steps * config.batch.global_batch)
    norm = engine.step(lr)
    seconds = time.monotonic() - began
    return {
        "step": step + 1,
        "samples": seen + config.batch.global_batch,
        "position": seen + config.batch.global_batch,
        **means,
        "lr": lr,
        "grad_norm": norm,
        "samples_per_second": config.batch.global_batch / seconds,
        "data_wait": waited / seconds,
    }


def _mean_over_ranks(sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Sums of all ranks, divided by the number of samples in the global batch."""
    total = torch.stack(list(sums.values()))
    torch.distributed.all_reduce(total)
    return dict(zip(sums, (total / count).tolist(), strict=True))
