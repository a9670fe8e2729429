"""The training loop of both stages.

A step consumes one global batch: `accumulation` micro-batches on every rank, one update. Its loss is the mean over
the batch's samples of per-sample means, so that ranks, micro-batches and accumulation are matters of speed alone.
Everything a step needs follows from its number: the learning rate, the positions of its samples, their keyed
randomness. So a run goes on exactly from parameters, moments and the step.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.engine import Engine
from pipeline.log import Journal
from pipeline.model.keyed import hash64
from pipeline.optim import learning_rate
from pipeline.ranks import agree
from pipeline.run import Run
from pipeline.saving import Saver
from pipeline.signals import Stopped, StopRequest
from shards.store import StoreError


class Losses(NamedTuple):
    """Of every sample of a batch: its loss [B], the named parts of it [B], and a hash int64 [B] of what was hidden."""

    total: Tensor
    parts: Mapping[str, Tensor]
    hidden: Tensor | None = None


# (model, batch) -> losses.
Objective = Callable[[Callable[..., Tensor], Batch], Losses]
# Called by all ranks after a step with its line for metrics.jsonl (`step`: how many are done); what it returns joins
# that line.
Hook = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class NonFiniteLoss(ArithmeticError):
    """The loss of a step, or the norm of its gradient, is not a finite number; the last checkpoint is untouched."""


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
    config, saver = run.config, Saver(run, engine)
    journal = Journal(run.folder, start, config.steps) if run.ranks.rank == 0 else None
    try:
        with StopRequest() as request:
            for step in range(start, config.steps):
                numbers = _step(run, engine, objective, batches, step)
                for hook in hooks:
                    numbers |= hook(numbers)
                if journal:
                    journal.write(numbers | {"saving": saver.seconds})
                saver.written()
                last, stop, best = step + 1 == config.steps, agree(request.requested), saver.improves(numbers)
                if last or stop or best or (step + 1) % config.checkpoint_every == 0:
                    saver.save(step + 1, numbers, best)
                if stop and not last:
                    break
            saver.close()
        if step + 1 < config.steps:
            raise Stopped(f"stopped as asked after step {step + 1}; start the same command again to go on")
    except BaseException:
        with suppress(StoreError):  # what ended the run is told; the checkpoint under way may still be whole
            saver.wait()
        raise
    finally:
        if journal:
            journal.close()


def _step(run: Run, engine: Engine, objective: Objective, batches: Iterator[Batch], step: int) -> dict[str, Any]:
    """One global batch and one update; the step's line for metrics.jsonl."""
    config, began, waited = run.config, time.monotonic(), 0.0
    sums: dict[str, Tensor] = {}
    keys: list[str] = []
    digest = torch.zeros((), dtype=torch.int64)
    for _ in range(engine.accumulation):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        batch = batch.to(engine.device)
        losses = objective(engine, batch)
        engine.backward(losses.total.mean())
        keys += batch.keys
        digest += digest_of(batch, losses.hidden)
        for name, values in {"loss": losses.total, **{f"loss/{k}": part for k, part in losses.parts.items()}}.items():
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
    if not math.isfinite(norm) and config.engine.precision != "fp16":  # where loss scaling finds its scale that way
        raise NonFiniteLoss(
            f"step {step + 1}: the gradient's norm is {norm}, though the loss is {means['loss']:.4f}; on rank "
            f"{run.ranks.rank} the samples were {', '.join(keys)}. Lower optim.lr, or go on from a checkpoint before"
        )
    seconds = time.monotonic() - began
    return {
        "step": step + 1,
        "samples": seen + config.batch.global_batch,
        "position": seen + config.batch.global_batch,
        **means,
        "lr": lr,
        "grad_norm": norm,
        "digest": _over_ranks(digest),
        "samples_per_second": config.batch.global_batch / seconds,
        "data_wait": waited / seconds,
    }


def digest_of(batch: Batch, hidden: Tensor | None) -> Tensor:
    """A hash of which samples a batch holds, at which positions, and what of them was hidden: int64.

    The sum over the samples, so that of a global batch it does not depend on how ranks and micro-batches share it.
    """
    names = torch.tensor([zlib.crc32(key.encode()) for key in batch.keys])  # [B]
    return hash64(names, batch.positions.cpu(), 0 if hidden is None else hidden.cpu()).sum()


def _over_ranks(digest: Tensor) -> str:
    """The sum of all ranks' digests modulo 2^64, hexadecimal."""
    total = digest.to("cuda") if torch.distributed.get_backend() == "nccl" else digest
    torch.distributed.all_reduce(total)
    return f"{int(total) % 2**64:016x}"


def _mean_over_ranks(sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Sums of all ranks, divided by the number of samples in the global batch."""
    total = torch.stack(list(sums.values()))
    torch.distributed.all_reduce(total)
    return dict(zip(sums, (total / count).tolist(), strict=True))
