"""What a training run will take, told before it begins: samples, bytes, disk, hours, and what cannot be.

`plan` reads the manifest, the run folder and the named checkpoint; no sample. What it says of times is arithmetic on
steps that were measured, or on what it is given.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs import ConfigError
from launchers.config import SlurmConfig
from launchers.node_checks import existing, held
from launchers.words import counted, in_bytes, in_hours
from pipeline.checkpoint import FOLDER, CheckpointError, facts_of_all, find
from pipeline.config import PretrainConfig
from pipeline.engine import check_device
from pipeline.finetune import labelled
from pipeline.finetune_config import FinetuneConfig, resolved
from pipeline.log import METRICS, read
from pipeline.model import MCFMamba, ModelConfig
from pipeline.run import fitted, is_finished, store_of
from pipeline.seeds import per_seed
from shards.cache import CACHED, PIECE
from shards.contract import Contract, ContractError
from shards.manifest import Part, Selection, select
from shards.order import BLOCK, CYCLE, Mix
from shards.store import FolderStore, open_store
from shards.stream import Share, Stream, order_of

START_UP = 60  # seconds from the start of a part to its first step: processes, DeepSpeed, checkpoint; a guess
SPREAD = 64  # samples of a dataset whose bytes are looked up
LINES = 100  # of metrics.jsonl, whose median is the time of a step
FLOAT = 4  # bytes of a number in a checkpoint

Training = PretrainConfig | FinetuneConfig


class PlanError(ValueError):
    """A run that cannot be as it is configured; a line per reason, which says what to write."""


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        rows: name and text of what is known, in the order of reading.
        warnings: what will go, but worse than it could, or perhaps not.
    """

    rows: Sequence[tuple[str, str]]
    warnings: Sequence[str]

    def text(self) -> str:
        """Rows in two columns, then the warnings, a line each."""
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {text}" for name, text in self.rows]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def plan(config: Training, ranks: int, slurm: SlurmConfig | None = None, step_seconds: float | None = None) -> Plan:
    """Find out what a run takes, from where it stands; changes nothing.

    Args:
        config: of pretraining or finetuning.
        ranks: that will take part, over all nodes.
        slurm: where it will run; None is this machine.
        step_seconds: of one step; None: the median of what RUN or RUN-profile measured, if they did.

    Raises:
        PlanError: the run cannot be so; all reasons at once.
        ManifestError, ContractError, ConfigError, OrderError: there is no such selection of data.
        StoreError: data or checkpoints cannot be reached from here.
    """
    if isinstance(config, FinetuneConfig):
        runs = per_seed(config)
        selection = labelled(runs[0])
        config = resolved(runs[0], len(selection))
    else:
        runs = []
        selection = select(config.data, modalities=config.sensors, where=config.where)
    draft = _Draft(config, ranks, slurm, selection, order_of(selection, config.seed, config.lanes))
    if len(runs) > 1:
        draft.rows.append(("seeds", f"{len(runs)} runs, one after the other; what follows is of the first"))
    _stands(draft)
    if draft.left:
        _batches(draft)
        _reads(draft)
        if config.reading.cache_dir:
            _cache(draft)
        _checkpoints(draft)
        _time(draft, step_seconds)
    if draft.problems:
        raise PlanError("\n".join(draft.problems))
    return Plan(tuple(draft.rows), tuple(draft.warnings))


@dataclass
class _Draft:
    """A plan that is being made: of what, where the run stands, and what was found so far."""

    config: Training
    ranks: int
    slurm: SlurmConfig | None
    selection: Selection
    order: Mix
    facts: Mapping[str, Any] | None = None  # of the run's newest checkpoint
    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def shares(self) -> list[float]:
        """Of each dataset among the samples of a batch; they add up to 1."""
        return [int(count) / CYCLE for count in self.order.counts]

    @property
    def step(self) -> int:
        """Steps already done."""
        return int(self.facts["step"]) if self.facts else 0

    @property
    def left(self) -> int:
        """Steps still to do."""
        done = self.facts is not None and is_finished(self.config, self.facts)
        return 0 if done else self.config.steps - self.step

    @property
    def far(self) -> bool:
        """Whether samples come across a network, as far as a reader can tell."""
        return any(not isinstance(part.store, FolderStore) for part in self.selection.parts)


