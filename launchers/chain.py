"""`mcf run CHAIN`: stages one after the other, here or as dependent jobs on Slurm, resumed at the one that failed.

A stage that is done already is passed over: shards that are merged and complete, a run at its last step, an evaluation
with its metrics, a map that is there. So the same command goes on where the chain stopped.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configs
from configs import ConfigError
from launchers import is_message, local
from launchers.config import ChainConfig, ChainStep, SlurmConfig
from launchers.job import Job, verified

JOBS = "chain.json"  # name of a step -> id of its job, below the chain's folder


class ChainError(RuntimeError):
    """A step cannot be, or the chain's jobs are under way still; the message says which and what to do."""


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
    from pipeline.run import is_finished, store_of
    from pipeline.seeds import per_seed

    runs = per_seed(config) if config.stage == "finetune" else [config]
    newest = [next(iter(facts_of_all(store_of(each))), None) for each in runs]
    return all(facts is not None and is_finished(config, facts) for facts in newest)


_FINISHED: dict[str, Callable[[Any], bool]] = {
    "shards": _built,
    "pretrain": _trained,
    "finetune": _trained,
    "evaluate": lambda config: any(
        (Path(config.run) / name).exists() for name in ("metrics.json", "summary.json", "compare.json")
    ),
    "predict": lambda config: not config.catalog and "://" not in config.out and Path(config.out).exists(),
}


def run(chain: ChainConfig, processes: int = 0) -> int:
    """Run the chain on this machine: each stage in this process, or the training stages in so many ranks.

    Returns:
        0, or the code of a stage that was told to stop or failed in its ranks.

    Raises:
        ChainError: a step cannot be as it is configured.
        VerifyError: the shards are damaged.
    """
    steps = load(chain)
    list(_plans(steps, "local" if processes else "here", processes))  # what cannot be is told before hours are spent
    for step, config in steps:
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
        ChainError: jobs of this chain are in the queue, or a step cannot be as it is configured.
        SlurmError, JobsError: Slurm refused or does not answer.
    """
    from launchers.slurm_queue import LIVE, states

    record = Path(chain.folder) / JOBS
    before = json.loads(record.read_text()) if record.exists() else {}
    if live := [name for name, job in before.items() if states([job]).get(job) in LIVE]:
        raise ChainError(
            f"{chain.folder}: {', '.join(live)} of this chain wait or run; look with `mcf jobs`, or cancel them first"
        )
    told, steps = [], load(chain)
    print("\n".join(_plans(steps, "slurm", 0)), file=sys.stderr)
    for name, job in _submitted(steps):
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


def plan(chain: ChainConfig, on: str = "here", processes: int = 1) -> str:
    """What would be done: a line per step, and below it what a training stage will take.

    Args:
        chain: the steps.
        on: here, local or slurm.
        processes: ranks with `local`.

    Raises:
        ChainError: a step cannot be as it is configured.
    """
    return "\n".join(_plans(load(chain), on, processes))


def _plans(steps: list[tuple[ChainStep, Any]], on: str, processes: int) -> Iterator[str]:
    """A text per step; of what reads from a step that is not done yet, that it cannot be planned before."""
    made: dict[str, str] = {}  # address -> name of the step that will make it
    for step, config in steps:
        done = finished(config)
        out = getattr(config, "run", None) or config.out
        yield f"{step.name:<16} {config.stage:<9} {'done before' if done else 'to do':<12} {out}"
        if done:
            continue
        first = next(
            (made[place] for read in _reads(config) for place in made if f"{read}/".startswith(f"{place}/")), ""
        )
        if first:
            yield f"    no plan before {first} is done, whose results it reads"
        elif config.stage in ("pretrain", "finetune"):
            yield _planned(step, config, on, processes)
        made[_address(out)] = step.name


def _planned(step: ChainStep, config: Any, on: str, processes: int) -> str:
    """The plan of a training stage, indented."""
    from launchers.plan import plan

    slurm: SlurmConfig | None = configs.load(step.slurm) if on == "slurm" else None
    ranks = slurm.nodes * slurm.ranks_per_node if slurm else max(1, processes) if on == "local" else 1
    try:
        return textwrap.indent(plan(config, ranks, slurm).text(), "    ")
    except Exception as error:
        if not is_message(error):
            raise
        raise ChainError(f"step {step.name} cannot be: {error}") from error


def _reads(config: Any) -> Iterator[str]:
    """Datasets and checkpoints that a stage needs."""
    data = getattr(config, "data", ())
    for name in [data] if isinstance(data, str) else data:
        yield _address(name)
    probe = getattr(config, "probe", None)
    for given in (getattr(config, "checkpoint", None), getattr(config, "start", None), probe and probe.data):
        if given:
            yield _address(given)


def _address(given: str) -> str:
    """A folder or s3:// prefix, in one form."""
    return given.rstrip("/") if "://" in given else os.path.abspath(given)
