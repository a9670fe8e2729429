"""A run: its folder, what it is a run of, and where its parameters come from at the start.

The order of starting is one list, for pretraining and finetuning alike:

    1. the newest whole checkpoint of the run's own folder: the run goes on, moments and position included
    2. the run, checkpoint or release that the config names (`start` or `checkpoint`): its parameters, averaged if it
       kept an average; or a file of public weights, converted as `mcf convert` does it
    3. scratch: weights drawn from the seed

Rank 0 reads the checkpoint and verifies it; the others read its state.json and are sent the rest.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import configs
from configs import ConfigError
from pipeline import checkpoint
from pipeline.adapt import Adaptation, Choices, adaptation, sources
from pipeline.checkpoint import BEST, LATEST, Checkpoint, write_text
from pipeline.config import Training
from pipeline.engine import Engine, precision_line
from pipeline.log import METRICS
from pipeline.model.convert import convert
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.provenance import code_version, environment, lineage, training
from pipeline.ranks import Ranks, broadcast, share
from pipeline.starts import count_start
from shards.contract import Contract, check_fit
from shards.manifest import Selection, differences
from shards.store import Store, open_store

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
STALE = "stale"  # in metrics.jsonl: values of the metric that is watched since the best one
CONVERTED = "start"  # below the run folder: public weights as a release
# What may change between two parts of one run, because it does not change what is computed.
FREE = (
    "run",
    "data",
    "batch.micro_batch",
    "engine",
    "reading",
    "stream",
    "checkpoint_every",
    "keep",
    "keep_every",
    "keep_best",
    "patience",
    "store",
    "pictures_every",
    "probe",
    "validate_every",
    "guard",
    "track",
    "profile",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run: what its checkpoints must say so that it can go on.

    Attributes:
        folder: run folder.
        config: of the stage.
        contract: what the model's inputs and classes mean.
        fingerprint: of the selection of data.
        ranks: who takes part.
        data: identity of the selection, which tells what differs when the fingerprint does.
        lineage: trainings that the parameters went through before this one, oldest first; see `lineage`.
        forced: differences between checkpoint and data that `force` overruled.
    """

    folder: Path
    config: Training
    contract: Contract
    fingerprint: str
    ranks: Ranks
    data: Sequence[Mapping[str, Any]] = ()
    lineage: Sequence[Mapping[str, Any]] = ()
    forced: Sequence[str] = ()

    @property
    def store(self) -> Store:
        """Where checkpoints are kept: the run folder itself unless the config says otherwise."""
        return store_of(self.config)


@dataclass(frozen=True)
class Start:
    """Where a run begins: `checkpoint` None is from scratch; `resumed` says that it is the run's own.

    `adaptation` says how its parameters become those of a network for other modalities; None: as they are.
    """

    checkpoint: Checkpoint | None
    resumed: bool
    adaptation: Adaptation | None = None

    @property
    def step(self) -> int:
        """Steps already done."""
        return self.checkpoint.step if self.checkpoint and self.resumed else 0

    def finished(self, config: Training) -> bool:
        """Whether nothing is left to do."""
        return self.checkpoint is not None and self.resumed and is_finished(config, self.checkpoint.facts)


def open_run(
    config: Training, selection: Selection, ranks: Ranks, named: str | None, adapt: Choices | None = None
) -> tuple[Run, Start]:
    """Open the run folder and decide where to start, in the order of this module's text.

    Args:
        config: of the stage.
        selection: the samples to train on.
        ranks: who takes part.
        named: run, checkpoint or release that the config names.
        adapt: whether its modalities may become others, and which, by hand; None: they may not.

    Raises:
        ConfigError: the folder belongs to a run of another config or of other data, or was started too often in vain.
        CheckpointError: `named` is no checkpoint, or none of the run's own can be read.
        ContractError: the named checkpoint and the data mean different things.
    """
    data = selection.contract
    own = own_checkpoint(config, selection.fingerprint, ranks, selection.identity)
    source = own or (named_checkpoint(named, config, data, ranks) if named else None)
    # Public weights know nothing of units and scales.
    known = own or (source if named and not is_public(named) else None)
    contract, change, forced = data.normalised(config.normalise), None, list[str]()
    if known:
        contract, change, forced = fitted(known.contract, data, config, None if own else adapt)
    if ranks.rank == 0:
        print(f"{config.run} starts from {source.address if source else 'scratch'}", file=sys.stderr)
        for line in [*(change.lines() if change else ()), *(f"forced in spite of {line}" for line in forced)]:
            print(f"  {line}", file=sys.stderr)
    before = lineage(source.facts)[: -1 if own else None] if source else []
    run = Run(Path(config.run), config, contract, selection.fingerprint, ranks, selection.identity, before, forced)
    start = Start(source, own is not None, change)
    if ranks.rank == 0 and not start.finished(config):
        count_start(run.store, start.step, config.guard.starts)
    return run, start


