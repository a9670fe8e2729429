"""`mcf pretrain CONFIG --resume-check`: a proof, on one's own config and in minutes, that a killed run goes on exactly.

Three runs of the first steps, each as processes of its own, in a folder beside the run's:

    whole    all steps, uninterrupted
    killed   all ranks get KILL in the middle, between two checkpoints; the same command is started again
    fewer    the folder of `killed` as it was after the kill, gone on with by half as many ranks

Every line of metrics.jsonl holds a digest of the samples, positions and masks of its step over all ranks, and the loss.
Digests must be the same at every step; losses too, to the last bit, unless sums were taken in another order.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import monotonic
from typing import Any

import configs
from configs import ConfigError
from launchers import local
from pipeline.log import METRICS, read
from pipeline.ranks import Ranks, device
from pipeline.signals import EXIT_STOPPED, Stopped
from shards.manifest import MANIFEST

STEPS, KILL_AFTER, EVERY = 40, 17, 5
FEWEST_STEPS = 10  # with fewer, hardly anything lies between a checkpoint, the kill and the end
# Largest relative difference of losses whose sums were taken in another order: by fewer ranks, or on CUDA. Updates make
# more of a last bit: in the 25 steps after the kill, the demo's losses in fp32 come to differ by up to 2e-8.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}
RUNS = ("whole", "killed", "fewer")
# What does not change a step, and would only take time or disk.
FIXED = {
    "store": "",
    "keep": 2,
    "keep_every": 0,
    "keep_best": "",
    "patience": 0,
    "pictures_every": 0,
    "validate_every": 0,
    "epochs": None,
    "seeds": (),
}


class ResumeCheckError(RuntimeError):
    """The experiment could not be made as planned; the message says which run did what."""


@dataclass(frozen=True)
class Part:
    """One run of the experiment, at its end.

    Attributes:
        name: of RUNS.
        processes: number of ranks at its end.
        lines: of metrics.jsonl, one per step.
        seconds: it took.
        killed_at: step after which all ranks were killed; 0 = not at all.
        went_on_from: steps that it had not to make again; 0 = it was not started again.
    """

    name: str
    processes: int
    lines: Sequence[dict[str, Any]]
    seconds: float
    killed_at: int = 0
    went_on_from: int = 0


@dataclass(frozen=True)
class Compared:
    """A part against the whole run.

    Attributes:
        part: the one that was killed.
        tolerance: largest relative difference of losses that is allowed.
        digests: steps at which they are equal.
        losses: steps at which they are equal to the last bit.
        largest: relative difference of losses.
        difference: the first that is not allowed, in words; "" = none.
    """

    part: Part
    tolerance: float
    digests: int
    losses: int
    largest: float
    difference: str


def check(config: Any, processes: int, source: str = "") -> int:
    """Make the experiment beside the run that `config` names, and print a table and a verdict.

    Args:
        config: of a stage that trains; its own run folder is neither read nor written.
        processes: number of ranks.
        source: the preset or file that the user named; where a config of the demo finds no dataset, it is made.

    Returns:
        0 when the killed runs went on exactly; 1 when one did not, or the experiment could not be made.

    Raises:
        ConfigError: too few steps to be killed in the middle, or a batch that these ranks cannot share.
        DemoError, BuildError: the demo's dataset cannot be made.
        Stopped: a signal asked for it; all ranks have ended.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes} given; at least 1 is needed")
    config.batch.split(processes)
    settings = {name: experiment(config, name) for name in RUNS}
    make_demo_data(source, config)
    for run in settings.values():
        if Path(run.run).exists():
            shutil.rmtree(run.run)
    try:
        whole, *others = _runs(settings, processes)
    except ResumeCheckError as error:
        print(f"resume-check: FAILED: {error}")
        return 1
    found = [_compare(whole, part, _tolerance(config, part, processes)) for part in others]
    print(_table(whole, found))
    print(f"resume-check: {_verdict(found)}", flush=True)
    return 1 if any(item.difference for item in found) else 0


