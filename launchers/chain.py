"""`mcf run CHAIN`: stages one after the other, here or as dependent jobs on Slurm, resumed at the one that failed.

A stage that is done already is passed over: shards that are merged and complete, a run at its last step, an evaluation
with its metrics, a map that is there. So the same command goes on where the chain stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configs
from configs import ConfigError
from launchers import local
from launchers.config import ChainConfig, ChainStep, SlurmConfig
from launchers.job import Job, verified

JOBS = "chain.json"  # name of a step -> id of its job, below the chain's folder


class ChainError(RuntimeError):
    """The jobs of a chain are under way still; the message says which and what to do."""


def load(chain: ChainConfig) -> list[tuple[ChainStep, Any]]:
    """The steps with their configs, all of them checked before anything begins.

    Raises:
        ConfigError: a config cannot be used, names the step; or two steps have one name.
    """
    found: list[tuple[ChainStep, Any]] = []
    for step in chain.steps:
        if step.name in (other.name for other, _ in found):
            raise ConfigError(f"steps: two are named {step.name!r}; a name is needed for each")
        try:
            found.append((step, configs.load(step.config, step.set)))
        except ConfigError as error:
            raise ConfigError(f"step {step.name}: {error}") from None
    return found


def finished(config: Any) -> bool:
    """Whether a stage has nothing left to do."""
    return _FINISHED[config.stage](config)


def _built(config: Any) -> bool:
    from shards.build import unfinished_parts
    from shards.manifest import read_facts
    from shards.store import open_store

    store = open_store(config.out)
    if not store.exists("dataset.json") or config.name not in read_facts(store).get("builds", {}):
        return False
    return not unfinished_parts(config, 1)


def _trained(config: Any) -> bool:
    from pipeline.checkpoint import facts_of_all
    from pipeline.run import store_of

    newest = next(iter(facts_of_all(store_of(config))), None)
    return newest is not None and newest["step"] == config.steps


_FINISHED: dict[str, Callable[[Any], bool]] = {
    "shards": _built,
    "pretrain": _trained,
    "finetune": _trained,
    "evaluate": lambda config: (Path(config.run) / "metrics.json").exists(),
    "predict": lambda config: "://" not in config.out and Path(config.out).exists(),
}


def run(chain: ChainConfig, processes: int = 0) -> int:
    """Run the chain on this machine: each stage in this process, or the training stages in so many ranks.

    Returns:
        0, or the code of a stage that was told to stop or failed in its ranks.

    Raises:
        VerifyError: the shards are damaged.
    """
    for step, config in load(chain):
        if finished(config):
            print(f"{step.name}: done before", file=sys.stderr)
            continue
        print(f"{step.name}: {config.stage}", file=sys.stderr)
        if config.stage == "shards":
            Job(config)()
            verified(config.out)
        elif processes and config.stage != "predict":
            if code := local.run(config, processes, Path(config.run) / "logs"):
                return code
        else:
            Job(config)()
    return 0


def submit(chain: ChainConfig) -> list[tuple[str, str]]:
    """Submit what is left of the chain; each job begins when the one before it succeeded, and is cancelled otherwise.

    Returns:
        Name of each step and the id of its job, or a word where it is done.

    Raises:
        ChainError: jobs of this chain are in the queue.
        SlurmError, JobsError: Slurm refused or does not answer.
    """
    from launchers.slurm_queue import LIVE, states

    record = Path(chain.folder) / JOBS
    before = json.loads(record.read_text()) if record.exists() else {}
    if live := [name for name, job in before.items() if states([job]).get(job) in LIVE]:
        raise ChainError(
            f"{chain.folder}: {', '.join(live)} of this chain wait or run; look with `mcf jobs`, or cancel them first"
        )
    told = []
    for name, job in _submitted(load(chain)):
        told.append((name, job or "done before"))
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({name: job for name, job in told if job.isdigit()}, indent=1))
    return told


def _submitted(steps: list[tuple[ChainStep, Any]]) -> Iterator[tuple[str, str]]:
    """Submits step by step; the id of each job, empty where a step is done."""
    from launchers import slurm

    after: str | None = None
    for step, config in steps:
        if after is None and finished(config):
            yield step.name, ""
            continue
        where: SlurmConfig = configs.load(step.slurm)
        if config.stage == "shards":
            _, after = slurm.submit_parts(config, where, step.parts, step.throttle, after, verify=True)
        else:
            after = slurm.submit(config, where, slurm.logs_of(config), after)
        yield step.name, after


def plan(chain: ChainConfig) -> str:
    """What would be done, a line per step."""
    lines = []
    for step, config in load(chain):
        where = getattr(config, "run", None) or config.out
        lines.append(f"{step.name:<16} {config.stage:<9} {'done before' if finished(config) else 'to do':<12} {where}")
    return "\n".join(lines)
