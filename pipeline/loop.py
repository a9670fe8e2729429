"""The training loop of both stages.

A step consumes one global batch: `accumulation` micro-batches on every rank, one update. Its loss is the mean over
the batch's samples of per-sample means, so that ranks, micro-batches and accumulation are matters of speed alone.
Everything a step needs follows from its number: the learning rate, the positions of its samples, their keyed
randomness. So a run goes on exactly from parameters, moments and the step.
"""

from __future__ import annotations

import logging
import math
import resource
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.diagnosis import diagnose
from pipeline.engine import Engine
from pipeline.health import NAMED, Health, recall, suspects
from pipeline.log import Journal
from pipeline.model.keyed import hash64
from pipeline.optim import learning_rate
from pipeline.profiling import phase
from pipeline.ranks import agree, share
from pipeline.rollback import BACK, NotTraining, RolledBack, last_good, put_back
from pipeline.run import Run
from pipeline.saving import Saver
from pipeline.signals import Stopped, StopRequest
from pipeline.trackers import trackers
from pipeline.watchdog import Watchdog
from shards.store import StoreError

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Work:
    """What every step of a run needs.

    Attributes:
        run: what is trained.
        engine: holds the model.
        objective: from a batch to losses per sample.
        batches: this rank's micro-batches, from the next step on.
        health: judges losses.
    """

    run: Run
    engine: Engine
    objective: Objective
    batches: Iterator[Batch]
    health: Health

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch."""
        return self.objective(self.engine, batch).total.mean()


class Outcome(NamedTuple):
    """A step: its line for metrics.jsonl, this rank's micro-batches, and why it failed if it did."""

    line: dict[str, Any]
    batches: Sequence[Batch]
    failure: str | None = None


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
        RolledBack: steps went wrong; the run is put back and can be entered again.
        NotTraining: they did so again, or before there was any checkpoint.
    """
    config, saver = run.config, Saver(run, engine, start)
    journal = Journal(run.folder, start, config.steps, trackers(run, start)) if run.ranks.rank == 0 else None
    work = Work(run, engine, objective, batches, recall(config.guard, run.folder, run.ranks))
    stacks = run.folder / "logs" / f"stacks-rank-{run.ranks.rank}.txt"
    try:
        with StopRequest() as request, Watchdog(config.guard.hang_s, stacks) as watchdog:
            for step in range(start, config.steps):
                began = time.monotonic()
                outcome = take_step(work, step)
                numbers = outcome.line
                if not outcome.failure:
                    for hook in hooks:
                        watchdog.beat()
                        numbers |= hook(numbers)
                best = saver.improves(numbers)
                numbers |= saver.budget(time.monotonic() - began)
                if outcome.failure:
                    _go_back(work, saver, outcome, journal)
                if journal:
                    journal.write(numbers)
                saver.written()
                last, stop = step + 1 == config.steps or saver.exhausted, agree(request.requested)
                # While steps are passed over, the parameters may be what is wrong.
                due = (best or (step + 1) % config.checkpoint_every == 0) and "skipped" not in numbers
                if last or stop or due:
                    saver.save(step + 1, numbers, best)
                watchdog.beat()
                if last or stop:
                    break
            saver.close()
        if saver.exhausted:
            _tell(run, f"ended after step {step + 1}: {saver.stale} values of {config.keep_best} without a better one")
        if not last:
            raise Stopped(f"stopped as asked after step {step + 1}; start the same command again to go on")
    except BaseException:
        with suppress(StoreError):  # what ended the run is told; the checkpoint under way may still be whole
            saver.wait()
        raise
    finally:
        if journal:
            journal.close()


def take_step(work: Work, step: int) -> Outcome:
    """One global batch and one update; or none, where `Health` says that the loss is not to be trained on. Collective.

    No micro-batch's gradient is made before all ranks know that its loss is finite; the whole batch's loss is judged
    before the last one's.
    """
    run, engine, config, began = work.run, work.engine, work.run.config, time.monotonic()
    tally, why, taken = Tally(), None, list[Batch]()
    for number in range(engine.accumulation):
        with phase("data"):
            asked = time.monotonic()
            taken.append(next(work.batches))
            tally.waited += time.monotonic() - asked
            batch = taken[-1].to(engine.device)
        with phase("forward"), torch.set_grad_enabled(why is None):
            losses = work.objective(engine, batch)
            tally.add(batch, losses)
        with phase("communication"):
            means = tally.means(run.ranks.world)
        why = why or work.health.verdict(means["loss"], number + 1 == engine.accumulation)
        if why is None:
            good = batch
            with phase("backward"):
                engine.backward(losses.total.mean())
    seen = step * config.batch.global_batch
    lr = learning_rate(config.optim, seen, config.steps * config.batch.global_batch)
    norm = None
    if why:
        engine.drop(lambda: work.loss(good))
    else:
        with phase("optimiser"):
            norm = engine.step(lr)
    with phase("communication"):
        digest = _over_ranks(tally.digest)
    seconds = time.monotonic() - began
    line = {
        "step": step + 1,
        "samples": seen + config.batch.global_batch,
        "position": seen + config.batch.global_batch,
        **{name: value if math.isfinite(value) else None for name, value in means.items()},
        "lr": lr,
        "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
        "digest": digest,
        "samples_per_second": config.batch.global_batch / seconds,
        "samples_per_second_per_device": config.batch.global_batch / seconds / run.ranks.world,
        "data_wait": tally.waited / seconds,
        "memory": peak_memory(engine.device) / 1e9,
    }
    return _judged(work, Outcome(line, taken), tally, why, norm)


def _judged(work: Work, outcome: Outcome, tally: Tally, why: str | None, norm: float | None) -> Outcome:
    """The outcome with what was passed over, how often that has happened, and whether the step has failed."""
    line, failure = outcome.line, None
    if why:
        line["skipped"] = {"why": why, "samples": suspects(tally.losses)}
        _tell(work.run, f"step {line['step']} passed over: {why}; {_named(line['skipped']['samples'])}")
    elif norm is not None and not math.isfinite(norm) and work.run.config.engine.precision != "fp16":
        # In fp16 loss scaling finds its scale that way.
        failure = f"the gradient's norm is {norm}, though the loss is {line['loss']:.4f}"
    work.health.note(line)
    if work.health.exhausted:
        failure = f"{work.health.in_row} steps in a row were passed over, the last for its {why}"
    line |= {"skips": work.health.skips, "rollbacks": work.health.rollbacks}
    return outcome._replace(failure=failure)


def _named(samples: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"rank {rank}: {', '.join(keys)}" for rank, keys in samples.items())


def _tell(run: Run, text: str) -> None:
    if run.ranks.rank == 0:
        log.warning("%s", text)


def _go_back(work: Work, saver: Saver, outcome: Outcome, journal: Journal | None) -> None:
    """Put the run back to its last good checkpoint, past the data of the failed step. Collective.

    Raises:
        RolledBack: done.
        NotTraining: there is none, or it has been gone back to already.
    """
    run, line = work.run, outcome.line
    found = diagnose(work.engine, work.loss, outcome.batches)
    saver.wait()
    target = share(last_good(run) if run.ranks.rank == 0 else None)
    report = f"step {line['step']}: {outcome.failure}. The first values that are not finite: {found}"
    if target is None or target[1]:
        keys = [key for batch in outcome.batches for key in batch.keys]
        before = f"it had gone on from step {target[0]} already" if target else "there is no checkpoint to go back to"
        raise NotTraining(
            f"{report}. {before}, so the run stops. Lower optim.lr, or look at the samples with `mcf shards show`: "
            f"{', '.join(keys[:NAMED])}"
        )
    line |= {BACK: target[0], "rollbacks": line["rollbacks"] + 1}
    if journal:
        journal.write(line)
        put_back(run, target[0], line)
    agree(False)  # nobody reads it before it is written
    raise RolledBack(f"{report}. Going on from the parameters of step {target[0]}, past these data")


class Tally:
    """What a step has met so far on this rank: losses of its samples, and a hash of them."""

    def __init__(self) -> None:
        self.losses: list[tuple[str, Tensor]] = []
        self.digest = torch.zeros((), dtype=torch.int64)
        self.waited = 0.0  # seconds for data
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Batch, losses: Losses) -> None:
        """Take in a micro-batch."""
        self.losses += zip(batch.keys, losses.total.detach(), strict=True)
        self.digest += digest_of(batch, losses.hidden)
        for name, values in {"loss": losses.total, **{f"loss/{k}": part for k, part in losses.parts.items()}}.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.detach().double().sum()

    def means(self, world: int) -> dict[str, float]:
        """Means over the samples of all ranks. Collective."""
        total = torch.stack(list(self._sums.values()))
        torch.distributed.all_reduce(total)
        return dict(zip(self._sums, (total / (len(self.losses) * world)).tolist(), strict=True))


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


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by torch, elsewhere by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