def _stands(draft: _Draft) -> None:
    """Where the run is: it goes on from its newest checkpoint, whatever metrics.jsonl holds after that."""
    config = draft.config
    try:
        draft.facts = next(facts_of_all(store_of(config)), None)
    except CheckpointError as error:
        draft.warnings.append(f"run: {error}; planned from step 0, though the run may go on from an older checkpoint")
    begun = f"goes on from step {draft.step:,}" if draft.step else "begins"
    why = (
        f"all {config.steps:,} steps are done" if draft.step == config.steps else f"patience ended it at {draft.step:,}"
    )
    said = begun if draft.left else f"is finished: {why}, and nothing will happen"
    draft.rows.append(("run", f"{config.run} {said}"))


def _batches(draft: _Draft) -> None:
    """Steps, epochs and how a global batch is made; refuses one that cannot be."""
    config, selection, batch = draft.config, draft.selection, draft.config.batch.global_batch
    draft.rows.append(("steps", f"{config.steps:,}, {draft.left:,} of them left"))
    try:
        micro, accumulation = config.batch.split(draft.ranks)
        text = f"{batch:,} = {counted(draft.ranks, 'rank')} x {micro} a micro-batch x {accumulation} accumulated"
        draft.rows.append(("global batch", text))
    except ConfigError as error:
        draft.problems.append(str(error))
    shards = sum(len(part.shards) for part in selection.parts)
    draft.rows.append(("samples", f"{len(selection):,} in {counted(shards, 'shard')}"))
    if len(selection) < batch:
        draft.problems.append(
            f"batch.global_batch={batch}: the selection has {len(selection)} samples, fewer than one global batch; "
            f"write batch.global_batch={len(selection)} or less, or select more samples"
        )
    total = config.steps * batch
    each = [total * share / len(part) for share, part in zip(draft.shares, selection.parts, strict=True)]
    text, tail = f"{each[0]:,.2f}", total % len(selection)
    if not isinstance(config.data, str):
        text = ", ".join(f"{epochs:,.2f} of {name}" for name, epochs in zip(config.data, each, strict=True))
    elif tail:
        text += f"; {tail:,} samples of the last"
    draft.rows.append(("epochs", text))


def _reads(draft: _Draft) -> None:
    """Bytes and requests, as `shards/stream.py` makes them: all members of a sample, whatever modalities are chosen."""
    config, selection, cached = draft.config, draft.selection, draft.config.reading.cache_dir
    whole, count = _whole_blocks(draft), len(selection)
    each = [_per_sample(part, whole) for part in selection.parts]
    size, tars = (sum(share * one[i] for share, one in zip(draft.shares, each, strict=True)) for i in (0, 1))
    total = size * config.steps * config.batch.global_batch
    draft.rows.append(("read", f"about {in_bytes(size * count)} an epoch, {in_bytes(total)} in the run"))
    requests, how = round(tars * count), "single samples"
    if whole:
        # A lane's end cuts every other time a block in two.
        blocks = sum(math.ceil(samples / BLOCK) for _, samples in selection.parts[0].shards) + config.lanes // 2
        requests, how = min(requests, blocks), f"blocks of up to {BLOCK} samples"
    place = ("the node's cache" if cached else "the network") if draft.far else "a folder"
    draft.rows.append(("requests", f"about {requests:,} an epoch, {how} from {place}"))
    if draft.far and not cached and len(selection.parts) == 1 and config.lanes % draft.ranks:
        more = math.ceil(config.lanes / draft.ranks) * draft.ranks
        draft.warnings.append(
            f"lanes={config.lanes} is no multiple of {draft.ranks} ranks, so samples are requested one by one, not in "
            f"blocks of {BLOCK}; write lanes={more}, or a multiple of all numbers of ranks that the run may get"
        )


def _whole_blocks(draft: _Draft) -> bool:
    """Whether blocks are requested as one; the stream itself decides."""
    config, batch = draft.config, draft.config.batch.global_batch
    if not draft.far or config.reading.cache_dir or batch % draft.ranks:
        return False
    stream = Stream(draft.selection, config.seed, config.lanes, Share(batch, draft.ranks), 0, config.reading)
    return stream.whole_blocks