def experiment(config: Any, name: str) -> Any:
    """The config of one of RUNS: that of the user, but short, with a folder of its own.

    Raises:
        ConfigError: too few steps.
    """
    steps = min(STEPS, config.steps or STEPS)  # where epochs are given, nobody has counted the samples yet
    if steps < FEWEST_STEPS:
        raise ConfigError(f"steps: {config.steps} given; --resume-check needs at least {FEWEST_STEPS} to kill a run in")
    run = str(Path(f"{Path(config.run)}-resume-check") / name)
    changes = {**FIXED, "run": run, "steps": steps, "checkpoint_every": max(1, EVERY * steps // STEPS)}
    known = {field.name for field in fields(config)}
    return replace(config, **{key: value for key, value in changes.items() if key in known})


def make_demo_data(source: str, config: Any) -> None:
    """Make the demo's archive and shards, where a config of the demo finds none; nothing for any other config.

    Args:
        source: the preset or file that the user named.
        config: what it holds, with the user's overrides.

    Raises:
        DemoError, BuildError: the folders hold something else.
    """
    from launchers.demo import Scale, build_shards, fill_archive

    preset = source.startswith("demo-") and source in configs.presets() and not Path(source).is_file()
    if not preset and config.data != configs.load("demo-pretrain").data:
        return
    # The demo's shards lie in a local folder of that name; any other is a dataset of the user's, and missed as such.
    data = Path(str(config.data))
    if data.name != "data" or "://" in str(config.data) or (data / MANIFEST).exists():
        return
    _say(f"{data} holds no dataset: making the archive and the shards of the demo")
    fill_archive(data.parent, Scale())
    build_shards(data.parent)


def _runs(settings: dict[str, Any], processes: int) -> list[Part]:
    """All runs of the experiment, one after the other."""
    whole, killed, fewer = (settings[name] for name in RUNS)
    after = KILL_AFTER * whole.steps // STEPS
    _say(f"whole: {whole.steps} steps, {_ranks(processes)}, uninterrupted")
    parts = [_finish("whole", whole, processes)]
    _say(f"killed: the same, until all ranks are killed (kill -9) after step {after}")
    began = monotonic()
    at = _kill(killed, processes, after)
    spent = monotonic() - began
    if processes > 1:
        shutil.copytree(killed.run, fewer.run)
    _say(f"killed: killed after step {at}; the same command again")
    parts.append(_go_on("killed", killed, processes, at, spent))
    if processes > 1:
        _say(f"fewer: the folder as the kill left it, gone on with by {_ranks(processes // 2)}")
        parts.append(_go_on("fewer", fewer, processes // 2, at, 0.0))
    return parts


def _start(config: Any, processes: int, kill_when: Callable[[], bool] | None = None) -> int:
    """The exit code of a run's ranks.

    Raises:
        Stopped: a signal ended them.
    """
    code = local.run(config, processes, Path(config.run) / "logs", kill_when)
    if code in (EXIT_STOPPED, *(128 + number for number in local.FORWARDED)):
        raise Stopped("stopped as asked; the same command begins the check again")
    return code


def _finish(name: str, config: Any, processes: int) -> Part:
    """A run started and gone on with until its end."""
    began = monotonic()
    if code := _start(config, processes):
        raise _ended(config, code)
    lines = read(Path(config.run))
    if [line["step"] for line in lines] != list(range(1, config.steps + 1)):
        found = ", ".join(str(line["step"]) for line in lines) or "no step"
        raise ResumeCheckError(f"{config.run}/{METRICS} holds {found}; every step of 1 to {config.steps} belongs there")
    if missing := next((line["step"] for line in lines if not line.get("digest")), None):
        raise ResumeCheckError(f"{config.run}/{METRICS} has no digest of the samples at step {missing}")
    return Part(name, processes, lines, monotonic() - began)


def _ended(config: Any, code: int) -> ResumeCheckError:
    logs = Path(config.run) / "logs"
    return ResumeCheckError(f"{config.run} ended with code {code} after step {_last_step(config)}; its logs: {logs}")


def _kill(config: Any, processes: int, after: int) -> int:
    """Starts a run and kills all of its ranks after a step; the last step that it has recorded."""
    code = _start(config, processes, lambda: _last_step(config) >= after)
    last = _last_step(config)
    if code == 0 or last >= config.steps:
        raise ResumeCheckError(
            f"{config.run} was not killed in time: it had made all {config.steps} steps; make a step longer, with a "
            "larger batch.global_batch"
        )
    if code != 128 + signal.SIGKILL or last < after:
        raise _ended(config, code)
    return last


def _last_step(config: Any) -> int:
    """The last step in a run's metrics, 0 while there is none."""
    try:
        lines = read(Path(config.run))
    except FileNotFoundError:
        return 0
    return int(lines[-1]["step"]) if lines else 0


def _go_on(name: str, config: Any, processes: int, killed_at: int, spent: float) -> Part:
    """A killed run, started again and gone on with to its end."""
    before = read(Path(config.run))
    part = _finish(name, config, processes)
    # Lines hold times, so a line that is the same was not written again.
    old = next(i for i, line in enumerate(part.lines) if i >= len(before) or line != before[i])
    if old == 0:
        raise ResumeCheckError(f"{config.run} began again at step 1 instead of going on from its newest checkpoint")
    return replace(part, seconds=part.seconds + spent, killed_at=killed_at, went_on_from=old)


def _tolerance(config: Any, part: Part, processes: int) -> float:
    """How far losses may lie apart: not at all, where the same sums are taken in the same order."""
    other_order = part.processes != processes or device(Ranks()).type == "cuda"
    return TOLERANCES[config.engine.precision] if other_order else 0.0


def _compare(whole: Part, part: Part, tolerance: float) -> Compared:
    """Two runs of the same steps, step by step."""
    digests, losses, largest, first = 0, 0, 0.0, ""
    for a, b in zip(whole.lines, part.lines, strict=True):
        gap = abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), sys.float_info.min)
        digests += a["digest"] == b["digest"]
        losses += a["loss"] == b["loss"]
        largest = max(largest, gap)
        allowed = {"digest": a["digest"] == b["digest"], "loss": gap <= tolerance}
        if not first and not all(allowed.values()):
            what = ", ".join(f"{key} {a[key]} against {b[key]}" for key, same in allowed.items() if not same)
            first = f"first difference at step {a['step']}: {what} (run {part.name}, gone on from {part.went_on_from})"
    return Compared(part, tolerance, digests, losses, largest, first)


def _table(whole: Part, found: Sequence[Compared]) -> str:
    """Rows of all runs, in columns."""
    head = "run,ranks,killed at,went on from,steps compared,digests equal,losses bit-equal,largest difference,seconds"
    rows = [head.split(","), ["whole", str(whole.processes), *["-"] * 6, f"{whole.seconds:.0f}"]]
    for item in found:
        part, steps = item.part, len(whole.lines)
        counts = [f"{steps}", f"{item.digests}/{steps}", f"{item.losses}/{steps}", f"{item.largest:.1e}"]
        numbers = [part.processes, part.killed_at, part.went_on_from]
        rows.append([part.name, *map(str, numbers), *counts, f"{part.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def _verdict(found: Sequence[Compared]) -> str:
    if failures := [item.difference for item in found if item.difference]:
        return f"FAILED: {'; '.join(failures)}"
    said = []
    for item in found:
        exact = item.losses == len(item.part.lines)
        losses = "bit-equal" if exact else f"within {item.tolerance:.0e} (sums in another order)"
        said.append(f"{_ranks(item.part.processes)} from step {item.part.went_on_from}, losses {losses}")
    steps, at = len(found[0].part.lines), found[0].part.killed_at
    return f"exact: killed after step {at}, the same samples and masks at all {steps} steps; {'; '.join(said)}"


def _ranks(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _say(title: str) -> None:
    print(f"[resume-check] {title}", flush=True)