def is_finished(config: Training, facts: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do after a checkpoint of the run: all steps are done, or `patience` is at its end.

    A run that ended early goes on when its patience is made longer.
    """
    stale = int(facts.get("metrics", {}).get(STALE, 0))
    steps = config.steps or facts["config"]["steps"]  # of a config with epochs, as the run has counted them
    return int(facts["step"]) >= steps or 0 < config.patience <= stale


def is_public(named: str) -> bool:
    """Whether this is a file of public weights."""
    return not named.startswith("s3://") and Path(named).is_file() and Path(named).name not in (LATEST, BEST)


def named_checkpoint(named: str, config: Training, data: Contract, ranks: Ranks) -> Checkpoint:
    """The checkpoint that the config names, tensors on rank 0 (of a release: everywhere). Collective.

    Raises:
        CheckpointError, ConvertError: none there, or none that can be used.
    """
    if is_public(named):
        folder = Path(config.run) / CONVERTED
        if ranks.rank == 0 and not folder.exists():
            print(convert(named, folder, data.channels), file=sys.stderr)
        return checkpoint.find(share(str(folder)))
    return _everywhere(checkpoint.find(named) if ranks.rank == 0 else None)


def _everywhere(found: Checkpoint | None) -> Checkpoint:
    """What rank 0 has found, without tensors on the others. Collective."""
    address, release = share((found.address, "step" not in found.facts) if found else ("", False))
    return found or (checkpoint.find(address) if release else checkpoint.load(address, tensors=False))


def store_of(config: Training) -> Store:
    """Where a run's checkpoints are kept."""
    return open_store(config.store or config.run)


def own_checkpoint(
    config: Training, fingerprint: str, ranks: Ranks, data: Sequence[Mapping[str, Any]] = ()
) -> Checkpoint | None:
    """The newest checkpoint of the run, None if there is none yet; writes config.yaml. Collective.

    Raises:
        ConfigError: the folder belongs to a run of another config or of other data.
    """
    found = None
    if ranks.rank == 0:
        folder, store = Path(config.run), store_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, METRICS):  # on another node than before, the folder may be new
            if config.store and not (folder / name).exists() and store.exists(name):
                (folder / name).write_bytes(store.get(name))
        # Before there is a checkpoint nothing can be lost: a mistake in the config may be mended.
        if (folder / CONFIG).exists() and store.list(f"{checkpoint.FOLDER}/"):
            _check_same(folder, configs.load(folder / CONFIG), config)
        found = checkpoint.newest(store)
        if found and found.facts["fingerprint"] != fingerprint:
            what = "; ".join(differences(found.facts.get("data", data), data)) or "its shards are others"
            _check_data(
                config,
                found,
                f"{what}; fingerprint {found.facts['fingerprint'][:12]} until step {found.step}, "
                f"{fingerprint[:12]} from then on",
            )
        write_text(folder / CONFIG, configs.dump(config))
        write_text(folder / ENVIRONMENT, json.dumps(environment(), indent=1))
    return _everywhere(found) if share(found is not None) else None


def _check_data(config: Training, found: Checkpoint, change: str) -> None:
    """Refuse other data than the run was begun with, unless the config says `stream: restart`."""
    if config.stream == "restart":
        log.warning(
            "data: the selection has changed (%s); the stream goes on at position %d of the new order, so samples of "
            "the epoch begun may come again", change, found.facts["position"],
        )  # fmt: skip
        return
    raise ConfigError(
        f"data: the selection of {config.data} has changed since run {config.run} began ({change}); "
        "restore the dataset, write stream=restart to go on in the new order, or choose another folder with run="
    )


def _check_same(folder: Path, old: Any, new: Training) -> None:
    if type(old) is not type(new):
        raise ConfigError(f"run: {folder} holds a run of stage {old.stage}; choose another folder with run=")
    changed = configs.differences(old, new)
    free = {key for key in changed if any(key == name or key.startswith(f"{name}.") for name in FREE)}
    if fixed := [key for key in changed if key not in free]:
        lines = "; ".join(f"{key}: {changed[key][0]!r} there, {changed[key][1]!r} now" for key in fixed)
        raise ConfigError(
            f"run: {folder} holds a run of another config ({lines}); choose another folder with run=, "
            "give the old values, or remove the folder"
        )
    for key in sorted(free):
        log.warning("going on with %s: %r instead of %r", key, changed[key][1], changed[key][0])