def _per_sample(part: Part, whole: bool) -> tuple[float, float]:
    """Bytes that are read for one sample, those of samples beside it in a block included, and the tars it lies in."""
    spans = []
    for number in {index * len(part) // SPREAD for index in range(SPREAD)}:
        ends: dict[str, tuple[int, int]] = {}
        for _, shard, offset, size in part.row(number).members:
            low, high = ends.get(shard, (offset, 0))
            ends[shard] = min(low, offset), max(high, offset + size)
        spans.append(ends.values())
    mean = statistics.fmean(high - low for ends in spans for low, high in ends) * statistics.fmean(map(len, spans))
    return mean * len(part.table) / len(part) if whole else mean, statistics.fmean(map(len, spans))


def _cache(draft: _Draft) -> None:
    """A node's cache: it keeps the tars that all lanes read and read next, not only those of the node's own ranks."""
    reading, parts = draft.config.reading, draft.selection.parts
    if not draft.far:
        draft.rows.append(("cache", "none: the data lie in a folder, which is not cached"))
        return
    now = everything = pieces = 0
    position = draft.step * draft.config.batch.global_batch
    for part, order, share in zip(parts, draft.order.orders, draft.shares, strict=True):
        if not isinstance(part.store, FolderStore):
            sizes = [part.sizes.get(name, 0) for name, _ in part.shards]
            now += sum(sizes[shard] for shard in order.upcoming(int(position * share)))
            everything += sum(sizes)
            pieces += sum(math.ceil(size / PIECE) for size in sizes)
    limit, place = reading.cache_limit, Path(reading.cache_dir)
    now_and_all = f"{in_bytes(now)} of tars at a time on each node, {in_bytes(everything)} in all"
    text = f"{now_and_all}, under cache_limit {in_bytes(limit)}"
    how_often = "once" if everything <= limit else "every epoch"
    draft.rows.append(("cache", f"{text}; fetched {how_often} by about {pieces:,} requests"))
    if now > limit:
        draft.warnings.append(
            f"reading.cache_limit={limit}: the lanes read {in_bytes(now)} of tars at a time, so tars are read past the "
            f"cache; write reading.cache_limit={now} or more, fewer lanes, or reading.cache_dir=''"
        )
    wanted, (disk, free) = min(everything, limit) - held(place / CACHED), _disk(place)
    if wanted > free:
        text = (
            f"reading.cache_limit={limit}: the cache will take {in_bytes(wanted)} more, but {disk} has "
            f"{in_bytes(free)} free here; write a smaller reading.cache_limit, or reading.cache_dir= on another disk"
        )
        # Disks of the same name on the nodes of a cluster are others than here.
        (draft.warnings if draft.slurm else draft.problems).append(text)


def _checkpoints(draft: _Draft) -> None:
    """The model's parameters, and what its checkpoints take on the disk."""
    config, parameters = draft.config, _parameters(draft)
    size = FLOAT * parameters * (4 if config.optim.ema else 3)  # the parameters, two moments, and an average
    saved = [*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps]
    multiples = sum(step % config.keep_every == 0 for step in saved) if config.keep_every else 0
    most = min(len(saved), config.keep + multiples + 1) + bool(config.keep_best)
    draft.rows.append(("parameters", f"{parameters / 1e6:,.2f} million"))
    text = f"{in_bytes(size)} each, at most {most} at a time (one being written): {in_bytes(most * size)}"
    store = store_of(config)
    if not isinstance(store, FolderStore):
        draft.rows.append(("checkpoints", f"{text}, in {store.url}"))
        return
    disk, free = _disk(store.root)
    draft.rows.append(("checkpoints", f"{text}; {in_bytes(free)} free in {disk}"))
    wanted = most * size - held(store.root / FOLDER)
    if wanted > free:
        draft.problems.append(
            f"keep={config.keep}, keep_every={config.keep_every}: checkpoints will take {in_bytes(wanted)} more, but "
            f"{disk} has {in_bytes(free)} free; write a smaller keep, a larger keep_every, or store= of another disk"
        )


def _parameters(draft: _Draft) -> int:
    """Numbers in the model: that of the run's or the named checkpoint, otherwise the config's."""
    config, source = draft.config, draft.facts
    named = config.checkpoint if isinstance(config, FinetuneConfig) else config.start
    try:
        if source is None and named:
            source = next(facts_of_all(open_store(named)), None) or find(named).facts
    except CheckpointError as error:
        draft.warnings.append(f"the parameters are those of model: of the config, since {error}")
    contract = Contract.from_json(source["contract"]) if source else draft.selection.contract
    if source and not draft.facts:
        adapt = config.adapt if isinstance(config, FinetuneConfig) else None
        try:
            contract, *_ = fitted(contract, draft.selection.contract, config, adapt)
        except ContractError as error:
            draft.problems.append(str(error))
    structure = ModelConfig(**source["model"]) if source else config.model
    outputs, classes = sum(contract.channels.values()), draft.selection.contract.classes
    if isinstance(config, FinetuneConfig) and classes:
        outputs = len(classes.names)
    with torch.device("meta"):  # without memory for its numbers
        model = MCFMamba(structure, contract.channels, outputs, "reference")
    return sum(parameter.numel() for parameter in model.parameters())


def _time(draft: _Draft, step_seconds: float | None) -> None:
    """Seconds of a step, hours, and the parts that Slurm's time limit makes of them."""
    lines = _lines(Path(draft.config.run))
    seconds, origin = (step_seconds, "as given") if step_seconds else _measured(draft, lines)
    unknown = "unknown: give --step-seconds, or run --profile"
    draft.rows.append(("step", unknown if seconds is None else f"{seconds:.3g} s, {origin}"))
    parts = 1
    if draft.slurm:
        parts = _parts(draft, draft.slurm, seconds)
        _notice(draft, draft.slurm, lines)
    if seconds is not None:
        total, starts = draft.left * seconds + parts * START_UP, f"{counted(parts, 'start')} of {START_UP} s"
        draft.rows.append(("time", f"{in_hours(total)} for {draft.left:,} steps and {starts}, without validation"))


def _measured(draft: _Draft, lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Seconds of a step as the run itself, or a profile beside it, had them; and which did."""
    folder = Path(draft.config.run)
    if not lines:
        folder = Path(f"{folder}-profile")
        lines = _lines(folder)
    if not lines:
        return None, ""
    last = lines[-LINES:]
    speed = statistics.median(line["samples_per_second"] for line in last)
    world = round(last[-1]["samples_per_second"] / last[-1]["samples_per_second_per_device"])
    if world != draft.ranks:
        draft.warnings.append(
            f"{folder / METRICS} is of {counted(world, 'rank')}, this run of {draft.ranks}: its steps will take "
            "another time; give --step-seconds, or run --profile as the run will be"
        )
    origin = f"median of the last {counted(len(last), 'step')} in {folder / METRICS}, {counted(world, 'rank')}"
    return draft.config.batch.global_batch / speed, origin


def _parts(draft: _Draft, slurm: SlurmConfig, seconds: float | None) -> int:
    """How often the job is started until the run is done; 1 where nobody knows."""
    limit, step = 60 * slurm.time_min, seconds or 0.0
    stepping = limit - START_UP - slurm.signal_delay_s
    if stepping <= step:
        least = (START_UP + step + slurm.signal_delay_s) // 60 + 1
        draft.problems.append(
            f"time_min={slurm.time_min}: {limit} s are not more than the start-up ({START_UP} s), one step "
            f"({step:.3g} s) and signal_delay_s={slurm.signal_delay_s}; write time_min={least:.0f} or more"
        )
        return 1
    if not step:
        draft.rows.append(("slurm", f"time limit {in_hours(limit)}; parts unknown, as a step is"))
        return 1
    each = int(stepping / step)
    parts = math.ceil(draft.left / each)
    text = f"time limit {in_hours(limit)}: {counted(parts, 'part')} of {each:,} steps at most"
    draft.rows.append(("slurm", f"{text}, {counted(parts - 1, 'requeue')} of {slurm.max_requeues}"))
    if parts - 1 > slurm.max_requeues:
        draft.warnings.append(
            f"max_requeues={slurm.max_requeues}: the run needs {parts - 1}, and stays down at about step "
            f"{draft.step + (slurm.max_requeues + 1) * each:,}; write max_requeues={parts - 1}, a larger time_min, or "
            "submit it again then"
        )
    return parts


def _notice(draft: _Draft, slurm: SlurmConfig, lines: Sequence[Mapping[str, Any]]) -> None:
    """What Slurm's signal and its nodes allow."""
    told = [line for line in lines if "save_budget" in line]
    if told and (budget := told[-1]["save_budget"]) > slurm.signal_delay_s:
        draft.warnings.append(
            f"signal_delay_s={slurm.signal_delay_s}: to stop and save took the run up to {budget:.3g} s (save_budget "
            f"of step {told[-1]['step']}); write signal_delay_s={math.ceil(2 * budget)}"
        )
    try:
        check_device(draft.config.engine, "cuda" if slurm.gpus_per_node else "cpu")
    except ConfigError as error:
        draft.problems.append(f"gpus_per_node=0: {error}, or write gpus_per_node=N")


def _lines(run: Path) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl; none where there is no file."""
    return read(run) if (run / METRICS).exists() else []


def _disk(folder: Path) -> tuple[Path, int]:
    """The folder, or the nearest above it that exists, and the bytes that are free there."""
    found = existing(folder)
    return found, shutil.disk_usage(found).free