def fitted(
    known: Contract, data: Contract, config: Training, adapt: Choices | None
) -> tuple[Contract, Adaptation | None, list[str]]:
    """The contract of a network that begins from a checkpoint, how its modalities are adapted, and what was forced.

    Raises:
        ContractError: checkpoint and data mean different things.
    """
    chosen = sources(known, data, adapt) if adapt is not None else {}
    found = adaptation(known, data, chosen, adapt or {}, config.normalise) if chosen else None
    unlabelled = replace(known, classes=None)  # it may learn other classes
    if found is None:
        return replace(known, classes=data.classes), None, check_fit(unlabelled, data, config.force)
    # Another sensor may have another resolution; what keeps its name is as the checkpoint knows it.
    kept = [name for name in data.sensors if name == chosen[name] and name not in (adapt or {})]
    forced = check_fit(unlabelled, data.restrict(kept), config.force) if kept else []
    return found.contract, found, forced


def adopt(model: Contract, data: Contract) -> Contract:
    """The contract `model` with the classes of `data`, after checking that it can read them.

    Raises:
        ContractError: as `check_fit`.
    """
    check_fit(replace(model, classes=None), data)
    return replace(model, classes=data.classes)


def build_model(run: Run, start: Start, outputs: int, new: str = "") -> MCFMamba:
    """A model drawn from the seed, then given the start's parameters.

    Args:
        run: what is trained.
        start: where it begins; its structure comes before the config's.
        outputs: output channels.
        new: unless the run goes on, parameters whose names begin with this keep their drawn values.
    """
    source = start.checkpoint
    torch.manual_seed(run.config.seed)
    structure = source.model_config if source else run.config.model
    model = MCFMamba(structure, run.contract.channels, outputs, run.config.engine.scan)
    if run.config.engine.recompute:
        model.recompute()
    if source and run.ranks.rank == 0:
        # A run goes on from its last parameters; another begins with the average.
        parameters = source.state.parameters if start.resumed else source.parameters
        if start.adaptation:
            interleaved = structure.profile != "paper"
            parameters = start.adaptation.parameters(parameters, dict(model.named_parameters()), interleaved)
        if new and not start.resumed:
            parameters = {name: tensor for name, tensor in parameters.items() if not name.startswith(new)}
        transfer(model, parameters, source.address)
    for parameter in model.parameters():
        broadcast(parameter.data)
    return model


def build_engine(run: Run, start: Start, model: MCFMamba) -> Engine:
    """The model under DeepSpeed, with the moments of the run's own checkpoint where it goes on.

    Says on stderr in which precision the engine holds what must stay float32.
    """
    engine = Engine(model, run.config.optim, run.config.engine, run.config.batch, run.ranks)
    if run.ranks.rank == 0:
        print(f"{run.config.run}: {precision_line(model.precision(), run.config.engine.precision)}", file=sys.stderr)
    if start.checkpoint and start.resumed:
        blank = {name: torch.zeros(1, bands, 32, 32) for name, bands in run.contract.channels.items()}
        engine.load(start.checkpoint.state, blank)
    return engine


def transfer(model: nn.Module, parameters: Mapping[str, Tensor], origin: str) -> None:
    """Copy parameters by name; log which of the model's stay as they were, and which of the source's are not used.

    Raises:
        CheckpointError: a shape differs, or no name fits.
    """
    own = dict(model.named_parameters())
    common = [name for name in parameters if name in own]
    wrong = [name for name in common if parameters[name].shape != own[name].shape]
    if wrong or not common:
        reason = f"{wrong[0]} is {tuple(parameters[wrong[0]].shape)} there" if wrong else "no name in common"
        raise checkpoint.CheckpointError(f"{origin} does not fit the model: {reason}; give it the same `model:`")
    with torch.no_grad():
        for name in common:
            own[name].copy_(parameters[name])
    for what, names in (("not loaded", own.keys() - set(common)), ("not used", parameters.keys() - set(common))):
        if names:
            log.warning("%s from %s: %s", what, origin, _abridged(sorted(names)))


def facts(run: Run, step: int, model: MCFMamba) -> dict[str, Any]:
    """What state.json of this run says after `step` steps, beside the hashes."""
    return {
        "step": step,
        "position": step * run.config.batch.global_batch,
        "seed": run.config.seed,
        "lanes": run.config.lanes,
        "fingerprint": run.fingerprint,
        "data": list(run.data),
        "model": asdict(model.config),
        "scan": model.scan_backend,
        "contract": run.contract.to_json(),
        "config": configs.to_dict(run.config),
        "version": code_version(),
        "forced": list(run.forced),
        "lineage": [*run.lineage, training(configs.to_dict(run.config), run.fingerprint, run.data)],
    }


def _abridged(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
